"""Statistics with known answers, and claims that come out as planted: ties, missing cells, one seed, zero variance."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from analysis import apart, claims, paper, stats
from analysis.collect import VERDICT_COLUMNS, Cell, Collection, collect, tidy
from analysis.pairwise import Cells, cells, compare, summed_differences
from cwac.core.errors import UserError
from tests.helpers.results import row, write_run

# --- statistics -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("better", "worse"), [(0, 8), (3, 9), (5, 5), (1, 0), (12, 30)])
def test_one_seeds_sign_flips_are_mcnemars_exact_test(better, worse):
    differences = [-1] * better + [1] * worse + [0] * 40
    expected = scipy_stats.binomtest(better, better + worse, 0.5).pvalue
    assert stats.sign_flip_p(differences) == pytest.approx(expected)


def test_sign_flips_of_several_seeds_match_enumeration():
    differences = [3, -1, 2, 2, 1, 0]
    signs = np.array(np.meshgrid(*[[-1, 1]] * 5)).reshape(5, -1)
    sums = np.array([3, 1, 2, 2, 1]) @ signs
    assert stats.sign_flip_p(differences) == pytest.approx(np.mean(np.abs(sums) >= abs(sum(differences))))
    assert stats.sign_flip_p([0, 0]) == 1.0
    assert stats.sign_flip_p([3] * 300) < 1e-50  # no overflow, no enumeration


def test_holm_is_the_step_down_by_hand():
    adjusted = stats.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": math.nan})
    assert (adjusted["a"], adjusted["b"], adjusted["c"]) == pytest.approx((0.03, 0.06, 0.06))
    assert math.isnan(adjusted["d"]) and stats.holm({}) == {}
    assert stats.holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0}


def test_cohens_h():
    assert stats.cohens_h(50, 50) == 0
    assert stats.cohens_h(0, 100) == pytest.approx(-math.pi)
    assert stats.cohens_h(75, 25) == pytest.approx(math.pi / 3)


# --- comparisons ----------------------------------------------------------------------------------------


def campaign(planted: dict, metric: str = "HS", model: str = "tiny", verdicts: dict | None = None, **fields):
    """A collection of `{(method, p): [value of seed 0, 1, ...]}`; None leaves a seed out.

    verdicts: `{(method, p): [harmful prompts of seed 0, ...]}` of prompts 0 to 9.
    """
    records, answers = [], []
    judge = "keyword" if metric in paper.VERDICTS else None
    for (method, p), values in planted.items():
        for seed, value in enumerate(values):
            cell = Cell(f"{model}-toy-p{p}-{method}-s{seed}-00000000", model, method, "toy", p, seed)
            if value is not None:
                records.append(row(cell, metric, value, **{"set": "harmful", "judge": judge, **fields}))
            for prompt in range(10) if verdicts else ():
                harmful = prompt in verdicts[method, p][seed]
                answers.append([cell.run_id, "harmful", "keyword", str(prompt), "harmful" if harmful else "refusal"])
    found = Collection(tidy(records)[0])
    for record in answers:
        found.verdicts.loc[len(found.verdicts)] = record
    assert list(found.verdicts.columns) == VERDICT_COLUMNS
    return found


def test_a_difference_must_hold_over_seeds_and_over_prompts():
    """Seeds agree on -10 to -20 points, but it is one or two prompts of ten: not found."""
    planted = {("cwac", 0.1): [30, 30, 40, 30], ("sft", 0.1): [50, 40, 50, 50]}
    answers = {("cwac", 0.1): [{0, 1, 2}, {0, 1, 2}, {0, 1, 2, 3}, {0, 1, 2}]}
    answers["sft", 0.1] = [{0, 1, 2, 3, 4}, {0, 1, 2, 3}, {0, 1, 2, 3, 4}, {0, 1, 2, 3, 4}]
    found = cells(campaign(planted, verdicts=answers), "HS")
    (made,) = compare(found, "tiny, toy, p=0.1", "cwac", ["sft"], "HS")
    assert made.p_seeds < 0.05
    # prompt 3 differs at three seeds, prompt 4 at three: of four sign patterns two reach the sum
    assert made.p_prompts == 0.5 and made.p == 0.5
    assert made.difference.mean == -15 and made.both.mean == pytest.approx(-15)
    assert made.h == pytest.approx(stats.cohens_h(32.5, 47.5))


def test_prompts_pair_only_where_both_answered():
    ours = {0: {"a": True, "b": False}, 1: {"a": True}}
    theirs = {0: {"a": False, "b": False, "c": True}, 1: {"a": False}, 2: {"a": False}}
    assert sorted(summed_differences(ours, theirs)) == [0, 2]


def test_holm_corrects_over_the_baselines():
    planted = {("cwac", 0.1): [10, 12, 14], ("sft", 0.1): [50, 53, 56], ("lisa", 0.1): [20, 21, 25]}
    found = cells(campaign(planted), "HS")
    made = {c.reference: c for c in compare(found, "tiny, toy, p=0.1", "cwac", ["sft", "lisa", "bea"], "HS")}
    assert set(made) == {"sft", "lisa"}
    assert made["sft"].p_holm == pytest.approx(2 * made["sft"].p)
    assert made["lisa"].p_holm == pytest.approx(made["lisa"].p)


# --- claims ---------------------------------------------------------------------------------------------

LOWER = {"kind": "lower", "metric": "HS", "method": "cwac", "than": ["sft", "lisa"]}
FAR, NEAR, BELOW = [50, 53, 55], [48, 52, 50], [10, 12, 15]


def judge_claim(test: dict, collection: Collection, **options) -> claims.Verdict:
    claim = {"id": "planted", "text": "planted", "source": "test", "test": test}
    (found,) = claims.verdicts(collection, claims=[claim], **options)
    return found


def planted(cwac, sft, lisa, p=0.1) -> dict:
    values = {("cwac", p): cwac, ("sft", p): sft, ("lisa", p): lisa}
    return {key: v for key, v in values.items() if v is not None}


@pytest.mark.parametrize(
    ("values", "verdict", "says"),
    [
        (planted(BELOW, FAR, NEAR), "holds", "in the one cell"),
        (planted(FAR, BELOW, NEAR), "fails", "above SFT by +40"),
        (planted([30, 60, 45], FAR, NEAR), "undecided", "not shown below"),
        (planted(BELOW, FAR, BELOW), "undecided", "Lisa by +0.0 (equal at all 3 seeds)"),
        (planted(BELOW, FAR, None), "undecided", "not run: Lisa"),
        (planted(BELOW[:1], FAR[:1], NEAR[:1]), "undecided", "one seed"),
        (planted([None, 12, 15], FAR, NEAR), "holds", "Lisa by -37.5 [-69.3, -5.7]"),  # two seeds are left
        (planted([0, 0, 0], [0, 0, 0], [0, 0, 0]), "undecided", "1 of 1 cells tie exactly"),
        # zero variance: one seed's 200 prompts decide, exactly and unpaired
        (planted([10, 10, 10], [60, 60, 60], [50, 50, 50]), "holds", "p "),
        (planted([10, 10, 10], [60, 60, 60], [11, 11, 11]), "undecided", "Lisa by -1.0, p 0.87"),
        (planted(None, FAR, NEAR), "undecided", "no value for CWAC"),
    ],
)
def test_lowest_comes_out_as_planted(values, verdict, says):
    found = judge_claim(LOWER, campaign(values))
    assert (found.verdict, says in found.evidence) == (verdict, True), found.evidence
    assert "none of the paper's models" in found.evidence or "Not measured" in found.evidence


def test_cells_that_tie_are_set_aside_and_cells_that_miss_a_method_are_not():
    tie = planted([0, 0, 0], [0, 0, 0], [0, 0, 0], p=0.0)
    whole = judge_claim(LOWER, campaign({**planted(BELOW, FAR, NEAR), **tie}))
    assert whole.verdict == "holds" and "1 of 2 cells tie" in whole.evidence
    partial = judge_claim(LOWER, campaign({**planted(BELOW, FAR, NEAR), **planted(BELOW, FAR, None, p=0.2)}))
    assert partial.verdict == "undecided" and "p=0.2: no run of Lisa" in partial.evidence
    unpaired = judge_claim(LOWER, campaign({**planted(BELOW, FAR, NEAR), **planted(None, FAR, NEAR, p=0.2)}))
    assert unpaired.verdict == "undecided" and "p=0.2: no run of CWAC" in unpaired.evidence


def test_one_contradiction_among_many_cells_is_corrected_for_their_number():
    """A weak contradiction (p 0.02) fails one cell, but not one of thirty."""
    weak = {("cwac", 0.1): [21, 22, 26], ("sft", 0.1): [10, 13, 12]}
    assert judge_claim({**LOWER, "than": ["sft"]}, campaign(weak)).verdict == "fails"
    many = {
        (m, round(0.2 + k / 100, 2)): v for k in range(30) for (m, _), v in planted([30, 60, 45], FAR, None).items()
    }
    assert judge_claim({**LOWER, "than": ["sft"]}, campaign({**weak, **many})).verdict == "undecided"


def test_one_of_the_papers_models_is_not_marked_as_another():
    found = judge_claim(LOWER, campaign(planted(BELOW, FAR, NEAR), model="llama2"))
    assert found.verdict == "holds" and "paper's models" not in found.evidence


WITHIN = {"kind": "within", "metric": "FA", "method": "cwac", "of": "sft", "margin": 5}


@pytest.mark.parametrize(
    ("cwac", "sft", "n", "verdict"),
    [
        ([90, 91, 92], [91, 92, 92], 200, "holds"),
        ([70, 71, 72], [91, 92, 92], 200, "fails"),
        ([70, 95, 92], [91, 92, 92], 200, "undecided"),
        ([90], [90], 200, "undecided"),
        ([100] * 3, [100] * 3, 200, "holds"),  # exact intervals over 200 prompts reach down to 98.2
        ([100] * 3, [100] * 3, 20, "undecided"),  # over 20 prompts to 83.2
        ([60] * 3, [90] * 3, 200, "fails"),
    ],
)
def test_kept_accuracy_comes_out_as_planted(cwac, sft, n, verdict):
    collection = campaign({("cwac", 0.0): cwac, ("sft", 0.0): sft}, "FA", n=n)
    assert judge_claim(WITHIN, collection).verdict == verdict


@pytest.mark.parametrize(
    ("cwac", "verdict"),
    [([1.05, 1.06, 1.04], "holds"), ([1.5, 1.6, 1.4], "fails"), ([1.0, 1.2, 1.1], "undecided"), ([1.08] * 3, "holds")],
)
def test_overhead_comes_out_as_planted(cwac, verdict):
    test = {"kind": "ratio", "metric": "seconds_per_step", "method": "cwac", "of": "sft", "limit": 1.10}
    collection = campaign({("cwac", 0.0): cwac, ("sft", 0.0): [1.0] * 3}, "seconds_per_step", n=None)
    found = judge_claim(test, collection)
    assert found.verdict == verdict and "times SFT's" in found.evidence


def test_a_certificate_is_about_the_worst_run_and_one_seed_is_enough():
    test = {"kind": "bound", "metric": "weight_leak", "method": "cwac", "limit": 0.1, "set": "anchors"}
    leaks = {("cwac", 0.0): [0.01], ("cwac", 0.1): [0.02, 0.05]}
    assert judge_claim(test, campaign(leaks, "weight_leak", set="anchors", n=None)).verdict == "holds"
    leaks["cwac", 0.1] = [0.02, 0.5]
    found = judge_claim(test, campaign(leaks, "weight_leak", set="anchors", n=None))
    assert found.verdict == "fails" and "worst of 2 runs 0.5" in found.evidence
    assert judge_claim(test, campaign(leaks, "weight_leak", set="heldout", n=None)).verdict == "undecided"


@pytest.mark.parametrize(
    ("high", "verdict"), [([20, 23, 27], "holds"), ([90, 93, 97], "fails"), ([40, 90, 50], "undecided")]
)
def test_robustness_to_the_ratio_comes_out_as_planted(high, verdict):
    test = {"kind": "flatter", "metric": "HS", "method": "cwac", "of": "sft"}
    values = {("cwac", 0.05): BELOW, ("cwac", 0.5): high, ("sft", 0.05): [30, 31, 35], ("sft", 0.5): [70, 73, 74]}
    values["sft", 0.9] = [99, 99, 99]  # without a cwac run: does not count
    assert judge_claim(test, campaign(values)).verdict == verdict


def test_steadiness_over_learning_rates_comes_out_as_planted(tmp_path):
    test = {"kind": "steadier", "metric": "HS", "method": "cwac", "of": "sft"}
    values = {("cwac", 1e-5): [5, 6, 8], ("cwac", 1e-3): [9, 12, 13], ("sft", 1e-5): [10, 11, 10]}
    values["sft", 1e-3] = [80, 85, 95]
    for (method, rate), seeds in values.items():
        for seed, value in enumerate(seeds):
            cell = Cell(f"tiny-toy-p0-{method}-s{seed}-{rate:g}", "tiny", method, "toy", 0.0, seed, "e1")
            folder = write_run(tmp_path, cell, [row(cell, "HS", value, set="harmful", judge="keyword")])
            (folder / "config.yaml").write_text(f"train: {{learning_rate: {rate}}}\n")
    found = judge_claim(test, collect(tmp_path))
    assert found.verdict == "holds" and "tiny, toy, p=0: +5.0 against SFT's +76.3" in found.evidence
    # each rate is a cell of its own for the other claims
    lower = judge_claim({**LOWER, "than": ["sft"]}, collect(tmp_path))
    assert {n["cell"] for n in lower.numbers} == {"tiny, toy, p=0, lr=1e-5", "tiny, toy, p=0, lr=1e-3"}


def test_every_epoch_counts_where_a_claim_says_so():
    rows = []
    for method, values in (("cwac", BELOW), ("sft", FAR)):
        for seed, value in enumerate(values):
            cell = Cell(f"tiny-toy-p0.1-{method}-s{seed}-00000000", "tiny", method, "toy", 0.1, seed)
            fields = {"set": "harmful", "judge": "keyword"}
            early = 100 - value if method == "cwac" else value
            rows += [
                row(cell, "HS", early, epoch=1.0, step=30, final=False, **fields),
                row(cell, "HS", value, **fields),
            ]
    collection = Collection(tidy(rows)[0])
    test = {**LOWER, "than": ["sft"]}
    assert judge_claim(test, collection).verdict == "holds"
    found = judge_claim({**test, "at": "epochs"}, collection)
    assert found.verdict == "fails" and "epoch 1: above SFT" in found.evidence


def test_another_reading_can_stand_for_cwac():
    values = {("cwac", 0.1): BELOW, ("cwac_literal", 0.1): FAR, ("sft", 0.1): NEAR, ("lisa", 0.1): NEAR}
    assert judge_claim(LOWER, campaign(values)).verdict == "holds"
    literal = judge_claim(LOWER, campaign(values), reading="cwac_literal")
    assert literal.verdict == "undecided" and {n["method"] for n in literal.numbers} == {"cwac_literal"}


def test_the_shipped_claims_are_complete_and_a_broken_one_is_refused(tmp_path):
    shipped = claims.load_claims()
    assert len({c["id"] for c in shipped}) == len(shipped) >= 12
    assert all(m in paper.METHODS for c in shipped for m in [c["test"]["method"], *claims.methods_of(c["test"])])
    path = tmp_path / "claims.yaml"
    for text, message in (
        ("- {id: a, text: b, source: c, test: {kind: odd}}", "kind=odd"),
        ("- {id: a, text: b, test: {kind: lower}}", "lacks source"),
        ("- {id: a, text: b, source: c, test: {kind: ratio, metric: m, method: x}}", "lacks limit, of"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            claims.load_claims(path)


def test_the_command_prints_every_claim_and_writes_the_numbers(tmp_path, capsys):
    for method, values in (("cwac", BELOW), ("sft", FAR)):
        for seed, value in enumerate(values):
            cell = Cell(f"tiny-toy-p0.1-{method}-s{seed}-00000000", "tiny", method, "toy", 0.1, seed, "e1")
            write_run(tmp_path / "runs", cell, [row(cell, "HS", value, set="harmful", judge="keyword")])
    csv = tmp_path / "out" / "claims.csv"
    assert claims.main(["--runs", str(tmp_path / "runs"), "--csv", str(csv)]) == 0
    printed = capsys.readouterr().out
    assert all(f"**{c['text']}**" in printed for c in claims.load_claims())
    assert "lowest_hs,undecided" in csv.read_text() and "not run: Lisa" in printed
    assert claims.main(["--results", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_campaign_without_runs_decides_nothing():
    found = claims.verdicts(Collection(tidy([])[0]))
    assert {v.verdict for v in found} == {"undecided"} and all("Not measured" in v.evidence for v in found)


# --- one function at a time -----------------------------------------------------------------------------

CELL = "tiny, toy, p=0.1"


@pytest.mark.parametrize(
    ("metric", "value", "sign", "expected"),
    [
        ("HS", -12.345, "+", "-12.3"),
        ("HS", 3, "+", "+3.0"),
        ("FA", 3, "", "3.0"),
        ("task_loss", 0.0123456, "+", "+0.0123"),
        ("task_loss", 12345.6, "", "1.23e+04"),
    ],
)
def test_points_of_a_percentage_and_digits_of_all_else(metric, value, sign, expected):
    assert claims.points(metric, value, sign) == expected


def test_an_interval_is_written_with_signs():
    found = stats.Estimate(1.0, -2.04, 4.06, 3.0, 3, "seeds")
    assert claims.points("HS", 1.0) == "+1.0" and claims.interval("HS", found) == "[-2.0, +4.1]"
    assert claims.interval("task_loss", found) == "[-2.04, +4.06]"


@pytest.mark.parametrize(
    ("test", "expected"),
    [
        ({"of": "sft"}, ["sft"]),
        ({"method": "cwac", "than": ["lisa", "bea"]}, ["lisa", "bea"]),
        ({"method": "cwac", "than": "baselines"}, ["sft", "lisa", "safeinstr", "bea", "sppft", "asft"]),
        ({"method": "lisa", "than": "baselines"}, ["sft", "safeinstr", "bea", "sppft", "asft"]),
        ({"method": "cwac"}, []),
    ],
)
def test_the_methods_a_claim_compares_with(test, expected):
    assert claims.methods_of(test) == expected


def test_a_method_is_missing_where_it_shares_no_seed():
    values = {**planted([1, 2, None], [None, None, 3], [4, 5, 6]), **planted(None, [1], None, p=0.2)}
    found = cells(campaign(values), "HS")
    assert claims.lacking(found, CELL, LOWER) == ["sft"]
    assert claims.lacking(found, "tiny, toy, p=0.2", LOWER) == ["cwac"]
    assert claims.lacking(found, CELL, {**LOWER, "than": ["bea", "lisa"]}) == []  # bea was not run at all
    assert claims.gaps(found, LOWER) == [
        claims.Outcome(CELL, "undecided", "no run of SFT to pair"),
        claims.Outcome("tiny, toy, p=0.2", "undecided", "no run of CWAC to pair"),
    ]
    values = {**planted([1], None, None), **planted(None, [1], [1], p=0.2)}
    (first, _) = claims.gaps(cells(campaign(values), "HS"), LOWER)
    assert first.why == "no run of SFT, Lisa to pair"


def outcomes_of(values: dict, test: dict = LOWER, metric: str = "HS", **fields) -> list[claims.Outcome]:
    return claims.KINDS[test["kind"]](cells(campaign(values, metric, **fields), metric), test)


def outcome_of(values: dict, test: dict = LOWER, metric: str = "HS", **fields) -> claims.Outcome:
    (made,) = outcomes_of(values, test, metric, **fields)
    return made


# differences to SFT -40, -41, -40: t = 121 at 2 degrees of freedom, p = 1 - t / sqrt(2 + t^2) = 6.8e-5, half-width
# 4.303 / 3; to Lisa -38, -40, -35: t = 25.92, p = 0.00148, half-width 4.303 * 1.453
TO_SFT, TO_LISA = "SFT by -40.3 [-41.8, -38.9], p {}", "Lisa by -37.7 [-43.9, -31.4], p {}"
FROM_SFT = "SFT by +40.3 [+38.9, +41.8], p {}"


@pytest.mark.parametrize(
    ("values", "verdict", "why"),
    [
        (planted(BELOW, FAR, NEAR), "holds", f"below {TO_SFT.format('0.00014')}, {TO_LISA.format('0.0015')}"),
        (planted(BELOW, FAR, None), "holds", f"below {TO_SFT.format('6.8e-05')}"),
        (planted(FAR, BELOW, None), "fails", f"above {FROM_SFT.format('6.8e-05')}"),
        # only what contradicts is told: level with Lisa at 0.6 +- 2.9 is not
        (planted(FAR, BELOW, [51, 52, 53]), "fails", f"above {FROM_SFT.format('0.00014')}"),
        (planted([1, 1, 1], [1, 1, 1], None), "tie", "level with SFT by +0.0 (equal at all 3 seeds)"),
        (planted([1], [9], None), "undecided", "not shown below SFT by -8.0 (one seed)"),
        (planted([9], [1], None), "undecided", "above, not significantly, SFT by +8.0 (one seed)"),
        (
            # differences to SFT -1 and +3: t = 0.5, p = 1 - 2 atan(0.5) / pi; to Lisa -3 and 1
            planted([10, 10], [11, 7], [13, 9]),
            "undecided",
            "not shown below Lisa by -1.0 [-26.4, +24.4], p 1; above, not significantly, SFT by +1.0 [-24.4, +26.4], "
            "p 1",
        ),
        (planted([20, 20], [20, 20], [9, 10]), "undecided", None),
        (planted([10, 10, 10], [60, 60, 60], None), "holds", None),
    ],
)
def test_what_an_order_says_of_a_cell(values, verdict, why):
    found = outcome_of(values)
    assert (found.cell, found.verdict) == (CELL, verdict), found.why
    assert why is None or found.why == why
    methods = dict.fromkeys(m for m, _ in values if m != "cwac")
    assert [n["reference"] for n in found.numbers] == list(methods)


def test_higher_is_lower_turned_round():
    higher = {**LOWER, "kind": "higher"}
    assert outcome_of(planted(FAR, BELOW, None), higher).why == f"above {FROM_SFT.format('6.8e-05')}"
    assert outcome_of(planted(FAR, BELOW, None), higher).verdict == "holds"
    found = outcome_of(planted(BELOW, FAR, None), higher)
    assert (found.verdict, found.why) == ("fails", f"below {TO_SFT.format('6.8e-05')}")
    assert outcome_of(planted([1], [9], None), higher).why == "below, not significantly, SFT by -8.0 (one seed)"
    assert outcome_of(planted([9], [1], None), higher).why == "not shown above SFT by +8.0 (one seed)"


def test_support_is_corrected_within_a_cell_and_contradiction_over_all():
    values = {**planted(BELOW, FAR, None), **planted(FAR, BELOW, None, p=0.2), **planted(BELOW, FAR, None, p=0.3)}
    values["lisa", 0.9] = [1, 2, 3]  # a cell without the method
    made = outcomes_of(values)
    assert [(o.cell, o.verdict) for o in made] == [
        (CELL, "holds"),
        ("tiny, toy, p=0.2", "fails"),
        ("tiny, toy, p=0.3", "holds"),
    ]
    assert made[0].why.endswith("p 6.8e-05") and made[1].why.endswith("p 0.0002")  # one of three


def test_equal_seeds_are_told_without_an_interval():
    """No spread over seeds: Fisher's exact test of 20 and 120 of 200 prompts stands for it."""
    p = scipy_stats.fisher_exact([[20, 180], [120, 80]]).pvalue
    assert outcome_of(planted([10] * 3, [60] * 3, None)).why == f"below SFT by -50.0, p {p:.2g}"


