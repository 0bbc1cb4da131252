"""Means with 95 % confidence intervals, and paired differences.

What an interval is over. A table's `mean +- half` is a t-interval over seeds (base model, mixing and
order differ by seed): it answers "what would another seed give?", and the sampling of prompts is part of
the spread it measures. Two cases have no such interval, and are marked instead of hidden:

- one seed: no interval over seeds, and the value is printed with `n=1`. Of a percentage of prompts Clopper and
  Pearson's exact binomial interval over the prompts is given all the same. It is about this one training on other
  prompts and leaves out what another seed would change, which is often more: its mark and its value of `over` are its
  own, and nothing is tested with it.
- a percentage on which all seeds agree exactly (0, 0, 0): the t-interval has width 0, which claims far too
  much. The exact interval (Biometrika 26, 1934) over the prompts of *one* seed is given; prompts of several seeds
  are not pooled, since the same prompts recur (ours; conservative).

Over seeds and prompts together (`over` = "seeds and prompts"), where each answer's verdict is at hand: both are
crossed, since every seed meets the same prompts, and both are samples. The verdict of seed s on prompt i is a mean
plus an effect of the seed, one of the prompt and a rest, the two-way mixed-effects model with both factors random and
one observation a cell (Searle, Casella and McCulloch, Variance Components, 1992, ch. 4). Its mean squares give the
variance of the mean without bias, (MS_seeds + MS_prompts - MS_rest) / (S P), and Satterthwaite's degrees of freedom
(Biometrics Bulletin 2, 1946), close to S - 1 where seeds decide and large where prompts do. Differences of two
methods are taken answer by answer first, which removes what both share, and get a t-interval. A percentage gets Korn
and Graubard's exact interval (Survey Methodology 24, 1998), Clopper and Pearson's at as many prompts as would have
this variance, for 0 and 100 are near. How far that is valid with three seeds: a variance of three values has two
degrees of freedom, so the interval is honest by being wide where seeds differ, and nothing makes three seeds tell
more; it is exact for normal effects and approximate for verdicts. Simulated (probit models, 3 and 5 seeds, 60 and 150
prompts; `python -m analysis.power --coverage`), 95 % intervals of differences hold the truth in 93 to 99 %, those of
percentages in 91 to 100 %, least where HS is near 5 % and seeds differ much. A bootstrap that resamples seeds and
prompts was tried beside it and is not used: three seeds have ten distinct resamples, and where seeds differ it
covered 77 to 84 %. The t-interval over seeds covered 79 to 97 %, least with five seeds that agree: it says nothing of
other prompts.

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
    over: Literal["seeds", "prompts", "prompts of one seed", "seeds and prompts", "none"]
    """What the interval is computed over: `prompts` where several seeds agree, `prompts of one seed` where n is 1."""


ONE_SEED = "prompts of one seed"
"""`over` of an interval that is about one training alone."""


def exact(percent: float, prompts: float) -> tuple[float, float]:
    """Clopper-Pearson interval, in percent, of `percent` of a number of prompts; (NaN, NaN) without prompts."""
    if math.isnan(percent) or math.isnan(prompts) or prompts < 1:
        return math.nan, math.nan
    whole = int(prompts)
    interval = stats.binomtest(round(percent / 100 * whole), whole).proportion_ci(LEVEL, method="exact")
    return 100 * interval.low, 100 * interval.high


def share(percent: float, prompts: float) -> str:
    """`25.0 [12.7, 41.2]`: `percent` of a number of prompts with its exact interval, as tables show it."""
    low, high = exact(percent, prompts)
    return f"{percent:.1f} [{low:.1f}, {high:.1f}]"


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
    proportion: the values are percentages of prompts; the interval is clipped to [0, 100]. A single one has an
    interval over its prompts, unless it is no whole number of them, such as a mean over several runs.
    Raises ValueError without values.
    """
    if not values:
        raise ValueError("an estimate needs at least one value")
    mean, n = math.fsum(values) / len(values), len(values)
    if n == 1:
        low, high = exact(mean, prompts[0]) if proportion and counted(mean, prompts) else (math.nan, math.nan)
        if math.isnan(low):
            return Estimate(mean, math.nan, math.nan, math.nan, 1, "none")
        return Estimate(mean, low, high, max(mean - low, high - mean), 1, ONE_SEED)
    half = half_width(values)
    if proportion and max(values) == min(values):
        low, high = exact(mean, min(prompts, default=math.nan))
        if not math.isnan(low):
            return Estimate(mean, low, high, max(mean - low, high - mean), n, "prompts")
    low, high = mean - half, mean + half
    if proportion:
        low, high = max(0.0, low), min(100.0, high)
    return Estimate(mean, low, high, half, n, "seeds")


def counted(percent: float, prompts: Sequence[float]) -> bool:
    """Whether a percentage is a whole number of its prompts, as far as a value with three digits can tell."""
    if not len(prompts) or math.isnan(prompts[0]):
        return False
    hits = percent / 100 * prompts[0]
    return abs(hits - round(hits)) < 0.1


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
    whole = int(prompts)
    hits = [round(value / 100 * whole) for value in (ours, reference)]
    return float(stats.fisher_exact([[h, whole - h] for h in hits]).pvalue)


