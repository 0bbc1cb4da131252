"""Null-space adapters: exact by construction, whatever trains them, and an ordinary peft adapter when saved."""

import copy
import json
import random
import warnings
from pathlib import Path

import peft
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from cwac.constraints.anchors import refused
from cwac.constraints.nullspace import (
    BASES,
    energy_held,
    fit_free,
    gradient_moments,
    leading_free,
    orthogonal_complement,
    second_moments,
)
from cwac.constraints.settings import Weight
from cwac.constraints.subspace import Basis, Moment, fit_subspace
from cwac.core import config
from cwac.core.errors import UsageError, UserError
from cwac.core.jsonl import read_jsonl
from cwac.core.run_dir import Run
from cwac.data.pools import load_pools
from cwac.data.tokenize import Collator
from cwac.evaluation.drift import merged_weight
from cwac.methods import nullspace
from cwac.methods.base import Sizes
from cwac.methods.nullspace import ANCHORS, NullSpace
from cwac.models import adapter
from cwac.models.adapter import ADAPTER, FixedInput, add_fixed_adapter
from cwac.models.layers import base_layer, input_group, linears
from cwac.models.loading import load
from cwac.training import arguments, engine
from cwac.training import run as steps
from cwac.training.library import defend
from tests.conftest import FINE_TUNE, fine_tune, make_llama, random_rows
from tests.test_library import own_rows, own_trainer, weights
from tests.test_methods import cell, leak, stop_at
from train import run_cell

TRAINED = ["train.learning_rate=0.01", "+train.optim=adamw_torch", "train.weight_decay=0.1"]


def orthonormal(d: int, r: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(d, r, generator=torch.Generator().manual_seed(seed)))[0]


def free_of(model, energy: float = 0.9, k: int | None = 5):
    bases = fit_subspace(model, random_rows(12), "all", energy=energy, progress=False)
    return bases, fit_free(bases, None, k, progress=False)


def adapted(model, k: int | None = 5, seed: int = 1):
    """`model` behind an adapter whose C is no longer zero."""
    _, free = free_of(model, k=k)
    wrapped = add_fixed_adapter(model, linears(model, "all"), free)
    torch.manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return wrapped, free


def plain_peft(model, wrapped):
    """The same adapter in peft's own layers."""
    settings = wrapped.peft_config[ADAPTER]
    keys = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules")
    plain = get_peft_model(model, LoraConfig(**{k: getattr(settings, k) for k in keys}, task_type="CAUSAL_LM"))
    plain.load_state_dict(wrapped.state_dict())
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    return plain


def fixed_layers(model) -> list[FixedInput]:
    return [m for m in model.modules() if isinstance(m, FixedInput)]


def batch(n: int = 3):
    return Collator(2)(random_rows(n, seed=4))


# --- which directions ---------------------------------------------------------------------------------
@pytest.mark.parametrize("d, r", [(24, 1), (24, 10), (24, 23), (300, 150)])
@pytest.mark.parametrize("planted", [False, True])
def test_free_directions_are_orthonormal_and_see_nothing_of_the_anchors(d, r, planted):
    V = orthonormal(d, r)
    X = torch.randn(5 * d, d)
    for k in (None, 1, 7):
        N = leading_free(V, X.T @ X if planted else None, k)
        m = d - r if k is None else min(k, d - r)
        assert N.shape == (d, m) and N.dtype == torch.float32
        assert (N.T @ N - torch.eye(m)).abs().max() < 1e-5
        assert (N.double().T @ V.double()).norm() < 1e-6


def test_rows_choose_the_directions_that_they_use_most():
    V = orthonormal(20, 6)
    inside = orthonormal(20, 20, 1)
    used = inside[:, :2] - V @ (V.T @ inside[:, :2])  # two directions of the null space
    draw = torch.Generator().manual_seed(0)  # rounding of X^T X decides how near N comes
    little, much = torch.randn(50, 2, generator=draw), torch.randn(50, 6, generator=draw)
    X = little @ used.T + 100 * much @ V.T  # much more of them where nothing is free
    N = leading_free(V, X.T @ X, 2)
    assert torch.linalg.matrix_norm(used - N @ (N.T @ used)) < 1e-3


