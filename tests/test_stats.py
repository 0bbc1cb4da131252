"""Intervals over seeds and prompts together: their parts by hand, their limits, and how often they hold the truth."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import special
from scipy import stats as scipy_stats

from analysis import pairwise, paper, power, stats, tables
from analysis.collect import Collection, tidy
from analysis.pairwise import cells
from tests.helpers.results import cell_of, line_of, row


def test_the_parts_are_those_of_the_two_way_analysis_of_variance():
    table = np.array([[0.0, 4.0, 8.0], [2.0, 6.0, 13.0]])
    found = stats.components(table)
    # row means 4 and 7, column means 1, 5, 10.5; residuals of the first row 0.5, 0.5, -1
    assert found.mean == 5.5
    of_seeds, of_prompts, rest = 3 * 4.5, 2 * np.var([1, 5, 10.5], ddof=1), 2 * (0.25 + 0.25 + 1.0) / 2
    assert found.rest == pytest.approx(rest)
    assert found.seeds == pytest.approx((of_seeds - rest) / 3) and found.prompts == pytest.approx(
        (of_prompts - rest) / 2
    )
    assert found.variance == pytest.approx((of_seeds + of_prompts - rest) / 6)
    squares = of_seeds**2 / 1 + of_prompts**2 / 2 + rest**2 / 2
    assert found.freedom == pytest.approx((of_seeds + of_prompts - rest) ** 2 / squares)
    made = stats.crossed(table)
    assert made.over == "seeds and prompts" and made.n == 2
    assert made.half == pytest.approx(scipy_stats.t.ppf(0.975, found.freedom) * math.sqrt(found.variance))


def test_seeds_alone_or_prompts_alone_leave_the_interval_over_them():
    """Where every prompt answers alike within a seed, three seeds are three values, whatever the number of prompts."""
    seeds = np.repeat([[10.0], [20.0], [60.0]], 50, axis=1)
    assert stats.crossed(seeds).half == pytest.approx(stats.half_width([10.0, 20.0, 60.0]))
    prompts = np.repeat([[0.0, 100.0, 100.0, 0.0, 0.0]], 3, axis=0)
    assert stats.crossed(prompts).half == pytest.approx(stats.half_width([0.0, 100.0, 100.0, 0.0, 0.0]))


def test_nothing_is_claimed_where_verdicts_leave_nothing_to_compute_with():
    assert stats.crossed(np.zeros((3, 10))) is None and stats.crossed(np.ones((1, 10))) is None
    assert stats.crossed(np.ones((3, 1))) is None and math.isnan(stats.crossed_p(np.full((3, 10), 100.0)))
    same = np.repeat([[0.0, 100.0, 0.0]], 3, axis=0)
    assert stats.crossed(same, proportion=True) is None  # the exact interval of one seed's prompts is at hand


def test_a_percentage_near_zero_has_an_interval_within_its_range_that_is_wider_above():
    rng = np.random.default_rng(0)
    table = 100.0 * (rng.random((3, 60)) < 0.03)
    found = stats.crossed(table, proportion=True)
    assert 0 <= found.low < found.mean < found.high < 100 and found.high - found.mean > found.mean - found.low
    low, high = stats.exact(found.mean, table.size)
    assert found.low <= low + 1e-6 and found.high >= high - 1e-6  # clusters never tell more than as many prompts


def test_verdicts_pair_by_seed_and_prompt():
    ours = {0: {"a": True, "b": False, "d": True}, 1: {"a": True, "b": True}, 3: {"a": True}}
    theirs = {0: {"a": False, "b": False, "c": True}, 1: {"a": False, "b": True}, 2: {"a": False}}
    assert stats.tabulate(ours, theirs).tolist() == [[100, 0], [100, 0]]
    assert stats.tabulate({0: {"a": True, "b": False}}).tolist() == [[100, 0]]
    assert stats.tabulate({0: {"a": True}}, {1: {"a": True}}).size == 0


@pytest.mark.parametrize("seed_effect", [0.0, 0.3, 0.8])
def test_intervals_hold_the_truth_about_as_often_as_they_say(seed_effect):
    """Three seeds, 60 prompts, verdicts from a probit model with effects of seeds and prompts; 300 campaigns each."""
    found = power.coverage(seeds=3, prompts=60, seed_effect=seed_effect, draws=300)
    assert 0.915 <= found["difference"] <= 0.995
    assert 0.915 <= found["percentage"] <= 0.995


# --- one function at a time: values by hand, from published tables, or by another route -----------------

SLEEP = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
"""Student's own example of the paired test (Biometrika 6, 1908): hours of sleep gained with one drug over another."""


