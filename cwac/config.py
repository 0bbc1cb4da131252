"""The one place that knows what a configuration means: identity, validation, presets.

Imports neither torch nor transformers, so that skipping a finished cell of a sweep costs milliseconds.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cwac.ranks import world_size

PACKAGE = Path(__file__).resolve().parent
CONF = next((p for p in (PACKAGE / "conf", PACKAGE.parent / "conf") if p.is_dir()), PACKAGE.parent / "conf")
"""Every setting: inside the package where a wheel installed it, beside it in a checkout."""


class UserError(Exception):
    """Something the user can mend; its message names the key and the remedy and is printed without a traceback."""


class UsageError(UserError):
    """A configuration that can never run; exit code 2, where other user errors give 1."""


IDENTITY = ("model task pools harmful_ratio mix_mode poison poison_choice poison_trigger method train seed").split()
"""What determines a run's weights. `eval`, `logger`, `paths` do not; evaluations carry a hash of their own."""

NOT_IDENTITY = {
    "_target_",
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
    "model.safety_layers",  # resolved under the method that uses it
}
"""Keys of those groups that change what is logged, kept or evaluated, not what is trained."""

LAYOUT = ("train.fsdp", "train.ddp_")
"""How ranks share the work, which changes no more than rounding."""

NEUTRAL: dict[str, Any] = {
    "model.lora": None,
    "model.load_in_4bit": False,
    "train.max_steps": -1,
    "method.weight.free": [],
    "poison": "harmful",
    "poison_choice": "random",
    "poison_trigger": None,
    "pools.poison_categories": None,
    "eval.prefill": None,
    "eval.engine": "hf",
    "method.weight.soft": None,
    "method.weight.refresh_steps": None,
    "method.weight.every": 1,
    "method.weight.prefill": None,
    "method.weight.anchor_sources": [],
    "method.activation.space": "sae",
}
"""A key at its neutral value is left out of the identity (of a run, or of an evaluation), so that a new option orphans
no finished run."""

