"""Finds the parts of a causal language model that defences act on: decoder blocks, linear layers, their inputs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import GenerationMixin

from cwac.core.errors import UserError
from cwac.models.adapters import active_adapters

CACHE = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)
"""What this release of transformers calls the keys and values of earlier tokens; 5.24 renamed them."""

SHARED_INPUT = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
"""Matrices of one block that read the same input, and so share one subspace."""


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks of any causal LM of the hub, also behind peft or DDP.

    Found by structure: the longest ModuleList whose entries hold an attention and an MLP.
    """
    candidates = [
        m
        for m in model.modules()
        if isinstance(m, nn.ModuleList) and len(m) and hasattr(m[0], "self_attn") and hasattr(m[0], "mlp")
    ]
    if not candidates:
        raise UserError(f"{type(model).__name__} has no decoder blocks with self_attn and mlp; it is not supported")
    return max(candidates, key=len)


def picks_logits(model: nn.Module) -> bool:
    """Whether a forward pass can be asked for some tokens' logits alone (`logits_to_keep`)."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft's forward names no arguments
    return "logits_to_keep" in inspect.signature(inner.forward).parameters


def unread_logits(model: nn.Module) -> dict[str, int]:
    """Arguments of a forward pass whose logits nobody reads: SmolLM2's are a fifth of its work."""
    return {"logits_to_keep": 1} if picks_logits(model) else {}


def linears(model: nn.Module, kinds, layers=None, key: str = "method.weight.modules") -> dict[str, nn.Module]:
    """Linear modules inside the decoder blocks, by name relative to the block list: `3.mlp.down_proj`.

    kinds: `all`, or names such as `down_proj`, `q_proj`. layers: block indices, None for all. key: what errors call
    `kinds`.
    With LoRA the entries are peft's wrapped modules. Raises UserError if a name or index matches nothing.
    """
    blocks = decoder_layers(model)
    wanted = range(len(blocks)) if layers is None else list(layers)
    if any(not 0 <= i < len(blocks) for i in wanted):
        raise UserError(f"method.weight.layers={list(wanted)} lies outside the model's blocks 0..{len(blocks) - 1}")
    found: dict[str, nn.Module] = {}
    for i in wanted:
        for name, module in blocks[i].named_modules():
            parts = name.split(".")
            if "base_layer" in parts or any(part.startswith("lora_") for part in parts):
                continue
            if isinstance(base_layer(module), nn.Linear) and (kinds == "all" or parts[-1] in kinds):
                found[f"{i}.{name}"] = module
    missing = set() if kinds == "all" else set(kinds) - {name.split(".")[-1] for name in found}
    if missing or not found:
        available = sorted({n.split(".")[-1] for n in linears(model, "all")}) if kinds != "all" else []
        raise UserError(f"{key}={sorted(missing)} not found in the model; it has {available}")
    return found


def base_layer(module: nn.Module) -> nn.Module:
    """The plain layer inside a peft wrapper, or the module itself."""
    return getattr(module, "base_layer", module)


def plain_weight(module: nn.Module) -> torch.Tensor:
    """The weight [d_out, d_in] of a linear layer below its adapter, detached, and dequantised if held in 4 bits."""
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(base_layer(module)).detach()


def trains(module: nn.Module) -> bool:
    """Whether a linear layer's weight will change: by itself, or through its LoRA adapter."""
    own = module.weight.requires_grad  # of the plain layer, also behind peft
    return own or any(A.weight.requires_grad or B.weight.requires_grad for A, B, _ in active_adapters(module))


def input_group(name: str) -> str:
    """The name of the input a matrix reads: `3.self_attn.q_proj` -> `3.qkv`."""
    layer, kind = name.split(".")[0], name.split(".")[-1]
    return f"{layer}.{SHARED_INPUT.get(kind, kind)}"


def not_finite(model: nn.Module) -> list[str]:
    """The names of the parameters that hold a value which is no finite number."""
    return [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) for the duration."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@functools.cache
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
