"""What a command says while it works: the method it set up, what it builds and why, how far a sweep is."""

import contextlib
import io
import logging
import time
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from transformers import Trainer

from cwac.core import cache, failures
from cwac.data.tokenize import Collator
from cwac.methods.base import Method, summary
from cwac.training import engine, hook_times
from tests.conftest import make_llama, random_rows, sgd


def test_a_build_says_what_why_and_how_long_the_last_one_took(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="cwac.core.cache"):
        cache.load_or_build(tmp_path, "subspace", {"k": 1}, lambda folder: (folder / "a").write_text("x"))
        first = caplog.text
        assert "Protected directions V" in first and "none is there" in first and "the last one" not in first
        assert "built subspace" in first
        (tmp_path / "subspace" / cache.TOOK).write_text("754.2\n")
        folder = cache.load_or_build(tmp_path, "subspace", {"k": 2}, lambda folder: (folder / "a").write_text("x"))
        assert "the last one here took 13 min" in caplog.text
        caplog.clear()
        (folder / "a").write_text("y")
        cache.load_or_build(tmp_path, "subspace", {"k": 2}, lambda folder: (folder / "a").write_text("x"))
        assert "in place of the damaged one" in caplog.text


@pytest.mark.parametrize("seconds, text", [(0.4, "0 s"), (99, "99 s"), (754, "13 min"), (12600, "3.5 h")])
def test_durations_are_as_precise_as_a_wait_needs(seconds, text):
    assert cache.duration(seconds) == text


def test_a_sweep_counts_its_cells_and_estimates_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 10_000.0)
    monkeypatch.setenv(failures.FOLDER, str(tmp_path / "f"))
    monkeypatch.delenv(failures.CELLS, raising=False)
    assert failures.progress(50.0) == ""  # a single run
    monkeypatch.setenv(failures.CELLS, "5")
    monkeypatch.setenv(failures.BEGAN, "9400")
    assert failures.progress(0.2) == "1 of 5 cells, 0 failed; 10 min so far, none trained yet"
    failures.record({"num": 1, "cell": "seed=1", "message": "no", "code": 1})
    assert failures.progress(590.0) == "2 of 5 cells, 1 failed; 10 min so far, about 30 min left"
    for _ in range(2):
        failures.progress(100.0)
    assert failures.progress(100.0) == "5 of 5 cells, 1 failed; 10 min so far"
    assert [row["num"] for row in failures.collect()] == [1] and not (tmp_path / "f").exists()


def test_a_sweep_ends_with_the_command_of_its_page(tmp_path, monkeypatch, caplog):
    config = OmegaConf.create({"paths": {"runs": "runs/mine"}, "hydra": {"sweeper": {"_target_": "hydra.Basic"}}})
    monkeypatch.setenv(failures.FOLDER, str(tmp_path / "f"))
    monkeypatch.setenv(failures.CELLS, "2")

    def said():
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="cwac"):
            failures.OnSharedDisk().on_multirun_end(config)
        return caplog.text

    page = "python -m analysis.report --runs runs/mine --out results/local/report.html"
    assert page in said()
    failures.record(failure("seed=0", "no"))
    assert page in said()
    failures.record(failure("seed=1", "no"))
    assert said() == ""  # nothing came out


def failure(cell, message, code=1):
    return {"num": 0, "cell": cell, "message": message, "code": code}


def test_cells_that_fail_alike_are_told_once_by_what_tells_them_apart(monkeypatch):
    monkeypatch.setenv(failures.CELLS, "4")
    arguments = ["-m", "model=tiny", "method=sft,cwac", "seed=0,1", "+model.lora={r: 8, alpha: 16}"]
    fixed = "model=tiny method={} seed={} +model.lora={{r: 8, alpha: 16}}"
    grid = [(method, seed) for method in ("sft", "cwac") for seed in (0, 1)]
    alike = [failure(fixed.format(*cell), "there is no room") for cell in grid]
    assert failures.summary(alike, arguments) == [
        "4 cells failed (all of the sweep) for the same reason; the same command again runs only these:",
        "[method=sft,cwac seed=0,1] there is no room",
    ]
    other = failure(fixed.format("cwac", 1), "no such data")
    assert failures.summary([*alike[:3], other], arguments) == [
        "4 cells failed (all of the sweep); the same command again runs only these:",
        "[method=sft seed=0] [method=sft seed=1] [method=cwac seed=0] there is no room",
        "[method=cwac seed=1] no such data",
    ]
    assert failures.summary(alike[2:], arguments)[0].startswith("2 cells failed for the same reason; ")
    assert failures.summary(alike[:1], arguments) == ["there is no room [method=sft seed=0]"]
    assert failures.summary([], arguments) == []


def test_messages_that_differ_in_names_alone_are_one_reason(monkeypatch):
    monkeypatch.setenv(failures.CELLS, "9")
    arguments = ["-m", "method=sft,cwac", "train.learning_rate=1,2"]
    cells = [("sft", 1, "0a1b2c3d"), ("cwac", 2, "4e5f6a7b")]
    told = "method={0}: runs/tiny-toy-p0-{0}-s0-{2} did not fit at train.learning_rate={1}"
    failed = [failure("method={} train.learning_rate={}".format(*cell), told.format(*cell)) for cell in cells]
    head, reason = failures.summary(failed, arguments)
    assert head == "2 cells failed for the same reason; the same command again runs only these:"
    assert reason == (
        f"[method=sft train.learning_rate=1] [method=cwac train.learning_rate=2] {told.format(*cells[0])} (said of "
        "the first; the others' messages differ in their names and values alone)"
    )


