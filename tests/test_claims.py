"""Statistics with known answers, and claims that come out as planted: ties, missing cells, one seed, zero variance."""

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from analysis import claims, paper, stats
from analysis.collect import VERDICT_COLUMNS, Cell, Collection, collect, tidy
from analysis.pairwise import cells, compare, summed_differences
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
    assert found.verdict == "holds" and "+5.0 against SFT's +76.3" in found.evidence
    # each rate is a cell of its own for the other claims
    lower = judge_claim({**LOWER, "than": ["sft"]}, collect(tmp_path))
    assert {n["cell"] for n in lower.numbers} == {"tiny, toy, p=0, lr=1e-05", "tiny, toy, p=0, lr=0.001"}


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