@pytest.mark.parametrize(
    ("metric", "n", "cwac", "sft", "verdict", "why"),
    [
        ("FA", 200, [90, 91, 92], [90, 92, 93], "holds", "-0.7 [-2.1, +0.8] to SFT, margin 5"),
        ("FA", 200, [80, 91, 93], [91, 92, 93], "undecided", "-4.0 [-19.1, +11.1] to SFT, margin 5"),
        ("FA", 200, [80], [91], "undecided", "-11.0 (one seed, or no prompts counted) to SFT, margin 5"),
        ("FA", None, [80, 80], [91, 91], "undecided", "-11.0 (one seed, or no prompts counted) to SFT, margin 5"),
        # no sampling, the same difference each time: decided, but for the margin itself
        ("loss", None, [1, 2], [6, 7], "undecided", "-5 [-5, -5] to SFT, margin 5"),
        ("loss", None, [1.5, 2.5], [6, 7], "holds", "-4.5 [-4.5, -4.5] to SFT, margin 5"),
        ("loss", None, [0.5, 1.5], [6, 7], "fails", "-5.5 [-5.5, -5.5] to SFT, margin 5"),
        ("loss", None, [9, 11], [6, 7], "holds", "+3.5 [-2.85, +9.85] to SFT, margin 5"),
    ],
)
def test_what_a_margin_says_of_a_cell(metric, n, cwac, sft, verdict, why):
    found = outcome_of(planted(cwac, sft, None), {**WITHIN, "metric": metric}, metric, n=n)
    assert (found.cell, found.verdict, found.why) == (CELL, verdict, why)
    assert found.numbers[0]["metric"] == metric
    assert found.numbers[0]["difference"] == pytest.approx(np.mean(cwac) - np.mean(sft))


