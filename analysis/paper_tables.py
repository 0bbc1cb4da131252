"""The paper's Tables 1 to 6 from finished runs: ours | paper | gap, as Markdown, LaTeX (booktabs) and CSV.

Peng, Zhang, Zeng, Jiang and Gao, arXiv:2604.12384, Tables 1 to 6. The grid is the preset's of the same name, so what
is missing is known and named; the best value is bold and the second underlined, as in print.

python -m analysis.paper_tables table3 --runs runs --out results/local/table3              (make table3)
python -m analysis.paper_tables table3 --runs runs --out results/local/small model=tiny task=toy_sentiment
python -m analysis.paper_tables table3 --exported results/smollm2_table3 --out results/smollm2_table3
"""

import argparse
import hashlib
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from analysis import apart, audit, paper, stats, tables
from analysis.collect import Cell, Collection, at_end, collect, expected_cells, one_judge, pooled
from cwac.core.config import Parser, about, command
from cwac.core.errors import UserError, naming_earlier
from cwac.core.jsonl import read_jsonl

TITLES = {
    "table1": "Table 1: task accuracy (FA) and harmfulness score (HS), three tasks",
    "table2": "Table 2: PubMedQA (FA, HS) and AlpacaEval (AE)",
    "table3": "Table 3: HS and FA against the harmful ratio p",
    "table4": "Table 4: HS and FA against the harmful ratio p",
    "table5": "Table 5: the two constraints alone and together",
    "table6": "Table 6: answers to the same harmful request, SFT against CWAC",
}
# table -> (what its columns run over, its metrics in order, whether it prints an average)
LAYOUT = {
    "table1": ("task", ("FA", "HS"), True),
    "table2": ("task", ("FA", "HS", "AE"), False),
    "table3": ("harmful_ratio", ("HS", "FA"), True),
    "table4": ("harmful_ratio", ("HS", "FA"), True),
    "table5": ("task", ("FA", "HS"), True),
}
RATED = {"alpaca": ("AE",)}  # tasks without a test set of right answers
NOTES = """\
ours: mean ± half-width of a 95 % t-interval over n seeds, percent; (n=1): one seed, no such interval; §: the
exact interval over one seed's prompts, which is about one training alone and says nothing of other seeds; †: all seeds
agree, exact interval over one seed's prompts; (each seed): all seeds agree, no interval claimed. paper: as printed,
one run.
gap: ours minus paper, points. Best in bold, second underlined, among ours and in the paper each; lower HS is better.
An average is over the seeds that have every cell. ‡: the paper's average does not follow from its cells
(analysis/AUDIT.md). (ours) and (added): not in the paper's tables."""
NO_VALUES = "The paper has none of these cells (-); --overlay tiny=llama2 puts another model's values beside ours."


@dataclass
class Table:
    """One table to print; a cell is its text and an emphasis: empty, `best` or `second`."""

    title: str
    header: list[str]
    rows: list[list[tuple[str, str]]] = field(default_factory=list)
    breaks: list[int] = field(default_factory=list)
    """Indices of rows before which a rule goes."""


def plain(values: Iterable[str]) -> list[tuple[str, str]]:
    return [(value, "") for value in values]


@dataclass(frozen=True)
class Printed:
    """The numbers of one of the paper's tables, and which of its slugs stand for which of ours."""

    name: str
    overlay: Mapping[str, str]
    cells: Mapping[tuple, dict]
    """(model, method, metric) -> (task, harmful ratio) -> digits."""
    averages: Mapping[tuple, str]
    """(model, method, metric) -> digits."""
    broken: frozenset
    """(artifact, model, method, metric) of averages that do not follow from their cells."""

    def text(self, places: Sequence[tuple[str, float]], model: str, method: str, metric: str) -> tuple[str, bool]:
        """The digits the paper prints for a cell, or for the average over several, and whether it is this very cell.

        places: (task, harmful ratio) of the cells. Empty digits where the paper has no such cell, or where its average
        is over other cells than ours.
        """
        theirs = [(self.overlay.get(task, task), ratio) for task, ratio in places]
        other = self.overlay.get(model, model)
        cells = self.cells.get((other, method, metric), {})
        own = other == model and theirs == list(places)
        if len(places) == 1:
            return cells.get(theirs[0], ""), own
        return (self.averages.get((other, method, metric), "") if set(theirs) == cells.keys() else ""), own

    def follows(self, model: str, method: str, metric: str) -> bool:
        """Whether the paper's average follows from its cells."""
        return (self.name, self.overlay.get(model, model), method, metric) not in self.broken


