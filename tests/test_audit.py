"""The audit of the paper's numbers: what it finds in them, and that it finds what is planted."""

from decimal import Decimal

import pytest
from omegaconf import OmegaConf

from analysis import audit, paper
from cwac.core import config
from cwac.core.errors import UserError


@pytest.fixture
def printed(tmp_path):
    """A function that changes cells of a copy: `{(artifact, model, method, task, p, metric): text}` -> its path."""
    lines = paper.RESULTS.read_text().splitlines()

    def changed(cells: dict[tuple, str]):
        for key, text in cells.items():
            start = ",".join(key) + ","
            hits = [i for i, line in enumerate(lines) if line.startswith(start)]
            assert len(hits) == 1, key
            lines[hits[0]] = start + text
        path = tmp_path / "printed.csv"
        path.write_text("\n".join(lines) + "\n")
        return path

    return changed


WEIGHT_ONLY = ("table5", "llama2", "Weight-only", "sst2", "0.0", "HS")


def of_kind(kind: str, path=paper.RESULTS) -> list[audit.Finding]:
    return [f for f in audit.findings(path) if f.kind == kind]


def test_exactly_24_averages_do_not_follow():
    found = of_kind("average")
    by_table = {t: sum(f.where.startswith(t) for f in found) for t in ("Table 1", "Table 3", "Table 4", "Table 5")}
    assert by_table == {"Table 1": 0, "Table 3": 14, "Table 4": 6, "Table 5": 4} and len(found) == 24
    worst = next(f for f in found if "weight-only" in f.where)
    assert worst.cells["average"] == "17.82" and "14.49" in worst.message


def test_the_claims_its_tables_contradict_are_named_with_their_cells():
    messages = [f"{f.where}: {f.message}" for f in of_kind("claim")]
    for where, lower, ours in (
        ("Table 5, Mistral-7B, average", "weight-only 19.25", "23.82"),
        ("Table 5, Llama-2-7B, SST-2", "weight-only 12.05", "15.76"),
        ("Table 1, Mistral-7B, AG News", "SPPFT 18.20", "21.39"),
        ("Table 1, Gemma-2-9B, AG News", "SPPFT 13.17", "14.22"),
        ("Table 2, Gemma-2-9B, PubMedQA", "SafeInstr 9.54", "12.55"),
    ):
        assert sum(where in m and lower in m and ours in m for m in messages) == 1, where
    assert sum("C.1.1" in m for m in messages) == 4
    assert [f.where.split(", ")[1] for f in of_kind("size")] == [
        "JailbreakBench",
        "HarmBench",
        "AdvBench",
        "BeaverTails",
    ]


def test_changing_one_cell_changes_the_report(printed, tmp_path):
    """With 10 more, weight-only's average follows, and CWAC is the lowest there."""
    before, after = (audit.counts(audit.findings(p)) for p in (paper.RESULTS, printed({WEIGHT_ONLY: "22.05"})))
    assert (before["average"], after["average"]) == (24, 23)
    assert after["claim"] == before["claim"] - 1
    broken = printed({("table1", "llama2", "SFT", "sst2", "0.0", "FA"): "94.68"})
    assert audit.main(["--csv", str(broken), "--out", str(tmp_path / "AUDIT.md")]) == 0
    text = (tmp_path / "AUDIT.md").read_text()
    assert "Table 1, Llama-2-7B, SFT, FA: printed 85.04" in text and "Table 1 1 of 56" in text


@pytest.mark.parametrize(("average", "follows"), [("85.03", True), ("85.02", False), ("85.05", False)])
def test_the_tolerance_is_what_rounding_allows(printed, average, follows):
    """Cells 94.58, 89.72 and 70.81 have the mean 85.0367: 0.01 away counts as rounding, more does not."""
    path = printed({("table1", "llama2", "SFT", "average", "0.0", "FA"): average})
    mean = (Decimal("94.58") + Decimal("89.72") + Decimal("70.81")) / 3
    assert (abs(Decimal(average) - mean) <= audit.TOLERANCE) == follows
    assert len(of_kind("average", path)) == 24 + (not follows)


def test_a_cell_equal_to_cwacs_is_no_contradiction(printed):
    before = len(of_kind("claim"))
    assert len(of_kind("claim", printed({WEIGHT_ONLY: "15.76"}))) == before - 1


def test_the_committed_report_is_current():
    statements = audit.load_statements()
    assert audit.REPORT.read_text() == audit.report(audit.findings(), statements, paper.printed())


def test_every_choice_names_a_key_that_exists():
    for entry in audit.load_statements()["open"]:
        for method, key in entry["keys"].items():
            cfg = config.compose([f"method={method}"])
            parent, _, leaf = key.rpartition(".")
            node = OmegaConf.select(cfg, parent) if parent else cfg
            assert leaf in node, (method, key)


def test_bad_input_is_one_clear_error(printed, tmp_path, capsys):
    with pytest.raises(UserError, match="'n/a' is not a number"):
        audit.averages(paper.printed(printed({WEIGHT_ONLY: "12.05"})).assign(text="n/a"))
    assert audit.main(["--csv", str(tmp_path / "none.csv"), "--out", str(tmp_path / "x.md")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
