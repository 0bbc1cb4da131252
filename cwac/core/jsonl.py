"""JSON lines on disk, each with the CRC-32 of what stands before it, so that a changed digit is found, not tabulated.

A last line that a crash cut off is removed by `repair`; a line that was changed afterwards is an error.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

from cwac.core.errors import UserError
from cwac.core.files import write_atomic

CRC = '"crc": "'

WARNING = (
    "What a model answered, in part to harmful requests: kept for research on safety, not advice; do not publish "
    "unredacted."
)


def to_line(row: dict) -> str:
    """A row as a line of JSON that ends in the CRC-32 of what stands before it."""
    body = json.dumps(row)[:-1] + (", " if row else "")
    return f'{body}"crc": "{zlib.crc32(body.encode()):08x}"}}\n'


def from_line(line: str) -> dict:
    """The row of a line; one without a CRC, from before there was any, is taken as it is.

    Raises ValueError where the line is no JSON object, or is not as it was written.
    """
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    stored = row.pop("crc", None)
    if stored is not None and stored != f"{zlib.crc32(line[: line.rindex(CRC)].encode()):08x}":
        raise ValueError("its checksum does not agree")
    return row


def append_jsonl(path: Path, rows: list[dict]) -> None:
    """Append all rows in one write and flush them to disk."""
    if not rows:
        return
    with path.open("a") as file:
        file.write("".join(map(to_line, rows)))
        file.flush()
        os.fsync(file.fileno())


def iter_jsonl(path: Path) -> Iterator[dict]:
    """The complete rows of a file, one at a time; none where there is no file.

    A last line cut by a crash and the line of warning are not read. Raises UserError that names a damaged line.
    """
    if not path.exists():
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):  # a complete line ends in a newline
                return
            if not line.strip():
                continue
            try:
                row = from_line(line.decode())
            except ValueError as error:
                raise UserError(
                    f"{path}, line {number}, is damaged ({error}); restore the file from a copy, or train the run "
                    "again with force=true, which sets this one aside"
                ) from error
            if row.keys() != {"warning"}:
                yield row


def read_jsonl(path: Path) -> list[dict]:
    """All rows of a file; see `iter_jsonl`."""
    return list(iter_jsonl(path))


def write_jsonl(path: Path, rows: list[dict], private: bool = False) -> None:
    """Write a whole file of rows at once, atomically; a private one opens with a warning and is its owner's alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"warning": WARNING}, *rows] if private else rows
    write_atomic(path, "".join(map(to_line, rows)), 0o600 if private else 0o666)


def repair(path: Path) -> None:
    """Cut off a last line that a crash left half-written."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = size = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - (1 << 16))
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            end = start
            if newline >= 0:
                end = start + newline + 1
                break
        if end < size:
            file.truncate(end)
