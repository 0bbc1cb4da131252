"""fp32 masters under bf16 compute, gradient checkpointing, 8-bit optimizers and 4-bit bases."""

import contextlib
import importlib.util

import pytest
import torch
from hydra.utils import instantiate

from cwac.constraints.sae import target as target_module
from cwac.constraints.subspace import Basis, Constraint
from cwac.core import config, validation
from cwac.core.errors import UserError
from cwac.core.run_dir import Run
from cwac.models.layers import linears
from cwac.training.arguments import check_precision, training_arguments
from tests.conftest import FINE_TUNE, fine_tune, make_llama

LORA = "model.lora={r: 4, alpha: 8, target_modules: all-linear}"


def trained(method, folder, artifacts, *more):
    cfg = config.compose([f"method={method}", *FINE_TUNE, f"paths.artifacts={artifacts}", *more])
    return fine_tune(cfg, folder)


def start(model_cfg, artifacts):
    from pathlib import Path

    from cwac.models.loading import load

    return load(model_cfg, Path(artifacts), 0).model


def test_under_bf16_the_masters_stay_fp32_and_the_constraint_exact(tmp_path, artifacts):
    model, method, _ = trained("cwac", tmp_path, artifacts, "+train.bf16=true", "train.learning_rate=0.003")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    before = linears(start(config.compose([]).model, artifacts), ["down_proj"])
    for name, layer, V, A in method._constraint.entries:
        weight = layer.weight
        moved = weight - before[name].weight
        assert moved.norm() > 1e-3 * weight.norm()
        assert (moved @ V).norm() < 1e-4 * moved.norm()  # fp32's rounding of W; bf16's would be 0.1 and more
        assert torch.allclose(weight @ V, A, atol=1e-5)


def test_bf16_costs_the_activation_constraint_no_more_than_the_forwards_rounding(tmp_path, artifacts, monkeypatch):
    """Its features are computed in fp32: the unchanged model is charged for what its own bf16 forward rounds."""
    _, method, context = trained("activation_only", tmp_path, artifacts, "train.learning_rate=0")
    target, model = method._targets["anchors"], context.loaded.model
    with torch.autocast("cpu", torch.bfloat16):
        rounding = target.loss(model, range(len(target)))
    assert rounding.dtype == torch.float32
    assert rounding < 1e-2 * target.baseline_energy
    assert target.loss(model, range(len(target))) < 1e-8 * target.baseline_energy
    monkeypatch.setattr(target_module, "full_precision", lambda u: contextlib.nullcontext())
    with torch.autocast("cpu", torch.bfloat16):
        assert rounding < target.loss(model, range(len(target)))


@pytest.mark.parametrize("method", ["cwac", "ldifs", "circuit_breaker", "asft", "lisa"])
def test_gradient_checkpointing_changes_no_weight(method, tmp_path, artifacts):
    saving = ["+train.gradient_checkpointing=true", "+train.gradient_checkpointing_kwargs={use_reentrant: false}"]
    plain, *_ = trained(method, tmp_path / "plain", artifacts)
    checkpointed, *_ = trained(method, tmp_path / "saving", artifacts, *saving)
    assert checkpointed.is_gradient_checkpointing and not plain.is_gradient_checkpointing
    for (name, one), two in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert torch.allclose(one, two, atol=1e-6), name


