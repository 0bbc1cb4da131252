"""The contract of a defence. Plain supervised fine-tuning (SFT) is the base class itself."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from cwac.data.examples import Example, Messages
from cwac.models.context import Context

Batch = dict[str, torch.Tensor]

EXTRA_DATA = (
    "harmful_prompts",  # requests without an answer
    "refusals",  # requests with a refusal to train on
    "harmful_pairs",  # requests with compliance, beside the poison among the rows
    "harmless_rows",  # harmless instructions with answers, beside the task
    "base_weights",  # matrices of the model before its alignment
    "trigger",  # tokens added to every prompt at inference
)
"""What a method may see beyond the task's rows; counts of these stand beside it in every table."""


@dataclass(kw_only=True)
class Sizes:
    """What `Method.estimate_memory` cannot know, since it has no data; also the context its hooks run in."""

    prompt_tokens: int = 64
    """Of each harmful prompt in a penalty's batch, its template included."""
    shared_tokens: int = 0
    """Of these, how many all prompts share at the start: a template's, and its system turn."""
    rank_share: float = 0.5
    """Rank of V over the dimension of its input; measured at energy 0.99: SmolLM2 0.52, the embedded model 0.25."""
    seed: int = 0
    process_rank: int = 0
    world_size: int = 1
    steps: int = 0


@dataclass
class MemoryEstimate:
    """What a method takes beside the model, in parts."""

    tensors: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    """Tensors that stay in memory through the training, by what they are."""
    model: nn.Module | None = None
    """What trains, where that is not the model itself; as `setup` returns it."""
    setup_bytes: dict[str, float] = field(default_factory=dict)
    """Bytes that `setup` needs for a time, beside the model; its parts are not needed at once."""


@dataclass
class Method:
    """Plain fine-tuning. A defence overrides only the hooks it needs; none calls super()."""

    name: str
    """The slug: equal to the yaml's file name, the command line and the `method` column."""

    needs_step_hooks: ClassVar[bool] = False
    """True where after_backward, before_step or after_step is used; such a method refuses DeepSpeed, which steps
    inside backward."""

    needs_base_weights: ClassVar[bool] = False
    """True where W itself is read or edited, not only what passes through it; such a method refuses a 4-bit base."""

    brings_adapter: ClassVar[bool] = False
    """True where `setup` puts an adapter around the model: then the base may be held in 4 bits without model.lora."""

    wants_own_rate: ClassVar[bool] = False
    """True where the method learns little at the learning rate of plain fine-tuning; a run at that rate warns."""

    def extra_data(self) -> dict[str, int]:
        """How much it saw of what SFT does not see, by the names of EXTRA_DATA; asked after `setup`."""
        return {}

    def training_data(self, train: list[Example], context: Context, rng: random.Random) -> list[Example]:
        """The rows to train on; called once, first of all hooks, with the mixed task and harmful rows.

        The place to refuse a configuration that this model or these pools cannot serve: nothing is written yet.
        """
        return train

    def setup(self, model: nn.Module, context: Context) -> nn.Module | None:
        """Called once on the unwrapped aligned model, before the optimizer exists: freeze, load or build artifacts.

        Returns what trains from here on, such as the model behind an adapter; None for the model itself.
        """

    def estimate_memory(self, model: nn.Module, sizes: Sizes) -> MemoryEstimate:
        """What the method keeps in memory; sets it up with stand-ins of the right shapes, without data.

        experiments/cost.py then runs the other hooks. model: random, or without storage. Where a method overrides
        `setup` alone, its estimate lacks what it keeps, and cost.py says so.
        """
        return MemoryEstimate()

    def start(self, model: nn.Module) -> None:
        """Called once before the first step, when the model is wrapped and a checkpoint is loaded.

        Under FSDP2 `setup` saw whole parameters, and from here on they are DTensors of which this rank holds some rows
        (cwac/core/distributed.py): a method that edits weights or gradients looks them up by their module, not before.
        """

    def batch(self, batch: Batch, step: int, part: tuple[int, int]) -> Batch:
        """The micro-batch to train on; long [B, T], label -100 = no loss.

        step: optimizer steps done so far. part: (i, n), this is the i-th of the n micro-batches of this step, over
        accumulation and ranks together; a method that swaps the batch draws n B rows by (seed, step) and takes the
        i-th B of them, so that the result does not depend on the layout.
        """
        return batch

    def penalty(self, model: nn.Module, step: int) -> torch.Tensor | None:
        """An fp32 scalar added to the task loss once per optimizer step, whatever the accumulation and world size.

        With several ranks each returns the mean over its own share; the engine averages over ranks.
        """
        return None

    def stop(self, model: nn.Module, reloaded: bool) -> None:
        """Called once after the last step, however early it came, while the model is still wrapped.

        reloaded: whether the trainer has put the weights of its best checkpoint back (`load_best_model_at_end`).
        """

    def after_backward(self, model: nn.Module) -> None:
        """Gradients of the whole step are accumulated, not yet clipped; add a closed-form one; runs under no_grad."""

    def before_step(self, model: nn.Module) -> None:
        """Gradients are accumulated and clipped and may be edited; runs under no_grad."""

    def after_step(self, model: nn.Module) -> None:
        """The optimizer has stepped; parameters may be edited; runs under no_grad."""

    def finish(self, model: nn.Module) -> None:
        """Called once after training, on rank 0 alone, with whole parameters: for post-hoc methods."""

    def prompt(self, messages: Messages) -> Messages:
        """The conversation as it is served at inference."""
        return messages

    def state_dict(self) -> dict:
        """What resuming needs beyond the seed, the step and the weights; asked of every rank, kept for rank 0."""
        return {}

    def load_state_dict(self, state: dict) -> None: ...

    def protected(self) -> dict[str, torch.Tensor]:
        """Matrix -> orthonormal input directions [d_in, k] that no update may read; the run's guard checks it."""
        return {}

    def is_closed(self) -> bool:
        """Whether it claims that nothing but the matrices of `protected` trains; the run's guard checks that too."""
        return False

    def held(self) -> str:
        """What it holds of the aligned model, in a few words, asked after `setup`; empty for nothing."""
        return ""

    def report(self, model: nn.Module) -> list[dict]:
        """Rows about the method itself after training, `{"metric", "set", "value"}`: ranks, kept energy, drift."""
        return []


