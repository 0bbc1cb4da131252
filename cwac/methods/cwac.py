"""CWAC: coupled weight and activation constraints.

Peng, Zhang, Zeng, Jiang, Gao: "Preventing Safety Drift in Large Language Models via Coupled Weight and Activation
Constraints", ACL 2026, arXiv:2604.12384. Weight constraint: section 4.2, Eqs. 12-15. Activation constraint: section
4.1, Eqs. 9-11, 16. Algorithm 1. One class, six configurations: `cwac_literal`, `cwac`, `weight_only`,
`activation_only`, and ours, `cwac_closed` and `weight_only_closed`.

Deviations:
- `where: update` projects the applied update, as section 4.2 words it; `where: gradient` is Algorithm 1 to the letter,
  which AdamW undoes. See `cwac/constraints/subspace.py` for tau, the first token and V.
- Which layers, token positions, SAE sizes and ranking the paper used is not given; for ours see
  `cwac/constraints/sae/__init__.py`.
- Anchors are the harmful prompts followed by the aligned model's own refusal (ours), because the paper collects inputs
  "while the model processes (and refuses)" them.
- `modules: all` with `freeze_others` (ours) constrains every matrix that trains. Then the network's outputs on the
  anchor tokens are preserved exactly when V spans their activations: by induction over blocks, each block's input is
  unchanged, so each matrix sees inputs in its V, so its output is unchanged.
- L_safety is drawn and added once per optimizer step, so lambda does not grow with gradient accumulation (ours).
- `weight.penalty_weight`, `weight.refresh_steps` and `activation.space` (ours) vary the coupling one part at a time: a
  penalty instead of the projection, a V that follows the model, and another space than the autoencoder's
  (cwac/constraints/targets.py).
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from cwac.constraints.activation import check_sae, ranked_latents, response_tokens, sae_config, sae_prompts
from cwac.constraints.anchors import anchor_rows
from cwac.constraints.settings import Activation, Weight
from cwac.constraints.subspace import Basis, Constraint
from cwac.constraints.weight import (
    anchor_bases,
    anchor_counts,
    anchor_prompts,
    anchors_used,
    constrained,
    fit_bases,
    freeze_others_,
    weight_anchors,
)
from cwac.core.cache import digest, load_or_build
from cwac.core.checks import check
from cwac.core.distributed import reshard
from cwac.core.errors import UserError
from cwac.data.examples import Example
from cwac.data.tokenize import encode_opening
from cwac.methods.base import Context, MemoryEstimate, Method, Sizes, draw, share_of
from cwac.models.adapters import require_plain_lora
from cwac.models.layers import base_layer, input_group

log = logging.getLogger(__name__)


@dataclass
class CWAC(Method):
    """Either half may be None: then it is the other's ablation (paper, Table 5)."""

    weight: Weight | None = None
    activation: Activation | None = None

    needs_step_hooks: ClassVar[bool] = True

    def __post_init__(self):
        for key, kind in (("weight", Weight), ("activation", Activation)):
            value = getattr(self, key)
            check(isinstance(value, kind | None), key, value, f"give keys below method.{key}, or null")
        if self.weight is None and self.activation is None:
            raise UserError(f"method={self.name} has neither weight nor activation; set one, or use method=sft")
        self._constraint: Constraint | None = None
        self._context: Context | Sizes = Sizes()
        self._report: dict[str, float] = {}
        self._used: dict[str, int] = {}
        """What `extra_data` says."""
        self._targets: dict[str, Any] = {}
        self._anchors: list[dict] = []
        """Rows that V is refitted on, with `refresh_steps` alone; `estimate_memory` has none and refits nothing."""
        self._steps = 0
        """Optimizer steps done."""
        self._pinned = True
        """Whether the weights have not moved since they were projected."""

    def extra_data(self) -> dict[str, int]:
        return self._used

    def training_data(self, train: list[Example], context: Context, rng: random.Random) -> list[Example]:
        pools = context.pools
        if self.weight is not None:
            require_plain_lora(context.loaded.model, self.name)
            self._constrained(context.loaded.model, warn=False)
            anchor_prompts(pools, self.weight)
            if self.weight.prefill is not None:
                encode_opening(context.tokenizer, self.weight.prefill)
        if self.activation is not None:
            n, available = self.activation.n_prompts, len(pools.step)
            check(n <= available, "activation.n_prompts", n, f"the pool has {available}: give at most that")
            if self.activation.space == "sae":
                check_sae(context.loaded.model, self.activation)
        self._check_anchors(context.loaded.model, context)
        return train

    def setup(self, model: nn.Module, context: Context) -> None:
        self._context = context
        self._check_cheaply(model, context)
        if self.activation is not None:
            setup = self._setup_activation if self.activation.space == "sae" else self._setup_space
            setup(model, context)
        if self.weight is not None:
            self._setup_weight(model, context)

    def _check_cheaply(self, model: nn.Module, context: Context) -> None:
        if self.weight is not None:
            self._constrained(model)
        self._check_anchors(model, context)

    def _check_anchors(self, model: nn.Module, context: Context) -> None:
        """Refuse before anything is written what a few answers of the aligned model tell; they are cached.

        Counts the prompts that are used on the way: of the anchors, those that the model refuses.
        """
        pools, harmful, harmless = context.pools, 0, 0
        if self.weight is not None:
            harmful += anchors_used(model, context, self.weight)
        if self.activation is not None:
            n = response_tokens(self.activation.positions)
            harmful += len(anchor_rows(model, context, pools.step, n))
            anchor_rows(model, context, pools.validation, n)
            if self.activation.space == "sae":
                anchor_rows(model, context, pools.sae, 0)
                harmful, harmless = harmful + len(sae_prompts(model, context, self.activation)), len(pools.benign)
        self._used = {"harmful_prompts": harmful} | ({"harmless_rows": harmless} if harmless else {})

    def estimate_memory(self, model: nn.Module, sizes: Sizes) -> MemoryEstimate:
        self._context, estimate = sizes, MemoryEstimate()
        if self.activation is not None and self.activation.space != "sae":
            n, tokens = self.activation.n_prompts, sizes.prompt_tokens
            answer = response_tokens(self.activation.positions)
            row = {"input_ids": [1] * (tokens + answer), "prompt": tokens}
            self._targets["anchors"] = self._target(model, [row] * n)
        elif self.activation is not None:
            from cwac.constraints.sae import pretrained
            from cwac.constraints.sae.autoencoder import RoutedSAE
            from cwac.constraints.sae.target import SafetyTarget
            from cwac.models.hooks import layers_of

            activation, config = self.activation, sae_config(self.activation)
            d = model.get_input_embeddings().embedding_dim
            if config.pretrained is not None:
                sae = pretrained.load(pretrained.find(config.pretrained, config.layers, model)).to(model.device)
            else:
                layers = layers_of(model, config.layers)
                with model.device:
                    sae = RoutedSAE(d, config.width(d), config.latents(d), layers, config.router)
                sae.requires_grad_(False)
                for parameter in sae.parameters():  # written to, or the operating system gives no memory
                    parameter.fill_(1 / d)
            target = (activation.n_latents, activation.n_prompts, sizes.prompt_tokens, activation.gate)
            self._targets["anchors"] = SafetyTarget.stand_in(sae, *target, sizes.shared_tokens)
            estimate.tensors["SAE"] = list(sae.parameters())
            if config.pretrained is None:
                # weights, gradients, two moments; and the tokens it is fitted on
                fitted = 4 * sum(p.nbytes for p in sae.parameters())
                tokens = config.tokens if config.cached_tokens is None else min(config.cached_tokens, config.tokens)
                estimate.setup_bytes["fit of the SAE"] = fitted + min(
                    config.buffer_gib * 2**30, 2 * len(layers) * d * tokens
                )
        if self.weight is not None:
            modules, unconstrained = constrained(model, self.weight)
            dims = {input_group(name): base_layer(module).in_features for name, module in modules.items()}
            bases = {
                name: Basis(torch.eye(d, max(1, round(sizes.rank_share * d))), 1.0, 1) for name, d in dims.items()
            }
            self._constraint = Constraint(modules, bases)
            if self.weight.freeze_others:
                freeze_others_(model, modules, self._constraint, unconstrained)
            moved = {id(V): V for _, _, V, _ in self._constraint.entries}.values()
            estimate.tensors["V and A of the constraint"] = [*moved, *(A for *_, A in self._constraint.entries)]
            estimate.setup_bytes["fit of the subspaces"] = sum(
                8 * d * d for d in dims.values()
            )  # covariances in float64
        return estimate

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
        if self._constraint is not None and self.weight.penalty_weight is not None:
            self._constraint.add_penalty_gradients_(self.weight.penalty_weight)

    def before_step(self, model: nn.Module) -> None:
        if self._constraint is not None and self.weight.where == "gradient":
            self._constraint.project_gradients_()

    def after_step(self, model: nn.Module) -> None:
        if self._constraint is None:
            return
        weight = self.weight
        self._steps += 1
        refit = weight.refresh_steps is not None and self._steps % weight.refresh_steps == 0
        due = refit or self._steps % weight.project_every == 0 or self._steps == self._context.steps
        if weight.where == "update" and weight.penalty_weight is None:
            self._pinned = due
            if due:
                self._constraint.project_weights_()
        if refit and self._anchors:
            bases = fit_bases(model, self._anchors, self.weight, progress=False)
            reshard(model)
            self._constraint.refit_(bases)

    def stop(self, model: nn.Module, reloaded: bool) -> None:
        """Projects where the training ended before the step it was told of, or went back to an earlier checkpoint."""
        if self._constraint is None or self.weight.where != "update" or self.weight.penalty_weight is not None:
            return
        if not self._pinned or (reloaded and self.weight.project_every > 1):
            self._constraint.project_weights_()
            self._pinned = True

    def state_dict(self) -> dict:
        if self.weight is None or (self.weight.refresh_steps is None and self.weight.project_every == 1):
            return {}
        moved = self._constraint.state_dict() if self.weight.refresh_steps is not None else {}
        return {"steps": self._steps, **moved}

    def load_state_dict(self, state: dict) -> None:
        if state:
            self._steps, self._pinned = state["steps"], self.weight.project_every == 1
            if self.weight.refresh_steps is not None:
                self._constraint.load_state_dict(state)

    def protected(self) -> dict[str, torch.Tensor]:
        """None where the drift from the aligned model is not pinned: under a penalty, or once V was refitted."""
        weight = self.weight
        if self._constraint is None or weight.penalty_weight is not None or weight.refresh_steps is not None:
            return {}
        return {name: V for name, _, V, _ in self._constraint.entries}

    def is_closed(self) -> bool:
        weight = self.weight
        return weight is not None and weight.freeze_others and not weight.unconstrained

    def held(self) -> str:
        parts, found = [], self._report
        if self._constraint is not None:
            names = [name for name, *_ in self._constraint.entries]
            parts.append(
                f"holds {len(names)} matrices, V {found['subspace_share']:.1%} of their input directions, anchors "
                f"used {found['anchors_used']:g} of {found['anchors_given']:g}"
            )
        if self.activation is not None:
            of = f"{self.activation.n_prompts} of {len(self._targets['anchors'])} prompts"
            given = self.activation.sae.get("pretrained") if self.activation.space == "sae" else None
            by = f" of {given} (FVU {found['sae_fvu']:.2f})" if given else ""
            parts.append(f"keeps {self.activation.space} features{by}: a forward and backward pass over {of} a step")
        return "; ".join(parts)

    def report(self, model: nn.Module) -> list[dict]:
        rows = [{"metric": name, "set": "train", "value": value} for name, value in self._report.items()]
        for name, target in self._targets.items():
            for metric, value in target.drift(model).items():
                rows.append({"metric": metric, "set": name, "value": value, "n": len(target)})
        return rows

    # --- the weight half -----------------------------------------------------------------------------
    def _constrained(self, model: nn.Module, warn: bool = True):
        """As `constrained` says; refuses what an adapter cannot have."""
        refresh = self.weight.refresh_steps
        remedy = "an adapter's W_now V_now is no value to pin, since B moves too: use null with model.lora"
        check(not (adapted(model) and refresh), "weight.refresh_steps", refresh, remedy)
        return constrained(model, self.weight, warn)

    def _setup_weight(self, model: nn.Module, context: Context) -> None:
        weight = self.weight
        modules, unconstrained = self._constrained(model, warn=False)  # `_check_cheaply` has warned
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
        if adapted(model):
            self._constraint.project_weights_()  # LoRA's A starts at random, and may not read V
        if weight.freeze_others:
            freeze_others_(model, modules, self._constraint, unconstrained)
        ranks = sorted(b.rank for b in bases.values())
        self._report.update(
            subspace_rank=float(ranks[len(ranks) // 2]),
            subspace_share=sum(b.rank for b in bases.values()) / sum(b.dim for b in bases.values()),
            subspace_energy=min(b.energy for b in bases.values()),
            **anchor_counts(model, context, weight),
        )

    # --- the activation half -------------------------------------------------------------------------
    def _target(self, model: nn.Module, rows: Sequence[dict]) -> Any:
        """The aligned model's features on `rows` in another space than the autoencoder's."""
        from cwac.constraints.targets import TARGETS
        from cwac.models.hooks import layers_of

        layers = layers_of(model, self.activation.sae.get("layers", "auto"))
        return TARGETS[self.activation.space](model, rows, self.activation.positions, layers)

    def _setup_space(self, model: nn.Module, context: Context) -> None:
        for name, prompts in (("anchors", context.pools.step), ("heldout", context.pools.validation)):
            rows = anchor_rows(model, context, prompts, response_tokens(self.activation.positions))
            self._targets[name] = self._target(model, rows)

    def _setup_activation(self, model: nn.Module, context: Context) -> None:
        from cwac.constraints.sae.target import SafetyTarget

        activation = self.activation
        sae, table, sae_report, ranking_key = ranked_latents(model, context, activation)
        latents = table["latent"].tolist()
        for name, prompts in (("anchors", context.pools.step), ("heldout", context.pools.validation)):
            rows = anchor_rows(model, context, prompts, response_tokens(activation.positions))
            prompts_digest = digest({"prompts": [row["input_ids"] for row in rows]})
            target_key = {**ranking_key, "positions": activation.positions, "prompts": prompts_digest}

            def build_target(out, rows=rows):
                SafetyTarget.build(model, sae, latents, rows, positions=activation.positions).save(out)

            folder = load_or_build(context.artifacts, "targets", target_key, build_target)
            self._targets[name] = SafetyTarget.load(folder, sae, latents, activation.gate, activation.units)
        never_fires = self._targets["anchors"].baseline_energy == 0
        if never_fires and (activation.gate != "preact" or activation.units == "relative"):
            raise UserError(
                f"none of the preserved latents fires on the step pool ({sae_report['dead_share']:.0%} of the SAE's "
                "are dead), so L_safety would preserve nothing; fit it on more tokens (model.sae.tokens), "
                "or use method.activation.gate=preact with units=raw"
            )
        self._report.update(
            sae_fvu=sae_report["fvu_harmful"],
            sae_l0=sae_report["l0_harmful"],
            sae_dead=sae_report["dead_share"],
            latents_eligible=float(table["eligible"].sum()),
            sae_slots=float(len(sae.layers)),
        )


def adapted(model: nn.Module) -> bool:
    """Whether a LoRA adapter trains, and not the matrices themselves."""
    return any("lora_" in name for name, _ in model.named_parameters())
