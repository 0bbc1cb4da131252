"""Plants one bug into a function of a running process and runs tests on it."""

import functools
import importlib
import inspect
import os
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def plant(function: str, before: str, after: str) -> None:
    """Give `module:qualified.name` the code it would have if `before` read `after` in its source.

    The function object stays, so that every module that imported it runs the bug. Raises AssertionError where
    `before` is not there exactly once: then the code changed and the bug has to be thought of anew.
    """
    module, _, name = function.partition(":")
    target = inspect.unwrap(functools.reduce(getattr, name.split("."), importlib.import_module(module)))
    own, whole = inspect.getsource(target), inspect.getsource(importlib.import_module(module))
    assert own.count(before) == 1 and whole.count(own) == 1, f"{function} has no single {before!r}"
    code = compile(whole.replace(own, own.replace(before, after)), target.__code__.co_filename, "exec")
    for part in name.split("."):
        code = next(c for c in code.co_consts if isinstance(c, types.CodeType) and c.co_name == part)
    target.__code__ = code


def run(bug: tuple[str, str, str] | None, tests: list[str], log: str) -> None:
    """Exit with pytest's code for these tests, with the bug planted."""
    import pytest

    os.chdir(ROOT)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    if bug is not None:
        plant(*bug)
    os._exit(pytest.main(["-q", "-x", "-n0", "-p", "no:cacheprovider", "-m", "not gpu", *tests]))