HOOKS = {
    "batch": "may swap the batch",
    "penalty": "may add a penalty",
    "after_backward": "may add a gradient",
    "before_step": "may edit gradients",
    "after_step": "may edit weights",
}
"""Hooks that cost time at each step, and what a method that overrides one does there."""


def overridden(method: Method) -> list[str]:
    """The hooks of a step that this method has of its own."""
    return [hook for hook in HOOKS if getattr(type(method), hook) is not getattr(Method, hook)]


def summary(method: Method, model: nn.Module) -> str:
    """One line on a method that is set up: what it holds, saw and trains, and what a step has beyond SFT's.

    model: what trains, as `setup` returned it.
    """
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    share = 100 * sum(n for n, trains in counts if trains) / max(1, sum(n for n, _ in counts))
    extra = ", ".join(f"{n} {kind.replace('_', ' ')}" for kind, n in method.extra_data().items())
    steps = [HOOKS[hook] for hook in overridden(method)]
    unsaid = "does not say what it holds of the aligned model" if steps else "holds nothing of the aligned model"
    parts = [
        method.held() or unsaid,
        f"extra data: {extra or 'none'}",
        f"{share:.3g} % of the parameters train",
        f"at each step it {', '.join(steps)}; what that costs follows from the first steps"
        if steps
        else "no work of its own at a step",
    ]
    return f"method={method.name}: {'; '.join(parts)}"


def draw(n: int, k: int, seed: int, step: int) -> list[int]:
    """k of n indices without replacement, a function of (seed, step) alone, so that resuming is exact."""
    return random.Random(f"{seed}-{step}").sample(range(n), min(k, n))


def share_of(chosen: list[int], context: Context) -> tuple[list[int], float]:
    """This rank's part of what is drawn for a step, and the weight of its mean: ranks with fewer rows count less.

    A rank that is left without any takes one at weight 0, because all ranks must make the same forward passes.
    """
    mine = chosen[context.process_rank :: context.world_size]
    return (mine, len(mine) * context.world_size / len(chosen)) if mine else (chosen[:1], 0.0)
