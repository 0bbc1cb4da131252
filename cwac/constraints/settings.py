"""The settings of CWAC's two constraints (arXiv:2604.12384); each class checks its own values.

`cwac/methods/cwac.py` says which of them are the paper's and which are ours.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from cwac.core.checks import check, check_flag, check_layers, check_number, check_whole, is_number

SPACES = ("sae", "residual", "logits")
"""The spaces in which the activation constraint can preserve the model: see `Activation.space`."""


@dataclass
class Weight:
    """The weight constraint's settings."""

    where: str = "update"
    """What is projected: `update`, the change of the weights after each optimizer step (ours; it pins the weights), or
    `gradient`, the gradient before the step (Algorithm 1, which AdamW undoes)."""
    modules: Sequence[str] | str = ("down_proj",)
    """Which linear layers of each block are constrained: `all`, or a list of names; the paper constrains down_proj."""
    layers: Sequence[int] | None = None
    """Decoder blocks that are constrained, counted from 0; None for all (App. B.4 says "intermediate layers" without
    naming them)."""
    energy: float = 0.99
    """Share of the squared norm of the anchors' inputs that V must keep, in (0, 1]; stands for the paper's tau, whose
    value it does not give."""
    first_token: bool = True
    """Whether V gets a separate direction for the input of the first token; see `cwac/constraints/subspace.py`."""
    freeze_others: bool = False
    """Train nothing but the constrained matrices: no embeddings, norms, head or biases."""
    unconstrained: Sequence[str] = ()
    """Names of linear layers that train without a constraint although they would otherwise be constrained or frozen.

    This opens a bypass of the constraint on purpose, to measure what it lets through."""
    penalty_weight: float | None = None
    """mu > 0: use the penalty mu ||(W - W_0) V||_F^2 on the same matrices instead of the projection; None projects.

    Its gradient is added once per optimizer step, before clipping. With LoRA the adapter's matrix A is penalised:
    mu ||A V||_F^2."""
    refresh_steps: int | None = None
    """n: after every n optimizer steps, V and A are refitted from the current model on the same anchor rows; None
    keeps those of the aligned model.

    After a refit A = W_now V_now: what is preserved from then on is no longer the aligned model's output but the
    output at the last refit. Drift up to the refit is therefore accepted, and directions that only the old V
    protected may change again."""
    project_every: int = 1
    """n: project after every n-th optimizer step and after the last one, instead of after each.

    The weights that a run ends with are pinned in either case. In between they drift for up to n - 1 steps, and the n
    steps cost one projection instead of n. Only where=update can use n > 1."""
    n_anchors: int | None = None
    """How many of the anchor pool's prompts to use; None for all."""
    anchor_sources: Sequence[str] = ()
    """Use only anchor prompts of these sources or harm categories, such as `advbench` or `theft`; () for all."""
    response_tokens: int = 16
    """How many tokens of the aligned model's own refusal follow each anchor prompt; 0 for prompts alone."""
    prefill: str | None = None
    """A compliant opening such as "Sure, here is". If given, every anchor prompt is an anchor a second time, followed
    by this opening and by the aligned model's continuation of it."""

    def __post_init__(self):
        check(self.where in ("update", "gradient"), "weight.where", self.where, "use update or gradient")
        check(
            is_number(self.energy) and 0 < self.energy <= 1,
            "weight.energy",
            self.energy,
            "give a share in (0, 1], e.g. 0.99",
        )
        check_whole("weight.response_tokens", self.response_tokens, 0)
        opening = self.prefill is None or (isinstance(self.prefill, str) and bool(self.prefill.strip()))
        check(opening, "weight.prefill", self.prefill, "give an opening such as 'Sure, here is', or null")
        if self.penalty_weight is not None:
            positive = is_number(self.penalty_weight) and 0 < self.penalty_weight < math.inf
            check(
                positive, "weight.penalty_weight", self.penalty_weight, "give mu > 0, or null for the hard projection"
            )
            remedy = "projects gradients, which a penalty replaces: use where=update, or penalty_weight=null"
            check(self.where == "update", "weight.where", self.where, remedy)
        check_whole("weight.n_anchors", self.n_anchors, 1, null=True)
        check_whole("weight.refresh_steps", self.refresh_steps, 1, null=True)
        check_whole("weight.project_every", self.project_every, 1)
        hard = self.project_every == 1 or (self.where == "update" and self.penalty_weight is None)
        check(
            hard,
            "weight.project_every",
            self.project_every,
            "is of the hard projection of updates: use 1 with where=gradient or penalty_weight",
        )
        n, refresh = self.project_every, self.refresh_steps
        check(
            n == 1 or refresh is None or n % refresh != 0,
            "weight.project_every",
            n,
            f"is never read with weight.refresh_steps={refresh}, whose refits project too: use 1, or a smaller number",
        )
        if isinstance(self.modules, str):
            check(self.modules == "all", "weight.modules", self.modules, "use all, or a list such as [down_proj]")
        else:
            self.modules = tuple(self.modules)
        named = not isinstance(self.unconstrained, str) and all(isinstance(name, str) for name in self.unconstrained)
        check(
            named,
            "weight.unconstrained",
            self.unconstrained,
            "give a list of linear layers such as [down_proj], or []",
        )
        self.unconstrained = tuple(self.unconstrained)
        named = not isinstance(self.anchor_sources, str) and all(isinstance(name, str) for name in self.anchor_sources)
        check(named, "weight.anchor_sources", self.anchor_sources, "give a list such as [advbench], or [] for all")
        self.anchor_sources = tuple(self.anchor_sources)
        check_layers(self.layers, key="weight.layers")
        if self.layers is not None:
            self.layers = tuple(self.layers)


