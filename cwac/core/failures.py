"""Cells of a sweep that failed, wherever they ran: each process writes its own file into one folder, main() reads all.

The folder lies in `paths.runs`, which the machines of a cluster share; one file a process, because appending to one
from two machines is not atomic on a network file system.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import socket
from pathlib import Path

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from cwac.core.jsonl import append_jsonl, read_jsonl

log = logging.getLogger("cwac")
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

    def on_multirun_end(self, config: DictConfig, **kwargs) -> None:
        """Optuna names the best single run; over seeds the next command names the best value."""
        if not searches_over_seeds(config):
            return
        logging.getLogger(SWEEPER).removeFilter(not_one_seed)
        (Path(config.hydra.sweep.dir) / "optimization_results.yaml").unlink(missing_ok=True)
        experiment = config.hydra.runtime.choices.get("experiment")
        given = [o for o in config.hydra.overrides.task if not o.startswith(("experiment=", "paths.runs="))]
        command = f"python -m analysis.tuning --experiment {experiment} --runs {config.paths.runs}"
        log.info(
            "the search has run; a value counts by its mean over seeds: %s",
            shlex.join([*command.split(), *given]) if experiment else "compare them in the runs' metrics.jsonl",
        )


def searches_over_seeds(config: DictConfig) -> bool:
    sweeper = config.hydra.sweeper
    return "optuna" in str(sweeper.get("_target_")) and "seed" in (sweeper.get("params") or {})


def not_one_seed(record: logging.LogRecord) -> bool:
    """Whether a line of Optuna's sweeper is not about the one run that came out best."""
    return not record.getMessage().startswith(("Best parameters", "Best value"))


def record(failure: dict) -> None:
    """failure: `num` (the cell's place in the sweep), `cell`, `message`, `code`."""
    folder = Path(os.environ[FOLDER])
    folder.mkdir(parents=True, exist_ok=True)
    append_jsonl(folder / f"{socket.gethostname()}-{os.getpid()}.jsonl", [failure])


def collect() -> list[dict]:
    """All of them, in the sweep's order; the folder is removed."""
    folder = Path(os.environ[FOLDER])
    recorded = [row for path in folder.glob("*.jsonl") for row in read_jsonl(path)]
    shutil.rmtree(folder, ignore_errors=True)
    return sorted(recorded, key=lambda row: row["num"])