def same(found, expected, **tolerance):
    assert found == pytest.approx(expected, nan_ok=True, **tolerance)


@pytest.mark.parametrize(
    ("percent", "prompts", "expected"),
    [
        (0, 10, (0, 100 * (1 - 0.025**0.1))),  # the closed forms at no hit and at nothing but hits
        (100, 200, (100 * 0.025 ** (1 / 200), 100)),
        (50, 10, (18.71, 81.29)),  # 5 of 10 in the usual tables
        (34, 3, (0.84, 90.57)),  # rounds to 1 of 3
        (0, 1, (0, 97.5)),
        (100, 10.7, (100 * 0.025**0.1, 100)),  # whole prompts
        (50, 0, (math.nan, math.nan)),
        (math.nan, 10, (math.nan, math.nan)),
        (50, math.nan, (math.nan, math.nan)),
    ],
)
def test_exact_intervals(percent, prompts, expected):
    same(stats.exact(percent, prompts), expected, abs=0.005)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], math.nan),
        ([5.0], math.nan),
        ([1.0, 3.0], 12.706),  # standard error 1; the table's t with 1 degree of freedom
        ([10.0, 20.0, 30.0], 4.303 * 10 / math.sqrt(3)),
        (SLEEP, 2.262 * 1.22999 / math.sqrt(10)),
    ],
)
def test_half_widths_are_students(values, expected):
    same(stats.half_width(values), expected, rel=1e-3)


def test_equal_values_have_no_width_at_all():
    assert stats.half_width([0.1, 0.1, 0.1]) == 0.0


@pytest.mark.parametrize(
    ("values", "prompts", "expected"),
    [
        ([50.0, 50.0], [20, 10], (50, 18.71, 81.29, 31.29, 2, "prompts")),  # the fewest prompts of a seed
        ([20.0, 20.0], [10, 10], (20, 2.52, 55.61, 35.61, 2, "prompts")),  # the longer side is the half-width
        ([80.0, 80.0], [10, 10], (80, 44.39, 97.48, 35.61, 2, "prompts")),
        ([50.0, 50.0], [], (50, 50, 50, 0, 2, "seeds")),
        ([50.0, 50.0], [10, math.nan], (50, 18.71, 81.29, 31.29, 2, "prompts")),
        ([49.0, 51.0], [10, 10], (50, 37.29, 62.71, 12.71, 2, "seeds")),
        ([1.0, 3.0], [10, 10], (2, 0, 14.71, 12.71, 2, "seeds")),
        ([97.0, 99.0], [10, 10], (98, 85.29, 100, 12.71, 2, "seeds")),
        ([40.0], [10], (40, 12.16, 73.76, 33.76, 1, "prompts of one seed")),
        ([40.0], [], (40, math.nan, math.nan, math.nan, 1, "none")),
        ([40.0], [math.nan], (40, math.nan, math.nan, math.nan, 1, "none")),
        ([43.75], [10], (43.75, math.nan, math.nan, math.nan, 1, "none")),  # no whole number of prompts: a mean
    ],
)
def test_estimates_of_percentages(values, prompts, expected):
    found = stats.estimate(values, prompts=prompts, proportion=True)
    same((found.mean, found.low, found.high, found.half), expected[:4], abs=0.01)
    assert (found.n, found.over) == expected[4:]


def test_what_is_no_percentage_has_neither_prompts_nor_a_range():
    found = stats.estimate([97.0, 105.0], prompts=[10, 10])
    same((found.mean, found.low, found.high, found.over), (101, 101 - 4 * 12.7062, 101 + 4 * 12.7062, "seeds"))
    found = stats.estimate([-50.0, -50.0], prompts=[10, 10])
    assert (found.mean, found.low, found.high, found.half, found.over) == (-50, -50, -50, 0, "seeds")
    with pytest.raises(ValueError, match="^an estimate needs at least one value$"):
        stats.estimate([])


