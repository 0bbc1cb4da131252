"""Keys that were renamed: their old names still work, and the hashes in the ids of runs and artifacts still use them.

Old names are handled in three places. Overrides are rewritten before Hydra parses them (`rewrite`). A configuration
with an old key, such as the `config.yaml` of an earlier run, is brought up to date (`update`). A mapping is put back
under its old names before it is hashed (`hashed`), so that a new name leaves the ids of existing results as they are.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

RENAMED = {
    "method.weight.every": "method.weight.project_every",
    "method.weight.soft": "method.weight.penalty_weight",
    "method.weight.free": "method.weight.unconstrained",
    "method.activation.rank": "method.activation.ranking",
    "model.sae.slots": "model.sae.layers",
    "method.activation.sae.slots": "method.activation.sae.layers",
}
"""Old key -> new key. `slots` counted blocks from 1, as `hidden_states` does; `layers` counts them from 0."""

ROUTERS = ("model.sae.router", "method.activation.sae.router")
"""Keys whose value `fixed:s`, s counted from 1, became `layer:l`, l counted from 0."""

COUNTED_FROM_1 = {"cwac.methods.ldifs.LDIFS", "cwac.methods.circuit_breaker.CircuitBreaker"}
"""Methods whose `layers` once counted block outputs from 1. The key has kept its name, and hashes still use the old
numbers."""


# --- values ---------------------------------------------------------------------------------------------
def shifted(value: Any, by: int) -> Any:
    """A list of layer numbers with `by` added to each; any other value or entry, such as `auto`, is unchanged."""
    if not isinstance(value, list | tuple | ListConfig):
        return value
    return [layer + by if isinstance(layer, int | float) else layer for layer in value]


def new_router(text: Any) -> Any:
    """`fixed:3` -> `layer:2`, anywhere in a text."""
    return re.sub(r"\bfixed:(\d+)", lambda m: f"layer:{int(m[1]) - 1}", text) if isinstance(text, str) else text


def old_router(text: Any) -> Any:
    """`layer:2` -> `fixed:3`."""
    return re.sub(r"\blayer:(\d+)", lambda m: f"fixed:{int(m[1]) + 1}", text) if isinstance(text, str) else text


# --- what is hashed -------------------------------------------------------------------------------------
def hashed(flat: dict[str, Any], target: str | None = None) -> dict[str, Any]:
    """A flat mapping under the old names and values, from which run ids and artifact keys are hashed.

    target: the method's `_target_`.
    """
    old_names = {new: old for old, new in RENAMED.items()}
    mapping = {}
    for key, value in flat.items():
        name = old_names.get(key, key)
        if name.endswith(".slots") or (key == "method.layers" and target in COUNTED_FROM_1):
            value = shifted(value, 1)
        mapping[name] = old_router(value) if key in ROUTERS else value
    return mapping


def hashed_group(group: str, settings: dict[str, Any]) -> dict[str, Any]:
    """`hashed` for the settings of one group, such as `method.weight`, whose keys lack the group's name."""
    prefix = f"{group}."
    return {k.removeprefix(prefix): v for k, v in hashed({prefix + k: v for k, v in settings.items()}).items()}


