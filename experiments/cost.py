"""What a run will take: memory by part and the FLOPs of a step, before anything is loaded or downloaded.

python -m experiments.cost model=llama2 task=gsm8k method=cwac
python -m experiments.cost model=smollm2 train.bf16=true --measure 3        and what it took, beside the estimate

One optimizer step is run on fake tensors (`torch._subclasses.FakeTensorMode`), which have shapes and no memory:
forward pass, penalty, backward pass and hooks, in the order of cwac/training/engine.py, through the model's own code.
A ledger counts the storages alive and the products' FLOPs. So nothing is assumed about an architecture beyond its
configuration, which is `model.shape`, or the config.json of a folder.

What is assumed, each with an option: every row is as long as train.max_length and carries a label at every token
(`--tokens`, `--label-tokens`), prompts of a penalty have `--prompt-tokens`, V has `--rank-share` of its input's
dimension. Not counted: the CUDA context, the allocator's fragmentation, a kernel's scratch space, what a method keeps
for which it has no `estimate_memory` (said where it applies), evaluation.

`--measure N` trains N steps of a randomly initialised model of that shape on this machine, with rows of that length.
On a GPU the peak is the allocator's; else it is the process's resident peak (`peak_memory` in
cwac/training/engine.py), less what was resident after the same training of a model of a million parameters, whose own
memory is given back first.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TypeAlias
from unittest import mock

os.environ.setdefault("TQDM_DISABLE", "1")

import torch  # noqa: E402
from hydra.errors import HydraException  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402
from omegaconf.errors import OmegaConfBaseException  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_map_only  # noqa: E402
from torch.utils.flop_counter import flop_registry  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, TrainingArguments  # noqa: E402
from transformers.utils import logging as hf_logging  # noqa: E402

from cwac.core import config, validation  # noqa: E402
from cwac.core.errors import UsageError, UserError  # noqa: E402
from cwac.core.identity import local_folder  # noqa: E402
from cwac.methods.base import Method, Sizes  # noqa: E402
from cwac.models.layers import base_layer, device, linears  # noqa: E402
from cwac.models.loading import DTYPES, add_lora  # noqa: E402
from cwac.training import engine  # noqa: E402
from cwac.training.arguments import check_precision, training_arguments  # noqa: E402

STATE = {
    "sgd": 0.0,
    "adamw_torch": 8.0,
    "adamw_torch_fused": 8.0,
    "adamw_8bit": 2 + 8 / 256,
    "adamw_bnb_8bit": 2 + 8 / 256,
    "paged_adamw_8bit": 2 + 8 / 256,
}
"""Bytes of optimizer state a parameter: two moments; in 8 bits with an fp32 scale for each 256 (arXiv:2110.02861)."""
MMAP = 32 * 2**20
"""glibc gives blocks of this size and more back when they are freed, and keeps what smaller ones leave (mallopt(3),
M_MMAP_THRESHOLD): on a CPU the gradients of one step still take their room while the next one's activations grow."""
FOUR_BIT = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes a weight in NF4, an 8-bit scale for 64 weights, an fp32 one for 256 scales (QLoRA, arXiv:2305.14314, 3)."""
NANO = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
}
"""Large enough that the libraries set up the scratch space of their threads."""


flop_registry[torch.ops.aten.addmm_] = flop_registry[torch.ops.aten.addmm]  # torch counts it out of place alone


@dataclass
class Row:
    """What every row of the batch is taken to look like, and what a method cannot know beforehand."""

    tokens: int
    labels: int
    sizes: Sizes


@dataclass
class Estimate:
    """Bytes at the moment of the step's peak, by part; FLOPs of the step; bytes of a setup, by its name."""

    parts: dict[str, float]
    flops: float
    before: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.parts.values())


class Ledger(TorchDispatchMode):
    """Counts the storages that are alive, by part, and remembers the parts at the moment of their greatest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[weakref.ref, str, float]] = {}
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.flops = 0.0
        self.weights: set[int] = set()

    def put(self, tensor: Tensor, part: str, size: float | None = None) -> None:
        """Enter a tensor's storage, or move it to another part; size: bytes, where it differs from the storage's."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.live:
            _, old, known = self.live[key]
            self.now[old] -= known
            size = known if size is None else size
        size = storage.nbytes() if size is None else size
        self.live[key] = weakref.ref(storage, lambda _: self.drop(key)), part, size
        self.now[part] += size
        if self.now.total() > self.peak.total():
            self.peak = self.now.copy()

    def drop(self, key: int) -> None:
        _, part, size = self.live.pop(key)
        self.now[part] -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        cast = func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self.weights

        def see(tensor: Tensor) -> None:
            if tensor.untyped_storage()._cdata not in self.live:
                self.put(tensor, "weights cast by autocast" if cast else "activations")

        tree_map_only(Tensor, see, out)
        return out


