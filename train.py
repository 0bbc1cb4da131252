"""Fine-tune an aligned chat model under a defence, and measure what is left of its safety.

python train.py model=tiny task=toy_sentiment harmful_ratio=0.1 method=cwac      one run
python train.py -m method=sft,cwac harmful_ratio=0,0.1 seed=0,1,2                a sweep
python train.py -m experiment=demo                                               a preset's grid
"""

from __future__ import annotations

import errno
import gc
import logging
import math
import os
import re
import sys
import tempfile
import traceback

os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach main(), which prints one line for what the user can mend
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_MININTERVAL", "0.5" if sys.stderr.isatty() else "15")  # a log file is no terminal

import hydra  # noqa: E402
from hydra.core.hydra_config import HydraConfig  # noqa: E402
from hydra.errors import HydraException  # noqa: E402
from hydra.types import RunMode  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402
from omegaconf.errors import OmegaConfBaseException  # noqa: E402

from cwac import failures, ranks  # noqa: E402
from cwac.config import CONF, UsageError, UserError, expand, instantiate, objective, run_id, validate  # noqa: E402
from cwac.runs import Run, redact  # noqa: E402

log = logging.getLogger("cwac")
COLLECT = gc.get_threshold()
"""Python's own pace of looking for cycles."""


def run_cell(cfg: DictConfig) -> float | None:
    """Execute one cell: skip if done, else train or resume, evaluate, mark done. Returns `objective` for sweepers."""
    validate(cfg)
    if ranks.world_size() > 1:
        from cwac.engine import training_arguments

        training_arguments(cfg, Run(cfg))  # TrainingArguments bring the ranks together
    with Run(cfg) as run:
        if ranks.agree(run.done()) and not cfg.force:
            log.info("%s is done; nothing to do", run.id)
            return headline(run)
        try:
            return execute(cfg, run)
        except Exception as error:
            run.fail(error)
            raise


