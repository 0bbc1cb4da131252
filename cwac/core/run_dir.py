"""A run's directory, which holds its configuration, status, generations and metric rows.

    runs/<run_id>/
      config.yaml env.json data.json status.json train.log train_log.jsonl checkpoint-*/ model/
      gen/<set>@<step>-<eval>.jsonl    {"id", "prompt", "response"}, after a line of warning; for the owner alone
      judge/<set>@<step>-<eval>.jsonl  {"id", "verdict", "score", "evidence", "judge"}; a model's probabilities too
      judge/<judge>/...                the same of a judge that came later (experiments/judge.py)
      metrics.jsonl                    one row per (step, metric, set, judge, eval)

A run is `done` only if its status file says so, which is written last and atomically; that the folder exists proves
nothing. Each line of a `.jsonl` file ends in the CRC-32 of the text before it, so that a changed digit is detected and
reaches no table.
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

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from cwac.core import method_code
from cwac.core.distributed import process_rank
from cwac.core.environment import Redacting, environment, redact
from cwac.core.errors import UserError
from cwac.core.files import write_atomic
from cwac.core.identity import eval_id, flatten, run_id
from cwac.core.jsonl import append_jsonl, iter_jsonl, read_jsonl, repair

log = logging.getLogger(__name__)
STATUSES = ("running", "failed", "done")

GUARD_SLACK = 1e-3
"""How far a leak may exceed its bound because fp32 weights are rounded (ours). With the default energy, bounds are
near 0.1."""

ROW_KEY = ("step", "metric", "set", "judge", "eval")


def is_held(folder: Path) -> bool:
    """Whether a process holds the lock of the run in this folder. A `running` run without a lock was killed."""
    lock = folder.parent / f".{folder.name}.lock"
    if not lock.exists():
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # a disk that is read only
        return False


class Run:
    """One cell of a grid on disk. It is a context manager, which holds the cell's lock while it is open.

    Where several ranks train the cell, only rank 0 takes the lock and writes files.
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
        """The content of `status.json`; `{"status": "new"}` where it is missing or damaged. Damage is logged."""
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
        """The content of `env.json`; {} where it is missing or damaged."""
        try:
            return json.loads((self.dir / "env.json").read_text())
        except (OSError, ValueError):
            return {}

    def warn_of_other_code(self) -> None:
        """Say in one line that the method's code is not what this run was made with, and how to train it again.

        Nothing is said where that is unknown, as of a run from before it was recorded.
        """
        before, now = self.environment.get("method_code"), method_code.of(self.cfg.method.get("_target_"))
        if self.leads and before is not None and now is not None and before != now:
            log.warning(
                "%s was %s with other code of method=%s, which has changed since; force=true trains it again",
                self.id,
                "trained" if self.trained() else "begun",
                self.cfg.method.name,
            )

    def done(self) -> bool:
        """Whether the run is trained, and evaluated with the present settings at every epoch of `eval.at`."""
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
        """Record the error that stopped a run, if the run had begun.

        A run that had not begun leaves no folder. Where the disk is full, nothing is recorded.
        """
        if self.leads and self.status["status"] == "running":
            with contextlib.suppress(OSError):
                self.write_status("failed", error=redact(f"{type(error).__name__}: {error}"))

    def finish(self, **fields) -> None:
        """Mark the run done, add the present evaluation to its status, and delete its checkpoints."""
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
        """Write the run's configuration and environment. `force=true` first moves an old run of the same id away.

        model: where the starting weights came from (`Loaded.provenance`). Raises UserError where an unfinished run
        began from another commit of a hub model without a pinned revision, since its checkpoint belongs to other
        starting weights.
        """
        if self.cfg.force and self.dir.exists():
            taken = {p.name for p in self.dir.parent.glob(f"{self.id}.old-*")}  # numbered: times may repeat
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
        goes_on = self.trained() or any(self.dir.glob("checkpoint-*/complete.json"))
        self.dir.mkdir(parents=True, exist_ok=True)
        self._handler = logging.FileHandler(self.dir / "train.log")
        self._handler.setFormatter(Redacting("[%(asctime)s][%(name)s][%(levelname)s] %(message)s"))
        logging.getLogger().addHandler(self._handler)
        code = method_code.of(self.cfg.method.get("_target_"))
        if goes_on:
            self.warn_of_other_code()
            code = method_code.joined(self.environment.get("method_code"), code)
        if not self.trained():
            write_atomic(self.dir / "config.yaml", redact(OmegaConf.to_yaml(self.cfg, resolve=True)))
            settings = flatten(OmegaConf.to_container(self.cfg, resolve=True))
            targets = [value for key, value in settings.items() if key.endswith("._target_")]
            made = {**environment(targets), "method_code": code, "model": model}
            write_atomic(self.dir / "env.json", redact(json.dumps(made, indent=1)))
            self.write_status("running", started=time.time(), pid=os.getpid())
        repair(self.dir / "metrics.jsonl")
        repair(self.dir / "train_log.jsonl")

    def changed(self, content: dict) -> list[str]:
        """Names of the entries that differ between `content` and `data.json`.

        An entry that only one of the two has is not counted as a difference, except for a recorded `rows`, `harmful`
        or `pools` that `content` lacks.
        """
        before = self.data
        found = [key for key in ("rows", "harmful", "pools") if key in before and before[key] != content.get(key)]
        for key in ("sha256", "asked"):
            old = before.get(key) or {}
            found += [name for name, value in (content.get(key) or {}).items() if old.get(name, value) != value]
        return found

    @property
    def data(self) -> dict:
        """The content of `data.json`; {} where it is missing or damaged."""
        try:
            return dict(json.loads((self.dir / "data.json").read_text()))
        except (OSError, ValueError, TypeError):
            return {}

    def record_data(self, content: dict) -> None:
        """Write `data.json`: ids and hashes of the training rows, of their origins, and of the evaluation's requests.

        Raises UserError where the run began or was trained on other data, since its checkpoint and its weights come
        from those.
        """
        path = self.dir / "data.json"
        if changed := self.changed(content):
            began = "trained" if self.trained() else "begun"
            raise UserError(
                f"{self.id} was {began} on other data ({', '.join(changed)} of {path} changed); put the data back, or "
                "start over with force=true (the old run is set aside)"
            )
        asked = {**(self.data.get("asked") or {}), **(content.get("asked") or {})}
        write_atomic(path, redact(json.dumps({**content, **({"asked": asked} if asked else {})}, indent=1)))

    # --- rows ---------------------------------------------------------------------------------------
    def add_rows(self, rows: Iterable[dict]) -> None:
        """Append metric rows, each completed by the run's id, model, method, task, ratio and seed.

        A row whose `ROW_KEY` is already there is skipped. Raises UserError for a value that is NaN or infinite, since
        every mean over seeds would become so too.
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
