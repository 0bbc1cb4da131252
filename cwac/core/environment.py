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
import warnings
from collections.abc import Iterable
from importlib import metadata

from cwac.core.paths import PACKAGE

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


CODE = ("*.py", "*.yaml", "*.yml", "*.toml", "*.j2")
"""Files that decide what a run does; notes, data and results beside them do not."""


@functools.cache
def git(*arguments: str) -> str | None:
    """What git prints in the project's folder, asked once a process.

    A run is made by the code that was loaded: not by a later commit, nor by the repository it was started from.
    """
    command = ["git", "-C", str(PACKAGE.parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> str | None:
    """The commit of the code that runs; None where no repository tracks it, as when it was installed from a wheel."""
    return git("rev-parse", "HEAD") if git("ls-files", "--", "cwac/core/environment.py") else None


def uncommitted(targets: Iterable[str] = ()) -> bool:
    """Whether the code differs from its commit: tracked files that changed, code that git does not track yet.

    targets: dotted names of classes that a configuration builds; one in a file that git ignores, or that lies outside
    the repository, is under no commit either.
    """
    if commit() is None:
        return False
    new = git("ls-files", "--others", "--exclude-standard", "--", *CODE)
    if new or git("status", "--porcelain", "--untracked-files=no"):
        return True
    files = {getattr(sys.modules.get(target.rpartition(".")[0]), "__file__", None) for target in targets}
    return any(file and not git("ls-files", "--", file) for file in files)


def environment(targets: Iterable[str] = ()) -> dict:
    """Where and with what a run was made: git commit, versions, machine and its card, command.

    targets: as for `uncommitted`.
    """
    import torch  # here: a command that only looks at runs starts faster without

    card = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    return {
        "git_commit": commit(),
        "git_dirty": uncommitted(targets),
        "python": platform.python_version(),
        "platform": ", ".join([platform.platform(), *card]),
        "cpus": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "packages": installed(PACKAGES),
        "command": sys.argv,
    }


def quieten_peft() -> None:
    """peft asks transformers 5 for a property that it renamed; the warning is theirs to mend, not the user's."""
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
