"""HF Trainer with a defence's hooks: the only file that knows Trainer's internals, and its only subclass.

Trainer brings DDP and FSDP, mixed precision, accumulation, checkpointing, resume; a method brings a few hooks.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import json
import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin, PartialState
from omegaconf import DictConfig
from torch import nn
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import get_last_checkpoint

from cwac.core import distributed
from cwac.core.errors import UserError
from cwac.core.files import sha256, write_atomic
from cwac.core.jsonl import append_jsonl, read_jsonl, write_jsonl
from cwac.core.run_dir import Run
from cwac.data.tokenize import IGNORE, Collator, Rows
from cwac.methods.base import Method
from cwac.models.layers import picks_logits
from cwac.training.arguments import refuse_deepspeed, steps_per_epoch

log = logging.getLogger(__name__)
COMPLETE = "complete.json"

METHOD_STATE = "method.pt"

PENDING = ("task_losses", "penalties")
"""What the next line of the loss log is a mean of, kept over a resume."""


freeze_once = functools.cache(gc.freeze)
"""Trainer collects garbage at every start: not through all that a process imported before its first training."""


class MethodTrainer(Trainer):
    """Trainer that swaps batches and adds a penalty as the method asks; `attach` mixes it into any other trainer."""

    method: Method
    label_logits: bool = False
    """Whether the model computes logits only where a label is predicted; a user's own collator does not say where."""
    task_losses: list[torch.Tensor] | None = None
    """Kept for the loss log of a run; a user's trainer logs its own."""

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        if resume_from_checkpoint is True:  # the newest, as Trainer chooses; without one, it says so itself
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir) or True
        if isinstance(resume_from_checkpoint, str | os.PathLike):
            state = Path(resume_from_checkpoint) / METHOD_STATE
            if not state.is_file():
                raise UserError(f"{state.parent} has no {METHOD_STATE}: it was saved without a defence; start anew")
            # on the CPU, since the run may have begun on another device; `start` puts tensors where the parameters are
            self.method.load_state_dict(torch.load(state, map_location="cpu", weights_only=True))
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        self.trained = self.gathered()
        if self.is_world_process_zero():
            with torch.no_grad():
                self.method.finish(self.trained)
        return result

    def log(self, logs, *args, **kwargs):
        if "loss" in logs and self.penalties and self.task_losses is None:
            logs["penalty"] = float(torch.stack(self.penalties).mean())
            self.penalties.clear()
        super().log(logs, *args, **kwargs)

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and not self.is_fsdp_enabled:  # accelerate shards on no CPU, but PyTorch does, with gloo
            state = self.accelerator.state
            state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """A method's batch must be in place before Trainer counts the label tokens that normalise the loss."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        size, rank, step = self.args.world_size, self.args.process_index, self.state.global_step
        parts = [(i * size + rank, len(batches) * size) for i in range(len(batches))]
        if size > 1:
            for batch, (part, _) in zip(batches, parts, strict=True):
                self._ignore_repeated(batch, part)
        batches = [self.method.batch(b, step, part) for b, part in zip(batches, parts, strict=True)]
        return batches, self._get_num_items_in_batch(batches, device)

    def _ignore_repeated(self, batch, part: int) -> None:
        """No loss on the first rows of an epoch where accelerate repeats them to give every rank a full last batch."""
        args, rows = self.args, len(self.train_dataset)
        of_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        first = self.state.global_step % steps_per_epoch(args, rows) * of_step
        first += part * args.per_device_train_batch_size
        for key in batch.keys() & {"labels", "shift_labels"}:
            batch[key][max(0, rows - first) :] = IGNORE

    def gathered(self) -> nn.Module | None:
        """The model with whole parameters: itself, or under FSDP2 a copy on rank 0 and None on the others.

        Every rank must ask at once.
        """
        if not self.is_fsdp_enabled:
            return self.model
        state = self.accelerator.get_state_dict(self.model)
        if not self.is_world_process_zero():
            return None
        model = copy.deepcopy(self.skeleton)
        model.load_state_dict(state, assign=True)
        model.tie_weights()
        return model.to(self.args.device)

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:  # before Trainer clips, so that the sum of all gradients is clipped
            with torch.no_grad():
                self.method.after_backward(self.model)
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.label_logits:
            inputs = {**inputs, "logits_to_keep": inputs["shift_labels"].shape[1]}
        else:
            inputs = {key: value for key, value in inputs.items() if key != "shift_labels"}
        # outputs only where they are wanted: TRL runs the model once more for them
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not model.training:  # Trainer's own evaluation on the way
            return result
        loss = result[0] if return_outputs else result
        if self.task_losses is not None:
            self.task_losses.append(loss.detach())
        if self.accelerator.gradient_state.sync_gradients:  # the last micro-batch of this optimizer step
            penalty = self.method.penalty(model, self.state.global_step)
            if penalty is not None:
                self.penalties.append(penalty.detach())
                scaled = getattr(self, "loss_is_scaled_for_ga", None)  # since transformers 5.19
                if scaled is None:
                    counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
                    scaled = counted or self.compute_loss_func is not None
                loss = loss + penalty * (1 if scaled else self.current_gradient_accumulation_steps)
        return (loss, result[1]) if return_outputs else loss


class StepHooks(TrainerCallback):
    """The hooks around the optimizer step, and the method's state in every checkpoint."""

    def __init__(self, trainer: MethodTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.method.start(self.trainer.model)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        with torch.no_grad():
            self.trainer.method.before_step(self.trainer.model)

    def on_optimizer_step(self, args, state, control, **kwargs):
        with torch.no_grad():
            self.trainer.method.after_step(self.trainer.model)

    def on_save(self, args, state, control, **kwargs):
        extra = self.trainer.method.state_dict()
        distributed.wait()  # each rank has written its own files
        if self.trainer.is_world_process_zero():
            torch.save(extra, Path(args.output_dir) / f"checkpoint-{state.global_step}" / METHOD_STATE)


class MethodCallback(TrainerCallback):
    """A run's clock, loss log, evaluations on the way, and the seal of its checkpoints; StepHooks come before it."""

    def __init__(self, trainer: MethodTrainer, run: Run, evaluate_at: dict[int, float], evaluate: Callable):
        self.trainer, self.run, self.evaluate_at, self.evaluate = trainer, run, evaluate_at, evaluate
        self.seconds: list[float] = []
        self.memory = 0.0
        self.bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        first, shown = state.global_step, self.trainer.is_world_process_zero()
        self.bar = tqdm(
            total=state.max_steps, initial=first, desc=self.run.id, unit="step", leave=False, disable=not shown
        )

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()

    def on_optimizer_step(self, args, state, control, **kwargs):
        if args.device.type == "cuda":
            torch.cuda.synchronize()  # the GPU is still at work when Python has queued the step
        self.seconds.append(time.perf_counter() - self.began)

    def on_step_end(self, args, state, control, **kwargs):
        step = state.global_step
        self.bar.update(1)
        if step % args.logging_steps == 0 or step == state.max_steps:
            self.log(args, state)
        if step in self.evaluate_at and step < state.max_steps:
            self.memory = max(self.memory, peak_memory())
            model = self.trainer.gathered()
            if self.trainer.is_world_process_zero():
                self.evaluate(model, step, self.evaluate_at[step])
            distributed.wait()
            reset_peak_memory()  # the peak reported is the training's, not the generation's

    def log(self, args, state) -> None:
        """One line of train_log.jsonl; a loss that is not finite ends the run here rather than in its tables."""
        per_step = args.gradient_accumulation_steps
        losses, penalties = (
            self.trainer.accelerator.reduce(torch.stack(values), "mean") if values else None
            for values in (self.trainer.task_losses, self.trainer.penalties)
        )
        row = {
            "step": state.global_step,
            "epoch": state.epoch,
            # micro-batches hold shares of one normalised loss, so a step's loss is their sum
            "loss": float(losses.sum()) / (len(losses) / per_step),
            "penalty": None if penalties is None else float(penalties.mean()),
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
            files = {p.name: sha256(p) for p in folder.iterdir() if p.name != COMPLETE}
            pending = {name: [float(x) for x in getattr(self.trainer, name)] for name in PENDING}
            sharded = self.trainer.is_fsdp_enabled
            entry = {"step": state.global_step, "files": files, "pending": pending, "sharded": sharded}
            # written last: a checkpoint without it was cut short and is not resumed from
            write_atomic(folder / COMPLETE, json.dumps(entry))


def build_trainer(
    model: nn.Module, method: Method, rows: Rows, args: TrainingArguments, pad_token_id: int
) -> MethodTrainer:
    """A trainer for `method`, without Trainer's own printing; raises as `refuse_deepspeed` does."""
    refuse_deepspeed(args, method)
    collate = Collator(pad_token_id, label_logits=True)
    trainer = attach(MethodTrainer(model=model, args=args, train_dataset=rows, data_collator=collate), method)
    # the label smoother compares the logits with unshifted labels, so it needs all of them
    whole = trainer.label_smoother is not None
    trainer.label_logits = not whole and picks_logits(model)
    trainer.task_losses, trainer.track = [], None
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def attach(trainer: Trainer, method: Method) -> MethodTrainer:
    """Give a trainer that exists a method's hooks, in place: its class becomes one of its own and MethodTrainer.

    So TRL's SFTTrainer keeps its own loss and step, with the hooks around them.
    """
    kind = type(trainer)
    if not issubclass(kind, MethodTrainer):
        trainer.__class__ = type(f"Defended{kind.__name__}", (MethodTrainer, kind), {})
    trainer.method, trainer.penalties = method, []
    if trainer.is_fsdp_enabled and trainer.is_world_process_zero():
        empty = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in trainer.model.parameters()}
        trainer.skeleton = copy.deepcopy(trainer.model, empty)
    trainer.add_callback(StepHooks(trainer))
    return trainer


def train(
    cfg: DictConfig,
    args: TrainingArguments,
    run: Run,
    model: nn.Module,
    method: Method,
    rows: Rows,
    pad_token_id: int,
    evaluate: Callable[[nn.Module, int, float], None],
    track: Callable[[dict], None] | None = None,
) -> tuple[nn.Module | None, dict[str, float]]:
    """Train to the end, resuming from the newest complete checkpoint in the run's directory.

    evaluate(model, step, epoch) is called on rank 0 at the epochs of `eval.at` that lie strictly inside the training.
    Returns the trained model, whole and on rank 0 alone, with step count, epochs, median seconds per step (hooks
    included), the training's peak memory in MiB of one rank.
    """
    freeze_once()
    trainer = build_trainer(model, method, rows, args, pad_token_id)
    trainer.track = track
    per_epoch = steps_per_epoch(args, len(rows))
    at = {round(float(e) * per_epoch): float(e) for e in cfg.eval.at}
    callback = MethodCallback(trainer, run, at, evaluate)
    trainer.add_callback(callback)
    checkpoint, step = distributed.agree(newest_checkpoint(run.dir)), 0
    if checkpoint is not None:
        saved = json.loads((checkpoint / COMPLETE).read_text())
        step = saved["step"]
        if saved["sharded"] != trainer.is_fsdp_enabled:
            raise UserError(
                f"{checkpoint} was written {'under' if saved['sharded'] else 'without'} FSDP; go on as the run was "
                "begun (parallel=fsdp2 or not), or start over with force=true"
            )
        for name in PENDING:
            setattr(trainer, name, [torch.tensor(x, device=args.device) for x in saved["pending"][name]])
    log_path = run.dir / "train_log.jsonl"
    if trainer.is_world_process_zero() and log_path.exists():  # of an attempt that was cut short: its steps come again
        write_jsonl(log_path, [r for r in read_jsonl(log_path) if r["step"] <= step])
    reset_peak_memory()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.trained is not None:
        broken = next((n for n, p in trainer.trained.named_parameters() if not torch.isfinite(p).all()), None)
        if broken is not None:  # the last step's gradient comes after the last loss
            raise UserError(f"{broken} is not finite after training; lower train.learning_rate or the method's weight")
    ordered = sorted(callback.seconds)
    return trainer.trained, {
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
    complete = []
    for path in folder.glob("checkpoint-*"):
        try:
            entry = json.loads((path / COMPLETE).read_text())
            complete.append((int(entry["step"]), path, dict(entry["files"])))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError):
            log.warning("%s is damaged (%s); it is not resumed from", path, COMPLETE)
    for _, path, files in sorted(complete, reverse=True):
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
