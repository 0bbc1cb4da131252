"""What identifies a run: the mapping that determines its weights, and the ids that contain its hash.

Imports neither torch nor transformers, so that skipping a finished cell of a sweep costs milliseconds.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cwac.core import renamed
from cwac.core.paths import PACKAGE

IDENTITY = ("model task pools harmful_ratio mix_mode poison poison_choice poison_trigger method train seed").split()
"""Keys and groups that determine a run's weights. `eval`, `logger` and `paths` do not, and an evaluation has a hash of
its own."""

NOT_IDENTITY = {
    "_target_",
    "method.fold",
    "method.activation.sae.max_repeats",
    "train.logging_steps",
    "train.save_steps",
    "train.save_total_limit",
    "train.dataloader_num_workers",
    "train.disable_tqdm",
    "task.max_new_tokens",
    "task.scorer",
    "task.n_test",
    "model.license",
    "model.n_train",  # its value stands under task.n_train
    "model.trigger_tokens",  # its value stands under method.trigger_tokens
    "model.refused_only",  # its value stands under method.activation.refused_only
    "model.safety_layers",  # resolved under the method that uses it
}
"""Keys within these groups that change only what is logged, kept or evaluated, and not what is trained."""

LAYOUT = ("train.fsdp", "train.ddp_")
"""Beginnings of the keys that set how ranks share the work, which changes a result only by rounding."""

NEUTRAL: dict[str, Any] = {
    "model.lora": None,
    "model.lora.dropout": 0.0,
    "model.load_in_4bit": False,
    "train.max_steps": -1,
    "method.weight.unconstrained": [],
    "poison": "harmful",
    "poison_choice": "random",
    "poison_trigger": None,
    "pools.poison_categories": None,
    "eval.prefill": None,
    "eval.engine": "hf",
    "method.weight.penalty_weight": None,
    "method.weight.refresh_steps": None,
    "method.weight.project_every": 1,
    "method.weight.prefill": None,
    "method.weight.anchor_sources": [],
    "method.activation.space": "sae",
    "method.activation.sae.pretrained": None,
    "method.activation.refused_only": False,
    "method.activation.sae.schedule": "ours",
    "method.activation.sae.corpus": None,
    "method.activation.sae.corpus_text": "text",
    "method.activation.sae.corpus_config": None,
    "method.retain_states": "blocks",
    "method.first_step": 0,
    "method.empty_instructions": 0.0,
    "method.unit": "token",
    "method.lora_scaling": True,
    "method.scaling": None,
    "method.task_inputs": "aligned",
    "method.answers_only": False,
}
"""A key at its neutral value is left out of the identity (of a run, or of an evaluation), so that a new option orphans
no finished run."""

UNREAD_WITHOUT = {
    "method.lora_scaling": lambda flat: flat.get("model.lora") is not None or "model.lora.r" in flat,
    "method.activation.refused_only": lambda flat: flat.get("method.activation.space", "sae") == "sae",
}
"""Keys that determine a run's weights only under a condition on the others, which is asked of the flat mapping;
elsewhere they are left out of the identity."""

TINY_ORIGIN = (
    "34a0e25352e05fe5d428429c6fd636fbace566a0cce5391ceaaf81b6d44ce6bf",
    "9ded84ba8ff6b47a6d635daf1ba63f768e859943023d295015eb67a6f4c3a3f6",
    "f3f9cbeaf22d1db6349ea8e6b8202212a9f93bcf235818aab2d252ebb81ca8bf",
)
"""The version of the embedded world and of its shipped weights, one for each base seed.

Change an entry only when the world's sentences or the weights change: it names every run of the embedded model, and
all frozen results with it. `tests/test_layout.py` fails where sentences or weights change and this does not.
"""


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`; a list is kept as one value."""
    if isinstance(node, dict):
        flat: dict[str, Any] = {}
        for key, value in node.items():
            flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
        return flat
    return {prefix: node}


