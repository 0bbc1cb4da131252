"""The five steps of a run, in the order in which `train.py` calls them: prepare, set up, train, evaluate, record.

One `Cell` is handed from step to step, and each step finds in it what the earlier steps have made.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain

from omegaconf import DictConfig
from torch import nn
from transformers import TrainingArguments, set_seed
from transformers.utils import logging as hf_logging

from cwac.constraints.anchors import anchor_rows
from cwac.core import distributed, inputs
from cwac.core.cache import digest
from cwac.core.config import instantiate
from cwac.core.errors import UserError
from cwac.core.run_dir import Run
from cwac.data import hf_datasets
from cwac.data.examples import Example
from cwac.data.mix import check_share
from cwac.data.near_duplicates import assert_unseen
from cwac.data.pools import manifest
from cwac.data.tasks import Task, load_task
from cwac.data.tokenize import Rows, pad_token_id
from cwac.evaluation.evaluate import Evaluator
from cwac.evaluation.judge import Judge
from cwac.evaluation.vllm_engine import check_available
from cwac.methods.base import Context, Method, summary
from cwac.models.adapters import merged
from cwac.models.loading import load_aligned, load_kept, weights_hash
from cwac.training import engine
from cwac.training.allocator import keep_freed_memory
from cwac.training.arguments import (
    check_precision,
    evaluation_steps,
    plain_rate,
    total_steps,
    training_arguments,
    warn_of_plain_rate,
)
from cwac.training.attack import poisoned_mix, trigger_of
from cwac.training.context import open_context
from cwac.training.threads import use_threads

log = logging.getLogger(__name__)


@dataclass
class Cell:
    """One cell of a grid, from its configuration to its trained model."""

    cfg: DictConfig
    run: Run
    method: Method
    judge: Judge
    arguments: TrainingArguments
    context: Context
    task: Task
    rows: Rows
    """The rows to train on, as token ids."""
    examples: list[Example]
    """The same rows as text, including those that were too long to be trained on."""
    poison: list[Example]
    """All rows that the attacker could choose from."""
    poisoned: list[Example]
    """The attacker's rows among `examples`."""
    trigger: str | None
    """Words in front of every row of the poison; None without a trigger."""
    evaluator: Evaluator = field(init=False)
    model: nn.Module = field(init=False)
    """The model that is trained, set by `set_up`. After `train`: with unsharded parameters, and on rank 0 only."""
    cost: dict = field(init=False)
    """Where training ended (`step`, `epoch`) and what it cost (`seconds_per_step`, `memory` in MiB)."""
    guard: bool | None = None
    """Whether the method's constraint held; None where the method claims none or drift was not measured."""

    @property
    def is_trained(self) -> bool:
        """Whether an earlier call of the same command has trained this cell; all ranks agree."""
        return distributed.agree(self.run.trained()) and not self.cfg.force


def prepare(cfg: DictConfig, run: Run) -> Cell:
    """Step 1: the method, the judge, the model, the task, and the rows to train on; nothing is written yet."""
    use_threads(cfg.threads)
    quieten(run.leads)
    method, judge = instantiate(cfg.method), instantiate(cfg.eval.judge)
    arguments = training_arguments(cfg, run)
    if arguments.device.type == "cpu":  # beside a GPU, the host's memory is better given back
        keep_freed_memory()
    check_precision(cfg, arguments, method)
    if cfg.eval.engine == "vllm":
        check_available(cfg.eval.vllm.python)
    set_seed(cfg.seed)
    hf_datasets.READ.clear()
    hf_datasets.ASKED.clear()
    context = open_context(cfg)
    pools, near = context.pools, cfg.pools.get("jaccard")
    held_out = [*pools.validation, *chain(*pools.test.values(), *pools.over_refusal.values())]
    task = load_task(cfg.task, cfg.paths.data, cfg.seed, cfg.eval.split, [e.prompt for e in held_out], near)
    trigger = trigger_of(cfg, context)
    mixed, poison = poisoned_mix(cfg, task.train, context)
    examples = method.training_data(mixed, context, random.Random(f"method-{cfg.seed}"))
    assert_unseen(pools, task.test, examples, near)
    rows = encode(cfg, context, examples)
    check_mix(cfg, rows, mixed, {e.id for e in poison})
    context.steps = total_steps(arguments, len(rows))
    evaluation_steps(cfg.eval.at, arguments, len(rows))
    ids = {e.id for e in poison}
    poisoned = [e for e in examples if e.id in ids]
    return Cell(cfg, run, method, judge, arguments, context, task, rows, examples, poison, poisoned, trigger)


