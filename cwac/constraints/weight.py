"""Prepares the weight constraint of CWAC (arXiv:2604.12384, section 4.2): anchors, their subspace, what may train.

Deviations: see `cwac/methods/cwac.py`, whose settings these functions read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from torch import nn

from cwac.constraints.anchors import anchor_rows, prefilled_rows
from cwac.constraints.settings import Weight
from cwac.constraints.subspace import Basis, Constraint, fit_subspace, load_bases, save_bases
from cwac.core.cache import load_or_build
from cwac.core.checks import check
from cwac.data.examples import Example, Pools
from cwac.models.context import Context, artifact_key
from cwac.models.layers import linears


def constrained(model: nn.Module, weight: Weight) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """By name, the constrained matrices and those in `weight.unconstrained`; UserError if no matrix is constrained."""
    modules = linears(model, weight.modules, weight.layers)
    unconstrained = (
        linears(model, weight.unconstrained, weight.layers, "method.weight.unconstrained")
        if weight.unconstrained
        else {}
    )
    constrained_modules = {name: module for name, module in modules.items() if name not in unconstrained}
    check(
        constrained_modules,
        "weight.unconstrained",
        list(weight.unconstrained),
        "leave a matrix of method.weight.modules constrained",
    )
    return constrained_modules, unconstrained


def anchor_bases(model: nn.Module, context: Context, weight: Weight) -> dict[str, Basis]:
    """Input name -> the anchors' subspace in the aligned model, fitted once and cached."""
    rows = weight_anchors(model, context, weight)
    others = ("where", "freeze_others", "unconstrained", "penalty_weight", "refresh_steps", "project_every")
    settings = {k: v for k, v in asdict(weight).items() if k not in others}
    for name in ("prefill", "anchor_sources"):  # as before there was such a setting
        if not settings[name]:
            del settings[name]
    key = {**artifact_key(context), "format": 2, **settings}  # 2: without first_token, X holds every token

    def build(folder):
        save_bases(fit_bases(model, rows, weight), folder)

    return load_bases(load_or_build(context.artifacts, "subspace", key, build))


def weight_anchors(model: nn.Module, context: Context, weight: Weight) -> list[dict]:
    """The encoded anchors that V is fitted on."""
    prompts = anchor_prompts(context.pools, weight)
    rows = anchor_rows(model, context, prompts, weight.response_tokens)
    if weight.prefill is not None:
        rows += prefilled_rows(model, context, prompts, weight.response_tokens, weight.prefill)
    return rows


def anchor_prompts(pools: Pools, weight: Weight) -> list[Example]:
    """The prompts of the anchor pool that the settings ask for; UsageError where it has too few of them."""
    prompts, sources = pools.anchors, set(weight.anchor_sources)
    available = {name for e in prompts for name in (e.source, e.group) if name}
    remedy = f"the pool has no {', '.join(sorted(sources - available))}; it has {', '.join(sorted(available))}"
    check(sources <= available, "weight.anchor_sources", list(weight.anchor_sources), remedy)
    if sources:
        prompts = [e for e in prompts if {e.source, e.group} & sources]
    if (n := weight.n_anchors) is not None:
        remedy = f"the pool has {len(prompts)} such prompts: give at most that, or null for all"
        check(n <= len(prompts), "weight.n_anchors", n, remedy)
    return prompts[:n]


def fit_bases(model: nn.Module, rows: Sequence[dict], weight: Weight, progress: bool = True) -> dict[str, Basis]:
    settings = (weight.modules, weight.layers, weight.energy, weight.first_token)
    return fit_subspace(model, rows, *settings, progress=progress)


def freeze_others_(
    model: nn.Module,
    modules: dict[str, nn.Module],
    constraint: Constraint,
    unconstrained: dict[str, nn.Module] | None = None,
) -> None:
    """Freeze what is neither constrained nor `freed`; what was frozen before, as by peft, stays frozen."""
    trained = {id(layer.weight) for _, layer, _, _ in constraint.entries}
    for module in modules.values():  # with LoRA, B reads only what a constrained A lets through
        trained |= {id(layer.weight) for layer in getattr(module, "lora_B", {}).values()}
    trained |= {id(parameter) for module in (unconstrained or {}).values() for parameter in module.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in trained)
