"""Variants of the coupling (ours): a soft constraint, a V that is refitted, other spaces, LoRA; formulas and runs."""

import copy
import json
import math

import pytest
import torch
from omegaconf import OmegaConf

from cwac.constraints import targets
from cwac.constraints.reference import Reference
from cwac.constraints.settings import Activation, Weight
from cwac.constraints.subspace import Constraint, fit_subspace
from cwac.constraints.targets import LogitsTarget, ResidualTarget
from cwac.constraints.weight import constrained, fit_bases, freeze_others_
from cwac.core import config, identity
from cwac.core.errors import UsageError
from cwac.core.run_dir import Run
from cwac.methods.base import Sizes
from cwac.methods.cwac import CWAC
from cwac.models.layers import linears
from cwac.models.loading import add_lora
from cwac.training import engine
from tests.conftest import assert_only_the_anchors_are_held, random_rows
from tests.helpers.optimizer import step_adamw
from tests.helpers.training import cell, leak, stop_at
from train import run_cell

PROMPTS = [{**row, "prompt": 4} for row in random_rows(6, low=8, seed=5)]
LORA = {"r": 4, "alpha": 8, "target_modules": "all-linear"}


def moved(model, by=0.02, seed=3):
    """A copy with every parameter changed."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(by * torch.randn(p.shape, generator=generator))
    return model


# --- soft ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True])
def test_the_soft_gradient_is_autograds(llama, lora):
    model = add_lora(llama, OmegaConf.create(LORA)) if lora else llama
    bases = fit_subspace(model, random_rows(3, seed=1), "all", energy=0.9)
    constraint, mu = Constraint(linears(model, "all"), bases), 0.7
    with torch.no_grad():
        for _, layer, _, _ in constraint.entries:
            layer.weight.add_(0.1 * torch.randn_like(layer.weight))
    weights = [layer.weight for _, layer, _, _ in constraint.entries]
    penalty = sum((layer.weight @ V - A).square().sum() for _, layer, V, A in constraint.entries)
    exact = torch.autograd.grad(mu * penalty, weights)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    constraint.add_penalty_gradients_(mu)
    assert all((w.grad - 1 - g).abs().max() < 1e-6 for w, g in zip(weights, exact, strict=True))
    assert max(g.abs().max() for g in exact) > 1e-2


def test_a_stronger_penalty_leaks_less_and_none_is_exact(llama):
    anchors, rows = random_rows(3, seed=1), random_rows(24, seed=2)
    drift = []
    for mu in (0.0, 1.0, 100.0):
        model = copy.deepcopy(llama)
        constraint = Constraint(linears(model, "all"), fit_subspace(model, anchors, "all", energy=0.9))
        optimizer = torch.optim.SGD(model.parameters(), lr=2e-3)
        for i in range(20):
            ids = torch.tensor([rows[i]["input_ids"]])
            model(ids, labels=ids).loss.backward()
            constraint.add_penalty_gradients_(mu)
            optimizer.step()
            optimizer.zero_grad()
        drift.append(sum(float((layer.weight.detach() @ V - A).norm()) for _, layer, V, A in constraint.entries))
    assert 0 < drift[2] < 0.5 * drift[1] < 0.5 * drift[0]


# --- refresh ---------------------------------------------------------------------------------------------------


def refreshing(model, rows, every, **more):
    method = CWAC("weight_only", weight=Weight(refresh_steps=every, energy=0.9, **more))
    modules, _ = constrained(model, method.weight)
    method._constraint, method._anchors = Constraint(modules, fit_bases(model, rows, method.weight)), rows
    return method


def test_a_refit_describes_the_current_model_on_the_same_rows(llama):
    rows = random_rows(4, seed=1)
    method = refreshing(llama, rows, 2)
    start = copy.deepcopy(method._constraint.state_dict())
    for p, q in zip(llama.parameters(), moved(llama).parameters(), strict=True):
        p.data.copy_(q)
    with torch.no_grad():
        method.after_step(llama)  # projected; not refitted yet
    assert torch.equal(method._constraint.state_dict()["V"]["0.down_proj"], start["V"]["0.down_proj"])
    for name, layer, V, A in method._constraint.entries:
        assert torch.allclose(layer.weight @ V, A, atol=1e-5), name
    with torch.no_grad():
        method.after_step(llama)
    fresh = fit_subspace(llama, rows, ["down_proj"], energy=0.9)
    for name, layer, V, A in method._constraint.entries:
        assert torch.equal(V, fresh[f"{name.split('.')[0]}.down_proj"].V)
        assert torch.allclose(A, layer.weight @ V, atol=1e-6)
    assert not torch.equal(method._constraint.state_dict()["V"]["1.down_proj"], start["V"]["1.down_proj"])
    assert method.protected() == {}  # nothing is claimed about the aligned model's weights


def test_a_closed_constraint_at_full_energy_has_nothing_to_refit(llama):
    """Theorem 1: its anchors' inputs do not move, so V spans what it spanned."""
    anchors, rows = random_rows(3, seed=1), random_rows(24, seed=2)
    bases = fit_subspace(llama, anchors, "all", energy=1.0)
    constraint = Constraint(linears(llama, "all"), bases)
    freeze_others_(llama, linears(llama, "all"), constraint)
    step_adamw(llama, rows, constraint, steps=10)
    for name, basis in fit_subspace(llama, anchors, "all", energy=1.0).items():
        assert (basis.V.T @ bases[name].V).square().sum() == pytest.approx(basis.rank, abs=1e-2), name