def canonical(value: Any) -> Any:
    """The value with all numbers as floats, also within lists, so that 0 and 0.0 give the same hash."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, list):
        return [canonical(v) for v in value]
    return value


def identity(cfg: DictConfig) -> dict[str, Any]:
    """The flat, canonical mapping that determines the run's weights, under the keys of `conf/`."""
    container = OmegaConf.to_container(cfg, resolve=True)
    flat = flatten({key: container[key] for key in IDENTITY if key in container})
    flat["origin"] = origin(container["model"])
    if local_folder(container["model"]) is not None:  # a local model is identified by content
        for key in ("model.path", "model.hub_id", "model.revision", "model.kind"):
            flat.pop(key, None)
    return {
        key: canonical(CONTENT.get(key, lambda name: name)(value))
        for key, value in sorted(flat.items())
        if key not in NOT_IDENTITY
        and UNREAD_WITHOUT.get(key, bool)(flat)
        # `model.sae` is resolved under the method that uses it, `model.shape` only serves estimates of cost,
        # `task.aliases` only scoring, and LAYOUT only says how work is shared
        and not key.startswith(("model.sae.", "model.shape.", "task.aliases.", *LAYOUT))
        and not key.endswith("._target_")
        and not (key in NEUTRAL and canonical(value) == canonical(NEUTRAL[key]))
    }


MODEL_FILES = (
    *("config.json", "generation_config.json", "adapter_config.json", "tokenizer*", "special_tokens_map.json"),
    *("added_tokens.json", "vocab*", "merges.txt", "*.model", "*.tiktoken", "*.jinja", "*/*.jinja"),
)
"""Files that decide, together with the weights, what a saved model reads and answers: architecture, tokenizer, chat
template, generation settings. Other files, such as notes, pictures and optimizer states, are ignored."""

UNSAID = ("_name_or_path", "transformers_version")
"""Entries of a model's JSON files that depend on who saved it and where, and not on the model itself."""


def content(*files: Path) -> str:
    """A hash of files' bytes, in the order given."""
    return _content(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files))


@functools.cache
def _content(files: tuple[tuple[Path, int, int], ...]) -> str:
    """As `content`, but files are read again only after their size or modification time has changed."""
    state = hashlib.sha256()
    for path, _, _ in files:
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                state.update(chunk)
    return state.hexdigest()


def folder_content(folder: Path) -> str:
    """A hash of a saved model's content: its weights, and the names and contents of its `MODEL_FILES`.

    It depends neither on the folder's path nor on the entries `UNSAID` of JSON files.
    """
    state = hashlib.sha256(content(*sorted(folder.glob("*.safetensors"))).encode())
    for path in sorted({p for pattern in MODEL_FILES for p in folder.glob(pattern) if p.is_file()}):
        text = path.read_bytes()
        if path.suffix == ".json" and b"_" in text[: 1 << 16]:
            try:
                parsed = json.loads(text)
            except ValueError:
                parsed = None
            if isinstance(parsed, dict) and set(UNSAID) & parsed.keys():
                kept = {k: v for k, v in parsed.items() if k not in UNSAID}
                text = json.dumps(kept, sort_keys=True).encode()
        state.update(f"{path.relative_to(folder)}\0{len(text)}\0".encode() + text)
    return state.hexdigest()


def local_folder(model: Mapping) -> Path | None:
    """The folder of a model on this machine: `path` for kind `folder`, or a `hub_id` that is a folder; else None."""
    name = model.get("path") if model["kind"] == "folder" else model.get("hub_id") if model["kind"] == "hub" else None
    return Path(name).expanduser() if name and Path(name).expanduser().is_dir() else None