def quieten(leads: bool) -> None:
    """Silence the libraries' messages on the console, and on all ranks but the first also our own."""
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.WARNING)  # it logs every file of a sharded checkpoint
    if not leads:
        logging.getLogger("cwac").setLevel(logging.WARNING)


def encode(cfg: DictConfig, context: Context, examples: list[Example]) -> Rows:
    """The rows as token ids; raises UserError where none of them has a token to learn."""
    rows = Rows(context.tokenizer, examples, cfg.train.template, cfg.train.max_length)
    if not len(rows):
        raise UserError(
            f"none of the {len(examples)} rows has a token to learn within train.max_length={cfg.train.max_length}; "
            "raise it"
        )
    if rows.dropped:
        log.warning(
            "%d of %d rows have a prompt of train.max_length or more and were left out", rows.dropped, len(examples)
        )
    return rows


def check_mix(cfg: DictConfig, rows: Rows, mixed: list[Example], poison: set[str]) -> None:
    """Raises UserError if the rows left out as too long change the harmful ratio from the one in the run's name.

    mixed: the rows of the task and of the poison, without those that a method adds. poison: ids of the poison's rows.
    """
    ids = {e.id for e in mixed}
    kept = [id for id in rows.kept if id in ids]
    harmful = sum(id in poison for id in kept)
    of = len(kept) if cfg.mix_mode == "replace" else len(kept) - harmful
    if len(kept) < len(mixed):
        found = (
            f"train.max_length={cfg.train.max_length} leaves out {len(mixed) - len(kept)} of {len(mixed)} rows, and "
            f"of the others {harmful} are harmful and {len(kept) - harmful} are not"
        )
        check_share(harmful, of, cfg.harmful_ratio, found)


def start(cell: Cell) -> None:
    """Record what the run starts from, and create the evaluator that measures it."""
    cfg, run, context = cell.cfg, cell.run, cell.context
    if run.leads:
        run.start(context.loaded.provenance)
    model = context.loaded.model
    cell.evaluator = Evaluator(
        cfg, run, model, context, cell.method, cell.task, cell.judge, cell.poisoned, cell.trigger
    )
    if run.leads:
        run.record_data(content(cell))
        inputs.record(run, hf_datasets.ASKED)


def content(cell: Cell) -> dict:
    """The content of `data.json`: ids and hashes of the training rows, of the pools and of what is asked."""
    cfg, context = cell.cfg, cell.context
    found = {
        "rows": [e.id for e in cell.examples],
        "harmful": [e.id for e in cell.poisoned],
        "dropped": cell.rows.dropped,
        # a hash of token ids changes with a row's text, with the chat template and with the tokenizer
        "sha256": {"encoded_rows": digest({"rows": cell.rows.rows})},
        "asked": {cell.run.eval: cell.evaluator.requests_hash()},
        "pools": manifest(context.pools, cfg.poison, cell.poison),
        "model": cfg.model.get("license") or "unknown",
        "datasets": hf_datasets.ledger(context.artifacts),
    }
    return found if cell.trigger is None else {**found, "trigger": cell.trigger}


def check_again(cell: Cell) -> None:
    """Check that the rows of a finished run are still the same although its data files changed.

    Called after `prepare`, instead of the other steps. Raises a UserError that names what changed. If nothing did, the
    recorded state of the files is updated and the run's results remain valid.
    """
    cfg, run = cell.cfg, cell.run
    cell.evaluator = Evaluator(
        cfg, run, cell.context.loaded.model, cell.context, cell.method, cell.task, cell.judge, cell.poisoned
    )
    if changed := run.changed(content(cell)):
        raise UserError(
            f"{run.id} is done, but with other data: {', '.join(changed)} changed since (paths.data="
            f"{cfg.paths.data}); put the data back, or train it again with force=true (the old run is set aside)"
        )
    inputs.record(run, hf_datasets.ASKED)