def test_of_many_cells_the_first_are_named():
    cells = [{"seed": str(i), "method": "a" if i % 2 else "b"} for i in range(7)]
    assert failures.short_names(cells).endswith("[seed=3 method=a] and 3 more")
    assert failures.own_values("seed=0", ["seed=0"]) == {"seed": "0"}  # nothing tells it apart: it is named whole


def test_a_single_run_fails_in_its_message_alone(monkeypatch):
    monkeypatch.delenv(failures.CELLS, raising=False)
    assert failures.summary([failure("seed=3", "there is no room")], ["seed=3"]) == ["there is no room"]


def test_a_method_is_told_in_one_line():
    class Careful(Method):
        def held(self):
            return "holds 3 matrices"

        def penalty(self, model, step):
            return None

        def extra_data(self):
            return {"harmful_prompts": 12}

    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 1, bias=False))
    model[0].weight.requires_grad_(False)
    assert summary(Careful("careful"), model) == (
        "method=careful: holds 3 matrices; extra data: 12 harmful prompts; 25 % of the parameters train; at each step "
        "it may add a penalty; what that costs follows from the first steps"
    )
    assert "no work of its own at a step" in summary(Method("sft"), model)


class Clock:
    """Stands still but for what `spend` adds, so that a test knows what everything takes."""

    def __init__(self):
        self.seconds = 0.0

    def spend(self, seconds):
        self.seconds += seconds

    def spend_in_backward(self, x, seconds):
        """x; the backward pass through it takes so long."""
        clock = self

        class Slow(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, gradient):
                clock.spend(seconds)
                return gradient

        return Slow.apply(x)


class Dear(Method):
    """Every hook of a step takes its time, 250 s in a step of two micro-batches."""

    def batch(self, batch, step, part):
        self.clock.spend(10)
        return batch

    def penalty(self, model, step):
        self.clock.spend(30)
        return self.clock.spend_in_backward(model.lm_head.weight, 50).sum()

    def after_backward(self, model):
        self.clock.spend(40)

    def before_step(self, model):
        self.clock.spend(60)

    def after_step(self, model):
        self.clock.spend(50)


def trained(method, steps, folder, monkeypatch, own_trainer=False):
    """Train a small model, where a step without hooks takes 750 s, and 100,000 s more the first time."""
    method.clock = clock = Clock()
    monkeypatch.setattr(hook_times, "clock", lambda: clock.seconds)
    model, calls = make_llama(), []

    def slow(module, inputs, output):
        calls.append(1)
        clock.spend(125 if len(calls) > 1 else 100_125)
        return clock.spend_in_backward(output, 250)

    model.lm_head.register_forward_hook(slow)
    args = sgd(folder, per_device=1, accumulation=2)
    args.max_steps, args.learning_rate = steps, 1e-6
    rows = random_rows(2 * steps, seed=3)
    if own_trainer:
        engine.attach(Trainer(model, args, Collator(2), rows), method).train()
        return
    run, cfg = SimpleNamespace(id="dear", dir=folder), OmegaConf.create({"eval": {"at": []}})
    engine.train(cfg, args, run, model, method, rows, 2, lambda *point: None)


DEAR = (
    "method=dear: a step takes 1.33 times what it takes without the method's hooks, measured over {} (of a "
    "step's time: batch 2.0 %, penalty 8.0 %, after_backward 4.0 %, before_step 6.0 %, after_step 5.0 %)"
)


@pytest.mark.parametrize("steps, timed", [(2, "1 step"), (4, "3 steps"), (11, "10 steps"), (14, "10 steps")])
def test_what_the_hooks_take_of_a_step_is_measured(steps, timed, tmp_path, monkeypatch, caplog):
    with caplog.at_level(logging.INFO, logger="cwac.training.engine"):
        trained(Dear("dear"), steps, tmp_path, monkeypatch)
    said = [record.getMessage() for record in caplog.records if "times what" in record.getMessage()]
    assert said == [DEAR.format(timed)]


def test_in_somebodys_own_script_it_is_printed(tmp_path, monkeypatch, capsys):
    trained(Dear("dear"), 4, tmp_path, monkeypatch, own_trainer=True)
    assert DEAR.format("3 steps") in capsys.readouterr().err.splitlines()


def test_a_trainer_outlives_the_stream_it_was_made_under(tmp_path, monkeypatch, capsys):
    """As in a notebook, whose cells have an output of their own, the line goes to the stderr of the moment."""
    attach, cell = engine.attach, io.StringIO()

    def attached_in_a_cell(*given):
        with contextlib.redirect_stderr(cell):
            trainer = attach(*given)
        cell.close()
        return trainer

    monkeypatch.setattr(engine, "attach", attached_in_a_cell)
    trained(Dear("dear"), 4, tmp_path, monkeypatch, own_trainer=True)
    assert DEAR.format("3 steps") in capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("method, steps", [(Dear("dear"), 1), (Method("sft"), 12)])
def test_nothing_is_said_of_hooks_that_were_not_timed_or_are_none(method, steps, tmp_path, monkeypatch, caplog):
    with caplog.at_level(logging.INFO, logger="cwac.training.engine"):
        trained(method, steps, tmp_path, monkeypatch)
    assert "times what" not in caplog.text