def test_exact_bounds_of_a_difference_are_the_far_ends_of_both():
    found = outcome_of(planted([60] * 3, [90] * 3, None), WITHIN, "FA", n=50)
    (a, b), (x, y) = stats.exact(60, 50), stats.exact(90, 50)
    assert (found.numbers[0]["low"], found.numbers[0]["high"]) == (a - y, b - x)
    assert found.verdict == "undecided"  # up to -4.9


@pytest.mark.parametrize(
    ("values", "limit", "verdict", "why"),
    [
        ([1.0, 3.0], 14.8, "holds", "<2.0> [<-10.7>, <14.7>]"),
        ([1.0, 3.0], 14.6, "undecided", "<2.0> [<-10.7>, <14.7>]"),
        ([1.0, 3.0], -10.8, "fails", "<2.0> [<-10.7>, <14.7>]"),
        ([2.0, 2.0], 2.0, "tie", "<2.0>"),
        ([2.0, 2.0], 2.5, "holds", "<2.0>"),
        ([2.0, 2.0], 1.5, "fails", "<2.0>"),
        ([1.0, 3.0], 2.0, "undecided", "<2.0> [<-10.7>, <14.7>]"),
        ([2.0], 9.0, "undecided", "<2.0> (one seed)"),
        ([1.0, 1.12], 2.0, "holds", "<1.1> [<0.3>, <1.8>]"),
    ],
)
def test_a_mean_is_judged_by_its_interval(values, limit, verdict, why):
    test = {"metric": "HS", "method": "cwac", "of": "sft"}
    found = claims.judged("here", test, tuple(values), limit, lambda v: f"<{v:.1f}>")
    assert (found.cell, found.verdict, found.why) == ("here", verdict, why)
    made = stats.estimate(values)
    expected = ["here", "HS", "cwac", "sft", sum(values) / len(values), made.low, made.high, len(values), limit]
    keys = ["cell", "metric", "method", "reference", "difference", "low", "high", "seeds", "limit"]
    assert list(found.numbers[0]) == keys
    assert list(found.numbers[0].values())[:4] == expected[:4]
    assert list(found.numbers[0].values())[4:] == pytest.approx(expected[4:], nan_ok=True)
    assert claims.judged("here", {"metric": "HS", "method": "cwac"}, [1.0], 0, str).numbers[0]["reference"] == ""


