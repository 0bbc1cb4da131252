"""Checks that the settings classes of methods make of their own values."""

from __future__ import annotations

from cwac.core.errors import UsageError


def is_number(value) -> bool:
    """True and False count as no numbers."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check(condition, key: str, value, remedy: str) -> None:
    """Refuse a method's setting: UsageError that names the key, the value and the remedy."""
    if not condition:
        raise UsageError(f"method.{key}={value} is not valid; {remedy}")
