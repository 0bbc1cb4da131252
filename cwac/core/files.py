"""Files that are either old or new, never half-written, their SHA-256, and how YAML is read."""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path

import yaml

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Reads a thousand configurations in a second, where PyYAML's own takes half a minute; makes no objects."""


def sha256(path: Path) -> str:
    state = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            state.update(chunk)
    return state.hexdigest()


def write_atomic(path: Path, text: str, mode: int = 0o666) -> None:
    """Write a text file so that a reader sees the old content or the new, never a part; a full disk leaves the old.

    mode: permissions, less the user's umask.
    """
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
