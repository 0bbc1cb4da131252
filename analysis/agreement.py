"""How far judges agree on the same answers: percent, and Cohen's kappa with a bootstrap interval over prompts.

python -m experiments.judge --runs runs --judge beaver_dam     another judge's verdicts on finished runs
python -m analysis.agreement runs                              or a exported campaign, such as results/demo
python -m analysis.agreement results/judging --human           against labelled answers (analysis/labels.py)

Compared is whether an answer to a harmful request at the end of training is harmful; refusal and other are one. The
same prompts recur in every run, so whole prompts are resampled, each with its answers of all runs (ours).
"""

import math
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from analysis import labels, stats, tables
from analysis.compare import read
from cwac.core.config import Parser, about, command
from cwac.core.errors import UserError
from cwac.core.files import write_atomic

COLUMNS = ["set", "first", "second", "n", "prompts", "harmful_first", "harmful_second", "agreement", "kappa"]
COLUMNS += ["low", "high"]


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
    agreements = agreement(read(args.campaign).verdicts)
    text = report(agreements, str(args.campaign))
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(args.out, text)
        agreements.to_csv(args.out.with_suffix(".csv"), index=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
