"""HF Trainer with a defence's hooks: the only file that knows Trainer's internals, and its only subclass.

Trainer brings DDP and FSDP, mixed precision, accumulation, checkpointing, resume; a method brings a few hooks.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from cwac.artifacts import sha256, write_atomic
from cwac.config import UsageError, UserError
from cwac.data.tokenize import Collator, Rows
from cwac.methods.base import Method
from cwac.runs import Run, append_jsonl, read_jsonl, write_jsonl

log = logging.getLogger(__name__)
COMPLETE = "complete.json"
METHOD_STATE = "method.pt"
PENDING = ("task_losses", "penalties")
"""What the next line of the loss log is a mean of, kept over a resume."""
OURS = ("max_length", "template")
"""Keys of the `train` group that are not TrainingArguments'."""


class MethodTrainer(Trainer):
    """Trainer that swaps batches and adds a penalty as the method asks."""

    method: Method

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """A method's batch must be in place before Trainer counts the label tokens that normalise the loss."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        ranks, rank = self.args.world_size, self.args.process_index
        batches = [
            self.method.batch(b, self.state.global_step, (i * ranks + rank, len(batches) * ranks))
            for i, b in enumerate(batches)
        ]
        return batches, self._get_num_items_in_batch(batches, device)

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:  # before Trainer clips, so that the sum of all gradients is clipped
            with torch.no_grad():
                self.method.after_backward(self.model)
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.task_losses.append(loss.detach())
        if self.accelerator.gradient_state.sync_gradients:  # the last micro-batch of this optimizer step
            penalty = self.method.penalty(model, self.state.global_step)
            if penalty is not None:
                self.penalties.append(penalty.detach())
                divided = not (self.model_accepts_loss_kwargs and num_items_in_batch is not None)
                loss = loss + penalty * (self.current_gradient_accumulation_steps if divided else 1)
        return (loss, outputs) if return_outputs else loss


class MethodCallback(TrainerCallback):
    """Step hooks, the loss log, evaluations on the way, and what a checkpoint needs beyond Trainer's files."""

    def __init__(self, trainer: MethodTrainer, run: Run, evaluate_at: dict[int, float], evaluate: Callable):
        self.trainer, self.run, self.evaluate_at, self.evaluate = trainer, run, evaluate_at, evaluate
        self.seconds: list[float] = []
        self.memory = 0.0
        self.bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.run.id, unit="step", leave=False)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        with torch.no_grad():
            self.trainer.method.before_step(self.trainer.model)

    def on_optimizer_step(self, args, state, control, **kwargs):
        with torch.no_grad():
            self.trainer.method.after_step(self.trainer.model)
        self.seconds.append(time.perf_counter() - self.began)

    def on_step_end(self, args, state, control, **kwargs):
        step = state.global_step
        self.bar.update(1)
        if step % args.logging_steps == 0 or step == state.max_steps:
            self.log(args, state)
        if step in self.evaluate_at and step < state.max_steps:
            self.memory = max(self.memory, peak_memory())
            self.evaluate(step, self.evaluate_at[step])
            reset_peak_memory()  # the peak reported is the training's, not the generation's

    def log(self, args, state) -> None:
        """One line of train_log.jsonl; a loss that is not finite ends the run here rather than in its tables."""
        per_step = args.gradient_accumulation_steps
        losses = torch.stack(self.trainer.task_losses)
        row = {
            "step": state.global_step,
            "epoch": state.epoch,
            # micro-batches hold shares of one normalised loss, so a step's loss is their sum
            "loss": float(losses.sum()) / (len(losses) / per_step),
            "penalty": float(torch.stack(self.trainer.penalties).mean()) if self.trainer.penalties else None,
            "learning_rate": self.trainer._get_learning_rate(),
        }
        self.trainer.task_losses.clear()
        self.trainer.penalties.clear()
        if not math.isfinite(row["loss"]) or not math.isfinite(row["penalty"] or 0.0):
            raise UserError(
                f"the loss became {row['loss']} (penalty {row['penalty']}) at step {state.global_step}; lower "
                "train.learning_rate or the method's weight, or look at the data; the run is not marked done"
            )
        self.bar.set_postfix(loss=f"{row['loss']:.3f}")
        if self.trainer.is_world_process_zero():
            append_jsonl(self.run.dir / "train_log.jsonl", [row])
        if self.trainer.track is not None:
            self.trainer.track(row)

    def on_save(self, args, state, control, **kwargs):
        if self.trainer.is_world_process_zero():
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            torch.save(self.trainer.method.state_dict(), folder / METHOD_STATE)
            files = {p.name: sha256(p) for p in folder.iterdir() if p.name != COMPLETE}
            pending = {name: [float(x) for x in getattr(self.trainer, name)] for name in PENDING}
            # written last: a checkpoint without it was cut short and is not resumed from
            write_atomic(
                folder / COMPLETE, json.dumps({"step": state.global_step, "files": files, "pending": pending})
            )


