"""What one optimizer step of each method costs, in steps of plain fine-tuning on the very same batches.

python -m benchmarks.methods                  every method of conf/method/ on model=tiny
python -m benchmarks.methods --methods lisa,asft --steps 200

Two trainers live in one process, the method's and SFT's, each with a model of its own. They take turns step by step:
the method trains on a batch, then SFT on the same tensors, so that a swapped batch (Lisa) or a longer row (BEA's
trigger) is no cost of the method's, and a slow moment of the machine hits both. A step is a whole turn of Trainer's
loop: fetching and swapping the batch, forward and backward passes, hooks, clipping, optimizer, callbacks. Setup,
evaluation and what happens after training are not part of it.
"""

from __future__ import annotations

import random
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from omegaconf import DictConfig
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from benchmarks import runner
from benchmarks.runner import Skipped, clock, entry
from cwac.core import config, paths, validation
from cwac.core.errors import UserError
from cwac.core.run_dir import Run
from cwac.data.mix import mix
from cwac.data.tasks import load_task
from cwac.data.tokenize import Rows, pad_token_id
from cwac.methods.base import Batch, Method
from cwac.models.layers import device
from cwac.models.loading import load
from cwac.training.arguments import total_steps, training_arguments
from cwac.training.context import open_context
from cwac.training.engine import MethodCallback, MethodTrainer, build_trainer

BARS = {"safeinstr": 1.05, "bea": 1.05, "sppft": 1.05, "lisa": 1.15, "asft": 2.0}
"""The most a step may cost, in SFT steps; the other methods are reported without a bar."""
ADAPTERS = {"salora": "model.lora={r: 16, alpha: 16, target_modules: [q_proj, v_proj]}"}
"""Methods that exist for adapters alone, and the adapters that they and SFT beside them train."""
WARM_UP = 5
"""First steps left out: they allocate the optimizer's state."""


class OtherFailed(Exception):
    """Ends the trainer that would wait for ever; the other's error is the one to report."""


class Turns(TrainerCallback):
    """Lets one of two trainers run at a time, a step each, and times its turns."""

    def __init__(self, pair: list[threading.Semaphore], me: int, clock: Callable[[], float]):
        self.mine, self.theirs, self.clock = pair[me], pair[1 - me], clock
        self.seconds: list[float] = []
        self.other: Turns | None = None
        self.failed = False

    def wait(self) -> None:
        self.mine.acquire()
        if self.other.failed:
            raise OtherFailed
        self.began = self.clock()

    def on_train_begin(self, args, state, control, **kwargs):
        self.wait()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(self.clock() - self.began)
        self.theirs.release()
        if state.global_step < state.max_steps:
            self.wait()


@dataclass
class SameBatches(Method):
    """SFT on the batches that another trainer has just been given."""

    batches: dict[tuple[int, int], Batch]

    def batch(self, batch: Batch, step: int, part: tuple[int, int]) -> Batch:
        return self.batches.pop((step, part[0]))


def recorded(method: Method) -> dict[tuple[int, int], Batch]:
    """Where the method's batches stand from now on, by step and micro-batch, as it returned them."""
    batches, given = {}, method.batch

    def batch(batch: Batch, step: int, part: tuple[int, int]) -> Batch:
        chosen = given(batch, step, part)
        batches[step, part[0]] = dict(chosen)
        return chosen

    method.batch = batch
    return batches


def trainers(cfg: DictConfig) -> list[MethodTrainer]:
    """The method's trainer and SFT's beside it, ready to train; set up as `train.py` does."""
    method = config.instantiate(cfg.method)
    run = Run(cfg)
    run.dir.mkdir(parents=True)
    arguments = training_arguments(cfg, run)
    arguments.save_strategy = SaveStrategy.NO  # both trainers share the folder
    context = open_context(cfg)
    loaded, rival = context.loaded, load(cfg.model, context.artifacts, cfg.seed)
    task = load_task(cfg.task, cfg.paths.data, cfg.seed)
    mixed = mix(task.train, context.pools.poison, cfg.harmful_ratio, cfg.seed, cfg.mix_mode)
    examples = method.training_data(mixed, context, random.Random(f"method-{cfg.seed}"))
    rows = Rows(loaded.tokenizer, examples, cfg.train.template, cfg.train.max_length)
    context.steps = total_steps(arguments, len(rows))
    models = [loaded.model, rival.model.to(device())]
    models[0] = method.setup(models[0], context) or models[0]
    made = []
    for model, each in zip(models, [method, SameBatches("sft", recorded(method))], strict=True):
        trainer = build_trainer(model, each, rows, arguments, pad_token_id(loaded.tokenizer))
        trainer.add_callback(MethodCallback(trainer, run, {}, lambda *point: None))
        made.append(trainer)
    return made


def ratios(pair: list[MethodTrainer], warm_up: int = WARM_UP, group: int = 1) -> np.ndarray:
    """Train both side by side; seconds of the first's step over seconds of the other's, one number a step.

    group: one number for that many steps, where the first does something in one of them alone.
    """
    semaphores = [threading.Semaphore(1), threading.Semaphore(0)]
    turns = [Turns(semaphores, me, clock()) for me in (0, 1)]
    turns[0].other, turns[1].other = turns[1], turns[0]
    threads = torch.get_num_threads()

    def run(trainer: MethodTrainer, turn: Turns) -> None:
        torch.set_num_threads(threads)  # a property of the thread
        trainer.add_callback(turn)
        try:
            trainer.train()
        except BaseException:
            turn.failed = True
            turn.theirs.release()
            raise

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(run, *both) for both in zip(pair, turns, strict=True)]
        failures = [error for f in futures if (error := f.exception()) and not isinstance(error, OtherFailed)]
    if failures:
        raise failures[0]
    ours, theirs = (np.array(turn.seconds[warm_up:]).reshape(-1, group).sum(1) for turn in turns)
    return ours / theirs


def available() -> list[str]:
    """Every option of the group `method`, as Hydra finds them."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    with initialize_config_dir(str(paths.CONF), version_base="1.3"):
        return GlobalHydra.instance().config_loader().get_group_options("method")


def measure(methods: str = "", steps: int = 100, overrides: Sequence[str] = ()) -> Iterator[dict | Skipped]:
    """A row for each method.

    methods: comma-separated; all where empty. steps: optimizer steps of each, WARM_UP of them left out. Raises
    UserError for a name that is no method and for too few steps.
    """
    names = methods.split(",") if methods else available()
    if steps <= WARM_UP:
        raise UserError(f"--steps {steps} leaves nothing to measure; give more than {WARM_UP}")
    if unknown := sorted(set(names) - set(available())):
        raise UserError(f"--methods {','.join(unknown)}: no such method; use some of {', '.join(available())}")
    for name in names:
        with tempfile.TemporaryDirectory() as runs:
            adapters = [ADAPTERS[name]] if name in ADAPTERS else []
            given = ["harmful_ratio=0.1", *adapters, *overrides, f"method={name}", f"train.max_steps={steps}"]
            cfg = config.compose([*given, f"paths.runs={runs}", "train.save_steps=1000000"])
            validation.validate(cfg)
            try:
                pair = trainers(cfg)
            except UserError as error:  # a method may need what this configuration has not, such as LoRA
                yield Skipped(f"step of {name}", str(error), name in BARS)
                continue
            what = f"step of {name}, LoRA" if adapters else f"step of {name}"
            yield entry(what, "step of sft on the same batches", ratios(pair), BARS.get(name))


if __name__ == "__main__":
    sys.exit(runner.main(measure))
