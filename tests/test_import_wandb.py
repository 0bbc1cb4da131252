"""Runs logged to wandb come back as the rows the run folder would have had."""

import contextlib
import json
import math
import time
from types import SimpleNamespace

import pytest
import wandb
from omegaconf import OmegaConf

from analysis import import_wandb
from analysis.collect import at_end, collect
from cwac.core.config import compose
from cwac.core.errors import UserError
from cwac.core.identity import eval_id, run_id
from cwac.core.jsonl import read_jsonl
from cwac.core.run_dir import Run
from cwac.core.tracking import Tracker

FINAL = [
    {"metric": "HS", "set": "toy_harmful", "value": 31.5, "final": True, "n": 160, "stderr": 3.7},
    {"metric": "FA", "set": "toy_sentiment", "value": 90.0, "final": True},
    {"metric": "memory", "set": "train", "value": 512.0, "final": True},
    {"metric": "HS", "set": "toy_harmful", "value": 1.0, "final": False},
]


@pytest.fixture
def logged(tmp_path, monkeypatch):
    """One run that wandb saw offline through our own tracker; returns its configuration."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    cfg = compose(["logger=wandb", "method=cwac", "harmful_ratio=0.1", f"paths.runs={tmp_path / 'original'}"])
    run = Run(cfg)
    run.dir.mkdir(parents=True)
    with Tracker(cfg, run) as tracker:
        for step in (10, 20):
            tracker.log({"step": step, "epoch": step / 10, "loss": 1 / step, "penalty": None})
        tracker.summary(FINAL)
    wandb.teardown()  # its service may still be writing the file when `finish` has returned
    return cfg


def test_an_offline_run_comes_back(logged, tmp_path, capsys):
    runs = tmp_path / "runs"
    arguments = ["--offline", str(tmp_path / "original"), "--runs", str(runs)]
    assert import_wandb.main(arguments) == 0
    assert "1 of 1 runs" in capsys.readouterr().out
    found = collect(runs)
    assert found.runs == [run_id(logged)]
    end = at_end(found.rows).set_index("metric")
    assert dict(end["value"]) == {"HS": 31.5, "FA": 90.0, "memory": 512.0}
    assert (end.loc["HS", "judge"], end.loc["FA", "judge"], end.loc["HS", "eval"]) == ("keyword", "", eval_id(logged))
    assert set(end["method"]) == {"cwac"} and set(end["step"]) == {20} and set(end["epoch"]) == {2.0}
    assert end["learning_rate"].iloc[0] == logged.train.learning_rate
    losses = [json.loads(line) for line in (runs / run_id(logged) / "train_log.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in losses] == [0.1, 0.05]
    # a second import finds it there and changes nothing
    assert import_wandb.main(arguments) == 0
    assert "already in" in capsys.readouterr().out


def test_the_pieces_of_a_run_that_was_killed_and_resumed_are_joined(tmp_path, monkeypatch, capsys):
    """Twenty lines of a loss log, the last eight of them after the resume; two steps were made twice."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    cfg = compose(["logger=wandb", "method=sft", f"paths.runs={tmp_path / 'original'}"])
    run = Run(cfg)
    run.dir.mkdir(parents=True)
    for first, last, loss in ((1, 14, 1.0), (13, 20, 2.0)):
        with contextlib.suppress(KeyboardInterrupt), Tracker(cfg, run) as tracker:
            for step in range(first, last + 1):
                tracker.log({"step": step, "epoch": step / 20, "loss": loss, "penalty": None})
            if last < 20:
                raise KeyboardInterrupt
            tracker.summary(FINAL)
        wandb.teardown()
        time.sleep(1.1)  # wandb names a folder by the second
    runs = tmp_path / "runs"
    assert import_wandb.main(["--offline", str(tmp_path / "original"), "--runs", str(runs)]) == 0
    assert "1 of 1 runs" in capsys.readouterr().out
    losses = read_jsonl(runs / run.id / "train_log.jsonl")
    assert [row["step"] for row in losses] == list(range(1, 21))
    assert [row["loss"] for row in losses] == [1.0] * 12 + [2.0] * 8
    found = at_end(collect(runs).rows).set_index("metric")
    assert (found.loc["HS", "value"], found.loc["HS", "n"], found.loc["HS", "stderr"]) == (31.5, 160, 3.7)
    assert math.isnan(found.loc["memory", "n"]) and not {"n", "stderr"} & set(found.index)


def fake(name: str, state: str = "finished", **config):
    cfg = OmegaConf.to_container(compose(["method=sft"]), resolve=True)
    summary = {"HS/advbench": 12.5, "_timestamp": 5.0, "train/step": 7, "train/epoch": 1.0, "note/x": "text"}
    return SimpleNamespace(
        id=name, config={**cfg, **config}, summary=summary, state=state, scan_history=lambda: [{"train/loss": 2.0}]
    )


def test_the_server_is_read_through_its_client_and_unfinished_runs_are_named(tmp_path):
    """Also: an id that would leave the folder is refused."""
    names = [fake("a"), fake("b", "crashed"), fake("../c")]
    api = SimpleNamespace(runs=lambda project: {"me/cwac": names}[project])
    written, skipped = import_wandb.write(import_wandb.read_server(api, "me/cwac"), tmp_path / "runs")
    assert written == ["a"] and len(skipped) == 2 and "b: wandb does not say" in skipped[0]
    assert not (tmp_path / "c").exists()
    assert collect(tmp_path / "runs").rows["value"].tolist() == [12.5]


def test_a_run_that_is_not_ours_is_named(tmp_path):
    api = SimpleNamespace(runs=lambda project: [fake("a", model="resnet")])
    with pytest.raises(UserError, match="wandb run a is not one of"):
        import_wandb.write(import_wandb.read_server(api, "p"), tmp_path)


def test_records_across_blocks_and_a_cut_end():
    """A payload longer than a block comes in pieces; what a crash cut off is not read."""
    import struct

    payload = bytes(range(256)) * 300  # 76,800 bytes: three pieces
    room = [import_wandb.BLOCK - 2 * import_wandb.HEADER, import_wandb.BLOCK - import_wandb.HEADER]
    cuts = [payload[: room[0]], payload[room[0] : sum(room)], payload[sum(room) :]]
    data = b":W&B\0\0\0" + b"".join(
        struct.pack("<IHB", 0, len(c), k) + c for c, k in zip(cuts, (2, 3, 4), strict=True)
    )
    whole = data + struct.pack("<IHB", 0, 5, 1) + b"hello"
    assert list(import_wandb.log_records(whole)) == [payload, b"hello"]
    assert list(import_wandb.log_records(whole[:-1])) == [payload]


def test_a_folder_without_runs_is_one_clear_error(tmp_path, capsys):
    assert import_wandb.main(["--offline", str(tmp_path), "--runs", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert "holds no run of wandb's" in error and error.count("\n") == 1
    (tmp_path / "run-x.wandb").write_bytes(b"something else")
    assert import_wandb.main(["--offline", str(tmp_path)]) == 2
    assert "is not a file of wandb's" in capsys.readouterr().err
