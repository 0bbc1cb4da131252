"""A run's directory: where its configuration, status, generations and metric rows live.

    runs/<run_id>/
      config.yaml env.json data.json status.json train.log train_log.jsonl checkpoint-*/ model/
      gen/<set>@<step>-<eval>.jsonl    {"id", "prompt", "response"}
      judge/<set>@<step>-<eval>.jsonl  {"id", "verdict", "score", "evidence", "judge"}; a model's probabilities too
      judge/<judge>/...                the same of a judge that came later (experiments/judge.py)
      metrics.jsonl                    one row per (step, metric, set, judge, eval)

A run is `done` only by its status file, written last and atomically; a folder that exists proves nothing.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from filelock import FileLock
from omegaconf import DictConfig, OmegaConf

from cwac.artifacts import write_atomic
from cwac.config import UserError, eval_id, run_id
from cwac.ranks import rank

log = logging.getLogger(__name__)
ROW_KEY = ("step", "metric", "set", "judge", "eval")
PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "hydra-core", "numpy")


class Run:
    """One cell of a grid on disk. Use as a context manager: it holds the cell's lock.

    Where several ranks train the cell, rank 0 alone locks and writes.
    """

    def __init__(self, cfg: DictConfig):
        self.cfg = cfg
        self.id = run_id(cfg)
        self.eval = eval_id(cfg)
        self.points = [float(e) for e in cfg.eval.at]
        self.dir = Path(cfg.paths.runs) / self.id
        self._lock = FileLock(Path(cfg.paths.runs) / f".{self.id}.lock")
        self._handler: logging.Handler | None = None
        self.leads = rank() == 0

    # --- status -------------------------------------------------------------------------------------
    @property
    def status(self) -> dict:
        """What `status.json` says; `{"status": "new"}` where there is none or it is damaged."""
        try:
            return json.loads((self.dir / "status.json").read_text())
        except (OSError, ValueError):
            return {"status": "new"}

    @property
    def environment(self) -> dict:
        """What `env.json` says; {} where there is none or it is damaged."""
        try:
            return json.loads((self.dir / "env.json").read_text())
        except (OSError, ValueError):
            return {}

    def done(self) -> bool:
        """Trained, and evaluated with this evaluation's settings at every point on the way that it asks for."""
        status = self.status
        measured = status.get("evaluations", {}).get(self.eval)
        return status["status"] == "done" and measured is not None and set(self.points) <= set(measured)

    def trained(self) -> bool:
        return self.status["status"] == "done"

    def write_status(self, status: str, **fields) -> None:
        old = {k: v for k, v in self.status.items() if k != "error"} if self.status["status"] != "new" else {}
        write_atomic(
            self.dir / "status.json", json.dumps({**old, **fields, "status": status, "run_id": self.id}, indent=1)
        )

    def fail(self, error: Exception) -> None:
        """Record why a run that had begun stopped; one that had not leaves no folder."""
        if self.leads and self.status["status"] == "running":
            self.write_status("failed", error=f"{type(error).__name__}: {error}")

    def finish(self, **fields) -> None:
        """Mark the run done, with one more evaluation; drops the checkpoints it no longer needs."""
        evaluations = dict(self.status.get("evaluations", {}))
        evaluations[self.eval] = sorted({*evaluations.get(self.eval, []), *self.points})
        self.write_status("done", evaluations=evaluations, finished=time.time(), **fields)
        for checkpoint in self.dir.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)

    # --- opening ------------------------------------------------------------------------------------
    def __enter__(self) -> Run:
        if self.leads:
            self.dir.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        return self

    def __exit__(self, kind, value, traceback) -> None:
        if self._handler is not None:
            logging.getLogger().removeHandler(self._handler)
            self._handler.close()
        self._lock.release()

    def start(self, model: dict | None = None) -> None:
        """Write what the run is and where it runs; `force=true` sets an old run of this identity aside first.

        model: where the starting weights came from (`Loaded.provenance`). Raises UserError where an unfinished run
        began from another commit of an unpinned hub model: its checkpoint would go on from other weights.
        """
        if self.cfg.force and self.dir.exists():
            aside = self.dir.with_name(f"{self.id}.old-{int(time.time())}")
            self.dir.rename(aside)
            log.info("force=true: the earlier run was moved to %s", aside)
        before, now = self.environment.get("model") or {}, model or {}
        moved = before.get("revision") != now.get("revision")
        if moved and before.get("hub_id") == now.get("hub_id") is not None and not self.trained():
            raise UserError(
                f"{self.id} was begun from commit {before['revision']} of {now['hub_id']}, and the hub now serves "
                f"{now['revision']}; pin model.revision={before['revision']}, or start over with force=true"
            )
        self.dir.mkdir(parents=True, exist_ok=True)
        self._handler = logging.FileHandler(self.dir / "train.log")
        self._handler.setFormatter(logging.Formatter("[%(asctime)s][%(name)s][%(levelname)s] %(message)s"))
        logging.getLogger().addHandler(self._handler)
        if not self.trained():
            write_atomic(self.dir / "config.yaml", OmegaConf.to_yaml(self.cfg, resolve=True))
            write_atomic(self.dir / "env.json", json.dumps({**environment(), "model": model}, indent=1))
            self.write_status("running", started=time.time(), pid=os.getpid())
        repair(self.dir / "metrics.jsonl")
        repair(self.dir / "train_log.jsonl")

    # --- rows ---------------------------------------------------------------------------------------
    def add_rows(self, rows: Iterable[dict]) -> None:
        """Append metric rows, each with the run's coordinates; a row that is already there is left out."""
        have = {tuple(row.get(k) for k in ROW_KEY) for row in read_jsonl(self.dir / "metrics.jsonl")}
        fixed = {
            "run_id": self.id,
            "model": self.cfg.model.name,
            "method": self.cfg.method.name,
            "task": self.cfg.task.name,
            "harmful_ratio": float(self.cfg.harmful_ratio),
            "seed": int(self.cfg.seed),
            "values": self.cfg["values"],
        }
        fresh = []
        for row in rows:
            row = {**fixed, "judge": None, "eval": self.eval, "stderr": None, "n": None, **row, "time": time.time()}
            key = tuple(row.get(k) for k in ROW_KEY)
            if key not in have:
                have.add(key)
                fresh.append(row)
        append_jsonl(self.dir / "metrics.jsonl", fresh)

    def rows(self) -> list[dict]:
        return read_jsonl(self.dir / "metrics.jsonl")


def append_jsonl(path: Path, rows: list[dict]) -> None:
    """Append all rows in one write and flush them to disk."""
    if not rows:
        return
    with path.open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())


def read_jsonl(path: Path) -> list[dict]:
    """The complete rows of a file; [] where there is none. A last line cut by a crash is not read."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]  # a complete line ends in a newline


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """Write a whole file of rows at once, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


def repair(path: Path) -> None:
    """Cut off a last line that a crash left half-written."""
    if path.exists():
        content = path.read_text()
        if content and not content.endswith("\n"):
            write_atomic(path, content[: content.rfind("\n") + 1])


@functools.cache
def git(*arguments: str) -> str | None:
    """What git prints, asked once a process: a run is made by the code that was loaded, not by a later commit."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def environment() -> dict:
    """Where and with what a run was made: git commit, versions, machine, command."""
    return {
        "git_commit": git("rev-parse", "HEAD"),
        "git_dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "command": sys.argv,
    }
