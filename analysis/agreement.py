"""How far judges agree on the same answers: percent, and Cohen's kappa with a bootstrap interval over prompts.

python -m experiments.judge --runs runs --judge beaver_dam     another judge's verdicts on finished runs
python -m analysis.agreement runs                              or a exported campaign, such as results/demo
python -m analysis.agreement results/judging --human           against labelled answers (analysis/labels.py)

Compared is whether an answer to a harmful request at the end of training is harmful; refusal and other are one. The
same prompts recur in every run, so whole prompts are resampled, each with its answers of all runs (ours). A
second table says what that does to a campaign's HS, by method.
"""

import math
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from analysis import apart, compare, labels, paper, stats, tables
from analysis.collect import VERDICT_COLUMNS, Collection, collect
from cwac.core.config import Parser, about, command
from cwac.core.errors import UserError
from cwac.core.files import write_atomic

COLUMNS = ["set", "first", "second", "n", "prompts", "harmful_first", "harmful_second", "agreement", "kappa"]
COLUMNS += ["low", "high"]
CELL = ["model", "task", "harmful_ratio", "method", "learning_rate"]
BY_METHOD = [*CELL, "first", "second", "runs"]


def agreement(verdicts: pd.DataFrame) -> pd.DataFrame:
    """One row a pair of judges, over all sets (`all`) and each set of prompts; columns `COLUMNS`.

    verdicts: columns as in `analysis.collect.VERDICT_COLUMNS`. n counts answers that both judged; shares are percent.
    Raises UserError where no answer was judged twice.
    """
    harmful = verdicts.assign(harmful=verdicts["verdict"] == "harmful")
    wide = harmful.pivot(index=["run_id", "set", "id"], columns="judge", values="harmful")
    records = []
    for first, second in combinations(sorted(wide.columns), 2):
        pair = wide[[first, second]].dropna().astype(bool)
        for name in ["all", *sorted(set(pair.index.get_level_values("set")))]:
            chosen = pair if name == "all" else pair.xs(name, level="set", drop_level=False)
            if chosen.empty:
                continue
            a, b = chosen[first].to_numpy(), chosen[second].to_numpy()
            cells = pd.DataFrame(np.stack([a & b, a & ~b, ~a & b, ~a & ~b], 1).astype(int), index=chosen.index)
            clusters = cells.groupby(level=["set", "id"]).sum().to_numpy()
            low, high = stats.kappa_interval(clusters)
            shares = (100 * a.mean(), 100 * b.mean(), 100 * (a == b).mean())
            known = float(stats.kappa(clusters.sum(0)))
            records.append([name, first, second, len(chosen), len(clusters), *shares, known, low, high])
    if not records:
        judges = ", ".join(sorted(set(verdicts["judge"]))) or "none"
        raise UserError(
            f"no answer has verdicts of two judges here (judges: {judges}). Remedy: python -m experiments.judge"
        )
    return pd.DataFrame(records, columns=COLUMNS)


def read(folder: Path) -> Collection:
    """A folder of runs, those that differ in a method's settings as methods of their own, or an exported campaign.

    Raises UserError if it is neither or holds no finished run, or where a table would take two runs for one.
    """
    if (folder / "results.csv").is_file():
        return compare.finished(apart.read(folder), folder)
    return apart.by_setting(compare.finished(collect(folder), folder), folder, [])[0]


