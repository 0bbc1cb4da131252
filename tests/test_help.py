"""Every command says with --help what it does, with an example."""

import importlib
import re

import pytest

from cwac.core.config import about
from cwac.core.paths import CONF

ROOT = CONF.parent
COMMANDS = [
    f"{folder}.{path.stem}"
    for folder in ("analysis", "experiments")
    for path in sorted((ROOT / folder).glob("*.py"))
    if "ArgumentParser(" in path.read_text(encoding="utf-8")
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
