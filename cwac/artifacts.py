"""Things built once and shared by many runs: aligned models, SAE, subspace, refusals.

An artifact's folder is named by the hash of its key, written to a temporary folder and moved into place, and
guarded by a file lock that the operating system releases when its holder dies; so two sweeps on one file
system share artifacts without racing, and a crash leaves nothing that looks finished.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

log = logging.getLogger(__name__)
MANIFEST = "artifact.json"


def digest(key: dict) -> str:
    """A short, stable name for a JSON-serialisable key."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]


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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def load_or_build(root: Path, kind: str, key: dict, build: Callable[[Path], object]) -> Path:
    """The folder of the artifact `kind` with `key`; `build(folder)` fills it if it is missing or damaged.

    Files are checked against the SHA-256 in the manifest on every load. A damaged artifact is kept beside the
    new one under the name `<hash>.damaged`, until the next one. Errors of `build` pass through and leave no artifact.
    """
    folder = Path(root) / kind / digest(key)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.exists():
            problem = damage(folder)
            if problem is None:
                return folder
            log.warning("artifact %s is damaged (%s); building it again", folder, problem)
            aside = folder.with_suffix(".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
        for unfinished in folder.parent.glob(f".{folder.name}-*"):  # of a builder that died; we hold its lock
            shutil.rmtree(unfinished)
        log.info("building %s %s", kind, folder.name)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            build(temporary)
            files = {
                str(p.relative_to(temporary)): {"sha256": sha256(p), "bytes": p.stat().st_size}
                for p in sorted(temporary.rglob("*"))
                if p.is_file()
            }
            write_atomic(temporary / MANIFEST, json.dumps({"kind": kind, "key": key, "files": files}, indent=1))
            temporary.chmod(0o755)
            temporary.rename(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return folder


def damage(folder: Path) -> str | None:
    """What is wrong with an artifact's files; None if they are as they were written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or unreadable"
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["bytes"] or sha256(path) != entry["sha256"]:
            return f"{name} is missing or changed"
    return None
