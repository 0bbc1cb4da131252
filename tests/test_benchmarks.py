"""The instrument of `make bench`: same batches, a planted cost is found, a failure ends it, the report is complete;
and every other benchmark in miniature."""

import importlib
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as everything
from benchmarks import (
    allocator,
    constraint,
    engines,
    evaluation,
    judge,
    large,
    memory,
    methods,
    phases,
    preparation,
    prepared,
    profile,
    run,
    runner,
    sae,
    scaling,
    steps,
    sweep,
)
from cwac.core import config, paths
from cwac.core.errors import UserError
from experiments import cost
from tests.conftest import SMALL
from tests.helpers.options import METHODS
from tests.helpers.stubs import STUBS


class Clock:
    """Stands in for a clock: each look at it takes a tick, and work takes what it says, on a busy machine too."""

    def __init__(self, tick: float = 0.01):
        self.now, self.tick = 0.0, tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


class Numbers:
    """Stands in for a tokenizer: any text is 5,000 tokens, and a token's text is its number."""

    def __call__(self, text: str, **_) -> dict:
        return {"input_ids": list(range(5000))}

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    for name in ("thread_time", "monotonic"):
        monkeypatch.setattr(time, name, clock)
    return clock


@pytest.fixture
def pair(random_model, tmp_path):
    """SafeInstr's trainer and SFT's beside it, 12 steps on the random model."""
    cfg = config.compose(
        [
            "method=safeinstr",
            "model.kind=folder",
            f"+model.path={random_model}",
            f"paths.runs={tmp_path / 'runs'}",
            "harmful_ratio=0.1",
            "train.max_steps=12",
            *SMALL,
        ]
    )
    return methods.trainers(cfg)


def test_every_method_is_found():
    assert methods.available() == METHODS and set(methods.BARS) <= set(METHODS)


def test_both_train_on_the_same_batches_and_a_planted_cost_is_found(pair, clock):
    fed = ([], [])
    for trainer, seen in zip(pair, fed, strict=True):
        given = trainer.compute_loss

        def compute_loss(model, inputs, *args, given=given, seen=seen, **kwargs):
            seen.append(inputs["input_ids"].clone())
            return given(model, inputs, *args, **kwargs)

        trainer.compute_loss = compute_loss

    def after_step(model):
        clock.now += 0.05

    pair[0].method.after_step = after_step
    measured = methods.ratios(pair)
    assert len(measured) == 12 - methods.WARM_UP and measured == pytest.approx(measured[0]) and measured[0] > 1.3
    assert len(fed[0]) == 12 and all(map(torch.equal, *fed))
    states = [t.model.state_dict() for t in pair]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])  # SafeInstr's steps are SFT's


def test_a_failure_of_one_ends_both(pair):
    def before_step(model):
        raise UserError("planted")

    pair[0].method.before_step = before_step
    with pytest.raises(UserError, match="planted"):
        methods.ratios(pair)


FIELDS = {"name", "rival", "ratio", "spread", "bar", "met"}


def busy(clock, seconds):
    def act():
        clock.now += seconds

    return act


def test_a_planted_ratio_is_found(clock):
    clock.tick = 0.0
    measured = runner.paired(busy(clock, 0.04), busy(clock, 0.01), 5)
    assert len(measured) == 5
    row = runner.entry("a", "b", measured, 3.0)
    assert [row["ratio"], *row["spread"]] == pytest.approx([4, 4, 4]) and row["met"] is False
    assert runner.entry("a", "b", measured, 5.0)["met"] is True and runner.entry("a", "b", 2.0)["spread"] == [2.0, 2.0]