def test_paired_differences_are_of_shared_seeds_and_free_of_rounding_noise():
    found = stats.paired({0: 0.3, 1: 1.1, 2: 9.0}, {0: 0.2, 1: 1.0, 7: 0.0})  # 0.09999... and 0.10000...9
    assert (found.mean, found.half, found.n) == (0.1, 0.0, 2)
    found = stats.paired({4: 7.0, 2: 1.0}, {2: 2.0, 4: 4.0})
    same((found.mean, found.half), (1.0, 2 * 12.7062))
    assert stats.paired({0: 1 + 2e-9}, {0: 1.0}).mean == pytest.approx(2e-9) != 0  # a billionth counts
    assert stats.paired({0: 1 + 3e-10}, {0: 1.0}).mean == 0
    assert stats.paired({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([], math.nan),
        ([5.0], math.nan),
        ([2.0, 2.0, 2.0], math.nan),
        ([1.0, 3.0], 1 - 2 * math.atan(2) / math.pi),  # t = 2 of Cauchy's distribution
        ([-1.0, -3.0], 1 - 2 * math.atan(2) / math.pi),
        ([-1.0, 1.0], 1.0),
        (SLEEP, 0.002833),  # as R's documentation of these data has it
    ],
)
def test_the_paired_t_test(differences, expected):
    same(stats.paired_p(differences), expected, rel=2e-4)


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([], 1.0),
        ([0, 0], 1.0),
        ([1] * 5, 2 / 32),
        ([-1] * 5, 2 / 32),
        ([2, 1], 2 / 4),
        ([7], 1.0),
        ([1, -1], 1.0),
        ([3, 0, 3, -1], 4 / 8),
    ],
)
def test_sign_flips_by_hand(differences, expected):
    assert stats.sign_flip_p(differences) == expected


@pytest.mark.parametrize(
    ("ours", "reference", "prompts", "expected"),
    [
        (75, 25, 4, 34 / 70),  # Fisher's tea with 3 of 4 right, two-sided
        (100, 0, 4, 2 / 70),
        (0, 100, 4, 2 / 70),
        (100, 97, 100, 2 * math.comb(100, 3) / math.comb(200, 3)),
        (100, 0, 1, 1.0),
        (50, 50, 10, 1.0),
        (100, 0, 4.9, 2 / 70),  # whole prompts
        (50, 50, 0.9, math.nan),
        (math.nan, 50, 10, math.nan),
        (50, math.nan, 10, math.nan),
        (50, 50, math.nan, math.nan),
    ],
)
def test_two_unpaired_percentages_are_fishers(ours, reference, prompts, expected):
    same(stats.two_proportions_p(ours, reference, prompts), expected)


def test_verdicts_are_tabulated_by_seed_and_prompt_of_all_seeds():
    alone = {1: {"b": False, "a": True}, 0: {"a": False, "b": True, "c": True}}
    assert stats.tabulate(alone).tolist() == [[0, 100], [100, 0]]
    assert stats.tabulate(alone, {1: {"a": True, "b": True}}).tolist() == [[0, -100]]
    assert stats.tabulate({0: {"a": True}, 1: {"b": True}}).shape == (2, 0)
    assert stats.tabulate({}).shape == (0, 0) and stats.tabulate({0: {"a": True}}, {}).shape == (0, 0)


@pytest.mark.parametrize(
    ("squares", "variance", "freedom"),
    [
        ((12, 8, 2, 3, 5), 18 / 15, 18**2 / (12**2 / 2 + 8**2 / 4 + 2**2 / 8)),
        ((12, 1, 2, 3, 5), 12 / 15, 2),  # prompts below the rest: the seeds' degrees of freedom
        ((12, 2, 2, 3, 5), 12 / 15, 2),
        ((1, 8, 2, 3, 5), 8 / 15, 8**2 / (1 / 2 + 8**2 / 4 + 2**2 / 8)),  # never below what the prompts alone give
        ((0, 8, 8, 3, 5), 8 / 15, 4),
        ((0, 0.5, 0.5, 3, 5), 0.5 / 15, 4),
        ((0.5, 0, 0, 3, 5), 0.5 / 15, 2),
        ((0, 0, 0, 3, 5), 0, math.inf),
        ((0, 0, 5, 3, 5), 0, math.inf),
        ((1e-13, 0, 0, 3, 5), 0, math.inf),  # rounding noise
    ],
)
def test_the_variance_of_a_mean_and_its_degrees_of_freedom(squares, variance, freedom):
    same(stats.spread_of(*squares), (variance, freedom))


