"""Peak memory of a training as the process shows it, null-space adapters and rivals beside SFT, at SmolLM2's shape.

python -m benchmarks.memory [--steps 3 --tokens 512 --labels 128] [overrides, e.g. model=qwen_05b]

The same shapes are counted by `benchmarks.nullspace`; here each training runs in a process of its own, and the peak of
its resident memory (a GPU's: of what was allocated) is taken without what Python and the libraries hold
(`experiments.cost.measure`). Load on the machine does not change it.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Iterator, Sequence

from omegaconf import DictConfig
from transformers import PretrainedConfig

from benchmarks import runner
from benchmarks.nullspace import LORA
from benchmarks.runner import entry
from benchmarks.steps import PROMPTS, STOCK, stock
from cwac.core import config
from cwac.training.engine import peak_memory, reset_peak_memory
from experiments import cost
from experiments.cost import Row, shape

TRAINED = (
    ("nullspace, k 64", ("method=nullspace", "method.k=64"), 0.5),
    ("nullspace, k all", ("method=nullspace", "method.k=null"), 0.85),
    ("nullspace, k all, not folded", ("method=nullspace", "method.k=null", "method.fold=false"), 0.85),
    ("LoRA r 64 by peft", ("method=sft", LORA), None),
    ("weight_only_closed", ("method=weight_only_closed",), None),
    ("cwac", ("method=cwac",), None),
)
"""Name, overrides, and the share of SFT's peak that it may have, SFT by our trainer and by transformers' own."""


def measure(steps: int = 3, tokens: int = 512, labels: int = 128, overrides: Sequence[str] = ()) -> Iterator[dict]:
    """Rows of measured peak memory over SFT's, by our trainer (logits where a label is) and by transformers' own.

    steps: optimizer steps of each training. tokens, labels: of the one row of a batch, and how many carry a label.
    """
    row = Row(tokens, labels, PROMPTS)
    given = ["model=smollm2", "task=sst2", "train.per_device_train_batch_size=1", *overrides]
    sft = config.compose([*given, "method=sft"])
    batch = f"{sft.model.name}, 1 x {tokens} tokens, {labels} of them labels"
    rivals = {"of sft": alone(sft, row, steps), STOCK: alone(sft, row, steps, by_trainer)}
    for name, more, bar in TRAINED:
        ours = alone(config.compose([*given, *more]), row, steps)
        for rival, theirs in rivals.items():
            yield entry(
                f"peak memory of {name}, {batch}, measured", f"peak memory {rival}, measured", ours / theirs, bar
            )


def alone(cfg: DictConfig, row: Row, steps: int, training: cost.Training = cost.train) -> float:
    """Bytes at the peak of a training in a process of its own."""
    return runner.alone(cost.measure, cfg, shape(cfg), row, steps, training)[0]


def by_trainer(cfg: DictConfig, architecture: PretrainedConfig, row: Row, steps: int) -> dict[str, float]:
    """`cost.train` by transformers' own Trainer, which computes logits at every token."""
    reset_peak_memory()
    with tempfile.TemporaryDirectory() as folder:
        stock(cfg, row, steps, folder, architecture).train()
    return {"memory": peak_memory(), "seconds_per_step": math.nan}


if __name__ == "__main__":
    sys.exit(runner.main(measure))
