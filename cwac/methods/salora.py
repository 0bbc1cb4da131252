"""SaLoRA: a fixed projector behind each LoRA adapter keeps its output off the features of harmful prompts.

Li, Si, Backes, Zhang, Wang: "SaLoRA: Safety-Alignment Preserved Low-Rank Adaptation", ICLR 2025, arXiv:2501.01765.
For a linear layer W [m, n] with inputs X_h on harmful prompts and X_t on the task, in peft's notation (A [r, n],
B [m, r], scaling s; the paper calls the left factor A):
- safety module: C = I - U_C U_C^T, U_C [m, r_s] the leading left singular vectors of W X_h; the layer becomes
  W_res + s C B A, C fixed;
- task-specific start: with W = U S V^T and U_t [m, r_t] the leading left singular vectors of W X_t,
  B = U_t U_t^T U_r S_r^1/2, A = S_r^1/2 V_r^T, and W_res = W - s C B A: training starts from the aligned model.
Since U_C^T C = 0, what a layer writes along U_C is, for the same input, what the aligned one writes.

The defaults are those of the official code, `lora_train_act.py` of homles11/SaLoRA at 3f73de1:
- adapters on q_proj and v_proj (`modules`) with alpha = r, so s = 1 (`scaling`); r_s = r_t = 32;
- X_h and X_t are taken at the tokens of the answers alone (`answers_only`), X_h from 128 harmful prompts with the
  aligned model's refusals, X_t from 128 rows of the task (`n_prompts`, `n_task`);
- X_h is that of the aligned model. X_t is collected block by block, after the projection of the blocks below has been
  applied: these then compute with W_res alone, without their adapters (`task_inputs: residual`).

Deviations:
- The full text of the paper was not at hand.
- C is not a layer of its own: B's gradient and, after each step, B itself are multiplied by C. C is linear and
  C C = C, so the product C B follows the same path under AdamW, its moments and weight decay, to rounding (tested).
- At another scaling than 1, A and B start divided by sqrt(s), so that the adapter starts at the same dW (ours).
- X_h: the anchors' prompts with the start of the aligned model's own refusal (theirs are a file of Llama-2's refusals,
  of 17 to 58 words); X_t: rows of the run's training data, harmful ones included where the user's data hold some.
- Adapters that `model.lora` puts on other matrices stay at 0 and do not train.
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
from cwac.core.checks import (
    check,
    check_choice,
    check_flag,
    check_modules,
    check_number,
    check_unread,
    check_whole,
)
from cwac.core.distributed import local, spread, whole
from cwac.core.errors import UsageError, UserError
from cwac.data.examples import Example
from cwac.methods.base import Context, MemoryEstimate, Method, Sizes
from cwac.models.adapters import active_adapters, require_plain_lora, set_scaling_
from cwac.models.layers import base_layer, linears

TASK_INPUTS = ("residual", "aligned")


@dataclass
class SaLoRA(Method):
    """Needs model.lora."""

    safety_rank: int = 32
    """r_s: directions of W X_h that no update may write to."""
    task_rank: int | None = 32
    """r_t of the start; None keeps LoRA's own start, B = 0."""
    modules: Sequence[str] | str = ("q_proj", "v_proj")
    """Adapted matrices that train: `all`, or names of linear layers."""
    scaling: float | None = 1.0
    """s of every adapter, whatever alpha and r are; None for alpha / r of model.lora (ours)."""
    n_prompts: int | None = 128
    """Harmful prompts, at most; None for all of the anchors (ours)."""
    n_task: int = 128
    """Rows of the training data that give X_t, at most."""
    response_tokens: int = 64
    """Tokens of the aligned model's own refusal that follow each harmful prompt."""
    answers_only: bool = True
    """Whether X_h and X_t are inputs at the answers' tokens alone, or at the prompts' as well (ours)."""
    task_inputs: str = "residual"
    """X_t with the start of the blocks below taken out of them, `residual`, or in the `aligned` model (ours)."""

    needs_step_hooks: ClassVar[bool] = True
    needs_base_weights: ClassVar[bool] = True

    def __post_init__(self):
        check_whole("safety_rank", self.safety_rank, 1)
        check_whole("task_rank", self.task_rank, 1, null=True)
        check_modules("modules", self.modules)
        check_number("scaling", self.scaling, null=True)
        check(self.scaling is None or self.scaling > 0, "scaling", self.scaling, "give a number above 0, or null")
        check_whole("n_prompts", self.n_prompts, 1, null=True)
        check_whole("n_task", self.n_task, 1)
        check_flag("answers_only", self.answers_only)
        check_whole("response_tokens", self.response_tokens, int(self.answers_only))
        check_choice("task_inputs", self.task_inputs, TASK_INPUTS)
        for key in ("n_task", "task_inputs"):
            started = self.task_rank is not None
            check_unread(key, getattr(self, key), getattr(type(self), key), started, "task_rank (a number)")

    def extra_data(self) -> dict[str, int]:
        return {"harmful_prompts": self._n_harmful}

    def training_data(self, train: list[Example], context: Context, rng: random.Random) -> list[Example]:
        model = context.loaded.model
        require_plain_lora(model, self.name)
        if not adapted_layers(model):
            raise UsageError(
                f"method={self.name} constrains LoRA adapters and has no full-parameter form; give "
                "model.lora='{r: 16, alpha: 16, target_modules: [q_proj, v_proj]}'"
            )
        adapted = adapted_layers(model, self.modules)
        if not adapted:
            raise UserError(
                f"method.modules={list(self.modules)} names no matrix that model.lora adapts; choose among its "
                "target_modules, or give method.modules=all"
            )
        narrow = min(base_layer(m).out_features for m in adapted.values())
        if self.safety_rank >= narrow:
            raise UserError(
                f"method.safety_rank={self.safety_rank} leaves an adapted layer of {narrow} outputs nothing to learn; "
                "lower it"
            )
        self._anchors(model, context)  # its errors come before anything is written
        self._task = rng.sample(train, min(self.n_task, len(train)))
        return train

    def _anchors(self, model: nn.Module, context: Context) -> list[dict]:
        return anchor_rows(model, context, context.pools.anchors[: self.n_prompts], self.response_tokens)

    def setup(self, model: nn.Module, context: Context) -> None:
        if self.scaling is not None:
            set_scaling_(model, self.scaling)
        adapted = adapted_layers(model, self.modules)
        harmful = self._anchors(model, context)
        self._n_harmful = len(harmful)
        safe = leading_outputs(model, harmful, adapted, self.safety_rank, self.answers_only)
        self._energy = min(energy for _, energy in safe.values())
        self._entries = [(B, safe[name][0]) for name, m in adapted.items() for _, B, _ in active_adapters(m)]
        if self.task_rank is not None:
            self._start(model, encode_prompts(context, self._task, True), adapted, safe)
        for module in adapted_layers(model).values():  # last: peft lets all adapters train when it switches them on
            for A, B, _ in active_adapters(module):
                A.requires_grad_(module in adapted.values())
                B.requires_grad_(module in adapted.values())

    def _start(self, model: nn.Module, rows: list[dict], adapted: dict[str, nn.Module], safe: dict) -> None:
        """Start every adapter on the task's directions, one block after the other."""
        blocks = [adapted]
        if self.task_inputs == "residual":
            numbers = sorted({int(name.split(".")[0]) for name in adapted})
            blocks = [{n: m for n, m in adapted.items() if n.startswith(f"{i}.")} for i in numbers]
        for modules in blocks:
            with model.disable_adapter():
                task = leading_outputs(model, rows, modules, self.task_rank, self.answers_only)
            with torch.no_grad():
                for name, module in modules.items():
                    start_(module, safe[name][0], task[name][0])

    def estimate_memory(self, model: nn.Module, sizes: Sizes) -> MemoryEstimate:
        self._entries = []
        for module in adapted_layers(model, self.modules).values():
            for layer in module.lora_B.values():
                self._entries.append(
                    (layer, torch.eye(len(layer.weight), self.safety_rank, device=layer.weight.device))
                )
        return MemoryEstimate(tensors={"U_C of the projectors": [U for _, U in self._entries]})

    def after_backward(self, model: nn.Module) -> None:
        for layer, U in self._entries:
            project_(layer.weight.grad, U)

    def after_step(self, model: nn.Module) -> None:
        for layer, U in self._entries:
            project_(layer.weight, U)

    def report(self, model: nn.Module) -> list[dict]:
        return [{"metric": "safety_energy", "set": "train", "value": self._energy}]


