"""Runs of train.py in processes that can be killed and raced: forked from one server that has torch loaded."""

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.preload"])
HANGS = 3600
ROOT = Path(__file__).resolve().parent.parent
PLACES = {
    "appending": ["cwac.core.jsonl.append_jsonl", "cwac.training.engine.append_jsonl"],
    "saving": ["torch.save"],
    "completing a checkpoint": ["cwac.training.engine.write_atomic"],
    "writing a file": ["cwac.core.run_dir.write_atomic", "cwac.core.jsonl.write_atomic"],
    "generating": ["transformers.GenerationMixin.generate"],
    "judging": ["cwac.data.refusals.KeywordJudge.judge"],
    "marking done": ["cwac.core.run_dir.Run.write_status"],
}
"""What a process can be doing when it dies -> the functions it dies in."""


def start(
    *overrides: str, log: Path, die: tuple[str, int] | None = None, env: dict[str, str] | None = None
) -> multiprocessing.Process:
    """`python train.py <overrides>` in a process of its own; die=(place, n): killed at the n-th call of that place."""
    process = FORKS.Process(target=main, args=(overrides, str(log), die, env or {}))
    process.start()
    return process


def finish(*overrides: str, log: Path, **more) -> tuple[int, str]:
    """Its exit code, -9 for a killed one, and everything printed."""
    process = start(*overrides, log=log, **more)
    process.join(HANGS)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode, Path(log).read_text()


def main(overrides: tuple[str, ...], log: str, die: tuple[str, int] | None, env: dict[str, str]) -> None:
    import train

    for number in (signal.SIGINT, signal.SIGHUP):  # a shell's background jobs, and under nohup, start by ignoring them
        signal.signal(number, signal.SIG_DFL)
    os.environ.update(env)
    os.chdir(ROOT)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    sys.stdout = sys.stderr = os.fdopen(descriptor, "w", buffering=1)
    sys.argv = ["train.py", *overrides]
    if die is not None:
        calls = [0]
        for place in PLACES[die[0]]:
            plant(place, die[1], calls)
    sys.exit(train.main())


def plant(place: str, n: int, calls: list[int]) -> None:
    """Replace the function by one that dies in its n-th call; what writes a file leaves half of it."""
    path, _, name = place.rpartition(".")
    try:
        owner = importlib.import_module(path)
    except ImportError:
        module, _, kind = path.rpartition(".")
        owner = getattr(importlib.import_module(module), kind)
    real = getattr(owner, name)

    def dying(*args, **kwargs):
        calls[0] += 1
        if calls[0] < n:
            return real(*args, **kwargs)
        file = args[1] if name == "save" else args[0]
        if isinstance(file, str | Path):
            with contextlib.suppress(OSError):
                half(Path(file), args[1] if name == "append_jsonl" else None)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, dying)


def half(path: Path, rows: list[dict] | None) -> None:
    """What a kill in the middle of a write leaves behind."""
    from cwac.core.jsonl import to_line

    if rows is not None:
        with path.open("a") as file:
            file.write("".join(map(to_line, rows))[:-7])
    elif not path.exists():
        path.write_bytes(b"\x80half")
