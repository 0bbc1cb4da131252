"""The HF Trainer with a defence's hooks: the only file that relies on Trainer's internals or subclasses it.

Trainer provides DDP and FSDP, mixed precision, gradient accumulation, checkpoints and resuming. A method adds a few
hooks to that.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import inspect
import json
import logging
import math
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin, PartialState
from omegaconf import DictConfig
from peft import PeftModel
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import get_last_checkpoint

from cwac.core import distributed
from cwac.core.errors import UserError
from cwac.core.files import sha256, write_atomic
from cwac.core.jsonl import append_jsonl, read_jsonl, write_jsonl
from cwac.core.run_dir import Run
from cwac.data.tokenize import IGNORE, Collator, Rows
from cwac.methods.base import Method
from cwac.models.layers import not_finite, picks_logits
from cwac.training.arguments import evaluation_steps, refuse_deepspeed, steps_per_epoch, total_steps
from cwac.training.hook_times import HookTimes

log = logging.getLogger(__name__)
COMPLETE = "complete.json"

METHOD_STATE = "method.pt"

PENDING = ("step_losses", "penalties")
"""Attributes of the trainer that hold the values since the last line of the loss log. The next line reports their
means, so each checkpoint stores them."""


freeze_once = functools.cache(gc.freeze)
"""Excludes what was imported before the first training from garbage collection: Trainer collects at every start, and
would otherwise walk through all of it each time."""


class MethodTrainer(Trainer):
    """A Trainer that replaces batches and adds a penalty to the loss where the method asks for it.

    `attach` mixes this class into any other trainer.
    """

    method: Method
    label_logits: bool = False
    """Whether the model computes logits only at the positions where a label is predicted. False under a user's own
    collator, which does not report these positions."""
    step_losses: list[torch.Tensor] | None = None
    """The task's loss of each optimizer step since the last line of the run's loss log. None for a user's own trainer,
    which logs its loss itself."""
    step_loss: torch.Tensor | float = 0.0
    """The task's loss so far in the current optimizer step, summed over its micro-batches."""
    expected_steps: int | None = None
    """The number of optimizer steps that the method was told of in `setup`; some methods plan by this number."""
    hook_times: HookTimes
    """What the method's hooks take of the first steps; `attach` sets it."""
    say: Callable[[str], None]
    """Tells the user a line about the training. By default it is printed to stderr."""
    original: list[tuple[str, weakref.ref]]
    """Name of, and weak reference to, each parameter that the method saw in `setup`."""
    penalty_checked: bool

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        if resume_from_checkpoint is True:  # Trainer takes the newest, and raises its own error without one
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir) or True
        if isinstance(resume_from_checkpoint, str | os.PathLike):
            state = Path(resume_from_checkpoint) / METHOD_STATE
            if not state.is_file():
                raise UserError(f"{state.parent} has no {METHOD_STATE}: it was saved without a defence; start anew")
            # on the CPU, since the run may have begun on another device; `start` puts tensors where the parameters are
            self.method.load_state_dict(torch.load(state, map_location="cpu", weights_only=True))
        given = (resume_from_checkpoint, *args) if args else ()  # else by keyword, which a subclass may require
        named = kwargs if args else {"resume_from_checkpoint": resume_from_checkpoint, **kwargs}
        result = super().train(*given, **named)
        self.trained = self.gathered()
        if self.is_world_process_zero():
            with torch.no_grad(), own_precision(self.trained):
                self.method.finish(self.trained)
        return result

    def log(self, logs, *args, **kwargs):
        if "loss" in logs and self.penalties and self.step_losses is None:
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
        """Insert the method's batches before Trainer counts the label tokens by which it divides the loss."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        size, rank, step = self.args.world_size, self.args.process_index, self.state.global_step
        parts = [(i * size + rank, len(batches) * size) for i in range(len(batches))]
        if size > 1:
            for batch, (part, _) in zip(batches, parts, strict=True):
                self._ignore_repeated(batch, part)
        with self.hook_times.of("batch"):
            batches = [self.method.batch(b, step, part) for b, part in zip(batches, parts, strict=True)]
        return batches, self._get_num_items_in_batch(batches, device)

    def _ignore_repeated(self, batch, part: int) -> None:
        """Ignore the labels of repeated rows, so that no row counts twice in an epoch.

        accelerate repeats the first rows of an epoch to give every rank a full last batch.
        """
        args, rows = self.args, len(self.train_dataset)
        if args.dataloader_drop_last:
            return  # an incomplete last batch is then left out, so no row is repeated
        of_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        first = self.state.global_step % steps_per_epoch(args, rows) * of_step
        first += part * args.per_device_train_batch_size
        for key in batch.keys() & {"labels", "shift_labels"}:
            batch[key][max(0, rows - first) :] = IGNORE

    def gathered(self) -> nn.Module | None:
        """The model with unsharded parameters.

        This is the model itself; under FSDP2 it is a copy on rank 0 and None on all other ranks. The call is
        collective: every rank must make it at the same time.
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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """As transformers', but refuses a folder that holds weights of the other kind (`refuse_other_kind`)."""
        adapter = isinstance(self.accelerator.unwrap_model(self.model), PeftModel)
        refuse_other_kind(output_dir or self.args.output_dir, adapter)
        return super().save_model(output_dir, _internal_call)

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:  # before Trainer clips, so that the sum of all gradients is clipped
            with torch.no_grad(), self.hook_times.of("after_backward"):
                self.method.after_backward(self.model)
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.label_logits:
            inputs = {**inputs, "logits_to_keep": inputs["shift_labels"].shape[1]}
        else:
            inputs = {key: value for key, value in inputs.items() if key != "shift_labels"}
        # Outputs are requested only if the caller wants them, because TRL runs the model a second time for them.
        # Arguments are passed by keyword, as Trainer does: a subclass may collect those it does not use in **kwargs.
        result = super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        if not model.training:  # an evaluation that Trainer itself runs during training
            return result
        loss = result[0] if return_outputs else result
        scaled = getattr(self, "loss_is_scaled_for_ga", None)  # since transformers 5.19
        if scaled is None:
            counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = counted or self.compute_loss_func is not None
        # Trainer divides this loss by `parts`
        parts = 1 if scaled else self.current_gradient_accumulation_steps
        last = self.accelerator.gradient_state.sync_gradients  # the last micro-batch of this optimizer step
        if self.step_losses is not None:
            self.step_loss = self.step_loss + loss.detach() / parts
            if last:
                self.step_losses.append(self.step_loss)
                self.step_loss = 0.0
        if last:
            # under autocast, so that a copy of the initial model uses the same precision
            with self.accelerator.autocast(), self.hook_times.of("penalty"):
                penalty = self.method.penalty(model, self.state.global_step)
            if penalty is not None:
                self.check_penalty(penalty)
                self.penalties.append(penalty.detach())
                with_penalty = loss + penalty * parts
                self.hook_times.of_backward("penalty", with_penalty, loss)
                loss = with_penalty
        return (loss, result[1]) if return_outputs else loss

    def replaced(self) -> dict[int, str]:
        """Parameters that the model had before it was wrapped and no longer has: id -> name. FSDP2 replaces them with
        DTensors."""
        now = {id(p) for p in self.model.parameters()}
        there = ((name, ref()) for name, ref in self.original)
        return {id(p): name for name, p in there if p is not None and id(p) not in now}

    def check_kept(self) -> None:
        """Raises UserError if the method still holds replaced parameters, because these never change again."""
        gone = self.replaced()
        found = gone and next(held_tensors(vars(self.method), gone), None)
        if found:
            place, name = found
            raise UserError(
                f"method={self.method.name} remembers the parameter {name} from `setup` ({place}), which the model "
                "lost: FSDP2 trains shards in its place, so what is computed from it would stand still; look "
                "parameters up in `start` or in the hook that uses them (docs/add_a_method.md)"
            )

    def check_penalty(self, penalty: torch.Tensor) -> None:
        """Raises UserError if the penalty has no gradient for the model: the run would be SFT under another name."""
        if not torch.isfinite(penalty):
            return  # writing the loss log will raise an error and end the run
        if not penalty.requires_grad:
            problem = "has no gradient at all; return None in a step that adds nothing"
        elif self.penalty_checked:
            return
        else:
            gone, trained = self.replaced(), {id(p) for p in self.model.parameters() if p.requires_grad}
            found = leaves_of(penalty)
            leaves = {id(leaf) for leaf in found or ()}
            lost = next((gone[leaf] for leaf in leaves if leaf in gone), None)
            self.penalty_checked = True
            if lost is not None:
                problem = f"is of the parameter {lost} as it was before FSDP2 replaced it"
            elif found is not None and not self.is_fsdp_enabled and not leaves & trained:  # FSDP has leaves of its own
                problem = "reaches no parameter that trains"
            else:
                return
        raise UserError(
            f"method={self.method.name}: its penalty {problem}, so training would be plain fine-tuning under the "
            "method's name; compute it from the model it is given (docs/add_a_method.md)"
        )