def read_printed(name: str, overlay: Mapping[str, str] | None = None) -> Printed:
    """One of the paper's Tables 1 to 5, from `paper_results.csv`."""
    frame = paper.printed()
    cells: dict[tuple, dict] = {}
    averages: dict[tuple, str] = {}
    for row in frame[frame["artifact"] == name].itertuples():
        key = (row.model, row.method, row.metric)
        if row.average:
            averages[key] = row.text
        else:
            cells.setdefault(key, {})[row.task, row.harmful_ratio] = row.text
    return Printed(name, dict(overlay or {}), cells, averages, frozenset(f.key for f in audit.averages(frame)))


def build(
    name: str,
    collection: Collection,
    overlay: Mapping[str, str] | None = None,
    judge: str | None = None,
    of: str | None = None,
) -> pd.DataFrame:
    """Tables 1 to 5 as long rows, averages included: what the CSV holds.

    overlay: our slug of a model or task -> the paper's, whose values then stand beside ours, without a gap.
    of: one set of harmful prompts; without it HS is over all of them. Columns: model, task, harmful_ratio, average,
    method, metric, ours, low, high, half, n, over, expected, state, paper, gap, follows, extra_data.
    """
    axis, metrics, averaged = LAYOUT[name]
    printed = read_printed(name, overlay)
    found = one_judge(collection.rows, judge)
    if of is not None:
        sets = sorted(set(found.loc[found["metric"] == "HS", "set"]))
        if of not in sets:
            raise UserError(f"--set {of} has no HS row here. Remedy: one of {', '.join(sets) or '(none)'}.")
        found = found[(found["set"] == of) | ~found["metric"].isin(paper.VERDICTS)]
    by_run = dict(list(pooled(at_end(found)).groupby("run_id")))
    records = []
    for model in dict.fromkeys(c.model for c in collection.expected):
        grid = [c for c in collection.expected if c.model == model]
        methods = sorted({c.method for c in grid}, key=paper.method_order)
        places = list(dict.fromkeys((c.task, c.harmful_ratio) for c in grid))
        for metric in metrics:
            columns = [place for place in places if metric in RATED.get(place[0], metrics[:2])]
            groups = [[place] for place in columns] + [columns] * (averaged and len(columns) > 1)
            for group in groups:
                for method in methods:
                    cells = [c for c in grid if c.method == method and (c.task, c.harmful_ratio) in group]
                    runs = {c: by_run[c.run_id] for c in cells if c.run_id in by_run}
                    text, own = printed.text(group, model, method, metric)
                    average = len(group) > 1
                    task, ratio = group[0]
                    record = {
                        "model": model,
                        "task": "average" if average and axis == "task" else task,
                        "harmful_ratio": math.nan if average and axis == "harmful_ratio" else ratio,
                        "average": average,
                        "method": method,
                        "metric": metric,
                        **estimated(runs, cells, metric),
                        "paper": text,
                        "follows": not (average and text) or printed.follows(model, method, metric),
                    }
                    record["gap"] = record["ours"] - float(text) if own and text else math.nan
                    record["extra_data"] = tables.extra_data(pd.concat(runs.values()), method) if runs else "missing"
                    records.append(record)
    return pd.DataFrame(records)


def estimated(runs: Mapping[Cell, pd.DataFrame], cells: Sequence[Cell], metric: str) -> dict:
    """Mean over seeds of the mean over these cells; a seed counts if it has every cell.

    runs: the metric rows of the cells that are done.
    """
    seeds = sorted({c.seed for c in cells})
    values, prompts = [], []
    for seed in seeds:
        rows = [
            runs[c][(runs[c]["metric"] == metric)].dropna(subset="value")
            for c in cells
            if c.seed == seed and c in runs
        ]
        rows = [r.iloc[0] for r in rows if len(r)]
        if len(rows) == sum(c.seed == seed for c in cells):
            values.append(math.fsum(r["value"] for r in rows) / len(rows))
            prompts.append(min(r["n"] for r in rows))
    measured = {"ours": math.nan, "low": math.nan, "high": math.nan, "half": math.nan, "n": 0, "over": "none"}
    state = "not measured" if runs.keys() >= set(cells) else "missing"
    if values:
        whole = len(cells) == len(seeds) and metric in paper.COUNTED  # an average over tasks is no share of prompts
        found = stats.estimate(values, prompts=prompts, proportion=whole)
        measured = {"ours": found.mean, "low": found.low, "high": found.high, "half": found.half}
        measured |= {"n": found.n, "over": found.over}
        state = "measured"
    return {**measured, "expected": len(seeds), "state": state}


