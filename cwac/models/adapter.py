"""A LoRA adapter whose A is fixed: W = W_0 + C N^T, with peft's A = N^T frozen and B = C trained from zero.

It is an ordinary peft adapter with scaling 1 (LoRA: Hu et al., ICLR 2022, arXiv:2106.09685; with A frozen, LoRA-FA:
Zhang et al. 2023, arXiv:2308.03303): saved, loaded, merged and served as any other. What differs while it trains:

- x N is computed once for the matrices that read the same x (q, k, v; gate, up), which share A's memory too;
- C (x N) is added to W_0 x in place;
- where it is asked for, W_0 + C N^T is held too and made anew after each backward pass: then a step needs nothing
  beside it but x N and C's gradient, which for large k is faster.

Deviations: `ours` from LoRA-FA, whose A is random and of each matrix's own. Rounding apart, outputs and gradients are
those of peft's own layers (tests/test_nullspace.py).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, PeftModelForCausalLM
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional as F

from cwac.core.environment import quieten_peft
from cwac.models.layers import input_group

ADAPTER = "default"
"""peft's own name for a model's first adapter."""


class SharedInput:
    """x N of the matrices that read one input: computed by the first of them, and forgotten after the last.

    members: how many read it.
    """

    def __init__(self, members: int):
        self.members = members
        self._forget()

    def _forget(self) -> None:
        self._x = self._xN = None
        self._left = 0

    def __deepcopy__(self, memo: dict) -> SharedInput:
        memo[id(self)] = fresh = SharedInput(self.members)
        return fresh

    def project(self, x: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        """x [..., d_in] times A^T, A [k, d_in]: [..., k]."""
        wants_grad = torch.is_grad_enabled()
        if self._left and self._x is x and self._graded == wants_grad:
            found = self._xN
        else:
            plain = torch.is_autocast_enabled(x.device.type)  # which casts by itself
            found = F.linear(x if plain else x.to(A.dtype), A)
            self._x, self._xN, self._graded, self._left = x, found, wants_grad, self.members
        self._left -= 1
        if not self._left:
            self._forget()
        return found


class Folded:
    """W_0 + C A of one matrix, made anew when C may have changed: a fused optimizer's step leaves no other trace than
    the backward pass before it."""

    def __init__(self):
        self._W = self._of = None
        self._version = -1

    def forget(self) -> None:
        self._of = None

    def __deepcopy__(self, memo: dict) -> Folded:
        return Folded()

    @torch.no_grad()
    def weight(self, W_0: torch.Tensor, C: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        """[d_out, d_in], of W_0 [d_out, d_in], C [d_out, k], A [k, d_in]; without a gradient."""
        if self._of is not C or self._version != C._version:
            there = self._W is not None and self._W.device == W_0.device
            self._W = torch.addmm(W_0, C, A, out=self._W) if there else torch.addmm(W_0, C, A)
            self._of, self._version = C, C._version
        return self._W


class Through(torch.autograd.Function):
    """x W^T with W = W_0 + C A, whose gradient goes to x and, by x N, to C: no product with d_out x d_in for C."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, folded: Folded, W: torch.Tensor, bias, C: torch.Tensor, xN: torch.Tensor):
        ctx.folded = folded
        ctx.save_for_backward(W, xN)
        return F.linear(x, W, bias)

    @staticmethod
    def backward(ctx, dy: torch.Tensor):
        W, xN = ctx.saved_tensors
        ctx.folded.forget()
        dx = dy @ W if ctx.needs_input_grad[0] else None
        dC = dy.flatten(0, -2).T @ xN.flatten(0, -2) if ctx.needs_input_grad[4] else None
        return dx, None, None, None, dC, None


class FixedInput:
    """Mixed into peft's LoRA layer: A stays frozen, and x A^T comes from the input's `SharedInput`."""

    shared_input: SharedInput
    folded: Folded | None = None
    """None where W_0 x and C (x N) are computed side by side."""

    def set_adapter(self, *args, **kwargs) -> None:
        """As peft's, which makes A trainable: at every load of a checkpoint, for one."""
        super().set_adapter(*args, **kwargs)
        self.lora_A[ADAPTER].requires_grad_(False)

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if self.disable_adapters or self.merged or args or kwargs or self.active_adapters != [ADAPTER]:
            return super().forward(x, *args, **kwargs)
        A, C = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        if self.folded is not None and not torch.is_autocast_enabled(x.device.type):
            W, bias = self.folded.weight(self.base_layer.weight, C, A), self.base_layer.bias
            if not torch.is_grad_enabled():
                return F.linear(x, W, bias)
            with torch.no_grad():
                xN = self.shared_input.project(x, A)
            return Through.apply(x, self.folded, W, bias, C, xN)
        y = self.base_layer(x)  # [..., d_out]
        xN = self.shared_input.project(x, A)
        if xN.dtype == y.dtype and type(self.base_layer) is nn.Linear:
            y.view(-1, y.shape[-1]).addmm_(xN.view(-1, xN.shape[-1]), C.to(y.dtype).T)
            return y
        return (y + F.linear(xN, C)).to(y.dtype)


