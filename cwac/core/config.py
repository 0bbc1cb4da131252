"""Composes configurations with Hydra and builds objects from them.

Imports neither torch nor transformers, so that skipping a finished cell of a sweep costs milliseconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cwac.core import renamed
from cwac.core.errors import UsageError, UserError, as_typed
from cwac.core.identity import flatten
from cwac.core.keys import check_names, did_you_mean, explain, near
from cwac.core.paths import CONF

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells know it."""

CLOSED = 141
"""Exit status where the reader of the output has gone (`... | head`), as shells know it."""


def register_searches() -> None:
    """Make `experiment=tune_<method>` mean `experiment=tune method=<method>`, for every method that `tune.yaml` names.

    The names are Hydra's own options then, listed and completed as files are; a file of the same name wins.
    """
    searches = yaml.safe_load((CONF / "experiment" / "tune.yaml").read_text(encoding="utf-8"))["search"]
    for path in (CONF / "method").glob("*.yaml"):
        if path.stem in searches:
            defaults = ["tune", {"override /method": path.stem}, "_self_"]
            preset = {"group": "experiment", "name": f"tune_{path.stem}", "package": "_global_"}
            ConfigStore.instance().store(node={"defaults": defaults}, **preset)


register_searches()


def about(doc: str, program: str | None = None) -> dict[str, Any]:
    """Arguments of `Parser` from a module's docstring: its first line, and its commands as examples.

    program: how the module is called, for its usage. A command of the docstring is a line that begins with `python `;
    those that continue it are indented.
    """
    found = re.findall(r"(?m)^ *python [^\n]*(?:\n {4,}[^\n]+)*", doc)
    return {
        "prog": program and as_typed(program),
        "description": as_typed(doc.strip().splitlines()[0]),
        "epilog": as_typed("\n".join(["examples:", *(f"  {example.strip()}" for example in found)])),
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }


MOVED = {"--pools-data": "--data"}
"""An option's earlier name -> its name now."""

ALIKE = (
    ("out", "output", "output-dir", "out-dir", "output-path", "save-dir", "save-to"),
    ("learning-rate", "lr", "rate"),
    ("epochs", "epoch", "num-epochs", "n-epochs", "num-train-epochs"),
    ("rows", "file", "train-file", "dataset", "dataset-path", "data-path", "input"),
    ("model", "model-name", "model-name-or-path", "base-model"),
    ("models", "model-name", "model-name-or-path"),
    ("method", "methods", "defense", "defence"),
    ("runs", "runs-dir", "run-dir", "folder", "input-dir"),
    ("exported", "results", "results-dir", "export"),
    ("experiment", "preset", "campaign"),
    ("max-length", "max-len", "max-seq-length", "cutoff-len"),
    ("max-new-tokens", "max-tokens", "n-tokens"),
    ("artifacts", "cache", "cache-dir"),
)
"""Names of an option in other programs, after ours."""


class Parser(argparse.ArgumentParser):
    """`argparse.ArgumentParser`, whose errors say which option a mistyped one may have meant."""

    _given: list[str] | None = None

    def parse_known_args(self, args=None, namespace=None):
        if self._given is None:  # of the first call: `parse_intermixed_args` makes several
            self._given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print the usage and the message, and exit with status 2."""
        super().error(f"{message}{''.join(map(self._hint, self._unknown()))}")

    def _options(self) -> set[str]:
        """The long options of this parser and of its subcommands, `--` before each."""
        inner = (action.choices.values() for action in self._actions if isinstance(action, argparse._SubParsersAction))
        own = {name for name in self._option_string_actions if name.startswith("--")}
        return own.union(*(parser._options() for parsers in inner for parser in parsers))

    def _unknown(self) -> list[str]:
        """The words of the command line that look like options and are none, nor the beginning of one."""
        words = itertools.takewhile(lambda word: word != "--", self._given or [])
        names = [word.partition("=")[0] for word in words if re.match(r"--?[A-Za-z][\w-]+(=|$)", word)]
        return [name for name in names if not any(option.startswith(name) for option in self._options())]

    def _hint(self, name: str) -> str:
        """`; there is no --ot: did you mean --out?`; an empty text where nothing is near."""
        options = self._options()
        if MOVED.get(name) in options:
            return f"; {name} is {MOVED[name]} now"
        bare = name.lstrip("-").replace("_", "-")
        close = [f"--{ours}" for ours, *others in ALIKE if bare in others and f"--{ours}" in options]
        close = close or [f"--{option}" for option in near(name.lstrip("-"), [option[2:] for option in options])]
        return f"; there is no {name}: did you mean {' or '.join(close)}?" if close else ""


def command(main: Callable[..., int]) -> Callable[..., int]:
    """The `main(argv)` of a command: a UserError, or Hydra's of a mistyped override, is one line and exit status 2.

    Ctrl-C is one line and 130. A reader that has gone ends it without a word, as it ends `cat`.
    """

    @functools.wraps(main)
    def run(*arguments, **settings) -> int:
        try:
            try:
                return main(*arguments, **settings)
            finally:
                sys.stdout.flush()  # here, where a closed pipe can still be told apart
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except OmegaConfBaseException as error:
            print(f"error: {explain(str(error))}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted; run the same command again: what was finished is found", file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:
            leave_the_pipe()
            return CLOSED
        except Exception as error:
            if type(error).__module__.partition(".")[0] != "hydra":  # which takes long to import
                raise
            print(f"error: {explain(str(error))}", file=sys.stderr)
            return 2

    return run


def leave_the_pipe() -> None:
    """Let what is still buffered go nowhere: Python would fail once more when it flushes at exit."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # a stream of a test's, without a descriptor
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def instantiate(node: DictConfig) -> Any:
    """Hydra's instantiate; an invalid value surfaces as the UserError its dataclass raised."""
    import hydra
    from hydra.errors import InstantiationException

    try:
        return check_booleans(hydra.utils.instantiate(node, _convert_="all"))
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from error
        if isinstance(cause, TypeError):  # a key the class does not have
            raise UsageError(f"{node.get('name', '')}: {cause}{meant(node, str(cause))}") from error
        if isinstance(cause, ImportError):
            raise UsageError(f"{node.get('_target_')} is no class that can be loaded; mend the _target_") from error
        raise


