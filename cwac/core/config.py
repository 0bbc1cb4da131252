"""Composes configurations with Hydra and builds objects from them.

Imports neither torch nor transformers, so that skipping a finished cell of a sweep costs milliseconds.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from cwac.core import renamed
from cwac.core.errors import UsageError, UserError
from cwac.core.paths import CONF


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


def command(main: Callable[..., int]) -> Callable[..., int]:
    """The `main(argv)` of a command: a UserError is one line on stderr and exit status 2."""

    @functools.wraps(main)
    def run(*arguments, **settings) -> int:
        try:
            return main(*arguments, **settings)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    return run


def instantiate(node: DictConfig) -> Any:
    """Hydra's instantiate; an invalid value surfaces as the UserError its dataclass raised."""
    import hydra
    from hydra.errors import InstantiationException

    try:
        return hydra.utils.instantiate(node, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from error
        if isinstance(cause, TypeError):  # a key the class does not have
            raise UsageError(f"{node.get('name', '')}: {cause}; see conf/README.md for the keys") from error
        if isinstance(cause, ImportError):
            raise UsageError(f"{node.get('_target_')} is no class that can be loaded; mend the _target_") from error
        raise


def compose(overrides: list[str] | None = None) -> DictConfig:
    """One composed cell, as `python train.py <overrides>` would see it."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    with initialize_config_dir(str(CONF), version_base="1.3"):
        return renamed.update(hydra_compose("config", overrides=renamed.rewrite(overrides or [])))


def grid(experiment: str | None, overrides: list[str] | None = None) -> list[list[str]]:
    """The overrides of every cell of a preset, in the order Hydra walks them; those of the command line win.

    A sweep override (`seed=0,1`) replaces the preset's axis of the same key, as it does under `-m`. A search is a grid
    like any other; Optuna walks it in another order. experiment: None where the overrides alone say what to sweep.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    chosen = [*([f"experiment={experiment}"] if experiment else []), *renamed.rewrite(overrides or [])]
    parser = OverridesParser.create()
    with initialize_config_dir(str(CONF), version_base="1.3"):
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
    from hydra import initialize_config_dir

    cells = grid(experiment, overrides)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return [renamed.update(hydra_compose("config", overrides=cell)) for cell in cells]
