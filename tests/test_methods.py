"""Every method, found through Hydra: it trains, it resumes bit for bit, and it leaves frozen what it freezes."""

import json
import math

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from cwac.core import errors
from cwac.core.jsonl import read_jsonl
from cwac.core.run_dir import Run
from cwac.training import engine
from tests.helpers.options import METHODS
from tests.helpers.training import aligned_folder, cell, leak, stop_at, trained_weights
from train import run_cell


@pytest.fixture(scope="module")
def straight(tmp_path_factory, artifacts):
    """method -> its finished run; each is trained once for all tests."""
    folder, done = tmp_path_factory.mktemp("straight"), {}

    def get(method: str) -> Run:
        if method not in done:
            cfg = cell(method, folder, artifacts)
            run_cell(cfg)
            done[method] = Run(cfg)
        return done[method]

    return get


@pytest.mark.parametrize("method", METHODS)
def test_trains_and_measures(method, straight):
    run = straight(method)
    log = read_jsonl(run.dir / "train_log.jsonl")
    assert [r["step"] for r in log] == [1, 2, 3, 4, 5, 6] and all(math.isfinite(r["loss"]) for r in log)
    final = {(r["metric"], r["set"]): r["value"] for r in run.rows() if r["final"]}
    for metric in ("FA", "FA_lenient", "off_format"):
        assert 0 <= final[metric, "toy_sentiment"] <= 100
    assert final["HS", "toy_harmful"] + final["refusal", "toy_harmful"] + final[
        "other", "toy_harmful"
    ] == pytest.approx(100)
    assert {
        ("OR", "toy_benign"),
        ("weight_leak", "anchors"),
        ("weight_leak", "heldout"),
        ("activation_drift", "anchors"),
    } <= set(final)
    assert {
        ("seconds_per_step", "train"),
        ("memory", "train"),
        ("task_loss", "toy_sentiment"),
        ("poison_loss", "poison"),
    } <= set(final)
    assert not any("None" in str(r["value"]) for r in run.rows())
    data = json.loads((run.dir / "data.json").read_text())
    assert len(data["harmful"]) == int(0.2 * 32)


