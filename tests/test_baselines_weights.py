"""The weight-driven baselines: gradients, projections and localisation against explicit formulas, and their errors."""

import copy
import json
import random
import socket
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from cwac.core import config, identity
from cwac.core.errors import UsageError, UserError
from cwac.core.run_dir import Run
from cwac.data.examples import Example
from cwac.evaluation.drift import merged_weight
from cwac.methods import salora
from cwac.methods.asft import AsFT, Full, Operator
from cwac.methods.base import Method
from cwac.methods.safelora import SafeLoRA, project
from cwac.methods.safety_layers import Localisation, cosine_curves, gap_range, refine, scaled
from cwac.methods.salora import SaLoRA
from cwac.methods.sppft import SPPFT
from cwac.models.layers import decoder_layers, linears
from cwac.models.loading import Loaded, add_lora, alignment_directions
from tests import test_invariance
from tests.conftest import make_llama, random_rows
from tests.helpers import layouts
from tests.helpers.layouts import close, final_weights
from tests.helpers.training import aligned_folder, cell, stop_at, trained_weights
from train import run_cell

OPERATORS = ("official", "spectral", "projector_k")
LORA = SimpleNamespace(r=3, alpha=12, target_modules=["q_proj", "v_proj"], get=lambda key, default=None: default)


@pytest.fixture
def pair(tmp_path):
    """A random aligned model, and beside it on the disk a base from which it differs in every block."""
    aligned, base = make_llama(), make_llama()
    torch.manual_seed(1)
    with torch.no_grad():
        for module in linears(base, "all").values():
            module.weight.add_(0.02 * torch.randn_like(module.weight))
    aligned.save_pretrained(tmp_path / "aligned")
    base.save_pretrained(tmp_path / "base")
    return Loaded(aligned, None, {}, str(tmp_path / "aligned"), str(tmp_path / "base"))


def context_of(loaded):
    return SimpleNamespace(loaded=loaded, tokenizer=None)


def prepared(method, loaded):
    """The method after the hooks that precede training."""
    method.training_data([], context_of(loaded), random.Random(0))
    method.setup(loaded.model, context_of(loaded))
    return method


def C_of(V, operator, rank=None, energy=0.9):
    """C as a dense matrix in float64, from its definition by eigenvectors of V V^T."""
    V = V.double()
    values, U = torch.linalg.eigh(V @ V.T)
    values, U = values.flip(0).clamp_min(0), U.flip(1)
    share = values.cumsum(0) / values.sum()
    k = len(values) if rank is None else rank
    if operator == "projector_k":
        k = min(k, int((share < energy).sum()) + 1)
        weights = torch.ones_like(values)
    else:
        weights = values / (V.norm() if operator == "official" else values[0])
    return U[:, :k] @ weights[:k].diag() @ U[:, :k].T


def with_gradients(model):
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None


# --- AsFT ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("shape", [(12, 20), (40, 6)])  # both forms: dense, and by factors
def test_the_operator_is_its_definition(operator, rank, shape):
    torch.manual_seed(0)
    V, D = torch.randn(shape), torch.randn(shape)
    C = C_of(V, operator, rank)
    built = Operator(V, operator, rank)
    residual = torch.eye(shape[0], dtype=torch.float64) - C
    assert torch.allclose(built(D).double(), residual @ residual @ D.double(), atol=1e-4)
    assert built.trace == pytest.approx(float(C.trace()), rel=1e-4)
    assert built.lambda_max == pytest.approx(float(torch.linalg.eigvalsh(C).max()), rel=1e-4)
    if rank is not None and operator != "projector_k":
        s = torch.linalg.svdvals(V).square()
        assert built.energy == pytest.approx(float(s[:rank].sum() / s.sum()), rel=1e-5)


def test_what_the_three_operators_are_by_their_eigenvalues():
    torch.manual_seed(0)
    V = torch.randn(6, 9)
    assert Operator(V, "official").trace == pytest.approx(float(V.norm()), rel=1e-5)
    assert Operator(7 * V, "official").trace == pytest.approx(7 * float(V.norm()), rel=1e-5)  # not free of scale
    assert Operator(V, "spectral").lambda_max == Operator(7 * V, "spectral").lambda_max == pytest.approx(1)
    low = torch.randn(6, 2) @ torch.randn(2, 9)
    projector = Operator(low, "projector_k", energy=1 - 1e-6)
    assert projector.trace == pytest.approx(2)
    assert torch.allclose(projector(low), torch.zeros_like(low), atol=1e-4)  # an update along V is free
    whole = Operator(V, "projector_k", energy=1)  # a V of full row rank: the paper's Eq. 3, which penalises nothing
    assert torch.allclose(whole(torch.randn(6, 9)), torch.zeros(6, 9), atol=1e-4)
    untouched = Operator(torch.zeros(6, 9), "official")
    assert (untouched.trace, untouched.lambda_max) == (0, 0) and torch.equal(untouched(V), V)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(("lora", "scaled"), [(False, False), (True, False), (True, True)])
