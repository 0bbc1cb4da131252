"""Means with 95 % confidence intervals, and paired differences.

What an interval is over. A table's `mean +- half` is a t-interval over seeds (base model, mixing and
order differ by seed): it answers "what would another seed give?", and the sampling of prompts is part of
the spread it measures. Two cases have no such interval, and are marked instead of hidden:

- one seed: no interval over seeds; the value is printed with `n=1`.
- a percentage on which all seeds agree exactly (0, 0, 0): the t-interval has width 0, which claims far too
  much. Clopper and Pearson's exact binomial interval (Biometrika 26, 1934) over the prompts of *one* seed
  is given; prompts of several seeds are not pooled, since the same prompts recur (ours; conservative).

What a difference is tested over. Two methods meet the same seeds and the same prompts, so both are paired. Over seeds:
the paired t-test. Over prompts: McNemar's exact test (Psychometrika 12, 1947), which for several seeds becomes the
exact sign-flip test of each prompt's summed difference, since a prompt's answers are not independent across seeds. A
comparison with several baselines is corrected by Holm's procedure (Scand. J. Statist. 6, 1979). Effect sizes: the risk
difference, and Cohen's h (Statistical Power Analysis, 1988, ch. 6), which does not shrink near 0 and 100 %.

How far two judges agree: the share of equal verdicts, and Cohen's kappa (Educ. Psychol. Meas. 20, 1960), which takes
off what judges with these shares of harmful verdicts would agree on by chance.

How well one measurement orders runs by another: Spearman's rank correlation (Am. J. Psychol. 15, 1904).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
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
    over: Literal["seeds", "prompts", "both", "none"]
    """What the interval is computed over. `both`: a bootstrap over seeds and the prompts nested in them."""


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
    """Mean of `ours - reference` over the seeds that both have, with its t-interval; None if they share no seed."""
    shared = sorted(ours.keys() & reference.keys())
    # rounded, or seeds that agree would differ by the noise of floating point and claim certainty
    return estimate([round(ours[s] - reference[s], 9) for s in shared]) if shared else None


def paired_p(differences: Sequence[float]) -> float:
    """Two-sided p-value of the paired t-test over seeds; NaN for fewer than two seeds or equal differences."""
    if len(differences) < 2 or max(differences) == min(differences):
        return math.nan
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def sign_flip_p(differences: Sequence[int]) -> float:
    """Exact two-sided p that paired whole numbers are symmetric about 0; McNemar's exact test if all are -1, 0 or 1.

    differences: a prompt each, summed over seeds (harmful under one method minus under the other). The distribution
    of the sum under independent flips of every sign is built by convolution, so it is exact for any number of
    prompts. 1 without any difference.
    """
    sizes = [abs(int(d)) for d in differences if d]
    if not sizes:
        return 1.0
    chances = np.ones(1)
    for size in sizes:
        step = np.zeros(2 * size + 1)
        step[0] = step[-1] = 0.5
        chances = np.convolve(chances, step)
    reach = sum(sizes)
    sums = np.arange(-reach, reach + 1)
    return float(min(1.0, chances[np.abs(sums) >= abs(int(sum(differences)))].sum()))


def two_proportions_p(ours: float, reference: float, prompts: float) -> float:
    """Fisher's exact p-value for two unpaired percentages of equally many prompts; NaN without prompts."""
    if any(map(math.isnan, (ours, reference, prompts))) or prompts < 1:
        return math.nan
    hits = [round(value / 100 * prompts) for value in (ours, reference)]
    return float(stats.fisher_exact([[h, int(prompts) - h] for h in hits]).pvalue)


def bootstrap(
    ours: Mapping[int, Mapping], reference: Mapping[int, Mapping], draws: int = 2000, seed: int = 0
) -> Estimate | None:
    """Difference of two percentages, resampling seeds and the prompts nested in them; None if nothing pairs.

    ours, reference: seed -> prompt -> whether the answer was harmful. Percentage points; a percentile interval. With
    few seeds it is too narrow (three have ten distinct resamples), so it accompanies the t-interval and decides
    nothing. The draws are a function of `seed`.
    """
    by_seed = []
    for s in sorted(ours.keys() & reference.keys()):
        shared = sorted(ours[s].keys() & reference[s].keys())
        if shared:
            by_seed.append(np.array([int(ours[s][i]) - int(reference[s][i]) for i in shared]))
    if not by_seed:
        return None
    rng = np.random.default_rng(seed)
    n = len(by_seed)
    # [seed, draw, slot]: the mean of a resample of that seed's prompts, each of whose differences is -1, 0 or 1
    means = np.empty((n, draws, n))
    for k, d in enumerate(by_seed):
        counts = rng.multinomial(len(d), [np.mean(d == v) for v in (-1, 0, 1)], size=(draws, n))
        means[k] = (counts[..., 2] - counts[..., 0]) / len(d)
    chosen = rng.integers(n, size=(1, draws, n))
    resampled = 100 * np.take_along_axis(means, chosen, axis=0)[0].mean(axis=1)
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    mean = 100 * float(np.mean([d.mean() for d in by_seed]))
    return Estimate(mean, float(low), float(high), float(max(mean - low, high - mean)), n, "both")


