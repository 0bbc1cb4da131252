"""What null-space adapters prepare before training at SmolLM2's shape, and how much of it is reading the anchors.

python -m benchmarks.preparation [--anchors 346 --fewer 96]

The model has to read each anchor, whatever is made of it. So the forward passes alone, with nothing recorded, are what
no way of finding V and N goes below. Weights are random, rows are 60 random tokens, 24 of which are the template's.
Left out: the aligned model's own answers to the anchors, which every method shares and keeps. No part of `make bench`,
since it takes minutes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from benchmarks import runner
from benchmarks.constraint import random_rows
from benchmarks.runner import entry, timed
from cwac.constraints.nullspace import fit_free, second_moments
from cwac.constraints.subspace import capture, fit_subspace
from cwac.core import config
from cwac.models.layers import input_group, linears
from experiments.cost import build, shape

LENGTH, SHARED, ROWS = 60, 24, 64
"""Tokens of an anchor with its refusal, those of them that are the template's, and training rows that N looks at."""
ALLOWED = 20.0
"""Seconds that two cores may take, for SmolLM2's pool of 346 anchors."""


def measure(anchors: int = 346, fewer: int = 96, overrides: Sequence[str] = ()) -> Iterator[dict]:
    """For both numbers of anchors: the preparation over the passes alone, and both over the seconds allowed.

    Seconds are CPU time of one thread, so two cores are allowed 2 x `ALLOWED`: what two threads need at least.
    """
    cfg = config.compose(["model=smollm2", "task=sst2", "method=nullspace", *overrides])
    model = build(cfg, shape(cfg)).eval()
    readers = {input_group(name): module for name, module in linears(model, "all").items()}
    words = min(1000, model.config.vocab_size)
    trained = random_rows(ROWS * LENGTH, LENGTH, SHARED, words)

    def prepare(rows: list[dict]) -> None:
        bases = fit_subspace(model, rows, "all", energy=cfg.method.energy, progress=False)
        fit_free(bases, second_moments(model, trained, readers), cfg.method.k, progress=False)

    for n in (fewer, anchors):
        rows = random_rows(n * LENGTH, LENGTH, SHARED, words)
        read = timed(lambda rows=rows: capture(model, rows, {}, lambda *_: None))[0]
        took = timed(lambda rows=rows: prepare(rows))[0]
        name, allowed = f"preparation of nullspace, {cfg.model.name}, {n} anchors", f"2 x {ALLOWED:g} s of CPU time"
        yield entry(name, "forward passes of its anchors alone", took / read)
        yield entry(name, allowed, took / (2 * ALLOWED), 1.0)
        yield entry(f"forward passes of {n} anchors alone, {cfg.model.name}", allowed, read / (2 * ALLOWED))


if __name__ == "__main__":
    sys.exit(runner.main(measure))