def test_asft_gradient_and_value_are_autograds(pair, operator, lora, scaled):
    """With an adapter of s = 4: the official penalty is on B A, and that with `lora_scaling` on s B A."""
    V = alignment_directions(pair, "asft", ["q_proj", "v_proj"])
    if lora:
        pair.model = add_lora(pair.model, LORA)
    method = prepared(AsFT("asft", lam=0.7, operator=operator, lora_scaling=scaled), pair)
    before = copy.deepcopy(pair.model)
    torch.manual_seed(2)
    with torch.no_grad():
        for p in pair.model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    with_gradients(pair.model)
    with torch.no_grad():
        method.after_backward(pair.model)
    given = {n: p.grad.clone() for n, p in pair.model.named_parameters() if p.requires_grad}

    with_gradients(pair.model)
    penalty, then = 0.0, linears(before, ["q_proj", "v_proj"])
    for name, module in linears(pair.model, ["q_proj", "v_proj"]).items():
        if lora:
            D = (4 if scaled else 1) * module.lora_B["default"].weight @ module.lora_A["default"].weight
            assert module.scaling["default"] == 4
        else:
            D = module.weight - then[name].weight.detach()
        E = D.double() - C_of(V[name], operator) @ D.double()
        penalty = penalty + 0.7 * E.square().sum()
    penalty.backward()
    assert penalty > 0.01
    assert method.report(pair.model)[0] == {
        "metric": "penalty",
        "set": "train",
        "value": pytest.approx(penalty.item()),
    }
    for name, p in pair.model.named_parameters():
        if p.requires_grad:
            assert torch.allclose(given[name], p.grad, atol=1e-5 + 1e-3 * float(p.grad.abs().max())), name
    held = [n for n, g in given.items() if g.any()]
    assert all("q_proj" in n or "v_proj" in n for n in held) and len(held) == (12 if lora else 6)
    assert method.extra_data() == {"base_weights": 6}


def test_asft_with_its_scaling_is_the_square_of_it_as_strong(pair):
    """The authors' lambda = 1 is lambda = 1/16 on dW = s B A at s = 4."""
    pair.model = add_lora(pair.model, LORA)
    methods = [prepared(AsFT("asft", lora_scaling=scaled), pair) for scaled in (False, True)]
    torch.manual_seed(2)
    with torch.no_grad():
        for p in pair.model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    values = []
    for method in methods:
        with_gradients(pair.model)
        with torch.no_grad():
            method.after_backward(pair.model)
        values.append(method.report(pair.model)[0]["value"])
    assert values[1] == pytest.approx(16 * values[0]) and values[0] > 0.01


def test_asft_gradient_by_finite_differences():
    """Independent of autograd and of the operator's own form."""
    torch.manual_seed(0)
    V, W0 = torch.randn(5, 7), torch.randn(5, 7)
    method = AsFT("asft", lam=1.3)
    module = torch.nn.Linear(7, 5, bias=False)
    with torch.no_grad():
        module.weight.copy_(W0)
        term = Full(module, Operator(V, method.operator))
        module.weight.add_(torch.randn(5, 7))
        C = C_of(V, "official")

        def R(W):
            D = (W - W0).double()
            return 1.3 * float((D - C @ D).square().sum())

        module.weight.grad = torch.zeros(5, 7)
        term.add_gradient_(1.3)
        for i, j in ((0, 0), (2, 5), (4, 6)):
            step = torch.zeros(5, 7, dtype=torch.float64)
            step[i, j] = 1e-4
            slope = (R(module.weight + step) - R(module.weight - step)) / 2e-4
            assert float(module.weight.grad[i, j]) == pytest.approx(slope, rel=1e-3)


def test_asft_at_the_aligned_weights_asks_for_nothing(pair):
    method = prepared(AsFT("asft", modules="all"), pair)
    with_gradients(pair.model)
    with torch.no_grad():
        method.after_backward(pair.model)
    assert not any(p.grad.any() for p in pair.model.parameters())
    assert method.extra_data() == {"base_weights": 21}


def asft_of(lam):
    """For `final_weights` of the invariance tests: AsFT on a random model, along random directions."""

    def build(model):
        method = AsFT("asft", lam=lam, operator="spectral")
        torch.manual_seed(4)
        method._V = {n: torch.randn_like(m.weight) for n, m in linears(model, method.modules).items()}
        method.setup(model, None)
        return method

    return build


