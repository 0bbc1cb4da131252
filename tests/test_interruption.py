"""Ctrl-C, a scheduler, a killed worker, a reader that has gone: one line, and the same command goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from analysis.collect import read_status
from cwac.core import config
from cwac.core.config import CLOSED, INTERRUPTED, command
from cwac.core.run_dir import Run
from tests.conftest import HANGS, ROOT, launch
from tests.forked import start
from tests.test_runs import overrides

pytestmark = pytest.mark.faults
ENDLESS = ["method=sft", "train.max_steps=1000000", "train.save_steps=10"]


def wait_for(process, done) -> None:
    while not done():
        assert process.is_alive() if hasattr(process, "is_alive") else process.poll() is None
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_run_in_one_line_that_says_where_it_goes_on(number, random_model, tmp_path):
    printed, runs = tmp_path / "printed", tmp_path / "runs"
    process = start(*overrides(random_model, tmp_path, *ENDLESS), log=printed)
    wait_for(process, lambda: list(runs.glob("*/checkpoint-20/complete.json")))
    (folder,) = (p for p in runs.iterdir() if p.is_dir())
    assert read_status(folder)[0] == "running"
    os.kill(process.pid, number)
    process.join(HANGS)
    assert process.exitcode == 128 + number
    said = printed.read_text()
    (line,) = (line for line in said.splitlines() if "interrupted" in line)
    newest = max(int(p.parent.name.split("-")[1]) for p in folder.glob("checkpoint-*/complete.json"))
    assert line.startswith(f"interrupted: the same command goes on from step {newest}: python train.py ")
    assert "train.max_steps=1000000" in line and "Traceback" not in said
    # what a table says of a process that has gone, by Ctrl-C or kill -9
    assert read_status(folder)[0].startswith("running, but its process has gone: the same command goes on")


def test_a_run_without_a_checkpoint_starts_again(random_model, tmp_path):
    printed, runs = tmp_path / "printed", tmp_path / "runs"
    process = start(*overrides(random_model, tmp_path, *ENDLESS[:2], "train.logging_steps=1"), log=printed)
    wait_for(process, lambda: list(runs.glob("*/train_log.jsonl")))
    os.kill(process.pid, signal.SIGINT)
    process.join(HANGS)
    assert "interrupted: the same command starts it again, as it has no checkpoint yet" in printed.read_text()


def workers(pid: int) -> list[int]:
    """The processes of joblib's below one."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            words = (stat.parent / "cmdline").read_text()
        except OSError:
            continue
        if parent == pid and "popen_loky" in words:
            found.append(int(stat.parent.name))
    return found


@pytest.mark.parametrize("how", ["a killed worker", "Ctrl-C"])
def test_a_sweep_that_ends_early_names_what_is_left_and_the_command(how, random_model, tmp_path):
    """Ctrl-C reaches every process of a terminal; a worker leaves the last word to the command."""
    runs = tmp_path / "runs"
    sweep = overrides(random_model, tmp_path, *ENDLESS, "hydra/launcher=local", "seed=0,1,2,3")
    process = launch("-m", *sweep, start_new_session=True)
    wait_for(process, lambda: list(runs.glob("*/train_log.jsonl")))
    if how == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)
    else:
        os.kill(workers(process.pid)[0], signal.SIGKILL)
    output, _ = process.communicate(timeout=HANGS)
    assert process.returncode == (INTERRUPTED if how == "Ctrl-C" else 1)
    begins = "interrupted: " if how == "Ctrl-C" else "error: a worker of the sweep was killed"
    (line,) = (line[line.index(begins) :] for line in output.splitlines() if begins in line)
    assert "4 of 4 cells are left (" in line and "this goes on with them: python train.py -m " in line
    assert "seed=0,1,2,3" in line and "Traceback" not in output
    assert not workers(process.pid)


def closed(*arguments: str) -> tuple[int, str]:
    """Exit code and stderr of a Python command whose reader goes before it is through, as `| head` does."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, **pipes)
    process.stdout.close()
    said = process.stderr.read()
    return process.wait(HANGS), said


def test_a_reader_that_goes_ends_a_listing_without_a_word():
    code, said = closed("train.py", "-m", "seed=0,1", "--cfg", "job")
    assert code == CLOSED and said == ""
    code, said = closed("train.py", "--cfg", "job")  # which Hydra prints
    assert code == CLOSED and said == ""


def test_a_reader_that_goes_ends_no_training(random_model, tmp_path):
    sweep = ["-m", *overrides(random_model, tmp_path, "method=sft", "seed=0,1", "train.max_steps=2")]
    code, said = closed("train.py", *sweep)
    assert code in (0, CLOSED) and "Traceback" not in said and "Error" not in said
    statuses = [json.loads(p.read_text())["status"] for p in (tmp_path / "runs").glob("*/status.json")]
    assert statuses == ["done", "done"]


PRINTS = """
import sys
from cwac.core.config import command

@command
def main():
    for i in range(100_000):
        print(i)
    return 0

sys.exit(main())
"""


def test_a_reader_that_goes_ends_a_command_without_a_word():
    assert closed("-c", PRINTS) == (CLOSED, "")


def test_every_command_of_ours_takes_ctrl_c_and_a_reader_that_goes():
    """`@command` is what does it; train.py has its own."""
    for folder in ("analysis", "experiments", "benchmarks"):
        for path in (ROOT / folder).glob("*.py"):
            source = path.read_text()
            if "\ndef main(" in source and "__main__" in source:
                assert "command\ndef main(" in source, path


def test_ctrl_c_ends_a_command_in_one_line(capsys):
    @command
    def main():
        raise KeyboardInterrupt

    assert main() == INTERRUPTED
    assert capsys.readouterr().err == "interrupted; run the same command again: what was finished is found\n"


def test_a_run_that_a_process_holds_is_running(tmp_path):
    with Run(config.compose(["method=sft", f"paths.runs={tmp_path}"])) as run:
        run.start()
        assert read_status(run.dir)[0] == "running"
    assert read_status(run.dir)[0].startswith("running, but its process has gone")
