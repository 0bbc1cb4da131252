"""The two errors that a user can mend, printed as one line without a traceback."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STARTED_AS = "CWAC_TRAIN"
"""Environment variable of the command `cwac` for what it starts: how `train.py` is called there, `cwac train`."""


def as_typed(text: str) -> str:
    """The commands in a text as this user types them: `cwac judge` for `python -m experiments.judge` under `cwac`."""
    if STARTED_AS not in os.environ:
        return text
    text = re.sub(r"python -m (?:experiments|analysis)\.(\w+)", r"cwac \1", text)
    return text.replace("python train.py", os.environ[STARTED_AS])


class UserError(Exception):
    """Something the user can mend; its message names the key and the remedy and is printed without a traceback."""

    def __str__(self) -> str:
        return as_typed(super().__str__())


class UsageError(UserError):
    """A configuration that can never run; exit code 2, where other user errors give 1."""


@contextmanager
def naming_earlier(path: Path | None) -> Iterator[None]:
    """A UserError of the block says at its end that the result at `path`, which stands there, is of an earlier call.

    For commands that write it last: whoever opens it after the error would take it for theirs.
    """
    try:
        yield
    except UserError as error:
        if path is None or not path.exists():
            raise
        raise type(error)(f"{error} What stands at {path} is of an earlier call.") from error