def two_ranks(rank, folder, port):
    layouts.penalised = asft_of(0.5)
    test_invariance.two_ranks(rank, folder, {}, port)


def test_asft_with_lambda_0_is_sft_bit_for_bit(tmp_path, monkeypatch):
    ends = []
    for i, build in enumerate((lambda model: Method("sft"), asft_of(0), asft_of(0.5))):
        monkeypatch.setattr(layouts, "penalised", build)
        ends.append(final_weights(tmp_path / str(i), 8, 1))
    sft, zero, asft = ends
    assert all(torch.equal(sft[n], zero[n]) for n in sft)
    moved = {n for n in sft if not torch.equal(sft[n], asft[n])}
    assert {"model.layers.0.self_attn.q_proj.weight", "model.layers.2.self_attn.v_proj.weight"} <= moved


@pytest.mark.slow  # test_invariance.py has it among the others, and slow too
def test_asft_does_not_depend_on_the_layout(tmp_path, monkeypatch):
    """1 x 8 == 8 x 1 == 2 ranks x 4: the term is added once per optimizer step, before clipping."""
    monkeypatch.setattr(layouts, "penalised", asft_of(0.5))
    whole, split = final_weights(tmp_path / "a", 8, 1), final_weights(tmp_path / "b", 1, 8)
    assert close(whole, split) < 1e-5
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(two_ranks, args=(str(tmp_path), port), nprocs=2)
    assert close(whole, torch.load(tmp_path / "two.pt", weights_only=True)["penalised"]) < 1e-5


FIXED_LAYERS = ["method.layers=[1,2]", "method.localisation={n_draws: 500, n_queries: 100, n_over_rejection: 100}"]
"""SPPFT without a search, whose settings are then those of its yaml: others are refused."""


@pytest.mark.parametrize("method", ["asft", "sppft", "safelora"])
def test_with_lora(method, tmp_path, artifacts):
    """An adapter trains, only where the method lets it."""
    lora = ["model.lora={r: 4, alpha: 8, target_modules: all-linear}", "train.learning_rate=0.01", "train.max_steps=3"]
    if method == "sppft":
        lora += FIXED_LAYERS
    cfg = cell(method, tmp_path, artifacts, *lora)
    run_cell(cfg)
    before, after = load_file(aligned_folder(Run(cfg)) / "model.safetensors"), trained_weights(Run(cfg))
    moved = {n for n in after if not torch.equal(after[n], before[n])}
    assert moved and all("_proj" in n for n in moved)
    if method == "sppft":
        assert {n.split(".")[2] for n in moved} == {"0", "3"}


def test_the_mean_penalty_survives_a_resume(tmp_path, artifacts, monkeypatch):
    values = []
    for stop in (False, True):
        cfg = cell("asft", tmp_path / str(stop), artifacts)
        if stop:
            with monkeypatch.context() as patch:
                patch.setattr("cwac.training.engine.MethodCallback.on_step_end", stop_at(5))
                with pytest.raises(RuntimeError, match="planted stop"):
                    run_cell(cfg)
        run_cell(cfg)
        values.append(next(r["value"] for r in Run(cfg).rows() if r["metric"] == "penalty"))
    assert values[0] == pytest.approx(values[1], rel=1e-6) and values[0] > 0


# --- SPPFT -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("freeze_norms", [False, True])
def test_sppft_freezes_the_range_and_nothing_else(freeze_norms, tmp_path, artifacts):
    cfg = cell(
        "sppft",
        tmp_path,
        artifacts,
        *FIXED_LAYERS,
        f"method.freeze_norms={freeze_norms}",
        "train.max_steps=2",
        "train.weight_decay=0.1",  # which must not reach a frozen weight either
    )
    run_cell(cfg)
    before, after = load_file(aligned_folder(Run(cfg)) / "model.safetensors"), trained_weights(Run(cfg))
    kinds = (".self_attn.", ".mlp.", "layernorm") if freeze_norms else (".self_attn.", ".mlp.")
    for name, weight in after.items():
        frozen = any(f"layers.{k}." in name for k in (1, 2)) and any(kind in name for kind in kinds)
        assert torch.equal(weight, before[name]) == frozen, name
    rows = {(r["metric"], r["set"]): r["value"] for r in Run(cfg).rows() if r["epoch"]}
    assert rows["frozen_first_layer", "train"] == 1 and rows["frozen_last_layer", "train"] == 2
    assert 0 < rows["trained_share", "train"] < 1 and ("extra_data", "harmful_prompts") not in rows


