"""Prepares the weight constraint of CWAC (arXiv:2604.12384, section 4.2).

It chooses the anchors, fits the subspace of their activations, and freezes the parameters that shall not train.

Deviations: see `cwac/methods/cwac.py`, whose settings these functions read.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict

from torch import nn

from cwac.constraints.anchors import anchor_rows, prefilled_rows
from cwac.constraints.settings import Weight
from cwac.constraints.subspace import Basis, Constraint, fit_subspace, load_bases, save_bases
from cwac.core.cache import load_or_build
from cwac.core.checks import check
from cwac.core.errors import UserError
from cwac.data.examples import Example, Pools
from cwac.models.adapters import active_adapters
from cwac.models.context import Context, artifact_key
from cwac.models.layers import linears, trains

log = logging.getLogger("cwac")


def constrained(
    model: nn.Module, weight: Weight, warn: bool = True
) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """By name, the constrained matrices, all of which train, and those in `weight.unconstrained`.

    Raises UserError where no matrix that trains is constrained: that would be plain fine-tuning with a certificate.
    """
    modules = linears(model, weight.modules, weight.layers)
    unconstrained = (
        linears(model, weight.unconstrained, weight.layers, "method.weight.unconstrained")
        if weight.unconstrained
        else {}
    )
    asked = {name: module for name, module in modules.items() if name not in unconstrained}
    check(
        asked,
        "weight.unconstrained",
        list(weight.unconstrained),
        "leave a matrix of method.weight.modules constrained",
    )
    training = {name: module for name, module in asked.items() if trains(module)}
    if not training:
        others = sorted({name.split(".")[-1] for name, module in linears(model, "all").items() if trains(module)})
        trained = f"what trains is {', '.join(others)}" if others else "no matrix of the model's blocks trains"
        raise UserError(
            f"method.weight.modules={named(weight.modules)} constrains no matrix that trains, so it would hold "
            f"nothing ({trained}): choose method.weight.modules among these, or all, or adapt others "
            "(model.lora.target_modules)"
        )
    if warn and len(training) < len(asked):
        idle = sorted({name.split(".")[-1] for name in asked.keys() - training.keys()})
        log.warning(
            "method.weight.modules=%s: %d of %d matrices do not train and are not constrained (%s)",
            *(named(weight.modules), len(asked) - len(training), len(asked), ", ".join(idle)),
        )
    return training, unconstrained


def named(modules: Sequence[str] | str) -> str:
    return modules if isinstance(modules, str) else f"[{','.join(modules)}]"


def anchor_bases(model: nn.Module, context: Context, weight: Weight) -> dict[str, Basis]:
    """Input name -> the subspace of the anchors' activations in the aligned model; fitted once and cached."""
    rows = weight_anchors(model, context, weight)
    others = ("where", "freeze_others", "unconstrained", "penalty_weight", "refresh_steps", "project_every")
    settings = {k: v for k, v in asdict(weight).items() if k not in others}
    # unset, these stay out of the key, so that artifacts that were cached before the settings existed are still found
    for name in ("prefill", "anchor_sources"):
        if not settings[name]:
            del settings[name]
    # format 2: where first_token is False, X holds every token, the first one included
    key = {**artifact_key(context), "format": 2, **settings}

    def build(folder):
        save_bases(fit_bases(model, rows, weight), folder)

    return load_bases(load_or_build(context.artifacts, "subspace", key, build))


def weight_anchors(model: nn.Module, context: Context, weight: Weight) -> list[dict]:
    """The encoded anchors on which V is fitted: refused prompts and, given `weight.prefill`, prefilled prompts."""
    prompts = anchor_prompts(context.pools, weight)
    rows = anchor_rows(model, context, prompts, weight.response_tokens)
    if weight.prefill is not None:
        rows += prefilled_rows(model, context, prompts, weight.response_tokens, weight.prefill)
    return rows


def anchors_used(model: nn.Module, context: Context, weight: Weight) -> int:
    """How many prompts `weight_anchors` uses: those that the model refuses, or all of them given `weight.prefill`."""
    rows = weight_anchors(model, context, weight)
    return len(rows) if weight.prefill is None else len(anchor_prompts(context.pools, weight))


def anchor_prompts(pools: Pools, weight: Weight) -> list[Example]:
    """The prompts of the anchor pool that the settings select. Raises UsageError if the pool has too few of them."""
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


def anchor_counts(model: nn.Module, context: Context, weight: Weight) -> dict[str, float]:
    """`anchors_used` of `anchors_given`: the prompts that V is fitted on, of those that the settings select."""
    given = anchor_prompts(context.pools, weight)
    return {"anchors_used": float(anchors_used(model, context, weight)), "anchors_given": float(len(given))}


def fit_bases(model: nn.Module, rows: Sequence[dict], weight: Weight, progress: bool = True) -> dict[str, Basis]:
    settings = (weight.modules, weight.layers, weight.energy, weight.first_token)
    return fit_subspace(model, rows, *settings, progress=progress)


def freeze_others_(
    model: nn.Module,
    modules: dict[str, nn.Module],
    constraint: Constraint,
    unconstrained: dict[str, nn.Module] | None = None,
) -> None:
    """Freeze every parameter that is neither constrained (`modules`) nor in `unconstrained`.

    Parameters that were frozen before, for instance by peft, stay frozen.
    """
    trained = {id(layer.weight) for _, layer, _, _ in constraint.entries}
    # with LoRA, B trains as well: it sees the input only through A, which is constrained
    for module in modules.values():
        trained |= {id(B.weight) for _, B, _ in active_adapters(module)}
    trained |= {id(parameter) for module in (unconstrained or {}).values() for parameter in module.parameters()}
    adapters = [n for n, p in model.named_parameters() if "lora_" in n and p.requires_grad and id(p) not in trained]
    if adapters:
        log.warning(
            "method.weight.freeze_others=true: %d tensors of the adapter are on nothing that is constrained and do "
            "not train (first: %s)",
            *(len(adapters), adapters[0]),
        )
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in trained)
