"""Every benchmark, one after the other, and one table of them.

python -m benchmarks                          all of them
python -m benchmarks constraint sae           some
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from benchmarks import runner
from cwac.core.config import Parser, command

PARTS = {
    "constraint": {},
    "sae": {},
    "sweep": {},
    "prepared": {},
    "steps": {},
    "evaluation": {},
    "judge": {},
    "nullspace": {"steps": 4},
    "memory": {},
    "allocator": {},
    "engines": {},
    "methods": {"steps": 60},
}
"""Modules, and what they are given so that all of them end within half an hour on two cores."""


@command
def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, 1 if a bar is missed or not measured."""
    parser = Parser(prog="python -m benchmarks", description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (all)")
    parser.add_argument("--out", type=Path, default=runner.LATEST, help="(%(default)s)")
    args = parser.parse_intermixed_args(argv)
    if unknown := sorted(set(args.parts) - set(PARTS)):
        parser.error(f"no benchmark is called {unknown[0]}; use some of {', '.join(PARTS)}")
    rows, skipped = [], []
    for part in args.parts or PARTS:
        measure = importlib.import_module(f"benchmarks.{part}").measure
        found = runner.quietly(lambda measure=measure, part=part: runner.collect(measure(**PARTS[part])))
        runner.save(found[0], args.out)  # at once: a later one may be interrupted
        rows += found[0]
        skipped += found[1]
    return runner.report(rows, skipped)


if __name__ == "__main__":
    sys.exit(main())
