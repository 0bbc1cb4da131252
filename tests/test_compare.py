"""Two campaigns with planted differences: what is flagged, and what is not for want of seeds."""

import math

import pytest
from scipy import stats as scipy_stats

from analysis import compare
from analysis.collect import collect
from tests.helpers.results import cell_of, pick, rows_of, write_run


def campaign(folder, values: dict[str, dict[int, float]]):
    """Runs at p = 0.1: method -> seed -> HS."""
    for method, seeds in values.items():
        for seed, hs in seeds.items():
            cell = cell_of(method, 0.1, seed)
            write_run(folder, cell, rows_of(cell, hs))
    return collect(folder)


def test_planted_differences_and_flags(tmp_path):
    first = campaign(
        tmp_path / "a",
        {
            "sft": {0: 50.0, 1: 60.0, 2: 70.0},
            "cwac": {0: 10.0, 1: 10.0, 2: 10.0},
            "lisa": {0: 5.0, 1: 6.0},
            "bea": {0: 30.0},
            "asft": {0: 1.0},
        },
    )
    second = campaign(
        tmp_path / "b",
        {
            "sft": {0: 55.0, 1: 64.0, 2: 76.0},  # +5, +4, +6 by pairs, hidden between seeds
            "cwac": {0: 10.0, 1: 10.0, 2: 10.0},
            "lisa": {3: 25.0, 4: 27.0},  # no seed in common
            "bea": {0: 80.0},  # one seed
            "sppft": {0: 1.0},
        },
    )
    found = compare.compare(first, second)
    found = found[found["metric"] == "HS"]
    sft = pick(found, method="sft")
    low, high = scipy_stats.t.interval(0.95, 2, 5.0, scipy_stats.sem([5, 4, 6]))
    assert (sft["difference"], sft["low"], sft["high"]) == pytest.approx((5.0, low, high))
    assert (sft["over"], sft["flag"]) == ("pairs", "differs")
    assert pick(found, method="cwac")["flag"] == "equal"
    lisa = pick(found, method="lisa")
    assert (lisa["over"], lisa["flag"]) == ("seeds", "differs") and lisa["low"] < 20.5 < lisa["high"]
    bea = pick(found, method="bea")
    assert bea["difference"] == 50.0 and math.isnan(bea["low"]) and bea["flag"] == ""
    assert pick(found, method="asft")["flag"] == "only in first"
    assert pick(found, method="sppft")["flag"] == "only in second"


def test_seeds_that_all_agree_on_a_difference_have_no_interval_to_print(tmp_path):
    first = campaign(tmp_path / "a", {"sft": {0: 10.0, 1: 10.0}})
    second = campaign(tmp_path / "b", {"sft": {0: 12.0, 1: 12.0}})
    row = pick(compare.compare(first, second), metric="HS")
    assert row["flag"] == "differs" and compare.show_difference(row) == "+2.0 (each seed)"
    assert compare.welch([1.0, 1.0], [3.0, 3.0]) == (2.0, 2.0, 2.0)


def test_the_command_prints_and_writes_what_it_found(tmp_path, capsys):
    campaign(tmp_path / "a", {"sft": {0: 50.0, 1: 60.0}})
    campaign(tmp_path / "b", {"sft": {0: 55.0, 1: 65.0}, "cwac": {0: 3.0}})
    out = tmp_path / "out" / "compare.md"
    assert compare.main([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == out.read_text().strip()
    (line,) = [line for line in printed.splitlines() if "SFT" in line and "HS" in line]
    assert "55.0 (n=2)" in line and "60.0 (n=2)" in line and "+5.0 (each seed)" in line and "differs" in line
    assert "missing" in next(line for line in printed.splitlines() if "CWAC" in line)
    assert out.with_suffix(".csv").read_text().count("sft") > 4
    assert compare.main([str(tmp_path / "a"), str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
