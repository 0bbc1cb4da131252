"""Fine-tune an aligned chat model under a defence, and measure what is left of its safety.

python train.py model=tiny task=toy_sentiment harmful_ratio=0.1 method=cwac      one run
python train.py -m method=sft,cwac harmful_ratio=0,0.1 seed=0,1,2                a sweep
python train.py -m experiment=demo                                               a preset's grid
"""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import math
import os
import re
import shlex
import signal
import sys
import tempfile
import threading
import time
import traceback

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while this loads; main() has a word for it
os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach main(), which prints one line for what the user can mend
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_MININTERVAL", "0.5" if sys.stderr.isatty() else "15")  # a log file is no terminal

import hydra  # noqa: E402
from hydra.core.hydra_config import HydraConfig  # noqa: E402
from hydra.errors import HydraException  # noqa: E402
from hydra.types import RunMode  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402
from omegaconf.errors import OmegaConfBaseException  # noqa: E402

from cwac.core import distributed, failures, hf_hub, inputs, renamed  # noqa: E402
from cwac.core.config import CLOSED, INTERRUPTED, expand, grid, leave_the_pipe, settle  # noqa: E402
from cwac.core.environment import redact  # noqa: E402
from cwac.core.errors import UsageError, UserError, as_typed  # noqa: E402
from cwac.core.identity import local_folder, run_id  # noqa: E402
from cwac.core.keys import check_names, dashed, explain  # noqa: E402
from cwac.core.metrics import objective  # noqa: E402
from cwac.core.paths import CONF  # noqa: E402
from cwac.core.run_dir import Run  # noqa: E402
from cwac.core.tracking import Tracker  # noqa: E402
from cwac.core.validation import validate, what_bitsandbytes_is_for  # noqa: E402

log = logging.getLogger("cwac")
COLLECT = gc.get_threshold()
"""Python's own pace of looking for cycles."""
MAIN = "CWAC_MAIN"
"""Environment variable: the process that a command runs in; a launcher's others leave Ctrl-C to it."""
NEEDS = (
    ("hydra/sweeper/optuna", "searches", "tune"),
    ("hydra/launcher/submitit_slurm", "sweeps on SLURM", "slurm"),
    ("hydra/launcher/ray", "sweeps on Ray", "ray"),
)
"""An option of Hydra's that a plugin brings, what it is for, and the extra of pyproject.toml that installs it."""
LOST = ("TerminatedWorkerError", "BrokenProcessPool", "UncompletedJobError", "FailedJobError", "WorkerCrashedError")
"""What joblib, submitit and Ray say of a process that was killed under a sweep."""


class Terminated(KeyboardInterrupt):
    """SIGTERM and SIGHUP end a command as Ctrl-C does."""


def run_cell(cfg: DictConfig) -> float | None:
    """Execute one cell: skip if done, else train or resume, evaluate, mark done. Returns `objective` for sweepers."""
    validate(cfg)
    if distributed.world_size() > 1:
        from cwac.training.arguments import training_arguments

        training_arguments(cfg, Run(cfg))  # TrainingArguments bring the ranks together
    with Run(cfg) as run:
        if distributed.agree(run.done()) and not cfg.force:
            if distributed.agree(not inputs.unchanged(run)):
                from cwac.training import run as steps

                cell = steps.prepare(cfg, run)
                if run.leads:
                    steps.check_again(cell)
            not_done_with(cfg, run)
            run.warn_of_other_code()
            log.info("%s is done; nothing to do", run.id)
            return headline(run)
        try:
            return execute(cfg, run)
        except Exception as error:
            run.fail(error)
            raise


