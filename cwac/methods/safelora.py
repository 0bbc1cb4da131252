"""Safe LoRA: after fine-tuning, the updates that left the direction of the alignment are projected back onto it.

Hsu, Tsai, Lin, Chen, Yu, Huang: "Safe LoRA: the Silver Lining of Reducing Safety Risks when Fine-tuning Large Language
Models", NeurIPS 2024, arXiv:2405.16833. With V = W0 - Wb, aligned minus unaligned, C = V V^T / ||V||_F; a
matrix whose update has cos(C dW, dW) <= tau gets C dW in its place.

Deviations:
- Full-parameter form (ours; the authors project adapters only): W <- W0 + C dW for every linear layer of the decoder
  blocks. Since ||V||_F is usually far below the dimension, C dW is small and the layer is nearly reset to W0. What
  is no linear layer of a block (embeddings, norms, head) stays as it was trained.
- LoRA form: B <- C B, which is dW <- C dW.
- All cosines are computed first, in fp32, then matrices are projected; as in the authors' code they are rounded to
  five digits, and ties at the threshold of `number` are all projected.
- A matrix that did not move has no cosine and is left alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from cwac.core.checks import check_choice, check_modules, check_number, check_unread, check_whole
from cwac.core.errors import UserError
from cwac.data.examples import Example
from cwac.methods.base import Context, Method
from cwac.models.adapters import active_adapters, require_plain_lora
from cwac.models.layers import linears, trains
from cwac.models.loading import alignment_directions, load_aligned, require_source


def project(V: torch.Tensor, D: torch.Tensor) -> torch.Tensor:
    """C D = V (V^T D) / ||V||_F, for V [m, n] and D [m, any]; 0 where V is 0."""
    norm = V.norm()
    if not norm:
        return torch.zeros_like(D)
    m, n = V.shape
    return (V @ V.T) @ D / norm if m <= n else V @ (V.T @ D) / norm


def cosine(a: torch.Tensor, b: torch.Tensor) -> float | None:
    """Of two matrices as vectors, rounded to five digits; None where b is 0, and 0 where only a is."""
    if not b.any():
        return None
    product = a.norm() * b.norm()
    return round(float((a * b).sum() / product), 5) if product else 0.0


def delta(module: nn.Module, W0: torch.Tensor) -> torch.Tensor:
    """dW [m, n] in fp32 of a trained linear layer; of an adapted one its adapters' sum of s B A.

    W0 is taken in the precision the layer was kept in: rounding it to bf16 is no update.
    """
    if not hasattr(module, "lora_A"):
        return module.weight.float() - W0.to(module.weight.dtype).float()
    return sum(s * B.weight.float() @ A.weight.float() for A, B, s in active_adapters(module))


@dataclass
class SafeLoRA(Method):
    """Trains as SFT does; everything happens once, after training."""

    select: str = "threshold"
    """`threshold`: cosines of at most tau are projected; `number`: the lowest `number` of them."""
    tau: float = 0.5
    number: int = 10
    modules: Sequence[str] | str = "all"
    """`all`, or names of linear layers."""

    needs_base_weights: ClassVar[bool] = True

    def __post_init__(self):
        check_choice("select", self.select, ("threshold", "number"))
        check_number("tau", self.tau, -1, 1)
        check_whole("number", self.number, 1)
        check_unread("number", self.number, type(self).number, self.select == "number", "select=number")
        check_unread("tau", self.tau, type(self).tau, self.select == "threshold", "select=threshold")
        check_modules("modules", self.modules)
        self._cosines: dict[str, float] = {}

    def extra_data(self) -> dict[str, int]:
        return {"base_weights": self._n_matrices}

    def training_data(self, train: list[Example], context: Context, rng: random.Random) -> list[Example]:
        require_plain_lora(context.loaded.model, self.name)
        require_source(context.loaded, self.name)
        self._loaded = context.loaded
        alignment_directions(context.loaded, self.name, self.modules)  # its errors come before training
        self._n_matrices = sum(map(trains, linears(context.loaded.model, self.modules).values()))
        if not self._n_matrices:
            raise UserError(
                f"method.modules={self.modules} names no matrix that trains; with model.lora, choose among its "
                "target_modules"
            )
        if self.select == "number" and self.number > self._n_matrices:
            raise UserError(f"method.number={self.number} is more than the {self._n_matrices} matrices; lower it")
        return train

    def finish(self, model: nn.Module) -> None:
        aligned = load_aligned(self._loaded)
        V = alignment_directions(self._loaded, self.name, self.modules, aligned)
        W0, modules = linears(aligned, self.modules), linears(model, self.modules)
        for name, module in modules.items():
            D = delta(module, W0[name].weight)
            value = cosine(project(V[name].to(D.device), D), D)
            if value is not None:
                self._cosines[name] = value
        for name in self.chosen(self._cosines):
            module, v = modules[name], V[name].to(W0[name].weight.device)
            if hasattr(module, "lora_B"):
                for _, B, _ in active_adapters(module):
                    B.weight.copy_(project(v, B.weight.float()))
            else:
                module.weight.copy_(W0[name].weight + project(v, delta(module, W0[name].weight)))

    def chosen(self, cosines: dict[str, float]) -> list[str]:
        """The matrices to project: cosine at most tau, where `number` makes tau the number-th lowest cosine."""
        tau = self.tau
        if self.select == "number" and cosines:
            tau = sorted(cosines.values())[min(self.number, len(cosines)) - 1]
        return [name for name, value in cosines.items() if value <= tau]

    def report(self, model: nn.Module) -> list[dict]:
        n = len(self.chosen(self._cosines))
        rows = [{"metric": "projected_matrices", "set": "train", "value": n, "n": self._n_matrices}]
        return rows + [{"metric": "projection_cosine", "set": m, "value": v} for m, v in self._cosines.items()]
