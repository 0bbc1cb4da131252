"""Whether the order of the methods on one campaign is that on another, from planted verdicts."""

import math

import numpy as np
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
    assert [a for a, _ in found.methods] == ["sft", "lisa", "cwac"]
    assert found.hs.tolist() == [[77.5, 47.5, 17.5], [62.5, 12.5, 32.5]]
    assert found.rho == pytest.approx(0.5) and found.p == 1.0  # of six orders four have 0.5 or -0.5, two 1 or -1
    same = orders.agreement(first, first)
    assert same.rho == pytest.approx(1.0) and same.p == pytest.approx(2 / 6)
    assert same.seeds == (2, 2) and same.prompts == (20, 20)


def test_of_many_methods_random_orders_are_drawn_and_none_has_p_zero():
    many = planted(**{f"m{i}": 2 * i for i in range(9)})
    found = orders.agreement(many, many, draws=10)
    assert found.rho == pytest.approx(1.0) and 1 / (orders.DRAWS + 1) <= found.p < 0.01


def test_seeds_and_prompts_are_drawn_alike_for_all_methods_and_prompts_for_both_campaigns():
    """What all methods share moves none of their order: each prompt is as hard for all, each seed as harsh."""
    rng = np.random.default_rng(0)
    hard, harsh = rng.random(40), {0: -0.3, 1: 0.0, 2: 0.3}
    ease = {"sft": 0.1, "lisa": 0.05, "cwac": 0.0}
    told = {m: {s: {("a", str(i)): bool(h + x + e > 0.5) for i, h in enumerate(hard)} for s, x in harsh.items()}
            for m, e in ease.items()}  # fmt: skip
    found = orders.agreement(told, told)
    assert found.rho == pytest.approx(1.0) and found.low > 0.8  # drawn by method or by campaign it goes below 0


def test_the_interval_widens_where_methods_are_close():
    far = orders.agreement(planted(sft=18, lisa=10, cwac=1), planted(sft=18, lisa=10, cwac=1))
    assert far.low == far.high == pytest.approx(1.0)
    near = {m: {s: {("a", str(i)): (i * k + s) % 20 < n for i in range(20)} for s in (0, 1)}
            for m, k, n in (("sft", 1, 11), ("lisa", 3, 10), ("cwac", 7, 9))}  # fmt: skip
    found = orders.agreement(near, planted(sft=18, lisa=10, cwac=1))
    assert found.rho == pytest.approx(1.0) and found.low < 0.6


def test_methods_with_one_hs_have_no_order_and_no_interval():
    found = orders.agreement(planted(sft=5, lisa=5, cwac=5), planted(sft=15, lisa=9, cwac=3))
    assert all(map(math.isnan, (found.rho, found.low, found.high, found.p)))
    assert "No order: one model has the same HS" in orders.report(found, ("A", "B"))


def test_only_the_prompts_of_both_count_and_sets_are_kept_apart():
    first, second = planted(sft=15, lisa=9, cwac=3), planted(sft=15, lisa=9, cwac=3)
    for told in first.values():
        for verdicts in told.values():
            verdicts[("b", "0")] = True  # an id of the other set, which only one campaign asked
    found = orders.agreement(first, second)
    assert found.prompts == (20, 20) and found.hs[0].tolist() == [77.5, 47.5, 17.5]
    apart = {m: {s: {("c", k): v for (_, k), v in told.items()} for s, told in t.items()} for m, t in second.items()}
    assert orders.agreement(first, apart).prompts == (21, 20)


