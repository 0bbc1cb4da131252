"""Sweeps, skipping, failing, resuming: what is on disk after each."""

import json
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from cwac.core import config, identity, jsonl, run_dir
from cwac.core.cache import load_or_build
from tests.conftest import SMALL, call, run_train
from tests.forked import finish, start

FOLDER = [
    "model.kind=folder",
    "+model.path={model}",
    "paths.runs={runs}",
    "paths.artifacts={artifacts}",
    "eval.drift=false",
]


def overrides(model, tmp_path, *more):
    paths = {"model": model, "runs": tmp_path / "runs", "artifacts": tmp_path / "artifacts"}
    return [*(o.format(**paths) for o in FOLDER), *SMALL, *more]


def statuses(folder: Path) -> dict[str, dict]:
    return {p.parent.name: json.loads(p.read_text()) for p in folder.glob("*/status.json")}


def test_sweep_survives_crashing_cells_and_the_rerun_does_exactly_those(random_model, tmp_path):
    grid = overrides(
        random_model,
        tmp_path,
        "hydra.searchpath=[file://tests/conf]",
        "method=crash",
        "seed=" + ",".join(map(str, range(24))),
        "train.max_steps=3",
    )
    printed = tmp_path / "printed"
    code, output = finish("-m", *grid, log=printed, env={"CWAC_TEST_CRASH": "3,7,11"})
    assert code == 1, output
    assert "error: 3 cells failed" in output
    first = statuses(tmp_path / "runs")
    assert sum(s["status"] == "done" for s in first.values()) == 21
    assert sum(s["status"] == "failed" for s in first.values()) == 3
    assert all("planted crash" in s["error"] for s in first.values() if s["status"] == "failed")

    code, output = finish("-m", *grid, log=printed)
    assert code == 0 and output.count("is done; nothing to do") == 21
    second = statuses(tmp_path / "runs")
    assert len(second) == 24 and all(s["status"] == "done" for s in second.values())
    again = {name.split("-")[-2] for name in second if second[name] != first[name]}
    assert again == {"s3", "s7", "s11"}

    # in a process of its own, where a cell that is trained once more would crash
    code, output = run_train("-m", *grid, env={"CWAC_TEST_CRASH": ",".join(map(str, range(24)))})
    assert code == 0 and output.count("is done; nothing to do") == 24
    assert statuses(tmp_path / "runs") == second


def test_kill_and_the_same_command_again_gives_the_same_weights(random_model, tmp_path):
    command = overrides(
        random_model, tmp_path, "method=sft", "train.max_steps=60", "train.save_steps=10", "harmful_ratio=0.1"
    )
    printed = tmp_path / "printed"
    code, output = finish(*[o.replace("/runs", "/straight") for o in command], log=printed)
    assert code == 0, output
    (whole,) = statuses(tmp_path / "straight").values()

    process = start(*command, log=printed)
    while not list((tmp_path / "runs").glob("*/checkpoint-20/complete.json")):
        assert process.is_alive(), "the run ended before it could be killed"
        time.sleep(0.005)
    process.kill()
    process.join()
    (cut,) = statuses(tmp_path / "runs").values()
    assert cut["status"] == "running"

    code, output = finish(*command, log=printed)
    assert code == 0 and " goes on from step " in output, output
    (resumed,) = statuses(tmp_path / "runs").values()
    assert resumed["status"] == "done" and resumed["weights_sha256"] == whole["weights_sha256"]

    def rows(folder):
        timing = ("seconds_per_step", "memory")
        found = [r for p in folder.glob("*/metrics.jsonl") for r in jsonl.read_jsonl(p)]
        return [{k: v for k, v in r.items() if k != "time"} for r in found if r["metric"] not in timing]

    assert rows(tmp_path / "runs") == rows(tmp_path / "straight")
    logs = [jsonl.read_jsonl(p) for f in ("runs", "straight") for p in (tmp_path / f).glob("*/train_log.jsonl")]
    assert [r["step"] for r in logs[0]] == [r["step"] for r in logs[1]]
    assert not list((tmp_path / "runs").glob("*/checkpoint-*"))  # a finished run keeps none
    seen = [(r["set"], r["value"]) for r in rows(tmp_path / "runs") if r["metric"] == "extra_data"]
    assert seen == [("none", 0)]  # recorded, so that a table need not guess