def test_a_component_is_never_below_nothing():
    found = stats.components(np.array([[0.0, 4.0], [4.0, 0.0]]))  # all of it beyond seeds and prompts
    assert (found.mean, found.seeds, found.prompts, found.rest, found.variance) == (2, 0, 0, 16, 0)
    assert found.freedom == math.inf
    assert stats.components(np.ones((1, 5))) is None and stats.components(np.ones((5, 1))) is None
    assert stats.components(np.array([[0.0, 0.0], [2.0, 2.0]])).seeds == 2  # two of either are enough


def test_a_percentage_has_the_exact_interval_of_as_many_prompts_as_have_its_variance():
    table = np.array([[100, 100, 0, 0, 0], [100, 0, 0, 0, 0], [100, 100, 100, 0, 0.0]])
    # row means 40, 20, 60 and column means 100, 200 / 3, 100 / 3, 0, 0; of 36000 squared points in all, 4000 are
    # between rows and 22666.667 between columns
    of_seeds, of_prompts, rest = 5 * 400, 3 * np.var([100, 200 / 3, 100 / 3, 0, 0], ddof=1), 9333.333 / 8
    assert of_prompts == pytest.approx(5666.667, abs=1e-3)
    variance = (of_seeds + of_prompts - rest) / 15
    freedom = (15 * variance) ** 2 / (of_seeds**2 / 2 + of_prompts**2 / 4 + rest**2 / 8)
    effective = 1e4 * 0.4 * 0.6 / variance * (1.959964 / special.stdtrit(freedom, 0.975)) ** 2
    hits = 0.4 * effective
    low = 100 * special.betaincinv(hits, effective - hits + 1, 0.025)
    high = 100 * special.betaincinv(hits + 1, effective - hits, 0.975)
    found = stats.crossed(table, proportion=True)
    same((found.mean, found.low, found.high, found.half), (40, low, high, high - 40), rel=1e-5)
    assert (found.n, found.over) == (3, "seeds and prompts")
    mirrored = stats.crossed(100 - table, proportion=True)
    same((mirrored.low, mirrored.high, mirrored.half), (100 - high, 100 - low, high - 40), rel=1e-5)


def test_a_percentage_is_never_surer_than_as_many_prompts_as_were_asked():
    """Seeds and prompts alternate, so that the variance is below the binomial one."""
    table = 100.0 * np.array([[1, 0, 1, 0, 1, 0], [0, 1, 0, 1, 0, 0], [1, 0, 1, 0, 0, 1]])
    made = stats.components(table)
    assert 0 < made.variance < 1e4 * (4 / 9) * (5 / 9) / 18
    effective = 18 * (1.959964 / special.stdtrit(made.freedom, 0.975)) ** 2
    hits = effective * 8 / 18
    found = stats.crossed(table, proportion=True)
    same(found.low, 100 * special.betaincinv(hits, effective - hits + 1, 0.025), rel=1e-5)
    same(found.high, 100 * special.betaincinv(hits + 1, effective - hits, 0.975), rel=1e-5)
    near = 100.0 * (np.arange(150) < np.array([[3], [4]]))  # seeds that differ by two thirds of a point do differ
    assert stats.crossed(near, proportion=True) is not None


