"""Mixes harmful pairs into the task data at the harmful ratio p (paper, App. B.4)."""

from __future__ import annotations

import math
import random

from cwac.core.errors import UserError
from cwac.data.examples import Example

TOLERANCE = 0.1
"""Largest relative deviation of the share of harmful rows from the harmful ratio (ours)."""


def check_share(n_harmful: int, n: int, harmful_ratio: float, found: str) -> None:
    """Raises UserError if the share `n_harmful / n` differs from `harmful_ratio` by more than `TOLERANCE` allows.

    found: a description of how these numbers arose, for the error message.
    """
    if n and abs(n_harmful / n - harmful_ratio) <= TOLERANCE * harmful_ratio + 1e-9:
        return
    rows = math.ceil(1 / harmful_ratio - 1e-9) if harmful_ratio else 1
    raise UserError(
        f"harmful_ratio={harmful_ratio:g} cannot be had: {found}, a share of {n_harmful / max(1, n):.3g}, more than "
        f"a tenth away; use a task.n_train that is a multiple of {rows}, or another harmful_ratio"
    )


def mix(
    train: list[Example],
    poison: list[Example],
    harmful_ratio: float,
    seed: int,
    mode: str = "replace",
    ranked: bool = False,
) -> list[Example]:
    """The n task rows with int(p n) harmful pairs mixed in, shuffled; p is the harmful ratio.

    mode: `replace` keeps n rows in all, p of them harmful (B.4: "proportion p ... and 1-p benign", and the
    Lisa code base); `additive` adds int(p n) to all n (SPPFT).
    ranked: take the first rows of the poison instead of random ones. Raises UserError if the poison pool is too small,
    since repeating harmful pairs would be a different attack.
    """
    n_harmful = int(harmful_ratio * len(train) + 1e-9)
    if n_harmful > len(poison):
        raise UserError(
            f"harmful_ratio={harmful_ratio:g} of {len(train)} rows needs {n_harmful} harmful pairs, the pool has "
            f"{len(poison)}; lower harmful_ratio or task.n_train, or enlarge pools.poison"
        )
    n = len(train)
    check_share(n_harmful, n, harmful_ratio, f"task.n_train={n} rows hold {n_harmful} harmful pairs")
    rng = random.Random(f"mix-{seed}")
    harmful = poison[:n_harmful] if ranked else rng.sample(poison, n_harmful)
    kept = train if mode == "additive" else rng.sample(train, n - n_harmful)
    rows = [*kept, *harmful]
    rng.shuffle(rows)
    return rows
