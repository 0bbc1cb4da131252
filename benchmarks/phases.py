"""One run of train.py and the CPU and wall-clock seconds of its parts; `benchmarks/run.py` starts it.

python <path>/benchmarks/phases.py OUT.json [overrides]      from the root of the tree whose train.py is to run

Stands alone, so that the tree may be another commit than this file's. A part's seconds are its own, without those of
the parts within it; of a tree that lacks the functions below, all is `start`.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path

PARTS = {
    "prepare": "cwac.training.run:prepare",
    "setup": "cwac.training.run:set_up",
    "training": "cwac.training.run:train",
    "answers": "cwac.evaluation.evaluate:Evaluator._answers",
    "verdicts": "cwac.evaluation.evaluate:judge_answers",
    "losses": "cwac.evaluation.evaluate:Evaluator._losses",
    "drift": "cwac.training.run:evaluate",
    "record": "cwac.training.run:record",
}
"""Name -> the function whose seconds they are. What is in none is `start`: Python, imports, the configuration."""


class Clock:
    """CPU seconds of all threads, and wall-clock seconds, of nested parts."""

    def __init__(self):
        self.spent: dict[str, list[float]] = {name: [0.0, 0.0] for name in ("start", *PARTS)}
        self._open = ["start"]
        self._at = [0.0, time.perf_counter()]  # CPU seconds count from the start of the process

    def _turn(self) -> None:
        """What has passed since the last turn belongs to the innermost part."""
        now = [time.process_time(), time.perf_counter()]
        spent = self.spent[self._open[-1]]
        for i in range(2):
            spent[i] += now[i] - self._at[i]
        self._at = now

    def timed(self, name: str, function):
        def call(*args, **kwargs):
            self._turn()
            self._open.append(name)
            try:
                return function(*args, **kwargs)
            finally:
                self._turn()
                self._open.pop()

        return call

    def read(self) -> dict[str, list[float]]:
        self._turn()
        return self.spent


def measured(out: str, overrides: list[str]) -> int:
    """Returns the exit status of train.py; `out` gets name -> [CPU seconds, wall-clock seconds]."""
    clock = Clock()
    sys.path[0] = str(Path.cwd())  # in place of this file's own folder, whose `profile` hides Python's
    sys.argv = ["train.py", *overrides]
    import train

    for name, place in PARTS.items():
        module, _, path = place.partition(":")
        *owners, function = path.split(".")
        try:
            owner = importlib.import_module(module)
            for part in owners:
                owner = getattr(owner, part)
            setattr(owner, function, clock.timed(name, getattr(owner, function)))
        except (ImportError, AttributeError):
            continue
    status = train.main()
    Path(out).write_text(json.dumps(clock.read()), encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(measured(sys.argv[1], sys.argv[2:]))