def test_an_adapter_trains_without_a_warning_of_a_librarys(random_model, tmp_path):
    """peft 0.21 asks transformers 5.24 for a property that it renamed, and the user is told of it."""
    lora = "model.lora={r: 2, alpha: 4, target_modules: all-linear}"
    code, output = run_train(*overrides(random_model, tmp_path, "method=sft", "train.max_steps=2", lora))
    assert code == 0 and "Warning" not in output, output


def test_a_model_that_refuses_nothing_is_told_so_before_an_autoencoder_is_fitted(random_model, tmp_path, capfd):
    assert call(*overrides(random_model, tmp_path, "method=cwac", "harmful_ratio=0.1")) == 1
    assert "error: the aligned model refuses none of the anchor prompts" in capfd.readouterr().err
    assert {p.name for p in (tmp_path / "artifacts").iterdir() if p.is_dir()} == {"answers"}
    assert not list((tmp_path / "runs").glob("*/config.yaml"))  # no folder of a failed run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["method=cwacc"], "Could not find 'method/cwacc'"),
        (["harmful_ratio=1.5"], "harmful_ratio=1.5 is out of range"),
        (["harmful_ratio=lots"], "harmful_ratio=lots is not a number"),
        (["model=smollm2", "paths.data=/nonexistent", "task=sst2"], "paths.data=/nonexistent is not a folder"),
        (["train.learning_rate=abc"], "train.learning_rate=abc is not a number"),
        (["train.learning_rat=1"], "Could not override 'train.learning_rat'"),
        (["train.template=chatty"], "train.template=chatty is unknown; use one of chat, alpaca"),
        (["task=sst2"], "task=sst2 needs a pretrained model"),
        (["model=smollm2"], "task=toy_sentiment is written in the embedded world's words"),
    ],
)
def test_bad_usage_is_one_line_and_leaves_nothing(arguments, message, tmp_path):
    code, output = run_train(*arguments, f"paths.runs={tmp_path / 'runs'}")
    assert code == 2
    assert output.count("error: ") == 1 and message in output and "Traceback" not in output
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["method.weight.energy=2"], "method.weight.energy=2 is not valid; give a share in (0, 1]"),
        (["method.activation.gate=top"], "method.activation.gate=top is not valid"),
        (["+method.weight.enrgy=1"], "unexpected keyword argument 'enrgy'"),
        (["method.weight=null", "method.activation=null"], "neither weight nor activation"),
        (["train.max_steps=1", "harmful_ratio=0.9", "task.n_train=4000"], "harmful pairs, the pool has"),
        (["+train.foo=1", "method=sft", "train.max_steps=1"], "train.foo is not a TrainingArguments field"),
    ],
)
def test_values_a_method_or_the_data_refuses_are_one_line_too(
    arguments, message, tmp_path, random_model, artifacts, capfd
):
    given = [f"paths.runs={tmp_path / 'runs'}", f"paths.artifacts={artifacts}"]
    code = call(*given, "model.kind=folder", f"+model.path={random_model}", *arguments)
    output = "".join(capfd.readouterr())
    assert code in (1, 2)
    assert output.count("error: ") == 1 and message in output and "Traceback" not in output
    assert all(s["status"] != "done" for s in statuses(tmp_path / "runs").values())


# --- identity -------------------------------------------------------------------------------------------


