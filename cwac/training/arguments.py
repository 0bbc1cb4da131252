"""The `train` group as transformers' TrainingArguments, and what can be said of a training before it starts."""

from __future__ import annotations

import importlib.util
import math
import re
from dataclasses import fields

import torch
from omegaconf import DictConfig, OmegaConf
from transformers import TrainingArguments

from cwac.core import distributed
from cwac.core.errors import UsageError, UserError
from cwac.core.run_dir import Run
from cwac.methods.base import Method

OURS = ("max_length", "template")
"""Keys of the `train` group that are not TrainingArguments'."""


def training_arguments(cfg: DictConfig, run: Run) -> TrainingArguments:
    """The `train` group as TrainingArguments; raises UserError naming a key they do not have.

    The rows of an optimizer step are those of the configuration, however many ranks share them: a cell's result does
    not depend on its layout.
    """
    train_settings = {k: v for k, v in OmegaConf.to_container(cfg.train, resolve=True).items() if k not in OURS}
    unknown = set(train_settings) - {f.name for f in fields(TrainingArguments)}
    if unknown:
        raise UsageError(
            f"train.{sorted(unknown)[0]} is not a TrainingArguments field; remove it or mend its spelling"
        )
    settings = {
        "output_dir": str(run.dir),
        "report_to": [],
        "save_strategy": "steps",
        "save_total_limit": 2,
        "disable_tqdm": True,  # the bar is ours: one a run, also in sweeps
        "logging_nan_inf_filter": False,
        "remove_unused_columns": False,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "seed": int(cfg.seed),
        "data_seed": int(cfg.seed),
        **train_settings,
        **shared_batch(train_settings, distributed.world_size()),
    }
    try:
        arguments = TrainingArguments(**settings)
        if arguments.n_gpu > 1:
            arguments._n_gpu = 1  # Trainer would run the model in threads (DataParallel), which no hook is made for
        return arguments
    except ValueError as error:
        raise UsageError(f"train: {str(error).splitlines()[0]}") from error


def shared_batch(given: dict, world_size: int) -> dict[str, int]:
    """One rank's share of a step's micro-batches, or where those do not divide, of the rows of each."""
    rows, micro = given.get("per_device_train_batch_size", 8), given.get("gradient_accumulation_steps", 1)
    split = math.gcd(micro, world_size)
    if rows % (world_size // split):
        raise UsageError(
            f"train.per_device_train_batch_size={rows} x train.gradient_accumulation_steps={micro} rows a step cannot "
            f"be shared by {world_size} processes; raise one of the two to a multiple of them"
        )
    return {
        "per_device_train_batch_size": rows * split // world_size,
        "gradient_accumulation_steps": micro // split,
    }


def check_precision(cfg: DictConfig, args: TrainingArguments, method: Method) -> None:
    """Refuse what would train wrongly or fail late, before a model is loaded; raises UserError."""
    if args.use_cpu and torch.cuda.is_available():
        raise UsageError(
            "train.use_cpu=true: the SAE, the subspace and the evaluation would take the GPU that this process sees; "
            "hide it instead with CUDA_VISIBLE_DEVICES="
        )
    edits = [h for h in ("before_step", "after_backward") if getattr(type(method), h) is not getattr(Method, h)]
    if args.fp16 and edits:
        raise UsageError(
            f"train.fp16=true multiplies gradients by a loss scale that {edits[0]} of method={method.name}, an edit "
            "of them, does not know; use train.bf16=true"
        )
    quantised = bool(cfg.model.get("load_in_4bit"))
    if quantised and method.needs_base_weights:
        raise UsageError(
            f"model.load_in_4bit=true: method={method.name} reads or edits the base's weights, which 4 bits do not "
            "hold; use model.load_in_4bit=false"
        )
    key = "model.load_in_4bit=true" if quantised else f"train.optim={args.optim.value}"
    needed = quantised or re.search("^paged|bnb|^adamw_8bit|^lion|^ademamix", args.optim.value)
    if needed and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{key} needs bitsandbytes, which is not installed; pip install 'cwac[gpu]'")


def steps_per_epoch(args: TrainingArguments, rows: int) -> int:
    """Optimizer steps that see every row once; the last may be a smaller one."""
    return math.ceil(rows / (args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size))


def total_steps(args: TrainingArguments, rows: int) -> int:
    """Optimizer steps of the whole run, as Trainer will count them."""
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch(args, rows))


def refuse_deepspeed(args: TrainingArguments, method: Method) -> None:
    """Raises UserError for DeepSpeed where the method edits gradients or weights."""
    if args.deepspeed and method.needs_step_hooks:
        raise UserError(
            f"method={method.name} edits gradients or weights around the optimizer step, but DeepSpeed steps inside "
            "backward; use DDP or FSDP (train.fsdp) instead of train.deepspeed"
        )
