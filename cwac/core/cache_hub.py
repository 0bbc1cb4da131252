"""Prepared artifacts on the Hugging Face hub: what took hours on one machine serves every other with the same model.

An artifact is found by the hash of its key (model, pools, settings), so a pulled one is used exactly where it would
have been built. Only tables and safetensors travel, never pickles; the SHA-256 of each file is checked on both ends.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from cwac.core.cache import CARD, MANIFEST, card, damage, digest, load_or_build
from cwac.core.errors import UserError
from cwac.core.hf_hub import first_line

KINDS = ("sae", "latents", "targets", "subspace")
"""What a CWAC run prepares; models and the models' answers stay at home."""
SUFFIXES = (".safetensors", ".json", ".csv", ".md")


def artifact_folders(root: Path, kinds: Sequence[str]) -> list[Path]:
    """The artifact folders `<kind>/<hash>` below `root`."""
    return sorted(p for kind in kinds for p in (root / kind).glob("*") if re.fullmatch(r"[0-9a-f]{12}", p.name))


def check(folder: Path) -> dict:
    """The manifest of a sound artifact; raises UserError for one that is damaged, misnamed or holds other files."""
    problem = damage(folder)
    if problem is None:
        manifest = json.loads((folder / MANIFEST).read_text())
        names = [Path(name) for name in manifest["files"]]
        if (manifest["kind"], digest(manifest["key"])) != (folder.parent.name, folder.name):
            problem = "its name is not the hash of its key"
        elif any(n.is_absolute() or ".." in n.parts or n.suffix not in SUFFIXES for n in names):
            problem = f"it holds files other than {', '.join(SUFFIXES)}"
    if problem:
        raise UserError(f"artifact {folder.parent.name}/{folder.name}: {problem}; build it again or take another one")
    return manifest


def push(repo: str, root: Path, kinds: Sequence[str] = KINDS, private: bool = True) -> list[str]:
    """Upload the artifacts below `root`, each with its card, and a card of the repository; returns `<kind>/<hash>`.

    The token is the one of `hf auth login` or HF_TOKEN. Raises UserError where nothing sound is there to upload, or
    the hub refuses.
    """
    import huggingface_hub as hub

    folders = artifact_folders(Path(root), kinds)
    if not folders:
        raise UserError(f"{root} holds no artifact of {', '.join(kinds)}; a run of method=cwac builds them")
    with tempfile.TemporaryDirectory() as folder:
        lines = []
        for artifact in folders:
            manifest = check(artifact)
            target = Path(folder) / artifact.parent.name / artifact.name
            copy(artifact, target, (*manifest["files"], MANIFEST))
            (target / CARD).write_text(card(target, manifest))
            lines.append(f"- [{target.relative_to(folder)}]({target.relative_to(folder)}/{CARD})")
        head = (
            "---\nlibrary_name: cwac\ntags: [cwac, safety]\n---\n# Prepared artifacts of CWAC (arXiv:2604.12384)\n\n"
        )
        pull_by = f"`python -m experiments.artifacts pull --repo {repo}` puts them into the artifact cache.\n\n"
        (Path(folder) / CARD).write_text(head + pull_by + "\n".join(lines) + "\n")
        try:
            api = hub.HfApi()
            api.create_repo(repo, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"{len(folders)} artifacts")
        except Exception as error:
            raise UserError(
                f"--repo {repo}: the hub refused the upload ({first_line(error)}); log in with "
                "`hf auth login` under an account that may write there"
            ) from error
    return [f"{a.parent.name}/{a.name}" for a in folders]


def pull(repo: str, root: Path, kinds: Sequence[str] = KINDS, revision: str | None = None) -> list[str]:
    """Download a repository's artifacts into the cache `root`, which keeps those it has; returns the new ones.

    revision: a commit pins what is taken; None is the newest. Raises UserError for a repository out of reach or
    without artifacts, and for a damaged artifact, before any is put in place.
    """
    import huggingface_hub as hub

    try:
        patterns = [f"{kind}/*" for kind in kinds]
        source = Path(hub.snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except Exception as error:
        raise UserError(
            f"--repo {repo}: could not be downloaded ({first_line(error)}); check the id, or log in with "
            "`hf auth login`"
        ) from error
    folders = artifact_folders(source, kinds)
    if not folders:
        raise UserError(f"--repo {repo} holds no artifact of {', '.join(kinds)}")
    manifests = [check(folder) for folder in folders]
    new = []
    for folder, manifest in zip(folders, manifests, strict=True):

        def take(target: Path, folder=folder, manifest=manifest) -> None:
            copy(folder, target, manifest["files"])
            new.append(f"{folder.parent.name}/{folder.name}")

        load_or_build(Path(root), manifest["kind"], manifest["key"], take)
    return new


def copy(folder: Path, target: Path, names: Iterable[str]) -> None:
    """Copy the named files of an artifact, which may lie in folders of their own."""
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, target / name)