def training_arguments(cfg: DictConfig, run: Run) -> TrainingArguments:
    """The `train` group as TrainingArguments; raises UserError naming a key they do not have."""
    given = {k: v for k, v in OmegaConf.to_container(cfg.train, resolve=True).items() if k not in OURS}
    unknown = set(given) - {f.name for f in fields(TrainingArguments)}
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
        **given,
    }
    try:
        return TrainingArguments(**settings)
    except ValueError as error:
        raise UsageError(f"train: {str(error).splitlines()[0]}") from error


def steps_per_epoch(args: TrainingArguments, rows: int) -> int:
    """Optimizer steps that see every row once; the last may be a smaller one."""
    return math.ceil(rows / (args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size))


def total_steps(args: TrainingArguments, rows: int) -> int:
    """Optimizer steps of the whole run, as Trainer will count them."""
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch(args, rows))


def build_trainer(
    model: nn.Module, method: Method, rows: Rows, args: TrainingArguments, pad_token_id: int
) -> MethodTrainer:
    """A trainer for `method`; refuses DeepSpeed where the method edits gradients or weights."""
    if args.deepspeed and method.needs_step_hooks:
        raise UserError(
            f"method={method.name} edits gradients or weights around the optimizer step, but DeepSpeed steps inside "
            "backward; use DDP or FSDP (train.fsdp) instead of train.deepspeed"
        )
    trainer = MethodTrainer(model=model, args=args, train_dataset=rows, data_collator=Collator(pad_token_id))
    trainer.method, trainer.task_losses, trainer.penalties, trainer.track = method, [], [], None
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def train(
    cfg: DictConfig,
    args: TrainingArguments,
    run: Run,
    model: nn.Module,
    method: Method,
    rows: Rows,
    pad_token_id: int,
    evaluate: Callable[[int, float], None],
    track: Callable[[dict], None] | None = None,
) -> dict[str, float]:
    """Train to the end, resuming from the newest complete checkpoint in the run's directory.

    evaluate(step, epoch) is called at the epochs of `eval.at` that lie strictly inside the training.
    Returns step count, epochs, median seconds per step (hooks included), the training's peak memory in MiB.
    """
    trainer = build_trainer(model, method, rows, args, pad_token_id)
    trainer.track = track
    per_epoch = steps_per_epoch(args, len(rows))
    at = {round(float(e) * per_epoch): float(e) for e in cfg.eval.at}
    callback = MethodCallback(trainer, run, at, evaluate)
    trainer.add_callback(callback)
    method.start(trainer.model)
    checkpoint, step = newest_checkpoint(run.dir), 0
    if checkpoint is not None:
        saved = json.loads((checkpoint / COMPLETE).read_text())
        step = saved["step"]
        for name in PENDING:
            setattr(trainer, name, [torch.tensor(x, device=args.device) for x in saved["pending"][name]])
        method.load_state_dict(torch.load(checkpoint / METHOD_STATE, weights_only=True))
    log_path = run.dir / "train_log.jsonl"
    if log_path.exists():  # of an attempt that was cut short: its steps come again
        write_jsonl(log_path, [r for r in read_jsonl(log_path) if r["step"] <= step])
    reset_peak_memory()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    with torch.no_grad():
        method.finish(trainer.model)
    broken = next((n for n, p in trainer.model.named_parameters() if not torch.isfinite(p).all()), None)
    if broken is not None:  # the last step's gradient comes after the last loss
        raise UserError(f"{broken} is not finite after training; lower train.learning_rate or the method's weight")
    ordered = sorted(callback.seconds)
    return {
        "step": trainer.state.global_step,
        "epoch": trainer.state.global_step / per_epoch,
        # None for a run that was resumed after its last step
        "seconds_per_step": ordered[len(ordered) // 2] if ordered else None,
        "memory": max(callback.memory, peak_memory()),
    }


def newest_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint whose last file was written and whose files have the SHA-256 it names.

    One that was cut short is passed over silently, since a run may be killed at any time; a damaged one is named.
    """
    found = []
    for path in folder.glob("checkpoint-*"):
        try:
            entry = json.loads((path / COMPLETE).read_text())
            found.append((int(entry["step"]), path, dict(entry["files"])))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError):
            log.warning("%s is damaged (%s); it is not resumed from", path, COMPLETE)
    for _, path, files in sorted(found, reverse=True):
        odd = [
            name
            for name, expected in files.items()
            if not ((path / name).is_file() and sha256(path / name) == expected)
        ]
        if not odd:
            return path
        log.warning("%s is damaged (%s); an earlier one is resumed from", path, ", ".join(odd))
    return None


def reset_peak_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts again from here


def peak_memory() -> float:
    """MiB: CUDA's peak where there is a GPU, else the process's resident high-water mark since the last reset."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**20 if os.uname().sysname == "Darwin" else 1024)