def ranks(values: Sequence[float], metric: str) -> list[str]:
    """`best` for the best value, `second` for the next one; all that show the same digits share a rank."""
    known = sorted({v for v in values if not math.isnan(v)}, reverse=metric not in paper.LOWER_IS_BETTER)
    names = dict(zip(known, ("best", "second"), strict=False)) if len(known) > 1 else {}
    return [names.get(v, "") for v in values]


def shown(record: Mapping) -> str:
    """Ours as text: the estimate, or why there is none."""
    if record["state"] != "measured":
        return record["state"]
    return tables.show({**record, "mean": record["ours"]})


def lay_out(name: str, frame: pd.DataFrame) -> list[Table]:
    """One table a model: a row a method, in blocks of one task or ratio, its metrics side by side."""
    axis, metrics, _ = LAYOUT[name]
    made = []
    for model, part in frame.groupby("model", sort=False):
        used = [m for m in metrics if m in set(part["metric"])]
        header = ["task" if axis == "task" else "p", "method", "n"]
        for metric in used:
            header += [metric, f"{metric} paper", "gap"]
        table = Table(f"{TITLES[name]}; {paper.MODELS.get(model, model)}", [*header, "extra data"])
        for _, block in part.groupby(["task", "harmful_ratio"], sort=False, dropna=False):
            if table.rows:
                table.breaks.append(len(table.rows))
            table.rows += block_of(axis, used, block)
        made.append(table)
    return made


def block_of(axis: str, metrics: Sequence[str], block: pd.DataFrame) -> list[list[tuple[str, str]]]:
    """The rows of one task or ratio, ranked among themselves."""
    marks = {}
    for metric, rows in block.groupby("metric"):
        for side, values in (("ours", rows["ours"].round(1)), ("paper", pd.to_numeric(rows["paper"], "coerce"))):
            marks.update(
                {(metric, m, side): r for m, r in zip(rows["method"], ranks(values.tolist(), metric), strict=True)}
            )
    lines = []
    for method, rows in block.groupby("method", sort=False):
        by_metric = {r["metric"]: r for r in rows.to_dict("records")}
        first = next(iter(by_metric.values()))
        place = paper.TASKS.get(first["task"], first["task"]) if axis == "task" else f"{first['harmful_ratio']:g}"
        have = max(r["n"] for r in by_metric.values())
        seeds = str(have) if have == first["expected"] else f"{have}/{first['expected']}"
        line = plain(["average" if first["average"] else place, paper.method_label(method), seeds])
        for metric in metrics:
            record = by_metric.get(metric)
            if record is None:
                line += plain(["-", "-", "-"])
                continue
            gap = "-" if math.isnan(record["gap"]) else f"{record['gap']:+.1f}"
            printed = record["paper"] + "‡" * (not record["follows"]) if record["paper"] else "-"
            line.append((shown(record), marks[metric, method, "ours"]))
            line += [(printed, marks[metric, method, "paper"]), (gap, "")]
        lines.append([*line, (first["extra_data"], "")])
    return lines


def examples(collection: Collection, runs: Path, count: int, show_harmful: bool) -> tuple[list[Table], pd.DataFrame]:
    """Table 6 of one SFT run and one CWAC run that differ in nothing else: the first finished pair of the preset.

    Requests are taken in the order of a hash of their id, so nobody picked them. An answer that was not judged a
    refusal is withheld unless asked for: `other` may be harm that the judge did not see.
    """
    done = set(collection.runs)
    by_place: dict[tuple, dict[str, str]] = {}
    for c in collection.expected:
        if c.run_id in done and c.method in ("sft", "cwac"):
            by_place.setdefault((c.model, c.task, c.harmful_ratio, c.seed), {})[c.method] = c.run_id
    pair = next(((place, ids) for place, ids in by_place.items() if len(ids) == 2), None)
    if pair is None:
        raise UserError(
            "no finished SFT and CWAC run of one cell and seed. Remedy: run the preset with method=sft,cwac."
        )
    place, ids = pair
    answers = {method: answered(collection, runs, run) for method, run in ids.items()}
    shared = [key for key in answers["sft"] if key in answers["cwac"]]
    if not shared:
        raise UserError(f"{ids['sft']} and {ids['cwac']} keep no judged answers to the same requests (gen/, judge/).")
    shared.sort(key=lambda key: hashlib.sha256("/".join(key).encode()).hexdigest())
    where = f"{paper.MODELS.get(place[0], place[0])}, {place[1]}, p={place[2]:g}, seed {place[3]}"
    table = Table(f"{TITLES['table6']}; {where}", ["request", "method", "verdict", "answer"])
    records = []
    for key in shared[:count]:
        if table.rows:
            table.breaks.append(len(table.rows))
        for method in ("sft", "cwac"):
            prompt, response, verdict = answers[method][key]
            text = response if show_harmful or verdict == "refusal" else withheld(response)
            table.rows.append(plain([prompt, paper.method_label(method), verdict, text]))
            fields = {"run_id": ids[method], "set": key[0], "id": key[1], "method": method}
            records.append({**fields, "prompt": prompt, "verdict": verdict, "answer": text})
    kinds = ("refusal", "other", "harmful")
    counts = Table(f"Verdicts on all {len(shared)} requests; {where}", ["SFT \\ CWAC", *kinds])
    for mine in kinds:
        row = [sum(answers["sft"][k][2] == mine and answers["cwac"][k][2] == other for k in shared) for other in kinds]
        counts.rows.append(plain([mine, *map(str, row)]))
    return [table, counts], pd.DataFrame(records)


