"""What defences before the fine-tuning share: a further stage of alignment, and harmful pairs beside the attack's.

The hardened model is an artifact: built once, put below an adapter where there is one, and found again by its key.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cwac.core.cache import load_or_build
from cwac.core.errors import UserError
from cwac.data.examples import Example
from cwac.data.tokenize import Collator, Rows, pad_token_id
from cwac.methods.base import Batch, draw
from cwac.models.adapters import plain_parameters
from cwac.models.context import Context
from cwac.models.fit import fit
from cwac.models.loading import load_aligned

WEIGHTS = "immunised.safetensors"

Backward = Callable[[nn.Module, Batch], torch.Tensor]
"""Adds one batch's gradients to `grad` and returns its loss."""


def align_further_(
    model: nn.Module, context: Context, kind: str, key: dict, rows: Rows | list[dict], backward: Backward, **settings
) -> None:
    """Put the aligned model, trained further on encoded rows, into `model`; built where no artifact has it yet.

    kind, key: of the artifact. settings: of `fit`, but for seed and padding: one order of rows serves all run seeds.
    """

    def build(folder):
        aligned = load_aligned(context.loaded)
        pad = pad_token_id(context.tokenizer)
        fit(aligned, rows, seed=0, pad_token_id=pad, backward=backward, description=kind, **settings)
        weights = {n: p.detach().cpu().contiguous() for n, p in aligned.named_parameters()}
        save_file(weights, folder / WEIGHTS)

    replace_weights_(model, load_file(load_or_build(context.artifacts, kind, key, build) / WEIGHTS))


@torch.no_grad()
def replace_weights_(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Put the weights of a plain model into `model`, below its adapter if it has one."""
    for name, parameter in plain_parameters(model).items():
        parameter.copy_(weights[name])


def require_alignment_data(context: Context, method: str) -> None:
    """Raises UserError where a pool that `alignment_data` takes from is empty."""
    for name in ("align", "benign"):
        if not getattr(context.pools, name):
            raise UserError(f"method={method} needs the pool `{name}`, which is empty; enlarge pools.{name}")


def alignment_data(context: Context, harmless_per_refusal: int) -> tuple[list[Example], list[Example]]:
    """Requests with refusals, and all harmless rows: of these `harmless_per_refusal` to each refusal."""
    pools = context.pools
    return pools.align[: max(1, len(pools.benign) // harmless_per_refusal)], pools.benign


def unused_pairs(train: list[Example], context: Context, n: int, rng: random.Random, method: str) -> list[Example]:
    """Up to n harmful pairs of the pool `poison` that are not among the run's rows, in random order.

    They are of the kind that the attack uses, as in the papers, whose two parts come from one collection, but no pair
    is in both. In a script of one's own the rows' texts are unknown, and all pairs of the pool count as left. Raises
    UserError where the attack leaves none.
    """
    used = {e.id for e in train}
    left = [e for e in context.pools.poison if e.id not in used and e.response]
    if not left:
        raise UserError(
            f"method={method} hardens the model on harmful pairs of the pool `poison` that the attack leaves, and it "
            "leaves none; lower harmful_ratio or task.n_train, or enlarge pools.poison"
        )
    return rng.sample(left, min(n, len(left)))


def encoded(context: Context, examples: list[Example]) -> Rows:
    return Rows(context.tokenizer, examples, context.template, context.max_length)


@dataclass
class HarmfulBatches:
    """One batch of harmful pairs for each step of the stage, a function of the step's number alone."""

    rows: Rows
    size: int
    pad_token_id: int
    step: int = 0

    @classmethod
    def of(cls, context: Context, pairs: list[Example], size: int) -> HarmfulBatches:
        return cls(encoded(context, pairs), size, pad_token_id(context.tokenizer))

    def next(self, device: torch.device) -> Batch:
        chosen = draw(len(self.rows), self.size, 0, self.step)
        self.step += 1
        batch = Collator(self.pad_token_id)([self.rows[i] for i in chosen])
        return {k: v.to(device) for k, v in batch.items()}
