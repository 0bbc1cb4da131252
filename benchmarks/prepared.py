"""A second method on a prepared model: what the first one built for it is used, and nothing is built again.

python -m benchmarks.prepared [--steps 2]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

from benchmarks import runner
from benchmarks.runner import entry
from cwac.core import paths

CUT = ("eval.n_task=8", "eval.n_harmful=8", "eval.n_benign=8", "eval.drift=false", "eval.progress=false")


def measure(steps: int = 2) -> Iterator[dict]:
    """How many artifacts CWAC's two ablations build after it on `tiny`, and their runs' time in shares of its own.

    Raises RuntimeError where a run fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        first = run("cwac", folder, steps)
        built = artifacts(folder)
        for method in ("weight_only", "activation_only"):
            took, before = run(method, folder, steps), len(built)
            built |= artifacts(folder)
            yield entry(f"artifacts {method} builds after cwac, model=tiny", "-", len(built) - before, 0)
            yield entry(f"run of {method} after cwac, {steps} steps, model=tiny", "run of cwac before", took / first)


def run(method: str, folder: str, steps: int) -> float:
    """Seconds of one run of a few steps, the start of Python included."""
    given = [f"method={method}", "harmful_ratio=0.1", f"train.max_steps={steps}", *CUT]
    given += [f"paths.runs={folder}/runs", f"paths.artifacts={folder}/artifacts"]
    began = perf_counter()
    done = subprocess.run(
        [sys.executable, "train.py", *given], cwd=paths.PACKAGE.parent, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"method={method} did not run:\n{done.stdout}{done.stderr}")
    return perf_counter() - began


def artifacts(folder: str) -> set[Path]:
    """Every artifact below: <kind>/<hash>."""
    return {path for path in Path(folder, "artifacts").glob("*/*") if path.is_dir()}


if __name__ == "__main__":
    sys.exit(runner.main(measure))
