"""RESTA: after fine-tuning, the safety vector is added to the weights (task arithmetic).

Bhardwaj, Anh, Poria: "Language Models are Homer Simpson! Safety Re-Alignment of Fine-tuned Language Models through
Task Arithmetic", ACL 2024, arXiv:2402.11746; the arithmetic is that of Ilharco et al., "Editing Models with Task
Arithmetic", ICLR 2023, arXiv:2212.04089. W <- W + gamma (W0 - Wb), with W0 the aligned and Wb an unaligned model.

Deviations:
- The official code (declare-lab/resta) was out of reach. The rule is the paper's; gamma = 1, the plain sum of its
  abstract, is ours.
- The paper makes its unaligned model itself, by training the aligned one on harmful answers. Here it is the base that
  the alignment started from (`model.base`), so that no harmful answer is needed: the safety vector is what the
  alignment has changed, whether for safety or not.
- RESTA_d, which first drops and rescales entries of the fine-tuning's update (DARE), is not offered.
- Every parameter of the plain model gets its part, embeddings and norms included. Behind a LoRA adapter it goes into
  the weights below it; the adapter stays as it was trained.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from cwac.core.checks import check_number
from cwac.core.errors import UserError
from cwac.data.examples import Example
from cwac.methods.base import Context, Method
from cwac.models.adapters import plain_parameters, require_plain_lora
from cwac.models.loading import load_aligned, load_base, require_source


@dataclass
class RESTA(Method):
    """Trains as SFT does; everything happens once, after training."""

    gamma: float = 1.0
    """Multiple of the safety vector that is added; 0 is plain fine-tuning."""

    needs_base_weights: ClassVar[bool] = True

    def __post_init__(self):
        check_number("gamma", self.gamma, 0)
        self._n, self._norm = 0, 0.0

    def extra_data(self) -> dict[str, int]:
        return {"base_weights": self._n} if self.gamma else {}

    def training_data(self, train: list[Example], context: Context, rng: random.Random) -> list[Example]:
        if self.gamma:
            require_plain_lora(context.loaded.model, self.name)
            require_source(context.loaded, self.name)
            self._loaded = context.loaded
            vector = self._safety_vector(plain_parameters(context.loaded.model))  # its errors come before training
            self._n = len(vector)
        return train

    def finish(self, model: nn.Module) -> None:
        if not self.gamma:
            return
        vector = self._safety_vector(plain_parameters(load_aligned(self._loaded)))
        self._norm = float(torch.stack([V.norm() for V in vector.values()]).norm())
        for name, parameter in plain_parameters(model).items():
            V = vector[name].to(parameter.device)
            parameter.copy_(parameter.float() + self.gamma * V)

    def _safety_vector(self, aligned: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
        """W0 - Wb of every parameter, fp32, on the CPU; UserError without a base, or where it is the model itself."""
        base = dict(load_base(self._loaded, self.name).named_parameters())
        vector = {name: W0.detach().float().cpu() - base[name].detach() for name, W0 in aligned.items()}
        if not any(V.any() for V in vector.values()):
            raise UserError(
                f"method={self.name}: model.base={self._loaded.base} has the aligned model's own weights, so the "
                "safety vector is zero; give the model before its alignment"
            )
        return vector

    def report(self, model: nn.Module) -> list[dict]:
        return [{"metric": "safety_vector_norm", "set": "train", "value": self.gamma * self._norm}]
