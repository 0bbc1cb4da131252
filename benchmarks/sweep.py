"""A sweep whose cells are all finished, run again: what it takes to find that nothing is left to do.

python -m benchmarks.sweep [--cells 100]
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from benchmarks import runner
from benchmarks.runner import entry
from cwac.core import config, paths
from cwac.core.run_dir import Run


def measure(cells: int = 100, seconds: float = 0.2) -> Iterator[dict]:
    """CPU seconds a cell of the whole command, the start of Python included, in shares of the `seconds` allowed.

    Raises RuntimeError where the command fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(cells):
            with Run(config.compose(["method=sft", f"seed={seed}", f"paths.runs={folder}"])) as run:
                run.start()
                run.finish()
        command = [sys.executable, "train.py", "-m", "method=sft", f"seed=range({cells})", f"paths.runs={folder}"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        again = subprocess.run(command, cwd=paths.PACKAGE.parent, capture_output=True, text=True, env=os.environ)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if again.returncode or again.stdout.count("nothing to do") != cells:
            raise RuntimeError(f"the sweep did not find its {cells} cells finished:\n{again.stdout}{again.stderr}")
    took = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    yield entry(f"a cell of a finished sweep of {cells}", f"{seconds:g} s", took / cells / seconds, 1.0)


if __name__ == "__main__":
    sys.exit(runner.main(measure))
