"""The mean loss per label token of encoded rows, in less time than plain forward passes (ours).

Rows in a chat template open alike, so what they share is read once (`cwac/models/packing.py`), and logits are computed
where a label is predicted and nowhere else: two or three of a row's sixty tokens on SST-2. Same sums as row by row, up
to rounding.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from cwac.core.cache import digest, load_or_build
from cwac.data.tokenize import IGNORE
from cwac.models.context import Context
from cwac.models.hooks import device_of, logits_at
from cwac.models.layers import evaluating
from cwac.models.packing import together

FILE = "loss.json"


@torch.no_grad()
def label_loss(model: nn.Module, rows: Sequence[dict], batch_size: int = 16) -> float | None:
    """Mean loss in nats over all label tokens of `rows` (`input_ids`, `labels`); None where there is no such token.

    The mean is over tokens and not over rows or batches. The model's training mode is restored.
    """
    total, tokens = 0.0, 0
    # rows of one length side by side waste little, whether they are packed or padded
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            chosen = [rows[i] for i in order[start : start + batch_size]]
            inputs, places = together(model, [row["input_ids"] for row in chosen])
            labels = pad_sequence([torch.tensor(row["labels"]) for row in chosen], True, IGNORE)[:, 1:]  # [B, T - 1]
            wanted = labels != IGNORE
            at = places[:, :-1][wanted]  # [n], where the outputs that predict a label are
            given = {key: value.to(device_of(model)) for key, value in inputs.items()}
            logits = logits_at(model, given, at.to(device_of(model)))  # [n, vocabulary]
            total += float(cross_entropy(logits.float(), labels[wanted].to(logits.device), reduction="sum"))
            tokens += len(at)
    return total / tokens if tokens else None


def aligned_loss(model: nn.Module, context: Context, rows: Sequence[dict]) -> float | None:
    """`label_loss` of the aligned model, computed once for every run that measures it on these rows.

    The key holds the rows as token ids and labels, so that another text, template, tokenizer or length is another
    artifact.
    """
    if not rows:
        return None
    read = {"attention": model.config._attn_implementation, "rows": digest({"rows": list(rows)})}
    key = {"model": context.loaded.key, **read}

    def build(folder: Path) -> None:
        (folder / FILE).write_text(json.dumps({"loss": label_loss(model, rows), "rows": len(rows)}))

    return json.loads((load_or_build(context.artifacts, "losses", key, build) / FILE).read_text())["loss"]
