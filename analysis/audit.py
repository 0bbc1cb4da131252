"""Checks the paper's own numbers against each other, so that nobody chases a printed value that cannot be right.

Peng, Zhang, Zeng, Jiang and Gao, arXiv:2604.12384: Tables 1 to 5 (`paper_results.csv`), sections 5.1, B.2, B.5, C.1.1
and App. D (`paper_statements.yaml`).

Tolerance of an average. A printed number is its value rounded to two decimals, off by at most 0.005. The mean of n
such cells is then off by at most 0.005 too, and the printed average by another 0.005: a printed average and the mean
of the printed cells may differ by 0.01 without contradiction, and by no more. Decimal arithmetic; no float tolerance.

python -m analysis.audit            (make audit: prints the numbers and writes analysis/AUDIT.md)
"""

import sys
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

import pandas as pd
import yaml

from analysis import paper
from cwac.core.config import Parser, about, command
from cwac.core.errors import UserError

TOLERANCE = Decimal("0.01")
STATEMENTS = Path(__file__).with_name("paper_statements.yaml")
REPORT = Path(__file__).with_name("AUDIT.md")
GROUP = ["artifact", "model", "method", "metric"]


@dataclass(frozen=True)
class Finding:
    """One thing in the paper that does not agree with another, with the printed numbers that show it."""

    kind: str
    """average | claim | twice | size"""
    where: str
    """Table, model and what else locates it."""
    message: str
    """What disagrees, in a sentence."""
    cells: dict[str, str]
    """Name of a printed number -> its digits."""
    key: tuple = ()
    """(artifact, model, method, metric) of an average."""


def number(text: str, where: str) -> Decimal:
    try:
        return Decimal(text)
    except InvalidOperation as error:
        raise UserError(f"{where}: {text!r} is not a number. Remedy: the digits as the paper prints them.") from error


def name_of(row: pd.Series) -> str:
    """`SST-2`, or `p=0.05` in the tables over the harmful ratio."""
    if row["artifact"] in ("table3", "table4"):
        return "average" if row["average"] else f"p={row['harmful_ratio']:g}"
    return "average" if row["average"] else paper.TASKS.get(row["task"], row["task"])


def title(artifact: str, model: str, *more: str) -> str:
    return ", ".join([artifact.replace("table", "Table "), paper.MODELS.get(model, model), *more])


def averages(printed: pd.DataFrame) -> list[Finding]:
    """Printed averages that are not the mean of their printed cells, within TOLERANCE.

    Raises UserError for an average without cells.
    """
    disagreements = []
    for key, group in printed.groupby(GROUP, sort=False):
        artifact, model, method, metric = key
        where = title(artifact, model, paper.method_label(method), metric)
        cells = {name_of(row): number(row["text"], where) for _, row in group[~group["average"]].iterrows()}
        for _, row in group[group["average"]].iterrows():
            if not cells:
                raise UserError(f"{where} has an average and no cells. Remedy: a complete paper_results.csv.")
            stated, n = number(row["text"], where), len(cells)
            total = sum(cells.values())
            if abs(stated - total / n) <= TOLERANCE:
                continue
            message = f"printed {stated}, the {n} cells give {total / n:.2f}; their sum is off by {stated * n - total}"
            if artifact in ("table3", "table4"):
                message += f"; a further column of {stated * (n + 1) - total} would make it right"
            shown_cells = {**{k: str(v) for k, v in cells.items()}, "average": str(stated)}
            disagreements.append(Finding("average", where, message, shown_cells, key))
    return disagreements


def not_lowest(printed: pd.DataFrame) -> list[Finding]:
    """Cells and averages where a method's HS is below CWAC's, against "CWAC always has the lowest HS"."""
    disagreements = []
    harm = printed[printed["metric"] == "HS"]
    for key, group in harm.groupby(
        ["artifact", "model", "task", "harmful_ratio", "average"], sort=False, dropna=False
    ):
        values = {r["method"]: r["text"] for _, r in group.iterrows()}
        ours = values.get("cwac")
        lower = {m: v for m, v in values.items() if ours is not None and Decimal(v) < Decimal(ours)}
        if lower:
            where = title(key[0], key[1], name_of(group.iloc[0]))
            text = ", ".join(f"{paper.method_label(m)} {v}" for m, v in lower.items())
            cells = {**{paper.method_label(m): v for m, v in lower.items()}, "CWAC": ours}
            disagreements.append(
                Finding("claim", where, f"HS of {text} is below CWAC's {ours}: CWAC is not the lowest", cells)
            )
    return disagreements


def pairs(printed: pd.DataFrame, metric: str, one: str, other: str) -> list[tuple[str, Decimal, Decimal]]:
    """(where, value of `one`, value of `other`) in every cell, averages left out, that prints both."""
    part = printed[(printed["metric"] == metric) & ~printed["average"]]
    found = []
    for key, group in part.groupby(["artifact", "model", "task", "harmful_ratio"], sort=False):
        values = dict(zip(group["method"], group["text"], strict=True))
        if one in values and other in values:
            where = title(key[0], key[1], name_of(group.iloc[0]))
            found.append((where, Decimal(values[one]), Decimal(values[other])))
    return found


