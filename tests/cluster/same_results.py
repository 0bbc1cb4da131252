"""python tests/cluster/same_results.py RUNS RUNS: two folders hold the same finished runs with the same final metrics.

What differs between two runs of one cell, its costs, is left out. Exit code 1 where anything else differs.
"""

import json
import sys
from pathlib import Path

COSTS = ("memory", "seconds_per_step")


def final(runs: str) -> dict:
    """(run, metric, set, judge) -> value of every finished run's last evaluation."""
    found = {}
    for status in Path(runs).glob("*/status.json"):
        assert json.loads(status.read_text())["status"] == "done", f"{status.parent} is not done"
        for line in (status.parent / "metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            if row.get("final") and row["metric"] not in COSTS:
                found[status.parent.name, row["metric"], row["set"], row["judge"]] = row["value"]
    return found


one, other = map(final, sys.argv[1:])
differ = sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
for key in differ:
    print(*key, one.get(key), other.get(key))
print(f"{len({key[0] for key in one})} runs, {len(one)} final values, {len(differ)} differ")
sys.exit(bool(differ) or not one)