def held_tensors(node, wanted: dict[int, str], place: str = "self", seen: set[int] | None = None):
    """Find where `node` holds tensors whose ids are in `wanted`; yields pairs (place, `wanted[id]`).

    The search goes through containers, dataclasses, plain objects and closures. It does not enter modules, since the
    parameters of a module are the current ones.
    """
    seen = set() if seen is None else seen
    if id(node) in seen or isinstance(node, str | bytes | int | float | nn.Module | PreTrainedTokenizerBase):
        return
    seen.add(id(node))
    if isinstance(node, torch.Tensor):
        if id(node) in wanted:
            yield place, wanted[id(node)]
        return
    if isinstance(node, dict):
        inside = ((f"{place}.{key}", value) for key, value in node.items())
    elif isinstance(node, list | tuple | set | frozenset):
        inside = ((f"{place}[{i}]", value) for i, value in enumerate(node))
    elif inspect.isfunction(node):
        cells = zip(node.__code__.co_freevars, node.__closure__ or (), strict=False)
        inside = ((f"{place}:{name}", cell.cell_contents) for name, cell in cells)
    elif hasattr(node, "__dict__") and not isinstance(node, type):
        inside = ((f"{place}.{key}", value) for key, value in vars(node).items())
    else:
        return
    for where, value in inside:
        yield from held_tensors(value, wanted, where, seen)