def test_an_interval_that_ends_at_the_limit_decides_nothing():
    found = stats.estimate([1.0, 3.0])
    for limit in (found.low, found.high):
        assert claims.judged("here", {"metric": "HS", "method": "cwac"}, [1.0, 3.0], limit, str).verdict == "undecided"


def test_quotients_are_paired_by_seed_and_need_something_to_divide_by():
    test = {"kind": "ratio", "metric": "seconds", "method": "cwac", "of": "sft", "limit": 1.5}
    found = outcome_of(planted([3.0, 5.0, 7.0, 8.0], [2.0, 5.0, 0.0], None), test, "seconds")
    assert (found.verdict, found.why) == ("undecided", "1.25 [-1.93, 4.43] times SFT's, limit 1.5")
    assert (found.numbers[0]["seeds"], found.numbers[0]["limit"]) == (2, 1.5)
    assert outcomes_of(planted([3.0], [0.0], None), test, "seconds") == []
    values = {**planted([3.0], [0.0], None), **planted([3.0, 3.0], [3.0, 3.0], None, p=0.2)}
    (found,) = outcomes_of(values, test, "seconds")
    assert (found.cell, found.verdict, found.why) == ("tiny, toy, p=0.2", "holds", "1.00 times SFT's, limit 1.5")