def test_sppft_localises_on_tiny_and_says_what_it_saw(tmp_path, artifacts):
    published = "method.localisation={alpha: 1.3, n_queries: 100, n_draws: 500, n_over_rejection: 100}"
    cfg = cell("sppft", tmp_path, artifacts, "train.max_steps=2", published)
    run_cell(cfg)
    folder = next(
        f
        for f in (artifacts / "safety_layers").iterdir()
        if f.is_dir() and json.loads((f / "safety_layers.json").read_text())["alpha"] == 1.3
    )
    found = json.loads((folder / "safety_layers.json").read_text())
    lines = (folder / "curves.csv").read_text().splitlines()
    assert lines[0] == "layer,normal_normal,malicious_malicious,normal_malicious,gap" and len(lines) == 5
    lo, hi = found["layers"]
    rows = {(r["metric"], r["set"]): r["value"] for r in Run(cfg).rows() if r["epoch"]}
    assert (rows["frozen_first_layer", "train"], rows["frozen_last_layer", "train"]) == (lo, hi)
    assert rows["extra_data", "harmful_prompts"] == 100 and rows["extra_data", "harmless_rows"] == 200
    before, after = load_file(aligned_folder(Run(cfg)) / "model.safetensors"), trained_weights(Run(cfg))
    for k in range(4):
        name = f"model.layers.{k}.mlp.down_proj.weight"
        assert torch.equal(before[name], after[name]) == (lo <= k <= hi)


def planted(n, n_layers, opens, closes, seed):
    """States [n, K, d]: one common direction, and from layer `opens` to `closes` a growing one of the class."""
    g = torch.Generator().manual_seed(seed)
    states = torch.randn(n, n_layers, 16, generator=g) * 0.1
    states[:, :, 0] += 3
    for k in range(n_layers):
        states[:, k, 1] += (1 if seed else -1) * 0.5 * min(max(0, k - opens + 1), closes - opens + 1)
    return states


def test_the_gap_opens_where_it_was_planted():
    curves = cosine_curves(planted(40, 12, 3, 6, 0), planted(40, 12, 3, 6, 1), n_draws=200)
    assert gap_range(curves["gap"]) == (3, 7)  # layer 7 is the first of the plateau
    assert all(abs(g) < 2 for g in curves["gap"][:3]) and min(curves["gap"][6:]) > 30
    assert all(c > 0.95 for c in curves["normal_normal"] + curves["malicious_malicious"])
    again = cosine_curves(planted(40, 12, 3, 6, 0), planted(40, 12, 3, 6, 1), n_draws=200)
    assert curves == again
    with pytest.raises(UserError, match="use an aligned model, or give method.layers"):
        gap_range([-0.1, 0.0, -2.0])


def planted_refusals(true_lo, true_hi, n=200):
    """R_o rises by each safety layer that is scaled and falls by each other layer, more with a larger alpha."""
    seen = []

    def refusals(lo, hi, alpha):
        seen.append((lo, hi, alpha))
        hit = sum(true_lo <= k <= true_hi for k in range(lo, hi + 1))
        missed = hi - lo + 1 - hit
        return round(n * 0.2 + (alpha - 1) * 20 * (2 * hit - missed))

    return refusals, seen


@pytest.mark.parametrize("alpha", [1.2, 0.8, "auto"])
def test_over_rejection_finds_the_planted_layers(alpha):
    refusals, seen = planted_refusals(4, 8)
    found = refine(refusals, 16, 6, 11, n=200, alpha=alpha)
    assert found["layers"] == (4, 8)
    assert len(seen) == len(set(seen)) == len(found["refusals"])  # nothing is generated twice
    if alpha == "auto":
        before = [c for lo, hi, a, c in found["refusals"] if a < found["alpha"]]
        assert found["alpha"] > 1.05 and before  # 1.05 moves too little


def test_a_flat_over_rejection_curve_leaves_the_cosine_range():
    found = refine(lambda lo, hi, alpha: 7, 16, 6, 11, n=200)
    assert found["layers"] == (6, 11) and found["alpha"] is None
    assert refine(lambda lo, hi, alpha: 7, 16, 6, 11, n=200, alpha=1.2)["layers"] == (6, 11)  # ties: the nearest


@pytest.mark.parametrize("lora", [False, True])
def test_scaling_multiplies_and_restores_to_the_bit(lora):
    model = make_llama()
    if lora:
        model = add_lora(model, LORA)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(RuntimeError), scaled(model, 1, 2, 1.1):
        for name, p in model.named_parameters():
            hit = any(f"layers.{k}." in name for k in (1, 2)) and "_proj" in name and "lora_" not in name
            assert torch.equal(p, before[name] * 1.1 if hit else before[name]), name
        raise RuntimeError("in the middle")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


# --- Safe LoRA -------------------------------------------------------------------------------------
def move(model, scale=0.05):
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(scale * torch.randn_like(p))