def not_done_with(cfg: DictConfig, run: Run) -> None:
    """Raises UserError where a finished run lacks what the command asks it to leave behind."""
    if cfg.keep_weights and run.leads and not (run.dir / "model").is_dir():
        raise UserError(
            f"{run.id} is done, but its weights were not kept, which keep_weights=true asks for; train it again with "
            "force=true keep_weights=true (the old run is set aside), or leave keep_weights out"
        )
    if cfg.logger.name == "wandb" and not (run.dir / "wandb").is_dir():
        log.warning(
            "%s is done and was not mirrored to wandb: logger=wandb has nothing to send; force=true trains it again",
            run.id,
        )


def execute(cfg: DictConfig, run: Run) -> float | None:
    """The story of a run: prepare, set up the method, train, evaluate, record (cwac/training/run.py)."""
    gc.set_threshold(*COLLECT)  # a training's garbage can be large
    if cfg.model.kind == "hub" and local_folder(cfg.model) is None:  # before the seconds that torch takes to import
        lacks = what_bitsandbytes_is_for(cfg)
        try:
            hf_hub.resolve(cfg.model.hub_id, cfg.model.get("revision"), "model.hub_id", cfg.model.get("license"))
        except UserError as error:
            raise (UserError(f"{error}. Besides, {lacks}") if lacks else error) from None
        if lacks:
            raise UserError(lacks)
    from cwac.training import run as steps

    cell = steps.prepare(cfg, run)
    if cell.is_trained:
        if run.leads:
            steps.evaluate_again(cell)
            return headline(run)
        return None
    with Tracker(cfg, run) as tracker:
        steps.set_up(cell)
        steps.train(cell, tracker.log)
        if not run.leads:
            return None
        steps.evaluate(cell)
        tracker.summary(run.rows())
        steps.record(cell)
    return headline(run)


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
    if os.environ.get(MAIN) != str(os.getpid()) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to every process; main() ends this one
    sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    began = time.monotonic()
    try:
        return attempt(cfg, sweep)
    finally:
        if sweep and failures.FOLDER in os.environ and (said := failures.progress(time.monotonic() - began)):
            log.info("sweep: %s", said)


def attempt(cfg: DictConfig, sweep: bool) -> float:
    """`cell`, with its failure recorded; raises it where a launcher keeps the environment to itself."""
    try:
        if sweep and distributed.world_size() > 1:
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
        check_names(HydraConfig.get().runtime.choices)  # those of a preset too
        value = run_cell(settle(renamed.update(cfg), HydraConfig.get().overrides.task))
        return math.inf if value is None else value
    except BrokenPipeError:
        raise
    except Exception as error:
        error = storage_error(error) or timed_out(error) or error
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
        elif sweep and os.environ.get(MAIN) != str(os.getpid()):  # into the log of a launcher's process
            log.error("%s: %s", overrides, error)
        elif sweep:
            log.error("%s failed; the end of the sweep says why", overrides)
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