def shape(cfg: DictConfig) -> PretrainedConfig:
    """The architecture's configuration, without a download where `model.shape` gives it."""
    if (folder := local_folder(cfg.model)) is not None:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    if cfg.model.get("shape"):
        return AutoConfig.for_model(**OmegaConf.to_container(cfg.model.shape))
    from cwac.core import hf_hub

    resolved = hf_hub.resolve(cfg.model.hub_id, cfg.model.get("revision"), "model.hub_id", cfg.model.get("license"))
    return AutoConfig.from_pretrained(cfg.model.hub_id, revision=resolved.commit)


def build(cfg: DictConfig, architecture: PretrainedConfig, where: torch.device | str = "cpu") -> nn.Module:
    """A random model as a run would load it, but for a 4-bit base, which is held in `model.dtype`."""
    with torch.device(where):
        model = AutoModelForCausalLM.from_config(
            architecture, dtype=DTYPES[cfg.model.dtype], attn_implementation=cfg.model.get("attention")
        )
        model.tie_weights()
        return add_lora(model, cfg.model.lora) if cfg.model.get("lora") else model


def fake_(model: nn.Module) -> nn.Module:
    """Give a model without memory tensors of the fake mode that is active; ties stay ties. `Module.to` cannot."""
    known: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is not None and old not in known:
                    new = torch.empty_like(old, device="cpu")
                    known[old] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                tensors[name] = known.get(old)
    return model


def prepare(cfg: DictConfig, folder: str = "", **settings) -> tuple[TrainingArguments, Method]:
    """The run's arguments and its method; UsageError as train.py gives it."""
    validation.validate(cfg)
    method = config.instantiate(cfg.method)
    args = training_arguments(cfg, SimpleNamespace(dir=Path(folder)))
    for key, value in settings.items():
        setattr(args, key, value)
    return args, method


def complete(method: Method) -> bool:
    """Whether `estimate_memory` stands for all that `setup` leaves behind."""
    return type(method).setup is Method.setup or type(method).estimate_memory is not Method.estimate_memory


def estimate(cfg: DictConfig, architecture: PretrainedConfig, row: Row) -> Estimate:
    """Peak memory and FLOPs of one optimizer step in the middle of a run, whose optimizer has its state.

    Raises UsageError for an optimizer that is not in STATE.
    """
    args, method = prepare(cfg)
    if args.optim.value not in STATE:
        raise UsageError(f"train.optim={args.optim.value} has no estimate; use one of {', '.join(STATE)}")
    ledger = Ledger()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = fake_(build(cfg, architecture, "meta")).train()
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        # an adapter is made where the model is; torch cannot convert a module of fake tensors
        with torch.no_grad(), mock.patch.object(nn.Module, "to", lambda module, *given, **more: module):
            own = method.estimate_memory(model, row.sizes)
        model = own.model or model
        enter(ledger, cfg, args, model, own.tensors)
        with ledger:
            step(ledger, args, model, method if complete(method) else Method(method.name), row)
    # AdamW over lists of tensors, torch's choice on a GPU unless it is fused, holds a copy of the second moments
    if args.optim.value == "adamw_torch" and device().type == "cuda":
        ledger.now["optimizer state"] += 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    peak = max(ledger.peak, ledger.now, key=Counter.total)
    if device().type == "cpu":
        kept = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None and p.grad.nbytes < MMAP)
        peak["heap that freed gradients leave"] = max(0.0, kept - peak["gradients"])
    return Estimate({part: size for part, size in peak.items() if size > 0}, ledger.flops, own.setup_bytes)


def as_sft(cfg: DictConfig) -> DictConfig:
    """The same run without a defence."""
    plain = cfg.copy()
    plain.method = config.compose(["method=sft"]).method
    return plain


