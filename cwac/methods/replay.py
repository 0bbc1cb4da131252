"""Refusal replay (ours): the control that tells CWAC's constraints from the data they are given.

A plain rehearsal of the aligned model's own refusals: L = L_task + lam L_replay, where L_replay is the cross-entropy
of the refusals, mean over tokens, then over n_prompts prompts drawn in each optimizer step. Prompts, and prompts per
step, are those of CWAC (arXiv:2604.12384, Eqs. 11 and 16, whose L_safety it replaces), so that a difference between
the two lies in what is preserved, not in what is seen. The loss stands beside the task's, instead of rows among the
task's as in SafeInstr, so that the user's steps stay as they are.

Deviations:
- Not a published defence. Only prompts that the model itself refuses are replayed, as they anchor CWAC.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from cwac.constraints.anchors import anchor_rows
from cwac.core.checks import check, check_number, check_whole
from cwac.core.errors import UserError
from cwac.data.examples import Example
from cwac.data.tokenize import IGNORE, Collator, pad_token_id, row_of
from cwac.methods.base import Context, Method, draw, share_of

POOLS = ("anchors", "step", "sae", "safety")
"""Harmful prompts that are neither poison nor held out."""


@dataclass
class Replay(Method):
    """With lam 0, SFT."""

    pools: Sequence[str] = ("anchors", "step", "sae")
    """Where the prompts come from."""
    budget: int | None = None
    """Prompts taken at random from them; None for all."""
    n_prompts: int = 4
    """Prompts per optimizer step."""
    lam: float = 1.0
    response_tokens: int = 32
    """Length at which a refusal is cut; one that ends earlier is replayed with its end."""

    def extra_data(self) -> dict[str, int]:
        return {"harmful_prompts": len(self._rows)}  # the refusals are the model's own, as with CWAC's anchors

    def __post_init__(self):
        known = not isinstance(self.pools, str) and self.pools and set(self.pools) <= set(POOLS)
        given = self.pools if isinstance(self.pools, str) else list(self.pools)
        check(known, "pools", given, f"give some of {', '.join(POOLS)}")
        check_whole("budget", self.budget, 1, null=True)
        check_whole("n_prompts", self.n_prompts, 1)
        check_number("lam", self.lam, 0)
        check_whole("response_tokens", self.response_tokens, 1)

    def training_data(self, train: list[Example], context: Context, rng: random.Random) -> list[Example]:
        prompts = [e for name in self.pools for e in getattr(context.pools, name)]
        if not prompts or len(prompts) < (self.budget or 0):
            raise UserError(
                f"method={self.name} replays {self.budget or 'all'} prompts, the pools {', '.join(self.pools)} have "
                f"{len(prompts)}; change method.budget or method.pools, or enlarge the pools (pools.*)"
            )
        self._prompts = prompts if self.budget is None else rng.sample(prompts, self.budget)
        anchor_rows(context.loaded.model, context, self._prompts, self.response_tokens)  # refuses before writing
        return train

    def setup(self, model: nn.Module, context: Context) -> None:
        self._context = context
        self._collate = Collator(pad_token_id(context.tokenizer))
        self._rows = []
        for row in anchor_rows(model, context, self._prompts, self.response_tokens):
            prompt, refusal = row["input_ids"][: row["prompt"]], row["input_ids"][row["prompt"] :]
            ends = len(refusal) < self.response_tokens
            row = row_of(context.tokenizer, prompt, refusal, context.template, context.max_length, ends)
            if any(label != IGNORE for label in row["labels"]):
                self._rows.append(row)
        if not self._rows:
            raise UserError(
                f"method={self.name}: no refusal fits beside its prompt in train.max_length={context.max_length}; "
                "raise it"
            )

    def penalty(self, model: nn.Module, step: int) -> torch.Tensor | None:
        context = self._context
        if not self.lam:
            return None
        mine, share = share_of(draw(len(self._rows), self.n_prompts, context.seed, step), context)
        batch = self._collate([self._rows[i] for i in mine])
        batch = {key: value.to(next(model.parameters()).device) for key, value in batch.items()}
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
        target = batch["labels"][:, 1:]  # [B, T - 1]
        losses = functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), target, ignore_index=IGNORE, reduction="none"
        )  # [B, T - 1]
        per_prompt = losses.sum(1) / (target != IGNORE).sum(1)  # [B]
        return self.lam * share * per_prompt.mean()

    def report(self, model: nn.Module) -> list[dict]:
        return [{"metric": "replay_refused", "set": "train", "value": float(len(self._rows))}]