def leaves_of(tensor: torch.Tensor) -> list[torch.Tensor] | None:
    """The leaf tensors of the autograd graph of `tensor`, which its gradient would be accumulated in.

    None where reentrant gradient checkpointing hides them.
    """
    if tensor.grad_fn is None:
        return [tensor]
    found, open_, seen = [], [tensor.grad_fn], set()
    while open_:
        node = open_.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "CheckpointFunction" in type(node).__name__:
            return None
        if hasattr(node, "variable"):
            found.append(node.variable)
        open_ += [child for child, _ in node.next_functions]
    return found


class StepHooks(TrainerCallback):
    """Calls the method's hooks around the optimizer step, and saves the method's state in every checkpoint."""

    def __init__(self, trainer: MethodTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.hook_times = HookTimes(args.device)
        expected = self.trainer.expected_steps
        if expected is not None and state.max_steps != expected:
            raise UserError(
                f"the trainer is about to make {state.max_steps} steps, the method was told of {expected}: something "
                "changes how many rows make a step (several GPUs in one process, auto_find_batch_size, a sampler of "
                "its own); start one process per GPU, and give the trainer its final batch size"
            )
        self.trainer.method.start(self.trainer.model)
        self.trainer.check_kept()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        with torch.no_grad(), self.trainer.hook_times.of("before_step"):
            self.trainer.method.before_step(self.trainer.model)

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.hook_times.begin_step()

    def on_optimizer_step(self, args, state, control, **kwargs):
        with torch.no_grad(), own_precision(self.trainer.model), self.trainer.hook_times.of("after_step"):
            self.trainer.method.after_step(self.trainer.model)
        if self.trainer.hook_times.end_step():
            self.tell_hook_times(state)

    def tell_hook_times(self, state) -> None:
        """Say once, on rank 0, what the method's hooks take of a step."""
        said = self.trainer.hook_times.summary(self.trainer.method)
        if said and state.is_world_process_zero:
            with tqdm.external_write_mode():  # a progress bar is drawn again below the line
                self.trainer.say(said)

    def on_train_end(self, args, state, control, **kwargs):
        if self.trainer.hook_times.is_open:  # a training of fewer steps than are timed
            self.tell_hook_times(state)
        reloaded = args.load_best_model_at_end and state.best_model_checkpoint
        with torch.no_grad(), own_precision(self.trainer.model):
            self.trainer.method.stop(self.trainer.model, bool(reloaded))

    def on_save(self, args, state, control, **kwargs):
        extra = self.trainer.method.state_dict()
        distributed.wait()  # each rank has written its own files
        if self.trainer.is_world_process_zero():
            torch.save(extra, Path(args.output_dir) / f"checkpoint-{state.global_step}" / METHOD_STATE)


class MethodCallback(TrainerCallback):
    """Times the steps of a run, writes its loss log, evaluates during training and marks checkpoints as complete.

    It is added after StepHooks, so that it measures and saves what the method's hooks have done.
    """

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
                with own_precision(model):
                    self.evaluate(model, step, self.evaluate_at[step])
            distributed.wait()
            reset_peak_memory()  # so that the reported peak is that of training, not of generation

    def log(self, args, state) -> None:
        """Write one line of train_log.jsonl; raises UserError for a loss that is not finite."""
        losses, penalties = (
            self.trainer.accelerator.reduce(torch.stack(values), "mean") if values else None
            for values in (self.trainer.step_losses, self.trainer.penalties)
        )
        row = {
            "step": state.global_step,
            "epoch": state.epoch,
            "loss": float(losses.sum()) / len(losses),
            "penalty": None if penalties is None else float(penalties.mean()),
            "learning_rate": self.trainer._get_learning_rate(),
        }
        self.trainer.step_losses.clear()
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
            # Written last: without this file the checkpoint was interrupted, and no run resumes from it.
            write_atomic(folder / COMPLETE, json.dumps(entry))


def build_trainer(
    model: nn.Module, method: Method, rows: Rows, args: TrainingArguments, pad_token_id: int
) -> MethodTrainer:
    """A trainer for `method` that prints nothing of its own; raises the errors of `refuse_deepspeed`."""
    refuse_deepspeed(args, method)
    collate = Collator(pad_token_id, label_logits=True)
    trainer = attach(MethodTrainer(model=model, args=args, train_dataset=rows, data_collator=collate), method)
    # the label smoother compares the logits with unshifted labels, so it needs all of them
    whole = trainer.label_smoother is not None
    trainer.label_logits = not whole and picks_logits(model)
    trainer.step_losses, trainer.track = [], None
    trainer.say = log.info
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def attach(trainer: Trainer, method: Method) -> MethodTrainer:
    """Add a method's hooks to an existing trainer, in place.

    The trainer's class becomes a new subclass of both MethodTrainer and its present class. TRL's SFTTrainer, for
    example, keeps its own loss and training step, with the hooks around them.
    """
    kind = type(trainer)
    if not issubclass(kind, MethodTrainer):
        trainer.__class__ = type(f"Defended{kind.__name__}", (MethodTrainer, kind), {})
    trainer.method, trainer.penalties, trainer.penalty_checked = method, [], False
    trainer.hook_times, trainer.say = HookTimes(trainer.args.device), to_stderr
    trainer.original = [(name, weakref.ref(p)) for name, p in trainer.model.named_parameters()]
    if trainer.is_fsdp_enabled and trainer.is_world_process_zero():
        empty = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in trainer.model.parameters()}
        trainer.skeleton = copy.deepcopy(trainer.model, empty)
    trainer.add_callback(StepHooks(trainer))
    return trainer


