"""Checks of single values, one clear error each: `require_number` for any key, the others for the keys of a method.

The settings classes of methods call them in `__post_init__`, so that no instance with a wrong value exists, whether
Hydra, a script or a test builds it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from cwac.core.errors import UsageError
from cwac.core.keys import did_you_mean, near


def is_number(value) -> bool:
    """True and False count as no numbers."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def require_number(
    key: str, value, low: float | None = None, high: float | None = None, *, whole: bool = False
) -> None:
    """Raises UsageError unless value is finite and low <= value <= high; None means no bound.

    key: in full, e.g. `train.learning_rate`. whole: 3.0 counts as a whole number, as it does in YAML and in run ids.
    """
    kind = "a whole number" if whole else "a number"
    ends = (f"at least {low:g}" if low is not None else "", f"at most {high:g}" if high is not None else "")
    bounds = " and ".join(filter(None, ends))
    if not is_number(value) or not math.isfinite(value) or (whole and value != int(value)):
        raise UsageError(f"{key}={value} is not {kind}; give {kind} {bounds}")
    if (low is not None and value < low) or (high is not None and value > high):
        raise UsageError(f"{key}={value} is out of range; give {kind} {bounds}")


def check(condition, key: str, value, remedy: str) -> None:
    """Refuse a method's setting: UsageError that names `method.<key>`, the value and the remedy."""
    if not condition:
        raise UsageError(f"method.{key}={value} is not valid; {remedy}")


def check_number(key: str, value, low: float | None = None, high: float | None = None, *, null: bool = False) -> None:
    """A method's number, bounds included; null: None is valid too."""
    if not (null and value is None):
        require_number(f"method.{key}", value, low, high)


def check_whole(key: str, value, low: int, *, null: bool = False) -> None:
    """A method's whole number of at least `low`, written without a decimal point; null: None is valid too."""
    if not (null and value is None):
        require_number(f"method.{key}", value, low, whole=True)
        check(isinstance(value, int), key, value, f"give a whole number such as {int(value)}")


def check_share(key: str, value) -> None:
    """A method's share in (0, 1]."""
    check(is_number(value) and 0 < value <= 1, key, value, "give a share in (0, 1], e.g. 0.9")


def check_choice(key: str, value, options: Sequence[str]) -> None:
    check(value in options, key, value, f"use one of {', '.join(options)}{did_you_mean(near(value, options))}")


def check_flag(key: str, value) -> None:
    check(isinstance(value, bool), key, value, "give true or false")


def check_modules(key: str, value) -> None:
    """`all`, or a list of names of linear layers."""
    named = value == "all" if isinstance(value, str) else all(isinstance(name, str) for name in value)
    check(named, key, value, "use all, or a list such as [q_proj,v_proj]")


def check_unread(key: str, value, usual, read: bool, where: str) -> None:
    """Refuse a value that would change nothing: one other than the `usual` where nothing reads the key.

    where: the setting under which it is read, such as `select=number`.
    """
    check(read or value == usual, key, value, f"only method.{where} reads it: leave it at {usual}, or use that")


def check_layers(layers, *words: str, key: str = "layers") -> None:
    """A method's decoder blocks: None for all, one of `words`, or a list of whole numbers.

    Whether the model has them is seen when it is loaded.
    """
    listed = layers is None or (not isinstance(layers, int | str) and all(type(i) is int for i in layers))
    given = isinstance(layers, str) and layers in words
    remedy = ", ".join(["give a list of layer numbers counted from 0", *words])
    check(listed or given, key, layers, f"{remedy}, or null for all")
