"""Cells of people's data files: each is checked when it is read, and an error names file, row and column."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from cwac.core.errors import UserError

LONGEST = 200_000
"""Characters; a longer text is no cell but a file read wrongly, and no model's context holds it."""


class Row(dict):
    """One row of a data set, which knows where it was read."""

    where: str = "a row"
    """As errors name it: `row 3 of <file>`, counted from 1."""


def cell(row: Mapping, path: str):
    """The value of a column; dots lead into nested ones. Raises UserError where there is no such column."""
    value = row
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            remedy = "mend the file, or name another column (task.text, .label, .response, .instruction)"
            raise problem(row, f"has no column {path!r}; it has {', '.join(row)}", remedy)
        value = value[part]
    return None if isinstance(value, float) and math.isnan(value) else value


def text(row: Mapping, path: str, empty: bool = False) -> str:
    """The cell as text; a number is taken as it is written.

    empty: whether a text of nothing but blanks will do; a null never does. Raises UserError for anything else.
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
    """The cell as true or false; a file of text alone spells it. Raises UserError for anything else."""
    value = cell(row, path)
    spelt = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
    if (said := str(value).strip().lower()) not in spelt:
        raise problem(row, f"has {value!r} in {path!r} where true or false belongs")
    return spelt[said]


def names_of(row: Mapping, path: str) -> list[str]:
    """The columns nested in a column that are true."""
    value = cell(row, path)
    if not isinstance(value, Mapping):
        raise problem(row, f"has no flags by name in {path!r}: it is {'null' if value is None else repr(value)}")
    return [name for name in value if flag(row, f"{path}.{name}")]


def problem(row: Mapping, what: str, remedy: str = "mend the row, or leave it out") -> UserError:
    return UserError(f"{getattr(row, 'where', Row.where)} {what}; {remedy}")