# --- every -----------------------------------------------------------------------------------------------------


def test_weights_drift_between_projections_and_are_pinned_at_each_and_at_the_end(llama):
    method = CWAC("weight_only", weight=Weight(project_every=3, energy=0.9))
    method._context = Sizes(steps=7)
    modules, _ = constrained(llama, method.weight)
    method._constraint = Constraint(modules, fit_bases(llama, random_rows(4, seed=1), method.weight))
    pinned = []
    for _ in range(7):
        with torch.no_grad():
            for _, layer, _, _ in method._constraint.entries:
                layer.weight += 0.01 * torch.randn_like(layer.weight)
            method.after_step(llama)
        drift = [(layer.weight @ V - A).norm().item() for _, layer, V, A in method._constraint.entries]
        assert max(drift) < 1e-4 or min(drift) > 1e-2
        pinned.append(max(drift) < 1e-4)
    assert pinned == [False, False, True, False, False, True, True]  # step 7 is the last
    assert method.protected().keys() == modules.keys()


# --- spaces ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ResidualTarget, LogitsTarget])
def test_the_aligned_model_is_at_distance_zero_where_the_gradient_is_too(llama, kind):
    target = kind(llama, PROMPTS, "response:3", [0, 1])
    loss = target.loss(llama, range(len(target)))
    loss.backward()
    assert abs(float(loss)) < 1e-6 and max(p.grad.abs().max() for p in llama.parameters() if p.grad is not None) < 1e-3
    assert target.drift(llama)[kind.metric] == pytest.approx(0, abs=1e-6)
    assert target.drift(moved(llama))[kind.metric] > 1e-4


def test_the_residual_distance_is_its_formula(llama):
    now, layers = moved(llama), [0, 1]
    target = ResidualTarget(llama, PROMPTS, "response:3", layers)
    total = []
    for layer in layers:
        base, then = (
            torch.stack(
                [
                    m(torch.tensor([r["input_ids"][:7]]), output_hidden_states=True).hidden_states[layer + 1]
                    for r in PROMPTS
                ]
            )[:, 0, 3:]
            for m in (llama, now)
        )  # [N, Q, d]
        total.append((then - base).square().sum(-1).mean() / base.square().sum(-1).mean())
    assert float(target.loss(now, range(len(PROMPTS)))) == pytest.approx(float(sum(total) / 2), rel=1e-5)


def test_the_kl_and_its_gradient_are_their_formulas(llama):
    now = moved(llama)
    target = LogitsTarget(llama, PROMPTS[:1], "response:3", [1])
    ids = torch.tensor([PROMPTS[0]["input_ids"][:7]])
    with torch.no_grad():
        p, q = (m(ids).logits[0, 3:].softmax(-1) for m in (llama, now))  # last prompt token, three of the answer
    assert float(target.loss(now, [0])) == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)
    logits = now(ids).logits.detach().requires_grad_()
    base = target.remembered([0], ids.device)
    target.distance(target.features(logits[:, 3:]), base).mean().backward()
    assert torch.allclose(logits.grad[0, 3:], (q - p) / 4, atol=1e-6) and not logits.grad[0, :3].any()