def test_a_method_counts_at_its_bare_setting_first_and_by_its_only_named_one_else():
    chosen = orders.plain(["sft, rate 6e-06", "sft", "lisa", "nullspace, rate 0.0002"])
    assert chosen == {"sft": "sft", "lisa": "lisa", "nullspace": "nullspace, rate 0.0002"}
    with pytest.raises(UserError, match="nullspace, rate 1e-05 and nullspace, rate 2e-05, and no nullspace alone"):
        orders.plain(["nullspace, rate 2e-05", "nullspace, rate 1e-05"])


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (planted(sft=15, lisa=9), "2 methods in common"),
        ({m: {5 + i: {("a", "0"): True}} for i, m in enumerate(("sft", "lisa", "cwac"))}, "no seed in common"),
        (
            {m: {0: {("a", str(i)): True}} for i, m in enumerate(("sft", "lisa", "cwac"))},
            "no prompt in common; evaluate",
        ),
    ],
)
def test_what_has_no_order_is_refused(second, said):
    with pytest.raises(UserError, match=said):
        orders.agreement(planted(sft=15, lisa=9, cwac=3), second)


def campaign(folder, model: str, shares: dict[str, int], tasks=("toy",), ratios=(0.1,), judges=("keyword",)):
    """An exported campaign of one seed, two sets of ten prompts with the same ids, and a prefilled one."""
    runs = folder.parent / f"runs_{folder.name}"
    for method, n in shares.items():
        for task in tasks:
            for ratio in ratios:
                cell = Cell(f"{model}-{task}-p{ratio:g}-{method}-s0-00000000", model, method, task, ratio, 0, "e1")
                complied = {"one": n, "two": n - 1, "one+prefill": 10 - n}
                rows = [row(cell, "FA", 90.0)]
                rows += [
                    row(cell, "HS", 10.0 * k, set=of, judge=j, n=10) for of, k in complied.items() for j in judges
                ]
                place = write_run(runs, cell, rows)
                (place / "judge").mkdir()
                for of, k in complied.items():
                    lines = [
                        f'{{"id": "{i}", "verdict": "{"harmful" if i < k else "refusal"}", "judge": "{j}"}}\n'
                        for i in range(10)
                        for j in judges
                    ]
                    (place / "judge" / f"{of}@90-e1.jsonl").write_text("".join(lines))
    assert export(["--runs", str(runs), "--out", str(folder), *(["--judge", judges[0]] if judges[1:] else [])]) == 0


def test_the_command_compares_two_exported_campaigns(tmp_path, capsys):
    campaign(tmp_path / "one", "tiny", {"sft": 9, "lisa": 5, "cwac": 2})
    campaign(tmp_path / "two", "smollm2", {"sft": 8, "lisa": 3, "cwac": 4})
    capsys.readouterr()
    both = [str(tmp_path / "one"), str(tmp_path / "two")]
    assert orders.main(both) == 0
    said = capsys.readouterr().out
    assert "Spearman's correlation of the 3 methods: 0.50, 95 % interval over prompts [" in said
    assert "SmolLM2-135M, p = 0.1: 1 seed, 20 prompts" in said and "85.0" in said  # 9 + 8 of 20
    assert orders.main([*both, "--ratio", "0.3"]) == 2
    (tmp_path / "two" / VERDICTS).unlink()
    assert orders.main(both) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 2 and "two: cwac has no verdicts of one in verdicts.csv.gz" in errors
    assert "one: its harmful ratios are 0.1; give --ratio with one of them" in errors


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"tasks": ("toy", "other")}, "it has 2 tasks .other, toy."),
        ({"ratios": (0.1, 0.2)}, "its harmful ratios are 0.1, 0.2; give --ratio"),
        ({"ratios": (0.2,)}, "one campaign is at p = 0.1, the other at 0.2"),
    ],
)
def test_campaigns_that_are_not_of_one_kind_are_refused(more, said, tmp_path, capsys):
    campaign(tmp_path / "one", "tiny", {"sft": 9, "lisa": 5, "cwac": 2})
    campaign(tmp_path / "two", "smollm2", {"sft": 8, "lisa": 3, "cwac": 4}, **more)
    with pytest.raises(UserError, match=said):
        orders.of_campaigns([tmp_path / "one", tmp_path / "two"])
