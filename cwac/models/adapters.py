"""What a peft adapter adds to a layer, which kinds the methods can work on, and how one is merged without more.

Whatever reads or edits weights takes a LoRA layer for W + s B A of its active adapters (Hu et al. 2022,
arXiv:2106.09685). Other kinds (DoRA, LoHa, IA3, ...) change the weight in another way, so a constraint on A would hold
nothing in the merged model: they are refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import nn

from cwac.core.errors import UserError


def active_adapters(module: nn.Module) -> Iterator[tuple[nn.Linear, nn.Linear, float]]:
    """(A [r, d_in], B [d_out, r], s) of each active LoRA adapter of a layer; nothing for a plain layer."""
    down = getattr(module, "lora_A", {})
    active = getattr(module, "active_adapters", list(down))
    for name in down:
        if name in active:
            yield down[name], module.lora_B[name], module.scaling[name]


def set_scaling_(model: nn.Module, scaling: float) -> None:
    """Give every LoRA adapter of a model the scaling s by alpha = s r, so that a saved one is read back the same."""
    for module in model.modules():
        for name in getattr(module, "lora_A", {}):
            module.scaling[name], module.lora_alpha[name] = scaling, scaling * module.r[name]
    for config in getattr(model, "peft_config", {}).values():
        alpha = scaling * config.r
        config.lora_alpha = int(alpha) if alpha == int(alpha) else alpha


def holds_update(model: nn.Module) -> bool:
    """Whether an adapter changes what the model computes: B A is not 0, as after a training or a start like PiSSA's.

    An adapter of a kind that is not read here counts as one that does.
    """
    return _why_held(model) is not None


def require_plain_lora(model: nn.Module, method: str) -> None:
    """Refuse, for a method that reads or edits weights, adapters that it cannot work on; raises UserError.

    Those are other kinds than LoRA, and LoRA that holds an update already: the methods project, measure and undo an
    update as if the weights below the adapter were the aligned model's.
    """
    said = f"method={method} reads or edits weights"
    if (odd := unsupported(model)) is not None:
        raise UserError(
            f"{said}, and of adapters it knows LoRA alone (dW = s B A); the model has {odd}: use a plain LoraConfig, "
            "or a method that leaves weights alone"
        )
    if (where := _why_held(model)) is not None:
        raise UserError(
            f"{said} as they were before any update, but the model's adapter holds one already ({where}): merge it "
            "first, model = model.merge_and_unload(), and train the merged model or a new adapter on it"
        )


def unsupported(model: nn.Module) -> str | None:
    """The first part of an adapter that is no plain LoRA of a linear layer or embedding, in words; None for none."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    for config in getattr(model, "peft_config", {}).values():
        if getattr(config, "is_prompt_learning", False):
            return f"{type(config).__name__} (virtual tokens)"
    for name, module in model.named_modules():
        if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
            if any(part.isdigit() for part in name.split(".")):  # outside the blocks a copy that trains is a layer
                return f"modules_to_save ({name})"
        elif isinstance(module, BaseTunerLayer):
            if not isinstance(module, LoraLayer) or not type(module).__module__.startswith("peft.tuners.lora"):
                return f"{type(module).__module__.removeprefix('peft.tuners.').partition('.')[0]} ({name})"
            if any(getattr(module, "use_dora", {}).values()):
                return f"DoRA ({name})"
            if variant := getattr(module, "lora_variant", {}):
                return f"{type(next(iter(variant.values()))).__name__} ({name})"
            if hasattr(module, "parameter_name"):  # target_parameters: an adapter of a tensor of several experts
                return f"target_parameters ({name})"
            if any(getattr(module, "lora_bias", {}).values()):
                return f"lora_bias ({name})"
    return None


@torch.no_grad()
def _why_held(model: nn.Module) -> str | None:
    """The first layer whose adapter changes it; None where none does."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    if (odd := unsupported(model)) is not None:
        return odd
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        if not isinstance(module, LoraLayer) or module.merged:
            return name
        pairs = [(A.weight, B.weight) for A, B, _ in active_adapters(module)]
        down = getattr(module, "lora_embedding_A", {})
        pairs += [(down[key], module.lora_embedding_B[key]) for key in down if key in module.active_adapters]
        if any((B.float() @ A.float()).any() for A, B in pairs if A.any() and B.any()):
            return name
    return None


def merged(model: nn.Module, exact: bool = True) -> nn.Module:
    """The plain model with an adapter's update in its weights, in place; the model itself where it has no adapter.

    An adapter on one of two tied matrices unties them first: merged into the one they share, it would change the other
    too. exact: take weights of fewer bits than the adapter's to fp32, since its update would round away in them.
    """
    if not hasattr(model, "merge_and_unload"):
        return model
    plain = model.get_base_model()
    untie_(plain)
    half = any(p.dtype in (torch.bfloat16, torch.float16) for p in plain.parameters())
    if exact and half and getattr(plain.config, "quantization_config", None) is None:
        plain.float()
    return model.merge_and_unload(safe_merge=True)  # an update that is not finite is an error


def plain_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """A model's parameters by the names that they have without an adapter, whose own are left out.

    Where peft trains a copy of a module (`modules_to_save`), it is the copy's.
    """
    found = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name or ".original_module." in name:
            continue
        name = re.sub(r"\.modules_to_save\.[^.]+\.", ".", name.replace(".base_layer.", "."))
        found[name.removeprefix("base_model.model.")] = parameter
    return found


def untie_(plain: nn.Module) -> None:
    """Give the head a weight of its own where it shares one with the embedding and either has an adapter."""
    embedding, head = plain.get_input_embeddings(), plain.get_output_embeddings()
    if embedding is None or head is None or not (hasattr(embedding, "base_layer") or hasattr(head, "base_layer")):
        return
    layer = getattr(head, "base_layer", head)
    if layer.weight is getattr(embedding, "base_layer", embedding).weight:
        layer.weight = nn.Parameter(layer.weight.detach().clone(), layer.weight.requires_grad)
        plain.config.tie_word_embeddings = False
        plain.config.get_text_config().tie_word_embeddings = False