def test_a_row_replaces_its_own_in_the_file_and_a_missed_bar_fails(tmp_path, capsys):
    out, row = tmp_path / "latest.json", runner.entry("a", "b", 2.0, 1.0)
    assert runner.report([runner.entry("a", "b", 0.5, 1.0)], []) == 0 and runner.report([row], []) == 1
    assert runner.report([], [runner.Skipped("c", "no library")]) == 0
    assert runner.report([], [runner.Skipped("c", "no model", barred=True)]) == 1
    assert "not measured: c (no model)" in capsys.readouterr().out
    runner.save([runner.entry("a", "other", 1.0), runner.entry("a", "b", 0.5, 1.0)], out)
    runner.save([row], out)
    assert json.loads(out.read_text()) == [runner.entry("a", "other", 1.0), row]


def test_the_constraint_and_the_subspace_in_miniature():
    rows = list(constraint.measure(128, 32, 8, repeats=2, d=128, tokens=200, layers=1, anchor_tokens=120))
    assert [row["bar"] for row in rows] == [0.2, 0.15, 0.1, None, 1.0] and all(set(row) == FIELDS for row in rows)
    assert rows[1]["ratio"] == pytest.approx((128 + 32) * 8 / 128**2, abs=1e-4) and rows[1]["met"]


def test_the_sae_in_miniature_and_rivals_that_learn(capsys):
    rows, skipped = runner.collect(sae.measure(16, 64, 4, batch=64, steps=4, repeats=2))
    named = {"sparsify"} - ({"sparsify"} if skipped else set()) | {"plain PyTorch"}
    assert {row["rival"] for row in rows} == named and len(rows) == 2 * len(named)
    draw = sae.mixture(16, 64, seed=0)
    makers = [sae.plain] if skipped else [sae.plain, sae.by_sparsify]
    for make in makers:
        step, reconstruct = make(16, 64, 4, draw(512))
        before = sae.unexplained(x := draw(512), reconstruct(x))
        for _ in range(30):
            step(draw(64))
        assert sae.unexplained(x, reconstruct(x)) < 0.9 * before


def test_the_parts_of_a_step_in_miniature():
    shape = "vocab_size: 61, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 4, num_attention_heads: 2"
    given = [f"model.shape={{model_type: llama, {shape}, num_key_value_heads: 2}}"]
    rows = list(steps.measure(steps=3, tokens=16, labels=8, repeats=2, overrides=given))
    assert all(set(row) == FIELDS for row in rows)
    ours, barred = [1.1, 1.1, None, 1.05, 1.05], [1.2, 1.2, None, None, None]
    assert [row["bar"] for row in rows] == [*ours, *barred, None, None, 0.5]
    assert rows[2]["ratio"] > 1  # its products are added to SFT's
    assert rows[3]["ratio"] > 1  # V, A and the SAE are memory that SFT does not hold
    assert rows[4]["ratio"] < rows[3]["ratio"]  # transformers' SFT holds more logits than ours
    assert "read after block 2 of 4" in rows[-1]["name"]


def test_generation_and_preparation_in_miniature(random_model):
    given = ["model.kind=folder", f"+model.path={random_model}"]
    rows = list(evaluation.measure(prompts=6, alone=2, tokens=4, repeats=3, length=64, overrides=given))
    assert [row["bar"] for row in rows] == [0.125, 0.0, 0.02] and rows[1]["ratio"] == 0
    with pytest.raises(UserError, match="--prompts 5: give 6"):
        next(evaluation.measure(prompts=5, alone=2, repeats=3))


def test_the_semantic_judge_in_miniature(monkeypatch):
    """Each answer takes 3 s on this clock, so that 1,000 take a hundred times the bar's 30."""
    clock = Clock(0)
    monkeypatch.setattr(time, "process_time", clock)
    read = []

    def judged(prompts, responses):
        read.extend(zip(prompts, responses, strict=True))
        clock.now += 3.0 * len(responses)

    encoder = SimpleNamespace(tokenizer=Numbers())
    monkeypatch.setattr(judge, "instantiate", lambda cfg: SimpleNamespace(encoder=encoder, judge=judged))
    short, long = judge.measure(answers=2, repeats=2)
    assert (short["ratio"], short["bar"], short["met"]) == (100, 1, False)
    assert (long["ratio"], long["bar"]) == (100, None)
    assert len({prompt for prompt, _ in read[:4]}) == 4
    assert [len(text.split()) for _, text in read] == [62] * 4 + [254] * 4  # and two marks at its ends
    with pytest.raises(UserError, match="--answers 200 --repeats 2"):
        next(judge.measure(answers=200, repeats=2))


