"""Reads what passes through a model, by hooks: inputs and outputs of modules, the residual stream at some layers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from cwac.core.errors import UserError
from cwac.data.tokenize import Collator
from cwac.models.layers import decoder_layers, picks_logits
from cwac.models.packing import common_opening, together

Row = dict[str, Any]


class _Deepest(Exception):
    """Leaves the forward pass once the deepest layer has been read; never seen outside this module."""


def layers_of(model: nn.Module, spec: str | Sequence[int] = "auto") -> list[int]:
    """The layers whose output is read: layer l is decoder block l, counted from 0; it gives `hidden_states[l + 1]`.

    spec: `auto` for `hidden_states` n//4 .. 3n//4 as RouteSAE (arXiv:2503.08200), or a list of layers in 0 .. n - 1.
    """
    n = len(decoder_layers(model))
    if isinstance(spec, str):
        if spec != "auto":
            raise UserError(f"model.sae.layers={spec!r}: use `auto` or a list of layers between 0 and {n - 1}")
        return list(range(max(1, n // 4) - 1, 3 * n // 4))
    layers = sorted({int(layer) for layer in spec})
    if not layers or layers[0] < 0 or layers[-1] >= n:
        raise UserError(
            f"model.sae.layers={list(spec)}: this model has layers 0 to {n - 1}; give layers in that range"
        )
    return layers


@contextmanager
def on_inputs(modules: Mapping[str, nn.Module], visit: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While open, `visit(name, x [B, T, d_in])` sees the input of each module, with its graph."""

    def attach(name: str, module: nn.Module):
        return module.register_forward_pre_hook(lambda _module, inputs: visit(name, inputs[0]))

    handles = [attach(name, module) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def on_outputs(modules: Sequence[nn.Module], visit: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
    """While open, `visit(i, h [B, T, d])` sees the output of the i-th module and may return a replacement for it.

    Of a module that returns several things, as attention does, h is the first.
    """

    def attach(i: int, module: nn.Module):
        def forward_hook(_module, _args, output):
            several = isinstance(output, tuple)
            changed = visit(i, output[0] if several else output)
            if changed is None:
                return None
            return (changed, *output[1:]) if several else changed

        return module.register_forward_hook(forward_hook)

    handles = [attach(i, module) for i, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def at_tokens(x: Tensor, places: Tensor) -> Tensor:
    """x [B, T, ...] at one token of each row, places [B]: [B, ...]."""
    return x[torch.arange(len(places), device=x.device), places.to(x.device)]


def last_tokens(x: Tensor, mask: Tensor) -> Tensor:
    """x [B, T, ...] at the last real token of each right-padded row, by its attention mask [B, T]: [B, ...]."""
    return at_tokens(x, mask.sum(1) - 1)


@contextmanager
def on_layers(model: nn.Module, layers: Sequence[int], hook: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
    """While open, `hook(layer, h [B, T, d])` sees the output of each of `layers` and may return a replacement for it.

    Gradient checkpointing of the blocks is off meanwhile: a hook would otherwise run a second time in
    the backward pass, on a tensor outside the graph.
    """
    blocks = decoder_layers(model)
    checkpointed = [block for block in blocks if getattr(block, "gradient_checkpointing", False)]

    for block in checkpointed:
        block.gradient_checkpointing = False
    try:
        with on_outputs([blocks[layer] for layer in layers], lambda i, hidden: hook(layers[i], hidden)):
            yield
    finally:
        for block in checkpointed:
            block.gradient_checkpointing = True


ENTRY = -1
"""Stands among layers for what enters the first block: the embedding, `hidden_states[0]`."""


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last decoder block and the head. Raises UserError where there is none of a known name."""
    blocks = decoder_layers(model)
    for module in model.modules():
        if any(child is blocks for child in module.children()):
            for name in ("norm", "final_layernorm", "final_layer_norm", "ln_f"):
                if isinstance(getattr(module, name, None), nn.Module):
                    return getattr(module, name)
    raise UserError(f"{type(model).__name__} has no final norm beside its decoder blocks; it is not supported here")


def residuals(model: nn.Module, batch: dict[str, Any], layers: Sequence[int], norm: bool = False) -> Tensor:
    """Residual stream after `layers`, [B, T, L_r, d], in the model's dtype and with its graph.

    The forward pass ends at the deepest of them, the last: what lies above it is never computed.
    batch: the model's own arguments; `labels` are left out, a cache may be passed.
    layers: decoder blocks counted from 0, in order; `ENTRY`, first, for what enters block 0. norm: the deepest is read
    through the model's final norm, as `hidden_states[-1]` of a model that ends there.
    """
    seen: dict[int, Tensor] = {}

    def record(layer: int, hidden: Tensor) -> None:
        seen[layer] = hidden
        if layer == layers[-1]:
            if norm:
                seen[layer] = final_norm(model)(hidden)
            raise _Deepest

    def enter(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        record(ENTRY, args[0] if args else kwargs["hidden_states"])

    inputs = {"use_cache": False, **{k: v for k, v in batch.items() if k != "labels"}}
    entry = [decoder_layers(model)[0].register_forward_pre_hook(enter, with_kwargs=True)] if ENTRY in layers else []
    try:
        with on_layers(model, [layer for layer in layers if layer != ENTRY], record), suppress(_Deepest):
            model(**inputs)
    finally:
        for handle in entry:
            handle.remove()
    return torch.stack([seen[layer] for layer in layers], dim=2)


def normalize(r: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm without affine over the last axis: x, mean, std; at least fp32, |x|^2 = d - 1."""
    r = r if r.dtype == torch.float64 else r.float()
    mean, std = r.mean(-1, keepdim=True), r.std(-1, keepdim=True)
    return (r - mean) / (std + eps), mean, std


def keep_mask(ids: Tensor, mask: Tensor, r: Tensor, bos: Sequence[int] = (), skip: int = 1) -> Tensor:
    """Which tokens [B, T] are SAE data: real, not among the first `skip` of their row, not BOS, norm <= 10x median.

    The median is taken per layer over the batch's kept tokens. Padding may be on either side.
    """
    keep = mask.bool() & (mask.cumsum(1) > skip)
    for token in bos:
        keep &= ids != token
    norm = r.float().norm(dim=-1)  # [B, T, L_r]
    if keep.any():
        keep &= (norm <= 10 * norm[keep].median(0).values).all(-1)
    return keep


def shared_prefix(rows: Sequence[Row]) -> int:
    """Tokens to skip at the start of every row: those that all rows share, at least the first.

    A chat template's opening has the same residuals in every row of a causal model. Counting its copies
    would fill the fit with a few constant vectors and flatter the reconstruction. Some token always stays.
    """
    first = rows[0]["input_ids"]
    ids = [r["input_ids"] for r in rows]
    n = min(common_opening(ids), min(map(len, ids)) - 1)
    # identical rows share everything and are still data
    return max(1, n if any(r["input_ids"] != first for r in rows) else 1)


def read_at(
    model: nn.Module, prompts: Sequence[tuple[list[int], list[int]]], layers: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Residuals at some positions of several prompts, with their graph, in one forward pass.

    prompts: (token ids, positions to read) each. Returns [B, Q, L_r, d] and which of the Q are real, [B, Q]; what
    fills the others is of no meaning.
    """
    device = device_of(model)
    where = nn.utils.rnn.pad_sequence([torch.tensor(read) for _, read in prompts], batch_first=True)  # [B, Q]
    real = torch.arange(where.shape[1]) < torch.tensor([len(read) for _, read in prompts]).unsqueeze(1)
    inputs, places = together(model, [ids for ids, _ in prompts])
    r = residuals(model, {k: v.to(device) for k, v in inputs.items()}, layers)  # [B or 1, T, L_r, d]
    return r.flatten(0, 1)[places.gather(1, where).to(r.device)], real.to(r.device)


def bos_ids(model: nn.Module) -> list[int]:
    """The model's BOS ids; a decoder may name none, one or several."""
    bos = getattr(model.config, "bos_token_id", None)
    return [] if bos is None else list(bos) if isinstance(bos, (list, tuple)) else [bos]


def by_length(rows: Sequence[Row], tokens: int) -> Iterator[list[int]]:
    """Row numbers for one batch after another of at most `tokens` padded tokens, longest rows first."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    while order:
        size = max(1, tokens // len(rows[order[0]]["input_ids"]))
        chosen, order = order[:size], order[size:]
        yield chosen


def batches(rows: Sequence[Row], device: torch.device, tokens: int = 4096) -> Iterator[tuple[list[int], dict]]:
    """(row numbers, right-padded batch) of at most `tokens` padded tokens, longest rows first."""
    for chosen in by_length(rows, tokens):
        batch = Collator(0)([{"input_ids": rows[i]["input_ids"]} for i in chosen])  # id 0 is masked everywhere
        yield chosen, {k: v.to(device) for k, v in batch.items() if k != "labels"}


def packs(
    model: nn.Module, rows: Sequence[Row], tokens: int = 1024
) -> Iterator[tuple[list[int], dict[str, Tensor], Tensor]]:
    """(row numbers, the model's inputs, where each row's last token is [B]) of at most `tokens` tokens, longest first.

    What the rows of a pack open with is read once (`cwac.models.packing`), and each row's last token is its own. Where
    it is counts in outputs [.., T, d] flattened to [-1, d].
    """
    device = device_of(model)
    for chosen in by_length(rows, tokens):
        ids = [rows[i]["input_ids"] for i in chosen]
        inputs, places = together(model, ids, own_last=True)
        last = places[torch.arange(len(ids)), torch.tensor([len(row) - 1 for row in ids])]
        yield chosen, {k: v.to(device) for k, v in inputs.items()}, last.to(device)


def logits_at(model: nn.Module, inputs: Mapping[str, Tensor], places: Tensor) -> Tensor:
    """Logits [B, V] at some tokens of a forward pass, with their graph; places [B] count as those of `packs`.

    Where the model can be asked for some columns alone, no others are computed: a small model's head is a quarter of
    its work, and the logits of a few thousand tokens are gigabytes.
    """
    row, column = places // inputs["input_ids"].shape[1], places % inputs["input_ids"].shape[1]
    if not picks_logits(model):
        return model(**inputs, use_cache=False).logits[row, column]
    columns, at = column.unique(return_inverse=True)
    return model(**inputs, use_cache=False, logits_to_keep=columns).logits[row, at]


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