def test_a_bound_is_met_below_it_only():
    test = {"kind": "bound", "metric": "weight_leak", "method": "cwac", "limit": 0.5}
    values = {**planted(None, [9.0], None, p=0.0), **planted([0.25, 0.123], [9.0], None)}
    (found,) = outcomes_of(values, test, "weight_leak")
    assert (found.cell, found.verdict, found.why) == (CELL, "holds", "worst of 2 runs 0.25, limit 0.5")
    assert found.numbers == [
        {"cell": CELL, "metric": "weight_leak", "method": "cwac", "reference": ""}
        | {"difference": 0.25, "seeds": 2, "limit": 0.5}
    ]
    assert outcome_of(planted([0.5], None, None), test, "weight_leak").verdict == "fails"


def test_a_rise_is_from_the_smallest_to_the_largest_ratio_that_both_have():
    test = {"kind": "flatter", "metric": "HS", "method": "cwac", "of": "sft"}
    values = {
        ("cwac", 0.5): [20.5, 24.5],
        ("cwac", 0.05): [10, 10],
        ("cwac", 0.2): [99, 99],
        ("sft", 0.05): [30, 30],
        ("sft", 0.2): [1, 1],
        ("sft", 0.5): [70, 70, 70],
        ("sft", 0.9): [99, 99, 99],
    }
    found = outcome_of(values, test)
    # rises of 10.5 and 14.5 against 40 twice
    assert (found.cell, found.verdict) == ("tiny, toy", "holds")
    assert found.why == "+12.5 against SFT's +40.0, difference -27.5 [-52.9, -2.1]"
    assert found.numbers[0]["difference"] == -27.5 and found.numbers[0]["limit"] == 0
    one = {("cwac", 0.05): [10], ("cwac", 0.5): [20], ("sft", 0.05): [30], ("sft", 0.9): [40]}
    assert outcomes_of(one, test) == []  # one shared ratio is no rise
    assert outcomes_of({("cwac", 0.05): [10], ("cwac", 0.5): [20]}, test) == []
    rise = {("cwac", 0.05): [10], ("cwac", 0.5): [20], ("sft", 0.05): [30], ("sft", 0.5): [40]}
    two = cells(campaign(rise), "HS")
    other = cells(campaign(rise, model="another"), "HS")
    both = claims.flatter(Cells(pd.concat([two.rows, other.rows]), {}), test)
    assert [o.cell for o in both] == ["tiny, toy", "another, toy"]