def test_all_of_the_null_space_is_the_same_space_for_every_basis():
    V, X = orthonormal(16, 5), torch.randn(40, 16)
    projectors = [N @ N.T for N in (leading_free(V, None, None), leading_free(V, X.T @ X, None))]
    assert torch.allclose(*projectors, atol=1e-5)
    assert torch.allclose(projectors[0], torch.eye(16) - V @ V.T, atol=1e-5)


@pytest.mark.parametrize("n, k", [(25, 7), (200, 7), (5, 7), (200, 20), (200, None)])
def test_leading_directions_are_the_eigenvectors_within_the_whole_null_space(n, k):
    """Whether the rows are held as X, or as X^T X, and where they have fewer directions than are asked for."""
    d, r = 60, 20
    V, X = orthonormal(d, r), torch.randn(n, d) * torch.logspace(0, -2, d)
    moment = Moment(d)
    for part in X.split(3):
        moment.add(part)
    assert (moment.X is None) == (n > d)
    N = leading_free(V, moment, k).double()
    free = orthogonal_complement(V.double())
    inside = free @ torch.linalg.eigh(free.T @ X.double().T @ X.double() @ free)[1].flip(1)
    m, real = N.shape[1], min(n, N.shape[1])
    assert m == (d - r if k is None else k)
    assert torch.allclose(N.T @ N, torch.eye(m).double(), atol=1e-5) and (N.T @ V.double()).norm() < 1e-6
    assert torch.linalg.matrix_norm(inside[:, :real] - N @ (N.T @ inside[:, :real])) < 2e-3
    if k == 7:
        assert torch.allclose((inside[:, :real].T @ N).abs().diag(), torch.ones(real).double(), atol=1e-3)


def test_drawn_directions_are_those_of_a_turn_of_the_whole_null_space():
    V, k = orthonormal(60, 20), 7
    draw = torch.Generator().manual_seed(random.Random("0-a").getrandbits(62))
    turn = torch.linalg.qr(torch.randn(40, k, generator=draw))[0]
    assert torch.allclose(leading_free(V, None, k, "0-a"), orthogonal_complement(V) @ turn, atol=1e-5)


def test_random_directions_depend_on_the_seed_alone():
    V = orthonormal(16, 5)
    first, again, other = (leading_free(V, None, 3, seed) for seed in ("0-a", "0-a", "0-b"))
    assert torch.equal(first, again) and not torch.allclose(first, other)


def test_moments_of_gradients_are_those_of_autograd(llama):
    rows = random_rows(6, seed=3)
    llama.eval()
    expected: dict[str, torch.Tensor] = {}
    for part in (rows[:4], rows[4:]):
        llama.zero_grad()
        llama(**Collator(0)(part)).loss.backward()
        for name, module in linears(llama, "all").items():
            G = module.weight.grad
            expected[input_group(name)] = expected.get(input_group(name), 0) + G.T @ G
    llama.zero_grad()
    found = gradient_moments(llama, rows, linears(llama, "all"), batch_size=4)
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.allclose(found[name].C.float(), expected[name], rtol=1e-3, atol=1e-9)
    assert all(p.grad is None and p.requires_grad for p in llama.parameters())


def test_second_moments_leave_out_first_tokens(llama):
    rows = [{"input_ids": [0, 5, 6]}]
    seen = []
    module = linears(llama, ["q_proj"], [1])["1.self_attn.q_proj"]
    handle = module.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0][0, 1:]))
    C = second_moments(llama, rows, {"1.qkv": module})["1.qkv"].C
    handle.remove()
    assert torch.allclose(C.float(), seen[0].T @ seen[0], rtol=1e-4, atol=1e-6)


def test_energy_held_is_the_worst_inputs_share(llama):
    rows = random_rows(6, seed=8)
    readers = {input_group(n): m for n, m in linears(llama, "all").items()}
    bases = fit_subspace(llama, rows, "all", energy=0.9, progress=False)
    assert energy_held(llama, rows, bases, readers) == pytest.approx(min(b.energy for b in bases.values()), abs=0.02)
    assert energy_held(llama, random_rows(6, seed=9), bases, readers) < energy_held(llama, rows, bases, readers)


