"""Intervals over seeds and prompts together: their parts by hand, their limits, and how often they hold the truth."""

import math

import numpy as np
import pytest
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
    monkeypatch.setattr(pairwise, "collect", lambda folder: campaign({"sft": 0.9, "cwac": 0.1}))
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
    monkeypatch.setattr(power, "collect", lambda folder: found)
    assert power.main([str(tmp_path), "--out", str(tmp_path / "power.md")]) == 0
    assert "10 points of HS against SFT" in (tmp_path / "power.md").read_text()
    assert power.main([str(tmp_path), "--reference", "nobody"]) == 2
    assert "nobody" in capsys.readouterr().err


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
    assert "3.0 (n=1)" in line_of(shown, paper.method_label(paper.ALIGNED))
    assert "346 harmful prompts; anchors used 302 of 346" in line_of(shown, "CWAC")