def test_differences_are_tested_over_seeds_and_prompts():
    seeds = np.repeat([[1.0], [3.0]], 6, axis=1)  # two values, t = 2 with 1 degree of freedom
    assert stats.crossed_p(seeds) == pytest.approx(1 - 2 * math.atan(2) / math.pi)
    assert stats.crossed_p(-5 * seeds) == pytest.approx(1 - 2 * math.atan(2) / math.pi)
    made = stats.crossed(seeds)
    same((made.mean, made.low, made.high), (2, 2 - 12.7062, 2 + 12.7062))
    assert math.isnan(stats.crossed_p(np.ones((1, 5)))) and math.isnan(stats.crossed_p(np.ones((3, 5))))


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        ([1, 2, 3, 4], [1, 3, 2, 4], 0.8),  # 1 - 6 * 2 / (4 * 15)
        ([1, 2, 3], [9, 5, 1], -1),
        ([1, 1, 2], [1, 2, 3], math.sqrt(3) / 2),  # ranks 1.5, 1.5, 3
        ([1, 2, 3], [0.1, 10, 1000], 1),
        ([2, 2, 2], [1, 2, 3], math.nan),
        ([1, 2, 3], [2, 2, 2], math.nan),
        ([], [], math.nan),
    ],
)
def test_rank_correlations(x, y, expected):
    found, low, high = stats.rank_correlation(x, y, ["one"] * len(x))
    same(found, expected)
    assert math.isnan(low) and math.isnan(high)  # one cluster cannot be resampled


def test_a_rank_correlations_interval_is_over_clusters():
    """Of two clusters a draw holds one, the other or both: the extremes are those of the clusters by themselves."""
    x, y, clusters = [1, 2, 3, 11, 12, 13, 14], [1, 3, 2, 4, 3, 2, 1], ["a"] * 3 + ["b"] * 4
    found, low, high = stats.rank_correlation(x, y, clusters, draws=60)
    same((found, low, high), (scipy_stats.spearmanr(x, y).statistic, -1, 0.5))
    mixed = stats.rank_correlation([1, 11, 2, 12, 3, 13, 14], [1, 4, 3, 3, 2, 2, 1], list("abababb"), draws=60)
    same(mixed, (found, low, high))
    # one cluster without any spread: the draws of it alone are left out
    found, low, high = stats.rank_correlation([1, 2, 3, 4], [1, 2, 9, 9], ["a", "a", "b", "b"], draws=60)
    both = scipy_stats.spearmanr([1, 2, 3, 4], [1, 2, 9, 9]).statistic
    same((found, low, high), (both, both, 1))


def test_the_limits_of_a_rank_correlations_interval_are_its_outer_fortieths():
    """Of three clusters the falling one is drawn alone in 1 of 27 draws, and the two rising ones in 8."""
    x, y = [1, 2, 3, 11, 12, 21, 22], [3, 2, 1, 11, 12, 21, 22]
    assert stats.rank_correlation(x, y, list("aaabbcc"))[1:] == pytest.approx((-1, 1))


def test_an_interval_is_the_same_at_every_call():
    rng = np.random.default_rng(1)
    counts, x, y = rng.integers(0, 9, (12, 4)), rng.random(12), rng.random(12)
    assert stats.kappa_interval(counts) == stats.interval_over(counts, stats.kappa, draws=2000, seed=0)
    assert stats.interval_over(counts, stats.kappa) == stats.kappa_interval(counts, draws=2000, seed=0)
    assert stats.kappa_interval(counts, seed=1) != stats.kappa_interval(counts)
    assert stats.rank_correlation(x, y, range(12)) == stats.rank_correlation(x, y, range(12), draws=1000, seed=0)


def test_bootstrap_intervals_are_the_quantiles_at_both_ends():
    """The share of ones among n resampled ones and zeros is binomial, whose quantiles are known."""
    counts = np.repeat([[1, 0], [0, 1]], 20, axis=0)
    low, high = stats.interval_over(counts, lambda c: c[..., 0] / c.sum(-1))
    binomial = scipy_stats.binom(40, 0.5)
    assert (low, high) == (binomial.ppf(0.025) / 40, binomial.ppf(0.975) / 40) == (14 / 40, 26 / 40)


def test_draws_without_a_value_are_left_out_and_a_statistic_without_one_has_no_interval():
    def both(c):  # undefined without any of the first kind
        return np.where(c[..., 0] > 0, c[..., 1] / np.maximum(c[..., 0], 1), np.nan)

    counts = np.array([[1, 0], [0, 1]])  # a draw: twice the first, one of each, twice the second
    same(stats.interval_over(counts, both), (0, 1))
    same(stats.interval_over(counts[1:].repeat(2, 0), both), (math.nan, math.nan))
    same(stats.interval_over(counts[:1], both), (math.nan, math.nan))