# --- the adapter -------------------------------------------------------------------------------------
@pytest.mark.parametrize("k", [5, None])
def test_every_scaling_is_one_and_only_c_trains(k):
    wrapped, free = adapted(make_llama(), k=k)
    layers = fixed_layers(wrapped)
    assert len(layers) == len(linears(wrapped, "all")) == 21
    assert {s for layer in layers for s in layer.scaling.values()} == {1.0}
    assert k is not None or len({layer.r[ADAPTER] for layer in layers}) > 1  # so the patterns were needed
    assert {n for n, p in wrapped.named_parameters() if p.requires_grad} == {
        n for n, _ in wrapped.named_parameters() if "lora_B" in n
    }
    for name, module in linears(wrapped, "all").items():
        assert torch.equal(module.lora_A[ADAPTER].weight, free[input_group(name)].T)


@pytest.mark.parametrize("dtype, autocast", [("float32", False), ("float32", True), ("bfloat16", False)])
def test_outputs_and_gradients_are_those_of_peft(dtype, autocast):
    base = make_llama().to(getattr(torch, dtype))
    twin = copy.deepcopy(base)
    wrapped, _ = adapted(base)
    plain = plain_peft(twin, wrapped)
    found = []
    for model in (wrapped, plain):
        model.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(**batch())
        output.loss.backward()
        found.append((output.logits, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    coarse = autocast or dtype == "bfloat16"
    assert torch.allclose(found[0][0], found[1][0], atol=5e-2 if coarse else 1e-5)
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        assert gradient.dtype == torch.float32 and gradient.norm() > 0
        assert (gradient - found[1][1][name]).norm() <= (5e-2 if coarse else 1e-5) * gradient.norm(), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    found = []
    for saving in (False, True):
        wrapped, _ = adapted(make_llama())
        wrapped.train()
        if saving:
            wrapped.gradient_checkpointing_enable({"use_reentrant": reentrant})
            wrapped.enable_input_require_grads()
        wrapped(**batch(), use_cache=False).loss.backward()
        found.append({n: p.grad for n, p in wrapped.named_parameters() if p.requires_grad})
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], atol=1e-6), name


def test_x_n_is_computed_once_an_input_and_then_forgotten(monkeypatch):
    wrapped, _ = adapted(make_llama())
    calls = []
    linear = adapter.F.linear
    monkeypatch.setattr(adapter.F, "linear", lambda *a: calls.append(a) or linear(*a))
    wrapped(**batch())
    projections = [A for _, A, *_ in calls if A.shape[0] == 5]
    assert len(projections) == 4 * 3  # q k v, o, gate up, down; of three blocks
    shared = {id(layer.shared_input): layer.shared_input for layer in fixed_layers(wrapped)}
    assert len(shared) == 12 and all(s._x is None and s._xN is None for s in shared.values())


def test_a_copy_shares_nothing_with_its_original():
    wrapped, _ = adapted(make_llama())
    layer = fixed_layers(wrapped)[0]
    layer.shared_input.project(torch.randn(2, 32), layer.lora_A[ADAPTER].weight)  # in the middle of a pass
    twin = copy.deepcopy(wrapped)
    theirs = fixed_layers(twin)
    assert theirs[0].shared_input is theirs[1].shared_input is not layer.shared_input
    assert theirs[0].shared_input._x is None
    assert theirs[0].lora_A[ADAPTER].weight is theirs[1].lora_A[ADAPTER].weight
    assert torch.equal(twin(**batch()).logits, wrapped(**batch()).logits)


def test_making_an_adapter_draws_nothing_from_the_generator():
    model = make_llama()
    _, free = free_of(model)
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    wrapped = add_fixed_adapter(model, linears(model, "all"), free)
    assert torch.equal(torch.randn(4), expected)
    assert all(not p.any() for n, p in wrapped.named_parameters() if "lora_B" in n)


def test_what_is_saved_is_an_ordinary_adapter(tmp_path):
    wrapped, free = adapted(make_llama(), k=None)
    wrapped.about = "# An adapter\n\nenergy 0.9"
    wrapped.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path)
    assert not fixed_layers(loaded)
    ids = batch()["input_ids"]
    with torch.no_grad():
        ours, theirs = wrapped(ids).logits, loaded(ids).logits
        merged = loaded.merge_and_unload()(ids).logits
        assert torch.equal(merged, wrapped.merge_and_unload()(ids).logits)
    assert torch.allclose(ours, theirs, atol=1e-6) and torch.allclose(ours, merged, atol=1e-4)
    card = (tmp_path / "README.md").read_text()
    assert "library_name: peft" in card
    text = card.split("---\n")[2].strip().splitlines()
    assert text[0] == "# An adapter" and "energy 0.9" in text and text[-1] == f"- PEFT {peft.__version__}"
    assert "More Information Needed" not in card
    wrapped.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == card, "saved again, the card is as it was"
    form = tmp_path / "theirs"  # a card that is there already is kept below
    form.mkdir()
    (form / "README.md").write_text("---\nlicense: mit\n---\nkept\n")
    wrapped.save_pretrained(form)
    there = (form / "README.md").read_text()
    assert "license: mit" in there and there.index("energy 0.9") < there.index("kept")
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["r"] == written["lora_alpha"] == max(N.shape[1] for N in free.values())
    assert written["rank_pattern"] == written["alpha_pattern"] != {}