def accuracy(printed: pd.DataFrame) -> list[Finding]:
    """Statements about FA that cells contradict: SafeInstr's advantage (C.1.1), and no loss against SFT."""
    disagreements = []
    for where, safeinstr, cwac in pairs(printed[printed["artifact"] == "table4"], "FA", "safeinstr", "cwac"):
        if safeinstr < cwac:
            message = f"SafeInstr's accuracy is not marginally higher (C.1.1): {safeinstr} against CWAC's {cwac}"
            disagreements.append(
                Finding("claim", where, message, {"SafeInstr FA": str(safeinstr), "CWAC FA": str(cwac)})
            )
    for where, cwac, sft in pairs(printed, "FA", "cwac", "sft"):
        if cwac < sft:
            message = f"FA is {sft - cwac} below SFT's, against no loss of accuracy"
            disagreements.append(Finding("claim", where, message, {"SFT FA": str(sft), "CWAC FA": str(cwac)}))
    return disagreements


def growth(printed: pd.DataFrame) -> list[Finding]:
    """Tables over p in which CWAC's HS rises more than SFT's between the smallest and the largest p."""
    disagreements = []
    for (artifact, model), group in printed[printed["artifact"].isin(["table3", "table4"])].groupby(
        ["artifact", "model"]
    ):
        part = group[(group["metric"] == "HS") & ~group["average"]].sort_values("harmful_ratio")
        ends = {m: (g["text"].iloc[0], g["text"].iloc[-1]) for m, g in part.groupby("method")}
        if not {"cwac", "sft"} <= ends.keys():
            continue
        rise = {m: Decimal(ends[m][1]) - Decimal(ends[m][0]) for m in ("cwac", "sft")}
        if rise["cwac"] > rise["sft"]:
            low, high = part["harmful_ratio"].min(), part["harmful_ratio"].max()
            message = f"from p={low:g} to {high:g} CWAC's HS rises by {rise['cwac']}, SFT's by {rise['sft']}"
            cells = {
                f"{paper.method_label(m)} p={p:g}": v for m in rise for p, v in zip((low, high), ends[m], strict=True)
            }
            disagreements.append(Finding("claim", title(artifact, model), message, cells))
    return disagreements


def twice(printed: pd.DataFrame) -> list[Finding]:
    """Cells that Tables 1 and 5 both print (same model, task, method, metric) with different values."""
    key = ["model", "method", "task", "metric"]
    cells = printed[~printed["average"]]
    first, second = (cells[cells["artifact"] == t].set_index(key)["text"] for t in ("table1", "table5"))
    disagreements = []
    for at in [k for k in first.index if k in second.index]:
        one, other = first[at], second[at]
        if Decimal(one) != Decimal(other):
            model, method, task, metric = at
            where = ", ".join([paper.MODELS[model], paper.TASKS[task], paper.method_label(method), metric])
            message = f"Table 1 prints {one}, Table 5 {other}: {abs(Decimal(one) - Decimal(other))} apart"
            disagreements.append(Finding("twice", where, message, {"Table 1": one, "Table 5": other}))
    return disagreements


def sizes(statements: dict) -> list[Finding]:
    """Sources of D_H whose number of prompts differs between sections, or from what the release holds."""
    disagreements = []
    for source, row in statements["harmful_set"].items():
        whole = row["exists"] if row["5.1"] == "all" else row["5.1"]
        if row["B.2"] != whole:
            size = f"all of it ({row['release']})" if row["5.1"] == "all" else str(row["5.1"])
            cells = {"5.1": str(row["5.1"]), "B.2": str(row["B.2"])}
            disagreements.append(Finding("size", f"D_H, {source}", f"5.1 says {size}, B.2 says {row['B.2']}", cells))
    return disagreements


def findings(path: Path = paper.RESULTS) -> list[Finding]:
    """Everything that does not agree, in the order of the report."""
    printed = paper.printed(path)
    claims = [*not_lowest(printed), *accuracy(printed), *growth(printed)]
    return [*averages(printed), *claims, *twice(printed), *sizes(load_statements())]


def load_statements() -> dict:
    return yaml.safe_load(STATEMENTS.read_text(encoding="utf-8"))


