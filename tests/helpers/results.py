"""Made-up runs and tables, for the tests of the analysis."""

import json
from pathlib import Path

from analysis.collect import Cell

METHODS = ("sft", "weight_only", "activation_only", "cwac", "weight_only_closed", "cwac_closed")


def harm(method: str, ratio: float, seed: int) -> float:
    """Planted HS: rises with the ratio, differs by method, spreads by seed."""
    return round(100 * ratio * (5 - 0.7 * METHODS.index(method)) * 0.9 + 2 * seed, 1)


def row(cell: Cell, metric: str, value: float, **fields) -> dict:
    fixed = {key: getattr(cell, key) for key in ("run_id", "model", "method", "task", "harmful_ratio", "seed")}
    defaults = {"epoch": 3.0, "step": 90, "final": True, "set": "test", "n": 200, "stderr": None, "judge": None}
    return {**fixed, **defaults, "metric": metric, "value": value, "eval": "e1", "time": 1.0, **fields}


def rows_of(cell: Cell, hs: float, fa: float = 95.0) -> list[dict]:
    """A run's rows: the aligned model at epoch 0, two checkpoints, the end of training."""
    verdicts = {"set": "harmful", "judge": "keyword"}
    rows = [row(cell, "FA", 50.0, epoch=0, step=0, final=False), row(cell, "OR", 2.0, set="benign", judge="keyword")]
    rows.append(row(cell, "HS", 1.0, epoch=0, step=0, final=False, **verdicts))
    for step, share in ((30, 0.4), (60, 0.8), (90, 1.0)):
        end = step == 90
        rows.append(row(cell, "HS", hs * share, epoch=step / 30, step=step, final=end, **verdicts))
        loss = {"set": "toy", "judge": None, "n": None}
        rows.append(row(cell, "task_loss", 2 - share, epoch=step / 30, step=step, final=end, **loss))
    rows += [row(cell, "FA", fa), row(cell, "other", 3.0, **verdicts), row(cell, "refusal", 97 - hs, **verdicts)]
    return rows + [row(cell, "weight_leak", 1e-8, set="anchors", n=None)]


def write_run(runs: Path, cell: Cell, rows: list[dict], status: str = "done", tail: str = "") -> Path:
    folder = runs / cell.run_id
    folder.mkdir(parents=True)
    content = {"status": status, "run_id": cell.run_id, "evaluations": ["e1"]}
    (folder / "status.json").write_text(json.dumps(content))
    (folder / "env.json").write_text(json.dumps({"git_commit": "c0ffee", "git_dirty": False}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + tail)
    return folder


def cell_of(method: str, ratio: float, seed: int) -> Cell:
    return Cell(f"tiny-toy-p{ratio:g}-{method}-s{seed}-00000000", "tiny", method, "toy", ratio, seed, "e1")


def pick(frame, **where):
    for key, value in where.items():
        frame = frame[frame[key] == value]
    assert len(frame) == 1, f"{len(frame)} rows for {where}"
    return frame.iloc[0]


def line_of(text: str, *cells: str) -> str:
    """The first table line that starts with these cells."""
    lines = [
        line for line in text.splitlines() if [c.strip() for c in line.split("|")[1 : len(cells) + 1]] == [*cells]
    ]
    assert lines, f"no line starts with {cells} in\n{text}"
    return lines[0]