def test_making_an_adapter_warns_of_nothing():
    model = make_llama()
    _, free = free_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        add_fixed_adapter(model, linears(model, "all"), free)


def test_loading_a_checkpoint_leaves_a_frozen(tmp_path):
    wrapped, _ = adapted(make_llama())
    wrapped.save_pretrained(tmp_path)
    wrapped.load_adapter(tmp_path, ADAPTER, is_trainable=True)  # as Trainer resumes
    wrapped.set_adapter(ADAPTER)
    assert all(p.requires_grad == ("lora_B" in n) for n, p in wrapped.named_parameters())


def test_inputs_without_a_free_direction_get_no_adapter():
    model = make_llama()
    _, free = free_of(model)
    del free["1.qkv"], free["2.down_proj"]
    wrapped = add_fixed_adapter(model, linears(model, "all"), free)
    missing = {n for n, m in linears(wrapped, "all").items() if not hasattr(m, "lora_A")}
    assert missing == {f"1.self_attn.{x}_proj" for x in "qkv"} | {"2.mlp.down_proj"}


# --- the method --------------------------------------------------------------------------------------
def change_along_anchors(model, method, reference) -> float:
    """The largest ||dW V|| / ||dW|| over the matrices, whose V are orthonormal."""
    then, protected, worst = linears(reference, "all"), method.protected(), 0.0
    now = linears(model, "all")
    assert protected.keys() == now.keys()
    for name, V in protected.items():
        dW = merged_weight(now[name]) - base_layer(then[name]).weight.double()
        assert dW.norm() > 1e-2 * base_layer(then[name]).weight.norm(), name  # it trained
        worst = max(worst, ((dW @ V.double()).norm() / dW.norm()).item())
    return worst


def trained(folder, artifacts, *more):
    cfg = config.compose(["method=nullspace", *FINE_TUNE, *TRAINED, f"paths.artifacts={artifacts}", *more])
    model, method, context = fine_tune(cfg, folder)
    return model, method, AutoModelForCausalLM.from_pretrained(context.loaded.source)


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["method.k=null"],
        ["train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=4"],
        ["+train.bf16=true"],
        ["+train.gradient_checkpointing=true"],
        ["method.basis=complement", "method.k=8"],
        ["method.basis=gradient", "method.energy=0.999"],
        ["method.basis=benign"],
    ],
    ids=lambda more: " ".join(more),
)
def test_nothing_changes_along_the_anchors_whatever_trains_it(more, tmp_path, artifacts):
    model, method, reference = trained(tmp_path, artifacts, *more)
    assert change_along_anchors(model, method, reference) <= 1e-6
    assert change_along_anchors(model.merge_and_unload(), method, reference) <= 1e-6


def test_a_bf16_base_needs_no_masters_and_stays_exact(tmp_path, artifacts):
    model, method, reference = trained(tmp_path, artifacts, "model.dtype=bfloat16")
    dtypes = {("lora_" in n, p.dtype) for n, p in model.named_parameters()}
    assert dtypes == {(False, torch.bfloat16), (True, torch.float32)}
    assert change_along_anchors(model, method, reference.bfloat16()) <= 1e-6


def test_the_whole_null_space_has_the_rank_that_v_leaves(tmp_path, artifacts):
    model, method, _ = trained(tmp_path, artifacts, "method.k=null")
    for name, V in method.protected().items():
        layer = linears(model, "all")[name]
        assert layer.r[ADAPTER] == V.shape[0] - V.shape[1]


