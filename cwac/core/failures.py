"""Cells of a sweep that failed, wherever they ran: each process writes its own file into one folder, main() reads all.

The folder lies in `paths.runs`, which the machines of a cluster share; one file a process, because appending to one
from two machines is not atomic on a network file system.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
import re
import shlex
import shutil
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cwac.core.cache import duration
from cwac.core.errors import as_typed
from cwac.core.jsonl import append_jsonl, read_jsonl

log = logging.getLogger("cwac")
OURS = {
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher": "cwac.training.slurm.SlurmLauncher",
    "hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher": "cwac.training.ray_cluster.RayLauncher",
}
"""A launcher's class -> ours, a subclass that takes its place; Hydra itself takes launchers from plugins alone."""
SWEEPER = "hydra_plugins.hydra_optuna_sweeper._impl"
FOLDER = "CWAC_FAILURES"
"""Environment variable: the folder; launchers hand it to their processes."""


class OnSharedDisk(Callback):
    """Hydra calls it where a sweep is started, before any cell is."""

    def on_multirun_start(self, config: DictConfig, **kwargs) -> None:
        folder = Path(config.paths.runs) / f".failures-{socket.gethostname()}-{os.getpid()}"
        os.environ[FOLDER] = str(folder.absolute())
        if searches_over_seeds(config):
            logging.getLogger(SWEEPER).addFilter(not_one_seed)
        if (launcher := OmegaConf.select(config, "hydra.launcher._target_")) in OURS:
            module, name = OURS[launcher].rsplit(".", 1)
            Plugins.instance().class_name_to_class[launcher] = getattr(importlib.import_module(module), name)

    def on_multirun_end(self, config: DictConfig, **kwargs) -> None:
        """What comes next. Optuna names the best single run; over seeds the next command names the best value."""
        if not searches(config) and any_is_done():
            page = as_typed(f"python -m analysis.report --runs {config.paths.runs} --out results/local/report.html")
            log.info("the runs are in %s; what came out, on one page: %s", config.paths.runs, page)
        if not searches_over_seeds(config):
            return
        logging.getLogger(SWEEPER).removeFilter(not_one_seed)
        (Path(config.hydra.sweep.dir) / "optimization_results.yaml").unlink(missing_ok=True)
        experiment = config.hydra.runtime.choices.get("experiment")
        given = [o for o in config.hydra.overrides.task if not o.startswith(("experiment=", "paths.runs="))]
        command = as_typed(f"python -m analysis.tuning --experiment {experiment} --runs {config.paths.runs}")
        log.info(
            "the search has run; a value counts by its mean over seeds: %s",
            shlex.join([*command.split(), *given]) if experiment else "compare them in the runs' metrics.jsonl",
        )


def searches(config: DictConfig) -> bool:
    """Whether Optuna draws the cells of the sweep."""
    return "optuna" in str(OmegaConf.select(config, "hydra.sweeper._target_"))


def searches_over_seeds(config: DictConfig) -> bool:
    """Whether Optuna draws the seed among other keys; False where the axes are of no use, which Hydra then says."""
    try:
        return searches(config) and "seed" in (config.hydra.sweeper.get("params") or {})
    except OmegaConfBaseException:
        return False


def any_is_done() -> bool:
    """Whether a cell of the sweep did not fail; yes where their number is not known."""
    failed = failed_in(Path(os.environ[FOLDER]))
    return failed < int(os.environ.get(CELLS, failed + 1))


def failed_in(folder: Path) -> int:
    """How many failed cells the processes of a sweep have noted in its folder."""
    return sum(len(path.read_text().splitlines()) for path in folder.glob("*.jsonl"))


def not_one_seed(record: logging.LogRecord) -> bool:
    """Whether a line of Optuna's sweeper is not about the one run that came out best."""
    return not record.getMessage().startswith(("Best parameters", "Best value"))


def record(failure: dict) -> None:
    """failure: `num` (the cell's place in the sweep), `cell`, `message`, `code`."""
    folder = Path(os.environ[FOLDER])
    folder.mkdir(parents=True, exist_ok=True)
    append_jsonl(folder / f"{socket.gethostname()}-{os.getpid()}.jsonl", [failure])


def lost(number: int, overrides: Sequence[str], message: str) -> JobReturn:
    """Record a cell whose process ended without telling; returns what the sweeper is told of it.

    number: the cell's place in the sweep. message: what the launcher knows of the end.
    """
    cell = " ".join(overrides)
    log.error("%s: %s", cell, message)
    record(
        {
            "num": number,
            "cell": cell,
            "message": f"{message}; the same command goes on from its last checkpoint",
            "code": 1,
        }
    )
    return JobReturn(overrides=list(overrides), status=JobStatus.COMPLETED, _return_value=math.inf)


CELLS, BEGAN = "CWAC_CELLS", "CWAC_BEGAN"
"""Environment variables: how many cells the sweep has, and the time it began, in seconds since 1970."""
SHORT = 3.0
"""A cell that took fewer seconds was done before, and says nothing of how long the others take."""