def withheld(response: str) -> str:
    return f"[withheld, {len(response)} characters; --show-harmful prints it]"


def answered(collection: Collection, runs: Path, run: str) -> dict[tuple[str, str], tuple[str, str, str]]:
    """(set, id) -> (request, answer, verdict) at the end of a run."""
    ends = at_end(collection.rows[collection.rows["run_id"] == run])
    by_request = {}
    for row in ends[ends["metric"] == "HS"].itertuples():
        path = runs / run / "gen" / f"{row.set}@{row.step:g}-{row.eval}.jsonl"
        answers = {a["id"]: a for a in read_jsonl(path)}
        verdicts = collection.verdicts[
            (collection.verdicts["run_id"] == run) & (collection.verdicts["set"] == row.set)
        ]
        for name, verdict in zip(verdicts["id"], verdicts["verdict"], strict=True):
            if name in answers:
                by_request[row.set, name] = (answers[name]["prompt"], answers[name]["response"], verdict)
    return by_request


def markdown(table: Table) -> str:
    """A Markdown table: best bold, second underlined, breaks between blocks not drawn."""
    marked = {"best": "**{}**", "second": "<u>{}</u>", "": "{}"}
    rows = [[marked[e].format(escape_markdown(t)) for t, e in row] for row in table.rows]
    return f"### {table.title}\n\n" + tables.markdown(
        [h.replace("\\", "\\\\") for h in table.header], rows, key=2, width=10_000
    )


def escape_markdown(text: str) -> str:
    """One line that neither ends a cell nor starts markup."""
    for character in "\\|*_<>`":
        text = text.replace(character, "\\" + character)
    return " ".join(text.replace("](", "]\\(").split())


LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    "†": r"$^\dagger$",
    "‡": r"$^\ddagger$",
    "§": r"$^\S$",
    **{character: "\\" + character for character in "&%$#_{}"},
}


def escape_latex(text: str) -> str:
    """Text that LaTeX prints as it stands."""
    return " ".join("".join(LATEX.get(character, character) for character in text).split())