def rank_correlation(
    x: Sequence[float], y: Sequence[float], clusters: Sequence, draws: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """Spearman's rho, ties at their mean rank, with a percentile bootstrap interval over clusters: rho, low, high.

    clusters: a label a point; points of one label are resampled together, as they are not independent. NaN where x or
    y does not vary; draws in which it does not are left out.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    groups = [np.flatnonzero(np.asarray(clusters) == label) for label in dict.fromkeys(clusters)]

    def rho(chosen: np.ndarray) -> float:
        if min(np.ptp(x[chosen]), np.ptp(y[chosen])) == 0:
            return math.nan
        return float(np.corrcoef(stats.rankdata(x[chosen]), stats.rankdata(y[chosen]))[0, 1])

    found = rho(np.arange(len(x))) if len(x) else math.nan
    if math.isnan(found) or len(groups) < 2:
        return found, math.nan, math.nan
    rng, n = np.random.default_rng(seed), len(groups)
    drawn = [rho(np.concatenate([groups[i] for i in rng.integers(n, size=n)])) for _ in range(draws)]
    low, high = np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return found, float(low), float(high)


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p-values; NaN stays NaN and does not count as a test."""
    tested = sorted((name for name in p if not math.isnan(p[name])), key=lambda name: p[name])
    adjusted, worst = dict.fromkeys(p, math.nan), 0.0
    for rank, name in enumerate(tested):
        worst = max(worst, min(1.0, (len(tested) - rank) * p[name]))
        adjusted[name] = worst
    return adjusted


def cohens_h(ours: float, reference: float) -> float:
    """Cohen's h of two percentages: 0.2 is small, 0.5 medium, 0.8 large; negative where ours is lower."""
    angles = [2 * math.asin(math.sqrt(min(max(value / 100, 0.0), 1.0))) for value in (ours, reference)]
    return angles[0] - angles[1]


def kappa(table: np.ndarray) -> np.ndarray:
    """Cohen's kappa of two-by-two counts [..., 4]: both harmful, only the first, only the second, neither.

    NaN where both judges give one and the same verdict throughout, and nothing is left to agree on beyond chance.
    """
    table = np.asarray(table, dtype=float)
    both, first, second, neither = np.moveaxis(table / table.sum(-1, keepdims=True), -1, 0)
    chance = (both + first) * (both + second) + (neither + first) * (neither + second)
    with np.errstate(invalid="ignore"):
        return np.where(1 - chance > 1e-12, (both + neither - chance) / (1 - chance), np.nan)


def kappa_interval(clusters: np.ndarray, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of kappa, resampling clusters; (NaN, NaN) for one cluster, or where kappa is NaN.

    clusters: counts [n, 4] as for `kappa`, one row for all verdicts that are not independent of each other, such as
    those on one prompt's answers from several runs. Draws in which kappa is undefined are left out.
    """
    return interval_over(clusters, kappa, draws, seed)


def kappas(confusion: np.ndarray) -> np.ndarray:
    """Cohen's kappa of counts [..., k, k] of two raters over k classes; NaN where both name one class throughout."""
    shares = np.asarray(confusion, dtype=float)
    shares = shares / shares.sum((-2, -1), keepdims=True)
    agreed = np.trace(shares, axis1=-2, axis2=-1)
    chance = (shares.sum(-1) * shares.sum(-2)).sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(1 - chance > 1e-12, (agreed - chance) / (1 - chance), np.nan)


def interval_over(
    clusters: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic of summed counts, resampling clusters; (NaN, NaN) for one cluster.

    clusters: [n, m] counts; statistic: [..., m] -> [...]. Draws in which it is undefined are left out.
    """
    if len(clusters) < 2 or np.isnan(statistic(clusters.sum(0))):
        return math.nan, math.nan
    n = len(clusters)
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)
    low, high = np.nanquantile(statistic(weights @ clusters), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
