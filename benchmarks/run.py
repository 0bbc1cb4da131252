"""One whole run on SmolLM2 at the sizes of `scale=two_cores`, by its parts, and beside another commit in turns.

python -m benchmarks.run [--repeats 1 --beside TREE] [overrides, e.g. paths.data=/data/hub method=cwac]

TREE: the root of a checkout of the other commit, with an environment of its own in `.venv` or none. Paths among the
overrides are better absolute, since each tree runs from its own root. Not part of `make bench`, because it needs the
real data sets. A first run of one step, which does not count, builds what runs share.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks import phases, runner
from benchmarks.runner import entry
from cwac.core import paths
from cwac.core.errors import UserError

RUN = "model=smollm2 task=sst2 scale=two_cores model.refused_only=false harmful_ratio=0.1 seed=0 method=sft".split()
"""A cell of `experiment=smollm2`."""


def measure(
    repeats: int = 1, seconds: float = 80.0, ratio: float = 0.5, beside: str = "", overrides: Sequence[str] = ()
) -> Iterator[dict]:
    """CPU seconds of the run and of its parts, in shares of the `seconds` allowed; `ratio`, the bar beside a tree.

    Raises UserError for a tree without train.py, and where a run fails.
    """
    ours, theirs = paths.PACKAGE.parent, Path(beside).resolve()
    trees = [ours, theirs] if beside else [ours]
    if not (trees[-1] / "train.py").is_file():
        raise UserError(f"--beside {beside} is no checkout: it has no train.py")
    for tree in trees:
        once(tree, [*overrides, "train.max_steps=1", "eval.at=[0]"])
    found = {tree: [] for tree in trees}
    for repeat in range(repeats):
        for tree in trees[:: -1 if repeat % 2 else 1]:
            found[tree].append(once(tree, overrides))
    mine = found[ours]
    what = "a run: " + " ".join(o for o in settings(overrides) if not o.startswith("paths."))
    yield entry(f"{what}, CPU seconds", f"{seconds:g} s", total(mine) / seconds, 1.0)
    for name in ("start", *phases.PARTS):
        yield entry(f"{what}, {name}", f"{seconds:g} s", np.array([run[name][0] for run in mine]) / seconds)
    if beside:
        yield entry(f"{what}, CPU seconds", f"the same at {commit(theirs)}", total(mine) / total(found[theirs]), ratio)


def settings(overrides: Sequence[str]) -> list[str]:
    """`RUN` with what the overrides say otherwise."""
    said = {override.partition("=")[0] for override in overrides}
    return [o for o in RUN if o.partition("=")[0] not in said] + list(overrides)


def total(runs: list[dict[str, list[float]]]) -> np.ndarray:
    return np.array([run["whole"][0] for run in runs])


def once(tree: Path, overrides: Sequence[str]) -> dict[str, list[float]]:
    """[CPU seconds, wall-clock seconds] of each part of one run, and of the `whole` process; on one thread."""
    own = tree / ".venv" / "bin" / "python"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "phases.json"
        command = [str(own if own.is_file() else sys.executable), str(Path(phases.__file__).resolve()), str(out)]
        command += [*settings(overrides), f"paths.runs={folder}/runs"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            raise UserError(f"the run of {tree.name} failed: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
        found = json.loads(out.read_text(encoding="utf-8"))
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {**found, "whole": [cpu, sum(wall for _, wall in found.values())]}


def commit(tree: Path) -> str:
    """The short hash of a checkout's commit; its folder's name where git knows none."""
    said = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=tree, capture_output=True, text=True)
    return said.stdout.strip() or tree.name


if __name__ == "__main__":
    sys.exit(runner.main(measure))
