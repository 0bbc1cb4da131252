"""Null-space adapters: train only what the anchors do not use, instead of pushing every step back.

Ours, after CWAC's weight constraint (arXiv:2604.12384, section 4.2): W = W_0 + C N^T on every linear layer of the
blocks, C trained from zero, W_0 and N frozen, N orthonormal with N^T V = 0 for the anchors' directions V. Then
(W - W_0) V = C (N^T V) = 0 for every C: nothing is projected, whatever the optimizer, weight decay, precision of W_0,
accumulation or resume. It is a LoRA adapter with a frozen A (cwac/models/adapter.py). Two configurations: `nullspace`,
and `nullspace_cwac` with CWAC's activation constraint beside it.

Prior art: InfLoRA (arXiv:2404.00228) freezes A in the null space of earlier tasks' inputs, chosen on the new task's;
with anchors for the earlier tasks that is `basis: rows`. SaLoRA (arXiv:2501.01765) projects an adapter's output.
GPM (arXiv:2103.09762) and Adam-NSCL (arXiv:2106.03027) project gradients and updates of whole weights, AlphaEdit
(arXiv:2410.02355) an edit of them. LoRA-FA (arXiv:2308.03303) freezes a random A for memory's sake.

Deviations: the method is `ours`; what it takes from CWAC (V, anchors, the first token) is as in
cwac/constraints/subspace.py.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from cwac.constraints.anchors import anchor_rows
from cwac.constraints.nullspace import (
    BASES,
    energy_held,
    fit_free,
    gradient_moments,
    load_free,
    save_free,
    second_moments,
)
from cwac.constraints.settings import Activation, Weight
from cwac.constraints.weight import anchor_bases, anchor_counts, anchor_prompts, anchors_used
from cwac.core.cache import digest, load_or_build
from cwac.core.checks import check, check_unread
from cwac.core.errors import UsageError, UserError
from cwac.data.examples import Example
from cwac.data.tokenize import encode_example
from cwac.methods.base import Context, MemoryEstimate, Method, Sizes
from cwac.methods.cwac import CWAC
from cwac.models.adapter import add_fixed_adapter, fold
from cwac.models.context import artifact_key
from cwac.models.layers import base_layer, input_group, linears

log = logging.getLogger(__name__)
LESS = 0.05
"""How much less of unseen requests than of the anchors may be held without a warning (ours)."""
ANCHORS = "modules layers energy first_token n_anchors anchor_sources response_tokens prefill".split()
"""Keys that mean what they mean under `method.weight` of weight_only."""


@dataclass
class NullSpace(Method):
    """Brings its own adapter: no `model.lora` beside it."""

    k: int | None = 64
    """Directions an input, at most those that V leaves; None for all of them."""
    basis: str = "rows"
    """Which directions: `rows`, `benign`, `gradient` or `complement` (cwac/constraints/nullspace.py)."""
    n_rows: int = 64
    """Training rows, or harmless ones, that `rows`, `gradient` and `benign` look at."""
    fold: bool | None = None
    """Hold W_0 + C N^T too, for speed; None where k is more than a fourth of d_in. It moves no more than rounding."""
    modules: Sequence[str] | str = "all"
    layers: Sequence[int] | None = None
    energy: float = 0.99
    first_token: bool = True
    n_anchors: int | None = None
    anchor_sources: Sequence[str] = ()
    response_tokens: int = 16
    prefill: str | None = None
    activation: Activation | None = None
    """CWAC's activation constraint, or None."""

    brings_adapter: ClassVar[bool] = True
    wants_own_rate: ClassVar[bool] = True

    def __post_init__(self):
        whole = isinstance(self.k, int) and not isinstance(self.k, bool) and self.k >= 1
        check(self.k is None or whole, "k", self.k, "give a whole number >= 1, or null for the whole null space")
        check(self.basis in BASES, "basis", self.basis, f"use one of {', '.join(BASES)}")
        whole = isinstance(self.n_rows, int) and not isinstance(self.n_rows, bool) and self.n_rows >= 1
        check(whole, "n_rows", self.n_rows, "give a whole number of at least 1")
        check_unread("n_rows", self.n_rows, type(self).n_rows, self.basis != "complement", "basis (another)")
        check(self.fold is None or isinstance(self.fold, bool), "fold", self.fold, "give true, false or null")
        try:
            self._weight = Weight(**{key: getattr(self, key) for key in ANCHORS})
        except UsageError as error:  # the same keys, one level higher
            raise UsageError(str(error).replace("method.weight.", "method.")) from error
        self._coupled = None if self.activation is None else CWAC(self.name, activation=self.activation)
        self._rows: list[Example] = []
        self._report: dict[str, float] = {}
        self._held = ""

    def extra_data(self) -> dict[str, int]:
        counts = {} if self._coupled is None else self._coupled.extra_data()
        counts["harmful_prompts"] = counts.get("harmful_prompts", 0) + self._n_anchors
        if self.basis == "benign":
            counts["harmless_rows"] = counts.get("harmless_rows", 0) + len(self._rows)
        return counts

    def training_data(self, train: list[Example], context: Context, rng: random.Random) -> list[Example]:
        if any("lora_" in name for name, _ in context.loaded.model.named_parameters()):
            raise UsageError(
                f"method={self.name} brings its own adapter, and the model has one already; leave model.lora out"
            )
        anchors_used(context.loaded.model, context, self._weight)  # its errors come before anything is written
        if self.basis in ("rows", "gradient"):
            self._rows = rng.sample(train, min(self.n_rows, len(train)))
        elif self.basis == "benign":
            self._rows = context.pools.benign[: self.n_rows]
        return train if self._coupled is None else self._coupled.training_data(train, context, rng)

    def setup(self, model: nn.Module, context: Context) -> nn.Module:
        if self._coupled is not None:
            self._coupled.setup(model, context)
        self._context = context
        self._n_anchors = anchors_used(model, context, self._weight)
        modules = linears(model, self._weight.modules, self._weight.layers, "method.modules")
        rows = encoded(context, self._rows)
        key = {
            **artifact_key(context),
            "anchors": {name: getattr(self._weight, name) for name in ANCHORS},
            "basis": self.basis,
            "k": self.k,
            "rows": digest({"rows": rows}),
        }

        def build(folder):
            bases = anchor_bases(model, context, self._weight)
            readers = {input_group(name): module for name, module in modules.items()}
            if all(basis.rank >= basis.dim for basis in bases.values()):
                raise UserError(
                    f"method.energy={self.energy} protects every direction of every input, so nothing is free to "
                    "learn; lower it or use fewer anchors"
                )
            moments = None
            if self.basis == "gradient":
                moments = gradient_moments(model, rows, modules)
            elif self.basis != "complement":
                moments = second_moments(model, rows, readers)
            held = certificate(model, context, self._weight, bases, readers)
            save_free(fit_free(bases, moments, self.k), held, folder)

        free, held = load_free(load_or_build(context.artifacts, "nullspace", key, build))
        if lost := sorted({input_group(name) for name in modules} - free.keys()):
            log.warning(
                "method.energy=%s protects every direction of %d inputs (first: %s): their matrices cannot learn",
                *(self.energy, len(lost), lost[0]),
            )
        self._tell(held)
        wrapped = add_fixed_adapter(model, modules, free, self.card(context, held))
        ranks = sorted(N.shape[1] for N in free.values())
        counts = anchor_counts(model, context, self._weight)
        free_share = sum(free[name].shape[1] for name in map(input_group, modules) if name in free)
        free_share /= sum(base_layer(module).in_features for module in modules.values())
        self._held = (
            f"holds {len(modules)} matrices, {1 - free_share:.1%} of their input directions frozen, anchors used "
            f"{counts['anchors_used']:g} of {counts['anchors_given']:g}"
        )
        self._report = {
            **counts,
            "free_rank": float(ranks[len(ranks) // 2]),
            "trained_parameters": float(sum(p.numel() for p in wrapped.parameters() if p.requires_grad)),
            **{f"energy_held_{name}": 100 * share for name, share in held.items()},
        }
        return wrapped

    def _tell(self, held: dict[str, float]) -> None:
        """The certificate, before training; a warning where unseen requests are held by less than the anchors."""
        own, unseen = held["anchors"], {name: share for name, share in held.items() if name != "anchors"}
        told = ", ".join(f"{name} {100 * share:.1f} %" for name, share in unseen.items()) or "none at hand"
        log.info("energy held in the worst matrix: anchors %.1f %%; unseen requests: %s", 100 * own, told)
        for name, share in unseen.items():
            if share < own - LESS:
                log.warning(
                    "unseen requests of %s are held by %.1f %%, the anchors by %.1f %%: what is trained may reach "
                    "them; add anchors like them (pools.anchors), or raise method.energy",
                    *(name, 100 * share, 100 * own),
                )

    def card(self, context: Context, held: dict[str, float]) -> str:
        """Markdown on the adapter: what it was made of, for the card beside it."""
        sources = sorted({e.source or e.group for e in anchor_prompts(context.pools, self._weight)} - {""})
        shares = "".join(f"| {name} | {100 * share:.1f} |\n" for name, share in held.items())
        return (
            "# Null-space adapter\n\n"
            "W = W_0 + B A with A frozen: its rows are orthonormal and orthogonal to the directions that the aligned "
            "model's activations take on anchors, harmful requests that it refuses. So no value of B changes what a "
            "layer does on those directions.\n\n"
            f"- anchors: {self._n_anchors} prompts ({', '.join(sources)}; pools {context.pools_key}), each with "
            f"{self.response_tokens} tokens of the model's own refusal\n"
            f"- energy: {self.energy}\n- k: {'all' if self.k is None else self.k}\n- basis: {self.basis}\n"
            f"- base model: {context.loaded.hub_id or 'local'} {context.loaded.revision or ''}\n\n"
            f"Energy held in the worst matrix, in percent:\n\n| prompts | held |\n|---|---:|\n{shares}\n"
            "Derived from the base model's weights and activations: its licence applies. It is no safety certificate."
        )

    def estimate_memory(self, model: nn.Module, sizes: Sizes) -> MemoryEstimate:
        found = MemoryEstimate() if self._coupled is None else self._coupled.estimate_memory(model, sizes)
        self._context = sizes
        modules = linears(model, self._weight.modules, self._weight.layers, "method.modules")
        dims = {input_group(name): base_layer(module).in_features for name, module in modules.items()}
        free = {}
        for name, d in dims.items():
            left = d - max(1, round(sizes.rank_share * d))
            free[name] = torch.eye(d, left if self.k is None else min(self.k, left))
        found.model = add_fixed_adapter(model, modules, free)
        fold(found.model, self.fold)
        found.setup_bytes["fit of the subspaces"] = sum(8 * d * d for d in dims.values())  # second moments in float64
        return found

    def start(self, model: nn.Module) -> None:
        fold(model, self.fold)
        if self._coupled is not None:
            self._coupled.start(model)

    def penalty(self, model: nn.Module, step: int) -> torch.Tensor | None:
        return None if self._coupled is None else self._coupled.penalty(model, step)

    def protected(self) -> dict[str, torch.Tensor]:
        """Read again from the artifact: V is not needed while training, and as large as the blocks' weights."""
        model, context = self._context.loaded.model, self._context
        bases = anchor_bases(model, context, self._weight)
        names = linears(model, self._weight.modules, self._weight.layers, "method.modules")
        return {name: bases[input_group(name)].V for name in names}

    def held(self) -> str:
        return "; ".join([self._held, *([] if self._coupled is None else [self._coupled.held()])])

    def report(self, model: nn.Module) -> list[dict]:
        rows = [] if self._coupled is None else self._coupled.report(model)
        return rows + [{"metric": name, "set": "train", "value": value} for name, value in self._report.items()]


def encoded(context: Context, examples: Sequence[Example]) -> list[dict]:
    """`input_ids` and `labels` of rows as they are trained on; rows that are token ids already as they are."""
    rows = []
    for example in examples:
        given = getattr(example, "encoded", None)
        if given is None:
            row = encode_example(context.tokenizer, example, context.template, context.max_length)
        else:
            ids = list(given["input_ids"])[: context.max_length]
            row = {"input_ids": ids, "labels": list(given.get("labels", ids))[: len(ids)]}
        rows.append({key: row[key] for key in ("input_ids", "labels")})
    return rows


def certificate(model: nn.Module, context: Context, weight: Weight, bases, readers) -> dict[str, float]:
    """Share of squared norm that V holds in the worst matrix: of the `anchors`, and of unseen requests by source.

    Unseen are the validation prompts that the aligned model refuses, with the start of its refusal; a source of which
    it refuses none is left out.
    """
    held = {"anchors": min(basis.energy for basis in bases.values())}
    unseen = context.pools.validation
    for name in sorted({e.source or "validation" for e in unseen}):
        prompts = [e for e in unseen if (e.source or "validation") == name]
        try:
            rows = anchor_rows(model, context, prompts, weight.response_tokens)
        except UserError:
            continue
        held[name] = energy_held(model, rows, bases, readers)
    return held
