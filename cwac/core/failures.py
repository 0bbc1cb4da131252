"""Cells of a sweep that failed, wherever they ran: each process writes its own file into one folder, main() reads all.

The folder lies in `paths.runs`, which the machines of a cluster share; one file a process, because appending to one
from two machines is not atomic on a network file system.
"""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from cwac.core.jsonl import append_jsonl, read_jsonl

FOLDER = "CWAC_FAILURES"
"""Environment variable: the folder; launchers hand it to their processes."""


class OnSharedDisk(Callback):
    """Hydra calls it where a sweep is started, before any cell is."""

    def on_multirun_start(self, config: DictConfig, **kwargs) -> None:
        folder = Path(config.paths.runs) / f".failures-{socket.gethostname()}-{os.getpid()}"
        os.environ[FOLDER] = str(folder.absolute())


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
