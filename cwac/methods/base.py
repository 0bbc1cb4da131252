"""The contract of a defence. Plain supervised fine-tuning (SFT) is the base class itself."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from cwac.data.examples import Example, Messages
from cwac.data.harmful import Pools
from cwac.models import Loaded

Batch = dict[str, torch.Tensor]


@dataclass
class Context:
    """What a method may use when it sets itself up."""

    tokenizer: PreTrainedTokenizerBase
    pools: Pools
    loaded: Loaded
    artifacts: Path
    seed: int
    template: str = "chat"
    max_length: int = 512
    pools_key: str = ""
    """Hash of the pools' prompts; part of the key of every artifact built from them."""
    rank: int = 0
    world_size: int = 1


@dataclass
class Method:
    """Plain fine-tuning. A defence overrides only the hooks it needs; none calls super()."""

    name: str
    """The slug: equal to the yaml's file name, the command line and the `method` column."""

    needs_step_hooks: ClassVar[bool] = False
    """True where before_step or after_step is used; such a method refuses DeepSpeed, which steps inside backward."""

    def training_data(self, train: list[Example], pools: Pools, rng: random.Random) -> list[Example]:
        """The rows to train on; called once, with the mixed task and harmful rows."""
        return train

    def setup(self, model: nn.Module, context: Context) -> None:
        """Called once on the unwrapped aligned model, before the optimizer exists: freeze, load or build artifacts."""

    def start(self, model: nn.Module) -> None:
        """Called once before training, when the optimizer's parameters are fixed and before a checkpoint is loaded."""

    def batch(self, batch: Batch, step: int) -> Batch:
        """The micro-batch to train on in micro-step `step`; long [B, T], label -100 = no loss."""
        return batch

    def penalty(self, model: nn.Module, step: int) -> torch.Tensor | None:
        """An fp32 scalar added to the task loss once per optimizer step, whatever the accumulation and world size.

        With several ranks each returns the mean over its own share; the engine averages over ranks.
        """
        return None

    def before_step(self, model: nn.Module) -> None:
        """Gradients are accumulated and clipped and may be edited; runs under no_grad."""

    def after_step(self, model: nn.Module) -> None:
        """The optimizer has stepped; parameters may be edited; runs under no_grad."""

    def finish(self, model: nn.Module) -> None:
        """Called once after training, for post-hoc methods."""

    def prompt(self, messages: Messages) -> Messages:
        """The conversation as it is served at inference."""
        return messages

    def state_dict(self) -> dict:
        """What resuming needs beyond the seed, the step and the weights."""
        return {}

    def load_state_dict(self, state: dict) -> None: ...

    def report(self, model: nn.Module) -> list[dict]:
        """Rows about the method itself after training, `{"metric", "set", "value"}`: ranks, kept energy, drift."""
        return []


def draw(n: int, k: int, seed: int, step: int) -> list[int]:
    """k of n indices without replacement, a function of (seed, step) alone, so that resuming is exact."""
    return random.Random(f"{seed}-{step}").sample(range(n), min(k, n))
