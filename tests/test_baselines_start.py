"""L2-SP and EWC: gradients against autograd and finite differences, degenerate cases, adapters, shards."""

import copy
import random
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from cwac.constraints.start import Start, matrices
from cwac.core.errors import UsageError, UserError
from cwac.core.run_dir import Run
from cwac.methods.ewc import EWC, fisher
from cwac.methods.l2sp import L2SP
from cwac.models.loading import add_lora
from tests.conftest import make_llama, random_rows
from tests.helpers.training import cell
from train import run_cell

LORA = OmegaConf.create({"r": 4, "alpha": 12, "target_modules": "all-linear"})
ADAPTER = "model.lora={r: 4, alpha: 8, target_modules: all-linear}"


@pytest.fixture(scope="module")
def sft(tmp_path_factory, artifacts):
    cfg = cell("sft", tmp_path_factory.mktemp("sft"), artifacts, "eval.drift=false")
    run_cell(cfg)
    return Run(cfg)


def moved(model, seed=2, size=0.05):
    """The model away from its start, with gradients of 0."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn_like(p))
                p.grad = torch.zeros_like(p)
    return model


def prepared(method, model):
    context = SimpleNamespace(loaded=SimpleNamespace(model=model))
    method.training_data([], context, random.Random(0))
    method.setup(model, context)
    method.start(model)
    return method


def given(method, model) -> dict:
    with torch.no_grad():
        method.after_backward(model)
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def update_of(model, before) -> dict:
    """name -> W - W_0 with a graph, of every matrix that trains, adapters merged by hand."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            A, B, s = (module.lora_A["default"].weight, module.lora_B["default"].weight, module.scaling["default"])
            assert s == 3
            found[f"{name}.base_layer.weight"] = s * B @ A
    start = dict(before.named_parameters())
    own = {n: p - start[n].detach() for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    return found | own


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("stiff", [False, True])
def test_the_gradient_is_autograds(lora, stiff):
    """Of lam / 2 sum k (W - W_0)^2, for k = 1 and for one of its own a weight."""
    model = add_lora(make_llama(), LORA) if lora else make_llama()
    before = copy.deepcopy(model)
    torch.manual_seed(1)
    k = {n: torch.rand_like(W) if stiff else torch.ones_like(W) for n, W in matrices(model)}
    start = Start(model, k if stiff else None)
    start.place(model)
    moved(model)
    start.add_gradient_(model, 0.7)
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    for p in model.parameters():
        p.grad = None
    updates = update_of(model, before)
    assert set(updates) == set(k) and len(updates) == (21 if lora else len(list(model.parameters())))
    (0.7 / 2 * sum((k[n] * D.square()).sum() for n, D in updates.items())).backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad.any() and torch.allclose(found[name], p.grad, rtol=1e-4, atol=1e-6), name


def test_l2sp_by_finite_differences():
    """Half of lambda times the squared distance, as tf.nn.l2_loss in the official code."""
    model = make_llama()
    start = {n: p.detach().double() for n, p in copy.deepcopy(model).named_parameters()}
    method = prepared(L2SP("l2sp", lam=1.3), model)
    gradient = given(method, moved(model))

    def R():
        return (
            1.3 / 2 * sum(float((p.detach().double() - start[n]).square().sum()) for n, p in model.named_parameters())
        )

    weight = model.model.layers[1].mlp.down_proj.weight
    for i, j in ((0, 0), (3, 5)):
        sides = []
        for step in (1e-2, -1e-2):
            with torch.no_grad():
                kept = weight[i, j].clone()
                weight[i, j] += step
                sides.append(R())
                weight[i, j] = kept
        slope = (sides[0] - sides[1]) / 2e-2
        assert float(gradient["model.layers.1.mlp.down_proj.weight"][i, j]) == pytest.approx(slope, rel=1e-3)


def test_at_the_start_nothing_is_asked_for():
    model = make_llama()
    method = prepared(L2SP("l2sp", lam=10.0), model)
    assert not any(g.any() for g in given(method, moved(model, size=0.0)).values())
    assert method.extra_data() == {}


def test_a_frozen_factor_of_an_adapter_is_left_alone():
    """dW = s B A with A fixed: B alone is drawn back, by s (s B A) A^T."""
    model = add_lora(make_llama(), LORA)
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    layer.lora_A["default"].requires_grad_(False)
    start = Start(model)
    moved(model)
    start.add_gradient_(model, 2.0)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert A.grad is None
    assert torch.allclose(B.grad, 2.0 * 9 * B @ A @ A.T, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["l2sp", "ewc"])
@pytest.mark.parametrize("more", [[], [ADAPTER]])
def test_with_lambda_0_it_is_sft_bit_for_bit(method, more, sft, tmp_path, artifacts):
    ends = []
    for name, keys in (("sft", []), (method, ["method.lam=0"])):
        if name == "sft" and not more:
            ends.append(sft.status["weights_sha256"])
            continue
        cfg = cell(name, tmp_path, artifacts, *keys, *more, "eval.drift=false")
        run_cell(cfg)
        ends.append(Run(cfg).status["weights_sha256"])
    assert ends[0] == ends[1]


@pytest.mark.parametrize("method", ["l2sp", "ewc"])
@pytest.mark.parametrize("more", [[], [ADAPTER, "train.learning_rate=0.01"]])
def test_the_stronger_the_nearer(method, more, tmp_path, artifacts):
    """By the run's own measure of what changed in the weights."""
    changes = []
    for lam in ("0.001", "1e9"):
        cfg = cell(method, tmp_path, artifacts, f"method.lam={lam}", *more)
        run_cell(cfg)
        changes.append(next(r["value"] for r in Run(cfg).rows() if r["metric"] == "weight_change"))
        rows = {(r["metric"], r["set"]): r["value"] for r in Run(cfg).rows()}
    assert 0 < changes[1] < 0.9 * changes[0], changes
    assert ("extra_data", "none" if method == "l2sp" else "harmful_prompts") in rows


@pytest.mark.parametrize("kind", [L2SP, EWC])
@pytest.mark.parametrize("lam", [-1, float("nan"), "strong"])
def test_a_lambda_that_is_no_strength_is_refused(kind, lam):
    with pytest.raises(UsageError, match=r"method\.lam="):
        kind("x", lam=lam)


@pytest.mark.parametrize("lora", [False, True])
def test_the_fisher_information_is_its_definition(lora):
    """Mean over rows of the squared gradient of log p(answer | prompt), by finite differences."""
    model = add_lora(make_llama(), LORA) if lora else make_llama()
    trains = {n: p.requires_grad for n, p in model.named_parameters()}
    rows = [{"input_ids": r["input_ids"], "prompt": len(r["input_ids"]) - 3} for r in random_rows(3, low=6, high=9)]
    F = fisher(model, [*rows, {"input_ids": [5, 6, 7], "prompt": 3}])
    assert {n: p.requires_grad for n, p in model.named_parameters()} == trains
    held = dict(matrices(model))
    assert F.keys() == held.keys() and all(F[n].shape == W.shape and (F[n] >= 0).all() for n, W in held.items())
    name = next(n for n in F if "layers.1.mlp.down_proj" in n)
    weight, place = held[name], divmod(int(F[name].argmax()), F[name].shape[1])

    def likelihood(row):
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logp = model(ids).logits[0].log_softmax(-1)
        return sum(float(logp[i - 1, ids[0, i]]) for i in range(row["prompt"], ids.shape[1]))

    slopes = []
    for row in rows:
        sides = []
        for step in (1e-2, -1e-2):
            with torch.no_grad():
                kept = weight[place].clone()
                weight[place] += step
                sides.append(likelihood(row))
                weight[place] = kept
        slopes.append((sides[0] - sides[1]) / 2e-2)
    expected = sum(s * s for s in slopes) / 4  # the row without an answer counts as 0
    assert float(F[name][place]) == pytest.approx(expected, rel=2e-2)


def test_ewc_sees_the_anchors_and_shares_one_fisher(tmp_path, artifacts):
    cfg = cell("ewc", tmp_path / "a", artifacts, "method.n_prompts=8", "eval.drift=false")
    run_cell(cfg)
    rows = {(r["metric"], r["set"]): r["value"] for r in Run(cfg).rows() if r["final"]}
    assert rows["extra_data", "harmful_prompts"] == 8
    assert 0 < rows["fisher_mean", "train"] < rows["fisher_max", "train"]
    before = set((artifacts / "fisher").iterdir())
    run_cell(cell("ewc", tmp_path / "b", artifacts, "method.n_prompts=8", "method.lam=5", "eval.drift=false"))
    assert set((artifacts / "fisher").iterdir()) == before


def test_a_pool_without_enough_requests_is_refused():
    context = SimpleNamespace(loaded=SimpleNamespace(model=make_llama()), pools=SimpleNamespace(anchors=[]))
    with pytest.raises(UserError, match="method=x needs 3 harmful prompts, the pool `anchors` has 0"):
        EWC("x", n_prompts=3).training_data([], context, random.Random(0))


def test_an_adapter_that_holds_an_update_is_refused():
    model = moved(add_lora(make_llama(), LORA))
    with pytest.raises(UserError, match="method=l2sp .* holds one already"):
        prepared(L2SP("l2sp"), model)
