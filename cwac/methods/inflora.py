"""InfLoRA: low-rank adapters whose frozen input side keeps them off the inputs of an earlier task.

Liang, Li: "InfLoRA: Interference-Free Low-Rank Adaptation for Continual Learning", CVPR 2024, arXiv:2404.00228.
Before a new task, the rows of A (the paper's B_t) are chosen and frozen: the leading left singular vectors of (I - M
M^T) C, with C = mean x x^T of the new task's inputs and M orthonormal, the directions of earlier tasks' inputs; B
(the paper's A_t) trains from zero. So no update reads M. Here the earlier task is the alignment: harmful requests
with the model's own refusals. Official code, read at e08b00e of liangyanshuo/InfLoRA (`methods/inflora.py`,
`models/vit_inflora.py`, `configs/cifar100_inflora.json`): k and v projections, rank 10, A divided by sqrt(3), 0.95 of
the energy in M.

It is the nearest prior art of `nullspace` (cwac/methods/nullspace.py), which differs in its defaults (every linear
layer, 64 directions, 0.99 of the energy), in A, whose rows are orthonormal there, and in the rule: eigenvectors of C
within the null space, where the official code takes singular vectors of (I - M M^T) C, which weigh C twice.

Deviations:
- Two tasks, alignment and fine-tuning, of which the first is not trained here: DualGPM, which keeps M over many tasks
  in the smaller of two bases, is M itself, and its threshold is that of the first task.
- M is fitted as V of CWAC is (cwac/constraints/subspace.py): `energy` is of the inputs' squared norm, as the paper
  says. The code squares the eigenvalues of C once more, which keeps fewer directions. The first token's input, which
  in a language model outweighs all others, has a direction of its own in M, and counts in neither C nor the energy.
- `directions=random` (ours) draws A's rows from the null space of M, without a look at the task: the control for the
  choice. They are orthogonal to M as well.
- The authors train with Adam at 5e-4 without weight decay; optimizer and rate are the run's here (`train.*`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from cwac.constraints.nullspace import (
    clean,
    leading_free,
    load_free,
    orthogonal_complement,
    save_free,
    second_moments,
)
from cwac.constraints.settings import Weight
from cwac.constraints.weight import anchor_bases, anchor_prompts
from cwac.core.cache import digest, load_or_build
from cwac.core.checks import check_choice, check_modules, check_share, check_whole
from cwac.core.errors import UsageError, UserError
from cwac.data.examples import Example
from cwac.methods.base import Context, MemoryEstimate, Method, Sizes
from cwac.methods.nullspace import encoded
from cwac.models.adapter import add_fixed_adapter
from cwac.models.context import artifact_key
from cwac.models.layers import base_layer, input_group, linears


@dataclass
class InfLoRA(Method):
    """Brings its own adapter: no `model.lora` beside it."""

    rank: int = 10
    """Rows of A, at most as many as M leaves."""
    modules: Sequence[str] | str = ("k_proj", "v_proj")
    """`all`, or names of linear layers."""
    energy: float = 0.95
    """Share of the squared norm of the alignment's inputs that M holds."""
    directions: str = "task"
    """`task`: chosen on the training rows; `random`: drawn from the null space."""
    n_rows: int | None = None
    """Training rows that the choice looks at; None for all."""
    n_anchors: int | None = None
    """Harmful requests; None for all of the anchors."""
    response_tokens: int = 16
    """Tokens of the aligned model's own refusal."""

    brings_adapter: ClassVar[bool] = True

    def __post_init__(self):
        check_whole("rank", self.rank, 1)
        check_modules("modules", self.modules)
        check_share("energy", self.energy)
        check_choice("directions", self.directions, ("task", "random"))
        check_whole("n_rows", self.n_rows, 1, null=True)
        check_whole("n_anchors", self.n_anchors, 1, null=True)
        check_whole("response_tokens", self.response_tokens, 0)
        settings = ("modules", "energy", "n_anchors", "response_tokens")
        self._weight = Weight(**{name: getattr(self, name) for name in settings})

    def extra_data(self) -> dict[str, int]:
        return {"harmful_prompts": self._n_anchors}

    def training_data(self, train: list[Example], context: Context, rng: random.Random) -> list[Example]:
        if any("lora_" in name for name, _ in context.loaded.model.named_parameters()):
            raise UsageError(
                f"method={self.name} brings its own adapter, and the model has one already; leave model.lora out"
            )
        if (self.n_anchors or 0) > len(context.pools.anchors):
            raise UserError(
                f"method.n_anchors={self.n_anchors} is more than the {len(context.pools.anchors)} prompts of the pool "
                "`anchors`; give at most that, or null for all"
            )
        self._modules(context.loaded.model)
        self._n_anchors = len(anchor_prompts(context.pools, self._weight))
        self._rows = []
        if self.directions == "task":
            self._rows = train if self.n_rows is None else rng.sample(train, min(self.n_rows, len(train)))
        return train

    def setup(self, model: nn.Module, context: Context) -> nn.Module:
        self._context = context
        modules, rows = self._modules(model), encoded(context, self._rows)
        settings = {name: getattr(self, name) for name in ("rank", "energy", "directions", "n_anchors")}
        key = {
            **artifact_key(context),
            **settings,
            "modules": sorted(modules),
            "response_tokens": self.response_tokens,
            "rows": digest({"rows": rows}),
        }

        def build(folder):
            bases = anchor_bases(model, context, self._weight)
            left = {name: basis for name, basis in bases.items() if basis.rank < basis.dim}
            if not left:
                raise UserError(
                    f"method.energy={self.energy} protects every direction of every input, so nothing is free to "
                    "learn; lower it or use fewer anchors"
                )
            C = {}
            if rows:
                readers = {input_group(name): module for name, module in modules.items()}
                moments = second_moments(model, rows, {name: readers[name] for name in left})
                C = {name: moment.C for name, moment in moments.items()}
            found = {name: directions(b.V, C.get(name), self.rank, name) for name, b in left.items()}
            save_free({name: N.cpu() for name, N in found.items()}, {}, folder)

        free, _ = load_free(load_or_build(context.artifacts, "inflora", key, build))
        wrapped = add_fixed_adapter(model, modules, {name: N / math.sqrt(3) for name, N in free.items()})
        ranks = sorted(N.shape[1] for N in free.values())
        self._report = {
            "free_rank": float(ranks[len(ranks) // 2]),
            "trained_parameters": float(sum(p.numel() for p in wrapped.parameters() if p.requires_grad)),
        }
        return wrapped

    def estimate_memory(self, model: nn.Module, sizes: Sizes) -> MemoryEstimate:
        modules = self._modules(model)
        dims = {input_group(name): base_layer(module).in_features for name, module in modules.items()}
        left = {name: d - max(1, round(sizes.rank_share * d)) for name, d in dims.items()}
        free = {name: torch.eye(d, min(self.rank, left[name])) for name, d in dims.items()}
        fit = {"fit of the subspaces": sum(8 * d * d for d in dims.values())}  # second moments in float64
        return MemoryEstimate(model=add_fixed_adapter(model, modules, free), setup_bytes=fit)

    def protected(self) -> dict[str, Tensor]:
        """M, read again from the artifact: it is not needed while training."""
        model = self._context.loaded.model
        bases = anchor_bases(model, self._context, self._weight)
        return {name: bases[input_group(name)].V for name in self._modules(model)}

    def report(self, model: nn.Module) -> list[dict]:
        return [{"metric": name, "set": "train", "value": value} for name, value in self._report.items()]

    def _modules(self, model: nn.Module) -> dict[str, nn.Module]:
        return linears(model, self.modules, key="method.modules")


def directions(M: Tensor, C: Tensor | None, rank: int, seed: str = "0") -> Tensor:
    """N [d, at most rank], fp32, orthonormal and orthogonal to M [d, r]: left singular vectors of (I - M M^T) C.

    C [d, d]; None draws from the null space by `seed`.
    """
    if C is None:
        return leading_free(M, None, rank, seed)
    free = orthogonal_complement(M.to(C))  # Q [d, d - r], and (I - M M^T) C = Q (Q^T C)
    return clean(free @ torch.linalg.svd(free.T @ C)[0][:, :rank], M.to(C))
