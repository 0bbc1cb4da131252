"""Every command says with --help what it does, with an example."""

import importlib
import re

import pytest

from cwac.core.config import Parser, about
from cwac.core.paths import CONF

ROOT = CONF.parent
COMMANDS = [
    f"{folder}.{path.stem}"
    for folder in ("analysis", "experiments")
    for path in sorted((ROOT / folder).glob("*.py"))
    if "Parser(**" in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example(name, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main(["--help"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0 and "examples:" in printed
    assert re.search(rf"(?m)^  python -m ({re.escape(name)}|analysis\.agreement)\b", printed.partition("examples:")[2])


def test_commands_of_a_docstring_are_its_examples():
    doc = "What it does.\n\npython -m x.y a    one\npython -m x.y b \\\n    c\n\nA python is a snake: python.\n"
    found = about(doc)
    assert found["description"] == "What it does."
    assert found["epilog"] == "examples:\n  python -m x.y a    one\n  python -m x.y b \\\n    c"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_mistyped_option_is_told_its_near_names(name, capsys):
    """`--hepl` is near to what every command has."""
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main(["--hepl"])
    assert ended.value.code == 2 and "there is no --hepl: did you mean --help" in capsys.readouterr().err


def said(capsys, parse, *given):
    with pytest.raises(SystemExit) as ended:
        parse(list(given))
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_near_names_are_of_what_was_given_alone(capsys):
    parser = Parser(prog="x")
    parser.add_argument("--out", required=True)
    parser.add_argument("--data", "--also")
    parser.add_argument("rest", nargs="*")
    for parse in (parser.parse_args, parser.parse_intermixed_args):
        parser._given = None
        assert said(capsys, parse, "--ot", "a") == (
            "x: error: the following arguments are required: --out; there is no --ot: did you mean --out?"
        )
        parser._given = None
        assert said(capsys, parse, "--out", "a", "--dat", "b", "-otu=c").endswith(
            "unrecognized arguments: -otu=c; there is no -otu: did you mean --out?"
        )
        parser._given = None
        assert said(capsys, parse, "--out", "a", "--nothing-like-it").endswith(
            "unrecognized arguments: --nothing-like-it"
        )
        parser._given = None
        assert said(capsys, parse, "--out", "a", "--pools-data", "b").endswith("; --pools-data is --data now")
    assert vars(Parser(prog="y").parse_args([])) == {}


@pytest.mark.parametrize(
    ("typed", "ours"),
    [("--lr", "learning-rate"), ("--output-dir", "out"), ("--model_name", "model"), ("--train-file", "rows")],
)
def test_an_option_by_the_name_of_other_programs_is_told_ours(typed, ours, capsys):
    parser = Parser(prog="x")
    for name in ("learning-rate", "out", "model", "rows", "trainer"):
        parser.add_argument(f"--{name}")
    line = said(capsys, parser.parse_args, typed, "a")
    assert line.endswith(f"there is no {typed}: did you mean --{ours}?")


def test_a_subcommands_options_are_near_too(capsys):
    parser = Parser(prog="x")
    parser.add_subparsers(dest="do").add_parser("push").add_argument("--repo")
    assert said(capsys, parser.parse_args, "push", "--rpo", "a").endswith("there is no --rpo: did you mean --repo?")
