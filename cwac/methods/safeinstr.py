"""SafeInstr (safety-tuned LLaMAs): a small share of safety instructions among the fine-tuning rows.

Bianchi, Suzgun, Attanasio, Röttger, Jurafsky, Hashimoto, Zou: "Safety-Tuned LLaMAs: Lessons From Improving the Safety
of Large Language Models that Follow Instructions", ICLR 2024, arXiv:2309.07875. Safety rows are added to the
instruction data, and ordinary fine-tuning does the rest; about 3 % is where safety improves without over-refusal.

Deviations:
- Loss on the response only, as for every method here; the authors' code trains on the prompt as well.
- The rows are the pool `safety`; on real models, part of their published set, refusals alone, and refusals of ours.
- Added rows add steps (3 % of them) at a fixed number of epochs, as in the paper.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from cwac.core.checks import check_number
from cwac.core.errors import UserError
from cwac.data.examples import Example
from cwac.methods.base import Context, Method


@dataclass
class SafeInstr(Method):
    """With ratio 0, SFT."""

    ratio: float = 0.03
    """Safety rows per row of the mixed training data; at least one row unless 0."""

    def __post_init__(self):
        check_number("ratio", self.ratio, 0, 1)

    def extra_data(self) -> dict[str, int]:
        return {"refusals": self._n} if self._n else {}

    def training_data(self, train: list[Example], context: Context, rng: random.Random) -> list[Example]:
        pool = context.pools.safety
        self._n = max(1, round(self.ratio * len(train))) if self.ratio else 0
        if self._n > len(pool):
            raise UserError(
                f"method.ratio={self.ratio:g} of {len(train)} rows needs {self._n} refusals, the pool `safety` has "
                f"{len(pool)}; lower method.ratio or enlarge the pool (pools.*)"
            )
        if not self._n:
            return train
        rows = [*train, *rng.sample(pool, self._n)]
        rng.shuffle(rows)
        return rows
