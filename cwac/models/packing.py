"""Several token sequences in one forward pass, the opening that they share computed once (ours).

Prompts in a chat template begin alike: SmolLM2's harmful requests share 24 of their 42 tokens. In a causal model those
tokens have the same activations in every row, so the rows stand behind one copy of them, each seeing that and itself.
Same sums as row by row, up to rounding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from cwac.data.tokenize import Collator

LONGEST = 2048
"""Tokens of a packed row; attention within it costs their square."""


def together(model: nn.Module, rows: Sequence[list[int]], own_last: bool = False) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs of the model for all `rows` (token ids), and where each token's outputs are.

    own_last: the last token of a row is not shared, so that no other row's outputs depend on it.

    Places: [B, longest row], indices into the outputs [.., T, d] flattened to [-1, d]; -1 beyond a row's end. The rows
    are padded, one below the other, where the model's attention takes no such mask or there is nothing to share.
    """
    longest = max(map(len, rows))
    opening = common_opening(rows)
    if own_last:
        opening = min(opening, min(map(len, rows)) - 1)
    tokens = opening + sum(len(row) - opening for row in rows)
    places = torch.full((len(rows), longest), -1)
    if not takes_any_mask(model, longest) or tokens > min(LONGEST, len(rows) * longest - 1):
        batch = Collator(0)([{"input_ids": row} for row in rows])
        for i, row in enumerate(rows):
            places[i, : len(row)] = i * longest + torch.arange(len(row))
        return {key: batch[key] for key in ("input_ids", "attention_mask")}, places
    ids, position, owner = list(rows[0][:opening]), list(range(opening)), [-1] * opening
    for i, row in enumerate(rows):
        places[i, : len(row)] = torch.cat([torch.arange(opening), len(ids) + torch.arange(len(row) - opening)])
        ids += row[opening:]
        position += range(opening, len(row))
        owner += [i] * (len(row) - opening)
    whose = torch.tensor(owner)
    sees = torch.ones(len(ids), len(ids), dtype=torch.bool).tril() & ((whose == -1) | (whose.unsqueeze(1) == whose))
    if _config(model)._attn_implementation != "sdpa":  # which takes True where a token sees; others add to the scores
        sees = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.bfloat16).min)
    inputs = {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([position])}
    return inputs | {"attention_mask": sees[None, None]}, places


def common_opening(rows: Sequence[list[int]]) -> int:
    """How many tokens all rows share at the start."""
    return next((i for i, ids in enumerate(zip(*rows, strict=False)) if len(set(ids)) > 1), min(map(len, rows)))


def takes_any_mask(model: nn.Module, longest: int) -> bool:
    """Whether the model's attention takes a mask of any shape, for sequences of up to `longest` tokens."""
    config = _config(model)
    window = getattr(config, "sliding_window", None) or longest  # a given mask replaces the window
    return getattr(config, "_attn_implementation", None) in ("sdpa", "eager") and longest <= window


def _config(model: nn.Module) -> PretrainedConfig:
    return getattr(model, "module", model).config  # DDP has none of its own
