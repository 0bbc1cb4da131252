"""What a run gains where freed memory stays with the process (`cwac.training.allocator`), and what memory that takes.

python -m benchmarks.allocator [--repeats 3 --steps 6 --tokens 512 --labels 128] [overrides]

Each training runs in a process of its own, in turns, since the setting is the process's. CPU time of the thread, the
operating system's part included: the page faults are in it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np
from omegaconf import DictConfig

from benchmarks import runner
from benchmarks.runner import Skipped, entry
from benchmarks.steps import PROMPTS
from cwac.core import config
from cwac.training.allocator import keep_freed_memory
from experiments import cost
from experiments.cost import Row, shape

TRAINED = {
    "sft": (("method=sft",), 0.9),
    "nullspace, k 64": (("method=nullspace", "method.k=64"), None),
}
"""Name -> overrides, and the share of its own CPU time without the setting that it may take."""


def measure(
    repeats: int = 3, steps: int = 6, tokens: int = 512, labels: int = 128, overrides: Sequence[str] = ()
) -> Iterator[dict | Skipped]:
    """Rows of CPU time and of measured peak memory, over the same under glibc's defaults.

    steps: optimizer steps of each training. tokens, labels: of the one row of a batch, and how many carry a label.
    """
    row = Row(tokens, labels, PROMPTS)
    given = ["model=smollm2", "task=sst2", "train.per_device_train_batch_size=1", *overrides]
    for name, (more, bar) in TRAINED.items():
        cfg = config.compose([*given, *more])
        pairs = []
        for repeat in range(repeats):
            order = (True, False) if repeat % 2 else (False, True)
            pair = {kept: alone(cfg, row, steps, kept) for kept in order}
            if pair[True] is None:
                yield Skipped(
                    f"freed memory kept, {name}",
                    "no glibc, one that refuses it, or its thresholds are set in the environment",
                )
                return
            pairs.append(np.array(pair[True]) / np.array(pair[False]))
        batch = f"{name}, {cfg.model.name}, 1 x {tokens} tokens, freed memory kept"
        seconds, memory = np.array(pairs).T
        yield entry(f"CPU time of {steps} steps of {batch}", "the same under glibc's defaults", seconds, bar)
        yield entry(f"peak memory of {batch}", "the same under glibc's defaults", memory)


def alone(cfg: DictConfig, row: Row, steps: int, kept: bool) -> tuple[float, float] | None:
    """CPU seconds and peak bytes of a training in a process of its own; None where memory cannot be kept."""
    return runner.alone(taken, cfg, row, steps, kept)


def taken(cfg: DictConfig, row: Row, steps: int, kept: bool) -> tuple[float, float] | None:
    if kept and not keep_freed_memory():
        return None
    began = time.process_time()
    peak = cost.measure(cfg, shape(cfg), row, steps)[0]
    return time.process_time() - began, peak


if __name__ == "__main__":
    sys.exit(runner.main(measure))
