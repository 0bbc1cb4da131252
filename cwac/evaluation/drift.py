"""How far fine-tuning moved the model on harmful prompts: certificates of the constraints, and raw drift.

`weight_leak` = ||dW X||_F / (||dW||_F ||X||_F) of a matrix W with inputs X in the *aligned* model (CWAC, Eqs. 12-15:
zero when the update is confined to the anchors' null space). It is measured for every method, SFT included, on the
anchors and on held-out prompts; the first token is left out of X, since its norm would decide the value.
Where a method protects the directions V of a matrix's inputs, dW V = 0 bounds it on any prompts (ours): dW X =
dW (I - V V^T) X, so weight_leak <= ||(I - V V^T) X||_F / ||X||_F. A run compares the two (`Evaluator.drift`).
Activation drift is the paper's Figure 5: the normalised L2 distance of residual activations to the aligned model's.

Deviations:
- The paper does not say which layers, tokens and norm Figure 5 uses. Ours: every block's output at the prompt's last
  token, divided by the aligned model's norm there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from cwac.constraints.subspace import capture
from cwac.models.adapters import active_adapters, plain_parameters
from cwac.models.hooks import device_of, on_outputs
from cwac.models.layers import decoder_layers, evaluating, linears, plain_weight, unread_logits
from cwac.models.packing import together


def merged_weight(module: nn.Module) -> torch.Tensor:
    """The effective weight [d_out, d_in] of a plain or a LoRA-wrapped linear layer, in float64."""
    weight = plain_weight(module).double()
    for A, B, scaling in active_adapters(module):
        weight = weight + scaling * B.weight.detach().double() @ A.weight.detach().double()
    return weight


ROUNDING = 4
"""Bound on the rounding noise in a projected dW, in units of eps ||W||_F (ours). Where V spans every direction, 0.2 to
0.45 were measured."""


@dataclass(frozen=True)
class Change:
    """What fine-tuning added to one matrix of the decoder blocks."""

    delta: torch.Tensor
    """dW [d_out, d_in], fp32, of the weights or of the adapter."""
    norm: float
    """||dW||_F."""
    share: float
    """||dW||_F / ||W||_F."""


@torch.no_grad()
def weight_changes(model: nn.Module, reference: nn.Module) -> dict[str, Change]:
    """Every matrix of the decoder blocks against the aligned model's; `weight_leak` reads them for each set."""
    now, then = linears(model, "all"), linears(reference, "all")
    changes = {}
    for name in then:
        aligned = plain_weight(then[name]).double()
        # the difference in float64, its products in float32: rounding there (1e-7) stays below any leak that matters
        delta = (merged_weight(now[name]) - aligned).float()
        norm = float(delta.norm())
        changes[name] = Change(delta, norm, norm / float(aligned.norm()))
    return changes


@torch.no_grad()
def weight_leak(
    model: nn.Module,
    reference: nn.Module,
    rows: Sequence[dict],
    protected: Mapping[str, torch.Tensor] | None = None,
    changes: Mapping[str, Change] | None = None,
) -> dict[str, dict[str, float]]:
    """Per matrix of the decoder blocks: `leak`, `change` = ||dW||_F / ||W||_F, and `bound` where it is protected.

    reference: the aligned model. rows: encoded prompts. protected: matrix -> V [d_in, k] (`Method.protected`).
    changes: `weight_changes` of the two models, where they are known.
    A matrix that did not change has leak 0 and no bound. One with a bound also has `rounding`, by which the leak may
    exceed it: a weight is stored to its dtype's eps, so dW holds noise of that times ||W||, and where the constraint
    leaves (almost) nothing free, dW is nothing else.
    """
    protected, changes = protected or {}, changes or weight_changes(model, reference)
    now, then = linears(model, "all"), linears(reference, "all")
    moved = {name: then[name] for name in then if changes[name].delta.any()}
    out = dict.fromkeys(moved, 0.0)
    total = dict.fromkeys(moved, 0.0)
    free = dict.fromkeys(moved.keys() & protected.keys(), 0.0)

    def visit(name: str, x: torch.Tensor, _first: torch.Tensor) -> None:
        out[name] += float((x.float() @ changes[name].delta.T).double().square().sum())
        total[name] += float(x.double().square().sum())
        if name in free:
            V = protected[name].to(x.device)
            free[name] += float((x.float() - (x.float() @ V) @ V.T).double().square().sum())

    capture(reference, rows, moved, visit)
    result = {}
    for name in then:
        change = changes[name]
        leak = (out[name] / total[name]) ** 0.5 / change.norm if name in moved else 0.0
        result[name] = {"leak": leak, "change": change.share}
        if name in free:
            result[name]["bound"] = (free[name] / total[name]) ** 0.5
            held = getattr(now[name], "weight", None)
            full = held is not None and not hasattr(now[name], "lora_A") and held.is_floating_point()
            unit = torch.finfo(held.dtype).eps if full else 0.0
            result[name]["rounding"] = ROUNDING * unit / change.share
    return result


@torch.no_grad()
def moved_elsewhere(model: nn.Module, reference: nn.Module) -> list[str]:
    """Names of changed parameters outside the matrices of the decoder blocks, such as embeddings and norms.

    They are compared with the aligned model's. An adapter on such a module counts if it changes the module's output.
    """
    inside = {id(p) for part in (model, reference) for m in linears(part, "all").values() for p in m.parameters()}
    now, then = plain_parameters(model), plain_parameters(reference)
    found = [n for n, p in then.items() if id(p) not in inside and not torch.equal(now[n].to(p.device, p.dtype), p)]
    inner = {id(m) for m in linears(model, "all").values()}
    for name, module in model.named_modules():
        if id(module) not in inner and any(B.weight.any() and A.weight.any() for A, B, _ in active_adapters(module)):
            found.append(name)
    return found


@torch.no_grad()
def activation_drift(
    model: nn.Module, reference: nn.Module, rows: Sequence[dict], batch_size: int = 16
) -> list[list[float]]:
    """||r - r_ref||_2 / ||r_ref||_2 at each prompt's last token, as one list per prompt with one value per block.

    Both models read the same batches, so that weights which have not changed are at distance 0.
    """
    drift: list[list[float]] = []
    for start in range(0, len(rows), batch_size):
        prompts = [r["input_ids"] for r in rows[start : start + batch_size]]
        ours, theirs = (_residuals(m, prompts) for m in (model, reference))  # [L, B, d]
        distance = (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)
        drift += distance.T.tolist()
    return drift


def _residuals(model: nn.Module, prompts: Sequence[list[int]]) -> torch.Tensor:
    """Outputs [L, B, d] of every decoder block at each prompt's last token; what all open with is read once."""
    inputs, places = together(model, prompts)
    last = places[torch.arange(len(prompts)), torch.tensor([len(ids) - 1 for ids in prompts])]
    found: list[torch.Tensor] = []

    def read(_: int, hidden: torch.Tensor) -> None:
        found.append(hidden.flatten(0, 1)[last.to(hidden.device)].float())

    given = {key: value.to(device_of(model)) for key, value in inputs.items()}
    with evaluating(model), on_outputs(decoder_layers(model), read):
        model(**given, use_cache=False, **unread_logits(model))
    return torch.stack(found)