def timed_out(error: Exception) -> UserError | None:
    """What submitit raises in a job that met its time limit once too often; None for any other error."""
    if type(error).__name__ != "UncompletedJobError":
        return None
    return UserError(
        "the job met its time limit more often than hydra.launcher.max_num_timeout allows; raise that or "
        "hydra.launcher.timeout_min; the same command then goes on from the last checkpoint"
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


def count_cells(arguments: list[str]) -> None:
    """Tell the cells of a sweep how many they are, for `failures.progress`."""
    os.environ.pop(failures.CELLS, None)
    if not {"-m", "--multirun"} & set(arguments):
        return
    try:
        number = len(grid(None, [a for a in arguments if not a.startswith("-")]))
    except Exception:  # Hydra says what is wrong with the command
        return
    os.environ[failures.CELLS], os.environ[failures.BEGAN] = str(number), str(time.time())


def what_is_left(arguments: list[str]) -> str:
    """`3 of 4 cells are left (<id>, ...)`, with where a single one goes on, and the command that does it."""
    again = redact(as_typed(shlex.join(["python", "train.py", *arguments])))
    try:
        cells = [Run(cfg) for cfg in expand(None, [a for a in arguments if not a.startswith("-")])]
        left = [run for run in cells if not run.done()]
    except Exception:  # what cannot be composed needs no count
        return f"the same command goes on with what is left: {again}"
    if len(cells) > 1:
        named = ", ".join(run.id for run in left[:3]) + (", ..." if len(left) > 3 else "")
        return f"{len(left)} of {len(cells)} cells are left ({named}); this goes on with them: {again}"
    steps = [int(p.parent.name.split("-")[1]) for run in left for p in run.dir.glob("checkpoint-*/complete.json")]
    where = f"goes on from step {max(steps)}" if steps else "starts it again, as it has no checkpoint yet"
    return f"the same command {where}: {again}"


@contextlib.contextmanager
def ends_as_by_ctrl_c():
    """SIGTERM (a scheduler, a stopped container) and SIGHUP (a terminal that closes) get the same last word."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number, frame):
        raise Terminated(number)

    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, end)
    if before[signal.SIGHUP] != signal.SIG_IGN:  # nohup
        signal.signal(signal.SIGHUP, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main() -> int:
    """Exit code: 0 if every cell is done, 1 if one failed, 2 for a configuration that cannot be run.

    128 and the signal's number where one ended it, 141 where the reader of the output has gone (`... | head`).
    """
    gc.set_threshold(50_000, 20, 50)  # composing cells makes small objects by the million, few of them in cycles
    logging.raiseExceptions = False  # a reader of the output that has gone ends no training
    arguments = sys.argv[1:]
    try:
        with ends_as_by_ctrl_c():
            try:
                return run_command()
            finally:
                sys.stdout.flush()
    except KeyboardInterrupt as stopped:
        if not distributed.process_rank():
            print(f"\ninterrupted: {what_is_left(arguments)}", file=sys.stderr)
        return 128 + stopped.args[0] if isinstance(stopped, Terminated) else INTERRUPTED
    except BrokenPipeError:
        leave_the_pipe()
        return CLOSED


def run_command() -> int:
    """Run the cells and say which failed; see `main`."""
    os.environ[MAIN] = str(os.getpid())
    with tempfile.TemporaryDirectory() as folder:
        os.environ[failures.FOLDER] = folder
        try:
            sys.argv[1:] = renamed.rewrite(sys.argv[1:])
            if wrong := dashed(sys.argv[1:]):
                raise UsageError(wrong)
            if print_cells(sys.argv[1:]):
                return 0
            count_cells(sys.argv[1:])
            cell()
        except (HydraException, OmegaConfBaseException) as error:
            print(f"error: {explain(str(error).split('Config search path')[0].strip())}", file=sys.stderr)
            if new_names := renamed.hint(str(error)):
                print(f"Remedy: {new_names}", file=sys.stderr)
            for option, what, extra in NEEDS:
                if f"'{option}'" in str(error):
                    print(f"Remedy: {what} need the extra `{extra}`: pip install -e '.[{extra}]'", file=sys.stderr)
            return 2
        except UsageError as error:  # before there is a cell
            print(f"error: {error}", file=sys.stderr)
            return 2
        except BrokenPipeError:
            raise
        except OSError as error:  # Hydra makes paths.runs before there is a cell
            if (known := storage_error(error)) is None:
                raise
            print(f"error: {known}", file=sys.stderr)
            return 1
        except Exception as error:
            if type(error).__name__ not in LOST:
                raise
            print(
                f"error: a worker of the sweep was killed, often for want of memory: {what_is_left(sys.argv[1:])} "
                "(hydra.launcher.n_jobs=1 runs one cell at a time)",
                file=sys.stderr,
            )
            return 1
        failed = failures.collect()
    # what is wrong with the command, rank 0 says
    told = [failure for failure in failed if not (distributed.process_rank() and failure["code"] == 2)]
    for line in failures.summary(told, sys.argv[1:]):
        print(f"error: {line}", file=sys.stderr)
    return max((failure["code"] for failure in failed), default=0)


if __name__ == "__main__":
    sys.exit(main())