KINDS = {True: ("adapter_config.json",), False: ("model.safetensors", "model.safetensors.index.json")}
"""Whether what is saved is an adapter, and a file that tells."""


def refuse_other_kind(folder: str | Path, adapter: bool) -> None:
    """Raises UserError where a folder, or a checkpoint in it, holds a whole model and an adapter is to be saved there.

    Or the other way round. `from_pretrained` would put the adapter on the model, which nobody has trained so.
    """
    for place in [Path(folder), *sorted(Path(folder).glob("checkpoint-*"))]:
        if there := [place / name for name in KINDS[not adapter] if (place / name).is_file()]:
            own, other = ("an adapter", "a whole model") if adapter else ("a whole model", "an adapter")
            raise UserError(
                f"{there[0]} is of {other} saved before, and this training saves {own}: both in one folder would load "
                "as a model that nobody trained. Remedy: another folder for each method, or delete this one"
            )


def to_stderr(line: str) -> None:
    """Print a line to what is stderr now: a notebook or a test may have replaced it since the trainer was made."""
    print(line, file=sys.stderr)


def collated(trainer: Trainer, rows: list[dict]) -> dict:
    """The batch that the trainer's collator makes of encoded rows, without the columns that the trainer drops."""
    collate = trainer.data_collator
    if trainer.args.remove_unused_columns:
        collate = trainer._get_collator_with_removed_columns(collate, description="training")
    return collate([dict(row) for row in rows])


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

    evaluate(model, step, epoch) is called on rank 0 at the epochs of `eval.at` strictly between start and end.
    track(row) is called on rank 0 with each line of the loss log.

    Returns the trained model (with unsharded parameters; None on all ranks but 0) and a mapping with `step`, `epoch`,
    `seconds_per_step` (the median, hooks included) and `memory` (the peak of one rank during training, in MiB).
    """
    freeze_once()
    trainer = build_trainer(model, method, rows, args, pad_token_id)
    trainer.track = track
    trainer.expected_steps = total_steps(args, len(rows))
    callback = MethodCallback(trainer, run, evaluation_steps(cfg.eval.at, args, len(rows)), evaluate)
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
        if trainer.is_world_process_zero():
            log.info("%s goes on from step %d (%s)", run.id, step, checkpoint)
        for name in PENDING:
            # a checkpoint of an earlier version lacks them, since it stored the losses of micro-batches instead
            setattr(trainer, name, [torch.tensor(x, device=args.device) for x in saved["pending"].get(name, [])])
    log_path = run.dir / "train_log.jsonl"
    if trainer.is_world_process_zero() and log_path.exists():  # the steps after the checkpoint are repeated
        write_jsonl(log_path, [r for r in read_jsonl(log_path) if r["step"] <= step])
    reset_peak_memory()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.trained is not None:
        leave_autocast(trainer.trained)
        if broken := not_finite(trainer.trained):  # the last update comes after the last loss that was checked
            raise UserError(
                f"{broken[0]} is not finite after training; lower train.learning_rate or the method's weight"
            )
    ordered = sorted(callback.seconds)
    return trainer.trained, {
        "step": trainer.state.global_step,
        "epoch": trainer.state.global_step / steps_per_epoch(args, len(rows)),
        # None for a run that was resumed after its last step
        "seconds_per_step": ordered[len(ordered) // 2] if ordered else None,
        "memory": max(callback.memory, peak_memory()),
    }


@contextlib.contextmanager
def own_precision(model: nn.Module) -> Iterator[None]:
    """Within this context, the model computes in the precision of its weights, without accelerate's autocast.

    Every measurement uses this precision: before, during and after training, on weights that were kept, and on the
    aligned model. Only the model that is being trained is ever under autocast.
    """
    under_autocast = vars(model).get("forward")
    if "_original_forward" not in vars(model):
        yield
        return
    model.forward = model._original_forward
    try:
        yield
    finally:
        model.forward = under_autocast


def leave_autocast(model: nn.Module) -> None:
    """Remove the autocast that accelerate wrapped around the model's `forward`, once training is over."""
    if (forward := vars(model).pop("_original_forward", None)) is not None:
        del model.forward
        if model.forward != forward:  # it was an attribute of this model, not its class's
            model.forward = forward


def newest_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint that is complete and whose files have the SHA-256 recorded in its `complete.json`.

    An interrupted checkpoint is skipped silently, since a run may be killed at any time. A damaged one is skipped with
    a warning that names it. None where no checkpoint is left.
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
