"""What a run was made with: commit, versions, machine; and the redaction of secrets from everything written."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata

SECRET = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|API_?KEY)(_|$)", re.I)
"""Environment variables whose values are written nowhere."""

PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "hydra-core", "numpy")


def redact(text: str) -> str:
    """Text without the values of the environment's secrets, and without anything that looks like a hub token."""
    for name, value in os.environ.items():
        if len(value) >= 8 and SECRET.search(name):
            text = text.replace(value, f"<{name}>")
    return re.sub(r"\bhf_[A-Za-z0-9]{16,}", "<HF_TOKEN>", text)


class Redacting(logging.Formatter):
    """A log file outlives the shell that its secrets were set in."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def installed(names: Iterable[str]) -> dict[str, str]:
    """The versions of those of the distributions that are installed."""
    found = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


@functools.cache
def git(*arguments: str) -> str | None:
    """What git prints, asked once a process: a run is made by the code that was loaded, not by a later commit."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def environment() -> dict:
    """Where and with what a run was made: git commit, versions, machine and its card, command."""
    import torch  # here: a command that only looks at runs starts faster without

    card = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    return {
        "git_commit": git("rev-parse", "HEAD"),
        "git_dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "platform": ", ".join([platform.platform(), *card]),
        "cpus": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "packages": installed(PACKAGES),
        "command": sys.argv,
    }
