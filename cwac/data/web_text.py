"""Text of the web as token rows: a data set of the Hugging Face hub, streamed, or files on this machine.

For the general part of an autoencoder's corpus; CWAC (arXiv:2604.12384, section 4.1) takes OpenWebText2.

Deviations:
- Documents are read in the order of the source until there are tokens enough, and cut into rows of the length that the
  model is trained with (ours; RouteSAE, arXiv:2503.08200, cuts at 512 words).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from cwac.core.errors import UserError
from cwac.core.hf_hub import first_line

KEY = "method.activation.sae.corpus"


class TokenRows(Sequence):
    """Rows `{"input_ids": [...]}` that are held as one tensor of 32-bit numbers: web text has millions of tokens."""

    def __init__(self, rows: list[list[int]]):
        self.tokens = torch.tensor([i for row in rows for i in row], dtype=torch.int32)
        self.ends = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0).tolist()

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, at):
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        at = range(len(self))[at]
        return {"input_ids": self.tokens[self.ends[at] : self.ends[at + 1]].tolist()}

    def split(self, n: int) -> tuple[list[dict], TokenRows]:
        """The first n rows, and the others."""
        others = TokenRows([])
        others.tokens, others.ends = self.tokens[self.ends[n] :], [end - self.ends[n] for end in self.ends[n:]]
        return self[:n], others


def documents(source: str, text: str = "text", config: str | None = None) -> Iterator[str]:
    """The documents of a source, in its order, without what is empty.

    source: a `.txt` file (a document a line), a `.jsonl` file, a folder of data files, or an id of the hub; of the
    last two the split `train` is streamed. text: the column or field. config: the data set's configuration, or None.
    Raises UserError for a source that cannot be read, or that lacks the column.
    """
    path = Path(source).expanduser()
    if path.suffix in (".txt", ".jsonl") and not path.is_file():
        raise UserError(f"{KEY}={source}: there is no such file; give a .txt or .jsonl file, a folder or a hub id")
    if path.is_file() and path.suffix == ".txt":
        rows = ({text: line} for line in path.open(encoding="utf-8"))
    elif path.is_file():
        rows = map(json.loads, filter(str.strip, path.open(encoding="utf-8")))
    else:
        rows = _streamed(str(path) if path.is_dir() else source, config)
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # whatever the many back ends raise, the user needs the same facts
            raise UserError(f"{KEY}={source} could not be read: {first_line(error)}; or give a local file") from error
        if row is None:
            return
        if text not in row:
            raise UserError(f"{KEY}={source} has no column {text}; it has {', '.join(row)}: give {KEY}_text")
        if row[text].strip():
            yield row[text]


def _streamed(source: str, config: str | None) -> Iterator[dict]:
    import datasets  # here and not above: it takes a second

    yield from datasets.load_dataset(source, config, split="train", streaming=True)


def web_rows(
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    tokens: int,
    length: int,
    text: str = "text",
    config: str | None = None,
) -> TokenRows:
    """The first `tokens` tokens of a source's documents, or all there are, in rows of at most `length` tokens.

    source, text, config: as for `documents`. Raises UserError as that does, and where it holds no text.
    """
    rows: list[list[int]] = []
    found = 0
    for document in documents(source, text, config):
        ids = tokenizer(document, verbose=False)["input_ids"]
        for start in range(0, len(ids), length):
            row = ids[start : start + length]
            if len(row) > 1:  # the first token of a row is no data
                rows.append(row)
                found += len(row)
        if found >= tokens:
            break
    if not rows:
        raise UserError(f"{KEY}={source} holds no text; give another source")
    return TokenRows(rows)
