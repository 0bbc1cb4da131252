"""Means with 95 % confidence intervals, and paired differences.

What an interval is over. A table's `mean +- half` is a t-interval over seeds (base model, mixing and
order differ by seed): it answers "what would another seed give?", and the sampling of prompts is part of
the spread it measures. Two cases have no such interval, and are marked instead of hidden:

- one seed: no interval over seeds; the value is printed with `n=1`.
- a percentage on which all seeds agree exactly (0, 0, 0): the t-interval has width 0, which claims far too
  much. Clopper and Pearson's exact binomial interval (Biometrika 26, 1934) over the prompts of *one* seed
  is given; prompts of several seeds are not pooled, since the same prompts recur (ours; conservative).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval, in the unit of the values."""

    mean: float
    low: float
    high: float
    half: float
    """Half-width before clipping to the possible range; NaN where there is no interval."""
    n: int
    """Number of seeds (or of pairs of seeds)."""
    over: Literal["seeds", "prompts", "none"]
    """What the interval is over."""


def exact(percent: float, prompts: float) -> tuple[float, float]:
    """Clopper-Pearson interval, in percent, of `percent` of a number of prompts; (NaN, NaN) without prompts."""
    if math.isnan(percent) or math.isnan(prompts) or prompts < 1:
        return math.nan, math.nan
    hits = round(percent / 100 * prompts)
    interval = stats.binomtest(hits, int(prompts), hits / int(prompts)).proportion_ci(LEVEL, method="exact")
    return 100 * interval.low, 100 * interval.high


def half_width(values: Sequence[float]) -> float:
    """Half-width of the t-interval of the mean; NaN for fewer than two values."""
    n = len(values)
    if n < 2:
        return math.nan
    if max(values) == min(values):
        return 0.0  # exactly: summing would leave rounding noise
    mean = math.fsum(values) / n
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    return float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * deviation / math.sqrt(n)


def estimate(values: Sequence[float], *, prompts: Sequence[float] = (), proportion: bool = False) -> Estimate:
    """Mean over seeds with its interval.

    values: one a seed. prompts: how many prompts each value rests on; used for proportions only.
    proportion: the values are percentages of prompts; the interval is clipped to [0, 100].
    Raises ValueError without values.
    """
    if not values:
        raise ValueError("an estimate needs at least one value")
    mean, n = math.fsum(values) / len(values), len(values)
    if n == 1:
        return Estimate(mean, math.nan, math.nan, math.nan, 1, "none")
    half = half_width(values)
    if proportion and max(values) == min(values):
        low, high = exact(mean, min(prompts, default=math.nan))
        if not math.isnan(low):
            return Estimate(mean, low, high, max(mean - low, high - mean), n, "prompts")
    low, high = mean - half, mean + half
    if proportion:
        low, high = max(0.0, low), min(100.0, high)
    return Estimate(mean, low, high, half, n, "seeds")


def paired(ours: Mapping[int, float], reference: Mapping[int, float]) -> Estimate | None:
    """Mean of `ours - reference` over the seeds both have, with its t-interval; None if they share no seed."""
    shared = sorted(ours.keys() & reference.keys())
    return estimate([ours[s] - reference[s] for s in shared]) if shared else None