def explicit(V, D):
    """C D and cos(C D, D) by the definition, in float64."""
    C = V.double() @ V.double().T / V.double().norm()
    CD = C @ D.double()
    return CD, ((CD * D.double()).sum() / CD.norm() / D.double().norm()).item()


def test_projection_is_the_same_in_both_forms():
    torch.manual_seed(0)
    for shape in ((6, 9), (9, 6)):
        V, D = torch.randn(shape), torch.randn(shape)
        assert torch.allclose(project(V, D).double(), explicit(V, D)[0], atol=1e-5)
    assert not project(torch.zeros(6, 9), torch.randn(6, 9)).any()


@pytest.mark.parametrize("settings", [{"tau": 0.3}, {"select": "number", "number": 5}, {"tau": -1}, {"tau": 1}])
@pytest.mark.parametrize("lora", [False, True])
def test_safe_lora_projects_what_left_the_direction(pair, settings, lora):
    modules = ["q_proj", "v_proj"] if lora else "all"
    V = alignment_directions(pair, "safelora", modules)
    if lora:
        pair.model = add_lora(pair.model, LORA)
    method = prepared(SafeLoRA("safelora", modules=modules, **settings), pair)
    start = copy.deepcopy(pair.model)
    move(pair.model)
    trained = copy.deepcopy(pair.model)
    with torch.no_grad():
        method.finish(pair.model)

    then, now, end = (linears(m, modules) for m in (start, trained, pair.model))

    def update(modules_):
        if lora:
            return {n: 4 * m.lora_B["default"].weight @ m.lora_A["default"].weight for n, m in modules_.items()}
        return {n: m.weight - then[n].weight for n, m in modules_.items()}

    D, after = update(now), update(end)
    cosines = {n: explicit(V[n], d)[1] for n, d in D.items()}
    tau = sorted(cosines.values())[4] if settings.get("select") == "number" else settings["tau"]
    chosen = {n for n, c in cosines.items() if c <= tau + 1e-5}
    for name, d in D.items():
        want = explicit(V[name], d)[0] if name in chosen else d.double()
        assert torch.allclose(after[name].double(), want, atol=1e-5), name
    if settings.get("select") == "number":
        assert len(chosen) == 5
    row = method.report(pair.model)[0]
    assert (row["metric"], row["value"], row["n"]) == ("projected_matrices", len(chosen), len(D))
    assert method.extra_data() == {"base_weights": len(D)}
    for (name, p), (_, q) in zip(pair.model.named_parameters(), trained.named_parameters(), strict=True):
        if "_proj" not in name:
            assert torch.equal(p, q), name  # what is no linear layer stays as trained


def test_safe_lora_ties_are_all_projected_and_a_matrix_that_did_not_move_is_left(pair):
    method = prepared(SafeLoRA("safelora", select="number", number=1), pair)
    assert method.chosen({"a": 0.2, "b": 0.2, "c": 0.3}) == ["a", "b"]
    with torch.no_grad():
        method.finish(pair.model)
    assert method.report(pair.model)[0]["value"] == 0
    start = make_llama()
    assert all(torch.equal(p, q) for p, q in zip(pair.model.parameters(), start.parameters(), strict=True))


def test_safe_lora_differs_from_sft_only_after_training(pair):
    """It overrides no hook that runs during training."""
    for hook in ("setup", "batch", "penalty", "after_backward", "before_step", "after_step"):
        assert getattr(SafeLoRA, hook) is getattr(Method, hook)


# --- SaLoRA ----------------------------------------------------------------------------------------
def answered(rows):
    """Rows whose answers begin at the third token."""
    return [{"input_ids": row["input_ids"], "prompt": 2} for row in rows]


OURS = {"scaling": None, "answers_only": False, "task_inputs": "aligned", "n_prompts": None}


