"""The outputs of the model that a run started from, for methods that compare the trained model with them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cwac.core.errors import UsageError
from cwac.models.adapters import holds_update
from cwac.models.hooks import residuals
from cwac.models.layers import decoder_layers, evaluating


class Reference:
    """The model as it is when this object is built, kept for later comparison.

    Build it in `Method.setup`, before anything trains. With an adapter that has learnt nothing yet, the reference is
    the model itself with its adapter switched off, which costs no memory. Otherwise it is a frozen copy in the model's
    own dtype, so that the distance of an untrained model from it is exactly 0. Both are evaluated without dropout.
    """

    def __init__(self, model: nn.Module):
        fresh = hasattr(model, "disable_adapter") and not holds_update(model)
        self.adapted = model if fresh else None
        self.frozen = None if self.adapted is not None else copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def hidden_states(self, batch: dict[str, Tensor], layers: Sequence[int], norm: bool = False) -> Tensor:
        """The initial model's states [B, T, L, d] at the L `layers`; both arguments are as in `residuals`."""
        with self._initial() as model:
            return residuals(model, batch, layers, norm)

    @torch.no_grad()
    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """The logits [B, T, V] of the initial model; batch: `input_ids` and `attention_mask`, both [B, T]."""
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
    """The decoder blocks that the setting `layers` names, sorted and without repeats; None means all blocks.

    Raises UsageError if one of them lies outside 0 .. number of blocks - 1.
    """
    n = len(decoder_layers(model))
    chosen = list(range(n)) if layers is None else sorted(set(layers))
    if not chosen or chosen[0] < 0 or chosen[-1] >= n:
        raise UsageError(
            f"method.layers={list(layers)} lies outside the model: layers are decoder blocks counted from 0, so give "
            f"numbers in 0..{n - 1}, or null"
        )
    return chosen


def precise(x: Tensor) -> Tensor:
    """x in fp32, or in its own dtype if that is more precise.

    In bf16 the distance between two nearby vectors would consist of rounding errors.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def mean_over_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """The mean [B] of values [B, T, L] over layers, then over the real tokens of each row; mask: [B, T].

    Each row gets its own mean instead of one over all tokens of the batch, so that a later mean over rows does not
    depend on which rows share a batch.
    """
    mask = mask.to(values.dtype)
    return (values.mean(-1) * mask).sum(1) / mask.sum(1)