def test_without_its_encoder_the_semantic_judge_is_not_measured(tmp_path):
    (row,) = judge.measure(overrides=["harmful=2", f"artifacts={tmp_path}"])
    assert "eval.judge.harmful=2" in row.reason and row.barred


def test_the_engines_in_miniature(random_model, monkeypatch):
    given = ["model.kind=folder", f"+model.path={random_model}"]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(STUBS), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.delenv("CWAC_VLLM_PYTHON", raising=False)
    speed, start, differing = engines.measure(prompts=3, tokens=4, repeats=2, overrides=given)
    assert speed["ratio"] > 0 and start["ratio"] > 0 and differing["ratio"] == 0
    assert {row["bar"] for row in (speed, start, differing)} == {None}
    monkeypatch.setenv("CWAC_VLLM_PYTHON", "/nowhere/python")
    (skipped,) = engines.measure(prompts=3, tokens=4, overrides=given)
    assert isinstance(skipped, runner.Skipped) and "/nowhere/python" in skipped.reason and not skipped.barred


def test_peak_memory_is_measured_beside_sft_on_the_same_row(monkeypatch):
    seen = []

    def alone(cfg, row, steps, training=cost.train):
        seen.append((cfg.method.name, cfg.method.get("k"), bool(cfg.model.lora), row.tokens, row.labels, steps))
        sft = 4e9 if training is cost.train else 5e9
        return sft if cfg.method.name == "sft" and not cfg.model.lora else 1e9

    monkeypatch.setattr(memory, "alone", alone)
    rows = list(memory.measure(2, 32, 8, ["model=tiny", "task=toy_sentiment"]))
    assert seen[:3] == [*[("sft", None, False, 32, 8, 2)] * 2, ("nullspace", 64, False, 32, 8, 2)] and len(rows) == 12
    assert [r["ratio"] for r in rows] == [0.25, 0.2] * 6
    assert [r["bar"] for r in rows[::2]] == [r["bar"] for r in rows[1::2]] == [0.5, 0.85, 0.85, None, None, None]
    assert "sft, measured" in rows[0]["rival"] and "transformers' Trainer" in rows[1]["rival"]
    assert ("sft", None, True, 32, 8, 2) in seen and "tiny, 1 x 32 tokens" in rows[0]["name"]


def test_memory_by_transformers_own_trainer_is_that_of_a_real_training():
    cfg = config.compose(["model=tiny", "task=toy_sentiment", "method=sft"])
    row = cost.Row(16, 8, steps.PROMPTS)
    assert memory.by_trainer(cfg, cost.shape(cfg), row, 1)["memory"] > 1


def test_a_preparation_is_measured_beside_the_passes_of_its_anchors(monkeypatch):
    took = iter([(2.0, None), (10.0, None), (8.0, None), (20.0, None)])
    done = []

    def timed(act):
        act()
        done.append(act)
        return next(took)

    monkeypatch.setattr(preparation, "timed", timed)
    rows = list(preparation.measure(6, 3, ["model=tiny", "task=toy_sentiment"]))
    assert len(done) == 4 and [row["ratio"] for row in rows] == [5.0, 0.25, 0.05, 2.5, 0.5, 0.2]
    assert [row["bar"] for row in rows] == [None, 1.0, None] * 2 and "6 anchors" in rows[3]["name"]