def latex(table: Table, label: str) -> str:
    """A booktabs table (needs `\\usepackage{booktabs}`): best bold, second underlined, a rule between blocks."""
    marked = {"best": r"\textbf{{{}}}", "second": r"\underline{{{}}}", "": "{}"}
    columns = "".join("l" if i < 2 or i == len(table.header) - 1 else "r" for i in range(len(table.header)))
    if "answer" in table.header:
        columns = r"p{0.3\linewidth}llp{0.4\linewidth}"
    lines = [
        r"\begin{table*}[t]",
        r"\centering",
        rf"\caption{{{escape_latex(table.title)}}}",
        rf"\label{{tab:{label}}}",
    ]
    lines += [rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
    lines += [" & ".join(map(escape_latex, table.header)) + r" \\", r"\midrule"]
    for i, row in enumerate(table.rows):
        lines += [r"\midrule"] if i in table.breaks else []
        lines.append(" & ".join(marked[e].format(escape_latex(t)) for t, e in row) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table*}"])


def safe_csv(frame: pd.DataFrame) -> pd.DataFrame:
    """A copy whose text no spreadsheet takes for a formula: such cells get a leading apostrophe (OWASP)."""

    def guard(value):
        return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value

    return frame.map(guard)


def publish(args: argparse.Namespace) -> int:
    """Collect, lay out, write; see `main`."""
    collection = read(args)
    if args.table == "table6":
        made, frame = examples(collection, args.runs, args.examples, args.show_harmful)
        notes = "Requests in the order of a hash of their id. Answers that are no refusal are withheld."
        if args.show_harmful:
            notes = "Requests in the order of a hash of their id. **Harmful answers are shown.**"
    else:
        frame = build(args.table, collection, overlays(args.overlay), args.judge, args.set)
        made, notes = lay_out(args.table, frame), NOTES
        if not (frame["paper"] != "").any():
            notes += f"\n{NO_VALUES}"
        elif args.overlay:
            notes += (
                f"\nThe paper's values are of other models or tasks ({', '.join(args.overlay)}), so there is no gap."
            )
    parts = [*map(markdown, made), notes, *tables.missing_runs(collection)]
    if account := collection.account():
        parts.append("Left out:\n\n" + "\n".join(f"- {line}" for line in account))
    text = "\n\n".join(parts) + "\n"
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / args.table
    stem.with_suffix(".md").write_text(text, encoding="utf-8")
    tex = "\n\n".join(latex(t, f"{args.table}-{i}") for i, t in enumerate(made))
    stem.with_suffix(".tex").write_text(f"% needs \\usepackage{{booktabs}}\n{tex}\n", encoding="utf-8")
    safe_csv(frame).to_csv(stem.with_suffix(".csv"), index=False)
    print(text)
    print(f"written: {stem}.md, {stem}.tex, {stem}.csv")
    return 1 if collection.missing else 0


def read(args: argparse.Namespace) -> Collection:
    """The campaign that the command line names."""
    if not args.exported:
        collection = collect(args.runs, expected_cells(args.experiment or default_preset(args.table), args.overrides))
        one_value = "give the sweep's overrides of one value alone, e.g. {one}"
        apart.refuse_runs(collection, args.runs, [one_value, apart.FOLDERS], by_rate=False)
        return collection
    if args.table == "table6":
        raise UserError("table6 shows answers, which no export keeps. Remedy: --runs.")
    collection = apart.of_export(args.exported, "--exported", args)
    if not collection.expected:
        raise UserError(
            f"{args.exported} does not name the preset that made it, so what it lacks is not known. Remedy: --runs, "
            "or an export that analysis.demo made with --experiment."
        )
    return collection


def default_preset(table: str) -> str:
    """The preset of the same name. Table 6 has no grid of its own: its pair comes from Table 3's (ours)."""
    return "table3" if table == "table6" else table


def overlays(given: Sequence[str]) -> dict[str, str]:
    """`["tiny=llama2"]` as a mapping. Raises UserError where the right side is none of the paper's slugs."""
    printed = paper.printed()
    known = {*printed["model"], *printed["task"]} - {"average"}
    for pair in given:
        if pair.count("=") != 1 or pair.split("=")[1] not in known:
            raise UserError(
                f"--overlay {pair} names nothing of the paper. Remedy: OURS= one of {', '.join(sorted(known))}."
            )
    return dict(pair.split("=") for pair in given)


@command
def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0, 1 if expected runs are missing, 2 for bad input."""
    parser = Parser(**about(__doc__, "python -m analysis.paper_tables"))
    parser.add_argument("table", choices=list(TITLES))
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the run directories (runs)")
    source.add_argument("--exported", type=Path, help="an exported campaign instead, e.g. results/smollm2_table3")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to, e.g. results/local/table3")
    parser.add_argument("--experiment", help="another preset than the table's own (table6: table3)")
    parser.add_argument("--judge", help="whose verdicts to use where the runs were judged by several")
    parser.add_argument("--set", help="HS on this set of harmful prompts only; default: over all of them")
    parser.add_argument(
        "--overlay",
        action="append",
        default=[],
        metavar="OURS=PAPER",
        help="put the paper's values of that model or task",
    )
    parser.add_argument("--examples", type=int, default=3, help="table6: how many requests (3)")
    parser.add_argument("--show-harmful", action="store_true", help="table6: print answers that are no refusal")
    parser.add_argument(
        "overrides", nargs="*", help="the sweep's own overrides of the preset, e.g. model=tiny seed=0,1"
    )
    args = parser.parse_intermixed_args(argv)
    with naming_earlier(args.out / f"{args.table}.md"):
        return publish(args)


if __name__ == "__main__":
    sys.exit(main())
