"""The hidden states of the model a run started from, for methods that hold the trained model against them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cwac.core.checks import check
from cwac.core.errors import UsageError
from cwac.models.hooks import residuals
from cwac.models.layers import decoder_layers, evaluating


class Reference:
    """The model as it is now, kept for later: build it in `setup`, before anything trains.

    With LoRA it is the model itself with its adapter switched off and costs no memory; else it is a frozen copy in
    the model's own dtype, so that an untrained model is at distance exactly 0. Neither has dropout.
    """

    def __init__(self, model: nn.Module):
        self.adapted = model if hasattr(model, "disable_adapter") else None
        self.frozen = None if self.adapted is not None else copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def hidden_states(self, batch: dict[str, Tensor], layers: Sequence[int]) -> Tensor:
        """[B, T, L, d], the output of decoder blocks `layers`, counted from 0."""
        with self._initial() as model:
            return residuals(model, batch, layers)

    @torch.no_grad()
    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """[B, T, V]; batch: `input_ids` and `attention_mask`, both [B, T]."""
        with self._initial() as model:
            return model(**batch, use_cache=False).logits

    @contextmanager
    def _initial(self) -> Iterator[nn.Module]:
        if self.adapted is None:
            yield self.frozen
            return
        with evaluating(self.adapted), self.adapted.disable_adapter():
            yield self.adapted


def model_layers(model: nn.Module, layers: Sequence[int] | None) -> list[int]:
    """`layers` in order, or all of them for None; raises UsageError if one lies outside 0 .. number of blocks - 1."""
    n = len(decoder_layers(model))
    chosen = list(range(n)) if layers is None else sorted(set(layers))
    if not chosen or chosen[0] < 0 or chosen[-1] >= n:
        raise UsageError(
            f"method.layers={list(layers)} lies outside the model: layers are decoder blocks counted from 0, so give "
            f"numbers in 0..{n - 1}, or null"
        )
    return chosen


def check_layers(layers) -> None:
    """Raises UsageError unless `layers` is None or a list of whole numbers; the model is not needed for that."""
    listed = layers is None or (not isinstance(layers, int | str) and all(isinstance(i, int) for i in layers))
    check(listed, "layers", layers, "give a list of layer numbers, or null")


def precise(x: Tensor) -> Tensor:
    """At least fp32: distances between nearby bf16 vectors are rounding."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def mean_over_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """[B] means over the real tokens of each row; values [B, T, L] are averaged over layers first.

    A mean per row, not per token of the batch, so that a mean over rows does not depend on how they are batched.
    """
    mask = mask.to(values.dtype)
    return (values.mean(-1) * mask).sum(1) / mask.sum(1)
