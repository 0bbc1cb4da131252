"""docs/add_a_method.md, taken at its word: its files and no other make a method, a model and a task."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from cwac import packaged_model
from tests.conftest import ROOT, SMALL

BLOCK = re.compile(r"^`([\w/.]+)`:\n\n```\w+\n(.*?)^```$", re.M | re.S)
BLOCKS = dict(BLOCK.findall((ROOT / "docs" / "add_a_method.md").read_text()))
METHOD = ("cwac/methods/safeinstr.py", "conf/method/safeinstr.yaml")
BALL = ("cwac/methods/ball.py", "conf/method/ball.yaml")


def write(project: Path, *names: str) -> None:
    for name in names:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(BLOCKS[name])


def run(project: Path, *command: str) -> tuple[int, str]:
    """Exit code and output of a Python command in the temporary project, on that project's own code."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def sources(project: Path) -> dict[str, str]:
    """Every file that the project runs on."""
    files = [p for p in project.rglob("*") if p.suffix in (".py", ".yaml") and "runs" not in p.parts]
    return {str(p.relative_to(project)): p.read_text() for p in files}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """The project as it would be if nobody had written SafeInstr."""
    folder = tmp_path_factory.mktemp("newcomer") / "project"
    left = (
        ".git",
        ".venv",
        "runs",
        "artifacts",
        "results",
        "wandb",
        "outputs",
        "tests",
        "docs",
        "benchmarks",
        "local",
        "__pycache__",
    )
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*left))
    for name in (*METHOD, "conf/chosen/tuned/tiny_safeinstr.yaml"):
        (folder / name).unlink()
    labels = folder / "analysis" / "paper.py"
    labels.write_text(re.sub(r'^ +"safeinstr": .*\n', "", labels.read_text(), flags=re.M))
    for name in ("figures.py", "headline.py"):  # a place among the looks, and one among those that are shown first
        listed = folder / "analysis" / name
        listed.write_text(listed.read_text().replace(', "safeinstr"', ""))
    for preset in (folder / "conf" / "experiment").glob("*.yaml"):  # the grids name the paper's baselines
        preset.write_text(re.sub(r"\bsafeinstr,|^ +safeinstr: .*\n", "", preset.read_text(), flags=re.M))
    said = {name for name, text in sources(folder).items() if "safeinstr" in text}
    # of the paper itself: its audit, its claims, and which methods are its baselines
    assert said == {"analysis/audit.py", "analysis/claims.yaml", "analysis/paper.py"}
    return folder


def test_the_page_shows_the_files_that_ship():
    for name in METHOD:
        assert BLOCKS[name] == (ROOT / name).read_text(), f"{name} and docs/add_a_method.md differ"


def test_two_files_make_a_method_that_trains_and_stands_in_the_table(project):
    code, output = run(project, "train.py", "method=safeinstr")
    assert code == 2 and "Could not find 'method/safeinstr'" in output
    before = sources(project)
    write(project, *METHOD)
    grid = ["model=tiny", "method=sft,safeinstr", "harmful_ratio=0.1", "train.max_steps=3", *SMALL]
    code, output = run(project, "train.py", "-m", *grid)
    assert code == 0, output
    code, output = run(project, "-m", "analysis.demo", "--runs", "runs", "--out", "results/mine")
    assert code == 0, output
    table = (project / "results/mine/table.md").read_text()
    for label in ("SFT", "safeinstr"):
        assert re.search(rf"^\| {label} +\| +0\.1 \| 1 \| +[\d.]+ \[[\d., ]+\]§ \(n=1\)", table, re.M), table
    after = sources(project)
    assert {name for name in after if after[name] != before.get(name)} == set(METHOD) and set(before) <= set(after)


def test_the_method_that_edits_weights_keeps_them_where_it_says(project):
    write(project, *BALL)
    grid = ["model=tiny", "method=ball", "method.radius=0.001", "train.max_steps=3", "keep_weights=true"]
    code, output = run(project, "train.py", *grid, *SMALL, "train.learning_rate=1e-2")
    assert code == 0, output
    assert "method=ball: holds every matrix within 0.001 of its norm from its start" in output
    folder = next((project / "runs").glob("tiny-*-ball-s0-*"))
    trained = load_file(folder / "model" / "model.safetensors")
    aligned = load_file(Path(packaged_model("tiny", project / "artifacts")) / "model.safetensors")
    moved = {n: float((trained[n] - W).norm() / W.norm()) for n, W in aligned.items() if W.norm() > 0}
    assert max(moved.values()) == pytest.approx(0.001, rel=1e-3)  # at this rate the ball's edge is reached
    for name in BALL:
        (project / name).unlink()


@pytest.mark.parametrize("named", ["name: ball\n", ""])
def test_a_method_whose_yaml_has_another_name_is_refused(project, named):
    own = project / "conf/method/mine.yaml"
    own.write_text(f"defaults:\n  - cwac\n  - _self_\n{named}")
    runs = {p.name for p in project.glob("runs/*/status.json")}
    code, output = run(project, "train.py", "method=mine", "model=tiny", "train.max_steps=1")
    own.unlink()
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert code == 2 and "Traceback" not in output
    assert line.startswith("error: method=mine: conf/method/mine.yaml has n") and "write name: mine there" in line
    assert {p.name for p in project.glob("runs/*/status.json")} == runs


@pytest.mark.slow
def test_one_file_makes_a_model_and_one_beside_its_data_a_task(project, random_model):
    shutil.copytree(random_model, project / "models/mine")
    before = sources(project)
    task = "conf/task/reviews.yaml"
    write(project, "conf/model/mine.yaml", task, "data/me/reviews/train.csv", "data/me/reviews/test.csv")
    # the real pools are not here; the page's own command reads them from paths.data
    grid = ["model=mine", "task=toy_sentiment,reviews", "method=sft", "pools=toy", "paths.data=data"]
    grid += [*SMALL, "train.max_steps=2", "++task.n_validation=2", "seed=1"]
    code, output = run(project, "train.py", "-m", *grid)
    assert code == 0, output
    after = sources(project)
    assert {name for name in after if after[name] != before.get(name)} == {"conf/model/mine.yaml", task}
    runs = {p.parent.name.rsplit("-", 1)[0] for p in (project / "runs").glob("mine-*/status.json")}
    assert runs == {"mine-toy_sentiment-p0-sft-s1", "mine-reviews-p0-sft-s1"}
    code, output = run(project, "-m", "analysis.demo", "--runs", "runs", "--out", "results/mine")
    assert code == 0, output
    table = (project / "results/mine/table.md").read_text()
    assert "### mine, reviews" in table and "### mine, toy_sentiment" in table