def test_a_run_resumes_keeps_its_adapter_and_leaks_no_more_than_v_allows(tmp_path, artifacts, monkeypatch):
    given = ["train.learning_rate=0.01", "method.energy=1", "method.n_anchors=4", "eval.n_drift=4"]
    cfg = cell("nullspace", tmp_path / "a", artifacts, *given)
    with monkeypatch.context() as patch:
        patch.setattr(engine.MethodCallback, "on_step_end", stop_at(5))
        with pytest.raises(RuntimeError, match="planted stop"):
            run_cell(cfg)
    run_cell(cfg)
    run = Run(cfg)
    assert run.status["guard"] is True and leak(run, "weight_leak_all") <= 1e-6
    values = {r["metric"]: r["value"] for r in run.rows() if r["set"] == "train"}
    assert 1 <= values["free_rank"] <= 64 and values["energy_held_anchors"] == pytest.approx(100)
    card = (run.dir / "adapter" / "README.md").read_text()
    assert all(part in card for part in ("anchors: 4 prompts", "energy: 1", "k: 64", "basis: rows"))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(aligned(cfg)), run.dir / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(run.dir / "model")
    ids = torch.tensor([[1, 5, 6, 7]])
    assert torch.allclose(loaded(ids).logits, merged(ids).logits, atol=1e-4)
    assert [r["step"] for r in read_jsonl(run.dir / "train_log.jsonl")] == [1, 2, 3, 4, 5, 6]


def aligned(cfg) -> str:
    return load(cfg.model, Path(cfg.paths.artifacts)).source


def test_what_unseen_requests_keep_is_told_before_training(tmp_path, artifacts, caplog):
    with caplog.at_level("INFO", logger="cwac"):
        _, method, _ = trained(tmp_path, artifacts, "method.n_anchors=2", "method.energy=0.9")
    told = [r for r in caplog.records if "energy held in the worst matrix" in r.message]
    assert len(told) == 1 and "toy_validation" in told[0].message
    warned = [r for r in caplog.records if "unseen requests of toy_validation are held by" in r.message]
    shares = {name: value / 100 for name, value in method._report.items() if name.startswith("energy_held_")}
    less = shares["energy_held_anchors"] - shares["energy_held_toy_validation"]
    assert less > 0.05 and len(warned) == 1  # two anchors hold little of the others
    caplog.clear()
    method._tell({"anchors": 0.9, "near": 0.86, "far": 0.84})
    warned = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert len(warned) == 1 and "of far are held" in warned[0]


def test_at_the_rate_of_plain_fine_tuning_it_warns(tmp_path, artifacts, caplog):
    """In a sweep of methods at one rate, and in a script that leaves the rate as it is."""
    assert arguments.plain_rate("smollm2") == 2e-5 and arguments.plain_rate("nobodys") is None

    def warned():
        found = [r.getMessage() for r in caplog.records if "may learn little at such a rate" in r.message]
        caplog.clear()
        return found

    for rate, plain, expected in [(2e-5, 2e-5, 1), (1e-5, 2e-5, 1), (2e-4, 2e-5, 0), (2e-5, None, 0)]:
        arguments.warn_of_plain_rate(NullSpace("nullspace"), rate, plain)
        assert len(warned()) == expected, (rate, plain)
    arguments.warn_of_plain_rate(config.instantiate(config.compose(["method=sft"]).method), 2e-5, 2e-5)
    assert not warned()

    paths = [f"paths.runs={tmp_path}", f"paths.artifacts={artifacts}", "train.max_steps=1", "eval.at=[]"]
    for rate, expected in (("1e-4", ["learning_rate=0.0001", "starts at 0.0001", "docs/nullspace.md"]), ("3e-4", [])):
        cfg = config.compose(["method=nullspace", *FINE_TUNE, *paths, f"train.learning_rate={rate}"])
        with Run(cfg) as run:
            steps.set_up(steps.prepare(cfg, run))
        said = warned()
        assert len(said) == bool(expected) and all(part in said[0] for part in expected)
    cfg.train.learning_rate = 5e-5
    defend(own_trainer(cfg, tmp_path / "own", artifacts), config.instantiate(cfg.method), "toy", artifacts=artifacts)
    assert len(warned()) == 1


