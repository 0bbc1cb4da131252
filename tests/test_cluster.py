"""Sweeps on SLURM and Ray: what squeue says of jobs, and real clusters of this machine (tests/cluster)."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import train
from cwac.core import failures, slurm_jobs
from tests.conftest import HANGS, ROOT, call
from tests.test_runs import overrides

SQUEUE = """#!/bin/sh
looks=$(($(cat {folder}/looks) + 1))
echo $looks > {folder}/looks
echo "$@" >> {folder}/asked
cat {folder}/says.$looks && exit 0
echo "slurm_load_jobs error: $(cat {folder}/otherwise)" >&2
exit 1
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A `squeue` that says one text after another, then an error; returns a function that sets them, and the jobs."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "squeue"
    program.write_text(SQUEUE.format(folder=tmp_path))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(slurm_jobs, "LOOK", 0.0)
    monkeypatch.setattr(slurm_jobs.time, "sleep", lambda _: None)

    def says(*texts, otherwise="Invalid job id specified"):
        (tmp_path / "looks").write_text("0")
        (tmp_path / "otherwise").write_text(otherwise)
        for number, text in enumerate(texts, 1):
            (tmp_path / f"says.{number}").write_text(text)

    def job(name: str, result: bool = False):
        folder = tmp_path / name
        folder.mkdir()
        if result:
            (folder / "result").write_text("")
        return SimpleNamespace(job_id=name, paths=SimpleNamespace(folder=folder, result_pickle=folder / "result"))

    return SimpleNamespace(says=says, job=job, folder=tmp_path)


def test_jobs_without_a_result_are_lost_and_those_with_one_are_not(cluster):
    jobs = [cluster.job("7_0", result=True), cluster.job("7_1"), cluster.job("7_2"), cluster.job("7_3")]
    cluster.says(
        "7_0|COMPLETED|None\n7_1|RUNNING|None\n7_2|PENDING|Resources\n7_3|PENDING|Resources\n",
        "7_1|FAILED|NonZeroExitCode\n7_2|CANCELLED|None\n7_3|RUNNING|None\n",
        "7_1|FAILED|NonZeroExitCode\n7_2|CANCELLED|None\n7_3|RUNNING|None\n",
    )
    # after these looks SLURM knows none of them any more
    assert slurm_jobs.follow(jobs) == {"7_1": "FAILED", "7_2": "CANCELLED", "7_3": slurm_jobs.FORGOTTEN}
    asked = (cluster.folder / "asked").read_text().splitlines()
    assert len(asked) == 5 and all("--jobs=7" in line and "--states=all" in line for line in asked)


def test_a_job_that_is_queued_again_is_not_lost(cluster):
    job = cluster.job("7")
    cluster.says("7|NODE_FAIL|None\n", "7|PENDING|BeginTime\n", "7|TIMEOUT|None\n", "7|RUNNING|None\n")
    assert slurm_jobs.follow([job]) == {"7": slurm_jobs.FORGOTTEN}
    assert (cluster.folder / "looks").read_text() == "6\n"


def test_a_result_that_arrives_after_the_jobs_end_counts(cluster, monkeypatch):
    job = cluster.job("7")
    cluster.says("7|COMPLETED|None\n")
    monkeypatch.setattr(slurm_jobs.time, "sleep", lambda _: job.paths.result_pickle.write_text(""))
    assert slurm_jobs.follow([job]) == {}


def test_a_squeue_that_does_not_answer_says_nothing_of_the_jobs(cluster, caplog):
    cluster.says(otherwise="Unable to contact slurm controller (connect failure)")
    assert slurm_jobs.squeue({"7"}) is None
    assert "Unable to contact slurm controller" in caplog.text
    cluster.says()
    assert slurm_jobs.squeue({"7"}) == {}


def test_a_lost_cell_is_a_failed_one(tmp_path, monkeypatch):
    monkeypatch.setenv(failures.FOLDER, str(tmp_path / "failures"))
    returned = failures.lost(3, ["seed=1", "method=sft"], "SLURM's job 7_3 ended (CANCELLED)")
    assert returned.return_value == float("inf")  # the worst a sweeper can be told
    (recorded,) = failures.collect()
    assert (recorded["num"], recorded["cell"], recorded["code"]) == (3, "seed=1 method=sft", 1)
    assert recorded["message"].startswith("SLURM's job 7_3 ended (CANCELLED); the same command")


def test_the_only_cell_that_failed_is_named(random_model, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("CWAC_TEST_CRASH", "1")
    sweep = ["hydra.searchpath=[file://tests/conf]", "method=crash", "seed=0,1", "train.max_steps=3"]
    assert call("-m", *overrides(random_model, tmp_path, *sweep)) == 1
    (line,) = (line for line in "".join(capfd.readouterr()).splitlines() if "error: RuntimeError" in line)
    assert line.endswith("planted crash in seed 1 [seed=1]")  # all else was given to every cell


@pytest.mark.parametrize(
    ("launcher", "plugin", "extra"), [("slurm", "submitit", "slurm"), ("ray_cluster", "ray", "ray")]
)
def test_a_launcher_that_is_not_installed_is_named_with_its_extra(launcher, plugin, extra, tmp_path, capfd):
    if importlib.util.find_spec(f"hydra_plugins.hydra_{plugin}_launcher"):
        pytest.skip("it is installed")
    assert call("-m", f"hydra/launcher={launcher}", "seed=0,1", f"paths.runs={tmp_path / 'runs'}") == 2
    assert f"need the extra `{extra}`: pip install -e '.[{extra}]'" in capfd.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_time_limit_met_too_often_names_its_keys():
    class UncompletedJobError(Exception):
        """As submitit's, which is known by its name: it need not be installed."""

    said = str(train.timed_out(UncompletedJobError("Job not requeued because: timed-out too many times.")))
    assert "hydra.launcher.max_num_timeout" in said and "hydra.launcher.timeout_min" in said
    assert train.timed_out(ValueError()) is None


@pytest.mark.slow
@pytest.mark.parametrize("service", ["slurm", "ray"])
def test_a_sweep_on_a_cluster_of_this_machine(service, tmp_path):
    """Killed, cancelled, timed out and waiting cells; all equal those of hydra/launcher=basic in the end."""
    folder = subprocess.run(["mktemp", "-d"], capture_output=True, text=True, check=True).stdout.strip()
    log = tmp_path / "log"
    with log.open("w") as file:
        code = subprocess.run(
            ["bash", str(Path("tests/cluster") / f"{service}.sh"), folder],
            cwd=ROOT,
            env={**os.environ, "PYTHON": sys.executable},
            stdout=file,
            stderr=subprocess.STDOUT,
            timeout=HANGS,
        ).returncode
    said = log.read_text()
    if code == 3:
        pytest.skip(said.strip().splitlines()[-1])
    assert code == 0 and said.rstrip().endswith("all held"), said