def by_method(collection: Collection) -> pd.DataFrame:
    """HS in percent under each of two judges; one row a `CELL` and pair of judges, as tables are ordered.

    Columns `BY_METHOD` and, of each set, `SET_first` and `SET_second`: over the answers that both judged, runs pooled.
    """
    of_run = collection.rows.drop_duplicates("run_id").set_index("run_id")[CELL]
    verdicts = collection.verdicts[VERDICT_COLUMNS].assign(harmful=collection.verdicts["verdict"] == "harmful")
    wide = verdicts.pivot(index=["run_id", "set", "id"], columns="judge", values="harmful")
    records = []
    for first, second in combinations(sorted(wide.columns), 2):
        pair = wide[[first, second]].dropna().astype(float).reset_index().join(of_run, on="run_id")
        for place, part in pair.groupby(CELL, dropna=False):
            entry = dict(zip(BY_METHOD, (*place, first, second, part["run_id"].nunique()), strict=True))
            for name, answers in part.groupby("set"):
                entry |= {f"{name}_first": 100 * answers[first].mean(), f"{name}_second": 100 * answers[second].mean()}
            records.append(entry)
    place = ["model", "task", "harmful_ratio"]
    return pd.DataFrame(
        sorted(records, key=lambda r: (*(r[c] for c in place), paper.method_order(r["method"]), r["learning_rate"]))
    )


def moved(found: pd.DataFrame) -> str:
    """The table of `by_method` as Markdown, and how far HS moves at most."""
    sets = [name.removesuffix("_first") for name in found.columns if name.endswith("_first")]
    rows = []
    for row in found.to_dict("records"):
        shown = [show(row[f"{name}_first"], row[f"{name}_second"]) for name in sets]
        rate = "-" if math.isnan(row["learning_rate"]) else paper.rate_label(row["learning_rate"])
        label = [
            row["model"],
            row["task"],
            f"{row['harmful_ratio']:g}",
            paper.method_label(row["method"]),
            rate,
            str(row["runs"]),
        ]
        rows.append([*label, f"{row['first']} / {row['second']}", *shown])
    header = ["model", "task", "p", "method", "rate", "runs", "judges", *(f"HS {name}" for name in sets)]
    shifts = np.abs(np.stack([found[f"{name}_second"] - found[f"{name}_first"] for name in sets]))
    note = f"HS by the one judge / the other, %, of the same answers; it moves by {np.nanmax(shifts):.1f} at most."
    return f"{tables.markdown(header, rows, key=7, width=10_000)}\n\n{note}"


def show(first: float, second: float) -> str:
    return "-" if math.isnan(first) else f"{first:.1f} / {second:.1f}"


def report(found: pd.DataFrame, name: str) -> str:
    """The table as Markdown."""
    rows = []
    for row in found.itertuples():
        known = "undefined" if math.isnan(row.kappa) else f"{row.kappa:.2f} [{row.low:.2f}, {row.high:.2f}]"
        harmful = f"{row.harmful_first:.1f} / {row.harmful_second:.1f}"
        pair = f"{row.first} / {row.second}"
        rows.append([pair, row.set, row.n, row.prompts, harmful, f"{row.agreement:.1f}", known])
    header = ["judges", "set", "answers", "prompts", "harmful, %", "agreement, %", "Cohen's kappa"]
    notes = (
        "Harmful or not, answers at the end of training. Kappa: 95 % bootstrap interval over prompts; undefined where "
        "both judges give the same verdict throughout."
    )
    return "\n\n".join([f"# Agreement of judges: {name}", tables.markdown(header, rows, key=2), notes]) + "\n"


@command
def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0, or 2 for bad input."""
    parser = Parser(**about(__doc__, "python -m analysis.agreement"))
    parser.add_argument("campaign", type=Path, help="folder of runs, or a exported campaign")
    parser.add_argument("--human", action="store_true", help="the folder holds labels.csv and verdicts.csv: compare")
    parser.add_argument("--out", type=Path, help="write the Markdown there, and the numbers beside it as .csv")
    args = parser.parse_args(argv)
    if args.human:
        text = labels.report(labels.read(args.campaign), str(args.campaign))
        print(text)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(args.out, text)
        return 0
    collection = read(args.campaign)
    agreements, shares = agreement(collection.verdicts), by_method(collection)
    text = f"{report(agreements, str(args.campaign))}\n## HS by each judge\n\n{moved(shares)}\n"
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(args.out, text)
        agreements.to_csv(args.out.with_suffix(".csv"), index=False)
        shares.to_csv(args.out.with_name(f"{args.out.stem}-by-method.csv"), index=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
