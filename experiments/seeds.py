"""What the experiments without runs share: the configurations of several seeds, and where their numbers come from."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from omegaconf import DictConfig

from cwac.core import config, validation
from cwac.core.environment import environment
from cwac.core.errors import UserError


def cells(seeds: str, given: list[str]) -> list[DictConfig]:
    """The overrides `given`, composed and validated at each seed of a list such as `0,1,2`; UserError for another."""
    found = []
    for seed in seeds.split(","):
        if not seed.strip().isdigit():
            raise UserError(f"--seeds {seeds} is no list of whole numbers such as 0,1,2")
        cfg = config.compose([*given, f"seed={seed}"])
        validation.validate(cfg)
        found.append(cfg)
    return found


def at_least_one(args: argparse.Namespace, *names: str) -> None:
    """Raises UserError where one of these options is less than 1."""
    for name in names:
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)} is too few; give at least 1")


def write_provenance(out: Path, module: str, argv: list[str] | None, given: list[str], **more: object) -> None:
    """`provenance.json`: the command, its overrides with the defaults' (`given`), and the environment."""
    about = {"command": ["python", "-m", module, *(argv or sys.argv[1:])], "overrides": given, **more}
    (out / "provenance.json").write_text(json.dumps({**about, **environment()}, indent=2) + "\n")