@dataclass
class Activation:
    """The activation constraint's settings."""

    lam: float = 0.5
    """lambda of Eq. 16."""
    n_latents: int = 100
    """How many safety-critical latents are preserved (section 4.1)."""
    n_prompts: int = 4
    """Harmful prompts drawn in each optimizer step, B of Eq. 11 (the paper gives no value)."""
    gate: str = "tau"
    """What counts as a latent's value: `tau` (ours) keeps a gradient for a latent that left the TopK, `topk` is the
    formula to the letter; for the others see `cwac.constraints.sae.target.SafetyTarget`."""
    ranking: str = "contrast+attribution"
    """How latents are ranked (`cwac.constraints.sae.ranking.rank_latents`); `activation`, the mean activation on
    harmful prompts, is the literal reading of the paper."""
    positions: str = "last"
    """The tokens at which latents are read: `last`, the last prompt token; `response:n`, that token and the first n of
    the refusal; `prompt` and `template:n`: see `cwac.constraints.sae.target.SafetyTarget.build`."""
    units: str = "raw"
    """`raw`, or `relative`, which divides L_safety by the aligned model's own squared latents: the mean over prompts
    of their sum."""
    refused_only: bool = True
    """Whether the autoencoder is fitted and measured on those prompts of the pool `sae` alone that the aligned model
    refuses (4.1), or on all of them (ours)."""
    space: str = "sae"
    """What is preserved: `sae`, the latents of the autoencoder (the paper). Ours: `residual`, the residual stream at
    the autoencoder's layers; `logits`, the next-token distribution over the refusal, which needs
    `positions: response:n`. For the last two see `cwac/constraints/targets.py`."""
    sae: dict = field(default_factory=dict)
    """Fields of `cwac.constraints.sae.fit.SAEConfig`."""

    def __post_init__(self):
        check_number("activation.lam", self.lam, 0)
        for key in ("n_latents", "n_prompts"):
            check_whole(f"activation.{key}", getattr(self, key), 1)
        gates = ("tau", "topk", "union", "base", "preact")
        check(self.gate in gates, "activation.gate", self.gate, f"use one of {', '.join(gates)}")
        rankings = ("contrast+attribution", "contrast", "activation", "cosine", "random")
        check(self.ranking in rankings, "activation.ranking", self.ranking, f"use one of {', '.join(rankings)}")
        check(self.units in ("raw", "relative"), "activation.units", self.units, "use raw or relative")
        check_flag("activation.refused_only", self.refused_only)
        check(self.space in SPACES, "activation.space", self.space, f"use one of {', '.join(SPACES)}")
        place = r"last|prompt|(template|response):[1-9]\d*"
        check(
            re.fullmatch(place, str(self.positions)), "activation.positions", self.positions, "use last or response:4"
        )
        if self.space != "sae":
            for key in ("n_latents", "gate", "ranking", "units"):
                usual, value = getattr(type(self), key), getattr(self, key)
                remedy = f"only space=sae reads it: leave it at {usual}, or use method.activation.space=sae"
                check(value == usual, f"activation.{key}", value, remedy)
        if self.space == "logits":
            remedy = "space=logits preserves the refusal's tokens: use method.activation.positions=response:16"
            check(str(self.positions).startswith("response:"), "activation.positions", self.positions, remedy)
