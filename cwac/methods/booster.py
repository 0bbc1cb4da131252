"""Booster: alignment after which a step on harmful data lowers the harmful loss little, then plain fine-tuning.

Huang, Hu, Ilhan, Tekin, Liu: "Booster: Tackling Harmful Fine-tuning for Large Language Models via Attenuating Harmful
Perturbation", ICLR 2025, arXiv:2409.01586, Algorithm 1. With f the loss on the alignment data and h that on harmful
pairs, the stage minimises f(w) + lamb (h(w) - h(w - alpha grad h(w) / ||grad h(w)||)), whose gradient is taken as
grad f(w) + lamb (grad h(w) - grad h(w - alpha grad h(w) / ||grad h(w)||)). As in `BoosterAlignmentTrainer` (trainer.py
of git-disl/Booster at 6421918); lamb and alpha are those of script/alignment/smooth_align.sh there.

Deviations:
- Booster is the alignment of an unaligned model. Every run here starts from a model that is aligned already, so the
  method aligns it further, on requests with refusals (`align`) and harmless instructions with answers (`benign`), as
  `vaccine` does here, for `steps` steps with a cosine decay (official: 20 epochs at a constant rate).
- The paper aligns through LoRA, merges, and fine-tunes a new adapter. Here all parameters are hardened; LoRA, where it
  is asked for, is the fine-tuning's alone.
- The harmful pairs are rows of the pool `poison` that the attack leaves (official: 5,000 rows of the attack's
  collection, disjoint from it). So the hardened model depends on the run's seed and harmful ratio.
- After the harmful step the weights are put back from a copy, to the bit (ours); the official code adds the step back.
- What is measured against the aligned model (drift, leak) counts the stage as part of the change; an evaluation at
  epoch 0 is of the aligned model, before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from cwac.core.cache import digest
from cwac.core.checks import check_number, check_whole
from cwac.methods.alignment_stage import (
    HarmfulBatches,
    align_further_,
    alignment_data,
    encoded,
    require_alignment_data,
    unused_pairs,
)
from cwac.methods.base import Batch, MemoryEstimate, Method, Sizes
from cwac.models.adapters import require_plain_lora
from cwac.models.context import Context, artifact_key
from cwac.models.loading import require_source


@dataclass
class Booster(Method):
    """Costs nothing while fine-tuning."""

    lamb: float = 5.0
    """Weight of the harmful loss's decrease; 0 is plain further alignment."""
    alpha: float = 0.1
    """Norm of the harmful step."""
    n_pairs: int = 100
    """Harmful pairs at most."""
    steps: int = 200
    """Alignment steps before the fine-tuning; 0 is plain fine-tuning."""
    batch_size: int = 10
    """Rows of a step's alignment batch, and of its harmful one."""
    learning_rate: float = 1e-4
    weight_decay: float = 0.1
    harmless_per_refusal: int = 2

    needs_base_weights: ClassVar[bool] = True

    def __post_init__(self):
        for key in ("lamb", "alpha", "learning_rate", "weight_decay"):
            check_number(key, getattr(self, key), 0)
        check_whole("steps", self.steps, 0)
        for key in ("n_pairs", "batch_size", "harmless_per_refusal"):
            check_whole(key, getattr(self, key), 1)
        self._seen: dict[str, int] = {}

    def extra_data(self) -> dict[str, int]:
        return self._seen

    def training_data(self, train, context: Context, rng):
        if self.steps:
            require_plain_lora(context.loaded.model, self.name)
            require_source(context.loaded, self.name)
            require_alignment_data(context, self.name)
            self._pairs = unused_pairs(train, context, self.n_pairs, rng, self.name)
        return train

    def setup(self, model: nn.Module, context: Context) -> None:
        if not self.steps:
            return
        refusals, harmless = alignment_data(context, self.harmless_per_refusal)
        self._seen = {
            "refusals": len(refusals),
            "harmful_pairs": len(self._pairs),
            "harmless_rows": len(harmless),
        }
        settings = ("lamb", "alpha", "steps", "batch_size", "learning_rate", "weight_decay", "harmless_per_refusal")
        key = {**artifact_key(context), **{k: float(getattr(self, k)) for k in settings}}
        key["pairs"] = digest({"pairs": [(e.prompt, e.response) for e in self._pairs]})
        harmful = HarmfulBatches.of(context, self._pairs, self.batch_size)

        def backward(model: nn.Module, batch: Batch) -> torch.Tensor:
            return boosted_backward(model, batch, harmful.next(model.device), self.lamb, self.alpha)

        align_further_(
            model,
            context,
            self.name,
            key,
            encoded(context, [*refusals, *harmless]),
            backward,
            steps=self.steps,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            weight_decay=self.weight_decay,
            warmup=0.0,
        )

    def estimate_memory(self, model: nn.Module, sizes: Sizes) -> MemoryEstimate:
        """Nothing of the stage stays while fine-tuning."""
        return MemoryEstimate()


def boosted_backward(model: nn.Module, batch: Batch, harmful: Batch, lamb: float, alpha: float) -> torch.Tensor:
    """Adds the gradient of the boosted loss to the weights' `grad`; returns the loss on the alignment batch."""
    trained = [p for p in model.parameters() if p.requires_grad]

    def slope() -> list[torch.Tensor]:
        gradients = torch.autograd.grad(model(**harmful).loss, trained, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(trained, gradients, strict=True)]

    here = slope()
    norm = torch.stack([g.norm() for g in here]).norm() + 1e-7  # the constant is the official code's
    start = [p.detach().clone() for p in trained]
    with torch.no_grad():
        for p, g in zip(trained, here, strict=True):
            p.sub_(g, alpha=float(alpha / norm))
    there = slope()
    with torch.no_grad():
        for p, before in zip(trained, start, strict=True):
            p.copy_(before)
    loss = model(**batch).loss
    loss.backward()
    for p, g, h in zip(trained, here, there, strict=True):
        change = lamb * (g - h)
        p.grad = change if p.grad is None else p.grad + change
    return loss
