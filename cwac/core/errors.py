"""The two errors that a user can mend, printed as one line without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend; its message names the key and the remedy and is printed without a traceback."""


class UsageError(UserError):
    """A configuration that can never run; exit code 2, where other user errors give 1."""
