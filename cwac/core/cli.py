"""The command `cwac`, which `pip install .` brings: `cwac train ...` is `python train.py ...`, `cwac report ...` is
`python -m analysis.report ...`, and so on for every command of `experiments/` and `analysis/`.

It becomes the command that it names (exec), so that launchers, signals and exit codes are those of that command. In a
checkout that is the checkout's; an installed package carries the commands inside itself (`cwac/commands`), since names
such as `analysis` are too general for everybody's site-packages. Imports next to nothing.
"""

from __future__ import annotations

import ast
import contextlib
import os
import re
import sys
from pathlib import Path

from cwac.core.errors import STARTED_AS
from cwac.core.paths import PACKAGE

HOME = next((p for p in (PACKAGE / "commands", PACKAGE.parent) if (p / "train.py").is_file()), PACKAGE.parent)
"""The folder with `train.py`, `experiments` and `analysis`."""
GROUPS = ("experiments", "analysis")

COMPLETION = r"""_cwac()
{
    local word="${COMP_WORDS[COMP_CWORD]}" choices
    if (( COMP_CWORD == 1 )); then
        choices="@NAMES@"
    elif [ "${COMP_WORDS[1]}" = train ]; then
        choices=$(COMP_LINE="train.py ${COMP_LINE#*train }" "${COMP_WORDS[0]}" train -sc query=bash 2> /dev/null)
    fi
    COMPREPLY=($(compgen -o nospace -o default -W "$choices" -- "$word"))
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -F _cwac cwac
"""
"""For bash, and for zsh after `bashcompinit`; the keys of a run are Hydra's own completion."""


def commands() -> dict[str, Path]:
    """Name -> file of every command: `train`, and each module of `GROUPS` that has a `main`."""
    found = {"train": HOME / "train.py"}
    for group in GROUPS:
        for path in sorted((HOME / group).glob("[!_]*.py")):
            if "\ndef main(" in path.read_text(encoding="utf-8"):
                found[path.stem] = path
    return found


def version() -> str:
    """What `cwac.__version__` says, read from its file: core imports nothing above it."""
    return re.search(r'^__version__ = "(.+)"$', (PACKAGE / "__init__.py").read_text(encoding="utf-8"), re.M)[1]


def usage(there: dict[str, Path]) -> str:
    """The names of all commands, each with the first line of its module's docstring."""
    lines = ["usage: cwac COMMAND ...     (cwac COMMAND --help tells more)", ""]
    for name, path in there.items():
        said = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]
        lines.append(f"  {name:<14} {said}")
    completion = 'eval "$(cwac completion)"   # in bash; in zsh after: autoload bashcompinit; bashcompinit'
    return "\n".join([*lines, "", "  cwac --version", f"  {completion}"])


def argv_of(name: str, path: Path) -> list[str]:
    """How Python is asked for a command: `train.py` as a script, the others as modules."""
    if name == "train":
        return [sys.executable, str(path)]
    return [sys.executable, "-m", f"{path.parent.name}.{name}"]


def main(argv: list[str] | None = None) -> int:
    """Become the command that the first argument names; returns 2 for one that is none."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["--version"]:
        print(f"cwac {version()}")
        return 0
    there = commands()
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        with contextlib.suppress(BrokenPipeError):  # a reader that has gone, as of `... | head`
            print(usage(there), flush=True)
        return 0 if arguments else 2
    if arguments[0] == "completion":
        print(COMPLETION.replace("@NAMES@", " ".join([*there, "completion"])), end="")
        return 0
    if arguments[0] not in there:
        import difflib

        close = difflib.get_close_matches(arguments[0], there, n=3, cutoff=0.7)
        meant = f"; did you mean {' or '.join(close)}?" if close else "; cwac --help lists them"
        print(f"error: cwac has no command {arguments[0]}{meant}", file=sys.stderr)
        return 2
    ahead = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HOME), *([ahead] if ahead else [])])
    os.environ[STARTED_AS] = "cwac train"
    command = [*argv_of(arguments[0], there[arguments[0]]), *arguments[1:]]
    sys.stdout.flush()
    os.execv(command[0], command)
    raise AssertionError("exec does not return")


if __name__ == "__main__":
    sys.exit(main())
