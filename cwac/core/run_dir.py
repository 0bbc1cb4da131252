"""A run's directory: where its configuration, status, generations and metric rows live.

    runs/<run_id>/
      config.yaml env.json data.json status.json train.log train_log.jsonl checkpoint-*/ model/
      gen/<set>@<step>-<eval>.jsonl    {"id", "prompt", "response"}, after a line of warning; for the owner alone
      judge/<set>@<step>-<eval>.jsonl  {"id", "verdict", "score", "evidence", "judge"}; a model's probabilities too
      judge/<judge>/...                the same of a judge that came later (experiments/judge.py)
      metrics.jsonl                    one row per (step, metric, set, judge, eval)

A run is `done` only by its status file, written last and atomically; a folder that exists proves nothing. Each line of
a `.jsonl` ends in the CRC-32 of what stands before, so that a changed digit is found and not tabulated.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from filelock import FileLock
from omegaconf import DictConfig, OmegaConf

from cwac.core.distributed import process_rank
from cwac.core.environment import Redacting, environment, redact
from cwac.core.errors import UserError
from cwac.core.files import write_atomic
from cwac.core.identity import eval_id, run_id
from cwac.core.jsonl import append_jsonl, iter_jsonl, read_jsonl, repair

log = logging.getLogger(__name__)
STATUSES = ("running", "failed", "done")

GUARD_SLACK = 1e-3
"""What rounding of fp32 weights may add to a leak (ours); bounds at the default energy are near 0.1."""

ROW_KEY = ("step", "metric", "set", "judge", "eval")


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
        self.leads = process_rank() == 0

    # --- status -------------------------------------------------------------------------------------
    @property
    def status(self) -> dict:
        """What `status.json` says; `{"status": "new"}` where there is none or it is damaged, which is logged."""
        path = self.dir / "status.json"
        try:
            status = json.loads(path.read_text())
            if status["status"] in STATUSES:
                return status
        except FileNotFoundError:
            return {"status": "new"}
        except (OSError, ValueError, KeyError, TypeError):
            pass
        log.warning("%s is damaged, so the run counts as unfinished; it goes on from its newest checkpoint", path)
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
        """Record why a run that had begun stopped; one that had not leaves no folder, a full disk no record."""
        if self.leads and self.status["status"] == "running":
            with contextlib.suppress(OSError):
                self.write_status("failed", error=redact(f"{type(error).__name__}: {error}"))

    def finish(self, **fields) -> None:
        """Mark the run done, with one more evaluation; drops the checkpoints it no longer needs."""
        evaluations = dict(self.status.get("evaluations", {}))
        evaluations[self.eval] = sorted({*evaluations.get(self.eval, []), *self.points})
        n = sum(1 for _ in iter_jsonl(self.dir / "metrics.jsonl"))
        self.write_status("done", evaluations=evaluations, finished=time.time(), rows=n, **fields)
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
            taken = {p.name for p in self.dir.parent.glob(f"{self.id}.old-*")}  # by name: a clock may stand still
            aside = self.dir.with_name(next(n for i in itertools.count(1) if (n := f"{self.id}.old-{i}") not in taken))
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
        self._handler.setFormatter(Redacting("[%(asctime)s][%(name)s][%(levelname)s] %(message)s"))
        logging.getLogger().addHandler(self._handler)
        if not self.trained():
            write_atomic(self.dir / "config.yaml", redact(OmegaConf.to_yaml(self.cfg, resolve=True)))
            write_atomic(self.dir / "env.json", redact(json.dumps({**environment(), "model": model}, indent=1)))
            self.write_status("running", started=time.time(), pid=os.getpid())
        repair(self.dir / "metrics.jsonl")
        repair(self.dir / "train_log.jsonl")

    def record_data(self, content: dict) -> None:
        """Write `data.json`: the rows trained on and what they come from.

        Raises UserError where an unfinished run began on other rows or pools: its checkpoint has seen those. A
        finished run keeps what it was trained on.
        """
        path = self.dir / "data.json"
        try:
            before = dict(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            before = {}
        changed = [k for k in ("rows", "harmful", "pools") if k in before and before[k] != content[k]]
        if not changed:
            write_atomic(path, json.dumps(content, indent=1))
        elif self.trained():
            log.warning("%s: the data changed since it was trained (%s)", path, ", ".join(changed))
        else:
            raise UserError(
                f"{self.id} was begun on other data ({', '.join(changed)} of {path} changed); put the data back, or "
                "start over with force=true"
            )

    # --- rows ---------------------------------------------------------------------------------------
    def add_rows(self, rows: Iterable[dict]) -> None:
        """Append metric rows, each with the run's coordinates; a row that is already there is left out.

        Raises UserError for a value that is NaN or infinite: a mean over seeds would inherit it.
        """
        have = {tuple(row.get(k) for k in ROW_KEY) for row in iter_jsonl(self.dir / "metrics.jsonl")}
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
            if row["value"] is not None and not math.isfinite(row["value"]):
                raise UserError(
                    f"{row['metric']} on {row['set']} is {row['value']} at step {row['step']}: the trained model is "
                    "not finite; lower train.learning_rate or the method's weight; the run is not marked done"
                )
            key = tuple(row.get(k) for k in ROW_KEY)
            if key not in have:
                have.add(key)
                fresh.append(row)
        append_jsonl(self.dir / "metrics.jsonl", fresh)

    def rows(self) -> list[dict]:
        return read_jsonl(self.dir / "metrics.jsonl")
