"""Two campaigns side by side: every cell that either measured, the difference with its interval, and flags.

python -m analysis.compare results/demo runs --out results/local/compare.md

A difference is second minus first. Cells that share at least two seeds are compared by pairs of seeds (the same base
model, rows and order); otherwise by Welch's unequal-variance interval over the seeds of each (Biometrika 34, 1947).
Without two seeds on both sides there is no interval and nothing is flagged as different.
"""

import argparse
import math
import sys
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from scipy import stats as scipy_stats

from analysis import apart, paper, stats, tables
from analysis.collect import Collection, at_end, one_judge
from analysis.tables import KEYS, MAIN
from cwac.core.config import Parser, about, command
from cwac.core.errors import UserError, naming_earlier
from cwac.core.files import write_atomic

COLUMNS = [*KEYS, "first", "second", "n_first", "n_second", "difference", "low", "high", "over", "flag"]


def read(folder: Path) -> Collection:
    """A folder of runs or an exported campaign; raises UserError if it is neither or holds no finished run."""
    return finished(apart.read(folder, by_rate=False), folder)


def finished(collection: Collection, folder: Path) -> Collection:
    """The runs of a folder; raises UserError if none of them is finished."""
    if not collection.runs:
        raise UserError(f"{folder} holds no finished run. Remedy: a folder of runs, or an exported campaign.")
    return collection


def welch(first: list[float], second: list[float]) -> tuple[float, float, float]:
    """Mean difference second - first and its 95 % interval, of at least two values each.

    Without any variance the interval has width 0: it is known only that the seeds agree.
    """
    difference = math.fsum(second) / len(second) - math.fsum(first) / len(first)
    if max(first) == min(first) and max(second) == min(second):
        return difference, difference, difference
    found = scipy_stats.ttest_ind(second, first, equal_var=False).confidence_interval(stats.LEVEL)
    return difference, float(found.low), float(found.high)


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> tuple[float, float, float, str]:
    """Difference of two cells (seed -> value), its 95 % interval, and what that is over: pairs, seeds or none."""
    if len(first.keys() & second.keys()) >= 2:
        found = stats.paired(second, first)
        return found.mean, found.low, found.high, "pairs"
    a, b = list(first.values()), list(second.values())
    if min(len(a), len(b)) >= 2:
        return (*welch(a, b), "seeds")
    return math.fsum(b) / len(b) - math.fsum(a) / len(a), math.nan, math.nan, "none"


def flag(first: Mapping[int, float], second: Mapping[int, float], low: float, high: float) -> str:
    """`differs` where the interval leaves out 0, `equal` where all values agree, else empty."""
    if set(first.values()) == set(second.values()) and len(set(first.values())) == 1:
        return "equal"
    return "differs" if low > 0 or high < 0 else ""


def compare(first: Collection, second: Collection, judge: str | None = None) -> pd.DataFrame:
    """One row a cell that either campaign measured at the end of training; columns `COLUMNS`.

    first and second are means over seeds, NaN where a campaign lacks the cell; then flag is `only in first` or
    `only in second`.
    """
    cells: list[dict[tuple, dict[int, float]]] = []
    for collection in (first, second):
        rows = at_end(one_judge(collection.rows, judge)).dropna(subset="value")
        groups = rows.groupby(KEYS, dropna=False)
        cells.append({key: dict(zip(g["seed"], g["value"], strict=True)) for key, g in groups})
    records = []
    for key in sorted({*cells[0], *cells[1]}, key=str):
        a, b = (side.get(key, {}) for side in cells)
        means = [math.fsum(side.values()) / len(side) if side else math.nan for side in (a, b)]
        if a and b:
            change, low, high, over = difference(a, b)
            mark = flag(a, b, low, high)
        else:
            change, low, high, over = math.nan, math.nan, math.nan, "none"
            mark = "only in first" if a else "only in second"
        records.append([*key, *means, len(a), len(b), change, low, high, over, mark])
    return pd.DataFrame(records, columns=COLUMNS)


def show_difference(row: pd.Series) -> str:
    """`+3.1 [+1.0, +5.2]`, with a decimal for percentages and three digits for the rest."""
    form = "+.1f" if row["metric"] in paper.PROPORTIONS else "+.3g"
    if math.isnan(row["difference"]):
        return "-"
    if row["over"] == "none":
        return f"{row['difference']:{form}} (no interval)"
    if row["low"] == row["high"]:
        return f"{row['difference']:{form}} (each seed)"
    return f"{row['difference']:{form}} [{row['low']:{form}}, {row['high']:{form}}]"


def report(found: pd.DataFrame, names: tuple[str, str], metrics: tuple[str, ...] = MAIN) -> str:
    """The comparison as Markdown: what was flagged, and a table a model and task."""
    shown = found[found["metric"].isin(metrics)]
    both = shown[shown["over"] != "none"]
    marks = shown["flag"].value_counts()
    parts = [
        f"# {names[0]} (first) and {names[1]} (second)",
        f"{len(shown)} cells of {', '.join(metrics)}; {marks.get('differs', 0)} of the {len(both)} with an interval "
        f"differ, where about {0.05 * len(both):.0f} would by chance alone; {marks.get('equal', 0)} are equal, "
        f"{marks.get('only in first', 0)} only in the first and {marks.get('only in second', 0)} only in the second.",
        "Difference: second minus first, 95 % interval over pairs of seeds where both share them, else Welch's.",
    ]
    for (model, task), group in shown.groupby(["model", "task"]):
        rows = []
        ordered = sorted(
            (row for _, row in group.iterrows()),
            key=lambda r: (metrics.index(r["metric"]), r["set"], r["harmful_ratio"], paper.method_order(r["method"])),
        )
        for row in ordered:
            form = ".1f" if row["metric"] in paper.PROPORTIONS else ".3g"
            sides = [
                f"{row[side]:{form}} (n={row[f'n_{side}']})" if row[f"n_{side}"] else "missing"
                for side in ("first", "second")
            ]
            of = f"{row['metric']} {row['set']}"
            where = [paper.method_label(row["method"]), of, f"{row['harmful_ratio']:g}"]
            rows.append([*where, *sides, show_difference(row), row["flag"]])
        header = ["method", "metric", "p", "first", "second", "difference", "flag"]
        parts += [f"## {model}, {task}", tables.markdown(header, rows, key=3, width=160)]
    return "\n\n".join(parts) + "\n"


@command
def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0, or 2 for bad input."""
    parser = Parser(**about(__doc__, "python -m analysis.compare"))
    parser.add_argument("first", type=Path, help="folder of runs, or an exported campaign")
    parser.add_argument("second", type=Path, help="the other one")
    parser.add_argument("--judge", help="whose verdicts to use where the runs were judged by several")
    parser.add_argument("--out", type=Path, help="write the Markdown there, and the cells of all metrics as .csv")
    args = parser.parse_args(argv)
    with naming_earlier(args.out):
        return publish(args)


def publish(args: argparse.Namespace) -> int:
    """Read, compare, print, write; see `main`."""
    found = compare(read(args.first), read(args.second), args.judge)
    text = report(found, (str(args.first), str(args.second)))
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(args.out, text)
        found.to_csv(args.out.with_suffix(".csv"), index=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
