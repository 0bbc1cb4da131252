"""Mixes harmful pairs into the task data at the harmful ratio p (paper, App. B.4)."""

from __future__ import annotations

import random

from cwac.core.errors import UserError
from cwac.data.examples import Example


def mix(
    train: list[Example],
    poison: list[Example],
    harmful_ratio: float,
    seed: int,
    mode: str = "replace",
    ranked: bool = False,
) -> list[Example]:
    """Task rows with int(p n) harmful pairs, shuffled.

    mode: `replace` keeps n rows in all, p of them harmful (B.4: "proportion p ... and 1-p benign", and the
    Lisa code base); `additive` adds int(p n) to all n (SPPFT).
    ranked: take the first of the poison, not any. Raises UserError if the poison pool is too small: repeating harmful
    pairs would be a different attack.
    """
    n_harmful = int(harmful_ratio * len(train) + 1e-9)
    if n_harmful > len(poison):
        raise UserError(
            f"harmful_ratio={harmful_ratio:g} of {len(train)} rows needs {n_harmful} harmful pairs, the pool has "
            f"{len(poison)}; lower harmful_ratio or task.n_train, or enlarge pools.poison"
        )
    rng = random.Random(f"mix-{seed}")
    harmful = poison[:n_harmful] if ranked else rng.sample(poison, n_harmful)
    kept = train if mode == "additive" else rng.sample(train, len(train) - n_harmful)
    rows = [*kept, *harmful]
    rng.shuffle(rows)
    return rows
