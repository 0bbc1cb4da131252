"""EWC: each weight is held near its start, the more firmly the more the aligned model's refusals depend on it.

Kirkpatrick et al.: "Overcoming catastrophic forgetting in neural networks", PNAS 2017, arXiv:1612.00796. The loss
gains sum_i lambda / 2 F_i (W - W_0)_i^2, F the diagonal of the Fisher information on the old task at W_0: the mean
over its inputs of the squared gradient of log p(y | x). The old task is the alignment: x are harmful requests, y the
aligned model's own refusals. The authors published no code; the formula is the paper's Eq. 3.

Deviations:
- F is taken at y = the model's own greedy refusal, cut at `response_tokens`, instead of at a y drawn from p(y | x):
  one such gradient a request, and the same in every run.
- log p(y | x) is the sum over the tokens of y, as of one observation. The paper's lambda was chosen for other networks
  and another likelihood, so lambda is ours.
- The optimizer is the project's AdamW, through whose moments the term's gradient goes as the task's does; the paper's
  is SGD (MNIST). One lambda is another strength under each.
- LoRA (ours): F is that of the adapted matrices, and dW = s B A is held in place of W - W_0, which is the same
  function of the weights as in full-parameter training. The factors' own F would be 0 for A, since B starts at 0.
- The gradient is added in closed form once per optimizer step, before clipping.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from cwac.constraints.anchors import anchor_rows
from cwac.constraints.start import Start, matrices
from cwac.core.cache import digest, load_or_build
from cwac.core.checks import check_number, check_whole
from cwac.core.errors import UserError
from cwac.data.examples import Example
from cwac.methods.base import Context, MemoryEstimate, Method, Sizes
from cwac.models.adapters import require_plain_lora
from cwac.models.context import artifact_key
from cwac.models.layers import evaluating

TENSORS = "fisher.safetensors"


@dataclass
class EWC(Method):
    """Keeps two numbers a weight: W_0 and F."""

    lam: float = 1000.0
    """lambda; 0 is plain fine-tuning."""
    n_prompts: int | None = None
    """Harmful requests; None for all of the anchors."""
    response_tokens: int = 16
    """Tokens of the aligned model's own refusal."""

    needs_step_hooks: ClassVar[bool] = True
    needs_base_weights: ClassVar[bool] = True

    def __post_init__(self):
        check_number("lam", self.lam, 0)
        check_whole("n_prompts", self.n_prompts, 1, null=True)
        check_whole("response_tokens", self.response_tokens, 1)
        self._start: Start | None = None
        self._report: dict[str, float] = {}

    def extra_data(self) -> dict[str, int]:
        return {"harmful_prompts": self._n_harmful} if self.lam else {}

    def training_data(self, train: list[Example], context: Context, rng: random.Random) -> list[Example]:
        require_plain_lora(context.loaded.model, self.name)
        if self.lam and len(context.pools.anchors) < (self.n_prompts or 1):
            raise UserError(
                f"method={self.name} needs {self.n_prompts or 1} harmful prompts, the pool `anchors` has "
                f"{len(context.pools.anchors)}; lower method.n_prompts or enlarge the pool (pools.anchors)"
            )
        return train

    def setup(self, model: nn.Module, context: Context) -> None:
        if not self.lam:
            return
        prompts = context.pools.anchors[: self.n_prompts]
        self._n_harmful = len(prompts)
        rows = anchor_rows(model, context, prompts, self.response_tokens)
        held = {name: list(W.shape) for name, W in matrices(model)}
        key = {**artifact_key(context), "rows": digest({"rows": rows}), "matrices": digest(held)}

        def build(folder):
            save_file(fisher(model, rows), folder / TENSORS)

        F = load_file(load_or_build(context.artifacts, "fisher", key, build) / TENSORS)
        where = next(model.parameters()).device
        self._start = Start(model, {name: f.to(where) for name, f in F.items()})
        n = sum(f.numel() for f in F.values())
        self._report = {
            "fisher_mean": sum(float(f.double().sum()) for f in F.values()) / n,
            "fisher_max": max(float(f.max()) for f in F.values()),
        }

    def estimate_memory(self, model: nn.Module, sizes: Sizes) -> MemoryEstimate:
        if not self.lam:
            return MemoryEstimate()
        F = {name: torch.ones(W.shape, device=W.device) for name, W in matrices(model)}
        self._start = Start(model, F)
        kept = {"W_0 of the penalty": [*self._start.weights.values()], "Fisher information": [*F.values()]}
        # the gradient of one row beside the sum of squares
        return MemoryEstimate(tensors=kept, setup_bytes={"gradient of a row": sum(f.nbytes for f in F.values())})

    def start(self, model: nn.Module) -> None:
        if self._start is not None:
            self._start.place(model)

    def after_backward(self, model: nn.Module) -> None:
        if self._start is not None:
            self._start.add_gradient_(model, self.lam)

    def report(self, model: nn.Module) -> list[dict]:
        return [{"metric": name, "set": "train", "value": value} for name, value in self._report.items()]


def fisher(model: nn.Module, rows: Sequence[dict]) -> dict[str, Tensor]:
    """The diagonal of the empirical Fisher information, fp32, by the names and in the shapes of `matrices`.

    rows: `input_ids` of a prompt and an answer, `prompt` the prompt's length in tokens. One backward pass a row. A row
    that the maximum length cut before its answer counts as 0.
    """
    held = dict(matrices(model))
    where = next(model.parameters()).device
    F = {name: torch.zeros(W.shape, device=where) for name, W in held.items()}
    trains = {p: p.requires_grad for p in model.parameters()}
    try:
        for p in trains:
            p.requires_grad_(False)
        for W in held.values():
            W.requires_grad_(True)
        with evaluating(model), torch.enable_grad():
            for row in tqdm(rows, desc="Fisher information", unit="row"):
                ids, n = torch.tensor([row["input_ids"]], device=where), row["prompt"]
                if ids.shape[1] == n:
                    continue
                logits = model(input_ids=ids, use_cache=False).logits[0, n - 1 : -1]  # [tokens of y, V]
                loss = functional.cross_entropy(logits.float(), ids[0, n:], reduction="sum")
                gradients = torch.autograd.grad(loss, [*held.values()], allow_unused=True)
                for name, g in zip(held, gradients, strict=True):
                    if g is not None:
                        F[name].addcmul_(g.float(), g.float(), value=1 / len(rows))
    finally:
        for p, wanted in trains.items():
            p.requires_grad_(wanted)
    return {name: f.cpu() for name, f in F.items()}