VARIATION = "+"
"""Stands in the name of a set of prompts that is another one asked differently (`toy_harmful+prefill`): reported by
itself, and part of no headline."""


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`; lists stay values."""
    if isinstance(node, dict):
        flat: dict[str, Any] = {}
        for key, value in node.items():
            flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
        return flat
    return {prefix: node}


def canonical(value: Any) -> Any:
    """Numbers as floats (0 and 0.0 are one value), lists element by element."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, list):
        return [canonical(v) for v in value]
    return value


def identity(cfg: DictConfig) -> dict[str, Any]:
    """The flat, canonical mapping whose hash names the run."""
    container = OmegaConf.to_container(cfg, resolve=True)
    flat = flatten({key: container[key] for key in IDENTITY if key in container})
    flat["origin"] = origin(container["model"])
    return {
        key: canonical(value)
        for key, value in sorted(flat.items())
        if key not in NOT_IDENTITY
        # resolved under the method that uses them; for estimates of cost; for scoring; how work is shared
        and not key.startswith(("model.sae.", "model.shape.", "task.aliases.", *LAYOUT))
        and not key.endswith("._target_")
        and not (key in NEUTRAL and canonical(value) == canonical(NEUTRAL[key]))
    }


@functools.cache
def content(*files: Path) -> str:
    """A hash of files' bytes, in the order given."""
    state = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                state.update(chunk)
    return state.hexdigest()


def origin(model: dict) -> str:
    """What the starting weights are: a run, and every artifact derived from them, must change when they do.

    model: the `model` group. Local weights are hashed by content; a hub model is named by id and revision.
    """
    if model["kind"] == "tiny":
        shipped = PACKAGE / "tiny" / "weights" / f"seed{int(model['base_seed']) % 3}-aligned.safetensors"
        return content(PACKAGE / "tiny" / "world.py", shipped)
    if model["kind"] == "smollm2":
        adapter = content(PACKAGE / "assets" / "smollm2_align" / "adapter_model.safetensors")
        return f"{model['wheel_sha256']}+{adapter}"
    if model["kind"] == "folder":
        return content(*sorted(Path(model["path"]).glob("*.safetensors")))
    return f"{model.get('hub_id')}@{model.get('revision')}"


def short_hash(mapping: dict, length: int = 8) -> str:
    return hashlib.sha256(json.dumps(mapping, sort_keys=True).encode()).hexdigest()[:length]


def run_id(cfg: DictConfig) -> str:
    """`model-task-pX-method-sN-hash8`, a function of what determines the weights."""
    hashed = short_hash(identity(cfg))
    return f"{cfg.model.name}-{cfg.task.name}-p{cfg.harmful_ratio:g}-{cfg.method.name}-s{cfg.seed}-{hashed}"


def eval_id(cfg: DictConfig) -> str:
    """Six hex digits of what determines an evaluation of given weights."""
    container = OmegaConf.to_container(cfg.eval, resolve=True)
    scoring = {
        key: canonical(value)
        for key, value in flatten(container).items()
        if key not in ("batch_size", "progress", "at", "judge.batch_size", "vllm.python")
        and not (key.startswith("vllm.") and cfg.eval.engine != "vllm")
        and not (f"eval.{key}" in NEUTRAL and value == NEUTRAL[f"eval.{key}"])
    }
    task = {key: canonical(cfg.task.get(key)) for key in ("max_new_tokens", "scorer", "n_test")}
    if cfg.task.get("aliases"):
        task["aliases"] = OmegaConf.to_container(cfg.task.aliases, resolve=True)
    return short_hash({"eval": scoring, "task": task}, 6)


OBJECTIVE = ("FA", "HS", "refusal", "other", "OR")
"""Metrics, in percent, that `objective` may weigh."""


def objective(weights: Mapping[str, float], rows: Iterable[Mapping]) -> float | None:
    """What a sweeper minimises: the sum of weight x mean over sets; percentage points.

    rows: metric rows of one evaluation; those of a `VARIATION` do not count. None where a metric
    that has a weight was not measured.
    """
    rows = [r for r in rows if VARIATION not in r.get("set", "")]
    total = 0.0
    for metric, weight in weights.items():
        values = [r["value"] for r in rows if r["metric"] == metric]
        if not values:
            return None
        total += weight * sum(values) / len(values)
    return total


# key: (lowest, highest, whole number?); None means no bound
NUMBERS: dict[str, tuple[float | None, float | None, bool]] = {
    "harmful_ratio": (0, 1, False),
    "seed": (0, None, True),
    "train.learning_rate": (0, None, False),
    "train.num_train_epochs": (0, None, False),
    "train.max_steps": (-1, None, True),
    "train.per_device_train_batch_size": (1, None, True),
    "train.gradient_accumulation_steps": (1, None, True),
    "train.weight_decay": (0, None, False),
    "train.max_grad_norm": (0, None, False),
    "train.warmup_steps": (0, None, False),
    "train.save_steps": (1, None, True),
    "train.logging_steps": (1, None, True),
    "train.max_length": (8, None, True),
    "task.n_train": (1, None, True),
    "task.n_test": (1, None, True),
    "task.n_held_out": (1, None, True),
    "task.n_validation": (0, None, True),
    "task.max_new_tokens": (1, None, True),
    "eval.batch_size": (1, None, True),
    "eval.n_task": (1, None, True),
    "eval.n_harmful": (1, None, True),
    "eval.n_benign": (1, None, True),
    "eval.n_drift": (1, None, True),
    "method.weight.n_anchors": (1, None, True),
    "method.weight.refresh_steps": (1, None, True),
    "method.weight.every": (1, None, True),
    "method.rho": (0, None, False),
    "method.align_steps": (0, None, True),
    "method.finetune_steps": (0, None, True),
    "method.guide_data_num": (0, None, True),
    "method.prox_after": (0, 1, False),
    "method.min_cycles": (1, None, True),
    "method.num_safety": (1, None, True),
    "method.safety_per_harmful": (0, None, False),
    "method.trigger_tokens": (1, None, True),
    "method.ratio": (0, 1, False),
    "method.lam": (0, None, False),
    "method.n_prompts": (1, None, True),
    "method.response_tokens": (1, None, True),
    "method.budget": (1, None, True),
    "threads": (1, None, True),
    "model.base_seed": (0, None, True),
    "eval.max_new_tokens": (1, None, True),
}
CHOICES = {
    "train.template": ("chat", "alpaca"),
    "mix_mode": ("replace", "additive"),
    "poison": ("harmful", "identity_shift", "style"),
    "poison_choice": ("random", "outside_anchors"),
    "eval.split": ("test", "validation"),
    "eval.engine": ("hf", "vllm"),
    "model.kind": ("tiny", "smollm2", "folder", "hub"),
    "model.dtype": ("float32", "bfloat16", "float16"),
    "task.scorer": ("label", "number", "open"),
}


REQUIRED = (
    "harmful_ratio seed mix_mode poison poison_choice train.learning_rate train.max_length train.template "
    "task.n_train task.n_test train.per_device_train_batch_size train.gradient_accumulation_steps eval.judge "
    "eval.batch_size model.dtype"
).split()
"""Keys that may not be null; others have a meaning for it."""


def validate(cfg: DictConfig) -> None:
    """Check ranges and choices before anything is loaded or written; raises UsageError naming the key."""
    for key in REQUIRED:
        if OmegaConf.select(cfg, key) is None:
            raise UsageError(f"{key}=null is not valid; leave the key out, or see conf/ for its values")
    for key, (low, high, whole) in NUMBERS.items():
        value = OmegaConf.select(cfg, key)
        if value is None:
            continue
        kind = "a whole number" if whole else "a number"
        bounds = " and ".join(
            part
            for part in (
                f"at least {low:g}" if low is not None else "",
                f"at most {high:g}" if high is not None else "",
            )
            if part
        )
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UsageError(f"{key}={value} is not {kind}; give {kind} {bounds}")
        if whole and value != int(value):
            raise UsageError(f"{key}={value} is not {kind}; give {kind} {bounds}")
        if (low is not None and value < low) or (high is not None and value > high):
            raise UsageError(f"{key}={value} is out of range; give {kind} {bounds}")
    for key, options in CHOICES.items():
        value = OmegaConf.select(cfg, key)
        if value is not None and value not in options:
            raise UsageError(f"{key}={value} is unknown; use one of {', '.join(options)}")
    for name, size in (cfg.pools.get("sizes") or {}).items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise UsageError(f"pools.sizes.{name}={size} is not a whole number of at least 1")
    if cfg.task.get("scorer") == "label" and not cfg.task.get("labels"):
        raise UsageError(f"task.labels={cfg.task.get('labels')} names no class; task.scorer=label needs them")
    if (lora := cfg.model.get("lora")) is not None:
        r, alpha = (lora.get(key) if OmegaConf.is_dict(lora) else None for key in ("r", "alpha"))
        if not isinstance(r, int) or r < 1 or not isinstance(alpha, int | float) or not lora.get("target_modules"):
            example = "'{r: 8, alpha: 16, target_modules: all-linear}'"
            raise UsageError(f"model.lora={lora} is not valid; give e.g. model.lora={example}")
    if cfg.model.kind == "folder" and not (cfg.model.get("path") and Path(cfg.model.path).is_dir()):
        raise UsageError(
            f"model.path={cfg.model.get('path')} is not a folder; give +model.path=<a saved model's folder>"
        )
    if cfg.train.get("fsdp") and world_size() == 1:
        raise UsageError(
            f"train.fsdp={cfg.train.fsdp} shards a model over several processes; start them with torchrun "
            "--nproc_per_node=<GPUs> train.py ..., or leave parallel=fsdp2 out"
        )
    lora = OmegaConf.select(cfg, "model.lora")
    if OmegaConf.select(cfg, "method.weight") is not None and cfg.model.dtype != "float32" and not lora:
        raise UsageError(
            f"model.dtype={cfg.model.dtype} rounds a projected update away; method={cfg.method.name} needs fp32 "
            "masters: use model.dtype=float32 with train.bf16=true, or train an adapter, which is fp32 (model.lora)"
        )
    if OmegaConf.select(cfg, "model.load_in_4bit") and not lora:
        raise UsageError(
            "model.load_in_4bit=true holds weights that cannot be trained; train an adapter on them, e.g. "
            "model.lora='{r: 8, alpha: 16, target_modules: all-linear}' (QLoRA), or use model.load_in_4bit=false"
        )
    for metric, weight in cfg.objective.items():
        if metric not in OBJECTIVE or isinstance(weight, bool) or not isinstance(weight, int | float):
            raise UsageError(
                f"objective.{metric}={weight} is not valid; give weights of {', '.join(OBJECTIVE)}, "
                "e.g. objective='{HS: 1, FA: -1}'"
            )
    prefill = cfg.eval.get("prefill")
    if prefill is not None and not (isinstance(prefill, str) and prefill.strip()):
        raise UsageError(f"eval.prefill={prefill} is no text; give an opening such as 'Sure, here is', or null")
    trigger = cfg.get("poison_trigger")
    if trigger is not None and not (isinstance(trigger, str) and trigger.strip()):
        raise UsageError(f"poison_trigger={trigger} is no text; give words, optimised, gradient, or null")
    epochs = cfg.eval.at if OmegaConf.is_list(cfg.eval.at) else [None]
    if not all(isinstance(e, int | float) and not isinstance(e, bool) and e >= 0 for e in epochs):
        raise UsageError(f"eval.at={cfg.eval.at} is not a list of epochs; give one such as eval.at=[0,1]")
    if cfg.paths.data is not None and not Path(cfg.paths.data).is_dir():
        raise UsageError(
            f"paths.data={cfg.paths.data} is not a folder; give a folder laid out like the hub "
            "(e.g. stanfordnlp/sst2/...), or paths.data=null to load from the Hugging Face hub"
        )
    if cfg.task.kind == "toy" and cfg.model.kind not in ("tiny", "folder"):
        raise UsageError(
            f"task={cfg.task.name} is written in the embedded world's words, which model={cfg.model.name} was not "
            "trained on; use model=tiny, or a task such as sst2"
        )
    if cfg.model.kind == "tiny" and cfg.task.kind != "toy":
        raise UsageError(
            f"model=tiny knows only the embedded world's words; task={cfg.task.name} needs a pretrained model such as "
            "model=smollm2, or use task=toy_sentiment, toy_topic or toy_math"
        )


def command(main: Callable[..., int]) -> Callable[..., int]:
    """The `main(argv)` of a command: a UserError is one line on stderr and exit status 2."""

    @functools.wraps(main)
    def run(*arguments, **settings) -> int:
        try:
            return main(*arguments, **settings)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    return run


def instantiate(node: DictConfig) -> Any:
    """Hydra's instantiate; an invalid value surfaces as the UserError its dataclass raised."""
    import hydra
    from hydra.errors import InstantiationException

    try:
        return hydra.utils.instantiate(node, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from error
        if isinstance(cause, TypeError):  # a key the class does not have
            raise UsageError(f"{node.get('name', '')}: {cause}; see conf/README.md for the keys") from error
        if isinstance(cause, ImportError):
            raise UsageError(f"{node.get('_target_')} is no class that can be loaded; mend the _target_") from error
        raise


def compose(overrides: list[str] | None = None) -> DictConfig:
    """One composed cell, as `python train.py <overrides>` would see it."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    with initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra_compose("config", overrides=overrides or [])


def grid(experiment: str | None, overrides: list[str] | None = None) -> list[list[str]]:
    """The overrides of every cell of a preset, in the order Hydra walks them; those of the command line win.

    A sweep override (`seed=0,1`) replaces the preset's axis of the same key, as it does under `-m`. A search is a grid
    like any other; Optuna walks it in another order. experiment: None where the overrides alone say what to sweep.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    given = [*([f"experiment={experiment}"] if experiment else []), *(overrides or [])]
    parser = OverridesParser.create()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        own = [o for o in given if not parser.parse_override(o).is_sweep_override()]
        base = hydra_compose("config", overrides=own, return_hydra_config=True)
        params = OmegaConf.to_container(base.hydra.sweeper.params or OmegaConf.create({}), resolve=True)
    axes = {parser.parse_override(o).key_or_group: o for o in (f"{k}={v}" for k, v in params.items())}
    axes.update({parser.parse_override(o).key_or_group: o for o in given})
    return [list(cell) for cell in BasicSweeper.split_arguments(parser.parse_overrides(list(axes.values())), None)[0]]


def expand(experiment: str | None, overrides: list[str] | None = None) -> list[DictConfig]:
    """Every cell of a preset's grid, composed; see `grid`."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    cells = grid(experiment, overrides)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return [hydra_compose("config", overrides=cell) for cell in cells]
