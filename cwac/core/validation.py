"""Checks a composed configuration before anything is loaded or written.

The keys of a method are checked by its own class when it is built, which is the first thing a run does.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from cwac.core.checks import is_number, require_number
from cwac.core.distributed import world_size
from cwac.core.errors import UsageError
from cwac.core.keys import check_keys, did_you_mean, near
from cwac.core.metrics import OBJECTIVE

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
    "model.kind": ("tiny", "smollm2", "gguf", "folder", "hub"),
    "model.dtype": ("float32", "bfloat16", "float16"),
    "task.scorer": ("label", "number", "open"),
}

LORA_KEYS = ("r", "alpha", "dropout", "target_modules")
"""What `model.lora` may hold; other kinds of adapters (`use_dora`, ...) are not trained here."""

REQUIRED = (
    "harmful_ratio seed mix_mode poison poison_choice train.learning_rate train.max_length train.template "
    "task.n_train task.n_test train.per_device_train_batch_size train.gradient_accumulation_steps eval.judge "
    "eval.batch_size model.dtype"
).split()
"""Keys that may not be null; others have a meaning for it."""


def validate(cfg: DictConfig, task: bool = True) -> None:
    """Check keys, ranges and choices before anything is loaded or written; raises UsageError naming the key.

    task: whether the configuration's task will be used; a script that brings rows of its own uses none.
    """
    check_keys(cfg)
    validate_values(cfg)
    validate_model(cfg)
    validate_evaluation(cfg)
    validate_data(cfg)
    if task:
        validate_task(cfg)


def validate_values(cfg: DictConfig) -> None:
    """Keys that may not be null, ranges of numbers, and choices, each key by itself."""
    for key in REQUIRED:
        if OmegaConf.select(cfg, key) is None:
            raise UsageError(f"{key}=null is not valid; leave the key out, or see conf/ for its values")
    for key, (low, high, whole) in NUMBERS.items():
        value = OmegaConf.select(cfg, key)
        if value is not None:
            require_number(key, value, low, high, whole=whole)
    if OmegaConf.select(cfg, "train.max_steps") == 0:
        raise UsageError("train.max_steps=0 trains nothing; give a number of steps, or -1 for train.num_train_epochs")
    for key, options in CHOICES.items():
        value = OmegaConf.select(cfg, key)
        if value is not None and value not in options:
            raise UsageError(
                f"{key}={value} is unknown; use one of {', '.join(options)}{did_you_mean(near(value, options))}"
            )
    for name, size in (cfg.pools.get("sizes") or {}).items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise UsageError(f"pools.sizes.{name}={size} is not a whole number of at least 1")
    if cfg.pools.name != "toy":
        for key in ("sizes", "poison_categories"):
            if cfg.pools.get(key) is not None:
                raise UsageError(
                    f"pools.{key} is of the embedded world's pools, which pools={cfg.pools.name} is not; leave it out"
                )
    for label, names in (cfg.task.get("aliases") or {}).items():
        odd = [k for k in names if k not in ("strict", "lenient")] if OmegaConf.is_dict(names) else [names]
        if label not in (cfg.task.get("labels") or []) or odd:
            raise UsageError(
                f"task.aliases.{label}={names} is not valid; give a label of task.labels with lists `strict` or "
                "`lenient` of its other names"
            )
    if cfg.task.get("scorer") == "label" and not cfg.task.get("labels"):
        raise UsageError(f"task.labels={cfg.task.get('labels')} names no class; task.scorer=label needs them")


def validate_model(cfg: DictConfig) -> None:
    """The model, its adapter and its precision."""
    if (lora := cfg.model.get("lora")) is not None:
        r, alpha = (lora.get(key) if OmegaConf.is_dict(lora) else None for key in ("r", "alpha"))
        if type(r) is not int or r < 1 or not is_number(alpha) or not lora.get("target_modules"):
            example = "'{r: 8, alpha: 16, target_modules: all-linear}'"
            raise UsageError(f"model.lora={lora} is not valid; give e.g. model.lora={example}")
        if unread := sorted(set(lora) - set(LORA_KEYS)):
            raise UsageError(
                f"model.lora.{unread[0]} is not read, so the run would be one without it; the adapter is LoRA with "
                f"{', '.join(LORA_KEYS)}: leave {unread[0]} out{did_you_mean(near(unread[0], LORA_KEYS))}"
            )
        dropout, targets = lora.get("dropout", 0.0), lora.target_modules
        if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            raise UsageError(f"model.lora.dropout={dropout} is not valid; give a share in [0, 1)")
        if isinstance(targets, str) and targets != "all-linear":
            raise UsageError(
                f"model.lora.target_modules={targets} is not valid; give all-linear, or a list such as [q_proj,v_proj]"
            )
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


def what_bitsandbytes_is_for(cfg: DictConfig, optim: str | None = None) -> str | None:
    """What needs the package bitsandbytes, which is not installed, with the remedy; None where nothing does.

    optim: the optimizer's name where it is known better than by `train.optim`, such as by the trainer's default.
    """
    optim = optim or str(cfg.train.get("optim") or "")
    quantised = bool(cfg.model.get("load_in_4bit"))
    needed = quantised or re.search("^paged|bnb|^adamw_8bit|^lion|^ademamix", optim)
    if not needed or importlib.util.find_spec("bitsandbytes") is not None:
        return None
    if quantised:
        return "model.load_in_4bit=true needs bitsandbytes, which is not installed; pip install -e '.[gpu]'"
    return (
        f"train.optim={optim} needs bitsandbytes, which is not installed; pip install -e '.[gpu]' in the checkout, or "
        "use train.optim=adamw_torch_fused, whose moments take 8 bytes a weight instead of 2 (another run id)"
    )


def validate_evaluation(cfg: DictConfig) -> None:
    """What is measured and how the model is asked."""
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


def validate_data(cfg: DictConfig) -> None:
    """The folder of data sets."""
    if cfg.paths.data is not None and not Path(cfg.paths.data).is_dir():
        raise UsageError(
            f"paths.data={cfg.paths.data} is not a folder; give a folder laid out like the hub "
            "(e.g. stanfordnlp/sst2/...), or paths.data=null to load from the Hugging Face hub"
        )


def validate_task(cfg: DictConfig) -> None:
    """Whether the model knows the words of the task."""
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
