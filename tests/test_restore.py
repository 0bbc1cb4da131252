"""Exported campaigns come back as run folders that sweeps skip and analysis reads as it read the first ones."""

import json
import shutil
import subprocess
import sys

import pandas as pd
import pytest

from analysis import demo, records, restore
from analysis.collect import VERDICTS, collect, expected_cells, split
from cwac.core.config import expand
from cwac.core.run_dir import Run
from tests.conftest import ROOT

GRID = ["seed=0,1", "eval/judge=keyword"]  # the judge that the frozen campaign rests on


@pytest.fixture(scope="module")
def restored(tmp_path_factory):
    """The folder of runs that results/smollm2 gives."""
    runs = tmp_path_factory.mktemp("restored") / "runs"
    assert restore.main([str(ROOT / "results" / "smollm2"), "--runs", str(runs)]) == 0
    return runs


def test_it_is_exported_again_to_the_same_bytes(restored, tmp_path):
    """Rows, verdicts and records; the provenance says where the runs are from."""
    old, new = ROOT / "results" / "smollm2", tmp_path / "x"
    missing = json.loads((old / "provenance.json").read_text())["missing"]
    status = demo.main(["--experiment", "smollm2", "--runs", str(restored), "--out", str(new), *GRID])
    assert status == (1 if missing else 0)
    for name in ("results.csv", "summary.csv", VERDICTS, records.NAME):
        assert (new / name).read_bytes() == (old / name).read_bytes(), name
    was, now = (json.loads((folder / "provenance.json").read_text()) for folder in (old, new))
    assert {k: now[k] for k in ("runs", "runs_git", "left_out", "seeds")} == {
        k: was[k] for k in ("runs", "runs_git", "left_out", "seeds")
    }
    assert now["imported"] == dict.fromkeys(was["runs"], str(old))


def test_a_sweep_skips_what_came_back(restored):
    cells = list(expand("smollm2", [*GRID, f"paths.runs={restored}"]))
    done = {Run(cfg).id for cfg in cells if Run(cfg).done()}
    assert done == {p.name for p in restored.iterdir()} and len(done) == 20
    other = list(expand("smollm2", [*GRID, f"paths.runs={restored}", "eval.n_harmful=31"]))
    assert not any(Run(cfg).done() for cfg in other)  # its answers were never exported


def test_a_run_that_is_there_is_left_alone(tmp_path, capsys):
    source, runs = ROOT / "results" / "smollm2", tmp_path / "runs"
    first = pd.read_csv(source / "results.csv")["run_id"].iloc[0]
    (runs / first).mkdir(parents=True)
    (runs / first / "status.json").write_text('{"status": "running"}')
    written, there, _ = restore.restore(source, runs)
    assert there == [first] and first not in written and len(list(runs.iterdir())) == len(written) + 1
    assert [p.name for p in (runs / first).iterdir()] == ["status.json"]
    assert restore.main([str(source), "--runs", str(runs)]) == 0
    printed = capsys.readouterr().out
    assert "0 runs of" in printed and "goes on with it by eval/judge=keyword" in printed


def test_the_guard_speaks_again(tmp_path):
    """A run whose weights leak more than their constraint allows is named as before it was exported."""
    source = tmp_path / "exported"
    shutil.copytree(ROOT / "results" / "smollm2", source)
    frame = pd.read_csv(source / "results.csv")
    excess = frame["metric"] == "weight_leak_excess"
    run = frame.loc[excess, "run_id"].iloc[0]
    frame.loc[excess & (frame["run_id"] == run), "value"] = 0.25
    frame.to_csv(source / "results.csv", index=False)
    restore.restore(source, tmp_path / "runs")
    assert collect(tmp_path / "runs").leaking == [run]


def test_what_is_no_campaign_is_named(tmp_path, capsys):
    assert restore.main([str(tmp_path), "--runs", str(tmp_path / "runs")]) == 2
    assert "no readable results.csv" in capsys.readouterr().err and not (tmp_path / "runs").exists()
    frame = pd.read_csv(ROOT / "results" / "smollm2" / "results.csv")
    frame["run_id"] = "../outside"
    frame.to_csv(tmp_path / "results.csv", index=False)
    assert restore.main([str(tmp_path), "--runs", str(tmp_path / "runs")]) == 2
    assert "'../outside'" in capsys.readouterr().err and not (tmp_path / "outside").exists()


def test_the_cells_of_the_exported_grid_are_those_of_the_preset(restored):
    """Ids have not moved: what was exported counts for the preset of today."""
    ids = {cell.run_id for cell in expected_cells("smollm2", GRID)}
    assert {p.name for p in restored.iterdir()} <= ids


def test_the_command_answers_to_its_former_name(tmp_path):
    given = [str(ROOT / "results" / "smollm2"), "--runs", str(tmp_path / "runs")]
    done = subprocess.run([sys.executable, "-m", "analysis.thaw", *given], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "20 runs of" in done.stdout


def test_a_campaign_that_was_split_by_a_key_is_split_once(tmp_path):
    """What came back has the setting in its method's name; splitting by the same key again adds nothing."""
    frame = pd.read_csv(ROOT / "results" / "demo_tuned" / "results.csv", usecols=["run_id", "method"])
    named = dict(frame[frame["method"].str.startswith("sft")].itertuples(index=False))
    assert set(named.values()) == {"sft", "sft, rate 1e-05"}
    restore.restore(ROOT / "results" / "demo_tuned", tmp_path)
    for folder in set(tmp_path.iterdir()) - {tmp_path / name for name in named}:
        shutil.rmtree(folder)
    again = split(collect(tmp_path), tmp_path, ["train.learning_rate=1e-4"])
    assert dict(again.rows[["run_id", "method"]].itertuples(index=False)) == named