def made(verdict: str, cell: str = CELL, why: str = "so", numbers=()) -> claims.Outcome:
    return claims.Outcome(cell, verdict, why, list(numbers))


PAPERS = "llama3, gsm8k, p=0"


@pytest.mark.parametrize(
    ("outcomes", "absent", "verdict", "evidence"),
    [
        ([], [], "undecided", "Not measured: no comparison at hand."),
        ([], ["cwac", "bea"], "undecided", "Not measured: no value for CWAC, BEA."),
        ([made("holds", PAPERS)], [], "holds", f"Holds in the one cell: {PAPERS}: so."),
        (
            [made("holds", PAPERS), made("holds"), made("holds"), made("holds")],
            [],
            "holds",
            f"Holds in all 4 cells: {PAPERS}: so; {CELL}: so (and 2 more).",
        ),
        ([made("holds", PAPERS)], ["bea", "asft"], "undecided", "Holds in 1 of 1 cells; not run: BEA, AsFT."),
        (
            [made("holds", PAPERS), made("undecided")],
            [],
            "undecided",
            f"Open in 1 of 2 cells: {CELL}: so; holds in 1 of 2 cells.",
        ),
        (
            [made("holds", PAPERS), made("undecided"), made("fails"), made("tie"), made("tie")],
            ["bea"],
            "fails",
            f"Fails in 1 of 3 cells: {CELL}: so; 2 of 5 cells tie exactly and say nothing; not run: BEA.",
        ),
        (
            [made("holds"), made("tie", PAPERS)],
            [],
            "holds",
            f"Holds in the one cell: {CELL}: so; 1 of 2 cells tie exactly and say nothing.",
        ),
        ([made("tie")], [], "undecided", "1 of 1 cells tie exactly and say nothing; none of the paper's models."),
        (
            [made("fails", "llama2x, toy")],
            [],
            "fails",
            "Fails in 1 of 1 cells: llama2x, toy: so; none of the paper's models.",
        ),
    ],
)
def test_cells_make_one_verdict(outcomes, absent, verdict, evidence):
    found = claims.aggregate({"id": "a", "text": "b", "source": "c"}, outcomes, absent)
    assert (found.claim, found.text, found.source) == ("a", "b", "c")
    assert (found.verdict, found.evidence, found.numbers) == (verdict, evidence, [])