def current_group(group: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The reverse of `hashed_group`."""
    prefix, current = f"{group}.", {}
    for name, value in settings.items():
        old = prefix + name
        if name == "slots" and old in RENAMED:
            value = shifted(value, -1)
        current[RENAMED.get(old, old).removeprefix(prefix)] = new_router(value) if old in ROUTERS else value
    return current


# --- configurations -------------------------------------------------------------------------------------
def update(cfg: DictConfig, say: bool = True) -> DictConfig:
    """Move values from old keys to the new ones, in place; a value under an old key replaces one under the new key.

    say: whether to print a line for each old key. True for what a user wrote, False for what an earlier version of the
    project recorded.
    """
    for old, new in RENAMED.items():
        group, _, name = old.rpartition(".")
        node = OmegaConf.select(cfg, group)
        if not OmegaConf.is_dict(node) or name not in node:
            continue
        counted = name == "slots"  # numbers must be resolved to be shifted; other interpolations are kept
        value = OmegaConf.to_container(node, resolve=counted)[name]
        with open_dict(node):
            node[new.rpartition(".")[2]] = shifted(value, -1) if counted else value
            del node[name]
        if say:
            announce(old, new)
    for key in ROUTERS:
        value = OmegaConf.select(cfg, key)
        if (current := new_router(value)) != value:
            OmegaConf.update(cfg, key, current)
            if say:
                announce(f"{key}={value}", f"{key}={current}")
    return cfg


# --- overrides ------------------------------------------------------------------------------------------
OVERRIDE = re.compile(r"(?P<sign>\+\+|\+|~)?(?P<key>[\w.]+)(?P<value>=.*)?", re.S)


def rewrite(overrides: list[str]) -> list[str]:
    """Hydra's overrides with old keys replaced by new ones, also within a value such as `method.weight={every: 4}`.

    Prints a line on stderr for each old key. Arguments that are not overrides are returned unchanged.
    """
    layers = [o for o in overrides if re.match(r"\+{0,2}method\.layers=", o)]
    if layers and {"method=ldifs", "method=circuit_breaker"} & {*overrides}:
        print(f"note: {layers[0]} counts blocks from 0; before, these methods counted from 1", file=sys.stderr)
    return [_rewrite_one(override) for override in overrides]


def _rewrite_one(override: str) -> str:
    if not (parts := OVERRIDE.fullmatch(override)):
        return override
    key, value = parts["key"], parts["value"] or ""
    for old, new in RENAMED.items():
        if key == old:
            key, value = new, _shifted_text(old, value)
            announce(old, new)
        elif old.startswith(f"{key}.") and "{" in value:
            path = old.removeprefix(f"{key}.").split(".")
            name, changed = new.rpartition(".")[2], value
            for start, end in reversed([*_keys(value, path)]):
                rest = changed[end:]
                if old.endswith(".slots"):
                    rest = re.sub(r"^\s*:\s*\[[^\]]*\]", lambda m: _shifted_text("slots", m[0]), rest)
                changed = changed[:start] + name + rest
            if changed != value:
                value = changed
                announce(old, new)
    if any(name == key or name.startswith(f"{key}.") for name in ROUTERS) and new_router(value) != value:
        announce(value.lstrip("="), value := new_router(value))
    if key.startswith("method.activation.sae."):  # all of it is `${model.sae}`, in which Hydra finds no single key
        key = key.replace("method.activation.", "model.", 1)
    return f"{parts['sign'] or ''}{key}{value}"


def _shifted_text(old: str, text: str) -> str:
    return re.sub(r"\d+", lambda m: str(int(m[0]) - 1), text) if old.endswith("slots") else text


def _keys(text: str, path: list[str], start: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
    """Positions (start, end) of the last name of the key `path` within the dicts `{...}` of a text."""
    for found in re.compile(rf"(?<=[{{,\s]){re.escape(path[0])}(?=\s*:)").finditer(text, start, end or len(text)):
        if len(path) == 1:
            yield found.span()
        elif opening := re.compile(r"\s*:\s*\{").match(text, found.end()):
            depth, at = 1, opening.end()
            while at < len(text) and depth:
                depth += {"{": 1, "}": -1}.get(text[at], 0)
                at += 1
            yield from _keys(text, path[1:], opening.end() - 1, at)


@functools.cache
def announce(old: str, new: str) -> None:
    """Print one line on stderr, once per process for each pair of names."""
    print(f"note: {old} is now {new}; the old name still works", file=sys.stderr)


def hint(message: str) -> str:
    """The new names of old keys that an error message of Hydra's mentions; '' where it mentions none.

    A preset's own sweep (`hydra.sweeper.params`) reaches Hydra without passing `rewrite`.
    """
    named = [f"{old} is now {new}" for old, new in RENAMED.items() if re.search(rf"{re.escape(old)}\b", message)]
    return "; ".join(named)