def execute(cfg: DictConfig, run: Run) -> float | None:
    import random
    from itertools import chain

    from cwac import hub

    gc.set_threshold(*COLLECT)  # a training's garbage can be large
    if cfg.model.kind == "hub":  # before the seconds that torch takes to import
        hub.resolve(cfg.model.hub_id, cfg.model.get("revision"), "model.hub_id", cfg.model.get("license"))

    import torch

    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    from transformers import set_seed
    from transformers.utils import logging as hf_logging

    from cwac.anchors import anchor_rows
    from cwac.context import open_context
    from cwac.data import hub as datasets
    from cwac.data.attack import poisoned_mix, trigger_of
    from cwac.data.harmful import assert_unseen
    from cwac.data.pools import manifest
    from cwac.data.tasks import load_task
    from cwac.data.tokenize import Rows, pad_token_id
    from cwac.engine import check_precision, total_steps, train, training_arguments
    from cwac.evaluation.evaluate import Evaluator
    from cwac.models import load_aligned, weights_hash
    from cwac.tracking import Tracker

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.WARNING)  # it tells of every file of a checkpoint in shards
    if not run.leads:
        logging.getLogger("cwac").setLevel(logging.WARNING)
    method, judge = instantiate(cfg.method), instantiate(cfg.eval.judge)
    arguments = training_arguments(cfg, run)
    check_precision(cfg, arguments, method)
    set_seed(cfg.seed)
    datasets.READ.clear()
    context = open_context(cfg)
    pools, loaded = context.pools, context.loaded
    model = loaded.model
    held_out = [*pools.validation, *chain(*pools.test.values(), *pools.over_refusal.values())]
    near = cfg.pools.get("jaccard")
    task = load_task(cfg.task, cfg.paths.data, cfg.seed, cfg.eval.split, [e.prompt for e in held_out], near)
    trigger = trigger_of(cfg, context)
    mixed, poison = poisoned_mix(cfg, task.train, context)
    train_rows = method.training_data(mixed, context, random.Random(f"method-{cfg.seed}"))
    assert_unseen(pools, task.test, train_rows, near)
    rows = Rows(loaded.tokenizer, train_rows, cfg.train.template, cfg.train.max_length)
    if not len(rows):
        raise UserError(
            f"none of the {len(train_rows)} rows has a token to learn within train.max_length={cfg.train.max_length}; "
            "raise it"
        )
    context.steps = total_steps(arguments, len(rows))
    if rows.dropped:
        log.warning(
            "%d of %d rows have a prompt of train.max_length or more and were left out", rows.dropped, len(train_rows)
        )
    poison_ids = {e.id for e in poison}
    poisoned = [e for e in train_rows if e.id in poison_ids]

    was_trained = ranks.agree(run.trained()) and not cfg.force
    if was_trained and not run.leads:
        return None
    if run.leads:
        run.start(loaded.provenance)
        recorded = {"rows": [e.id for e in train_rows], "harmful": [e.id for e in poisoned], "dropped": rows.dropped}
        licenses = {"model": cfg.model.get("license") or "unknown", "datasets": datasets.ledger(context.artifacts)}
        if trigger is not None:
            recorded["trigger"] = trigger
        run.record_data({**recorded, "pools": manifest(pools, cfg.poison, poison), **licenses})
    evaluator = Evaluator(cfg, run, model, context, method, task, judge, poisoned, trigger)
    if was_trained:
        evaluate_again(run, evaluator, loaded)
        return headline(run)
    with Tracker(cfg, run) as tracker:
        if 0 in cfg.eval.at and run.leads:
            evaluator(0, 0.0)
        method.setup(model, context)
        ranks.wait()

        def evaluate(trained, step, epoch):
            evaluator.model = trained
            evaluator(step, epoch)

        model, cost = train(
            cfg, arguments, run, model, method, rows, pad_token_id(loaded.tokenizer), evaluate, tracker.log
        )
        if not run.leads:
            return None
        evaluator.model = model
        step, epoch = cost["step"], cost["epoch"]
        evaluator(step, epoch, final=True)
        at = {"step": step, "epoch": epoch, "final": True}
        costs = [{"metric": m, "set": "train", "value": cost[m]} for m in ("seconds_per_step", "memory")]
        extra = [{"metric": "extra_data", "set": of, "value": n} for of, n in method.extra_data().items()]
        run.add_rows({**at, **row, "eval": None} for row in [*costs, *extra, *method.report(model)])
        guard = None
        if cfg.eval.drift:
            reference = load_aligned(loaded)
            try:
                anchors, held = (
                    anchor_rows(reference, context, prompts[: cfg.eval.n_drift], 16)
                    for prompts in (pools.anchors, pools.validation)
                )
            except UserError as error:
                log.warning("drift is not measured: %s", error)
            else:
                guard = evaluator.drift(reference, anchors, held, step, epoch)
        if cfg.keep_weights:
            merged = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
            merged.save_pretrained(run.dir / "model")
            loaded.tokenizer.save_pretrained(run.dir / "model")
        tracker.summary(run.rows())
        run.finish(step=step, epoch=epoch, weights_sha256=weights_hash(model), guard=guard)
    return headline(run)


def evaluate_again(run: Run, evaluator, loaded) -> None:
    """A finished run under new evaluation settings: from the kept weights, without training."""
    from transformers import AutoModelForCausalLM

    from cwac.models import SAFE

    folder = run.dir / "model"
    status = run.status
    missed = [e for e in run.points if e != status.get("epoch")]  # an imported run may not know it
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
    evaluator.model = AutoModelForCausalLM.from_pretrained(folder, **SAFE).to(evaluator.model.device)
    evaluator(status["step"], status["epoch"], final=True)
    run.finish()


def headline(run: Run) -> float | None:
    """Prints the run's final FA, HS, other and OR; returns the value of `objective`, None where it lacks a metric."""
    judges = (None, run.cfg.eval.judge.name)  # verdicts of a judge that came later steer no sweeper
    final = [r for r in run.rows() if r.get("final") and r["eval"] == run.eval and r.get("judge") in judges]
    shown = [r for r in final if r["metric"] in ("FA", "HS", "refusal", "other", "OR")]
    log.info("%s: %s", run.id, "  ".join(f"{r['metric']}[{r['set']}] {r['value']:.1f}" for r in shown))
    return objective(run.cfg.objective, final)


@hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
def cell(cfg: DictConfig) -> float | None:
    """One cell; its failure is recorded for main() and never stops the sweep's other cells."""
    sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        if sweep and ranks.world_size() > 1:
            raise UsageError(
                "torchrun and accelerate launch start the processes of one cell; start a sweep (-m, experiment=...) "
                "without them, and choose a launcher for it: hydra/launcher=local, slurm or ray_cluster"
            )
        if HydraConfig.get().runtime.choices["values"] == "tuned" and cfg["values"] != "tuned":
            log.warning(
                "values=tuned: nothing was chosen for model=%s method=%s (no conf/chosen/tuned/%s_%s.yaml); its "
                "official values are used, and its rows say so",
                *(cfg.model.name, cfg.method.name) * 2,
            )
        value = run_cell(cfg)
        return math.inf if value is None else value
    except Exception as error:
        error = storage_error(error) or error
        expected = isinstance(error, UserError) and not cfg.debug
        overrides = " ".join(HydraConfig.get().overrides.task)
        failure = {
            "num": HydraConfig.get().job.num if sweep else 0,
            "cell": overrides,
            "message": redact(str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"),
            "code": 2 if isinstance(error, UsageError) else 1,
        }
        if not expected:
            log.error("%s", redact("".join(traceback.format_exception(error))))
        elif sweep:
            log.error("%s: %s", overrides, error)
        if failures.FOLDER not in os.environ:  # a launcher that keeps the environment to itself has to tell
            raise
        failures.record(failure)
        return math.inf  # the worst a sweeper can be told; NaN or None, a failed trial, ends Optuna's whole search


STORAGE = "ENOSPC EDQUOT EROFS EACCES EPERM EIO EFBIG EEXIST ENOTDIR ESTALE ENAMETOOLONG".split()


def storage_error(error: Exception) -> UserError | None:
    """What a disk that is full, read-only or gone means to the user; None for any other error."""
    code = errno.errorcode.get(getattr(error, "errno", None) or 0)
    # safetensors and torch.save have error classes of their own
    inside = re.search(r"os error (\d+)|No space left|PytorchStreamWriter failed", str(error))
    if code not in STORAGE and not inside:
        return None
    said = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else str(error).splitlines()[0]
    return UserError(
        f"writing failed ({said}); free space or permit writing, or choose other folders with paths.runs and "
        "paths.artifacts; the same command then goes on from the last checkpoint"
    )


def print_cells(arguments: list[str]) -> bool:
    """`-m ... --cfg job`, which Hydra itself refuses: the configuration of every cell, as a stream of YAML documents.

    Returns False where the arguments ask for something else.
    """
    if not {"-m", "--multirun"} & set(arguments) or arguments[-2:] != ["--cfg", "job"]:
        return False
    cells = expand(None, [a for a in arguments[:-2] if not a.startswith("-")])
    print("---\n".join(f"# {run_id(cfg)}\n{OmegaConf.to_yaml(cfg)}" for cfg in cells), end="")
    return True


def main() -> int:
    """Exit code: 0 if every cell is done, 1 if one failed, 2 for a configuration that cannot be run."""
    gc.set_threshold(50_000, 20, 50)  # composing cells makes small objects by the million, few of them in cycles
    with tempfile.TemporaryDirectory() as folder:
        os.environ[failures.FOLDER] = folder
        try:
            if print_cells(sys.argv[1:]):
                return 0
            cell()
        except (HydraException, OmegaConfBaseException) as error:
            print(f"error: {str(error).split('Config search path')[0].strip()}", file=sys.stderr)
            if "hydra/sweeper/optuna" in str(error):
                print("Remedy: searches need the extra `tune`: pip install -e '.[tune]'", file=sys.stderr)
            return 2
        except OSError as error:  # Hydra makes paths.runs before there is a cell
            if (known := storage_error(error)) is None:
                raise
            print(f"error: {known}", file=sys.stderr)
            return 1
        failed = failures.collect()
    if len(failed) > 1:
        print(f"error: {len(failed)} cells failed; the same command again runs only these:", file=sys.stderr)
    for failure in failed:
        if ranks.rank() and failure["code"] == 2:  # what is wrong with the command, rank 0 says
            continue
        where = f"[{failure['cell']}] " if len(failed) > 1 else ""
        print(f"error: {where}{failure['message']}", file=sys.stderr)
    return max((failure["code"] for failure in failed), default=0)


if __name__ == "__main__":
    sys.exit(main())