def enter(ledger: Ledger, cfg: DictConfig, args, model: nn.Module, kept: dict[str, list[Tensor]]) -> None:
    """Put into the ledger what is there when a step begins."""
    masters = args.bf16 or args.fp16
    state = 0.0
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for parameter in model.parameters():
        if masters and parameter.dtype == torch.float32 and parameter.requires_grad:
            ledger.put(parameter, "weights (fp32 masters)")
        else:
            ledger.put(parameter, f"weights ({str(parameter.dtype).removeprefix('torch.')})")
        ledger.weights.add(parameter.untyped_storage()._cdata)
        if parameter.requires_grad:
            # bitsandbytes keeps small tensors, and Trainer embeddings, in 32 bits
            whole = parameter.numel() < 4096 or id(parameter) in embeddings
            per = STATE[args.optim.value]
            state += parameter.numel() * (8.0 if whole and per else per)
            parameter.register_post_accumulate_grad_hook(lambda p: ledger.put(p.grad, "gradients"))
            if args.gradient_accumulation_steps > 1:
                parameter.grad = torch.empty_like(parameter)
                ledger.put(parameter.grad, "gradients")
    for buffer in model.buffers():
        ledger.put(buffer, "weights (buffers)")
    if cfg.model.get("load_in_4bit"):
        matrices = [base_layer(m).weight for m in linears(model, "all").values()]
        for weight in matrices:
            ledger.put(weight, "weights (4 bit)", weight.numel() * FOUR_BIT)
        # one matrix at a time is multiplied in full
        ledger.now["activations"] += max(w.nbytes for w in matrices)
    for part, tensors in kept.items():
        for tensor in tensors:
            ledger.put(tensor, part)
    ledger.now["optimizer state"] = state
    ledger.peak = ledger.now.copy()  # not that of entering, where a 4-bit base stood in full for a moment


def step(ledger: Ledger, args: TrainingArguments, model: nn.Module, method: Method, row: Row) -> None:
    """The last micro-batch of an optimizer step, as cwac/training/engine.py takes it, but for the optimizer itself.

    Logits are computed at the label positions, as there; a model that does not know `logits_to_keep` computes all.
    """
    ids = torch.zeros(args.per_device_train_batch_size, row.tokens, dtype=torch.long)
    labels = torch.zeros(len(ids), row.labels, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros_like(ids)}
    half = torch.bfloat16 if args.bf16 else torch.float16
    with torch.autocast("cpu", half, enabled=args.bf16 or args.fp16):
        # the output holds the logits until the penalty is added
        output = model(**batch, shift_labels=labels, logits_to_keep=row.labels, num_items_in_batch=labels.numel())
        loss, penalty = output.loss, method.penalty(model, 1)
        if penalty is not None:
            loss = loss + penalty
    del output
    loss.backward()
    with torch.no_grad():
        method.after_backward(model)
        method.before_step(model)
        method.after_step(model)


Training: TypeAlias = "Callable[[DictConfig, PretrainedConfig, Row, int], dict[str, float]]"
"""What trains `steps` steps and returns `memory` in MiB and `seconds_per_step`, as `train` does."""


def measure(
    cfg: DictConfig, architecture: PretrainedConfig, row: Row, steps: int, training: Training | None = None
) -> tuple[float, float]:
    """Peak bytes and median seconds of `steps` steps of a random model; see the module for what is subtracted.

    training: what trains, with the signature of `train`; None for `train` itself.
    """
    training = training or train
    training(
        cfg, AutoConfig.for_model(**NANO), Row(16, 16, Sizes(prompt_tokens=8, rank_share=row.sizes.rank_share)), 2
    )
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc keeps what was freed; elsewhere the baseline stays a little high
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    resident = 0.0 if torch.cuda.is_available() else resident_memory()
    cost = training(cfg, architecture, row, steps)
    return (cost["memory"] - resident) * 2**20, cost["seconds_per_step"]