def meant(node: DictConfig, message: str) -> str:
    """The end of an error on a keyword that a class does not have: which of its fields may have been meant."""
    from hydra.utils import get_class

    unknown = re.search(r"unexpected keyword argument '(\w+)'", message)
    there: set[str] = set()
    if unknown:
        for key, target in flatten(OmegaConf.to_container(node, resolve=False)).items():
            if key.rpartition(".")[2] == "_target_" and dataclasses.is_dataclass(kind := get_class(target)):
                there |= {f.name for f in dataclasses.fields(kind) if f.init}
    return did_you_mean(near(unknown[1], there) if unknown else []) or "; see conf/README.md for the keys"


def check_booleans(built: Any, prefix: str = "") -> Any:
    """What was built, if each field that its dataclasses annotate as bool is one; `no` is a text, and true."""
    for field in dataclasses.fields(built) if dataclasses.is_dataclass(built) else ():
        value, key = getattr(built, field.name, None), f"{prefix}{field.name}"
        if field.type in ("bool", bool) and not isinstance(value, bool):
            raise UsageError(f"{key}={value} is neither true nor false; give one of the two")
        if dataclasses.is_dataclass(value):
            check_booleans(value, f"{key}.")
    return built


DIGITS = 12
"""Significant digits of a number in a configuration: `range(0.1,0.41,0.1)` gives 0.30000000000000004, which is 0.3."""


OF_THE_MODEL = ("base", "base_revision", "revision", "license")
"""Keys of a `conf/model` option that tell of the weights it names, not of its architecture."""


def settle(cfg: DictConfig, overrides: Iterable[str] = ()) -> DictConfig:
    """A composed configuration, in place, with what every entrance to the project has to make of it.

    Numbers that differ by the rounding of a sum are one number, so that no two runs stand for one cell. Where the
    overrides put other weights in an option's place (a folder, another hub id), what the option says of its own
    weights goes, unless it is given anew. Raises UsageError where a chosen option's file has another name.
    """
    overrides = [*overrides]
    check_names(dict(o.split("=", 1) for o in overrides if "=" in o))
    given = {o.lstrip("+~").split("=")[0] for o in overrides}
    if given & {"model.kind", "model.path", "model.hub_id"}:
        for key in OF_THE_MODEL:
            if key in cfg.model and f"model.{key}" not in given:
                cfg.model[key] = None

    for key, value in flatten(OmegaConf.to_container(cfg, resolve=False)).items():
        found = rounded(value)
        if found != value:
            OmegaConf.update(cfg, key, found)
    return cfg


def rounded(value: Any) -> Any:
    """A number to `DIGITS` significant digits, and each number of a list; anything else as it is."""
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) and math.isfinite(value) else value


@contextmanager
def composing() -> Iterator[None]:
    """Hydra over `CONF`, also inside a cell that Hydra itself launched: there it is set aside, and put back after.

    Hydra holds one global instance and refuses a second, so that what composes in a test fails under `train.py`.
    """
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().hydra = None
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            yield
    finally:
        GlobalHydra.instance().hydra = outer


def compose(overrides: list[str] | None = None) -> DictConfig:
    """One composed cell, as `python train.py <overrides>` would see it."""
    from hydra import compose as hydra_compose

    with composing():
        overrides = renamed.rewrite(overrides or [])
        return settle(renamed.update(hydra_compose("config", overrides=overrides)), overrides)


def grid(experiment: str | None, overrides: list[str] | None = None) -> list[list[str]]:
    """The overrides of every cell of a preset, in the order Hydra walks them; those of the command line win.

    A sweep override (`seed=0,1`) replaces the preset's axis of the same key, as it does under `-m`. A search is a grid
    like any other; Optuna walks it in another order. experiment: None where the overrides alone say what to sweep.
    """
    from hydra import compose as hydra_compose
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    chosen = [*([f"experiment={experiment}"] if experiment else []), *renamed.rewrite(overrides or [])]
    parser = OverridesParser.create()
    with composing():
        single = [o for o in chosen if not parser.parse_override(o).is_sweep_override()]
        base = hydra_compose("config", overrides=single, return_hydra_config=True)
        params = OmegaConf.to_container(base.hydra.sweeper.params or OmegaConf.create({}), resolve=True)
    swept = renamed.rewrite([f"{k}={v}" for k, v in params.items()])
    axes = {parser.parse_override(o).key_or_group: o for o in swept}
    axes.update({parser.parse_override(o).key_or_group: o for o in chosen})
    return [list(cell) for cell in BasicSweeper.split_arguments(parser.parse_overrides(list(axes.values())), None)[0]]


def expand(experiment: str | None, overrides: list[str] | None = None) -> list[DictConfig]:
    """Every cell of a preset's grid, composed; see `grid`."""
    from hydra import compose as hydra_compose

    cells = grid(experiment, overrides)
    with composing():
        return [settle(renamed.update(hydra_compose("config", overrides=cell)), cell) for cell in cells]