@pytest.mark.parametrize("settings", [{}, OURS], ids=["official", "ours"])
def test_salora_starts_from_the_aligned_model_and_writes_to_no_safety_direction(pair, monkeypatch, settings):
    harmful, task = random_rows(6, seed=1), random_rows(6, seed=2)
    monkeypatch.setattr(salora, "anchor_rows", lambda model, context, prompts, tokens: answered(harmful))
    monkeypatch.setattr(salora, "encode_prompts", lambda context, examples, responses: answered(task))
    pair.model = add_lora(pair.model, LORA)
    W0 = {n: m.base_layer.weight.clone() for n, m in salora.adapted_layers(pair.model).items()}
    ids = torch.tensor([random_rows(1, seed=9)[0]["input_ids"]])
    before = pair.model(input_ids=ids).logits
    method = SaLoRA("salora", safety_rank=5, task_rank=6, **settings)
    context = SimpleNamespace(loaded=pair, pools=SimpleNamespace(anchors=list("abc")))
    method.training_data(list("rows"), context, random.Random(0))
    method.setup(pair.model, context)
    adapted = salora.adapted_layers(pair.model)
    assert torch.allclose(pair.model(input_ids=ids).logits, before, atol=1e-5)
    assert all(m.lora_B["default"].weight.abs().max() > 0 for m in adapted.values())
    # the prompts whose refusals are used, whatever else the pool holds
    assert method.extra_data() == {"harmful_prompts": 6} and 0 < method.report(pair.model)[0]["value"] < 1
    assert {m.scaling["default"] for m in adapted.values()} == {4.0 if "scaling" in settings else 1.0}

    optimizer = torch.optim.AdamW([p for p in pair.model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    for _ in range(3):
        pair.model(input_ids=ids, labels=ids).loss.backward()
        with torch.no_grad():
            method.after_backward(pair.model)
            optimizer.step()
            method.after_step(pair.model)
        optimizer.zero_grad()
    entries = dict(zip(adapted, method._entries, strict=True))
    for name, module in adapted.items():
        U = entries[name][1]
        assert torch.allclose(U.T @ U, torch.eye(5), atol=1e-5)
        dW = merged_weight(module) - W0[name].double()
        assert dW.norm() > 0.01 and (U.double().T @ dW).norm() < 1e-5 * dW.norm() + 1e-6, name


def test_salora_by_default_follows_the_official_code(pair, monkeypatch):
    """q and v alone train, at scaling 1; X at the answers' tokens; X_t block by block, the blocks below at W_res."""
    harmful, task = answered(random_rows(6, seed=1)), answered(random_rows(6, seed=2))
    asked = []
    monkeypatch.setattr(salora, "anchor_rows", lambda model, c, prompts, tokens: asked.append(prompts) or harmful)
    monkeypatch.setattr(salora, "encode_prompts", lambda context, examples, responses: task)
    aligned = copy.deepcopy(pair.model)
    lora = SimpleNamespace(r=3, alpha=12, target_modules="all-linear", get=lambda key, default=None: default)
    pair.model = add_lora(pair.model, lora)
    method = SaLoRA("salora", safety_rank=5, task_rank=6)
    context = SimpleNamespace(loaded=pair, pools=SimpleNamespace(anchors=list(range(200))))
    method.training_data(list(range(300)), context, random.Random(0))
    method.setup(pair.model, context)
    assert len(method._task) == len(asked[0]) == 128
    trained = {n.split(".")[-4] for n, p in pair.model.named_parameters() if p.requires_grad}
    assert trained == {"q_proj", "v_proj"}
    assert not any(
        p.any() for n, p in pair.model.named_parameters() if "lora_B" in n and "_proj" in n and not p.requires_grad
    )
    assert pair.model.peft_config["default"].lora_alpha == 3  # a saved adapter is read back with s = 1

    # the same by hand, in the order of the official script: all inputs of a block, then its matrices
    rank, expected = 3, {}
    residual = copy.deepcopy(aligned)
    for i in range(3):
        kinds = ("q_proj", "v_proj")
        safe = {k: outputs_on(aligned, harmful, f"{i}.self_attn.{k}", aligned) for k in kinds}
        wanted = {k: outputs_on(residual, task, f"{i}.self_attn.{k}", aligned) for k in kinds}
        for kind in kinds:
            W = linears(residual, "all")[f"{i}.self_attn.{kind}"].weight
            U, S, Vh = torch.linalg.svd(W.detach(), full_matrices=False)
            V_s, V_t = (torch.linalg.svd(x[kind])[0][:, :n] for x, n in ((safe, 5), (wanted, 6)))
            C = torch.eye(len(W)) - V_s @ V_s.T
            B, A = V_t @ V_t.T @ U[:, :rank] * S[:rank].sqrt(), S[:rank].sqrt()[:, None] * Vh[:rank]
            expected[f"{i}.self_attn.{kind}"] = C @ B @ A
            with torch.no_grad():
                W.sub_(C @ B @ A)
    for name, module in salora.adapted_layers(pair.model, ["q_proj", "v_proj"]).items():
        product = module.lora_B["default"].weight @ module.lora_A["default"].weight
        assert torch.allclose(product, expected[name], atol=1e-4), name
        assert torch.allclose(module.base_layer.weight, linears(residual, "all")[name].weight, atol=1e-4), name


def outputs_on(model, rows, name, weights):
    """W X [m, tokens] of one matrix, X its inputs in `model` at the rows' tokens from the third on."""
    seen = []
    handle = linears(model, "all")[name].register_forward_pre_hook(lambda m, args: seen.append(args[0][0, 2:]))
    for row in rows:
        model(input_ids=torch.tensor([row["input_ids"]]))
    handle.remove()
    return (torch.cat(seen) @ linears(weights, "all")[name].weight.T).T.detach()


def test_salora_needs_a_token_of_an_answer(pair):
    rows = [{**row, "prompt": len(row["input_ids"])} for row in random_rows(3)]
    with pytest.raises(UserError, match="no row of SaLoRA's has a token of an answer.*answers_only=false"):
        salora.leading_outputs(pair.model, rows, linears(pair.model, ["q_proj"]), 2, True)


def test_salora_protects_the_leading_outputs_on_harmful_prompts(pair):
    rows = random_rows(5, seed=1)
    modules = {n: m for n, m in linears(pair.model, ["down_proj"]).items() if n.startswith("0.")}
    ((U, energy),) = salora.leading_outputs(pair.model, rows, modules, 4).values()
    outputs = []
    handle = modules["0.mlp.down_proj"].register_forward_hook(lambda module, args, out: outputs.append(out[0]))
    for row in rows:  # one by one: no padding
        pair.model(input_ids=torch.tensor([row["input_ids"]]))
    handle.remove()
    left, s, _ = torch.linalg.svd(torch.cat(outputs).detach().T, full_matrices=False)
    assert torch.allclose(U @ U.T, left[:, :4] @ left[:, :4].T, atol=1e-4)
    assert energy == pytest.approx((s[:4].square().sum() / s.square().sum()).item(), rel=1e-4)


def test_projecting_b_is_training_behind_a_fixed_c():
    """The hooks against the paper's form, C a factor of the forward pass, under AdamW with weight decay."""
    torch.manual_seed(0)
    U = torch.linalg.qr(torch.randn(8, 3))[0]
    C, x, y = torch.eye(8) - U @ U.T, torch.randn(6, 20), torch.randn(8, 20)
    A0, B0 = torch.randn(2, 6), torch.randn(8, 2)
    products = []
    for behind in (True, False):
        A, B = A0.clone().requires_grad_(), (B0 if behind else C @ B0).clone().requires_grad_()
        optimizer = torch.optim.AdamW([A, B], lr=0.05, weight_decay=0.3)
        for _ in range(20):
            optimizer.zero_grad()
            ((C @ B if behind else B) @ A @ x - y).square().mean().backward()
            with torch.no_grad():
                if not behind:
                    salora.project_(B.grad, U)
                optimizer.step()
                if not behind:
                    salora.project_(B, U)
        products.append(C @ B @ A)
    assert torch.allclose(*products, atol=1e-4) and (products[0] - C @ B0 @ A0).norm() > 0.5


def test_salora_says_what_it_needs(pair):
    context = SimpleNamespace(loaded=pair)
    with pytest.raises(UsageError, match="method=salora.*no full-parameter form; give model.lora="):
        SaLoRA("salora").training_data([], context, random.Random(0))
    pair.model = add_lora(pair.model, LORA)
    with pytest.raises(UserError, match="method.safety_rank=16 leaves an adapted layer of 16 outputs"):
        SaLoRA("salora", safety_rank=16).training_data([], context, random.Random(0))
    with pytest.raises(UserError, match="method.modules=.'down_proj'. names no matrix that model.lora adapts"):
        SaLoRA("salora", modules=["down_proj"]).training_data([], context, random.Random(0))
    with pytest.raises(UsageError, match="method.task_rank=0"):
        SaLoRA("salora", task_rank=0)


# --- errors, before anything is trained ----------------------------------------------------------------
@pytest.mark.parametrize("method", [AsFT("asft"), SafeLoRA("safelora")], ids=["asft", "safelora"])
def test_the_base_is_checked_first(pair, method, tmp_path):
    train = lambda: method.training_data([], context_of(pair), random.Random(0))  # noqa: E731
    good, pair.base = pair.base, None
    with pytest.raises(UserError, match=rf"method={method.name}.*model\.base="):
        train()
    pair.base = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="could not be loaded"):
        train()
    make_llama(hidden=16).save_pretrained(tmp_path / "small")
    pair.base = str(tmp_path / "small")
    with pytest.raises(UserError, match="does not have the shapes"):
        train()
    pair.base = pair.source
    with pytest.raises(UserError, match="no direction of the alignment"):
        train()
    pair.base = good
    method.modules = ["w_proj"]
    with pytest.raises(UserError, match=r"method\.modules=\['w_proj'\] not found.*q_proj"):
        train()
    method.modules = ["down_proj"]
    pair.model = add_lora(pair.model, LORA)  # adapts q_proj and v_proj
    with pytest.raises(UserError, match=r"method\.modules=.*no matrix that trains.*target_modules"):
        train()


def test_safe_lora_cannot_project_more_matrices_than_there_are(pair):
    with pytest.raises(UserError, match="method.number=22 is more than the 21 matrices"):
        prepared(SafeLoRA("safelora", select="number", number=22), pair)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AsFT("asft", lam=-1), "method.lam=-1"),
        (lambda: AsFT("asft", operator="c"), "method.operator=c is not valid; use one of official"),
        (lambda: AsFT("asft", rank=0), "method.rank=0"),
        (lambda: AsFT("asft", energy=0), "method.energy=0"),
        (lambda: AsFT("asft", modules="q_proj"), "method.modules=q_proj"),
        (lambda: AsFT("asft", energy=0.5), "method.energy=0.5 .*only method.operator=projector_k reads it"),
        (lambda: AsFT("asft", lora_scaling=1), "method.lora_scaling=1"),
        (lambda: SafeLoRA("s", number=3), "method.number=3 .*only method.select=number reads it"),
        (lambda: SafeLoRA("s", select="number", tau=0.1), "method.tau=0.1 .*only method.select=threshold reads it"),
        (lambda: SaLoRA("s", scaling=0), "method.scaling=0 .*above 0"),
        (lambda: SaLoRA("s", task_rank=None, n_task=4), "method.n_task=4 .*only method.task_rank"),
        (lambda: SaLoRA("s", response_tokens=0), "method.response_tokens=0"),
        (lambda: SafeLoRA("s", select="best"), "method.select=best"),
        (lambda: SafeLoRA("s", tau=2), "method.tau=2"),
        (lambda: SafeLoRA("s", number=0), "method.number=0"),
        (lambda: SafeLoRA("s", modules="q_proj"), "method.modules=q_proj"),
        (lambda: SPPFT("sppft", layers="middle"), "method.layers=middle"),
        (lambda: SPPFT("sppft", layers=[3, 1]), "method.layers="),
        (lambda: SPPFT("sppft", layers=[1]), "method.layers="),
        (lambda: Localisation(alpha=1), "method.localisation.alpha=1"),
        (lambda: Localisation(alpha="high"), "method.localisation.alpha=high"),
        (lambda: Localisation(n_queries=1), "method.localisation.n_queries=1"),
    ],
)
def test_impossible_settings_are_refused(build, message):
    with pytest.raises(UsageError, match=message.replace("[", r"\[")):
        build()


