"""CWAC: coupled weight and activation constraints.

Peng, Zhang, Zeng, Jiang, Gao: "Preventing Safety Drift in Large Language Models via Coupled Weight and Activation
Constraints", ACL 2026, arXiv:2604.12384. Weight constraint: section 4.2, Eqs. 12-15. Activation constraint: section
4.1, Eqs. 9-11, 16. Algorithm 1. One class, six configurations: `cwac_literal`, `cwac`, `weight_only`,
`activation_only`, and ours, `cwac_closed` and `weight_only_closed`.

Deviations:
- `where: update` projects the applied update, as section 4.2 words it; `where: gradient` is Algorithm 1 to the letter,
  which AdamW undoes. See `cwac/subspace.py` for tau, the first token and V.
- Which layers, token positions, SAE sizes and ranking the paper used is not given; see `cwac/sae` for ours.
- Anchors are the harmful prompts followed by the aligned model's own refusal (ours), because the paper collects inputs
  "while the model processes (and refuses)" them.
- `modules: all` with `freeze_others` (ours) constrains every matrix that trains. Then the network's outputs on the
  anchor tokens are preserved exactly when V spans their activations: by induction over blocks, each block's input is
  unchanged, so each matrix sees inputs in its V, so its output is unchanged.
- L_safety is drawn and added once per optimizer step, so lambda does not grow with gradient accumulation (ours).
- `weight.soft`, `weight.refresh_steps` and `activation.space` (ours) vary the coupling one part at a time: a penalty
  instead of the projection, a V that follows the model, and another space than the autoencoder's (cwac/spaces.py).
"""

from __future__ import annotations

import json
import logging
import math
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from cwac.anchors import anchor_rows, encode_prompts, prefilled_rows
from cwac.artifacts import digest, load_or_build
from cwac.config import UserError
from cwac.data.examples import Example
from cwac.data.harmful import Pools
from cwac.methods.base import Context, Method, Rehearsal, Sizes, artifact_key, check, draw, is_number, share_of
from cwac.models import base_layer, input_group, linears
from cwac.ranks import reshard
from cwac.subspace import Basis, Constraint, fit_subspace, load_bases, save_bases

log = logging.getLogger(__name__)
SPACES = ("sae", "residual", "logits")
"""What the activation constraint may hold."""


