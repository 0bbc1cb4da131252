"""Weights drawn back to where they started, each with a stiffness of its own: L2-SP and EWC.

The term is 1/2 sum_i k_i (W - W_0)_i^2 over everything that trains, with k_i the stiffness; its gradient is
k_i (W - W_0)_i, added in closed form once per optimizer step. Of a layer with LoRA adapters W - W_0 is dW = sum s B A,
so that the term is the same function of the weights whether a matrix trains itself or through adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from cwac.core.distributed import local, spread, whole
from cwac.models.adapters import active_adapters
from cwac.models.layers import base_layer


class Start:
    """W_0 of all that trains, and the stiffness by the same names.

    Build it in `Method.setup`, on whole weights; call `place` in `Method.start`, when the model is wrapped.
    """

    def __init__(self, model: nn.Module, stiffness: Mapping[str, Tensor] | None = None):
        """stiffness: by name of `matrices`, in the shape of the weight; None for 1 everywhere."""
        self.weights = {name: p.detach().clone() for name, p in plain(model)}
        self.stiffness = stiffness

    def place(self, model: nn.Module) -> None:
        """Hold the copies as the parameters are held now; nothing is sent between ranks."""
        now = dict(plain(model))
        self.weights = {name: spread(W, now[name]) for name, W in self.weights.items()}
        if self.stiffness is not None:
            device = next(model.parameters()).device
            held = {name: spread(k, now[name]) if name in now else k.to(device) for name, k in self.stiffness.items()}
            self.stiffness = held

    @torch.no_grad()
    def add_gradient_(self, model: nn.Module, strength: float) -> None:
        """grad += strength k (W - W_0) of what has a gradient; every rank must call it at once."""
        for name, p in plain(model):
            if p.grad is not None:
                change = p.float() - self.weights[name].float()
                p.grad.add_(self._pulled(name, change).to(p.grad.dtype), alpha=strength)
        for name, layer in adapted(model):
            parts = [(A.weight, B.weight, s) for A, B, s in active_adapters(layer)]
            factors = [(whole(A).float(), whole(B).float(), s) for A, B, s in parts]
            G = self._pulled(name, sum(s * B @ A for A, B, s in factors))  # [d_out, d_in]
            for (A, B, s), (a, b, _) in zip(parts, factors, strict=True):
                add_(A.grad, b.T @ G, strength * s)
                add_(B.grad, G @ a.T, strength * s)

    def _pulled(self, name: str, change: Tensor) -> Tensor:
        return change if self.stiffness is None else self.stiffness[name] * change


def matrices(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """All that the term holds: what trains itself, and the frozen weights that an adapter changes."""
    yield from plain(model)
    yield from ((name, base_layer(layer).weight) for name, layer in adapted(model))


def plain(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What trains itself: every parameter with a gradient but those of LoRA adapters of linear layers."""
    own = {id(x.weight) for _, layer in adapted(model) for A, B, _ in active_adapters(layer) for x in (A, B)}
    yield from ((name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in own)


def adapted(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers that a LoRA adapter changes, by the name of the weight below it."""
    for name, module in model.named_modules():
        if any(B.weight.requires_grad for _, B, _ in active_adapters(module)):
            yield f"{name}.base_layer.weight", module


def add_(grad: Tensor | None, change: Tensor, factor: float) -> None:
    """grad += factor change, for a whole `change` and whichever rows of `grad` are here; a frozen factor has none."""
    if grad is not None:
        local(grad).add_(local(spread(change, grad)).to(grad.dtype), alpha=factor)
