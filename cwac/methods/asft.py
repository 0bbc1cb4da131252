"""AsFT: the update is held in the narrow basin along the direction of the alignment.

Yang et al.: "AsFT: Anchoring Safety During LLM Fine-Tuning Within Narrow Safety Basin", arXiv:2506.08473 (AAAI 2026).
With W0 the aligned and Wb the unaligned weights, V = W0 - Wb [m, n] and dW = W - W0, the loss gains
R = lambda sum ||(I - C) dW||_F^2 over the chosen matrices. C is one of three operators; with the singular value
decomposition V = U S Y^T each of them is U diag(w) U^T:

- `official`: C = V V^T / ||V||_F, w_i = s_i^2 / ||V||_F (the authors' code, taken from Safe LoRA). Not a projector and
  not free of scale: trace(C) = ||V||_F. Where it is small, R is nearly an L2 anchor; where w_i exceeds 2, R grows
  along the aligned direction. trace(C) and the largest w_i are reported per matrix.
- `spectral` (ours): C = V V^T / s_1^2, w_i = (s_i / s_1)^2 in [0, 1], whatever the scale of V.
- `projector_k` (ours): C = U_k U_k^T, w_i = 1 for the k leading directions that keep `energy` of ||V||_F^2.

Deviations:
- The paper's C = V (V^T V)^-1 V^T (Eqs. 3-4) is the identity for every V of full row rank, so its penalty is always 0;
  `projector_k` is what can be meant by it.
- Full-parameter training is ours (the code is LoRA only): the chosen matrices are penalised, everything else trains
  freely.
- LoRA: the authors' code penalises B A and leaves out the scaling s = alpha / r, so one lambda means another strength
  at another alpha: it is s^2 times weaker on the change of the weights, dW = s B A (16 times at s = 4). That is the
  default; with `lora_scaling` (ours) LoRA and full-parameter runs penalise the same function of the weights.
- The gradient is added in closed form once per optimizer step, before clipping; the authors add the loss after
  dividing the task loss by the accumulation steps, which multiplies lambda by them.
- A matrix with V = 0, which the alignment did not touch, has C = 0 (the limit of `official`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from cwac.core.checks import (
    check_choice,
    check_flag,
    check_modules,
    check_number,
    check_share,
    check_unread,
    check_whole,
)
from cwac.core.distributed import local, spread, whole
from cwac.core.errors import UserError
from cwac.data.examples import Example
from cwac.methods.base import Context, Method
from cwac.models.adapters import active_adapters, require_plain_lora
from cwac.models.layers import linears, trains
from cwac.models.loading import alignment_directions

OPERATORS = ("official", "spectral", "projector_k")


class Operator:
    """Q = (I - C)^2 of one matrix, in the cheaper of two forms: dense [m, m], or I - F M F^T with F [m, k].

    Value and gradient of the penalty both need Q dW alone: ||(I - C) dW||_F^2 = <dW, Q dW>, gradient 2 Q dW.
    """

    def __init__(self, V: torch.Tensor, operator: str, rank: int | None = None, energy: float = 0.9):
        """V [m, n]. rank: keep the leading directions only; None for all. energy: of `projector_k`."""
        m, norm = V.shape[0], V.norm()
        if not norm:
            U, w, kept = V[:, :0], V.new_zeros(0), 1.0
        elif rank is None and operator != "projector_k":
            s = torch.linalg.svdvals(V)
            scale = norm if operator == "official" else s[0].square()
            U, w, kept = None, s.square() / scale, 1.0
        else:
            U, s, _ = torch.linalg.svd(V, full_matrices=False)
            share = s.square().cumsum(0) / s.square().sum()
            k = len(s) if rank is None else min(rank, len(s))
            if operator == "projector_k":
                k = min(k, int((share < energy).sum()) + 1)
                w = torch.ones_like(s)
            else:
                w = s.square() / (norm if operator == "official" else s[0].square())
            U, w, kept = U[:, :k], w[:k], float(share[k - 1])
        self.trace, self.lambda_max, self.energy = float(w.sum()), float(w.max()) if len(w) else 0.0, kept
        F = V / scale.sqrt() if U is None else U * w.sqrt()  # C = F F^T
        k = F.shape[1]
        if m <= 2 * k:  # 2 m^2 n operations a product, against 4 m k n
            residual = torch.eye(m, device=V.device) - F @ F.T
            self.dense, self.F, self.M = residual @ residual, None, None
        else:
            self.dense, self.F = None, F.contiguous()
            self.M = 2 * torch.eye(k, device=V.device) - F.T @ F

    def __call__(self, D: torch.Tensor) -> torch.Tensor:
        """Q D, for D [m, any]."""
        if self.dense is not None:
            return self.dense @ D
        return D - self.F @ (self.M @ (self.F.T @ D))


class Full:
    """The penalty of a matrix that trains itself: dW = W - W0."""

    def __init__(self, layer: nn.Linear, operator: Operator):
        self.layer, self.operator, self.W0 = layer, operator, layer.weight.detach().float().clone()

    def add_gradient_(self, lam: float) -> torch.Tensor:
        """grad += 2 lambda Q dW; returns ||(I - C) dW||_F^2. In fp32, whatever the weights are kept in."""
        weight = self.layer.weight
        self.W0 = spread(self.W0, weight)
        D = whole(weight.float() - self.W0)  # Q mixes rows
        QD = self.operator(D)
        add_(weight.grad, QD, 2 * lam)
        return torch.dot(D.view(-1), QD.view(-1))


class Adapter:
    """The penalty of a LoRA adapter, dW = s B A with A [r, n] and B [m, r]; dW is never formed.

    scaling: s, or 1 for the authors' form, which takes B A for dW.
    """

    def __init__(self, A: nn.Linear, B: nn.Linear, scaling: float, operator: Operator):
        self.A, self.B, self.scaling, self.operator = A, B, scaling, operator

    def add_gradient_(self, lam: float) -> torch.Tensor:
        """grad_B += 2 lambda s^2 Q B (A A^T), grad_A += 2 lambda s^2 (B^T Q B) A; returns ||(I - C) dW||_F^2."""
        A, B, square = whole(self.A.weight).float(), whole(self.B.weight).float(), self.scaling**2
        QB = self.operator(B)  # [m, r]
        left, right = B.T @ QB, A @ A.T  # [r, r]
        add_(self.B.weight.grad, QB @ right, 2 * lam * square)
        add_(self.A.weight.grad, left @ A, 2 * lam * square)
        return square * (left * right).sum()


def add_(grad: torch.Tensor, change: torch.Tensor, factor: float) -> None:
    """grad += factor change, for a whole `change` and whichever rows of `grad` are here."""
    local(grad).add_(local(spread(change, grad)).to(grad.dtype), alpha=factor)


@dataclass
class AsFT(Method):
    """lam is lambda of the penalty; modules are the matrices it acts on."""

    lam: float = 1.0
    modules: Sequence[str] | str = ("q_proj", "v_proj")
    """`all`, or names of linear layers."""
    operator: str = "official"
    rank: int | None = None
    """Singular directions of V to keep, for large matrices; None keeps all."""
    energy: float = 0.9
    """Share of ||V||_F^2 that `projector_k` keeps; no other operator reads it."""
    lora_scaling: bool = False
    """With LoRA: whether dW is s B A, the change of the weights (ours), or B A, as in the authors' code."""

    needs_step_hooks: ClassVar[bool] = True
    needs_base_weights: ClassVar[bool] = True

    def __post_init__(self):
        check_number("lam", self.lam, 0)
        check_modules("modules", self.modules)
        check_choice("operator", self.operator, OPERATORS)
        check_whole("rank", self.rank, 1, null=True)
        check_share("energy", self.energy)
        check_unread("energy", self.energy, type(self).energy, self.operator == "projector_k", "operator=projector_k")
        check_flag("lora_scaling", self.lora_scaling)
        self._total, self._steps = 0.0, 0

    def extra_data(self) -> dict[str, int]:
        return {"base_weights": len(self._operators)}

    def training_data(self, train: list[Example], context: Context, rng: random.Random) -> list[Example]:
        require_plain_lora(context.loaded.model, self.name)
        self._V = alignment_directions(context.loaded, self.name, self.modules)
        if not any(trains(m) for m in linears(context.loaded.model, self.modules).values()):
            raise UserError(
                f"method.modules={self.modules} names no matrix that trains; with model.lora, choose among its "
                "target_modules"
            )
        return train

    def setup(self, model: nn.Module, context: Context) -> None:
        self._terms: list[Full | Adapter] = []
        self._operators: dict[str, Operator] = {}
        for name, module in linears(model, self.modules).items():
            V = self._V.pop(name)
            if not trains(module):
                continue
            operator = Operator(V.to(module.weight.device), self.operator, self.rank, self.energy)
            self._operators[name] = operator
            if not hasattr(module, "lora_A"):
                self._terms.append(Full(module, operator))
            for A, B, s in active_adapters(module):
                self._terms.append(Adapter(A, B, s if self.lora_scaling else 1.0, operator))

    def after_backward(self, model: nn.Module) -> None:
        value = sum(term.add_gradient_(self.lam) for term in self._terms)
        self._total = self._total + self.lam * value  # a tensor: no synchronisation with the device
        self._steps += 1

    def state_dict(self) -> dict:
        return {"total": float(self._total), "steps": self._steps}

    def load_state_dict(self, state: dict) -> None:
        self._total, self._steps = state["total"], state["steps"]

    def report(self, model: nn.Module) -> list[dict]:
        rows = []
        if self._steps:
            rows.append({"metric": "penalty", "set": "train", "value": float(self._total) / self._steps})
        for name, operator in self._operators.items():
            rows += [
                {"metric": "operator_trace", "set": name, "value": operator.trace},
                {"metric": "operator_lambda_max", "set": name, "value": operator.lambda_max},
                {"metric": "operator_energy", "set": name, "value": operator.energy},
            ]
        return rows