@dataclass
class Weight:
    """The weight constraint's settings."""

    where: str = "update"
    """`update` (ours, sound) or `gradient` (Algorithm 1)."""
    modules: Sequence[str] | str = ("down_proj",)
    """`all`, or names of linear layers; the paper constrains down_proj."""
    layers: Sequence[int] | None = None
    """Block indices; None for all (App. B.4 says "intermediate layers" without naming them)."""
    energy: float = 0.99
    """Share of the anchors' squared norm that V holds; stands for the paper's unspecified tau."""
    first_token: bool = True
    """Give the first token's input a direction of its own in V."""
    freeze_others: bool = False
    """Train nothing but the constrained matrices: no embeddings, norms, head or biases."""
    free: Sequence[str] = ()
    """Names of linear layers that train without a constraint all the same: a bypass opened on purpose."""
    soft: float | None = None
    """mu > 0: the penalty mu ||(W - W_0) V||_F^2 an optimizer step, on the same matrices, instead of the projection.

    Its gradient is added once a step, before clipping. With LoRA the adapter's A is penalised: mu ||A V||_F^2."""
    refresh_steps: int | None = None
    """n: after every n optimizer steps V and A are refitted from the current model on the same anchor rows.

    Then A = W_now V_now: what is preserved is no longer the aligned model's output but that of the last refit, so
    drift until then is accepted, and directions that only the old V held are free again."""
    every: int = 1
    """n: project after every n-th optimizer step and after the last, not after each.

    The weights that a run ends with are pinned all the same; between, they drift for up to n - 1 steps, and a
    projection costs the same for n steps as for one. Of where=update alone."""
    n_anchors: int | None = None
    """How many of the anchor pool's prompts to use; None for all."""
    anchor_sources: Sequence[str] = ()
    """Only prompts of these sources or harm categories, such as `advbench` or `theft`; () for all."""
    response_tokens: int = 16
    """Tokens of the aligned model's own refusal that follow each anchor prompt; 0 for prompts alone."""
    prefill: str | None = None
    """An opening: every anchor prompt is an anchor once more, with it in the model's mouth and how it goes on."""

    def __post_init__(self):
        check(self.where in ("update", "gradient"), "weight.where", self.where, "use update or gradient")
        check(
            is_number(self.energy) and 0 < self.energy <= 1,
            "weight.energy",
            self.energy,
            "give a share in (0, 1], e.g. 0.99",
        )
        check(
            isinstance(self.response_tokens, int) and self.response_tokens >= 0,
            "weight.response_tokens",
            self.response_tokens,
            "give a whole number of at least 0",
        )
        opening = self.prefill is None or (isinstance(self.prefill, str) and bool(self.prefill.strip()))
        check(opening, "weight.prefill", self.prefill, "give an opening such as 'Sure, here is', or null")
        if self.soft is not None:
            positive = is_number(self.soft) and 0 < self.soft < math.inf
            check(positive, "weight.soft", self.soft, "give mu > 0, or null for the hard projection")
            remedy = "projects gradients, which a penalty replaces: use where=update with weight.soft, or soft=null"
            check(self.where == "update", "weight.where", self.where, remedy)
        if (n := self.refresh_steps) is not None:
            whole = isinstance(n, int) and not isinstance(n, bool) and n >= 1
            check(whole, "weight.refresh_steps", n, "give a whole number of at least 1, or null")
        whole = isinstance(self.every, int) and not isinstance(self.every, bool) and self.every >= 1
        check(whole, "weight.every", self.every, "give a whole number of at least 1")
        hard = self.every == 1 or (self.where == "update" and self.soft is None)
        check(hard, "weight.every", self.every, "is of the hard projection of updates: use 1 with gradient or soft")
        if isinstance(self.modules, str):
            check(self.modules == "all", "weight.modules", self.modules, "use all, or a list such as [down_proj]")
        else:
            self.modules = tuple(self.modules)
        named = not isinstance(self.free, str) and all(isinstance(name, str) for name in self.free)
        check(named, "weight.free", self.free, "give a list of linear layers such as [down_proj], or []")
        self.free = tuple(self.free)
        named = not isinstance(self.anchor_sources, str) and all(isinstance(name, str) for name in self.anchor_sources)
        check(named, "weight.anchor_sources", self.anchor_sources, "give a list such as [advbench], or [] for all")
        self.anchor_sources = tuple(self.anchor_sources)
        if self.layers is not None:
            listed = not isinstance(self.layers, int | str) and all(isinstance(i, int) for i in self.layers)
            check(listed, "weight.layers", self.layers, "give a list of block indices, or null for all")
            self.layers = tuple(self.layers)


@dataclass
class Activation:
    """The activation constraint's settings."""

    lam: float = 0.5
    """lambda of Eq. 16."""
    n_latents: int = 100
    """Safety-critical latents kept (section 4.1)."""
    n_prompts: int = 4
    """Harmful prompts per optimizer step, B of Eq. 11 (the paper gives none)."""
    gate: str = "tau"
    """`tau` (ours) keeps a gradient for a latent that left the TopK; `topk` is the formula to the letter."""
    rank: str = "contrast+attribution"
    """How latents are ranked; `activation` is the literal reading (mean activation on harmful prompts)."""
    positions: str = "last"
    """Where latents are read: `last` prompt token, or `response:n`."""
    units: str = "raw"
    space: str = "sae"
    """What is held: `sae` the latents, or ours: `residual` the residual stream at the autoencoder's layers, `logits`
    the next-token distribution over the refusal (`positions: response:n`). See cwac/spaces.py."""
    sae: dict = field(default_factory=dict)
    """Fields of `cwac.sae.SAEConfig`."""

    def __post_init__(self):
        check(isinstance(self.lam, int | float) and self.lam >= 0, "activation.lam", self.lam, "give a number >= 0")
        for key in ("n_latents", "n_prompts"):
            value = getattr(self, key)
            check(isinstance(value, int) and value >= 1, f"activation.{key}", value, "give a whole number >= 1")
        gates = ("tau", "topk", "union", "base", "preact")
        check(self.gate in gates, "activation.gate", self.gate, f"use one of {', '.join(gates)}")
        ranks = ("contrast+attribution", "contrast", "activation", "cosine", "random")
        check(self.rank in ranks, "activation.rank", self.rank, f"use one of {', '.join(ranks)}")
        check(self.units in ("raw", "relative"), "activation.units", self.units, "use raw or relative")
        check(self.space in SPACES, "activation.space", self.space, f"use one of {', '.join(SPACES)}")
        place = r"last|prompt|(template|response):[1-9]\d*"
        check(
            re.fullmatch(place, str(self.positions)), "activation.positions", self.positions, "use last or response:4"
        )
        if self.space != "sae":
            for key in ("n_latents", "gate", "rank", "units"):
                usual, value = getattr(type(self), key), getattr(self, key)
                remedy = f"only space=sae reads it: leave it at {usual}, or use method.activation.space=sae"
                check(value == usual, f"activation.{key}", value, remedy)
        if self.space == "logits":
            remedy = "space=logits holds the refusal's tokens: use method.activation.positions=response:16"
            check(str(self.positions).startswith("response:"), "activation.positions", self.positions, remedy)


