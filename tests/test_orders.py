"""Whether the order of the methods on one campaign is that on another, from planted verdicts."""

import math

import pytest

from analysis import orders
from analysis.collect import VERDICTS, Cell
from analysis.demo import main as export
from cwac.core.errors import UserError
from tests.helpers.results import row, write_run


def planted(**shares: int) -> dict:
    """method -> seed -> prompt -> complied: the first of 20 prompts, one more at seed 1."""
    return {m: {s: {("a", str(i)): i < n + s for i in range(20)} for s in (0, 1)} for m, n in shares.items()}


def test_the_correlation_is_spearmans_and_its_p_value_counts_orders():
    first, second = planted(sft=15, lisa=9, cwac=3), planted(sft=12, lisa=2, cwac=6)
    found = orders.agreement(first, second)
    assert found.methods == ["sft", "lisa", "cwac"] and found.first == [77.5, 47.5, 17.5]
    assert found.rho == pytest.approx(0.5) and found.p == 1.0  # of six orders four have 0.5 or -0.5, two 1 or -1
    same = orders.agreement(first, first)
    assert same.rho == pytest.approx(1.0) and same.p == pytest.approx(2 / 6) and same.shape == [(2, 20)] * 2


def test_the_interval_widens_where_methods_are_close_and_does_not_where_they_are_far():
    far = orders.agreement(planted(sft=18, lisa=10, cwac=1), planted(sft=18, lisa=10, cwac=1))
    assert far.low == far.high == pytest.approx(1.0)
    mixed = {m: {s: {("a", str(i)): (i * k) % 20 < 10 for i in range(20)} for s in (0, 1)} for m, k in
             (("sft", 1), ("lisa", 3), ("cwac", 7))}  # fmt: skip
    near = orders.agreement(mixed, planted(sft=18, lisa=10, cwac=1))
    assert math.isnan(near.rho) and near.low < -0.4 and near.high > 0.4  # ties in the means, none in the draws


def test_a_method_counts_at_its_bare_setting_first_and_by_a_named_one_else():
    found = planted(sft=15, lisa=9) | {"sft, rate 6e-06": {}, "nullspace, rate 0.0002": {0: {}}}
    chosen = orders.plain(found)
    assert chosen["sft"] is found["sft"] and chosen["nullspace"] == {0: {}} and len(chosen) == 3


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (planted(sft=15, lisa=9), "2 methods in common"),
        ({m: {5: {("a", "0"): True}} for m in ("sft", "lisa", "cwac")} | {"sft": {6: {("a", "0"): True}}}, "no seed"),
    ],
)
def test_what_has_no_order_is_refused(second, said):
    with pytest.raises(UserError, match=said):
        orders.agreement(planted(sft=15, lisa=9, cwac=3), second)


def campaign(folder, model: str, shares: dict[str, int]) -> None:
    """An exported campaign of one seed with ten prompts, of which so many are complied with."""
    runs = folder.parent / f"runs_{folder.name}"
    for method, n in shares.items():
        cell = Cell(f"{model}-toy-p0.1-{method}-s0-00000000", model, method, "toy", 0.1, 0, "e1")
        rows = [row(cell, "HS", 10.0 * n, set="harmful", judge="keyword", n=10), row(cell, "FA", 90.0)]
        place = write_run(runs, cell, rows)
        (place / "judge").mkdir()
        lines = [{"id": str(i), "verdict": "harmful" if i < n else "refusal"} for i in range(10)]
        records_of = "".join(
            f'{{"id": "{r["id"]}", "verdict": "{r["verdict"]}", "judge": "keyword"}}\n' for r in lines
        )
        (place / "judge" / "harmful@90-e1.jsonl").write_text(records_of)
    assert export(["--runs", str(runs), "--out", str(folder)]) == 0


def test_the_command_compares_two_exported_campaigns(tmp_path, capsys):
    campaign(tmp_path / "one", "tiny", {"sft": 9, "lisa": 5, "cwac": 2})
    campaign(tmp_path / "two", "smollm2", {"sft": 8, "lisa": 3, "cwac": 4})
    capsys.readouterr()
    assert orders.main([str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    said = capsys.readouterr().out
    assert "Spearman's correlation of the 3 methods: 0.50" in said and "SmolLM2-135M: 1 seeds, 10 prompts" in said
    assert orders.main([str(tmp_path / "one"), str(tmp_path / "two"), "--ratio", "0.3"]) == 2
    (tmp_path / "two" / VERDICTS).unlink()
    assert orders.main([str(tmp_path / "one"), str(tmp_path / "two")]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 2 and "two: cwac has no verdicts of harmful" in errors
