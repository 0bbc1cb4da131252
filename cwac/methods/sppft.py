"""SPPFT: the safety layers are frozen, the rest is fine-tuned (safely partial-parameter fine-tuning).

Li, Yao, Zhang, Li: "Safety Layers in Aligned Large Language Models: The Key to LLM Security", arXiv:2408.17003.
The attention and MLP parameters of decoder layers lo..hi, both included and counted from 0, do not train.

Deviations:
- The range is the paper's where it has one for the model (Table 1: `model.safety_layers`), else it is localised, see
  `cwac/methods/safety_layers.py`.
- The norms of those layers train, as in the authors' code; the paper says "the parameters of these layers". With
  `freeze_norms` they are frozen too.
- With LoRA the adapters of those layers do not train.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from cwac.core.checks import check, check_flag
from cwac.core.errors import UserError
from cwac.data.examples import Example
from cwac.methods.base import Context, Method
from cwac.methods.safety_layers import Localisation, locate, queries
from cwac.models.layers import decoder_layers


@dataclass
class SPPFT(Method):
    """Nothing but which parameters train differs from SFT."""

    layers: Sequence[int] | str = "auto"
    """(lo, hi), or `auto`: localise."""
    freeze_norms: bool = False
    localisation: Localisation = field(default_factory=Localisation)

    def __post_init__(self):
        if self.layers != "auto":
            pair = not isinstance(self.layers, str | int) and [type(k) for k in self.layers] == [int, int]
            ordered = pair and 0 <= self.layers[0] <= self.layers[1]
            check(ordered, "layers", self.layers, "give [lo,hi] with 0 <= lo <= hi, or auto")
        check_flag("freeze_norms", self.freeze_norms)
        self._extra: dict[str, int] = {}

    def extra_data(self) -> dict[str, int]:
        return self._extra

    def training_data(self, train: list[Example], context: Context, rng: random.Random) -> list[Example]:
        if self.layers == "auto":
            queries(context, self.localisation)  # refuses pools that are too small
            return train
        usual = self.localisation == Localisation()
        remedy = f"method.layers={list(self.layers)} needs no search: leave it out, or use method.layers=auto"
        check(usual, "localisation", self.localisation, remedy)
        n = len(decoder_layers(context.loaded.model))
        if self.layers[1] >= n:
            raise UserError(
                f"method.layers={list(self.layers)} lies outside the model's layers 0..{n - 1}; choose lo and hi "
                "among them, or auto"
            )
        self._frozen(context.loaded.model, *self.layers)
        return train

    def setup(self, model: nn.Module, context: Context) -> None:
        if self.layers == "auto":
            localised = locate(model, context, self.localisation)
            self._range = (localised.lo, localised.hi)
            self._extra = {"harmful_prompts": localised.n_harmful, "harmless_rows": localised.n_harmless}
        else:
            self._range = tuple(self.layers)
        for parameter in self._frozen(model, *self._range):
            parameter.requires_grad_(False)

    def _frozen(self, model: nn.Module, lo: int, hi: int) -> list[nn.Parameter]:
        """The parameters of layers lo..hi that shall not train. Raises UserError if no others do."""
        frozen = []
        for block in decoder_layers(model)[lo : hi + 1]:
            for part in (block,) if self.freeze_norms else (block.self_attn, block.mlp):
                frozen += part.parameters()
        if not any(p.requires_grad for p in frozen):
            raise UserError(
                f"method={self.name} freezes layers {lo}..{hi}, in which nothing trains anyway: it would be plain "
                "fine-tuning; give method.layers a range that the adapter reaches, or adapt these layers"
            )
        ids = {id(p) for p in frozen}
        if not any(p.requires_grad and id(p) not in ids for p in model.parameters()):
            raise UserError(
                f"method={self.name} freezes layers {lo}..{hi}, and nothing that trains is left; give method.layers a "
                "narrower range"
            )
        return frozen

    def report(self, model: nn.Module) -> list[dict]:
        total = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        values = {"frozen_first_layer": self._range[0], "frozen_last_layer": self._range[1]}
        values["trained_share"] = trained / total
        return [{"metric": name, "set": "train", "value": value} for name, value in values.items()]