@dataclass
class CWAC(Method):
    """Either half may be None: then it is the other's ablation (paper, Table 5)."""

    weight: Weight | None = None
    activation: Activation | None = None

    needs_step_hooks: ClassVar[bool] = True

    def __post_init__(self):
        if self.weight is None and self.activation is None:
            raise UserError(f"method={self.name} has neither weight nor activation; set one, or use method=sft")
        self._constraint: Constraint | None = None
        self._context: Context | Sizes = Sizes()
        self._report: dict[str, float] = {}
        self._targets: dict[str, Any] = {}
        self._anchors: list[dict] = []
        """Rows that V is refitted on, with `refresh_steps` alone; a rehearsal has none and refits nothing."""
        self._steps = 0
        """Optimizer steps done."""

    def extra_data(self) -> dict[str, int]:
        pools, prompts, harmless = self._context.pools, [], 0
        if self.weight is not None:
            prompts += anchor_prompts(pools, self.weight)
        if self.activation is not None:
            prompts += pools.step
            if self.activation.space == "sae":
                prompts, harmless = [*prompts, *pools.sae], len(pools.benign)
        return {"harmful_prompts": len(prompts)} | ({"harmless_rows": harmless} if harmless else {})

    def training_data(self, train: list[Example], context: Context, rng: random.Random) -> list[Example]:
        pools = context.pools
        if self.weight is not None:
            anchor_prompts(pools, self.weight)
        if self.activation is not None:
            n, there = self.activation.n_prompts, len(pools.step)
            check(n <= there, "activation.n_prompts", n, f"the pool has {there}: give at most that")
        return train

    def setup(self, model: nn.Module, context: Context) -> None:
        self._context = context
        if self.activation is not None:
            setup = self._setup_activation if self.activation.space == "sae" else self._setup_space
            setup(model, context)
        if self.weight is not None:
            self._setup_weight(model, context)

    def rehearse(self, model: nn.Module, sizes: Sizes) -> Rehearsal:
        self._context, found = sizes, Rehearsal()
        if self.activation is not None and self.activation.space != "sae":
            n, tokens = self.activation.n_prompts, sizes.prompt_tokens
            answer = response_tokens(self.activation.positions)
            row = {"input_ids": [1] * (tokens + answer), "prompt": tokens}
            self._targets["anchors"] = self._target(model, [row] * n)
        elif self.activation is not None:
            from cwac.sae import RoutedSAE, SAEConfig, SafetyTarget, slots_of

            activation, config = self.activation, SAEConfig(**self.activation.sae)
            d = model.get_input_embeddings().embedding_dim
            slots = slots_of(model, config.slots)
            with model.device:
                sae = RoutedSAE(d, config.m or 8 * d, config.latents(d), slots, config.router).requires_grad_(False)
            for parameter in sae.parameters():  # written to, or the operating system gives no memory
                parameter.fill_(1 / d)
            target = (activation.n_latents, activation.n_prompts, sizes.prompt_tokens, activation.gate)
            self._targets["anchors"] = SafetyTarget.stand_in(sae, *target, sizes.shared_tokens)
            found.held["SAE"] = list(sae.parameters())
            # weights, gradients, two moments; and the tokens it is fitted on
            fitted = 4 * sum(p.nbytes for p in sae.parameters())
            tokens = config.tokens if config.cached_tokens is None else min(config.cached_tokens, config.tokens)
            found.before["fit of the SAE"] = fitted + min(config.buffer_gib * 2**30, 2 * len(slots) * d * tokens)
        if self.weight is not None:
            modules, freed = constrained(model, self.weight)
            dims = {input_group(name): base_layer(module).in_features for name, module in modules.items()}
            bases = {
                name: Basis(torch.eye(d, max(1, round(sizes.rank_share * d))), 1.0, 1) for name, d in dims.items()
            }
            self._constraint = Constraint(modules, bases)
            if self.weight.freeze_others:
                freeze_others_(model, modules, self._constraint, freed)
            moved = {id(V): V for _, _, V, _ in self._constraint.entries}.values()
            found.held["V and A of the constraint"] = [*moved, *(A for *_, A in self._constraint.entries)]
            found.before["fit of the subspaces"] = sum(8 * d * d for d in dims.values())  # covariances in float64
        return found

    def start(self, model: nn.Module) -> None:
        if self._constraint is not None:
            self._constraint.keep_own_rows()

    def penalty(self, model: nn.Module, step: int) -> torch.Tensor | None:
        if self.activation is None:
            return None
        context = self._context
        target = self._targets["anchors"]
        mine, share = share_of(draw(len(target), self.activation.n_prompts, context.seed, step), context)
        return self.activation.lam * share * target.loss(model, mine)

    def after_backward(self, model: nn.Module) -> None:
        if self._constraint is not None and self.weight.soft is not None:
            self._constraint.add_soft_gradients_(self.weight.soft)

    def before_step(self, model: nn.Module) -> None:
        if self._constraint is not None and self.weight.where == "gradient":
            self._constraint.project_gradients_()

    def after_step(self, model: nn.Module) -> None:
        if self._constraint is None:
            return
        weight = self.weight
        self._steps += 1
        refit = weight.refresh_steps is not None and self._steps % weight.refresh_steps == 0
        due = refit or self._steps % weight.every == 0 or self._steps == self._context.steps
        if weight.where == "update" and weight.soft is None and due:
            self._constraint.project_weights_()
        if refit and self._anchors:
            bases = fit_bases(model, self._anchors, self.weight, progress=False)
            reshard(model)
            self._constraint.refit_(bases)

    def state_dict(self) -> dict:
        if self.weight is None or (self.weight.refresh_steps is None and self.weight.every == 1):
            return {}
        moved = self._constraint.state_dict() if self.weight.refresh_steps is not None else {}
        return {"steps": self._steps, **moved}

    def load_state_dict(self, state: dict) -> None:
        if state:
            self._steps = state["steps"]
            if self.weight.refresh_steps is not None:
                self._constraint.load_state_dict(state)

    def protected(self) -> dict[str, torch.Tensor]:
        """None where the drift from the aligned model is not pinned: under a penalty, or once V was refitted."""
        weight = self.weight
        if self._constraint is None or weight.soft is not None or weight.refresh_steps is not None:
            return {}
        return {name: V for name, _, V, _ in self._constraint.entries}

    def report(self, model: nn.Module) -> list[dict]:
        rows = [{"metric": name, "set": "train", "value": value} for name, value in self._report.items()]
        for name, target in self._targets.items():
            for metric, value in target.drift(model).items():
                rows.append({"metric": metric, "set": name, "value": value, "n": len(target)})
        return rows

    # --- the weight half -----------------------------------------------------------------------------
    def _setup_weight(self, model: nn.Module, context: Context) -> None:
        weight = self.weight
        modules, freed = constrained(model, weight)
        lora = any("lora_" in name for name, _ in model.named_parameters())
        remedy = "an adapter's W_now V_now is no value to pin, since B moves too: use null with model.lora"
        check(not (lora and weight.refresh_steps), "weight.refresh_steps", weight.refresh_steps, remedy)
        bases = anchor_bases(model, context, weight)
        full = [name for name, b in bases.items() if b.rank >= b.dim]
        if len(full) == len(bases):
            raise UserError(
                f"method.weight.energy={weight.energy} protects every direction of every input, so nothing is free to "
                "learn; lower it or use fewer anchors"
            )
        if not any(b.rank for b in bases.values()):
            raise UserError("the anchors' activations are all zero, so method.weight would protect nothing")
        if full:
            log.warning(
                "method.weight.energy=%s protects every direction of %d of %d inputs (first: %s): their matrices "
                "cannot learn",
                *(weight.energy, len(full), len(bases), full[0]),
            )
        self._constraint = Constraint(modules, bases)
        if weight.refresh_steps is not None:
            self._anchors = weight_anchors(model, context, weight)
        if lora:
            self._constraint.project_weights_()  # LoRA's A starts at random, and may not read V
        if weight.freeze_others:
            freeze_others_(model, modules, self._constraint, freed)
        ranks = sorted(b.rank for b in bases.values())
        self._report.update(
            subspace_rank=float(ranks[len(ranks) // 2]),
            subspace_share=sum(b.rank for b in bases.values()) / sum(b.dim for b in bases.values()),
            subspace_energy=min(b.energy for b in bases.values()),
        )

    # --- the activation half -------------------------------------------------------------------------
    def _target(self, model: nn.Module, rows: Sequence[dict]) -> Any:
        """The aligned model's features on `rows` in another space than the autoencoder's."""
        from cwac.sae import slots_of
        from cwac.spaces import TARGETS

        slots = slots_of(model, self.activation.sae.get("slots", "auto"))
        return TARGETS[self.activation.space](model, rows, self.activation.positions, slots)

    def _setup_space(self, model: nn.Module, context: Context) -> None:
        for name, prompts in (("anchors", context.pools.step), ("heldout", context.pools.validation)):
            rows = anchor_rows(model, context, prompts, response_tokens(self.activation.positions))
            self._targets[name] = self._target(model, rows)

    def _setup_activation(self, model: nn.Module, context: Context) -> None:
        from cwac.sae import SafetyTarget

        activation = self.activation
        sae, table, found, ranking_key = ranked_latents(model, context, activation)
        latents = table["latent"].tolist()
        for name, prompts in (("anchors", context.pools.step), ("heldout", context.pools.validation)):
            rows = anchor_rows(model, context, prompts, response_tokens(activation.positions))
            asked = digest({"prompts": [row["input_ids"] for row in rows]})
            target_key = {**ranking_key, "positions": activation.positions, "prompts": asked}

            def build_target(out, rows=rows):
                SafetyTarget.build(model, sae, latents, rows, positions=activation.positions).save(out)

            folder = load_or_build(context.artifacts, "targets", target_key, build_target)
            self._targets[name] = SafetyTarget.load(folder, sae, latents, activation.gate, activation.units)
        silent = self._targets["anchors"].baseline_energy == 0
        if silent and (activation.gate != "preact" or activation.units == "relative"):
            raise UserError(
                f"none of the preserved latents fires on the step pool ({found['dead_share']:.0%} of the SAE's are "
                "dead), so L_safety would hold nothing; fit it on more tokens (method.activation.sae.tokens), or use "
                "method.activation.gate=preact with units=raw"
            )
        self._report.update(
            sae_fvu=found["fvu_harmful"],
            sae_l0=found["l0_harmful"],
            sae_dead=found["dead_share"],
            latents_eligible=float(table["eligible"].sum()),
            sae_slots=float(len(sae.slots)),
        )


def ranked_latents(model: nn.Module, context: Context, activation: Activation) -> tuple[Any, Any, dict, dict]:
    """The SAE of the aligned model and its latents by rank, fitted once and cached.

    Returns the `RoutedSAE` on the model's device, the ranking's table (`cwac.sae.rank_latents`), the SAE's quality
    report, and what identifies the ranking as an artifact.
    """
    import pandas as pd

    from cwac.sae import RoutedSAE, SAEConfig, fit_sae, quality, rank_latents

    try:
        config = SAEConfig(**{**activation.sae, "seed": 0})
    except TypeError as error:
        raise UserError(f"method.activation.sae: {error}; see cwac.sae.SAEConfig for its fields") from error
    pools = context.pools

    def encode(examples, responses=False):
        return encode_prompts(context, examples, responses)

    held = max(1, len(pools.sae) // 5)  # kept out of the fit for the quality report
    harmful, held_harmful = encode(pools.sae[held:]), encode(pools.sae[:held])
    n_benign = max(1, len(pools.benign) // 5)
    general = encode(pools.benign[n_benign:], responses=True)
    held_general = encode(pools.benign[:n_benign], responses=True)
    key = {**artifact_key(context), "sae": asdict(config)}

    def build(folder):
        sae, fitted = fit_sae(model, general, harmful, config)
        sae.save(folder)
        measured = quality(model, sae, held_general, held_harmful)
        (folder / "quality.json").write_text(json.dumps({**fitted, **measured}, indent=1))

    folder = load_or_build(context.artifacts, "sae", key, build)
    sae = RoutedSAE.load(folder, model).to(next(model.parameters()).device)
    found = json.loads((folder / "quality.json").read_text())

    def build_ranking(out):
        table = rank_latents(
            model,
            sae,
            anchor_rows(model, context, pools.sae, 0),
            encode(pools.benign),
            n=activation.n_latents,
            method=activation.rank,
            general_rows=general,
        )
        table.to_csv(out / "latents.csv", index=False)

    ranking_key = {**key, "rank": activation.rank, "n": activation.n_latents}
    ranking = load_or_build(context.artifacts, "latents", ranking_key, build_ranking)
    return sae, pd.read_csv(ranking / "latents.csv"), found, ranking_key


def constrained(model: nn.Module, weight: Weight) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """The matrices under the constraint and those `weight.free` names, by name; UserError if none is left to hold."""
    modules = linears(model, weight.modules, weight.layers)
    freed = linears(model, weight.free, weight.layers, "method.weight.free") if weight.free else {}
    held = {name: module for name, module in modules.items() if name not in freed}
    check(held, "weight.free", list(weight.free), "leave a matrix of method.weight.modules constrained")
    return held, freed


def anchor_bases(model: nn.Module, context: Context, weight: Weight) -> dict[str, Basis]:
    """Input name -> the anchors' subspace in the aligned model, fitted once and cached."""
    rows = weight_anchors(model, context, weight)
    others = ("where", "freeze_others", "free", "soft", "refresh_steps", "every")
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
    prompts, asked = pools.anchors, set(weight.anchor_sources)
    there = {name for e in prompts for name in (e.source, e.group) if name}
    remedy = f"the pool has no {', '.join(sorted(asked - there))}; it has {', '.join(sorted(there))}"
    check(asked <= there, "weight.anchor_sources", list(weight.anchor_sources), remedy)
    if asked:
        prompts = [e for e in prompts if {e.source, e.group} & asked]
    if (n := weight.n_anchors) is not None:
        remedy = f"the pool has {len(prompts)} such prompts: give at most that, or null for all"
        check(n <= len(prompts), "weight.n_anchors", n, remedy)
    return prompts[:n]


def fit_bases(model: nn.Module, rows: Sequence[dict], weight: Weight, progress: bool = True) -> dict[str, Basis]:
    given = (weight.modules, weight.layers, weight.energy, weight.first_token)
    return fit_subspace(model, rows, *given, progress=progress)


def freeze_others_(
    model: nn.Module, modules: dict[str, nn.Module], constraint: Constraint, freed: dict[str, nn.Module] | None = None
) -> None:
    """Freeze what is neither constrained nor `freed`; what was frozen before, as by peft, stays frozen."""
    kept = {id(layer.weight) for _, layer, _, _ in constraint.entries}
    for module in modules.values():  # with LoRA, B reads only what a constrained A lets through
        kept |= {id(layer.weight) for layer in getattr(module, "lora_B", {}).values()}
    kept |= {id(parameter) for module in (freed or {}).values() for parameter in module.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in kept)


def response_tokens(positions: str) -> int:
    return int(positions.split(":")[1]) if positions.startswith("response:") else 0