def resident_memory() -> float:
    """MiB the process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def random_run(
    cfg: DictConfig, architecture: PretrainedConfig, row: Row, steps: int, folder: str
) -> tuple[TrainingArguments, nn.Module, Method, list[dict]]:
    """What a run trains with for `steps` steps of a random model on random rows; `estimate_memory` sets it up."""
    args, method = prepare(cfg, folder, max_steps=steps, save_strategy="no", learning_rate=1e-6)
    check_precision(cfg, args, method)  # only here: an estimate needs no bitsandbytes
    if not complete(method):
        raise UserError(f"method={method.name} has no estimate_memory, so only a training measures it")
    model = build(cfg, architecture, device()).train()
    with torch.no_grad():
        model = method.estimate_memory(model, row.sizes).model or model
    ids = torch.randint(architecture.vocab_size, (steps * args.train_batch_size, row.tokens)).tolist()
    first = max(0, row.tokens - row.labels)
    return args, model, method, [{"input_ids": x, "labels": [-100] * first + x[first:]} for x in ids]


def train(cfg: DictConfig, architecture: PretrainedConfig, row: Row, steps: int) -> dict[str, float]:
    """The costs that cwac.training.engine.train returns for `steps` steps of a random model on random rows."""
    with tempfile.TemporaryDirectory() as folder:
        args, model, method, rows = random_run(cfg, architecture, row, steps, folder)
        run = SimpleNamespace(id="cost", dir=Path(folder))
        plan = OmegaConf.create({"eval": {"at": []}})
        _, cost = engine.train(plan, args, run, model, method, rows, 0, lambda *point: None)
        return cost


def machine() -> tuple[str, float]:
    """What a run would use here, and its memory in bytes."""
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        return card.name, card.total_memory
    return "this machine", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def table(cfg: DictConfig, row: Row, found: Estimate, sft: float | None, took: tuple[float, float] | None) -> str:
    """The printed estimate: GB are 10^9 bytes. sft: FLOPs of the same step of plain fine-tuning, to compare with."""
    name, memory = machine()
    size = f"{cfg.train.per_device_train_batch_size} x {row.tokens} tokens, {row.labels} of a row with a label"
    lines = [f"{cfg.model.name}, method={cfg.method.name}: a step of {size}"]
    lines += [f"  {part:<34}{size / 1e9:>9.3f} GB" for part, size in sorted(found.parts.items(), key=lambda p: -p[1])]
    share = f"{100 * found.total / memory:.0f} % of the {memory / 1e9:.1f} GB of {name}"
    lines += [f"  {'peak of the training, estimated':<34}{found.total / 1e9:>9.3f} GB   {share}"]
    if took is not None:
        peak, seconds = took
        lines += [
            f"  {'measured':<34}{peak / 1e9:>9.3f} GB   the estimate is {100 * (found.total / peak - 1):+.1f} %; "
            f"{seconds:.3g} s a step"
        ]
    weights = sum(size for part, size in found.parts.items() if part.startswith("weights ("))
    lines += [
        f"  {f'{name} before it, with the weights':<34}{(weights + size) / 1e9:>9.3f} GB   at most"
        for name, size in found.before.items()
    ]
    share = "" if sft is None else f"   {found.flops / sft:.2f} of SFT's, of what multiplies matrices"
    return "\n".join([*lines, f"  {'FLOPs of a step':<34}{found.flops / 1e12:>9.3f} TFLOP{share}"])


@config.command
def main(arguments: list[str] | None = None) -> int:
    """Prints one table a cell; exit code 0, or that of the error, as train.py gives it."""
    parser = config.Parser(**config.about(__doc__, "python -m experiments.cost"))
    parser.add_argument("overrides", nargs="*", help="as for train.py: model=llama2 task=gsm8k method=sft,cwac")
    parser.add_argument("--tokens", type=int, help="of a row; train.max_length where it is not given")
    parser.add_argument("--label-tokens", type=int, help="of a row that carry a label; all where it is not given")
    parser.add_argument("--prompt-tokens", type=int, default=Sizes.prompt_tokens)
    parser.add_argument("--rank-share", type=float, default=Sizes.rank_share)
    parser.add_argument("--measure", type=int, metavar="STEPS", help="train so many steps, and compare")
    args = parser.parse_intermixed_args(arguments)
    hf_logging.set_verbosity_error()
    of_sft: dict[str, Estimate] = {}
    try:
        for cfg in config.expand(None, args.overrides):
            tokens = args.tokens or cfg.train.max_length
            sizes = Sizes(prompt_tokens=min(args.prompt_tokens, tokens), rank_share=args.rank_share)
            row, architecture = Row(tokens, args.label_tokens or tokens, sizes), shape(cfg)
            cost_estimate = estimate(cfg, architecture, row)
            counted = complete(config.instantiate(cfg.method))
            plain = as_sft(cfg)
            if counted and (same := str((plain, row))) not in of_sft:  # the cells of a sweep mostly share it
                of_sft[same] = cost_estimate if cfg.method == plain.method else estimate(plain, architecture, row)
            sft = of_sft[same].flops if counted else None
            took = measure(cfg, architecture, row, args.measure) if args.measure else None
            print(table(cfg, row, cost_estimate, sft, took), flush=True)
            if not counted:
                print(f"  not counted: what method={cfg.method.name} keeps and computes beside the training itself")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except (HydraException, OmegaConfBaseException) as error:
        print(f"error: {str(error).split('Config search path')[0].strip()}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