def test_identity_is_by_content():
    plain = config.compose(["method=sft"])
    assert identity.run_id(plain) == identity.run_id(config.compose(["method=sft", "harmful_ratio=0"]))
    assert identity.run_id(plain) == identity.run_id(
        config.compose(["method=sft", "eval.batch_size=3", "paths.runs=x"])
    )
    for other in ("seed=1", "harmful_ratio=0.1", "train.learning_rate=1", "task=toy_topic", "mix_mode=additive"):
        assert identity.run_id(plain) != identity.run_id(config.compose(["method=sft", other])), other
    half = config.compose(["method=weight_only"])
    assert identity.run_id(half) != identity.run_id(config.compose(["method=weight_only", "method.weight.energy=0.5"]))


def test_neutral_values_orphan_no_run():
    cfg = config.compose(["method=sft"])
    before = identity.run_id(cfg)
    OmegaConf.set_struct(cfg, False)
    cfg.train.max_steps = None
    del cfg.train["max_steps"]
    assert identity.run_id(cfg) == before


def test_evaluations_have_a_hash_of_their_own():
    plain = config.compose(["method=sft"])
    assert identity.eval_id(plain) == identity.eval_id(config.compose(["method=sft", "eval.batch_size=3"]))
    assert identity.eval_id(plain) != identity.eval_id(config.compose(["method=sft", "eval.max_new_tokens=3"]))


def test_an_evaluation_at_more_points_covers_one_at_fewer(tmp_path):
    """After a campaign with points on the way, the plain command finds its runs done."""

    def run_at(points):
        return run_dir.Run(config.compose(["method=sft", f"paths.runs={tmp_path}", f"eval.at={points}"]))

    with run_at([0, 1]) as run:
        run.start()
        run.finish()
    assert run_at([]).done() and run_at([1]).done() and run_at([1, 0]).done()
    assert not run_at([0, 2]).done() and run_at([0, 2]).trained()


# --- rows and files --------------------------------------------------------------------------------------


def test_a_half_written_row_is_neither_read_nor_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    jsonl.append_jsonl(path, [{"a": 1}, {"a": 2}])
    with path.open("a") as file:
        file.write('{"a": 3')
    assert jsonl.read_jsonl(path) == [{"a": 1}, {"a": 2}]
    jsonl.repair(path)
    jsonl.append_jsonl(path, [{"a": 4}])
    assert jsonl.read_jsonl(path) == [{"a": 1}, {"a": 2}, {"a": 4}]


def test_a_row_is_never_written_twice(tmp_path):
    cfg = config.compose(["method=sft", f"paths.runs={tmp_path}"])
    with run_dir.Run(cfg) as run:
        run.start()
        row = {"step": 1, "epoch": 1.0, "final": True, "metric": "FA", "set": "x", "value": 1.0}
        run.add_rows([row, row])
        run.add_rows([row, {**row, "metric": "HS"}])
        assert [r["metric"] for r in run.rows()] == ["FA", "HS"]


def test_artifacts_are_built_once_and_again_when_damaged(tmp_path):
    built = []

    def build(folder):
        built.append(1)
        (folder / "x.txt").write_text("payload")

    folder = load_or_build(tmp_path, "kind", {"a": 1}, build)
    assert load_or_build(tmp_path, "kind", {"a": 1}, build) == folder and len(built) == 1
    assert load_or_build(tmp_path, "kind", {"a": 2}, build) != folder and len(built) == 2
    (folder / "x.txt").write_text("pay1oad")  # one character flipped
    load_or_build(tmp_path, "kind", {"a": 1}, build)
    assert len(built) == 3 and (folder / "x.txt").read_text() == "payload"
    assert (folder.with_suffix(".damaged") / "x.txt").read_text() == "pay1oad"


def test_a_failed_build_leaves_no_artifact(tmp_path):
    def build(folder):
        (folder / "half.txt").write_text("half")
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        load_or_build(tmp_path, "kind", {"a": 1}, build)
    assert [p.name for p in (tmp_path / "kind").iterdir() if p.is_dir()] == []
