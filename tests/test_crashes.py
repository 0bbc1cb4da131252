"""kill -9 at any moment: the same command again gives the same weights and rows, none twice and none half."""

import json
import random
import time
from pathlib import Path

import pytest

from cwac.core.jsonl import read_jsonl
from tests.conftest import SMALL
from tests.forked import PLACES, finish, start

pytestmark = pytest.mark.faults
TIMING = ("seconds_per_step", "memory")


def overrides(model: Path, folder: Path) -> list[str]:
    return [
        "model.kind=folder",
        f"+model.path={model}",
        f"paths.runs={folder}",
        f"paths.artifacts={folder.parent / 'artifacts'}",
        "method=sft",
        "harmful_ratio=0.1",
        "train.max_steps=24",
        "train.save_steps=4",
        "train.logging_steps=3",
        "eval.at=[0,2]",
        "eval.drift=false",
        *SMALL,
    ]


def result(folder: Path) -> dict:
    """What a run leaves, without what a clock says."""
    (run,) = (p.parent for p in folder.glob("*/status.json"))
    status = json.loads((run / "status.json").read_text())
    rows = [{k: v for k, v in r.items() if k != "time"} for r in read_jsonl(run / "metrics.jsonl")]
    answers = {p.name: p.read_bytes() for kind in ("gen", "judge") for p in sorted((run / kind).iterdir())}
    return {
        "status": status["status"],
        "weights": status["weights_sha256"],
        "rows": [r for r in rows if r["metric"] not in TIMING],
        "timing": [r["metric"] for r in rows if r["metric"] in TIMING],
        "log": read_jsonl(run / "train_log.jsonl"),
        "answers": answers,
    }


@pytest.fixture(scope="module")
def straight(random_model, tmp_path_factory):
    """An uninterrupted run: what it leaves, and how many ticks of the processor it took."""
    folder = tmp_path_factory.mktemp("straight") / "runs"
    process, took = start(*overrides(random_model, folder), log=folder.parent / "log"), 0
    while process.is_alive():
        took = max(took, ticks(process.pid))
        time.sleep(0.01)
    assert process.exitcode == 0, (folder.parent / "log").read_text()
    return result(folder), took


def ticks(pid: int) -> int:
    """Processor time of a process so far, which a busy machine does not stretch; 0 once it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])


def killed_and_again(model: Path, folder: Path, die: tuple[str, int]) -> dict:
    code, output = finish(*overrides(model, folder), log=folder.parent / "killed", die=die)
    assert code == -9, f"the run never reached its death: {output}"
    code, output = finish(*overrides(model, folder), log=folder.parent / "again")
    assert code == 0, output
    return result(folder)


QUICK = [("appending", 4), ("saving", 5), ("generating", 3), ("judging", 2)]
MORE = [
    ("appending", 1),
    ("appending", 9),
    ("appending", 12),
    ("saving", 12),
    ("completing a checkpoint", 1),
    ("completing a checkpoint", 4),
    ("writing a file", 1),
    ("writing a file", 5),
    ("generating", 7),
    ("judging", 6),
    ("marking done", 2),
]


@pytest.mark.parametrize(
    "die", [*QUICK, *(pytest.param(d, marks=pytest.mark.slow) for d in MORE)], ids=lambda d: f"{d[0]} {d[1]}"
)
def test_a_run_killed_while_doing_something_ends_as_if_it_had_not_been(die, straight, random_model, tmp_path):
    assert die[0] in PLACES
    assert killed_and_again(random_model, tmp_path / "runs", die) == straight[0]


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(5))
def test_a_run_killed_at_a_random_moment_ends_as_if_it_had_not_been(moment, straight, random_model, tmp_path):
    """With the places above: twenty deaths."""
    expected, took = straight
    command = overrides(random_model, tmp_path / "runs")
    process = start(*command, log=tmp_path / "killed")
    while process.is_alive() and ticks(process.pid) < random.Random(moment).uniform(0.1, 0.9) * took:
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -9
    code, output = finish(*command, log=tmp_path / "again")
    assert code == 0, output
    assert result(tmp_path / "runs") == expected


def test_a_run_killed_twice_and_then_again(straight, random_model, tmp_path):
    """Half a row after a resumed half row."""
    command = overrides(random_model, tmp_path / "runs")
    for die in (("appending", 5), ("appending", 2)):
        code, output = finish(*command, log=tmp_path / "killed", die=die)
        assert code == -9, output
    code, output = finish(*command, log=tmp_path / "again")
    assert code == 0, output
    assert result(tmp_path / "runs") == straight[0]