@functools.cache
def fixed(kind: type) -> type:
    """peft's layer class `kind`, with `FixedInput`."""
    return type(f"FixedInput{kind.__name__}", (FixedInput, kind), {})


class FixedInputModel(PeftModelForCausalLM):
    """peft's model; the card that it saves beside the adapter says what A is."""

    about: str = ""
    """Markdown."""

    def create_or_update_model_card(self, output_dir: str) -> None:
        """peft's card of a folder: base model, tags, versions; its text is `about`, not peft's form to fill in."""
        from huggingface_hub import ModelCard

        path = Path(output_dir, "README.md")
        if self.about and not path.is_file():
            path.write_text(f"---\n{{}}\n---\n\n{self.about}\n\n", encoding="utf-8")
        super().create_or_update_model_card(output_dir)
        card = ModelCard.load(path)
        if self.about and self.about not in card.text:
            card.text = f"{self.about}\n\n{card.text}"
            card.save(path)


def fold(model: nn.Module, wanted: bool | None) -> None:
    """Hold W_0 + C A too from here on, 4 bytes a weight: in every fixed layer, in none, or where 4 k > d_in >= d_out.

    That is for None: a matrix with d_out > d_in (gate, up) gains least for a byte held. A step of T tokens saves about
    k (2 T / d_in - 1) multiplications a weight of it, and k T / d_out more where no other matrix reads its input.

    Only where W_0 is in fp32 and whole on this rank: rounded to bf16 it would lose the update, and FSDP2 gathers C
    anew for each pass.
    """
    for layer in model.modules():
        if isinstance(layer, FixedInput):
            k = layer.lora_A[ADAPTER].weight.shape[0]
            W_0 = layer.base_layer.weight
            d_out, d_in = W_0.shape
            can = type(layer.base_layer) is nn.Linear and W_0.dtype == torch.float32 and not hasattr(W_0, "placements")
            layer.folded = Folded() if can and (4 * k > d_in >= d_out if wanted is None else wanted) else None


def add_fixed_adapter(
    model: nn.Module, modules: Mapping[str, nn.Module], free: Mapping[str, torch.Tensor], about: str = ""
) -> PeftModel:
    """Wrap a causal language model in place; the adapter alone trains, from C = 0.

    modules: linear layers by their name in the blocks (`cwac.models.layers.linears`). free: input name -> N [d_in, k];
    a module whose input it lacks, or leaves no direction, gets no adapter. about: what the saved card says, Markdown.
    """
    quieten_peft()
    paths = {id(module): path for path, module in model.named_modules()}
    chosen = {paths[id(m)]: (m, input_group(n)) for n, m in modules.items() if input_group(n) in free}
    ranks = {path: free[group].shape[1] for path, (_, group) in chosen.items() if free[group].shape[1]}
    most = max(ranks.values())
    fewer = {path: rank for path, rank in ranks.items() if rank != most}
    config = LoraConfig(
        r=most,
        lora_alpha=most,
        rank_pattern=fewer,
        alpha_pattern=fewer,  # so that every scaling is exactly 1
        target_modules=targets(model, ranks),
        lora_dropout=0.0,
        bias="none",
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    # on no device: peft draws nothing, and A and C are put in below
    wrapped = FixedInputModel(model, config, low_cpu_mem_usage=True)
    wrapped.about = about
    groups: dict[str, list[LoraLayer]] = {}
    for path in ranks:
        groups.setdefault(chosen[path][1], []).append(model.get_submodule(path))
    for group, layers in groups.items():
        shared, A = SharedInput(len(layers)), None
        for layer in layers:
            layer.__class__ = fixed(type(layer))
            layer.shared_input = shared
            device = layer.get_base_layer().weight.device
            if A is None:
                A = nn.Parameter(free[group].T.to(device, torch.float32).contiguous(), requires_grad=False)
            layer.lora_A[ADAPTER].weight = A
            layer.lora_B[ADAPTER].weight = nn.Parameter(torch.zeros(layer.out_features, len(A), device=device))
    return wrapped


def targets(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """What peft is told to adapt: names such as `q_proj` where those are in every block, else whole paths."""
    names = sorted({path.split(".")[-1] for path in paths})
    alike = {path for path, _ in model.named_modules() if path.split(".")[-1] in names}
    return names if alike == set(paths) else sorted(paths)
