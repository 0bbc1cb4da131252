"""The command `cwac`: what it becomes, what it lists and completes, and what an installed package carries."""

import os
import re
import subprocess
import sys
import zipfile

import pytest

from cwac import __version__
from cwac.core import cli
from cwac.core.config import about
from cwac.core.errors import STARTED_AS, UserError
from tests.conftest import ROOT


@pytest.fixture
def became(monkeypatch):
    """The argument vectors of `exec`, which is not done."""
    seen = []

    def execv(path, command):
        seen.append(command)
        raise SystemExit(0)

    monkeypatch.setattr(cli.os, "execv", execv)
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv(STARTED_AS, "")  # what the command sets is taken back
    return seen


def test_a_command_becomes_the_one_it_names(became):
    for given in (["train", "-m", "seed=0,1"], ["report", "--help"], ["judge", "runs/x"], ["cost", "model=llama2"]):
        with pytest.raises(SystemExit):
            cli.main(given)
    assert became == [
        [sys.executable, str(ROOT / "train.py"), "-m", "seed=0,1"],
        [sys.executable, "-m", "analysis.report", "--help"],
        [sys.executable, "-m", "experiments.judge", "runs/x"],
        [sys.executable, "-m", "experiments.cost", "model=llama2"],
    ]
    assert os.environ["PYTHONPATH"].split(os.pathsep)[:2] == [str(ROOT), str(ROOT)]


def test_under_the_command_texts_name_commands_as_they_were_typed(became, monkeypatch):
    said = "Remedy: python -m experiments.judge --judge keyword, then python train.py -m seed=0"
    typed = "Remedy: cwac judge --judge keyword, then cwac train -m seed=0"
    doc = "Judges.\n\npython -m analysis.report --out a\n"
    monkeypatch.delenv(STARTED_AS)
    assert (
        str(UserError(said)) == said and about(doc, "python -m analysis.report")["prog"] == "python -m analysis.report"
    )
    with pytest.raises(SystemExit):
        cli.main(["train"])
    assert os.environ[STARTED_AS] == "cwac train" and str(UserError(said)) == typed
    found = about(doc, "python -m analysis.report")
    assert (found["prog"], found["epilog"]) == ("cwac report", "examples:\n  cwac report --out a")


def test_every_module_with_a_main_is_a_command_and_no_name_is_taken_twice():
    files = [p for g in cli.GROUPS for p in (ROOT / g).glob("*.py") if "\ndef main(" in p.read_text()]
    assert set(cli.commands().values()) == {*files, ROOT / "train.py"}
    assert len({p.stem for p in files}) == len(files)


def test_it_says_what_there_is(capsys, became):
    assert cli.main(["--version"]) == 0 and capsys.readouterr().out == f"cwac {__version__}\n"
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    for name in cli.commands():
        assert re.search(rf"^  {name} +\S", said, re.M), name
    assert cli.main([]) == 2 and cli.main(["trian"]) == 2
    assert "error: cwac has no command trian; did you mean train?" in capsys.readouterr().err
    assert became == []


def test_the_command_loads_neither_torch_nor_hydra():
    code = "import sys; from cwac.core import cli; cli.main(['--version']); cli.commands(); "
    code += "print([m for m in ('torch', 'hydra', 'transformers', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"cwac {__version__}\n[]\n"


def complete(line: str, tmp_path) -> list[str]:
    """What bash offers behind a line, by the printed script, with this checkout's `cwac` on the path."""
    command = tmp_path / "cwac"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m cwac.core.cli "$@"\n')
    command.chmod(0o755)
    words = line.split(" ")
    script = (
        f'eval "$(cwac completion)"; COMP_LINE={line!r}; COMP_POINT={len(line)}; COMP_WORDS=({" ".join(words)} ); '
        f"COMP_CWORD={len(words) - 1}; "
        + ("" if words[-1] else f'COMP_WORDS[{len(words) - 1}]=""; ')
        + '_cwac; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    env = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_shell_completes_commands_and_hydras_keys(tmp_path):
    assert complete("cwac re", tmp_path) == ["report", "restore"]
    assert complete("cwac train method=cwac_", tmp_path) == ["method=cwac_closed", "method=cwac_literal"]


def test_no_message_names_the_package_on_an_index():
    """It is on none: whoever asks pip for it by its bare name, or for an extra of that, gets somebody else's."""
    texts = {
        p: p.read_text(encoding="utf-8") for g in ("cwac", "experiments", "analysis") for p in (ROOT / g).rglob("*.py")
    }
    texts |= {p: p.read_text(encoding="utf-8") for p in (ROOT / "conf").rglob("*.yaml")}
    assert [p for p, text in texts.items() if re.search(r"\bcwac\[|pip install cwac\b", text)] == []


@pytest.mark.slow
def test_an_installed_package_carries_the_commands(tmp_path):
    """Built as pip builds it: a wheel with all commands, which run away from any checkout."""
    pytest.importorskip("wheel", reason="building a wheel needs the package wheel")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    for name in filter(
        re.compile(r"(cwac|conf|analysis|experiments)/|train\.py|pyproject|README|LICENSE").match, listed
    ):
        target = tmp_path / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    build = "import setuptools.build_meta as b; print(b.build_wheel('..'))"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path / "source", check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    assert not {"analysis", "experiments", "train.py"} & {p.name for p in (tmp_path / "site").iterdir()}
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    cwac = [sys.executable, "-m", "cwac.core.cli"]
    for command, said in (
        (["train", "method=lisa", "--cfg", "job"], "name: lisa"),
        (["report", "--help"], "usage: cwac report"),
    ):
        done = subprocess.run([*cwac, *command], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0 and said in done.stdout, done.stderr