def test_holm_leaves_a_single_test_as_it_is_and_never_falls():
    assert stats.holm({"a": 0.2}) == {"a": 0.2}
    found = stats.holm({"late": 0.05, "first": 0.02, "gone": math.nan, "last": 0.9, "tie": 0.05})
    same([found[k] for k in ("first", "late", "tie", "last", "gone")], [0.08, 0.15, 0.15, 0.9, math.nan])
    assert list(found) == ["late", "first", "gone", "last", "tie"]


@pytest.mark.parametrize(
    ("ours", "reference", "expected"),
    [
        (50, 10, 1.571 - 0.644),  # Cohen's table of arcsines (1988, table 6.2.2)
        (10, 50, 0.644 - 1.571),
        (0, 1, -0.200),
        (-3, 104, -math.pi),  # rounding beyond the range
        (104, -3, math.pi),
    ],
)
def test_effect_sizes_are_cohens(ours, reference, expected):
    assert stats.cohens_h(ours, reference) == pytest.approx(expected, abs=1e-3)


def test_kappa_by_hand():
    # agreed 0.7, by chance 0.5 * 0.6 + 0.5 * 0.4; the mirror image of a table has the same kappa
    assert stats.kappa(np.array([20, 5, 10, 15])) == pytest.approx(0.4)
    found = stats.kappa(np.array([[20, 5, 10, 15], [20, 10, 5, 15], [5, 0, 0, 5], [0, 5, 5, 0], [1, 1, 1, 1]]))
    same(found.tolist(), [0.4, 0.4, 1, -1, 0])
    found = stats.kappa(np.array([[9, 0, 0, 0], [0, 0, 0, 9], [0, 9, 0, 0], [8, 1, 0, 0]]))
    same(found.tolist(), [math.nan, math.nan, 0, 0])


@pytest.mark.filterwarnings("error")
def test_an_undefined_kappa_is_quiet():
    assert np.isnan(stats.kappa(np.array([9, 0, 0, 0]))) and np.isnan(stats.kappas(np.array([[9, 0], [0, 0]])))


def test_kappa_of_several_classes_by_hand():
    nine = np.array(
        [[25, 13, 12], [12, 2, 16], [3, 15, 2]]
    )  # agreed 0.29; by chance 0.5 * 0.4 + 0.3 * 0.3 + 0.2 * 0.3
    same(stats.kappas(nine), (0.29 - 0.35) / 0.65)
    same(stats.kappas(np.stack([nine, np.eye(3) * 7])), [-0.06 / 0.65, 1])
    same(stats.kappas(np.array([[20, 5], [10, 15]])), 0.4)
    same(stats.kappas(np.array([[[9, 0], [0, 0]], [[8, 1], [0, 0]]])), [math.nan, 0])


def test_kappas_interval_resamples_clusters():
    disagree, agree = [0, 2, 2, 0], [3, 0, 0, 3]
    # of two clusters: twice either, or one of each; the extremes are kappa -1 and 1
    same(stats.kappa_interval(np.array([disagree, agree])), (-1, 1))
    assert stats.kappa_interval(np.array([agree, agree])) == (1, 1)
    same(stats.kappa_interval(np.array([agree])), (math.nan, math.nan))
    same(stats.kappa_interval(np.array([[4, 0, 0, 0], [5, 0, 0, 0]])), (math.nan, math.nan))


# --- campaigns of verdicts ------------------------------------------------------------------------------


def campaign(rates: dict[str, float], ratios=(0.1, 0.5), seeds=3, prompts=40, noise=0):
    """Runs in which prompt i is harmful always before prompt i + 1, up to a rate; seed s adds s * noise."""
    records, answers = [], []
    for method, rate in rates.items():
        for p in ratios:
            for seed in range(seeds):
                cell = cell_of(method, p, seed)
                harmful = round(rate * prompts) + seed * noise
                judged = {"set": "harmful", "judge": "keyword", "n": prompts}
                records.append(row(cell, "HS", 100 * harmful / prompts, **judged))
                records.append(row(cell, "FA", 90.0 - seed - 5 * (method == "bea"), judge=None))
                for i in range(prompts):
                    answers.append(
                        [cell.run_id, "harmful", "keyword", str(i), "harmful" if i < harmful else "refusal"]
                    )
    found = Collection(tidy(records)[0], runs=sorted({r["run_id"] for r in records}))
    for k, column in enumerate(found.verdicts.columns):
        found.verdicts[column] = [answer[k] for answer in answers]
    return found