def test_a_verdict_holds_the_numbers_of_all_its_cells():
    found = claims.aggregate(
        {"id": "a", "text": "b", "source": "c"},
        [made("holds", numbers=[{"x": 1}, {"x": 2}]), made("tie", numbers=[{}])],
        [],
    )
    assert found.numbers == [{"x": 1}, {"x": 2}, {}]


def test_two_cells_are_told_and_the_rest_counted():
    three = [made("holds", c) for c in "abc"]
    assert claims.told(three) == "a: so; b: so (and 1 more)" and claims.told(three[:2]) == "a: so; b: so"
    assert claims.told(three, most=3) == "a: so; b: so; c: so" and claims.told([]) == ""


def test_claims_may_speak_of_poisoned_cells_only():
    values = {**planted(BELOW, FAR, NEAR), **planted(FAR, BELOW, NEAR, p=0.0)}
    assert judge_claim(LOWER, campaign(values)).verdict == "fails"
    found = judge_claim({**LOWER, "poisoned": True}, campaign(values))
    assert found.verdict == "holds" and {n["cell"] for n in found.numbers} == {CELL}


def test_a_reading_stands_for_cwac_among_the_references_too():
    values = {("cwac", 0.1): BELOW, ("cwac_literal", 0.1): NEAR, ("weight_only", 0.1): FAR}
    test = {**LOWER, "method": "weight_only", "kind": "higher", "than": ["cwac"]}
    (number,) = judge_claim(test, campaign(values), reading="cwac_literal").numbers
    assert (number["method"], number["reference"]) == ("weight_only", "cwac_literal")


def test_a_gap_is_open_but_no_excuse_for_a_contradiction():
    """SFT is missing in the second cell; there Lisa alone contradicts, or supports."""
    worse = {**planted(BELOW, FAR, NEAR), **planted(FAR, None, BELOW, p=0.2)}
    found = judge_claim(LOWER, campaign(worse))
    assert found.verdict == "fails" and found.evidence.startswith(
        "Fails in 1 of 2 cells: tiny, toy, p=0.2: above Lisa"
    )
    better = {**planted(BELOW, FAR, NEAR), **planted(BELOW, None, FAR, p=0.2)}
    found = judge_claim(LOWER, campaign(better))
    assert found.verdict == "undecided"
    assert found.evidence.startswith("Open in 1 of 2 cells: tiny, toy, p=0.2: no run of SFT to pair; holds in 1 of 2")
    margin = {("cwac", 0.1): [90, 91], ("sft", 0.1): [90, 91.5], ("cwac", 0.2): [90, 91]}
    found = judge_claim({**WITHIN, "margin": 50}, campaign(margin, "FA"))
    assert "p=0.2: no run of SFT to pair" in found.evidence
    times = {"kind": "ratio", "metric": "seconds", "method": "cwac", "of": "sft", "limit": 2}
    assert "p=0.2: no run of SFT to pair" in judge_claim(times, campaign(margin, "seconds")).evidence
    # where the method itself was not run anywhere, nothing was measured
    found = judge_claim(LOWER, campaign(planted(None, FAR, NEAR)))
    assert found.evidence == "Not measured: no value for CWAC."


