"""Artifacts, which are built once and shared by many runs: aligned models, autoencoders, subspaces, refusals.

An artifact's folder is named by the hash of its key. It is filled under a temporary name and then moved into place, so
that a crash leaves nothing that looks finished. A file lock guards it, which the operating system releases when its
holder dies. Two sweeps on one file system can thus share artifacts without a race.

Between machines the lock is flock(2) on the shared file system. NFS (version 4, or 3 with its lock daemon), GPFS, and
Lustre mounted with `flock` apply it to all machines. Where each machine has locks of its own (Lustre's `localflock`),
two machines may build the same artifact, each in its own temporary folder; the first to finish is used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from cwac.core.files import sha256, write_atomic
from cwac.core.identity import content

log = logging.getLogger(__name__)
MANIFEST = "artifact.json"

CARD = "README.md"
TOOK = ".seconds"
"""File beside the artifacts of a kind: how long the last of them took to build, for the next one's announcement."""
LONGEST_REPORT = 1 << 16
"""In bytes. A longer JSON file of an artifact, such as a vocabulary, is not shown on its card."""


WHAT = {
    "sae": "Sparse autoencoder over several layers' residuals (Eq. 9; RouteSAE, arXiv:2503.08200)",
    "sae-quality": "How well a pretrained sparse autoencoder reads the aligned model's residuals",
    "latents": "Safety-critical latents of the autoencoder, ranked (section 4.1)",
    "targets": "The aligned model's features on harmful prompts, which L_safety preserves (Eq. 11)",
    "subspace": "Protected directions V of the anchors' activations (section 4.2)",
    "tiny": "The embedded model, aligned",
    "answers": "The aligned model's own answers to harmful prompts, which tell what it refuses",
    "losses": "The aligned model's mean loss on rows that runs measure before training",
    "nullspace": "Directions that V leaves free, for null-space adapters",
    "judge-encoder": "all-MiniLM-L6-v2, the sentence encoder of the semantic judge (arXiv:1908.10084)",
}
"""Kind of artifact -> its description, on its card and when it is built; sections are of CWAC (arXiv:2604.12384)."""


def digest(key: dict) -> str:
    """A short, stable name for a JSON-serialisable key."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]


def load_or_build(root: Path, kind: str, key: dict, build: Callable[[Path], object]) -> Path:
    """The folder of the artifact of this kind and key; if it is missing or damaged, `build(folder)` fills a new one.

    Files are checked against the SHA-256 in the manifest on every load; a process reads a file again only once its
    size or modification time has changed. A damaged artifact is kept beside the new one
    as `<hash>.damaged`, where the next damaged one replaces it. Errors of `build` are passed on and leave no artifact.
    """
    folder = Path(root) / kind / digest(key)
    folder.parent.mkdir(parents=True, exist_ok=True)
    problem = None
    with FileLock(f"{folder}.lock"):
        if folder.exists():
            problem = damage(folder)
            if problem is None:
                return folder
            log.warning("artifact %s is damaged (%s); building it again", folder, problem)
            aside = folder.with_suffix(".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
        prefix = f".{folder.name}-{socket.gethostname()}-"
        for unfinished in folder.parent.glob(f"{prefix}*"):  # its builder died: we hold the lock
            shutil.rmtree(unfinished)
        why = "none is there of this model, data and settings" if problem is None else "in place of the damaged one"
        log.info("building %s %s: %s; %s%s", kind, folder.name, WHAT.get(kind, kind), why, last_time(folder.parent))
        began = time.monotonic()
        temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
        try:
            build(temporary)
            files = {
                str(p.relative_to(temporary)): {"sha256": sha256(p), "bytes": p.stat().st_size}
                for p in sorted(temporary.rglob("*"))
                if p.is_file()
            }
            manifest = {"kind": kind, "key": key, "files": files}
            write_atomic(temporary / MANIFEST, json.dumps(manifest, indent=1))
            (temporary / CARD).write_text(card(temporary, manifest))
            temporary.chmod(0o755)
            if folder.exists():  # built meanwhile by a machine outside our lock
                shutil.rmtree(temporary)
            else:
                temporary.rename(folder)
            took = time.monotonic() - began
            write_atomic(folder.parent / TOOK, f"{took:.1f}\n")
            log.info("built %s %s in %s", kind, folder.name, duration(took))
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return folder


def last_time(folder: Path) -> str:
    """`; the last one here took 3 min`, of the artifacts of this kind; empty where none was built yet."""
    try:
        return f"; the last one here took {duration(float((folder / TOOK).read_text()))}"
    except (OSError, ValueError):
        return ""


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`: as precise as a wait needs."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def card(folder: Path, manifest: dict) -> str:
    """An artifact's card in Markdown: what it is, its key (model and data), its quality, its files and licences."""
    kind, model = manifest["kind"], manifest["key"].get("model")
    found = [p for p in sorted(folder.glob("*.json")) if p.name != MANIFEST and p.stat().st_size <= LONGEST_REPORT]
    reports = {p.name: json.loads(p.read_text()) for p in found}
    blocks = {"Made of": manifest["key"], **{f"Quality: {name}": report for name, report in reports.items()}}
    hub_id = model.get("hub_id") if isinstance(model, dict) else None
    head = [
        "---",
        "library_name: cwac",
        f"tags: [cwac, {kind}]",
        *([f"base_model: {hub_id}"] if hub_id else []),
        "---",
    ]
    return "\n".join(
        [
            *head,
            f"# {WHAT.get(kind, kind)}\n",
            "`model` names the weights, `pools` is the hash of the prompts it was built on, the rest are settings.",
            *(f"\n## {title}\n```json\n{json.dumps(content, indent=1)}\n```" for title, content in blocks.items()),
            "\n## Files\n| file | bytes | SHA-256 |\n|---|---|---|",
            *(f"| {name} | {entry['bytes']} | {entry['sha256']} |" for name, entry in manifest["files"].items()),
            "\n## Licence\nDerived from the model's weights and its activations on the prompt sets: the licences",
            "of both apply to it (conf/pools names the sets). It is no safety certificate.\n",
        ]
    )


def damage(folder: Path) -> str | None:
    """Describes the first fault in an artifact's files; None if they are as they were written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or unreadable"
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["bytes"] or content(path) != entry["sha256"]:
            return f"{name} is missing or changed"
    return None
