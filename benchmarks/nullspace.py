"""What a step of null-space adapters costs beside SFT and other adapters at SmolLM2's shape: time, FLOPs, memory.

python -m benchmarks.nullspace [--steps 6 --tokens 512 --labels 128] [overrides, e.g. model=qwen_05b]

As in benchmarks/steps.py weights are random at `model.shape`, rows are random tokens and methods are set up by
`estimate_memory`. The adapters' rivals on the same matrices are peft's LoRA with r = 64, SaLoRA on it, and peft's
own layers with a random A frozen (LoRA-FA; a random A in the null space, as for continual learning, costs the same).
Memory and FLOPs are counted by experiments/cost.py; `benchmarks.memory` measures the peak.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence

from omegaconf import DictConfig

from benchmarks import runner
from benchmarks.methods import ratios
from benchmarks.runner import Skipped, entry
from benchmarks.steps import PROMPTS, STOCK, stock, trainer
from cwac.core import config
from cwac.training.engine import MethodTrainer
from experiments.cost import Row, estimate, shape

LORA = "model.lora={r: 64, alpha: 64, target_modules: all-linear}"
SHAPE_70B = (
    "model=llama3",
    "model.name=llama3_70b",
    "model.shape={model_type: llama, vocab_size: 128256, hidden_size: 8192, intermediate_size: 28672, "
    "num_hidden_layers: 80, num_attention_heads: 64, num_key_value_heads: 8}",
)
"""Llama-3-70B by its model card."""


def frozen_a(cfg: DictConfig, row: Row, steps: int, folder: str) -> MethodTrainer:
    """LoRA by peft's own layers with its random A frozen."""
    made = trainer(cfg, row, steps, folder)
    for name, parameter in made.model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    return made


def measure(
    steps: int = 6, tokens: int = 512, labels: int = 128, overrides: Sequence[str] = ()
) -> Iterator[dict | Skipped]:
    """Rows of the step's time against each rival, of FLOPs, and of peak memory; then Llama-2-7B's and Llama-3-70B's.

    steps: optimizer steps of each trainer, the first left out. tokens, labels: of the one row of a batch, and how many
    of them carry a label.
    """
    row, whole = Row(tokens, labels, PROMPTS), Row(tokens, tokens, PROMPTS)
    given = ["model=smollm2", "task=sst2", "train.per_device_train_batch_size=1", *overrides]

    def of(method: str, *more: str) -> DictConfig:
        return config.compose([*given, f"method={method}", *more])

    sft, lora, few, every = (
        of("sft"),
        of("sft", LORA),
        of("nullspace", "method.k=64"),
        of("nullspace", "method.k=null"),
    )
    model = sft.model.name
    batch = f"{model}, 1 x {tokens} tokens, {labels} of them labels"

    def timed(name: str, ours: DictConfig, rival: str, theirs: DictConfig, make: Callable, bar: float | None) -> dict:
        with tempfile.TemporaryDirectory() as folder:
            pair = [trainer(ours, row, steps, folder), make(theirs, row, steps, folder)]
            return entry(f"step of {name}, {batch}", rival, ratios(pair, 1), bar)

    yield timed("nullspace, k 64", few, f"step {STOCK}", sft, stock, 0.75)
    yield timed("nullspace, k 64", few, "step of sft", sft, trainer, None)
    yield timed("nullspace, k 64", few, "step of LoRA r 64 by peft", lora, trainer, 1.0)
    yield timed("nullspace, k 64", few, "step of LoRA-FA r 64 by peft's layers", lora, frozen_a, None)
    yield timed("nullspace, k 64", few, "step of salora r 64", of("salora", LORA, "method.modules=all"), trainer, None)
    yield timed("nullspace, k 64", few, "step of weight_only_closed", of("weight_only_closed"), trainer, None)
    yield timed("nullspace, k 64", few, "step of cwac; 4 harmful prompts", of("cwac"), trainer, None)
    yield timed("nullspace, k all", every, f"step {STOCK}", sft, stock, 1.0)
    yield timed("nullspace, k all", every, "step of weight_only_closed", of("weight_only_closed"), trainer, None)
    unfolded = of("nullspace", "method.k=null", "method.fold=false")
    yield timed("nullspace, k all", every, "step of nullspace, k all, not folded", unfolded, trainer, None)
    plain = estimate(sft, shape(sft), whole)
    settings = (("k 64", few, 0.5), ("k all", every, 0.85), ("k all, not folded", unfolded, 0.85))
    for name, cfg, bar in settings:
        counted = estimate(cfg, shape(cfg), row)
        share = counted.flops / plain.flops
        yield entry(f"FLOPs of a step of nullspace, {name}, {batch}, counted", f"FLOPs {STOCK}, counted", share)
        share = counted.total / plain.total
        yield entry(f"peak memory of nullspace, {name}, {batch}, counted", f"peak memory {STOCK}, counted", share, bar)
    yield from large(row)


def large(row: Row) -> Iterator[dict]:
    """Peak memory on one card, counted, over the gigabytes that the bar allows: bf16 autocast, checkpointing, k 64."""
    given = ["task=gsm8k", "train.bf16=true", "train.gradient_checkpointing=true", "train.optim=adamw_torch_fused"]
    given += ["train.per_device_train_batch_size=1", "method=nullspace", "model.dtype=bfloat16"]
    places = ((["model=llama2"], "llama2", 24e9, 12e9), (list(SHAPE_70B), "llama3_70b", None, None))
    for model, name, in_bf16, in_4_bits in places:
        for base, more, allowed in (
            ("bf16", [], in_bf16),
            ("4 bits", ["model.load_in_4bit=true"], in_4_bits),
        ):
            cfg = config.compose([*model, *given, *more])
            total = estimate(cfg, shape(cfg), row).total
            bar = None if allowed is None else allowed / 1e9
            title = f"peak memory of nullspace, k 64, {name}, base in {base}, 1 x {row.tokens} tokens, counted"
            yield entry(title, "1 GB", total / 1e9, bar)


if __name__ == "__main__":
    sys.exit(runner.main(measure))
