"""A run never passes for another one: what its name, its record and a table say is what it was made of."""

import subprocess
import sys
from types import SimpleNamespace

import pandas as pd
import pytest

from analysis.collect import COLUMNS, collect, read_exported
from cwac.core import environment
from cwac.core.config import compose, expand
from cwac.core.identity import eval_id, run_id
from tests.conftest import ROOT
from tests.test_analysis import cell_of, row, write_run

# --- names that look like numbers ----------------------------------------------------------------------
NUMERALS = ("537439", "000123", "94e947", "9e9999", "123e-5", "1_000", "inf", "nan", "null", "NA", "0x1f", "True")


def test_a_frozen_campaign_gives_back_every_id_as_it_was(tmp_path):
    """All digits, digits around one `e`, and other words that a csv reader takes for something else."""
    written = []
    for number, name in enumerate(NUMERALS):
        cell = cell_of("sft", 0.1, number)
        rows = [row(cell, "HS", 50.0, set="harmful", judge="keyword", eval=name)]
        rows += [row(cell, "FA", 90.0, set=name, eval=name), row(cell, "memory", 1.0, set="train", eval=None)]
        written += rows
        write_run(tmp_path / "runs", cell, rows)
    first = collect(tmp_path / "runs").rows
    first.to_csv(tmp_path / "results.csv", index=False)
    again = read_exported(tmp_path).rows
    pd.testing.assert_frame_equal(again, first)
    assert sorted(again["eval"]) == sorted(r["eval"] or "" for r in written) and again["value"].dtype == float
    assert set(again.loc[again["metric"] == "FA", "set"]) == {*NUMERALS}


def test_the_campaign_whose_evaluation_is_all_digits_is_read_whole():
    rows = read_exported(ROOT / "results" / "earlier" / "smollm2_large").rows
    assert set(rows["eval"]) == {"541274", ""} and list(rows.columns) == COLUMNS


def test_evaluation_ids_of_digits_do_occur():
    small = ["eval.drift=false", "eval.n_harmful=8", "eval.n_benign=8", "task.n_test=8", "eval.max_new_tokens=65"]
    assert eval_id(compose(["model=tiny", *small])) == "537439"


# --- sums that are not exact ---------------------------------------------------------------------------
def test_a_range_of_ratios_names_the_cells_that_a_list_names():
    ranged = expand(None, ["method=sft", "harmful_ratio=range(0.1,0.41,0.1)"])
    listed = expand(None, ["method=sft", "harmful_ratio=0.1,0.2,0.3,0.4"])
    assert [c.harmful_ratio for c in ranged] == [0.1, 0.2, 0.3, 0.4]
    assert [run_id(c) for c in ranged] == [run_id(c) for c in listed]


def test_sums_in_lists_and_in_settings_of_a_method_are_rounded_too():
    cfg = compose(["method=cwac", f"method.activation.lam={0.1 + 0.2!r}", f"eval.at=[0,{0.1 + 0.2!r}]"])
    assert cfg.method.activation.lam == 0.3 and list(cfg.eval.at) == [0, 0.3]
    assert compose(["train.learning_rate=1.23456789e-05"]).train.learning_rate == 1.23456789e-05


def test_rows_that_were_recorded_at_an_inexact_ratio_are_of_its_cell(tmp_path):
    for seed, ratio in enumerate((0.3, 0.1 + 0.2)):
        cell = cell_of("sft", ratio, seed)
        write_run(tmp_path, cell, [row(cell, "FA", 50.0)])
    assert set(collect(tmp_path).rows["harmful_ratio"]) == {0.3}


# --- which code made it --------------------------------------------------------------------------------
@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A committed project with one module, seen as the one that runs."""
    root = tmp_path / "project"
    (root / "cwac" / "core").mkdir(parents=True)
    (root / "cwac" / "core" / "environment.py").write_text("x = 1\n")
    (root / ".gitignore").write_text("runs/\nlocal.py\n")
    made = ["git", "-c", "user.name=t", "-c", "user.email=t@t"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*made, *command], cwd=root, check=True)
    monkeypatch.setattr(environment, "PACKAGE", root / "cwac")
    environment.git.cache_clear()
    yield root
    environment.git.cache_clear()


def test_code_that_git_does_not_track_yet_is_uncommitted(checkout):
    (checkout / "notes.txt").write_text("no code")
    (checkout / "runs").mkdir()
    (checkout / "runs" / "config.yaml").write_text("of a run: ignored")
    assert environment.commit() and not environment.uncommitted()
    for new in ("cwac/methods/mine.py", "conf/method/mine.yaml"):
        path = checkout / new
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x: 1\n")
        environment.git.cache_clear()
        assert environment.uncommitted(), new
        path.unlink()
    environment.git.cache_clear()
    (checkout / "cwac" / "core" / "environment.py").write_text("x = 2\n")
    assert environment.uncommitted()


@pytest.mark.parametrize("place", ["local.py", "../elsewhere.py"])
def test_a_method_under_no_commit_is_uncommitted(checkout, monkeypatch, place):
    """One that git ignores, and one outside the repository: neither is in `git status`."""
    (checkout / place).write_text("x = 1\n")
    tracked = str(checkout / "cwac" / "core" / "environment.py")
    for file, expected in ((str(checkout / place), True), (tracked, False)):
        monkeypatch.setitem(sys.modules, "mine_to_test", SimpleNamespace(__file__=file))
        assert environment.uncommitted(["mine_to_test.Method"]) is expected


def test_the_commit_is_the_projects_and_not_that_of_the_folder_one_stands_in(checkout, tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    subprocess.run(["git", "init", "-q"], cwd=other, check=True)
    monkeypatch.chdir(other)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True).stdout.strip()
    assert environment.commit() == head
    monkeypatch.setattr(environment, "PACKAGE", tmp_path / "site-packages" / "cwac")  # installed from a wheel
    environment.git.cache_clear()
    assert environment.commit() is None and environment.uncommitted() is False