def test_what_a_second_method_builds_is_counted(monkeypatch):
    left = iter([["sae/a", "subspace/b"], [], ["subspace/c"]])  # of cwac, weight_only, activation_only

    def build(method, folder, steps):
        for name in next(left):
            Path(folder, "artifacts", name).mkdir(parents=True)
        return 8.0 if method == "cwac" else 2.0

    monkeypatch.setattr(prepared, "run", build)
    rows = [(row["name"].split()[1], row["ratio"], row["met"]) for row in prepared.measure()]
    assert rows == [("weight_only", 0, True), ("of", 0.25, None), ("activation_only", 1, False), ("of", 0.25, None)]


def test_a_finished_sweep_in_miniature():
    (row,) = sweep.measure(cells=2)
    assert set(row) == FIELDS and row["ratio"] > 0


def test_the_table_at_7b_in_miniature(tmp_path, capsys):
    out = tmp_path / "large.json"
    assert large.main(["--shape", "tiny", "--cpu", "--out", str(out)]) in (0, 1)
    assert "not measured" not in capsys.readouterr().out
    rows = json.loads(out.read_text())
    assert all(FIELDS | {"card", "torch", "peak_gib"} <= set(row) for row in rows)
    assert all(row["card"] == "CPU" and row["peak_gib"] > 0 for row in rows)
    stepped = [row for row in rows if row["name"].startswith("step of cwac")]
    assert [row["bar"] for row in stepped] == [1.1, 1.1, 1.2, 1.2]
    assert all(row["seconds"] > row["rival_seconds"] / 2 and row["tokens_per_s"] > 0 for row in stepped)
    assert ["2 of 4 blocks" in row["name"] for row in stepped] == [False, False, True, True]
    left = [row["ratio"] for row in rows if row["name"].startswith("drift left")]
    assert len(left) == 8 and max(left) < 5  # thousandths of the drift
    assert {row["bar"] for row in rows if row["rival"] in ("60 s", "1 h")} == {None, 1.0}


def test_sft_and_cwac_take_turns_on_one_model(tmp_path):
    """Half of the steps are projected: then W V is V's pinned value; and they alone have a penalty."""
    shape = large.TINY
    model = large.llama(shape, torch.device("cpu"), torch.float32)
    defence = large.CWAC("cwac", None, large.Activation(sae=shape.sae))
    with torch.no_grad():
        defence.estimate_memory(model, large.Sizes(prompt_tokens=shape.prompt_tokens))
    defence.weight = large.Weight()
    large.constrain_(defence, model, 0.5)
    method = large.InTurns("in_turns", defence, [True, False, True])
    trainer = large.build_trainer(shape, torch.device("cpu"), model, method, 3, str(tmp_path))
    trainer.args.learning_rate, drifts = 1e-2, []

    def on_step_end():
        _, layer, V, A = defence._constraint.entries[0]
        drifts.append((layer.weight.detach() @ V - A).norm().item())

    watch = large.Watch(lambda step: on_step_end() if step else None)
    trainer.add_callback(watch)
    trainer.train()
    assert len(watch.seconds) == len(watch.peaks) == 3 and len(trainer.penalties) == 2
    assert drifts[0] < 1e-4 < 1e-3 < drifts[1]
    on_step_end()
    assert drifts[2] < 1e-4


def test_a_part_that_fails_stops_no_other_and_what_is_measured_is_kept(tmp_path, monkeypatch, capsys):
    def broken(shape, where, budget):
        yield runner.entry("a", "b", 1.0)
        raise torch.OutOfMemoryError("no room\nfor more")

    def never(shape, where, budget):
        yield runner.entry("e", "f", 1.0)

    def sound(shape, where, budget):
        yield runner.entry("c", "d", 1.0)

    monkeypatch.setattr(large, "PARTS", {"broken": (broken, 0), "never": (never, 1e9), "sound": (sound, 0)})
    out = tmp_path / "large.json"
    given = ["--shape", "tiny", "--cpu", "--out", str(out), "--parts", "broken,never,sound"]
    assert large.main(given) == 1
    assert [row["name"] for row in json.loads(out.read_text())] == ["a", "c"]
    shown = capsys.readouterr()
    assert "broken failed: OutOfMemoryError: no room\n" in shown.err
    assert "not measured: never (" in shown.out


