"""Other spaces than the autoencoder's for CWAC's activation constraint (ours): what it takes to couple both halves.

CWAC (arXiv:2604.12384, section 4.1, Eq. 11) preserves latents of a sparse autoencoder. `residual` preserves the
residual stream itself at the layers that the autoencoder reads; `logits` preserves what the aligned model would say
next. Prompts, draws per step and positions are those of Eq. 11 (cwac/constraints/sae/target.py), and so is the
interface: `len`, `loss`, `drift`.

Deviations:
- The paper has neither. A distance is averaged over the positions of a prompt, then over prompts, as L_safety is.
- `residual` divides each layer's squared distance by that layer's mean squared norm in the aligned model, so that
  deep layers, whose stream is longer, count as much as the others: 1 is a distance as long as the stream itself.
- `logits` is KL(aligned || current) in nats a token. At `response:n` it is read at the prompt's last token and at the
  first n tokens of the model's own refusal, so the first n + 1 tokens of the answer are preserved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from cwac.constraints.reference import Reference, precise
from cwac.core.errors import UserError
from cwac.data.tokenize import Collator
from cwac.models.hooks import Row, device_of, residuals
from cwac.models.layers import evaluating

CACHE_BYTES = 2**30
"""Baselines of more than this are not kept but computed again in every step, by the aligned model."""


class Target:
    """The aligned model's features on a set of prompts; built on the model before any update.

    rows: encoded prompts, with `prompt` the prompt's length where an answer follows. positions: as for
    `cwac.constraints.sae.target.SafetyTarget`. layers: decoder blocks, counted from 0.
    """

    metric: ClassVar[str]
    """The name of what `drift` measures."""

    def __init__(self, model: nn.Module, rows: Sequence[Row], positions: str, layers: Sequence[int]):
        if not len(rows):
            raise UserError("the activation constraint has no harmful prompts: give it a non-empty step pool")
        self.layers = list(layers)
        self.prompts = [locate(row, positions) for row in rows]  # (ids, positions) each
        self.reference: Reference | None = None
        self.baseline: list[Tensor] = []
        """[Q, ...] of each prompt, on the CPU; empty where `reference` computes it."""
        width = self.width(model)
        if 4 * width * sum(len(where) for _, where in self.prompts) > CACHE_BYTES:
            self.reference = Reference(model)
        with torch.no_grad(), evaluating(model):
            for i in range(0 if self.reference else len(self.prompts)):
                batch, where, _ = self._batch([i], device_of(model))
                self.baseline.append(self.pick(self.outputs(model, batch), where)[0].cpu())

    def width(self, model: nn.Module) -> int:
        """Numbers a position has."""
        raise NotImplementedError

    def outputs(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """[B, T, ...] of the current model, with its graph."""
        raise NotImplementedError

    def aligned(self, batch: dict[str, Tensor]) -> Tensor:
        """[B, T, ...] of the aligned model, by `reference`, without a graph."""
        raise NotImplementedError

    def features(self, picked: Tensor) -> Tensor:
        """What is compared, of outputs [B, Q, ...]."""
        return precise(picked)

    def distance(self, now: Tensor, base: Tensor) -> Tensor:
        """[B, Q] between features [B, Q, ...]."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.prompts)

    def loss(self, model: nn.Module, indices: Sequence[int]) -> Tensor:
        """Scalar, fp32, with a gradient: the mean distance of the prompts `indices` from the aligned model."""
        batch, where, mask = self._batch(indices, device_of(model))
        now = self.pick(self.outputs(model, batch), where)
        distances = self.distance(now, self.remembered(indices, now.device))
        return (torch.where(mask, distances, 0.0).sum(1) / mask.sum(1)).mean()

    @torch.no_grad()
    def remembered(self, indices: Sequence[int], device: torch.device) -> Tensor:
        """The aligned model's features [B, Q, ...] on the prompts `indices`; padding as in `_batch`."""
        if self.reference is None:
            features = [self.baseline[int(i)] for i in indices]
            return nn.utils.rnn.pad_sequence(features, batch_first=True).to(device)
        batch, where, _ = self._batch(indices, device)
        return self.pick(self.aligned(batch), where)

    @torch.no_grad()
    def drift(self, model: nn.Module, batch_size: int = 16) -> dict[str, float]:
        """The distance on all prompts, in evaluation mode, under the name of the metric."""
        total = 0.0
        with evaluating(model):
            for start in range(0, len(self), batch_size):
                indices = range(start, min(start + batch_size, len(self)))
                total += len(indices) * self.loss(model, indices).item()
        return {self.metric: total / len(self)}

    def pick(self, outputs: Tensor, where: Tensor) -> Tensor:
        """Features at `where` [B, Q] of outputs [B, T, ...]."""
        where = where.to(outputs.device)
        return self.features(outputs[torch.arange(len(where), device=outputs.device).unsqueeze(1), where])

    def _batch(self, indices: Sequence[int], device: torch.device) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Model inputs [B, T], positions [B, Q] padded with 0, and which of them are real [B, Q]."""
        chosen = [self.prompts[int(i)] for i in indices]
        batch = Collator(0)([{"input_ids": ids} for ids, _ in chosen])
        where = nn.utils.rnn.pad_sequence([torch.tensor(w) for _, w in chosen], batch_first=True)
        mask = torch.arange(where.shape[1]) < torch.tensor([len(w) for _, w in chosen]).unsqueeze(1)
        inputs = {key: batch[key].to(device) for key in ("input_ids", "attention_mask")}
        return inputs, where.to(device), mask.to(device)


class ResidualTarget(Target):
    """||r - r_base||^2 over the layer's mean ||r_base||^2, averaged over layers."""

    metric = "residual_distance"

    def __init__(self, model: nn.Module, rows: Sequence[Row], positions: str, layers: Sequence[int]):
        super().__init__(model, rows, positions, layers)
        norms, tokens = torch.zeros(len(layers)), 0
        for i in range(len(self)):
            base = self.remembered([i], device_of(model))[0].cpu()  # [Q, L, d]
            norms, tokens = norms + base.square().sum((0, 2)), tokens + len(base)
        self.scale = norms / tokens  # [L]

    def width(self, model: nn.Module) -> int:
        return len(self.layers) * model.get_input_embeddings().embedding_dim

    def outputs(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return residuals(model, batch, self.layers)  # [B, T, L, d]

    def aligned(self, batch: dict[str, Tensor]) -> Tensor:
        return self.reference.hidden_states(batch, self.layers)

    def distance(self, now: Tensor, base: Tensor) -> Tensor:
        return ((now - base).square().sum(-1) / self.scale.to(now.device)).mean(-1)


class LogitsTarget(Target):
    """KL(p_aligned || p) of the next token, p = softmax(logits)."""

    metric = "kl"

    def width(self, model: nn.Module) -> int:
        return model.get_input_embeddings().num_embeddings

    def outputs(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(**batch, use_cache=False).logits  # [B, T, V]

    def aligned(self, batch: dict[str, Tensor]) -> Tensor:
        return self.reference.logits(batch)

    def features(self, picked: Tensor) -> Tensor:
        return precise(picked).log_softmax(-1)

    def distance(self, now: Tensor, base: Tensor) -> Tensor:
        return (base.exp() * (base - now)).sum(-1)


TARGETS = {"residual": ResidualTarget, "logits": LogitsTarget}


def locate(row: Row, positions: str) -> tuple[list[int], list[int]]:
    """The token ids to run and the positions to read, for the `positions` option of `SafetyTarget.build`."""
    ids = list(row["input_ids"])
    prompt = ids[: row.get("prompt", len(ids))]
    kind, _, count = positions.partition(":")
    if kind == "last" and not count:
        return prompt, [len(prompt) - 1]
    if kind == "prompt" and not count:
        return prompt, list(range(1, len(prompt))) or [0]
    if kind == "template" and count.isdigit() and int(count) > 0:
        return prompt, list(range(max(0, len(prompt) - int(count)), len(prompt)))
    if kind == "response" and count.isdigit() and int(count) > 0:
        if len(ids) == len(prompt):
            raise UserError(f"method.activation.positions={positions} needs the model's answers after the prompts")
        ids = ids[: len(prompt) + int(count)]
        return ids, list(range(len(prompt) - 1, len(ids)))
    raise UserError(f"method.activation.positions={positions}: use last, template:n, prompt or response:n, n >= 1")