def set_up(cell: Cell) -> None:
    """Step 2: evaluate the aligned model if `eval.at` contains 0, then call the method's `setup`."""
    start(cell)
    if 0 in cell.cfg.eval.at and cell.run.leads:
        cell.evaluator(0, 0.0)
    if cell.run.leads and cell.method.wants_own_rate:
        warn_of_plain_rate(cell.method, cell.arguments.learning_rate, plain_rate(cell.cfg.model.name))
    model = cell.context.loaded.model
    cell.model = cell.evaluator.model = cell.method.setup(model, cell.context) or model
    log.info("%s", summary(cell.method, cell.model))
    distributed.wait()


def train(cell: Cell, track: Callable[[dict], None]) -> None:
    """Step 3: the optimizer steps, with evaluations in between. track(row) receives each line of the loss log."""
    loaded, evaluator = cell.context.loaded, cell.evaluator

    def evaluate_on_the_way(model: nn.Module, step: int, epoch: float) -> None:
        evaluator.model = model
        evaluator(step, epoch)

    cell.model, cell.cost = engine.train(
        cell.cfg,
        cell.arguments,
        cell.run,
        cell.model,
        cell.method,
        cell.rows,
        pad_token_id(loaded.tokenizer),
        evaluate_on_the_way,
        track,
    )


def evaluate(cell: Cell) -> None:
    """Step 4: evaluate the trained model, record the method's cost and own reports, and measure the model's drift."""
    evaluator, method, model = cell.evaluator, cell.method, cell.model
    evaluator.model = model
    step, epoch = cell.cost["step"], cell.cost["epoch"]
    evaluator(step, epoch, final=True)
    at = {"step": step, "epoch": epoch, "final": True}
    costs = [{"metric": m, "set": "train", "value": cell.cost[m]} for m in ("seconds_per_step", "memory")]
    extra = [{"metric": "extra_data", "set": of, "value": n} for of, n in (method.extra_data() or {"none": 0}).items()]
    cell.run.add_rows({**at, **row, "eval": None} for row in [*costs, *extra, *method.report(model)])
    if not cell.cfg.eval.drift:
        return
    context, n = cell.context, cell.cfg.eval.n_drift
    reference = load_aligned(context.loaded, as_trained=True)
    try:
        anchors, held_out = (
            anchor_rows(reference, context, prompts[:n], 16)
            for prompts in (context.pools.anchors, context.pools.validation)
        )
    except UserError as error:
        log.warning("drift is not measured: %s", error)
    else:
        cell.guard = evaluator.drift(reference, anchors, held_out, step, epoch)


def record(cell: Cell) -> None:
    """Step 5: save the weights if `keep_weights` is set, and mark the run done."""
    model, run = cell.model, cell.run
    trained = weights_hash(model)  # hashed before an adapter is merged, so that saving changes nothing
    if cell.cfg.keep_weights:
        if hasattr(model, "peft_config"):
            model.save_pretrained(run.dir / "adapter")
        merged(model).save_pretrained(run.dir / "model")
        cell.context.tokenizer.save_pretrained(run.dir / "model")
    run.finish(step=cell.cost["step"], epoch=cell.cost["epoch"], weights_sha256=trained, guard=cell.guard)


def evaluate_again(cell: Cell) -> None:
    """Evaluate a trained run under new evaluation settings, from its saved weights; replaces steps 2 to 5.

    Raises UserError where the weights were not saved, or where `eval.at` asks for points before the end of training.
    """
    start(cell)
    run, evaluator = cell.run, cell.evaluator
    folder, status = run.dir / "model", run.status
    missed = [e for e in run.points if e != status.get("epoch")]  # an imported run may have no epoch
    if missed:
        raise UserError(
            f"{run.id} is trained; eval.at={missed} asks for points on the way, which are gone: leave eval.at as it "
            "was, or train again with force=true (the old run is set aside)"
        )
    if not folder.is_dir():
        raise UserError(
            f"{run.id} is trained, but not evaluated with these eval settings, and its weights were not kept; train "
            "it again with force=true keep_weights=true (the old run is set aside)"
        )
    evaluator.model = load_kept(folder, cell.context.loaded).to(evaluator.model.device)
    if cell.cfg.eval.drift and not (run.dir / "drift.json").is_file():
        log.warning("%s: drift is measured at the end of a training alone; force=true trains it again", run.id)
    evaluator(status["step"], status["epoch"], final=True)
    run.finish()