def test_gradient_checkpointing_reaches_an_adapter_below_frozen_embeddings(tmp_path, artifacts):
    plain, *_ = trained("cwac_closed", tmp_path / "plain", artifacts, LORA)
    saving, *_ = trained("cwac_closed", tmp_path / "saving", artifacts, LORA, "+train.gradient_checkpointing=true")
    adapters = [(n, p) for n, p in plain.named_parameters() if "lora_B" in n]
    assert all(p.norm() > 0 for _, p in adapters)  # B starts at 0
    for (name, one), two in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert torch.allclose(one, two, atol=1e-6), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_matrix_without_masters_is_not_constrained(dtype):
    modules = linears(make_llama().to(dtype), ["down_proj"])
    bases = {name.replace("mlp.", ""): Basis(torch.eye(64, 3), 1.0, 9) for name in modules}
    with pytest.raises(UserError, match=rf"0\.mlp\.down_proj is stored in {str(dtype)[6:]}.*load the model in"):
        Constraint(modules, bases)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.dtype=bfloat16"], "model.dtype=bfloat16 .*float32 with train.bf16=true"),
        (["model.load_in_4bit=true"], r"model.load_in_4bit=true .*model\.lora="),
        (["+train.fp16=true"], "train.fp16=true .*before_step of method=cwac.*train.bf16=true"),
        (["+train.fp16=true", "method=lisa"], "train.fp16=true .*after_backward of method=lisa"),
        (["model.load_in_4bit=true", LORA, "method=salora"], "method=salora reads or edits the base's weights"),
        (["model.load_in_4bit=true", LORA, "method=vaccine"], "method=vaccine reads or edits"),
        (["model.load_in_4bit=true", LORA], "model.load_in_4bit=true needs bitsandbytes"),
        (["+train.optim=adamw_8bit"], r"train.optim=adamw_8bit needs bitsandbytes.*pip install -e '\.\[gpu\]'"),
        (["+train.optim=paged_adamw_8bit", "method=sft"], "train.optim=paged_adamw_8bit needs bitsandbytes"),
    ],
)
def test_what_would_go_wrong_is_refused_before_a_model_is_loaded(overrides, said, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    cfg = config.compose([*overrides, f"paths.runs={tmp_path}"])
    with pytest.raises(UserError, match=said) as caught:
        refused(cfg)
    assert "\n" not in str(caught.value)


def test_half_a_run_on_the_cpu_is_refused_where_a_gpu_is(tmp_path, monkeypatch):
    cfg = config.compose(["+train.use_cpu=true", f"paths.runs={tmp_path}"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(cfg)
    arguments = training_arguments(cfg, Run(cfg))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="train.use_cpu=true: .*CUDA_VISIBLE_DEVICES="):
        check_precision(cfg, arguments, None)


def refused(cfg):
    validation.validate(cfg)
    method = instantiate(cfg.method, _convert_="all")
    check_precision(cfg, training_arguments(cfg, Run(cfg)), method)


def test_a_bf16_base_may_carry_a_constrained_adapter(tmp_path, artifacts):
    """peft keeps adapters in fp32, so what is projected has masters."""
    cfg = [LORA, "model.dtype=bfloat16", "method.activation=null"]
    validation.validate(config.compose([*cfg]))
    model, method, _ = trained("cwac", tmp_path, artifacts, *cfg, "train.learning_rate=0.01")
    for _, layer, V, _ in method._constraint.entries:
        A = layer.weight
        assert A.dtype == torch.float32 and (A @ V).norm() < 1e-5 * A.norm()
    assert next(model.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit"])
def test_8_bit_adamw_trains_and_the_constraint_holds(optim, tmp_path, artifacts):
    pytest.importorskip("bitsandbytes")
    model, method, _ = trained(
        "weight_only", tmp_path, artifacts, f"+train.optim={optim}", "train.learning_rate=0.003"
    )
    before = linears(start(config.compose([]).model, artifacts), ["down_proj"])
    for name, layer, V, _ in method._constraint.entries:
        weight = layer.weight
        moved = weight - before[name].weight
        assert moved.norm() > 1e-3 * weight.norm() and (moved @ V).norm() < 1e-4 * moved.norm()


def test_qlora_trains_an_adapter_whose_input_side_is_projected(tmp_path, artifacts):
    pytest.importorskip("bitsandbytes")
    model, method, _ = trained(
        "cwac", tmp_path, artifacts, LORA, "model.load_in_4bit=true", "train.learning_rate=0.01"
    )
    layers = linears(model, ["down_proj"])
    assert len(method._constraint.entries) == len(layers) == 4
    for name, layer, V, _ in method._constraint.entries:
        A = layer.weight
        assert layers[name].base_layer.weight.dtype == torch.uint8
        assert layers[name].lora_B["default"].weight.norm() > 0  # it trains
        assert (A @ V).norm() < 1e-5 * A.norm()  # and reads no protected direction: dW = s B A
