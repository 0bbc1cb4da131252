"""SaLoRA: a fixed projector behind each LoRA adapter keeps its output off the features of harmful prompts.

Li, Si, Backes, Zhang, Wang: "SaLoRA: Safety-Alignment Preserved Low-Rank Adaptation", ICLR 2025, arXiv:2501.01765.
For a linear layer W [m, n] with inputs X_h on harmful prompts and X_t on the task, in peft's notation (A [r, n],
B [m, r], scaling s; the paper calls the left factor A):
- safety module: C = I - U_C U_C^T, U_C [m, r_s] the leading left singular vectors of W X_h; the layer becomes
  W_res + s C B A, C fixed;
- task-specific start: with W = U S V^T and U_t [m, r_t] the leading left singular vectors of W X_t,
  B = U_t U_t^T U_r S_r^1/2, A = S_r^1/2 V_r^T, and W_res = W - s C B A: training starts from the aligned model.
Since U_C^T C = 0, what a layer writes along U_C is, for the same input, what the aligned one writes.

Deviations:
- Neither the full text nor official code was at hand: the formulas and r_s = r_t = 32 are those of a third party's
  summary of the paper. Compare with the paper before calling a number a reproduction. What it does not give is `ours`.
- C is not a layer of its own: B's gradient and, after each step, B itself are multiplied by C. C is linear and
  C C = C, so the product C B follows the same path under AdamW, its moments and weight decay, to rounding (tested).
- A and B start divided by sqrt(s), so that the adapter starts at the same dW whatever alpha is (ours).
- X_h: the anchors' prompts with the start of the aligned model's own refusal; X_t: rows of the run's training data,
  harmful ones included where the user's data hold some; all tokens count (ours).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from cwac.constraints.anchors import anchor_rows, encode_prompts
from cwac.constraints.subspace import capture
from cwac.core.checks import check_whole
from cwac.core.distributed import local, spread, whole
from cwac.core.errors import UsageError, UserError
from cwac.data.examples import Example
from cwac.methods.base import Context, Method
from cwac.models.layers import base_layer, linears


@dataclass
class SaLoRA(Method):
    """Needs model.lora; acts on every adapted linear layer."""

    safety_rank: int = 32
    """r_s: directions of W X_h that no update may write to."""
    task_rank: int | None = 32
    """r_t of the start; None keeps LoRA's own start, B = 0."""
    n_prompts: int | None = None
    """Harmful prompts; None for all of the anchors."""
    n_task: int = 64
    """Rows of the training data that give X_t."""
    response_tokens: int = 16
    """Tokens of the aligned model's own refusal that follow each harmful prompt."""

    needs_step_hooks: ClassVar[bool] = True
    needs_base_weights: ClassVar[bool] = True

    def __post_init__(self):
        check_whole("safety_rank", self.safety_rank, 1)
        check_whole("task_rank", self.task_rank, 1, null=True)
        check_whole("n_prompts", self.n_prompts, 1, null=True)
        check_whole("n_task", self.n_task, 1)
        check_whole("response_tokens", self.response_tokens, 0)

    def extra_data(self) -> dict[str, int]:
        return {"harmful_prompts": self._n_harmful}

    def training_data(self, train: list[Example], context: Context, rng: random.Random) -> list[Example]:
        adapted = adapted_layers(context.loaded.model)
        if not adapted:
            raise UsageError(
                f"method={self.name} constrains LoRA adapters and has no full-parameter form; give "
                "model.lora='{r: 8, alpha: 16, target_modules: all-linear}'"
            )
        narrow = min(base_layer(m).out_features for m in adapted.values())
        if self.safety_rank >= narrow:
            raise UserError(
                f"method.safety_rank={self.safety_rank} leaves an adapted layer of {narrow} outputs nothing to learn; "
                "lower it"
            )
        self._task = rng.sample(train, min(self.n_task, len(train)))
        return train

    def setup(self, model: nn.Module, context: Context) -> None:
        adapted = adapted_layers(model)
        harmful = anchor_rows(model, context, context.pools.anchors[: self.n_prompts], self.response_tokens)
        self._n_harmful = len(context.pools.anchors[: self.n_prompts])
        safe = leading_outputs(model, harmful, adapted, self.safety_rank)
        self._energy = min(energy for _, energy in safe.values())
        self._entries = [(m.lora_B[key], safe[n][0]) for n, m in adapted.items() for key in m.lora_A]
        if self.task_rank is not None:
            task = leading_outputs(model, encode_prompts(context, self._task, True), adapted, self.task_rank)
            with torch.no_grad():
                for name, module in adapted.items():
                    start_(module, safe[name][0], task[name][0])

    def after_backward(self, model: nn.Module) -> None:
        for layer, U in self._entries:
            project_(layer.weight.grad, U)

    def after_step(self, model: nn.Module) -> None:
        for layer, U in self._entries:
            project_(layer.weight, U)

    def report(self, model: nn.Module) -> list[dict]:
        return [{"metric": "safety_energy", "set": "train", "value": self._energy}]


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in linears(model, "all").items() if hasattr(m, "lora_A")}


def leading_outputs(
    model: nn.Module, rows: Sequence[dict], modules: dict[str, nn.Module], rank: int
) -> dict[str, tuple[torch.Tensor, float]]:
    """The leading left singular vectors [m, rank] of W X, and the share of ||W X||_F^2 they hold, per module."""
    weights = {name: base_layer(m).weight.detach().float() for name, m in modules.items()}
    G = {n: torch.zeros(len(W), len(W), dtype=torch.float64, device=W.device) for n, W in weights.items()}

    def visit(name: str, x: torch.Tensor, first: torch.Tensor) -> None:
        y = torch.cat([first, x]).float() @ weights[name].T  # [tokens, m]
        G[name] += y.T @ y

    capture(model, rows, modules, visit)
    directions = {}
    for name, gram in G.items():
        values, U = torch.linalg.eigh(gram)  # ascending
        directions[name] = (U[:, -rank:].float().contiguous(), float(values[-rank:].sum() / values.sum()))
    return directions


def start_(module: nn.Module, U_C: torch.Tensor, U_t: torch.Tensor) -> None:
    """Give an adapter its task-specific start, and take what it then adds out of the frozen weight."""
    W = base_layer(module).weight
    U, S, Vh = torch.linalg.svd(W.float(), full_matrices=False)
    for key, lora_A in module.lora_A.items():
        lora_B, s = module.lora_B[key], module.scaling[key]
        r = lora_A.weight.shape[0]
        root = (S[:r] / s).sqrt()
        B = U_t @ (U_t.T @ (U[:, :r] * root))
        project_(B, U_C)
        A = root[:, None] * Vh[:r]
        lora_A.weight[: len(A)] = A.to(lora_A.weight.dtype)  # r may exceed W's rank: the rest starts as LoRA does
        lora_B.weight[:, : B.shape[1]] = B.to(lora_B.weight.dtype)
        W.sub_((s * B @ A).to(W.dtype))


def project_(B: torch.Tensor, U: torch.Tensor) -> None:
    """B <- C B = B - U (U^T B), in place."""
    change = U @ (U.T @ whole(B).float())
    local(B).sub_(local(spread(change, B)).to(B.dtype))