@pytest.mark.parametrize("kind", [ResidualTarget, LogitsTarget])
def test_a_baseline_too_large_to_keep_is_computed_again(llama, kind, monkeypatch):
    now, rows = moved(llama), [PROMPTS[0], {**PROMPTS[1], "input_ids": PROMPTS[1]["input_ids"][:5]}]
    kept = kind(llama, rows, "response:3", [1, 2])
    monkeypatch.setattr(targets, "CACHE_BYTES", 0)
    again = kind(llama, rows, "response:3", [1, 2])
    assert not again.baseline and isinstance(again.reference, Reference)
    assert float(again.loss(now, [0, 1])) == pytest.approx(float(kept.loss(now, [0, 1])), rel=1e-5)
    alone = [float(kept.loss(now, [i])) for i in (0, 1)]  # padding counts for nothing
    assert float(kept.loss(now, [0, 1])) == pytest.approx(sum(alone) / 2, rel=1e-4)


# --- what is refused, and what keeps its name -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Weight(penalty_weight=0), "method.weight.penalty_weight=0 .*give mu > 0"),
        (lambda: Weight(penalty_weight=math.inf), "method.weight.penalty_weight=inf .*give mu > 0"),
        (lambda: Weight(penalty_weight=1.0, where="gradient"), "method.weight.where=gradient .*where=update"),
        (lambda: Weight(refresh_steps=0), "method.weight.refresh_steps=0 .*at least 1"),
        (lambda: Weight(project_every=0), "method.weight.project_every=0 .*at least 1"),
        (lambda: Weight(project_every=2, where="gradient"), "method.weight.project_every=2 .*where=gradient"),
        (lambda: Weight(refresh_steps=True), "method.weight.refresh_steps=True .*at least 1"),
        (lambda: Weight(response_tokens=True), "method.weight.response_tokens=True .*at least 0"),
        (lambda: Weight(layers=[True]), "method.weight.layers=.*list of layer numbers"),
        (lambda: Activation(lam=True), "method.activation.lam=True .*at least 0"),
        (lambda: Activation(lam=math.inf), "method.activation.lam=inf .*at least 0"),
        (lambda: Activation(n_latents=True), "method.activation.n_latents=True .*at least 1"),
        (lambda: Activation(n_prompts=0), "method.activation.n_prompts=0 .*at least 1"),
        (lambda: Activation(space="attention"), "method.activation.space=attention .*residual"),
        (lambda: Activation(space="logits"), "method.activation.positions=last .*response:16"),
        (lambda: Activation(space="residual", gate="topk"), "method.activation.gate=topk .*leave it at tau"),
        (lambda: Activation(space="residual", units="relative"), "method.activation.units=relative .*at raw"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_remedy(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_runs_of_before_keep_their_names():
    """The identity of every method's default run is what it was before the keys existed."""
    new = {
        "method.weight.penalty_weight",
        "method.weight.refresh_steps",
        "method.weight.project_every",
        "method.activation.space",
    }
    ids = {}
    for name in ("cwac", "cwac_literal", "weight_only", "activation_only", "cwac_closed", "weight_only_closed"):
        cfg = config.compose([f"method={name}"])
        assert not new & set(identity.identity(cfg))
        ids[name] = identity.run_id(cfg)
    assert ids == BEFORE
    changed = {
        "weight.penalty_weight": 0.1,
        "weight.refresh_steps": 5,
        "weight.project_every": 4,
        "activation.space": "residual",
    }
    for key, value in changed.items():
        assert identity.identity(config.compose([f"method.{key}={value}"]))[f"method.{key}"] == value


BEFORE = {
    "cwac": "tiny-toy_sentiment-p0-cwac-s0-0fbfc78c",
    "cwac_literal": "tiny-toy_sentiment-p0-cwac_literal-s0-4b3c480e",
    "weight_only": "tiny-toy_sentiment-p0-weight_only-s0-6a17c24f",
    "activation_only": "tiny-toy_sentiment-p0-activation_only-s0-4c876b8e",
    "cwac_closed": "tiny-toy_sentiment-p0-cwac_closed-s0-fdf90bb5",
    "weight_only_closed": "tiny-toy_sentiment-p0-weight_only_closed-s0-65110cd7",
}
"""Recorded at 9ea77a2."""


# --- LoRA ------------------------------------------------------------------------------------------------------


def test_a_closed_lora_preserves_the_outputs_on_the_anchors_exactly(llama):
    anchors, task = random_rows(3, seed=1), random_rows(40, seed=2)
    reference = copy.deepcopy(llama)
    model = add_lora(llama, OmegaConf.create(LORA))
    modules = linears(model, "all")
    constraint = Constraint(modules, fit_subspace(model, anchors, "all", energy=1.0))
    constraint.project_weights_()
    freeze_others_(model, modules, constraint)
    step_adamw(model, task, constraint, steps=30, lr=1e-2)
    assert_only_the_anchors_are_held(model, reference, anchors)


# --- in miniature through train.py ------------------------------------------------------------------------------

MINIATURE = {
    "soft": ["method=weight_only_closed", "method.weight.penalty_weight=1"],
    "refresh": ["method=weight_only", "method.weight.refresh_steps=2"],
    "project_every": ["method=weight_only_closed", "method.weight.project_every=2"],
    "residual": ["method=cwac_closed", "method.activation.space=residual"],
    "logits": ["method=cwac_closed", "method.activation={space: logits, positions: 'response:4'}"],
    "lora": ["method=weight_only_closed", f"model.lora={json.dumps(LORA)}".replace('"', ""), "method.weight.energy=1"],
}


@pytest.mark.parametrize("variant", MINIATURE)
def test_it_trains_in_miniature(variant, tmp_path, artifacts):
    method, *more = MINIATURE[variant]
    more += ["train.max_steps=3", "method.weight.n_anchors=4", "eval.n_drift=4", "train.learning_rate=0.003"]
    cfg = cell(method.split("=")[1], tmp_path, artifacts, *more)
    run_cell(cfg)
    run = Run(cfg)
    rows = {(r["metric"], r["set"]): r["value"] for r in run.rows() if r["final"]}
    assert run.status["status"] == "done" and rows["weight_change", "anchors"] > 0
    # a refitted or a soft constraint claims nothing about the aligned model's weights, a hard one holds
    assert run.status["guard"] is (None if variant in ("soft", "refresh") else True)
    if variant in ("residual", "logits"):
        name = {"residual": "residual_distance", "logits": "kl"}[variant]
        assert rows[name, "anchors"] > 0 and rows[name, "heldout"] > 0
        # no autoencoder, so no rows for it; of the pool `step` this base refuses all prompts but one
        assert rows["extra_data", "harmful_prompts"] == 4 + cfg.pools.sizes.step - 1
        assert ("extra_data", "harmless_rows") not in rows
    if variant == "lora":
        assert leak(run, "weight_leak_all") < 1e-5


@pytest.mark.parametrize("key", ["refresh_steps", "project_every"])
def test_a_run_resumes_bit_for_bit_between_its_refits_or_projections(key, tmp_path, artifacts, monkeypatch):
    more = [f"method.weight.{key}=3", "method.weight.n_anchors=8", "train.learning_rate=0.003"]
    straight = cell("weight_only", tmp_path / "a", artifacts, *more)
    cut = cell("weight_only", tmp_path / "b", artifacts, *more)
    run_cell(straight)
    with monkeypatch.context() as patch:
        patch.setattr(engine.MethodCallback, "on_step_end", stop_at(5))
        with pytest.raises(RuntimeError, match="planted stop"):
            run_cell(cut)
    run_cell(cut)  # from step 4, after what was done at step 3
    assert Run(cut).status["weights_sha256"] == Run(straight).status["weights_sha256"]


def test_refitting_an_adapter_is_refused(tmp_path, artifacts):
    more = [*MINIATURE["lora"][1:], "method.weight.refresh_steps=2"]
    with pytest.raises(UsageError, match="method.weight.refresh_steps=2 .*null with model.lora"):
        run_cell(cell("weight_only_closed", tmp_path, artifacts, *more))