def adapted_layers(model: nn.Module, kinds: Sequence[str] | str = "all") -> dict[str, nn.Module]:
    """The matrices of the given kinds that have an adapter, by name."""
    found = {name: m for name, m in linears(model, "all").items() if hasattr(m, "lora_A")}
    return {name: m for name, m in found.items() if kinds == "all" or name.split(".")[-1] in kinds}


def leading_outputs(
    model: nn.Module, rows: Sequence[dict], modules: dict[str, nn.Module], rank: int, answers_only: bool = False
) -> dict[str, tuple[torch.Tensor, float]]:
    """The leading left singular vectors [m, rank] of W X, and the share of ||W X||_F^2 they hold, per module.

    answers_only: X holds the inputs at the tokens after the rows' prompts, instead of those at all tokens.
    Raises UserError if there is no such token.
    """
    if answers_only and all(len(row["input_ids"]) <= row["prompt"] for row in rows):
        raise UserError(
            "no row of SaLoRA's has a token of an answer within train.max_length; raise it, or use "
            "method.answers_only=false"
        )
    weights = {name: base_layer(m).weight.detach().float() for name, m in modules.items()}
    G = {n: torch.zeros(len(W), len(W), dtype=torch.float64, device=W.device) for n, W in weights.items()}

    def visit(name: str, x: torch.Tensor, first: torch.Tensor) -> None:
        y = torch.cat([first, x]).float() @ weights[name].T  # [tokens, m]
        G[name] += y.T @ y

    capture(model, rows, modules, visit, answers_only=answers_only)
    directions = {}
    for name, gram in G.items():
        values, U = torch.linalg.eigh(gram)  # ascending
        directions[name] = (U[:, -rank:].float().contiguous(), float(values[-rank:].sum() / values.sum()))
    return directions


def start_(module: nn.Module, U_C: torch.Tensor, U_t: torch.Tensor) -> None:
    """Give an adapter its task-specific start, and take what it then adds out of the frozen weight."""
    W = base_layer(module).weight
    U, S, Vh = torch.linalg.svd(W.float(), full_matrices=False)
    for lora_A, lora_B, s in active_adapters(module):
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
