"""Constrained SFT: the first tokens of an answer may move little from what the aligned model says there.

Qi, Panda, Lyu, Ma, Roy, Beirami, Mittal, Henderson: "Safety Alignment Should Be Made More Than Just a Few Tokens
Deep", ICLR 2025, arXiv:2406.05946, section 4. With pi the trained and pi_0 the aligned model, the loss of an answer y
is sum_t -2 / b_t log sigmoid(b_t log (pi(y_t | x, y_<t) / pi_0(y_t | x, y_<t))), whose gradient is that of the
cross-entropy with each token weighted by w_t = 2 (1 - sigmoid(b_t log (pi / pi_0))): 1 at the start, less once a
token is likelier than it was, the sooner the larger b_t. Official code, read at fb1749e of
Unispac/shallow-vs-deep-alignment (`finetune.py`, `finetuning_buckets/trainer/trainer.py`): b = 0.1 with factors 5 for
the first token and 20 for the second to fifth; the loss is w_t times the cross-entropy with w_t detached, at least
1e-3, averaged over the answers' tokens. b_t -> 0 gives w_t = 1, the cross-entropy.

Deviations:
- The trainer adds the cross-entropy; the penalty here is what is missing, the mean of (w_t - 1) times it. It costs a
  second pass through the model and one through the aligned model, and holds all micro-batches of an optimizer step in
  one graph. The loss that is logged is the plain cross-entropy, with the penalty beside it.
- The mean is over all tokens of an optimizer step, on all ranks together, as the trainer's own; theirs is over those
  of a micro-batch on one device.
- The authors lower AdamW's beta_1 to 0.5 under this loss and warm up for 10 steps; that is no part of the method here:
  train.adam_beta1=0.5 train.warmup_steps=10.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from cwac.constraints.reference import Reference
from cwac.core.checks import check_number, check_whole
from cwac.core.distributed import total, world_size
from cwac.data.tokenize import IGNORE
from cwac.methods.base import Batch, Context, Method

LEAST = 1e-3
"""Of the weight of a token, in the official code."""


@dataclass
class ConstrainedSFT(Method):
    """Needs no data beyond the task."""

    beta: float = 0.1
    """b_t after the first tokens; 0 is plain fine-tuning."""
    factor: float = 20.0
    """b_t of the second to the last of the first tokens, over beta."""
    first_factor: float = 5.0
    """b_t of the first token, over beta."""
    length: int = 5
    """How many tokens are the first ones."""

    def __post_init__(self):
        check_number("beta", self.beta, 0)
        check_number("factor", self.factor, 0)
        check_number("first_factor", self.first_factor, 0)
        check_whole("length", self.length, 0)
        self._step: list[tuple[int, Batch]] = []

    def setup(self, model: nn.Module, context: Context) -> None:
        if self.beta:
            self._reference = Reference(model)

    def batch(self, batch: Batch, step: int, part: tuple[int, int]) -> Batch:
        if self.beta:
            self._step = [(s, b) for s, b in self._step if s == step] + [(step, batch)]
        return batch

    def penalty(self, model: nn.Module, step: int) -> Tensor | None:
        if not self.beta:
            return None
        device = next(model.parameters()).device
        missing, n = 0.0, 0
        for _, batch in self._step:
            inputs = {k: batch[k].to(device) for k in ("input_ids", "attention_mask")}
            labels = batch["labels"].to(device)
            then = log_likelihoods(self._reference.logits(inputs), labels)
            now = log_likelihoods(model(**inputs, use_cache=False).logits, labels)
            weights = self.weights(now.detach(), then, labels)
            missing = missing - ((weights - 1) * now).sum()
            n += int((labels[:, 1:] != IGNORE).sum())
        self._step = []
        return missing * world_size() / max(1, total(n, device))

    def weights(self, now: Tensor, then: Tensor, labels: Tensor) -> Tensor:
        """w_t [B, T - 1] of log-likelihoods [B, T - 1] under the trained and the aligned model; labels [B, T]."""
        answered = labels[:, 1:] != IGNORE
        place = answered.cumsum(1) - 1  # of a token in its answer
        b = torch.full_like(now, self.beta)
        b[place < self.length] = self.beta * self.factor
        if self.length:
            b[place == 0] = self.beta * self.first_factor
        return (2 * (1 - torch.sigmoid(b * (now - then)))).clamp(min=LEAST)


def log_likelihoods(logits: Tensor, labels: Tensor) -> Tensor:
    """[B, T - 1] of each label given what precedes it, 0 where there is none; logits [B, T, V], labels [B, T]."""
    return -functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), labels[:, 1:], ignore_index=IGNORE, reduction="none"
    )