HEADINGS = {
    "average": "Averages that do not follow from their cells",
    "claim": "Claims that its tables contradict",
    "size": "Sizes of the harmful set that disagree",
    "twice": "Cells printed twice with different values",
}
NOTES = {
    "average": """\
A printed average may differ from the mean of its printed cells by 0.01: 0.005 for the cells, which are rounded to two
decimals, and 0.005 for the average itself. Everything beyond is listed. "A further column": what one more column of
the table over p would have to hold to make the average right; compare with the cells of Tables 1 and 5 at p = 0.""",
    "claim": """\
Said of CWAC: the lowest HS throughout; no loss of task accuracy; robustness to p; and of SafeInstr (C.1.1) an accuracy
marginally higher. Each line is a cell, or an average, that says otherwise. That robust means flatter in p than SFT is
our reading.""",
    "size": "Sections 5.1 and B.2 describe the same set.",
    "twice": """\
Tables 1 and 5 print some methods on the same models and tasks, without naming a setting that differs. The spread says
how much a rerun may differ before it contradicts the paper, which gives no seeds and no intervals.""",
}
LISTED_FROM = Decimal(5)  # points; smaller differences between Tables 1 and 5 are counted, not listed (ours)


def counts(found: list[Finding]) -> dict[str, int]:
    """How many findings there are of each kind, in the order of the report."""
    return {kind: sum(f.kind == kind for f in found) for kind in HEADINGS}


def tally(found: list[Finding], printed: pd.DataFrame) -> str:
    """How many averages each table prints, and how many of them do not follow."""
    parts = []
    for artifact, group in printed[printed["average"]].groupby("artifact"):
        name = title(artifact, "").rstrip(", ")
        parts.append(f"{name} {sum(f.where.startswith(name) for f in found if f.kind == 'average')} of {len(group)}")
    return "By table: " + ", ".join(parts) + "."


def report(found: list[Finding], statements: dict, printed: pd.DataFrame) -> str:
    """The audit as Markdown: each finding with the printed numbers that show it, then what is left open."""
    number_of = counts(found)
    parts = [
        "# Audit of the paper's own numbers",
        "Paper: arXiv:2604.12384v1. Written by `make audit` from `analysis/paper_results.csv` and "
        "`analysis/paper_statements.yaml`; change a cell and it changes.",
        "\n".join(f"- {HEADINGS[kind]}: **{n}**" for kind, n in number_of.items()),
    ]
    for kind, heading in HEADINGS.items():
        parts += [f"## {heading}: {number_of[kind]}", NOTES[kind]]
        of_kind = [f for f in found if f.kind == kind]
        if kind == "average":
            parts.append(tally(found, printed))
        if kind == "twice":
            of_kind = [
                f for f in of_kind if abs(Decimal(f.cells["Table 1"]) - Decimal(f.cells["Table 5"])) >= LISTED_FROM
            ]
            parts.append(f"{number_of[kind]} cells differ, {len(of_kind)} of them by {LISTED_FROM} points or more.")
        parts.append("\n".join(f"- {f.where}: {f.message}.{shown(f)}" for f in of_kind) or "None.")
    minutes, memory = statements["cost"]["epoch_minutes"], statements["cost"]["memory_GB"]
    low, high = (100 * (m / minutes["SFT"] - 1) for m in minutes["CWAC"])
    parts += [
        "## Cost",
        f"- B.5: {minutes['CWAC'][0]} to {minutes['CWAC'][1]} minutes an epoch against {minutes['SFT']} are {low:.1f} "
        f"to {high:.1f} % more; the paper says below {statements['cost']['claimed_overhead_percent']} %; "
        f"{memory['CWAC']} GB against {memory['SFT']} GB are {100 * (memory['CWAC'] / memory['SFT'] - 1):.1f} % more.",
        "## Arguments of the appendix",
        "\n".join(f"- {p['section']}: {p['says']}. Remark: {p['remark']}." for p in statements["proofs"]),
        "## What the paper leaves open, and what we chose",
        "\n".join(
            f"- **{o['question']}**. The paper: {o['paper']}. Ours: {o['choice']}; {keys(o)}."
            for o in statements["open"]
        ),
    ]
    return "\n\n".join(parts) + "\n"


def shown(finding: Finding) -> str:
    """The cells of an average; other findings name their numbers in the message."""
    if finding.kind != "average":
        return ""
    return " Cells: " + ", ".join(f"{k} {v}" for k, v in finding.cells.items() if k != "average") + "."


def keys(entry: dict) -> str:
    """Where our choice stands in the configuration."""
    by_key: dict[str, list[str]] = {}
    for method, key in entry["keys"].items():
        by_key.setdefault(key, []).append(method)
    return ", ".join(f"`{key}` of {', '.join(methods)}" for key, methods in by_key.items()) or "see conf/method/"


@command
def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0, or 2 for bad input."""
    parser = Parser(**about(__doc__, "python -m analysis.audit"))
    parser.add_argument("--csv", type=Path, default=paper.RESULTS, help="the paper's numbers (paper_results.csv)")
    parser.add_argument("--out", type=Path, default=REPORT, help="the report to write (analysis/AUDIT.md)")
    args = parser.parse_args(argv)
    try:
        found = findings(args.csv)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.out.write_text(report(found, load_statements(), paper.printed(args.csv)), encoding="utf-8")
    for kind, n in counts(found).items():
        print(f"{n:4d}  {HEADINGS[kind][0].lower()}{HEADINGS[kind][1:]}")
    print(f"with the cells that show them: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
