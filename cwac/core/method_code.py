"""Which code a method was when a run was made, so that a run of other code is not taken for one of today's.

A run's id is a hash of its settings and not of code: a sweep would otherwise train everything again after each edit.
Instead `env.json` keeps `of(target)`, and where it differs from today's, a reused run and a table say so. Imports
neither torch nor the method.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
from collections.abc import Iterator
from importlib import util
from pathlib import Path

from cwac.core.paths import PACKAGE

COUNT = ("cwac.methods.", "cwac.constraints.")
BASE = "cwac.methods.base"
"""What every method imports: the contract, which an edit of a log line would otherwise make other code of all."""
THEN = "+"
"""Between the hashes of a run that was begun by one code and went on from a checkpoint by another."""


@functools.cache
def of(target: str | None) -> str | None:
    """A hash of the source of a method's class: its module, and what this imports of `cwac.methods` and `constraints`.

    Those are the helpers and constraints it shares with other methods. `BASE`, the trainer, the data and the judge do
    not count, nor do comments, docstrings and layout. Read once a process, since a run is made by the code that was
    loaded. None where there is no source.

    target: the dotted name of the class, as `_target_` of a method's yaml.
    """
    sources: dict[str, str] = {}
    left = [target.rpartition(".")[0]] if target else []
    while left:
        module = left.pop()
        path = None if module in sources else file_of(module)
        if path is not None:
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, ValueError):
                continue
            try:
                tree = ast.parse(text)
            except (SyntaxError, ValueError):  # it cannot have run like this
                sources[module] = text
                continue
            sources[module] = plain(tree)
            left += [name for name in imported(tree, module) if name.startswith(COUNT) and name != BASE]
    read = "\0".join(sources[module] for module in sorted(sources))
    return hashlib.sha256(read.encode()).hexdigest()[:16] if sources else None


def joined(before: str | None, now: str | None) -> str | None:
    """What is recorded of a run that goes on from its checkpoint: the codes that trained it, in their order.

    None where the first is unknown; as it was where today's is.
    """
    return before if None in (before, now) or before.split(THEN)[-1] == now else f"{before}{THEN}{now}"


def file_of(module: str) -> Path | None:
    """The source of a module; one of this package is found without importing what is above it."""
    if module.startswith("cwac."):
        path = PACKAGE.parent.joinpath(*module.split(".")).with_suffix(".py")
        return path if path.is_file() else None
    with contextlib.suppress(Exception):  # what is wrong with it is said when the class is built
        origin = spec.origin if (spec := util.find_spec(module)) else None
        return Path(origin) if origin and origin.endswith(".py") else None
    return None


def imported(tree: ast.Module, module: str) -> Iterator[str]:
    """The names that a module imports, as those of modules; a class among them is the name of no file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            name = ".".join([*above, *([node.module] if node.module else [])])
            yield from (name, *(f"{name}.{alias.name}" for alias in node.names))


def plain(node: object) -> str:
    """A syntax tree as text, without what does nothing.

    Texts that stand by themselves, which docstrings are, and empty fields are left out, so that the versions of Python
    that know other fields agree.
    """
    if isinstance(node, list):
        return "[" + ",".join(plain(part) for part in node if not is_docstring(part)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [(name, value) for name, value in ast.iter_fields(node) if value is not None and value != []]
    return f"{type(node).__name__}({','.join(f'{name}={plain(value)}' for name, value in fields)})"


def is_docstring(node: object) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
