"""The `train` group as transformers' TrainingArguments, and what can be said of a training before it starts."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import fields

import torch
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from transformers import TrainingArguments

from cwac.core import distributed
from cwac.core.config import compose
from cwac.core.errors import UsageError, UserError
from cwac.core.keys import did_you_mean, near
from cwac.core.run_dir import Run
from cwac.core.validation import what_bitsandbytes_is_for
from cwac.methods.base import Method

log = logging.getLogger(__name__)
PLAIN_RATE = 1e-4
"""Learning rate at which `hf_trainer` and the example train unless they are given another."""

OURS = ("max_length", "template")
"""Keys of the `train` group that are not TrainingArguments'."""


def plain_rate(model: str) -> float | None:
    """The learning rate of plain fine-tuning in the budget of an option of conf/model; None for any other model."""
    try:
        return float(compose([f"model={model}"]).train.learning_rate)
    except (HydraException, OmegaConfBaseException, UserError):  # an option of the user's own, elsewhere
        return None


def warn_of_plain_rate(method: Method, rate: float, plain: float | None) -> None:
    """A warning where a method that wants a rate of its own is trained at that of plain fine-tuning, or below.

    rate: the learning rate. plain: that of plain fine-tuning; None where it is not known.
    """
    if method.wants_own_rate and plain is not None and rate <= plain:
        log.warning(
            "method=%s trains at learning_rate=%g, and by default plain fine-tuning starts at %g: an adapter that "
            "starts from zero may learn little at such a rate; if FA stays low, give it a rate of its own, up to ten "
            "times that (docs/nullspace.md has those that were searched)",
            *(method.name, rate, plain),
        )


def training_arguments(cfg: DictConfig, run: Run) -> TrainingArguments:
    """The `train` group as TrainingArguments; raises UserError naming a key they do not have.

    The rows of an optimizer step are those of the configuration, however many ranks share them: a cell's result does
    not depend on its layout.
    """
    train_settings = {k: v for k, v in OmegaConf.to_container(cfg.train, resolve=True).items() if k not in OURS}
    known = {f.name: f for f in fields(TrainingArguments) if f.init}
    if unknown := sorted(set(train_settings) - known.keys()):
        close = did_you_mean(f"train.{name}" for name in near(unknown[0], {*known, *OURS}))
        raise UsageError(f"train.{unknown[0]} is not a TrainingArguments field; remove it or mend its spelling{close}")
    for name, value in train_settings.items():
        if known[name].type in ("bool", bool) and not isinstance(value, bool):
            raise UsageError(f"train.{name}={value} is neither true nor false; give one of the two")
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
    if quantised and not (cfg.model.get("lora") or method.brings_adapter):
        raise UsageError(
            "model.load_in_4bit=true holds weights that cannot be trained; train an adapter on them, e.g. "
            "model.lora='{r: 8, alpha: 16, target_modules: all-linear}' (QLoRA), or use model.load_in_4bit=false"
        )
    if quantised and cfg.keep_weights:
        raise UsageError(
            "keep_weights=true: merging the adapter into 4 bits would round its update away; use keep_weights=false "
            "with model.load_in_4bit=true"
        )
    if lacks := what_bitsandbytes_is_for(cfg, args.optim.value):
        raise UserError(lacks)


def steps_per_epoch(args: TrainingArguments, rows: int) -> int:
    """Optimizer steps of an epoch, the last of which may be a smaller one, as Trainer will count them.

    They see every row once; under `dataloader_drop_last`, all rows but those that fill no micro-batch on every rank.
    Raises UsageError where that leaves none.
    """
    of_ranks = args.per_device_train_batch_size * args.world_size
    if not args.dataloader_drop_last:
        micro = math.ceil(rows / of_ranks)
    elif not (micro := rows // of_ranks):
        raise UsageError(
            f"train.dataloader_drop_last=true drops all {rows} rows, since they fill no micro-batch of {of_ranks}; "
            "leave it out, or lower train.per_device_train_batch_size"
        )
    return math.ceil(micro / args.gradient_accumulation_steps)


def total_steps(args: TrainingArguments, rows: int) -> int:
    """Optimizer steps of the whole run, as Trainer will count them."""
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch(args, rows))


def evaluation_steps(points: Sequence[float], args: TrainingArguments, rows: int) -> dict[int, float]:
    """Step -> the epoch of `eval.at` that it is nearest to.

    Raises UsageError for an epoch that lies nearest to no step of the training, or to the same one as another: what
    was never measured would be recorded as measured.
    """
    per_epoch, last = steps_per_epoch(args, rows), total_steps(args, rows)
    found: dict[int, float] = {}
    for epoch in sorted({float(point) for point in points}):
        step = round(epoch * per_epoch)
        problem = None
        if step > last or (step == last and not math.isclose(epoch * per_epoch, last)):
            problem = f"the training ends at step {last}, epoch {last / per_epoch:g}"
        elif step == 0 < epoch:
            problem = "it lies before the first step"
        elif step in found:
            problem = f"it falls on the same step as {found[step]:g}"
        if problem:
            raise UsageError(f"eval.at={epoch:g}: {problem} (an epoch has {per_epoch} steps); choose other epochs")
        found[step] = epoch
    return found


def refuse_deepspeed(args: TrainingArguments, method: Method) -> None:
    """Raises UserError for DeepSpeed where the method edits gradients or weights."""
    if args.deepspeed and method.needs_step_hooks:
        raise UserError(
            f"method={method.name} edits gradients or weights around the optimizer step, but DeepSpeed steps inside "
            "backward; use DDP or FSDP (train.fsdp) instead of train.deepspeed"
        )