def progress(seconds: float) -> str:
    """`5 of 12 cells, 1 failed; 8 min so far, about 12 min left`; called once a cell, when it has ended.

    seconds: how long the cell took. The estimate takes the cells that are left to be like those that trained, as many
    at a time. Empty where the number of cells is not known.
    """
    if CELLS not in os.environ:
        return ""
    folder = Path(os.environ[FOLDER])
    with contextlib.suppress(OSError):  # a full disk has its own error
        return told(folder, seconds)
    return ""


def told(folder: Path, seconds: float) -> str:
    """`progress`, counted in the files of `folder`, one a process."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{socket.gethostname()}-{os.getpid()}.ended").open("a") as file:
        file.write(f"{seconds:.1f}\n")
    took = [float(line) for path in folder.glob("*.ended") for line in path.read_text().split()]
    total, passed = int(os.environ[CELLS]), time.time() - float(os.environ[BEGAN])
    left, trained = max(0, total - len(took)), sum(t >= SHORT for t in took)
    ends = "" if not left else f", about {duration(passed / trained * left)} left" if trained else ", none trained yet"
    return f"{len(took)} of {total} cells, {failed_in(folder)} failed; {duration(passed)} so far{ends}"


def collect() -> list[dict]:
    """All of them, in the sweep's order; the folder is removed."""
    folder = Path(os.environ[FOLDER])
    recorded = [row for path in folder.glob("*.jsonl") for row in read_jsonl(path)]
    shutil.rmtree(folder, ignore_errors=True)
    return sorted(recorded, key=lambda row: row["num"])


MOST = 4
"""Cells that a line names one by one, where they are no product of values."""
RUN_ID = re.compile(r"[\w.+-]+-s\d+-[0-9a-f]{8}\b")


def summary(failed: Sequence[dict], arguments: Sequence[str]) -> list[str]:
    """What the end of a command says of its failed cells: each reason once, before it the cells that share it.

    failed: as `collect` gives them. arguments: those of the command; what they give to every cell names none. Two
    messages are one reason where they differ in nothing but run ids and the cells' own values; the first one is told.
    """
    total = int(os.environ.get(CELLS, 1))
    own = {id(failure): own_values(failure["cell"], arguments) for failure in failed}
    reasons: dict[str, list[dict]] = {}
    for failure in failed:
        text = RUN_ID.sub("RUN", failure["message"])
        for key, value in own[id(failure)].items():
            text = text.replace(f"{key}={value}", f"{key}=")
        reasons.setdefault(text, []).append(failure)
    lines = []
    if len(failed) > 1:
        whole = " (all of the sweep)" * (len(failed) == total)
        alike = " for the same reason" * (len(reasons) == 1)
        lines.append(f"{len(failed)} cells failed{whole}{alike}; the same command again runs only these:")
    for cells in reasons.values():
        message, others = cells[0]["message"], len({failure["message"] for failure in cells}) - 1
        if others:
            message += " (said of the first; the others' messages differ in their names and values alone)"
        names = short_names([own[id(failure)] for failure in cells])
        if len(failed) > 1:
            lines.append(f"{names} {message}")
        else:
            lines.append(f"{message} {names}" if total > 1 else message)
    return lines


def own_values(cell: str, arguments: Sequence[str]) -> dict[str, str]:
    """Key -> value of a cell's overrides, less those that the command gives to all; all of them where none is left.

    cell: the overrides in one text, each after a space; a value may hold spaces itself.
    """
    parts = re.split(r" (?=[~+]*[\w./@:-]+=)", cell)
    given = {spelt(argument) for argument in arguments}
    kept = [part for part in parts if spelt(part) not in given] or parts
    return {key: value for key, _, value in (part.partition("=") for part in kept)}


def spelt(override: str) -> str:
    """An override as it is typed: Hydra writes `false` and `null` of a cell as Python's `False` and `None`."""
    key, equals, value = override.partition("=")
    return key + equals + {"True": "true", "False": "false", "None": "null"}.get(value, value)


def short_names(cells: Sequence[dict[str, str]]) -> str:
    """`[method=sft,cwac seed=0,1]` where the cells are every combination of these values, else the first few."""
    values: dict[str, dict[str, None]] = {}
    for cell in cells:
        for key, value in cell.items():
            values.setdefault(key, {})[value] = None
    different = {tuple(sorted(cell.items())) for cell in cells}
    if len(different) == len(cells) == math.prod(map(len, values.values())) and len({*map(len, cells)}) == 1:
        return named({key: ",".join(found) for key, found in values.items()})
    shown = " ".join(map(named, cells[:MOST]))
    return shown + f" and {len(cells) - MOST} more" * (len(cells) > MOST)


def named(values: dict[str, str]) -> str:
    """`[method=sft seed=0]`; a key that is taken away (`~key`) has no value."""
    return f"[{' '.join(f'{key}={value}' if value else key for key, value in values.items())}]"