def origin(model: dict) -> str:
    """A text that identifies the starting weights; it is part of every run's id and of every artifact's key.

    model: the `model` group. A local model is identified by a hash of its content, a hub model by id and revision.
    """
    if model["kind"] == "tiny":
        return TINY_ORIGIN[int(model["base_seed"]) % len(TINY_ORIGIN)]
    if model["kind"] == "smollm2":
        adapter = content(PACKAGE / "assets" / "smollm2_align" / "adapter_model.safetensors")
        return f"{model['wheel_sha256']}+{adapter}"
    if model["kind"] == "gguf":  # from a hub or from wheels: the same bytes
        return model["file_sha256"]
    if (folder := local_folder(model)) is not None:
        return folder_content(folder)
    return f"{model.get('hub_id')}@{model.get('revision')}"


def by_content(name: Any) -> Any:
    """The content hash of a model if `name` is the path of its folder; any other value, such as a hub id, as it is."""
    folder = Path(name).expanduser() if isinstance(name, str) and name else None
    return folder_content(folder) if folder is not None and folder.is_dir() else name


def autoencoder_content(folder: Path) -> str:
    """A hash of the autoencoders in a folder and below it: the folder's name, and names and bytes of their files."""
    patterns = ("cfg.json", "activation_scaler.json", "*.safetensors")
    files = sorted(path for pattern in patterns for path in folder.rglob(pattern))
    named = [f"{path.relative_to(folder).as_posix()}\0{content(path)}" for path in files]
    return hashlib.sha256("\n".join([folder.name, *named]).encode()).hexdigest()


def pretrained_by_content(spec: Any) -> Any:
    """`model.sae.pretrained` with the content hash in place of each folder; a hub id or null as it is."""
    if isinstance(spec, list):
        return [pretrained_by_content(one) for one in spec]
    folder = Path(spec).expanduser() if isinstance(spec, str) and spec else None
    return autoencoder_content(folder) if folder is not None and folder.is_dir() else spec


def text_content(name: str) -> str:
    """What identifies a corpus of text: the content of a file or of the files below a folder; a hub id as it is."""
    path = Path(name).expanduser()
    if path.is_dir():
        return content(*sorted(p for p in path.rglob("*") if p.is_file()))
    return content(path) if path.is_file() else name


CONTENT = {
    "model.base": by_content,
    "method.activation.sae.pretrained": pretrained_by_content,
    "method.activation.sae.corpus": lambda name: None if name is None else text_content(name),
}
"""Keys whose value may be a path on this machine, which then counts by its content."""


def short_hash(mapping: dict, length: int = 8) -> str:
    return hashlib.sha256(json.dumps(mapping, sort_keys=True).encode()).hexdigest()[:length]


def run_id(cfg: DictConfig) -> str:
    """The id `model-task-pX-method-sN-hash8`, which depends only on what determines the weights."""
    mapping = renamed.hashed(identity(cfg), cfg.method.get("_target_"))
    return (
        f"{cfg.model.name}-{cfg.task.name}-p{cfg.harmful_ratio:g}-{cfg.method.name}-s{cfg.seed}-{short_hash(mapping)}"
    )


def eval_id(cfg: DictConfig) -> str:
    """A hash of six hex digits over everything that determines an evaluation, apart from the weights."""
    container = OmegaConf.to_container(cfg.eval, resolve=True)
    scoring = {
        key: canonical(by_content(value) if key in ("judge.hub_id", "judge.adapter") else value)
        for key, value in flatten(container).items()
        if key not in ("batch_size", "progress", "at", "judge.batch_size", "judge.artifacts", "vllm.python")
        and not (key.startswith("vllm.") and cfg.eval.engine != "vllm")
        and not (f"eval.{key}" in NEUTRAL and value == NEUTRAL[f"eval.{key}"])
    }
    task = {key: canonical(cfg.task.get(key)) for key in ("max_new_tokens", "scorer", "n_test")}
    if cfg.task.get("aliases"):
        task["aliases"] = OmegaConf.to_container(cfg.task.aliases, resolve=True)
    return short_hash({"eval": scoring, "task": task}, 6)