@pytest.mark.parametrize("basis", ["rows", "gradient"])
def test_in_a_script_of_ones_own_the_weights_are_those_of_train_py(basis, tmp_path, artifacts):
    """Its rows are token ids already, and those are what the basis is chosen on."""
    given = ["method=nullspace", f"paths.artifacts={artifacts}", *FINE_TUNE, f"method.basis={basis}"]
    cfg = config.compose(given)
    theirs, _, context = fine_tune(cfg, tmp_path)
    collate = engine.Collator(context.tokenizer.pad_token_id, label_logits=True)
    trainer = own_trainer(cfg, tmp_path, artifacts, collate)
    method = NullSpace("nullspace", basis=basis)
    trainer = defend(trainer, method, context.pools, artifacts=artifacts, max_length=64)
    trainer.label_logits = True
    trainer.train()
    one, two = weights(theirs), weights(trainer.model)
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)
    trainer.save_model(tmp_path / "saved")
    # of 16 prompts this base refuses 15
    assert "anchors: 15 prompts" in (tmp_path / "saved" / "README.md").read_text()


@pytest.mark.parametrize(
    "given, said",
    [
        ({"k": 0}, "method.k=0 .*or null for the whole"),
        ({"k": True}, "method.k=True"),
        ({"basis": "nope"}, f"method.basis=nope .*{', '.join(BASES)}"),
        ({"n_rows": 0}, "method.n_rows=0"),
        ({"energy": 0}, r"method\.energy=0 is not valid"),
        ({"modules": "some"}, r"method\.modules=some"),
        ({"response_tokens": -1}, r"method\.response_tokens=-1"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_its_name(given, said):
    with pytest.raises(UsageError, match=said):
        NullSpace("nullspace", **given)


def test_a_users_own_adapter_beside_it_is_refused(tmp_path, artifacts):
    lora = "model.lora={r: 4, alpha: 8, target_modules: all-linear}"
    cfg = cell("nullspace", tmp_path, artifacts, lora)
    with pytest.raises(UsageError, match="method=nullspace brings its own adapter.*leave model.lora out"):
        run_cell(cfg)
    assert not Run(cfg).dir.exists()


def test_an_energy_that_leaves_nothing_is_refused(tmp_path, artifacts, monkeypatch):
    full = {"0.qkv": Basis(torch.eye(4), 1.0, 9)}
    monkeypatch.setattr(nullspace, "anchor_bases", lambda *a: full)
    with pytest.raises(UserError, match="method.energy=0.97 protects every direction"):
        trained(tmp_path, artifacts, "method.energy=0.97")


def test_its_anchors_are_those_of_weight_only_closed():
    """The same keys with the same values, and one artifact for both."""
    ours = config.compose(["method=nullspace"]).method
    theirs = config.compose(["method=weight_only_closed"]).method.weight
    assert {key: ours[key] for key in ANCHORS} == {key: theirs[key] for key in ANCHORS}
    others = set(Weight.__dataclass_fields__) - set(ANCHORS)
    assert others == {"where", "freeze_others", "unconstrained", "penalty_weight", "refresh_steps", "project_every"}


def test_a_4_bit_base_carries_it(tmp_path, artifacts):
    pytest.importorskip("bitsandbytes")
    cfg = config.compose(
        ["method=nullspace", *FINE_TUNE, *TRAINED, f"paths.artifacts={artifacts}", "model.load_in_4bit=true"]
    )
    model, method, _ = fine_tune(cfg, tmp_path)
    for name, V in method.protected().items():
        layer = linears(model, "all")[name]
        assert layer.base_layer.weight.dtype == torch.uint8
        A, C = (getattr(layer, part)[ADAPTER].weight.double() for part in ("lora_A", "lora_B"))
        assert C.norm() > 0 and ((C @ A) @ V.double()).norm() <= 1e-6 * (C @ A).norm()


def test_coupled_with_the_activation_constraint_it_adds_the_penalty(tmp_path, artifacts):
    cfg = config.compose(["method=nullspace_cwac", *FINE_TUNE, *TRAINED, f"paths.artifacts={artifacts}"])
    model, method, context = fine_tune(cfg, tmp_path)
    assert float(method.penalty(model, 0)) > 0
    assert {"feature_drift", "free_rank"} <= {row["metric"] for row in method.report(model)}
    reference = AutoModelForCausalLM.from_pretrained(context.loaded.source)
    pools = (context.pools.anchors, context.pools.step, context.pools.sae)
    used = [len(refused(reference, context, prompts)) for prompts in pools]  # those of 16, 8 and 24
    assert method.extra_data() == {"harmful_prompts": sum(used), "harmless_rows": 32}
    assert change_along_anchors(model, method, reference) <= 1e-6


def test_the_memory_estimate_trains_what_the_method_would():
    found = NullSpace("nullspace", k=4).estimate_memory(make_llama(), Sizes(rank_share=0.5))
    assert {layer.r[ADAPTER] for layer in fixed_layers(found.model)} == {4}
    assert all(isinstance(base_layer(m), nn.Linear) for m in linears(found.model, "all").values())


# --- W_0 + C N^T held beside it -----------------------------------------------------------------------
def test_folded_it_computes_the_same_and_follows_the_optimizer():
    found = []
    for wanted in (False, True):
        wrapped, _ = adapted(make_llama(), k=None)
        adapter.fold(wrapped, wanted)
        wrapped.train()
        optimizer = torch.optim.AdamW(
            (p for p in wrapped.parameters() if p.requires_grad), lr=0.01, eps=1e-3, fused=True
        )
        for _ in range(3):
            optimizer.zero_grad()
            loss = wrapped(**batch()).loss
            loss.backward()
            optimizer.step()
        gradients = {n: p.grad for n, p in wrapped.named_parameters() if p.requires_grad}
        with torch.no_grad():
            found.append((loss, gradients, wrapped(**batch()).logits))
    (loss, gradients, logits), (folded_loss, folded_gradients, folded_logits) = found
    assert torch.allclose(loss, folded_loss, atol=1e-5) and torch.allclose(logits, folded_logits, atol=1e-4)
    for name, gradient in gradients.items():
        assert (gradient - folded_gradients[name]).norm() <= 1e-3 * gradient.norm(), name


def test_it_is_folded_where_k_is_large_and_the_weights_can_be():
    few, _ = adapted(make_llama(), k=5)
    most, _ = adapted(make_llama(), k=None)
    half, _ = adapted(make_llama().bfloat16(), k=None)
    for model, wanted, expected in ((few, None, False), (few, True, True), (half, True, False)):
        adapter.fold(model, wanted)
        assert {layer.folded is not None for layer in fixed_layers(model)} == {expected}
    adapter.fold(most, None)
    for layer in fixed_layers(most):
        d_out, d_in = layer.base_layer.weight.shape
        assert (layer.folded is not None) == (4 * layer.r[ADAPTER] > d_in >= d_out)
    assert {layer.folded is not None for layer in fixed_layers(most)} == {True, False}  # down_proj; gate_proj
    adapter.fold(most, False)
    assert all(layer.folded is None for layer in fixed_layers(most))


def test_folding_names_no_other_run():
    from cwac.core.identity import run_id

    assert run_id(config.compose(["method=nullspace", "method.fold=true"])) == run_id(
        config.compose(["method=nullspace"])
    )


def test_trls_trainer_trains_it(tmp_path, artifacts):
    trl = pytest.importorskip("trl")
    cfg = config.compose(["method=nullspace", *FINE_TUNE, f"paths.artifacts={artifacts}"])
    source = load(cfg.model, artifacts).source
    rows = [
        {"prompt": e.messages, "completion": [{"role": "assistant", "content": e.response}]} for e in own_rows(cfg)
    ]
    args = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=3,
        learning_rate=0.01,
        max_length=64,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
    )
    trainer = trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(source),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(source),
    )
    method = NullSpace("nullspace")
    defend(trainer, method, load_pools(cfg.pools, None, 0), artifacts=artifacts)
    trainer.train()
    assert change_along_anchors(trainer.model, method, AutoModelForCausalLM.from_pretrained(source)) <= 1e-6


def test_vllm_serves_it_as_a_lora_module(tmp_path, artifacts):
    vllm = pytest.importorskip("vllm")
    from vllm.lora.request import LoRARequest

    model, _, _ = trained(tmp_path, artifacts, "method.k=16")
    model.save_pretrained(tmp_path / "adapter")
    cfg = config.compose(["method=nullspace"])
    server = vllm.LLM(load(cfg.model, artifacts).source, enable_lora=True, max_lora_rank=16, dtype="float32")
    ids = [1, 5, 6, 7]
    asked = vllm.SamplingParams(temperature=0, max_tokens=4)
    served = server.generate(
        {"prompt_token_ids": ids}, asked, lora_request=LoRARequest("n", 1, str(tmp_path / "adapter"))
    )
    ours = model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)
    assert list(served[0].outputs[0].token_ids) == ours[0, len(ids) :].tolist()
