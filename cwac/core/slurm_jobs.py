"""How the jobs of a sweep on SLURM fare, by `squeue`, which every cluster answers, with accounting or without."""

from __future__ import annotations

import contextlib
import logging
import math
import subprocess
import time
from collections import Counter

log = logging.getLogger(__name__)
LOOK = 20.0
"""Seconds between two calls of `squeue` (ours)."""
ENDED = frozenset("BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED TIMEOUT".split())
"""States from which a job comes back only by being queued again, when it is in another state."""
FORGOTTEN = "no longer known to squeue"


def follow(jobs: list) -> dict[str, str]:
    """Wait until each job left a result or ended without; job id -> state, of those without.

    A job is lost when two looks in a row found it ended: its result may be on its way over the network, and a job that
    is queued again can be seen ended for a moment.
    """
    waiting = {job.job_id: job for job in jobs}
    lost: dict[str, str] = {}
    suspects: dict[str, str] = {}
    told: Counter = Counter()
    looked = -math.inf
    while waiting:
        waiting = {name: job for name, job in waiting.items() if not has_result(job)}
        if waiting and time.monotonic() - looked >= LOOK:
            looked = time.monotonic()
            if (states := squeue({name.split("_")[0] for name in waiting})) is not None:
                now = Counter(states[name] for name in waiting if name in states)
                if now != told:
                    log.info("SLURM: %s", ", ".join(f"{n} {state}" for state, n in sorted(now.items())) or "none left")
                    told = now
                ended = {name: states.get(name, FORGOTTEN) for name in waiting}
                ended = {name: state for name, state in ended.items() if state in ENDED or state == FORGOTTEN}
                lost.update({name: state for name, state in ended.items() if name in suspects})
                suspects = ended
                waiting = {name: job for name, job in waiting.items() if name not in lost}
        time.sleep(0.5)
    return lost


def has_result(job) -> bool:
    """Whether the job's process left what the cell returned, or the error that ended it."""
    folder = job.paths.folder
    with contextlib.suppress(OSError):  # makes a network file system look again
        folder.chmod(folder.stat().st_mode)
    return job.paths.result_pickle.exists()


def squeue(arrays: set[str]) -> dict[str, str] | None:
    """Job id -> state, with the reason of those that wait, of all jobs of these arrays that SLURM still knows.

    None where `squeue` does not answer, which says nothing of the jobs.
    """
    command = ["squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%r", f"--jobs={','.join(arrays)}"]
    asked = subprocess.run(command, capture_output=True, text=True)
    if asked.returncode and "Invalid job id" not in asked.stderr:
        log.warning("squeue does not answer (%s); the sweep goes on waiting", " ".join(asked.stderr.split()))
        return None
    found = {}
    for line in asked.stdout.splitlines():
        name, state, reason = line.strip().split("|", 2)
        found[name] = f"{state} ({reason})" if state == "PENDING" else state
    return found