def test_the_judge_of_a_claim_can_be_chosen():
    rows = []
    for judge, ours in (("keyword", BELOW), ("strict", FAR)):
        for method, values in (("cwac", ours), ("sft", NEAR)):
            for seed, value in enumerate(values):
                cell = Cell(f"tiny-toy-p0.1-{method}-s{seed}-00000000", "tiny", method, "toy", 0.1, seed)
                rows.append(row(cell, "HS", value, set="harmful", judge=judge))
    collection = Collection(tidy(rows)[0])
    test = {**LOWER, "than": ["sft"]}
    assert judge_claim(test, collection, judge="keyword").verdict == "holds"
    assert judge_claim(test, collection, judge="strict").verdict == "undecided"
    with pytest.raises(UserError, match="Remedy: choose one with --judge"):
        judge_claim(test, collection)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- {id: a}", "claims.yaml: a claim lacks source, test, text. Remedy: see its other claims."),
        (
            "- {id: a, text: b, source: c, test: {}}",
            f"claims.yaml: a: kind=None is unknown. Remedy: one of {', '.join(claims.KINDS)}.",
        ),
        ("- {id: a, text: b, source: c, test: {kind: lower}}", "claims.yaml: a: its test lacks method, metric, than."),
        (
            "- {id: a, text: b, source: c, test: {kind: higher}}",
            "claims.yaml: a: its test lacks method, metric, than.",
        ),
        (
            "- {id: a, text: b, source: c, test: {kind: within}}",
            "claims.yaml: a: its test lacks margin, method, metric, of.",
        ),
        (
            "- {id: a, text: b, source: c, test: {kind: ratio}}",
            "claims.yaml: a: its test lacks limit, method, metric, of.",
        ),
        (
            "- {id: a, text: b, source: c, test: {kind: bound}}",
            "claims.yaml: a: its test lacks limit, method, metric.",
        ),
        ("- {id: a, text: b, source: c, test: {kind: flatter}}", "claims.yaml: a: its test lacks method, metric, of."),
        (
            "- {id: a, text: b, source: c, test: {kind: steadier}}",
            "claims.yaml: a: its test lacks method, metric, of.",
        ),
    ],
)
def test_a_claim_that_cannot_be_tested_is_refused_by_name(tmp_path, text, message):
    path = tmp_path / "claims.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        claims.load_claims(path)
    assert str(error.value) == message


def test_the_report_counts_lists_and_explains():
    found = [
        claims.Verdict("a", "A is low", "Table 1", "holds", "Because.", []),
        claims.Verdict("b", "B is low", "Table 2", "undecided", "One seed.", []),
    ]
    assert claims.report(found) == (
        "2 claims: 1 holds, 0 fails, 1 undecided at this scale.\n\n"
        "| claim    |  source |                 verdict |\n"
        "|----------|--------:|------------------------:|\n"
        "| A is low | Table 1 |                   holds |\n"
        "| B is low | Table 2 | undecided at this scale |\n\n"
        "- **A is low** (Table 1): holds. Because.\n"
        "- **B is low** (Table 2): undecided at this scale. One seed.\n"
    )
    long = claims.report([claims.Verdict("a", "A is low " * 30, "Table 1", "holds", "Because.", [])])
    assert long.count("| Table 1 |") == 1 and f"| {'A is low ' * 30} | Table 1 |" in long  # one table, however wide


def test_the_command_reads_a_preset_an_export_and_a_judge(tmp_path, capsys, monkeypatch):
    asked = []
    here = Cell("tiny-toy-p0.1-cwac-s0-00000000", "tiny", "cwac", "toy", 0.1, 0)
    gone = Cell("tiny-toy-p0.1-sft-s0-00000000", "tiny", "sft", "toy", 0.1, 0)
    write_run(tmp_path / "runs", here, [row(here, "HS", 3.0, set="harmful", judge="keyword")], tail="{")
    monkeypatch.setattr(apart, "expected_cells", lambda *given: asked.append(given) or [here, gone])
    arguments = ["--runs", str(tmp_path / "runs"), "--experiment", "demo", "seed=0,1", "--judge", "keyword"]
    csv = tmp_path / "deep" / "out" / "claims.csv"
    assert claims.main([*arguments, "--reading", "cwac_literal", "--csv", str(csv)]) == 0
    printed = capsys.readouterr().out
    assert asked == [("demo", ["seed=0,1"])] and "Not measured: no value for CWAC, Alg. 1 literally" in printed
    assert f"not counted: {gone}\n" in printed
    assert f"not counted: {here.run_id}: 1 unreadable or lost line(s) in metrics.jsonl\n" in printed
    assert claims.main([*arguments[:4], "--judge", "nobody"]) == 2
    assert "--judge nobody made no row here" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    collect(tmp_path / "runs").rows.to_csv(tmp_path / "out" / "results.csv", index=False)
    assert claims.main(["--results", str(tmp_path / "out"), "--csv", str(csv)]) == 0  # over what was there
    printed = capsys.readouterr().out
    assert printed.startswith(f"{len(claims.load_claims())} claims: ") and "not counted" not in printed
    with pytest.raises(SystemExit):
        claims.main([])
    with pytest.raises(SystemExit):
        claims.main(["--runs", "a", "--results", "b"])


def test_the_numbers_are_written_a_line_each(tmp_path):
    for method, values in (("weight_only", BELOW), ("sft", FAR)):
        for seed, value in enumerate(values):
            cell = Cell(f"tiny-toy-p0.1-{method}-s{seed}-00000000", "tiny", method, "toy", 0.1, seed)
            write_run(tmp_path / "runs", cell, [row(cell, "HS", value, set="harmful", judge="keyword")])
    csv = tmp_path / "claims.csv"
    assert claims.main(["--runs", str(tmp_path / "runs"), "--csv", str(csv)]) == 0
    header, line = csv.read_text().splitlines()
    assert header.startswith("claim,verdict,cell,metric,method,reference,")
    assert line.startswith('weight_only_helps,holds,"tiny, toy, p=0.1",HS,weight_only,sft,')
