"""LDIFS: fine-tuning under an l2 distance in feature space to the initial model.

Mukhoti, Gal, Torr, Dokania: "Fine-tuning can cripple your foundation model; preserving features may be the solution",
TMLR 2024, arXiv:2308.13320. With Phi(x) the hidden features of several layers, each normalised and then concatenated:
loss = CE + lambda mean_x ||Phi(x; theta) - Phi(x; theta_0)||^2, over the fine-tuning inputs themselves. Read besides
the abstract: `loss/ldifs.py`, `model/modeling.py`, `args.py` of omegafragger/ldifs_code at 5ffdeef.

The official code takes five layers of twelve, the input of the first block and every third output. Its
`normalize_tensor` scales along axis 1, which is the channel axis of a convolution but the token axis of its
transformer: for one image, every channel of a layer, a vector over tokens, gets length 1. The squared differences are
then averaged over channels, tokens and layers. With T tokens a value lies between 0 and 4 / T.

Deviations:
- A language model instead of CLIP's image tower: the features are the residual stream at every real token of a
  training row, prompt and answer; five layers at the same shares of the depth (`layers`).
- `unit: token` (ours) is what the paper's formula reads as: a token's vector is scaled to length 1, its squared
  distance is summed over the width and averaged over tokens and layers, so that it lies between 0 and 4 whatever the
  row's length. At the same lambda it is about T times as strong as `unit: channel`, the official code's (49.1 times
  at T = 50), and with `layers: null`, every block's output, it is what this method was before.
- Booster's adaptation to language models (`LDIFSTrainer` in trainer.py of git-disl/Booster) sums unnormalised MLP
  outputs and drops every layer whose term exceeds 0.1; neither is in the paper, and neither is done here.
- The rows are the step's own, poison included: the method does not know which rows are harmful, and preserves the
  aligned model's features on those as well.
- The penalty reads all micro-batches of an optimizer step in one graph, because the contract adds it once per step;
  gradient accumulation therefore saves it no memory (ours).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from cwac.constraints.reference import Reference, mean_over_tokens, model_layers, precise
from cwac.core.checks import check_choice, check_layers, check_number
from cwac.methods.base import Batch, Context, Method
from cwac.models.hooks import ENTRY, residuals
from cwac.models.layers import decoder_layers


@dataclass
class LDIFS(Method):
    """Needs no data beyond the task; each step costs a second pass, and one through the initial model."""

    lam: float = 10.0
    """lambda; 0 is plain fine-tuning."""
    layers: Sequence[int] | str | None = "official"
    """Where features are read: `official`, the input of the first block and the outputs at every fourth of the depth;
    blocks whose output is compared, counted from 0 (ours); None for the output of every block (ours)."""
    unit: str = "channel"
    """What is scaled to length 1: `channel`, one channel over a row's tokens (official), or `token`, one token over
    the channels (ours)."""

    def __post_init__(self):
        check_number("lam", self.lam, 0)
        check_layers(self.layers, "official")
        check_choice("unit", self.unit, tuple(DISTANCES))
        self._step: list[tuple[int, Batch]] = []

    def training_data(self, train, context: Context, rng):
        feature_layers(context.loaded.model, self.layers)
        return train

    def setup(self, model: nn.Module, context: Context) -> None:
        self._layers = feature_layers(model, self.layers)
        if self.lam:
            self._reference = Reference(model)

    def batch(self, batch: Batch, step: int, part: tuple[int, int]) -> Batch:
        if self.lam:
            self._step = [(s, b) for s, b in self._step if s == step] + [(step, batch)]
        return batch

    def penalty(self, model: nn.Module, step: int) -> torch.Tensor | None:
        if not self.lam:
            return None
        device = next(model.parameters()).device
        distances = []
        for _, batch in self._step:
            inputs = {k: batch[k].to(device) for k in ("input_ids", "attention_mask")}
            then = self._reference.hidden_states(inputs, self._layers)
            now = residuals(model, inputs, self._layers)
            distances.append(DISTANCES[self.unit](now, then, inputs["attention_mask"]))
        self._step = []
        return self.lam * torch.cat(distances).mean()


def feature_layers(model: nn.Module, layers: Sequence[int] | str | None) -> list[int]:
    """The layers to read, as `residuals` takes them; `official`: the input of block 0 and the ends of the quarters."""
    if layers != "official":
        return model_layers(model, layers)
    n = len(decoder_layers(model))
    return [ENTRY, *sorted({max(1, round(n * quarter / 4)) - 1 for quarter in range(1, 5)})]


def channel_distance(now: torch.Tensor, then: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[B] squared distances of channels scaled to length 1 over a row's real tokens; features [B, T, L, d].

    Averaged over channels, real tokens and layers.
    """
    real = mask.to(precise(now).dtype)[:, :, None, None]

    def unit(x: torch.Tensor) -> torch.Tensor:
        x = precise(x) * real
        return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10)  # the constant is the official code's

    return (unit(now) - unit(then)).square().mean((2, 3)).sum(1) / mask.sum(1)


def feature_distance(now: torch.Tensor, then: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[B] squared distances of unit vectors, averaged over layers and real tokens; features [B, T, L, d]."""
    difference = functional.normalize(precise(now), dim=-1) - functional.normalize(precise(then), dim=-1)
    return mean_over_tokens(difference.square().sum(-1), mask)


DISTANCES = {"channel": channel_distance, "token": feature_distance}
