"""Reads single cells of users' data files and checks each one; an error names the file, row and column."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from cwac.core.errors import UserError

LONGEST = 200_000
"""In characters. A longer text means that a file was parsed wrongly, and no model's context could hold it."""


class Row(dict):
    """One row of a data set, together with the place it was read from."""

    where: str = "a row"
    """The place as errors name it: `row 3 of <file>`, counted from 1."""


def cell(row: Mapping, path: str):
    """The value of a column; a path with dots reads a nested column. Raises UserError where the column is missing."""
    value = row
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            remedy = "mend the file, or name another column (task.text, .label, .response, .instruction)"
            raise problem(row, f"has no column {path!r}; it has {', '.join(row)}", remedy)
        value = value[part]
    return None if isinstance(value, float) and math.isnan(value) else value


def text(row: Mapping, path: str, empty: bool = False) -> str:
    """The cell as text; a number is returned as it is written.

    empty: whether an empty or blank text is accepted. Null is never accepted. Raises UserError for any other value,
    and for a text longer than `LONGEST` or with characters that are not valid Unicode.
    """
    value = cell(row, path)
    if isinstance(value, bool) or not isinstance(value, str | int | float | None):
        kind = "a list" if isinstance(value, Sequence) else f"of type {type(value).__name__}"
        raise problem(row, f"has no text in {path!r}: the value is {kind}")
    found = "" if value is None else str(value)
    if value is None or not found.strip() and not empty:
        raise problem(row, f"has no text in {path!r}: it is {'null' if value is None else 'empty'}")
    if len(found) > LONGEST:
        raise problem(row, f"has {len(found):,} characters in {path!r}")
    try:
        found.encode()
    except UnicodeEncodeError as error:  # half of a pair of surrogates, which JSON can hold and no tokenizer takes
        raise problem(row, f"has a character in {path!r} that is no Unicode ({error.reason})") from error
    return found


def lines(row: Mapping, path: str) -> str:
    """The cell as text, the items of a list each on a line of its own; '' for an empty text."""
    value = cell(row, path)
    if not isinstance(value, list):
        return text(row, path, empty=True)
    parts = []
    for item in value:
        part = Row({path.replace(".", " "): item})
        part.where = getattr(row, "where", Row.where)
        parts.append(text(part, path.replace(".", " "), empty=True))
    return "\n".join(parts)


def flag(row: Mapping, path: str) -> bool:
    """The cell as a boolean, which may be spelt as text or as 0 or 1. Raises UserError for any other value."""
    value = cell(row, path)
    spelt = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
    if (said := str(value).strip().lower()) not in spelt:
        raise problem(row, f"has {value!r} in {path!r} where true or false belongs")
    return spelt[said]


def names_of(row: Mapping, path: str) -> list[str]:
    """Names of the nested columns of a column whose value is true."""
    value = cell(row, path)
    if not isinstance(value, Mapping):
        raise problem(row, f"has no flags by name in {path!r}: it is {'null' if value is None else repr(value)}")
    return [name for name in value if flag(row, f"{path}.{name}")]


def problem(row: Mapping, what: str, remedy: str = "mend the row, or leave it out") -> UserError:
    return UserError(f"{getattr(row, 'where', Row.where)} {what}; {remedy}")
