"""Two thousand finished runs, and a million rows of one."""

import json
import subprocess
import sys

import pytest

from cwac.core import jsonl
from tests.conftest import ROOT
from tests.helpers.results import cell_of, rows_of, write_run

pytestmark = [pytest.mark.slow, pytest.mark.faults]
PROBE = """
import json, resource, sys, time
from pathlib import Path
{imports}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.process_time()
n = {work}
spent = time.process_time() - began
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([n, spent, after / 1024, before / 1024]))
"""


def probe(imports: str, work: str, *arguments: str) -> list[float]:
    """What the expression gives, its processor seconds, and the process's peak memory in MiB after and before."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(imports=imports, work=work), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_two_thousand_runs_are_collected_in_twenty_seconds_and_a_gigabyte(tmp_path):
    """As many rows a run as the demo campaign's have, with checksums; processor time, for a machine may be busy."""
    for method in range(20):
        for ratio in range(10):
            for seed in range(10):
                cell = cell_of(f"m{method}", ratio / 10, seed)
                folder = write_run(tmp_path / "runs", cell, [])
                rows = [row for k in range(4) for row in rows_of(cell, 10.0 + k)]
                jsonl.write_jsonl(folder / "metrics.jsonl", [{**r, "step": i} for i, r in enumerate(rows)])
    n, seconds, peak, _ = probe(
        "from analysis.collect import collect", "len(collect(Path(sys.argv[1])).runs)", str(tmp_path / "runs")
    )
    assert n == 2000
    assert seconds <= 20 and peak <= 1024, (seconds, peak)


def test_a_million_rows_are_read_in_a_stream(tmp_path):
    path = tmp_path / "metrics.jsonl"
    thousand = "".join(jsonl.to_line({"step": i, "metric": "HS", "set": "x", "value": i / 7}) for i in range(1000))
    with path.open("w") as file:
        for _ in range(1000):
            file.write(thousand)
    n, seconds, peak, before = probe(
        "from cwac.core.jsonl import iter_jsonl", "sum(1 for _ in iter_jsonl(Path(sys.argv[1])))", str(path)
    )
    assert n == 1_000_000 and path.stat().st_size > 50 << 20
    assert seconds <= 60 and peak - before <= 16, (seconds, peak, before)