@pytest.mark.parametrize("method", METHODS)
def test_resumes_bit_for_bit(method, straight, tmp_path, artifacts, monkeypatch):
    cfg = cell(method, tmp_path, artifacts)
    with monkeypatch.context() as patch:
        patch.setattr(engine.MethodCallback, "on_step_end", stop_at(5))
        with pytest.raises(RuntimeError, match="planted stop"):
            run_cell(cfg)
    assert (Run(cfg).dir / "checkpoint-4" / engine.COMPLETE).is_file()
    run_cell(cfg)
    assert Run(cfg).status["weights_sha256"] == straight(method).status["weights_sha256"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", METHODS)
def test_two_steps_on_a_gpu_with_a_stop_between(method, tmp_path, artifacts, monkeypatch):
    """Set up, a checkpoint, a resume from it, evaluation and drift, all on the GPU."""
    cfg = cell(method, tmp_path, artifacts, "train.max_steps=2", "train.save_steps=1")
    devices = []
    with monkeypatch.context() as patch:
        patch.setattr(engine.MethodCallback, "on_step_end", stop_at(2))
        with pytest.raises(RuntimeError, match="planted stop"):
            run_cell(cfg)
    assert (Run(cfg).dir / "checkpoint-1" / engine.COMPLETE).is_file()
    gathered = engine.MethodTrainer.gathered

    def record(trainer):
        devices.extend(p.device.type for p in trainer.model.parameters())
        return gathered(trainer)

    monkeypatch.setattr(engine.MethodTrainer, "gathered", record)
    run_cell(cfg)
    assert set(devices) == {"cuda"}
    run = Run(cfg)
    assert [r["step"] for r in read_jsonl(run.dir / "train_log.jsonl")] == [1, 2]
    assert all(math.isfinite(r["value"]) for r in run.rows() if r["value"] is not None)
    assert run.status["status"] == "done" and run.status["guard"] is not False


def test_a_checkpoint_cut_short_is_not_resumed_from(straight, tmp_path, artifacts, monkeypatch):
    cfg = cell("sft", tmp_path, artifacts)
    with monkeypatch.context() as patch:
        patch.setattr(engine.MethodCallback, "on_step_end", stop_at(5))
        with pytest.raises(RuntimeError):
            run_cell(cfg)
    folder = Run(cfg).dir
    with (folder / "checkpoint-4" / "optimizer.pt").open("r+b") as file:
        file.truncate(100)
    assert engine.newest_checkpoint(folder).name == "checkpoint-2"
    run_cell(cfg)
    assert Run(cfg).status["weights_sha256"] == straight("sft").status["weights_sha256"]


TRAIN_ALIKE = {"bea_no_trigger": "bea"}
"""Methods that differ in how they are served only."""


def test_methods_end_at_different_weights(straight):
    hashes = {m: straight(m).status["weights_sha256"] for m in METHODS}
    for method, twin in TRAIN_ALIKE.items():
        assert hashes.pop(method) == hashes[twin]
    assert len(set(hashes.values())) == len(hashes)


def test_the_certificate_orders_the_methods(straight):
    """Six steps are few, but what is projected leaks an order of magnitude less than what is not."""
    assert leak(straight("weight_only")) < 0.2 * leak(straight("sft"))
    assert leak(straight("weight_only_closed"), "weight_leak_all") < 0.2 * leak(
        straight("weight_only"), "weight_leak_all"
    )


def test_closed_methods_train_linear_layers_only(straight):
    before = load_file(aligned_folder(straight("sft")) / "model.safetensors")
    after = trained_weights(straight("weight_only_closed"))
    for name, weight in after.items():
        linear = name.endswith("_proj.weight")
        assert torch.equal(weight, before[name]) != linear, name
    for name, weight in trained_weights(straight("sft")).items():
        assert not torch.equal(weight, before[name]), f"{name} has not changed under sft"


def test_a_constraint_with_all_energy_leaks_at_rounding_level(tmp_path, artifacts, monkeypatch):
    """The certificate through train.py: AdamW, weight decay, accumulation 8, in fp32, after a resume."""
    cfg = cell(
        "weight_only",
        tmp_path,
        artifacts,
        "method.weight.energy=1",
        "method.weight.n_anchors=4",
        "eval.n_drift=4",
        "train.weight_decay=0.1",
        "train.learning_rate=0.003",  # the floor is fp32's eps ||W|| / ||dW||, so the update must be a real one
        "train.per_device_train_batch_size=1",
        "train.gradient_accumulation_steps=8",
    )
    with monkeypatch.context() as patch:  # and through a stop and a resume
        patch.setattr(engine.MethodCallback, "on_step_end", stop_at(5))
        with pytest.raises(RuntimeError, match="planted stop"):
            run_cell(cfg)
    run_cell(cfg)
    assert leak(Run(cfg)) <= 1e-6 < leak(Run(cfg), "weight_leak_all")


def test_lora_trains_an_adapter_and_the_constraint_holds(tmp_path, artifacts):
    cfg = cell(
        "weight_only_closed",
        tmp_path,
        artifacts,
        "model.lora={r: 4, alpha: 8, target_modules: all-linear}",
        "train.learning_rate=0.01",
    )
    run_cell(cfg)
    assert leak(Run(cfg), "weight_leak_all") < 0.1
    change = next(r["value"] for r in Run(cfg).rows() if r["metric"] == "weight_change")
    assert change > 0


def test_the_kept_features_drift_is_measured(straight):
    rows = {(r["metric"], r["set"]): r["value"] for r in straight("activation_only").rows()}
    for where in ("anchors", "heldout"):
        assert rows["feature_drift", where] > 0 and rows["residual_drift", where] > 0


def test_a_finished_run_is_evaluated_again_from_its_kept_weights(straight, artifacts):
    run = straight("sft")
    again = OmegaConf.merge(run.cfg, {"eval": {"max_new_tokens": 5}})
    before = run.status
    run_cell(again)
    rows = {(r["metric"], r["eval"]): r["value"] for r in run.rows() if r["metric"] == "FA"}
    assert len(rows) == 2 and len(set(rows.values())) == 1  # other settings, the same weights
    assert run.status["evaluations"] == {run.eval: [], Run(again).eval: []}
    assert run.status["weights_sha256"] == before["weights_sha256"]
    with pytest.raises(errors.UserError, match="asks for points on the way"):
        run_cell(OmegaConf.merge(run.cfg, {"eval": {"at": [0.5]}}))
    assert run.trained()


def test_deepspeed_is_refused_where_steps_are_edited(llama, tmp_path):
    from types import SimpleNamespace

    from cwac.constraints.settings import Weight
    from cwac.methods.cwac import CWAC
    from cwac.training.engine import build_trainer

    with pytest.raises(errors.UserError, match="DeepSpeed.*use DDP or FSDP"):
        build_trainer(llama, CWAC("cwac", weight=Weight()), [], SimpleNamespace(deepspeed="x"), 0)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, artifacts):
    cfg = cell("sft", tmp_path, artifacts, "train.learning_rate=1e30", "train.max_grad_norm=0")
    with pytest.raises(errors.UserError, match="the loss became .*lower train.learning_rate"):
        run_cell(cfg)
    assert Run(cfg).status["status"] != "done"