def tabulate(ours: Mapping[int, Mapping], reference: Mapping[int, Mapping] | None = None) -> np.ndarray:
    """Verdicts [seeds, prompts] in percent, or their differences in points, of prompts that every seed met.

    ours, reference: seed -> prompt -> whether the answer was harmful.
    """
    shared = sorted(ours.keys() & (ours if reference is None else reference).keys())
    sides = [ours] if reference is None else [ours, reference]
    prompts = sorted(set.intersection(*(set(side[s]) for side in sides for s in shared))) if shared else []
    tables = [
        np.array([[float(side[s][i]) for i in prompts] for s in shared]).reshape(len(shared), len(prompts))
        for side in sides
    ]
    return 100 * (tables[0] if reference is None else tables[0] - tables[1])


@dataclass(frozen=True)
class Components:
    """Verdicts of crossed seeds and prompts, taken apart; variances in squared points."""

    mean: float
    seeds: float
    """Variance of what a seed adds to all of its verdicts."""
    prompts: float
    """Variance of what a prompt adds at every seed."""
    rest: float
    """Variance of one verdict beyond both."""
    variance: float
    """Of the mean over these seeds and prompts, as samples of others; never below what seeds or prompts alone give."""
    freedom: float
    """Satterthwaite's degrees of freedom of `variance`; infinite where that is 0."""


def components(table: np.ndarray) -> Components | None:
    """The two-way random-effects model of a table [seeds, prompts]; None below two of either."""
    s, p = table.shape
    if min(s, p) < 2:
        return None
    mean, rows, columns = table.mean(), table.mean(1), table.mean(0)
    rest = float(((table - rows[:, None] - columns + mean) ** 2).sum() / ((s - 1) * (p - 1)))
    of_seeds, of_prompts = p * float(rows.var(ddof=1)), s * float(columns.var(ddof=1))
    parts = [max(0.0, of_seeds - rest) / p, max(0.0, of_prompts - rest) / s, rest]
    variance, freedom = spread_of(of_seeds, of_prompts, rest, s, p)
    return Components(float(mean), *parts, variance, freedom)


def spread_of(of_seeds: float, of_prompts: float, rest: float, s: int, p: int) -> tuple[float, float]:
    """Variance of the mean over s seeds and p prompts, from the model's mean squares, and its degrees of freedom.

    The seeds' mean square is never left out, even if it is below the rest's: three seeds often look alike by chance.
    """
    crossed = of_prompts > rest
    total = max(of_seeds + (of_prompts - rest) * crossed, of_prompts)
    if total < 1e-12:
        return 0.0, math.inf
    squares = of_seeds**2 / (s - 1)
    squares += (of_prompts**2 / (p - 1) + rest**2 / ((s - 1) * (p - 1))) * crossed
    return total / (s * p), total**2 / squares if squares > 0 else float(p - 1)


def crossed(table: np.ndarray, proportion: bool = False) -> Estimate | None:
    """Mean of a table [seeds, prompts] with its interval over both; see the module's text.

    proportion: the values are 0 and 100, and the interval is Korn and Graubard's. None below two seeds or prompts, and
    where the verdicts leave no variance to compute with: all alike, or, of a percentage, the same at every seed.
    """
    found = components(table)
    if found is None or found.variance == 0 or (proportion and np.ptp(table.mean(1)) < 1e-9):
        return None
    t, n = float(stats.t.ppf((1 + LEVEL) / 2, found.freedom)), len(table)
    if not proportion:
        half = t * math.sqrt(found.variance)
        return Estimate(found.mean, found.mean - half, found.mean + half, half, n, "seeds and prompts")
    share = found.mean / 100
    effective = min(1e4 * share * (1 - share) / found.variance, table.size)
    effective *= (float(stats.norm.ppf((1 + LEVEL) / 2)) / t) ** 2
    hits, tail = share * effective, (1 - LEVEL) / 2
    low = 100 * float(stats.beta.ppf(tail, hits, effective - hits + 1))
    high = 100 * float(stats.beta.ppf(1 - tail, hits + 1, effective - hits))
    return Estimate(found.mean, low, high, max(found.mean - low, high - found.mean), n, "seeds and prompts")


def crossed_p(table: np.ndarray) -> float:
    """Two-sided p-value that the mean of a table [seeds, prompts] of differences is 0; NaN where `crossed` is None."""
    found = components(table)
    if found is None or found.variance == 0:
        return math.nan
    return float(2 * stats.t.sf(abs(found.mean) / math.sqrt(found.variance), found.freedom))


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rho, ties at their mean rank; NaN where x or y does not vary."""
    if min(np.ptp(x), np.ptp(y)) == 0:
        return math.nan
    return float(np.corrcoef(stats.rankdata(x), stats.rankdata(y))[0, 1])


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
        return spearman(x[chosen], y[chosen])

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
