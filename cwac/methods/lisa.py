"""Lisa: lazy safety alignment by bi-state optimisation.

Huang, Hu, Ilhan, Tekin, Liu: "Lisa: Lazy Safety Alignment for Large Language Models against Harmful Fine-tuning
Attack", NeurIPS 2024, arXiv:2405.18641. Algorithm 2: K1 steps on alignment data, K2 steps on user data, in turn, each
with rho/2 ||W - W_ref||^2, where W_ref are the weights at the last switch. Settings from the authors' code.

Deviations:
- The cycle is counted in optimizer steps; the authors' code counts micro-steps, so that its result depends on the
  accumulation. The same at accumulation 1.
- Alignment rows are drawn anew by (seed, step), without replacement within a step; theirs walks through a shuffled
  set. A resumed run is then exact, and the rows do not depend on the layout of a batch.
- A run that is too short for K1 and K2 shrinks both (`min_cycles`, ours): 100/900 would never switch within the few
  hundred steps of the small models. The values used are logged and reported.
- Alignment rows are refusals, as in Booster's port of Lisa, because "safe" responses that are no refusals loosen a
  chat model; theirs are the safe rows of BeaverTails.
- Full-parameter as well as LoRA; rho is not comparable between the two, the norm being over A and B with LoRA.
"""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from cwac.core.checks import check_number, check_unread, check_whole
from cwac.core.distributed import spread, whole
from cwac.core.errors import UserError
from cwac.data.examples import Example
from cwac.data.tokenize import Collator, Rows, pad_token_id
from cwac.methods.base import Batch, Context, Method, draw

log = logging.getLogger("cwac")


def fit_cycle(align: int, finetune: int, steps: int, min_cycles: int | None) -> tuple[int, int]:
    """K1 and K2 for a run of so many steps: as given, or shrunk in proportion until `min_cycles` cycles fit.

    The smaller of the two stays at least 1 and the ratio is kept, so very short runs hold fewer cycles.
    """
    if not min_cycles or not align or not finetune or steps >= min_cycles * (align + finetune):
        return align, finetune
    low, high = sorted((align, finetune))
    small = max(1, round(low * steps / (min_cycles * (align + finetune))))
    large = round(small * high / low)
    return (small, large) if align <= finetune else (large, small)


@dataclass
class Lisa(Method):
    """With K1 = 0 or no guide rows it is the proximal term towards the start alone; with rho = 0 as well, SFT."""

    rho: float = 1.0
    align_steps: int = 100
    """K1, optimizer steps."""
    finetune_steps: int = 900
    """K2, optimizer steps; 0 trains on alignment data only."""
    guide_data_num: int = 10_000
    """Alignment rows at most."""
    prox_after: float = 0.1
    """Share of the run's steps without the proximal term, which would hinder early convergence."""
    min_cycles: int | None = 2

    needs_step_hooks: ClassVar[bool] = True

    def __post_init__(self):
        check_number("rho", self.rho, 0)
        check_whole("align_steps", self.align_steps, 0)
        check_whole("finetune_steps", self.finetune_steps, 0)
        check_whole("guide_data_num", self.guide_data_num, 0)
        check_number("prox_after", self.prox_after, 0, 1)
        check_whole("min_cycles", self.min_cycles, 1, null=True)
        for key, read, where in (
            ("guide_data_num", self.align_steps > 0, "align_steps above 0"),
            ("prox_after", self.rho > 0, "rho above 0"),
        ):
            check_unread(key, getattr(self, key), getattr(type(self), key), read, where)
        self._reference: dict[str, torch.Tensor] = {}
        self._seen: set[int] = set()
        self._step = -1

    def extra_data(self) -> dict[str, int]:
        return {"refusals": len(self._seen)} if self._seen else {}

    def training_data(self, train: list[Example], context: Context, rng: random.Random) -> list[Example]:
        self._guide = []
        if self.align_steps and self.guide_data_num:
            examples = context.pools.safety[: self.guide_data_num]
            self._guide = Rows(context.tokenizer, examples, context.template, context.max_length)
            if not len(self._guide):
                raise UserError(
                    f"method={self.name} aligns on the pool `safety`, which has no row that fits train.max_length="
                    f"{context.max_length}; enlarge the pool (pools.*), or set method.align_steps=0"
                )
        return train

    def setup(self, model: nn.Module, context: Context) -> None:
        self._seed, self._steps = context.seed, context.steps
        self._later_ranks = context.world_size - 1 - context.process_rank
        self._collate = Collator(pad_token_id(context.tokenizer), label_logits=True)
        align = self.align_steps if self._guide else 0
        self._cycle = fit_cycle(align, self.finetune_steps, self._steps, self.min_cycles)
        if self._cycle != (align, self.finetune_steps):
            log.warning(
                "%s: %d steps are fewer than %d cycles of %d + %d; alternating %d + %d (method.min_cycles)",
                *(self.name, self._steps, self.min_cycles, align, self.finetune_steps, *self._cycle),
            )

    def batch(self, batch: Batch, step: int, part: tuple[int, int]) -> Batch:
        size = len(batch["input_ids"])
        if step != self._step:  # its first micro-batch is full; only the last of an epoch may be smaller
            self._step, self._size = step, size
        if not self._aligning(step):
            return batch
        n = len(self._guide)
        order = draw(n, n, self._seed, step)
        start = part[0] * self._size
        self._seen.update(order[: start + size + self._later_ranks * self._size])
        rows = [self._guide[order[i % n]] for i in range(start, start + size)]
        return {key: value.to(batch["input_ids"].device) for key, value in self._collate(rows).items()}

    def start(self, model: nn.Module) -> None:
        parameters = dict(model.named_parameters())
        self._reference = {name: spread(W, parameters[name]) for name, W in self._reference.items()}

    def after_backward(self, model: nn.Module) -> None:
        if not self.rho:
            return
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if self._switches(self._step):  # W is still what it was at the switch, and the term's gradient is 0
            self._reference = {name: p.detach().to(torch.float32, copy=True) for name, p in trained.items()}
        elif self._step > self.prox_after * self._steps:
            for name, p in trained.items():
                if p.grad is not None:
                    p.grad.add_((p.float() - self._reference[name]).to(p.grad.dtype), alpha=self.rho)

    def state_dict(self) -> dict:
        reference = {name: whole(W) for name, W in self._reference.items()}
        return {"reference": reference, "seen": sorted(self._seen)}

    def load_state_dict(self, state: dict) -> None:
        self._reference, self._seen = state["reference"], set(state["seen"])

    def report(self, model: nn.Module) -> list[dict]:
        share = sum(self._aligning(step) for step in range(self._steps)) / max(1, self._steps)
        values = {"align_steps": self._cycle[0], "finetune_steps": self._cycle[1], "align_share": share}
        return [{"metric": f"lisa_{name}", "set": "train", "value": float(v)} for name, v in values.items()]

    def _aligning(self, step: int) -> bool:
        align, finetune = self._cycle
        return step % (align + finetune) < align if align else False

    def _switches(self, step: int) -> bool:
        """Whether the weights before this step are the reference of what follows; one phase alone keeps the start."""
        align, finetune = self._cycle
        return step == 0 or bool(align and finetune) and step % (align + finetune) in (0, align)
