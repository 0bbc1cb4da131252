"""Reaches the Hugging Face hub for a model: quickly, by commit, and with one line that says what is in the way.

Left to themselves, the libraries retry an unreachable hub for minutes and end in a page of traceback.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

from cwac.core.errors import UserError

PROBE_SECONDS = 5
"""How long to wait for the hub before the cache, and then the error."""
LOCAL = "model.kind=folder +model.path=<folder> (for several models: '+model.path=<folder>/${model.name}')"
"""How to use a copy of a model on this machine, in one run and in a sweep."""
NOT_NEEDED = ["original/*", "consolidated*", "*.bin", "*.pth", "*.pt", "*.gguf", "*.onnx", "*.msgpack", "*.h5"]
"""Second copies of the weights in other formats; the safetensors are what is read, where there are any."""


@dataclass(frozen=True)
class Resolved:
    """One commit of a hub repository."""

    hub_id: str
    commit: str
    reachable: bool
    """False where only the cache can be read."""


@functools.cache  # all cells of a sweep see one commit
def resolve(
    hub_id: str, revision: str | None, key: str, license: str | None = None, file: str = "config.json"
) -> Resolved:
    """The commit that `revision` (None: the newest) names, after one short question to the hub.

    key: the configuration key that names the model, for errors. license: what a gated model asks to be accepted.
    file: what every such repository has; an adapter has `adapter_config.json`.
    Asks for a file rather than for the repository, since a gated repository describes itself to everybody.

    Raises: UserError, one line, for a gated or missing model, an unknown revision, or a hub out of reach with nothing
    in the cache.
    """
    import huggingface_hub as hub
    from huggingface_hub import constants, errors

    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", hub_id) or hub_id.startswith("."):
        raise UserError(f"{key}={hub_id} could not be loaded: it is neither a folder nor a hub id; mend the path")
    page = f"{constants.ENDPOINT}/{hub_id}"
    try:
        if constants.HF_HUB_OFFLINE:
            raise errors.OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
        url = hub.hf_hub_url(hub_id, file, revision=revision)
        metadata = hub.get_hf_file_metadata(url, timeout=PROBE_SECONDS, token=hub.get_token())
    except errors.GatedRepoError as error:
        raise UserError(
            f"{key}={hub_id} is gated: accept its licence{f' ({license})' if license else ''} at {page}, then log in "
            "with `hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{key}={hub_id} has no revision {revision}; its commits are listed at {page}") from error
    except errors.EntryNotFoundError as error:
        raise UserError(f"{key}={hub_id} has no {file}, so it is no transformers model; see {page}") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{key}={hub_id} is not on the hub, or is private; check the id, or log in with `hf auth login`"
        ) from error
    except Exception as error:
        cached = hub.try_to_load_from_cache(hub_id, file, revision=revision)
        if isinstance(cached, str):
            return Resolved(hub_id, Path(cached).parent.name, False)
        raise UserError(
            f"{key}={hub_id} could not be reached: the hub ({constants.ENDPOINT}) does not answer "
            f"({first_line(error)}) and the cache has no copy; connect, or give a local one with "
            + (LOCAL if key == "model.hub_id" else f"{key}=<folder>")
        ) from error
    return Resolved(hub_id, metadata.commit_hash, True)


def download(model: Resolved, key: str) -> Path:
    """The folder with the commit's configuration, tokenizer and safetensors, downloaded where the cache lacks them.

    Raises: UserError where the download fails; what has arrived stays in the cache.
    """
    import huggingface_hub as hub

    try:
        for ignored in (NOT_NEEDED, [p for p in NOT_NEEDED if p != "*.bin"]):  # older models have nothing else
            folder = hub.snapshot_download(
                model.hub_id,
                revision=model.commit,
                ignore_patterns=ignored,
                local_files_only=not model.reachable,
                token=hub.get_token(),
            )
            if any(Path(folder).glob("*.safetensors")):
                break
    except Exception as error:
        raise UserError(
            f"{key}={model.hub_id} at {model.commit[:10]} could not be downloaded ({first_line(error)}); the same "
            "command again goes on where it stopped"
        ) from error
    return Path(folder)


def download_file(model: Resolved, name: str, key: str) -> Path:
    """One file of the commit, downloaded where the cache lacks it; raises UserError where that fails."""
    import huggingface_hub as hub

    try:
        return Path(
            hub.hf_hub_download(
                model.hub_id, name, revision=model.commit, local_files_only=not model.reachable, token=hub.get_token()
            )
        )
    except Exception as error:
        raise UserError(
            f"{key}={model.hub_id} at {model.commit[:10]}: {name} could not be downloaded ({first_line(error)}); the "
            "same command again goes on where it stopped"
        ) from error


def first_line(error: Exception) -> str:
    """What an exception says, in one line without the user's token: some clients quote the header they sent."""
    import huggingface_hub as hub

    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
    token = hub.get_token()
    return text.replace(token, "<HF_TOKEN>") if token else text