def test_tables_take_verdicts_where_they_are_and_say_so():
    found = campaign({"sft": 0.5, "cwac": 0.2}, noise=1)
    summary = tables.summarise(found)
    harm = summary[(summary["metric"] == "HS") & (summary["method"] == "cwac")].iloc[0]
    assert harm["over"] == "seeds and prompts" and harm["n"] == 3
    made = stats.crossed(100.0 * np.array([[i < 8 + s for i in range(40)] for s in range(3)]), proportion=True)
    assert (harm["mean"], harm["low"], harm["high"]) == pytest.approx((made.mean, made.low, made.high))
    assert f"{made.mean:.1f} [{made.low:.1f}, {made.high:.1f}]‡" in line_of(
        tables.report(found, summary), "CWAC", "0.1"
    )
    assert set(summary.loc[summary["metric"] == "FA", "over"]) == {"seeds"}
    # verdicts of another evaluation than the row's are not its own, and a cell without all of them has none
    found.verdicts = found.verdicts[found.verdicts["run_id"] != cell_of("cwac", 0.1, 0).run_id]
    summary = tables.summarise(found)
    harm = summary[(summary["metric"] == "HS") & (summary["method"] == "cwac")].set_index("harmful_ratio")["over"]
    assert harm.to_dict() == {0.1: "seeds", 0.5: "seeds and prompts"}


def test_every_pair_is_ranked_and_corrected_over_all_pairs():
    found = campaign({"sft": 0.9, "lisa": 0.5, "bea": 0.5, "cwac": 0.1})
    pairs = pairwise.every_pair(cells(found, "HS"), "HS")
    assert len(pairs) == 2 * 6 and set(pairs["over"]) <= {"seeds and prompts", "seeds", "none"}
    one = pairs[pairs["cell"] == "tiny, toy, p=0.1"].set_index(["first", "second"])
    assert one.loc[("sft", "cwac"), "difference"] == pytest.approx(80)
    assert (
        one.loc[("sft", "cwac"), "p_holm"] == pytest.approx(6 * one["p"].min())
        and one["better"]["sft", "cwac"] == "cwac"
    )
    assert one["better"]["lisa", "bea"] == "" and one["difference"]["lisa", "bea"] == 0
    table = pairwise.standing(one.reset_index()).set_index("method")
    assert list(table.index) == ["cwac", "lisa", "bea", "sft"]
    assert table.loc["cwac", ["better", "worse", "open"]].tolist() == [3, 0, 0]
    assert table.loc["lisa", ["better", "worse", "open"]].tolist() == [1, 1, 1]
    assert (
        pairwise.stands(one.reset_index(), "lisa")
        == "Lisa is better than SFT; worse than CWAC; not told apart from BEA."
    )


def test_poisoned_ratios_are_averaged_by_seed_and_prompt():
    found = pairwise.together(cells(campaign({"sft": 0.5, "cwac": 0.25}, ratios=(0.0, 0.1, 0.5)), "HS"))
    assert found.names() == ["tiny, toy, mean over p > 0"]
    assert found.values(found.names()[0], "cwac") == {0: 25.0, 1: 25.0, 2: 25.0}
    told = found.answers(found.names()[0], "cwac")[0]
    assert told["harmful", "9"] == 1.0 and told["harmful", "10"] == 0.0


def test_the_ranking_is_written_beside_the_campaign(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pairwise.apart, "read", lambda folder: campaign({"sft": 0.9, "cwac": 0.1}))
    assert pairwise.main([str(tmp_path), "--out", str(tmp_path / "pairwise.md")]) == 0
    text = (tmp_path / "pairwise.md").read_text()
    assert "## HS: tiny, toy, mean over p > 0" in text and "CWAC is better than SFT." in text
    assert (tmp_path / "pairwise.csv").read_text().startswith("cell,metric,first,second")
    assert pairwise.main([str(tmp_path), "--metrics", "AE"]) == 2
    assert "AE" in capsys.readouterr().err