def test_without_a_gpu_it_refuses_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(is_available=lambda: False))
    assert large.main([]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: no CUDA device here") and shown.count("\n") == 1
    for wrong in (["--cpu"], ["--parts", "nosuch"]):
        with pytest.raises(SystemExit, match="2"):
            large.main(wrong)


def test_a_decomposition_that_would_take_too_long_is_extrapolated(clock):
    clock.tick = 0.0
    seconds, how = large.at_full_size(lambda n, d: n, lambda n: busy(clock, 0.01 * n)(), 16, 16, allowed=0.1)
    assert how == " (extrapolated from 2 x 2)" and seconds == pytest.approx(0.02 * 8**3)
    assert large.at_full_size(lambda n, d: n, lambda n: None, 16, 16, allowed=1)[1] == ""


def test_a_split_is_exact_and_its_head_fits_tf32():
    x = torch.randn(100)
    head, tail = large.split(x)
    assert torch.equal(head + tail, x) and (tail.abs() <= x.abs() * 2**-10).all()
    assert not (head.view(torch.int32) & 0x1FFF).any()


def test_a_planted_power_law_is_found():
    exponent, half, last = scaling.fit([1, 2, 4, 8], [3.0, 6.0, 12.0, 24.0])
    assert (exponent, half, last) == pytest.approx((1, 0, 1), abs=1e-9)
    exponent, half, last = scaling.fit([1, 10, 100], [1.1, 2.0, 11.0])  # 1 + x / 10: no power law
    assert exponent < last < 1 and half > 1


@pytest.mark.slow  # a Trainer a point
def test_scaling_in_miniature_and_its_page(tmp_path, monkeypatch, capsys):
    def cell(cells, seconds):
        yield runner.entry("a cell", "1 s", 0.5)

    monkeypatch.setattr(scaling.sweep, "measure", cell)
    monkeypatch.setattr(scaling, "LLAMA7", scaling.Target(64, 172, 32, 4, 4, 97))
    monkeypatch.setattr(scaling, "LLAMA70", scaling.Target(128, 448, 80, 4, 1, 97, ranks=(16, 224)))
    kept = ("full, AdamW", "LoRA on 4 bits, DDP")
    monkeypatch.setattr(scaling, "OPTIONS", {name: scaling.OPTIONS[name] for name in kept})
    out, page = tmp_path / "scaling.json", tmp_path / "page.md"
    assert scaling.main(["--shape", "tiny", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())
    assert all(FIELDS | {"card", "torch", "date", "commit"} <= set(row) for row in rows)
    points = [row for row in rows if "x" in row]
    assert {(p["kind"], p["series"]) for p in points if p["kind"].startswith("step")} == {
        *((kind, "parameters") for kind in scaling.STEPS.values()),
        ("step of cwac", "prompts"),
    }
    inside = {(p["kind"], p["x"]): p["seconds"] for p in points}
    assert all(inside[scaling.SAFETY, n] < inside["step of cwac", n] for n in (1, 4))
    slopes = [row for row in rows if "points" in row]
    assert len(slopes) == 6 and all(row["points"] == 3 and row["series"] == "parameters" for row in slopes)
    names = ("measured", "h100", "llama70")
    page.write_text(
        "before\n" + "".join(f"<!-- scaling:{n} -->\nreplaced\n<!-- /scaling:{n} -->\n" for n in names) + "after\n"
    )
    given = ["--out", str(out), "--page", str(page), "--estimate"]
    assert scaling.main(given) == 0
    first = page.read_text()
    assert "replaced" not in first and first.startswith("before\n") and first.endswith("after\n")
    assert "| step of sft " in first and "one thread" in first and "NVIDIA H100" in first
    assert "| full, AdamW " in capsys.readouterr().out
    assert scaling.main(given) == 0 and page.read_text() == first


def test_a_series_stops_where_its_time_is_up(monkeypatch, clock):
    clock.tick = 0.0
    plan = scaling.Plan(repeats=1, series={"rank": ({"rank": 1}, {"rank": 2})}, cells=())

    def slow(point, series, repeats):
        clock.now += 0.1
        yield "step", point.rank, torch.ones(1).numpy()

    monkeypatch.setattr(scaling, "step_points", slow)
    point, skipped = scaling.measure(plan, large.Budget(0.3))
    assert point["x"] == 1 and skipped.name == "rank beyond 1"


@pytest.mark.slow  # fake tensors of 70 billion parameters
def test_the_memory_of_a_large_model_is_its_own_estimate_in_shards():
    target = scaling.Target(64, 172, 24, 4, 1, 97, ranks=(16,))
    parts, flops = scaling.counted(target, "method=cwac", "train.optim=adamw_torch_fused")
    cfg = config.compose(
        ["model=llama2", "task=gsm8k", "method=cwac", "train.optim=adamw_torch_fused", target.override(24)]
    )
    whole = cost.estimate(
        cfg, cost.shape(cfg), cost.Row(512, 128, scaling.Sizes(prompt_tokens=32, rank_share=16 / 172))
    )
    assert flops == pytest.approx(whole.flops, rel=1e-6)
    assert all(parts[name] == pytest.approx(whole.parts[name], rel=0.01) for name in parts)
    found = scaling.memory(target, "full, AdamW", 16, parts)
    assert found["weights"] * 1e9 == pytest.approx(4 * target.parameters / 8, rel=1e-3)
    assert (found["V"] + 8 * found["A"]) * 1e9 == pytest.approx(whole.parts["V and A of the constraint"], rel=1e-6)
    assert scaling.LLAMA7.parameters == 6_738_415_616 and scaling.LLAMA70.parameters == 68_976_648_192


def test_a_profile_in_miniature(capsys):
    shape = "vocab_size: 61, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 4, num_attention_heads: 2"
    given = [f"model.shape={{model_type: llama, {shape}, num_key_value_heads: 2}}"]
    assert profile.main(["--tokens", "16", "--labels", "8", "--top", "3", *given]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = {tuple(c.strip() for c in line.split("|")[1:3]): line.split("|")[3:5] for line in lines[2:]}
    sft, cwac = ({part: float(cells[part, "all"][i]) for part in profile.PARTS} for i in (0, 1))
    assert sft["L_safety"] == sft["projection"] == 0 < min(cwac["L_safety"], cwac["projection"])
    assert min(sft["forward"], sft["backward"], sft["optimizer"]) > 0
    assert all(sum(parts.values()) == pytest.approx(100, abs=1) for parts in (sft, cwac))
    assert len(cells) == len(profile.PARTS) + 3


def test_the_parts_of_a_run_are_all_of_it(random_model, tmp_path):
    given = ["model=tiny", "task=toy_sentiment", "model.kind=folder", f"+model.path={random_model}"]
    more = [
        "train.max_steps=2",
        "eval.at=[0]",
        "eval.drift=false",
        f"paths.artifacts={tmp_path / 'artifacts'}",
        *SMALL,
    ]
    found = run.once(paths.PACKAGE.parent, [*given, *more])
    whole, _ = found.pop("whole")
    assert set(found) == {"start", *phases.PARTS} and all(cpu > 0 for cpu, _ in found.values())
    assert 0.5 * whole < sum(cpu for cpu, _ in found.values()) <= whole


def test_two_trees_take_turns_and_a_failed_run_says_why(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text("raise SystemExit('no such run')")
    with pytest.raises(UserError, match="no such run"):
        run.once(tmp_path, [])
    ran = []

    def once(tree, overrides):
        ran.append((tree, "train.max_steps=1" in overrides))
        return dict.fromkeys(("start", *phases.PARTS), [1.0, 2.0]) | {
            "whole": [20.0 if tree == tmp_path else 9.0, 0.0]
        }

    monkeypatch.setattr(run, "once", once)
    rows = list(run.measure(repeats=2, beside=str(tmp_path), overrides=["method=cwac"]))
    ours = paths.PACKAGE.parent
    assert ran == [(ours, True), (tmp_path, True), (ours, False), (tmp_path, False), (tmp_path, False), (ours, False)]
    whole, *parts, beside = rows
    assert (whole["ratio"], whole["met"], beside["ratio"], beside["met"]) == (9 / 80, True, 0.45, True)
    assert len(parts) == 1 + len(phases.PARTS) and all(row["ratio"] == 1 / 80 for row in parts)
    assert "method=cwac" in whole["name"] and "sft" not in whole["name"] and tmp_path.name in beside["rival"]
    with pytest.raises(UserError, match=r"has no train\.py"):
        list(run.measure(beside=str(tmp_path / "nothing")))


def test_kept_memory_is_measured_in_turns_each_in_a_process_of_its_own(monkeypatch):
    ran = []

    def alone(cfg, row, steps, kept):
        ran.append((cfg.method.name, kept))
        return (8.0, 1010.0) if kept else (10.0, 1000.0)

    monkeypatch.setattr(allocator, "alone", alone)
    rows = list(allocator.measure(repeats=2))
    assert ran[:4] == [("sft", False), ("sft", True), ("sft", True), ("sft", False)] and len(ran) == 8
    assert [(row["ratio"], row["met"]) for row in rows[:2]] == [(0.8, True), (1.01, None)]
    monkeypatch.setattr(allocator, "alone", lambda cfg, row, steps, kept: None if kept else (10.0, 1000.0))
    (skipped,) = allocator.measure(repeats=1)
    assert isinstance(skipped, runner.Skipped) and "no glibc" in skipped.reason


@pytest.mark.parametrize("part", everything.PARTS)
def test_each_has_a_command(part, capsys):
    with pytest.raises(SystemExit, match="0"):
        runner.main(importlib.import_module(f"benchmarks.{part}").measure, ["--help"])
    assert "--out" in capsys.readouterr().out


def test_all_of_them_in_one_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(everything, "PARTS", {"sweep": {"cells": 1}, "constraint": {}})
    out = tmp_path / "latest.json"
    assert everything.main(["sweep", "--out", str(out)]) in (0, 1)
    assert len(json.loads(out.read_text())) == 1 and "| a cell of a finished sweep of 1 " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        everything.main(["nosuch"])


def test_the_report_names_rival_spread_and_bar(random_model, tmp_path, capsys):
    out = tmp_path / "latest.json"
    given = ["model.kind=folder", f"+model.path={random_model}", *SMALL]
    assert runner.main(
        methods.measure, ["--methods", "sft,safeinstr", "--steps", "10", "--out", str(out), *given]
    ) in (0, 1)
    sft, safeinstr = json.loads(out.read_text())
    assert set(sft) == set(safeinstr) == FIELDS
    assert (sft["bar"], sft["met"], safeinstr["bar"]) == (None, None, 1.05)
    assert safeinstr["met"] == (safeinstr["ratio"] <= 1.05)
    assert all(row["spread"][0] <= row["ratio"] <= row["spread"][1] for row in (sft, safeinstr))
    table = capsys.readouterr().out
    assert "| step of sft " in table and "| step of safeinstr " in table
    other = tmp_path / "other.json"
    assert runner.main(methods.measure, ["--methods", "salora", "--steps", "10", "--out", str(other), *given]) == 0
    assert "not measured: step of salora (" in capsys.readouterr().out and json.loads(other.read_text()) == []
    assert runner.main(methods.measure, ["--methods", "nosuch", "--out", str(out)]) == 2
    assert runner.main(methods.measure, ["--steps", "5", "--out", str(out)]) == 2