def test_sppft_refuses_ranges_it_cannot_freeze(pair):
    with pytest.raises(UserError, match=r"method.layers=\[1, 3\] lies outside the model's layers 0\.\.2"):
        prepared(SPPFT("sppft", layers=[1, 3]), pair)
    assert all(p.requires_grad for p in pair.model.parameters())
    pair.model = add_lora(pair.model, LORA)
    with pytest.raises(UserError, match="nothing that trains is left"):
        prepared(SPPFT("sppft", layers=[0, 2]), pair)


def test_localisation_needs_prompts(pair):
    pools = SimpleNamespace(anchors=[], sae=[], benign=[Example("1", "how are you")])
    context = SimpleNamespace(loaded=pair, pools=pools)
    with pytest.raises(UserError, match="pools anchors and sae: 0.*pool benign: 1"):
        SPPFT("sppft").training_data([], context, random.Random(0))


def test_published_ranges_are_a_models_own_and_no_part_of_other_runs():
    cfg = config.compose(["method=sppft", "+model.safety_layers=[6,14]"])
    assert list(cfg.method.layers) == [6, 14] and config.compose(["method=sppft"]).method.layers == "auto"
    assert identity.run_id(cfg) != identity.run_id(config.compose(["method=sppft"]))
    sft = config.compose(["method=sft", "+model.safety_layers=[6,14]"])
    assert identity.run_id(sft) == identity.run_id(config.compose(["method=sft"]))


def test_layers_count_from_0_and_include_both_ends(pair):
    method = prepared(SPPFT("sppft", layers=[1, 1]), pair)
    frozen = [any(not p.requires_grad for p in block.parameters()) for block in decoder_layers(pair.model)]
    assert frozen == [False, True, False] and method.extra_data() == {}


def test_random_rows_train_through_a_frozen_block(pair):
    """Gradients flow through the frozen layers to those below."""
    prepared(SPPFT("sppft", layers=[1, 2]), pair)
    row = random_rows(1)[0]
    pair.model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss.backward()
    assert decoder_layers(pair.model)[0].mlp.down_proj.weight.grad.abs().max() > 0
    assert decoder_layers(pair.model)[1].mlp.down_proj.weight.grad is None