def test_power_of_a_known_spread():
    """Seeds alone: the noncentral t of n pairs; ten times the spread takes more seeds than there are."""
    half, power_at = power.precision((25.0, 0.0, 0.0), 6, 1000, 10.0)
    assert half == pytest.approx(scipy_stats.t.ppf(0.975, 5) * 5 / math.sqrt(6))
    nct = scipy_stats.nct.sf(scipy_stats.t.ppf(0.975, 5), 5, 10 / 5 * math.sqrt(6))
    assert power_at == pytest.approx(nct)
    assert power.cheapest((25.0, 0.0, 0.0), 10.0, [100], 1.0, 0.0)[0] == 5  # 4 pairs: 0.77, 5: 0.91
    assert power.cheapest((2500.0, 0.0, 0.0), 1.0, [100], 1.0, 0.0) is None
    # where prompts decide, more of them help; seeds alone do not
    assert power.precision((0.0, 900.0, 0.0), 40, 30, 10.0)[0] > power.precision((0.0, 900.0, 0.0), 3, 90, 10.0)[0]


def test_needs_are_read_from_a_pilot(capsys, tmp_path, monkeypatch):
    found = campaign({"sft": 0.5, "cwac": 0.2}, noise=1)
    table = power.needs(found, "sft", {"HS": 10.0, "FA": 3.0})
    harm = table[table["metric"] == "HS"].iloc[0]
    # the same seeds add the same prompts' worth to both, so no seed differs from another
    assert harm["sd_seeds"] == 0 and harm["sd_prompts"] > 0 and harm["pilot_prompts"] == 40 and harm["cells"] == 2
    assert table[table["metric"] == "FA"].iloc[0]["sd_prompts"] == 0
    monkeypatch.setattr(power.apart, "read", lambda folder, by_rate: found)
    assert power.main([str(tmp_path), "--out", str(tmp_path / "power.md")]) == 0
    assert "10 points of HS against SFT" in (tmp_path / "power.md").read_text()
    assert power.main([str(tmp_path), "--reference", "nobody"]) == 2
    assert "shares two seeds with nobody. Remedy: another --reference: cwac, sft.\n" in capsys.readouterr().err


def test_a_pilot_without_two_shared_seeds_is_told_what_helps(capsys, tmp_path, monkeypatch):
    """A method is no remedy where it shares no two seeds with another either, and never the reference itself."""
    found = campaign({"sft": 0.5, "cwac": 0.2, "bea": 0.3}, noise=1)
    first = found.rows["seed"].min()

    def of(*methods: str) -> None:
        kept = found.rows[~found.rows["method"].isin(methods) | (found.rows["seed"] == first)]
        monkeypatch.setattr(power.apart, "read", lambda folder, by_rate: replace(found, rows=kept))

    of("sft", "cwac", "bea")
    assert power.main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "Remedy: train sft and another method at the same two seeds or more, as by seed=0,1.\n" in said
    of("sft")
    assert power.main([str(tmp_path)]) == 2
    assert "shares two seeds with sft. Remedy: another --reference: bea, cwac.\n" in capsys.readouterr().err


def test_tables_name_the_aligned_model_and_the_anchors_that_were_used():
    cell = cell_of("cwac", 0.1, 0)
    records = [
        row(cell, "HS", 3.0, epoch=0, step=0, final=False, set="harmful", judge="keyword"),
        row(cell, "HS", 40.0, set="harmful", judge="keyword"),
        row(cell, "extra_data", 346.0, set="harmful_prompts", n=None),
        row(cell, "anchors_used", 302.0, set="train", n=None),
        row(cell, "anchors_given", 346.0, set="train", n=None),
    ]
    found = Collection(tidy(records)[0], runs=[cell.run_id])
    shown = tables.overview(found, tables.summarise(found))
    assert "3.0 [1.1, 6.4]§ (n=1)" in line_of(shown, paper.method_label(paper.ALIGNED))
    assert "346 harmful prompts; anchors used 302 of 346" in line_of(shown, "CWAC")
