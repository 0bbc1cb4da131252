"""Vaccine: perturbation-aware alignment, then plain fine-tuning.

Huang, Hu, Liu: "Vaccine: Perturbation-aware Alignment for Large Language Models against Harmful Fine-tuning Attack",
NeurIPS 2024, arXiv:2402.01109, Algorithm 1. For each alignment batch, with e_l the hidden embedding of layer l:
1. g_l = the loss's gradient with respect to e_l;
2. eps_l = rho g_l / ||(g_1, ..., g_L)||, the perturbation of norm rho that raises the loss most, to first order;
3. the weights step along the gradient of the loss with every e_l replaced by e_l + eps_l, eps held fixed.
As in `VaccineTrainer` (trainer.py of git-disl/Vaccine at 906f520), e_l is the output of block l's attention, and the
norm runs over all layers and the whole batch.

Deviations:
- Vaccine replaces the alignment of an unaligned model. Every run here starts from a model that is aligned already, so
  the method aligns it further: on requests with refusals (`align`) and harmless instructions with answers (`benign`),
  the latter because refusals alone make a model refuse everything (ours; the paper has BeaverTails' safe answers).
- The paper aligns through LoRA for 50 epochs at a learning rate of 1e-3, merges, and fine-tunes a new adapter at 1e-5.
  Here all parameters of the aligned model are immunised, for `steps` steps at the learning rate of the fine-tuning;
  LoRA, where it is asked for, is the fine-tuning's alone. So one immunised model serves both.
- The immunised model is an artifact that all seeds and ratios of a model share: its order of rows has a fixed seed.
- What is measured against the aligned model (drift, leak) counts the immunisation as part of the change; an evaluation
  at epoch 0 is of the aligned model, before the immunisation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import nn

from cwac.core.checks import check_number, check_whole
from cwac.methods.alignment_stage import align_further_, alignment_data, encoded, require_alignment_data
from cwac.methods.base import Method
from cwac.models.adapters import require_plain_lora
from cwac.models.context import Context, artifact_key
from cwac.models.hooks import on_outputs
from cwac.models.layers import decoder_layers
from cwac.models.loading import require_source


@dataclass
class Vaccine(Method):
    """Costs nothing while fine-tuning."""

    rho: float = 2.0
    """Norm of the perturbation of a batch's embeddings; 0 is plain further alignment."""
    steps: int = 200
    """Alignment steps before the fine-tuning; 0 is plain fine-tuning."""
    batch_size: int = 5
    learning_rate: float = 1e-4
    weight_decay: float = 0.1
    harmless_per_refusal: int = 2

    needs_base_weights: ClassVar[bool] = True

    def __post_init__(self):
        check_number("rho", self.rho, 0)
        check_whole("steps", self.steps, 0)
        check_whole("batch_size", self.batch_size, 1)
        check_number("learning_rate", self.learning_rate, 0)
        check_number("weight_decay", self.weight_decay, 0)
        check_whole("harmless_per_refusal", self.harmless_per_refusal, 1)
        self._seen: dict[str, int] = {}

    def extra_data(self) -> dict[str, int]:
        return self._seen

    def training_data(self, train, context: Context, rng):
        if self.steps:
            require_plain_lora(context.loaded.model, self.name)
            require_source(context.loaded, self.name)
            require_alignment_data(context, self.name)
        return train

    def setup(self, model: nn.Module, context: Context) -> None:
        if not self.steps:
            return
        refusals, harmless = alignment_data(context, self.harmless_per_refusal)
        self._seen = {"refusals": len(refusals), "harmless_rows": len(harmless)}
        settings = ("rho", "steps", "batch_size", "learning_rate", "weight_decay", "harmless_per_refusal")
        key = {**artifact_key(context), **{k: float(getattr(self, k)) for k in settings}}

        align_further_(
            model,
            context,
            "vaccine",
            key,
            encoded(context, [*refusals, *harmless]),
            partial(perturbed_backward, rho=self.rho),
            steps=self.steps,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            weight_decay=self.weight_decay,
            warmup=0.1,
        )


def perturbation(model: nn.Module, batch: dict[str, torch.Tensor], rho: float) -> list[torch.Tensor]:
    """eps_l [B, T, d] for every block, of joint norm rho; no weight's gradient is touched."""
    embeddings: list[torch.Tensor] = []
    with on_outputs(attentions(model), lambda _, e: embeddings.append(e)):
        loss = model(**batch).loss
    gradients = torch.autograd.grad(loss, embeddings)
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
    return [rho / (norm + 1e-7) * g for g in gradients]  # the constant is the official code's


def perturbed_backward(model: nn.Module, batch: dict[str, torch.Tensor], rho: float) -> torch.Tensor:
    """Adds the gradient of the loss under `perturbation` to the weights' `grad`; returns that loss."""
    shifts = perturbation(model, batch, rho)
    with on_outputs(attentions(model), lambda i, e: e + shifts[i]):
        loss = model(**batch).loss
    loss.backward()
    return loss


def attentions(model: nn.Module) -> list[nn.Module]:
    """The attention of every block."""
    return [block.self_attn for block in decoder_layers(model)]
