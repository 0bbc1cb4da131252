"""What every benchmark shares: the clock, interleaved repeats, a row for each comparison, the table and the file.

A ratio is our cost over the rival's, so smaller is better, and a bar is the most it may be: "at least 5x faster" is
0.2.
"""

from __future__ import annotations

import inspect
import json
import logging
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from analysis.tables import markdown
from cwac.core.config import Parser, command
from cwac.core.errors import UserError

LATEST = Path("benchmarks/latest.json")
T = TypeVar("T")


@dataclass
class Skipped:
    """A comparison that cannot be made here, such as with a library that is not installed."""

    name: str
    reason: str
    barred: bool = False
    """Whether a bar hangs on it: then the command fails."""


def clock() -> Callable[[], float]:
    """Seconds of work: the thread's own CPU time, which other processes do not disturb; with a GPU, wall-clock."""
    if not torch.cuda.is_available():
        return time.thread_time

    def synchronised() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return synchronised


def timed(act: Callable[[], T], seconds: Callable[[], float] | None = None) -> tuple[float, T]:
    """Seconds that `act` takes, and what it returns; seconds: another clock than `clock()`."""
    seconds = seconds or clock()
    began = seconds()
    result = act()
    return seconds() - began, result


def paired(ours: Callable[[], object], rival: Callable[[], object], repeats: int, warm_up: int = 1) -> np.ndarray:
    """Ratios of `repeats` pairs, in turns and who begins in turns, after `warm_up` pairs that do not count."""
    found = []
    for repeat in range(warm_up + repeats):
        pair = {act: timed(act)[0] for act in ((ours, rival) if repeat % 2 else (rival, ours))}
        found.append(pair[ours] / pair[rival])
    return np.array(found[warm_up:])


def alone(act: Callable[..., T], *arguments: object) -> T:
    """What `act` returns, in a process of its own that has one thread; `act` is a module's function."""
    with multiprocessing.get_context("spawn").Pool(1, torch.set_num_threads, (1,)) as pool:
        return pool.apply(act, arguments)


def entry(name: str, rival: str, measured: np.ndarray | float, bar: float | None = None) -> dict:
    """One row of the report: the median ratio, its 95 % bootstrap interval over repeats, the bar.

    measured: ratios, or one number that was counted or taken once, whose spread is itself.
    """
    measured = np.atleast_1d(measured)
    draws = np.random.default_rng(0).choice(measured, (2000, len(measured)))
    ratio = float(np.median(measured))
    return {
        "name": name,
        "rival": rival,
        "ratio": round(ratio, 4),
        "spread": [round(float(q), 4) for q in np.quantile(np.median(draws, axis=1), [0.025, 0.975])],
        "bar": None if bar is None else round(bar, 4),
        "met": None if bar is None else ratio <= bar,
    }


def collect(found: Iterable[dict | Skipped]) -> tuple[list[dict], list[Skipped]]:
    """Rows and what was skipped, each named on stderr as it comes."""
    rows, skipped = [], []
    for item in found:
        if isinstance(item, Skipped):
            skipped.append(item)
            continue
        print(f"{item['name']}: {item['ratio']:.3f}", file=sys.stderr, flush=True)
        rows.append(item)
    return rows, skipped


def save(rows: list[dict], out: Path) -> None:
    """Write `out`, where a row replaces that of its name and rival and the others stay."""
    old = json.loads(out.read_text(encoding="utf-8")) if out.exists() else []
    measured = {(row["name"], row["rival"]) for row in rows}
    kept = [row for row in old if (row["name"], row["rival"]) not in measured]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps([*kept, *rows], indent=1) + "\n", encoding="utf-8")


def report(rows: list[dict], skipped: list[Skipped]) -> int:
    """Print the table; 1 if a bar is missed or was not measured, else 0."""
    shown = [
        [
            row["name"],
            row["rival"],
            f"{row['ratio']:.3f}",
            "[{:.3f}, {:.3f}]".format(*row["spread"]),
            "-" if row["bar"] is None else f"{row['bar']:g}",
            {True: "yes", False: "NO", None: "-"}[row["met"]],
        ]
        for row in rows
    ]
    print(markdown(["what", "rival", "ours / rival", "95 % of the median", "bar", "met"], shown, key=2, width=200))
    for item in skipped:
        print(f"not measured: {item.name} ({item.reason})")
    return 1 if any(row["met"] is False for row in rows) or any(item.barred for item in skipped) else 0


@command
def main(measure: Callable[..., Iterator[dict | Skipped]], argv: list[str] | None = None) -> int:
    """The command of one benchmark; each keyword of `measure` is an option, its `overrides` the positional ones.

    Returns the exit status: that of `report`, 2 for bad input.
    """
    name = Path(inspect.getfile(measure)).stem
    about = inspect.getmodule(measure).__doc__.split("\n")[0]
    parser = Parser(prog=f"python -m benchmarks.{name}", description=about)
    for option in inspect.signature(measure).parameters.values():
        if option.name == "overrides":
            parser.add_argument("overrides", nargs="*", help="of the configuration, e.g. model=smollm2 task=sst2")
        else:
            kind = type(option.default)
            parser.add_argument(
                f"--{option.name.replace('_', '-')}", type=kind, default=option.default, help="(%(default)s)"
            )
    parser.add_argument("--out", type=Path, default=LATEST, help="(%(default)s)")
    args = vars(parser.parse_intermixed_args(argv))
    out = args.pop("out")
    try:
        rows, skipped = quietly(lambda: collect(measure(**args)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    save(rows, out)
    return report(rows, skipped)


def quietly(act: Callable[[], T]) -> T:
    """Run `act` on one thread, whose CPU time is the measure, and without libraries' news."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    try:
        return act()
    finally:
        logging.disable(before)  # whoever goes on in this process hears of warnings again
