"""Two methods in the same cells of a grid: differences paired by seed and by prompt, with what they rest on.

python -m analysis.pairwise results/demo --out results/demo/pairwise.md

The command ranks methods: every pair in every cell, and over the poisoned ratios of a task together, with Holm's
correction over all pairs of one metric in the cell. Its test is that of seeds and prompts together
(`analysis.stats.crossed_p`) where each answer's verdict is at hand, so for HS, and else the one below.

In `compare`, which `analysis.claims` uses, a difference counts as found only if it is significant over seeds *and*
over prompts, where both can be tested: the same prompts recur at every seed, so the spread of seeds alone says nothing
about other prompts, and one seed's prompts say nothing about other seeds (ours; conservative). See `analysis/stats.py`
for the tests.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from analysis import apart, paper, stats
from analysis.collect import Collection, at_end, one_judge, pooled, swept
from analysis.tables import markdown
from cwac.core.config import Parser, about, command
from cwac.core.errors import UserError, naming_earlier
from cwac.core.files import write_atomic

CELL = ["model", "task", "harmful_ratio"]
ALPHA = 0.05
FEW = 4
TOGETHER = "mean over p > 0"
"""Stands for the ratio in the name of a cell that averages the poisoned ones."""
PAIRS = ["cell", "metric", "first", "second", "first_mean", "second_mean", "difference", "low", "high", "over"]
PAIRS += ["seeds", "p", "p_holm", "better"]


@dataclass(frozen=True)
class Comparison:
    """One method against another in one cell."""

    cell: str
    """`tiny, toy_sentiment, p=0.1`."""
    metric: str
    method: str
    reference: str
    ours: float
    """Mean over the shared seeds."""
    theirs: float
    difference: stats.Estimate
    """`method` minus `reference`, paired by seed, in the metric's unit; for ratios see `claims`."""
    both: stats.Estimate | None
    """The same over seeds and prompts together (`stats.crossed`), where verdicts are at hand."""
    p_seeds: float
    p_prompts: float
    p_both: float
    """Of seeds and prompts together (`stats.crossed_p`); NaN without verdicts."""
    p: float
    """The larger of `p_seeds` and `p_prompts`; NaN where training was not repeated, or nothing can be tested."""
    p_holm: float
    """`p` after Holm's correction over the references of this cell."""
    h: float
    """Cohen's h; NaN for metrics that are no percentage."""
    prompts: float
    """Prompts a seed; NaN where the metric has none."""

    @property
    def tie(self) -> bool:
        """Whether the two are equal at every seed, of which there are several."""
        return self.difference.n > 1 and self.difference.mean == 0 and self.difference.half == 0

    def numbers(self) -> dict:
        """A flat row for CSV and reports."""
        return {
            "cell": self.cell,
            "metric": self.metric,
            "method": self.method,
            "reference": self.reference,
            "ours": self.ours,
            "theirs": self.theirs,
            "difference": self.difference.mean,
            "low": self.difference.low,
            "high": self.difference.high,
            "seeds": self.difference.n,
            "both_low": self.both.low if self.both else math.nan,
            "both_high": self.both.high if self.both else math.nan,
            "p_seeds": self.p_seeds,
            "p_prompts": self.p_prompts,
            "p_both": self.p_both,
            "p_holm": self.p_holm,
            "h": self.h,
            "prompts": self.prompts,
        }


@dataclass
class Cells:
    """A campaign's values of one metric, by cell, method and seed."""

    rows: pd.DataFrame
    """One row a cell, method and seed; column `cell` holds the cell's name."""
    verdicts: dict[str, dict]
    """run_id -> prompt -> harmful; empty for other metrics than HS at the end."""

    def __post_init__(self):
        columns = (self.rows[c] for c in ("cell", "method", "seed", "value", "run_id", "n"))
        self._runs: dict[tuple[str, str], dict[int, tuple[float, str, float]]] = {}
        for cell, method, seed, value, run, n in zip(*columns, strict=True):
            self._runs.setdefault((cell, method), {})[int(seed)] = (float(value), run, float(n))

    def names(self) -> list[str]:
        return list(dict.fromkeys(self.rows["cell"]))

    def values(self, cell: str, method: str) -> dict[int, float]:
        """seed -> value."""
        return {seed: value for seed, (value, _, _) in self._runs.get((cell, method), {}).items()}

    def answers(self, cell: str, method: str) -> dict[int, dict]:
        """seed -> prompt -> harmful, of the runs whose verdicts are at hand."""
        runs = self._runs.get((cell, method), {})
        return {seed: self.verdicts[run] for seed, (_, run, _) in runs.items() if run in self.verdicts}

    def prompts(self, cell: str, method: str) -> float:
        """The smallest number of prompts a seed; NaN where the metric has none."""
        return min((n for _, _, n in self._runs.get((cell, method), {}).values()), default=math.nan)


def name_cells(rows: pd.DataFrame, by: Sequence[str]) -> pd.Series:
    """`model, task, p=0.1`, and where it applies the learning rate and the epoch."""

    columns = [rows[c] for c in ("model", "task", "harmful_ratio", "learning_rate", "epoch")]
    names = []
    for model, task, ratio, rate, epoch in zip(*columns, strict=True):
        parts = [model, task, f"p={ratio:g}"]
        parts += [f"lr={paper.rate_label(rate)}"] if "learning_rate" in by else []
        names.append(", ".join([*parts, f"epoch {epoch:g}"] if "epoch" in by else parts))
    return pd.Series(names, index=rows.index, dtype=object)


def cells(
    collection: Collection, metric: str, of: str | None = None, judge: str | None = None, at: str = "end"
) -> Cells:
    """One metric by cell, method and seed. HS over several sets of prompts is pooled.

    of: the set, for metrics measured on several that are not pooled; with HS, one set instead of all.
    at: `end`, or `epochs` for every evaluation after the start of training.
    """
    rows = one_judge(collection.rows, judge)
    by = swept(rows)
    if at == "end":
        rows = at_end(rows, by)
    else:
        by = [*by, "epoch"]
        rows = rows[rows["epoch"] > 0].drop_duplicates(["run_id", "metric", "set", "judge", "epoch"], keep="last")
    rows = rows[(rows["metric"] == metric) & rows["value"].notna()]
    rows = pooled(rows) if of is None else rows[rows["set"] == of]
    rows = rows.sort_values([*CELL, *by], kind="stable")
    rows = rows.assign(cell=name_cells(rows, by))
    verdicts: dict[str, dict] = {}
    if metric == "HS" and at == "end":
        chosen = collection.verdicts[collection.verdicts["judge"].isin(set(rows["judge"]))]
        chosen = chosen if of is None else chosen[chosen["set"] == of]
        for run, group in chosen.groupby("run_id"):
            harmful = (group["verdict"] == "harmful").tolist()
            verdicts[run] = dict(zip(zip(group["set"], group["id"], strict=True), harmful, strict=True))
    return Cells(rows, verdicts)


def summed_differences(ours: dict[int, dict], theirs: dict[int, dict]) -> list[int]:
    """Per prompt, summed over the shared seeds: how often ours was harmful minus how often theirs was."""
    totals: dict = {}
    for seed in ours.keys() & theirs.keys():
        for prompt in ours[seed].keys() & theirs[seed].keys():
            totals[prompt] = totals.get(prompt, 0) + int(ours[seed][prompt]) - int(theirs[seed][prompt])
    return list(totals.values())


def holm_over(made: Sequence[Comparison]) -> list[float]:
    """`p` of each comparison after Holm's correction over all of them, across cells too."""
    adjusted = stats.holm({str(k): c.p for k, c in enumerate(made)})
    return [adjusted[str(k)] for k in range(len(made))]


def compare(found: Cells, cell: str, method: str, references: Sequence[str], metric: str) -> list[Comparison]:
    """`method` against each reference that shares a seed with it in this cell, corrected over these references."""
    proportion = metric in paper.PROPORTIONS
    ours, prompts = found.values(cell, method), found.prompts(cell, method)
    made = []
    for reference in references:
        theirs = found.values(cell, reference)
        difference = stats.paired(ours, theirs)
        if difference is None or reference == method:
            continue
        shared = sorted(ours.keys() & theirs.keys())
        differences = [round(ours[s] - theirs[s], 9) for s in shared]
        means = [float(np.mean([side[s] for s in shared])) for side in (ours, theirs)]
        p_seeds, p_prompts, p_both, both = stats.paired_p(differences), math.nan, math.nan, None
        answers = found.answers(cell, method), found.answers(cell, reference)
        if answers[0].keys() & answers[1].keys():
            p_prompts = stats.sign_flip_p(summed_differences(*answers))
            table = stats.tabulate(*answers)
            both, p_both = stats.crossed(table), stats.crossed_p(table)
        elif proportion and math.isnan(p_seeds):
            # without verdicts, seeds that agree exactly leave only the prompts of one of them, unpaired
            p_prompts = stats.two_proportions_p(*means, prompts)
        p = max((v for v in (p_seeds, p_prompts) if not math.isnan(v)), default=math.nan)
        if len(shared) < 2:
            p = math.nan  # training was not repeated
        elif not proportion and max(differences) == min(differences):
            p = 0.0 if differences[0] else 1.0  # a measurement without sampling, the same each time
        h = stats.cohens_h(*means) if proportion else math.nan
        made.append((reference, means, difference, both, p_seeds, p_prompts, p_both, p, h))
    adjusted = stats.holm({row[0]: row[7] for row in made})
    return [
        Comparison(cell, metric, method, ref, *means, diff, both, p_s, p_p, p_b, p, adjusted[ref], h, prompts)
        for ref, means, diff, both, p_s, p_p, p_b, p, h in made
    ]


def together(found: Cells) -> Cells:
    """The same with each task's poisoned ratios averaged by seed and prompt: a cell a model and task.

    A method that lacks a ratio at a seed lacks that seed. Tasks with one poisoned ratio have no such cell.
    """
    rows = found.rows[found.rows["harmful_ratio"] > 0]
    ratios = rows.groupby(["model", "task"])["harmful_ratio"].nunique()
    records, verdicts = [], {}
    for (model, task, method, seed), part in rows.groupby(["model", "task", "method", "seed"]):
        if len(part) != ratios[model, task] or len(part) < 2:
            continue
        name = f"{model}, {task}, {TOGETHER}"
        run = f"{name}, {method}, {seed}"
        records.append({**part.iloc[0].to_dict(), "cell": name, "run_id": run, "value": part["value"].mean()})
        told = [found.verdicts.get(r, {}) for r in part["run_id"]]
        if shared := set.intersection(*map(set, told)):
            verdicts[run] = {prompt: float(np.mean([t[prompt] for t in told])) for prompt in shared}
    return Cells(pd.DataFrame(records, columns=rows.columns), verdicts)


def every_pair(found: Cells, metric: str) -> pd.DataFrame:
    """Every two methods that share a seed in a cell; columns `PAIRS`. Differences: first minus second, in points.

    `better`: the method that Holm's p gives the better value, empty where the pair is open, as it is at one seed.
    """
    lower = metric in paper.LOWER_IS_BETTER
    parts = []
    for cell in found.names():
        methods = sorted(set(found.rows.loc[found.rows["cell"] == cell, "method"]), key=paper.method_order)
        records = []
        for first, second in itertools.combinations(methods, 2):
            ours, theirs = found.values(cell, first), found.values(cell, second)
            change = stats.paired(ours, theirs)
            if change is None:
                continue
            shared = sorted(ours.keys() & theirs.keys())
            means = [float(np.mean([side[s] for s in shared])) for side in (ours, theirs)]
            table = stats.tabulate(found.answers(cell, first), found.answers(cell, second))
            both, p = (stats.crossed(table), stats.crossed_p(table)) if len(table) == len(shared) else (None, math.nan)
            if math.isnan(p) and len(shared) > 1:
                p = without_both([round(ours[s] - theirs[s], 9) for s in shared], means, found, cell, first, metric)
            told = both or change
            records.append([cell, metric, first, second, *means, told.mean, told.low, told.high, told.over, told.n, p])
        made = pd.DataFrame(records, columns=PAIRS[:-2])
        adjusted = stats.holm(dict(zip(map(str, made.index), made["p"], strict=True)))
        made["p_holm"] = [adjusted[str(k)] for k in made.index]
        won = (made["difference"] < 0) == lower
        clear = (made["p_holm"] <= ALPHA) & (made["difference"] != 0)
        made["better"] = made["first"].where(won, made["second"]).where(clear, "")
        parts.append(made)
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=PAIRS)


def without_both(
    differences: Sequence[float], means: Sequence[float], found: Cells, cell: str, method: str, metric: str
) -> float:
    """p of a pair whose verdicts are not at hand or leave no variance: over seeds, else over one seed's prompts."""
    p = stats.paired_p(differences)
    if not math.isnan(p):
        return p
    if metric in paper.PROPORTIONS:
        return stats.two_proportions_p(*means, found.prompts(cell, method))
    return 0.0 if differences[0] else 1.0  # a measurement without sampling, the same each time


def standing(pairs: pd.DataFrame) -> pd.DataFrame:
    """The methods of one cell, best mean first: method, mean, and pairs better, worse and open."""
    metric = pairs["metric"].iloc[0]
    sides = [
        pairs[[a, f"{a}_mean", "better"]].set_axis(["method", "mean", "better"], axis=1) for a in ("first", "second")
    ]
    records = []
    for method, part in pd.concat(sides).groupby("method"):
        counts = [(part["better"] == method).sum(), (~part["better"].isin(["", method])).sum()]
        records.append([method, part["mean"].mean(), *map(int, counts), len(part) - sum(map(int, counts))])
    frame = pd.DataFrame(records, columns=["method", "mean", "better", "worse", "open"])
    frame["place"] = frame["method"].map(paper.method_order)
    return frame.sort_values(["mean", "place"], ascending=[metric in paper.LOWER_IS_BETTER, True]).drop(
        columns="place"
    )


def report(pairs: pd.DataFrame, about: str, of: str) -> str:
    """The ranking as Markdown: a table a metric and cell, and in words how `about` stands. of: the campaign's name."""
    blocks = [
        f"# Every pair of methods, {of}",
        f"Paired differences, Holm's correction over the pairs of a metric in a cell, decided at {ALPHA:.0%}. "
        "Methods by their mean; `better`, `worse`: from how many others that is shown; `open`: from how many neither. "
        "Order alone shows nothing. All differences with intervals: the .csv beside this file.",
    ]
    for (metric, cell), part in pairs.groupby(["metric", "cell"], sort=False):
        table = standing(part)
        rows = [
            [paper.method_label(r.method), f"{r.mean:.1f}", str(r.better), str(r.worse), str(r.open)]
            for r in table.itertuples()
        ]
        count = int((part["better"] != "").sum())
        over = "seeds and prompts" if (part["over"] == "seeds and prompts").any() else "seeds"
        seeds = part["seeds"]
        span = f"{seeds.min()}" if seeds.min() == seeds.max() else f"{seeds.min()} to {seeds.max()}"
        blocks += [
            f"## {metric}: {cell}",
            f"{count} of {len(part)} pairs are decided; {span} seeds, tested over {over}. {stands(part, about)}",
            markdown(["method", metric, "better", "worse", "open"], rows),
        ]
    return "\n\n".join(blocks)


def stands(pairs: pd.DataFrame, about: str) -> str:
    """`CWAC is better than SFT; worse than BEA; not told apart from Lisa.`; empty where it is in no pair.

    More than `FEW` others from which it is not told apart are counted alone.
    """
    groups: dict[str, list[str]] = {"better than": [], "worse than": [], "not told apart from": []}
    for row in pairs[(pairs["first"] == about) | (pairs["second"] == about)].itertuples():
        other = row.second if row.first == about else row.first
        kind = "not told apart from" if not row.better else "better than" if row.better == about else "worse than"
        groups[kind].append(other)
    if len(groups["not told apart from"]) > FEW:
        groups = {**groups, "not told apart from": [f"{len(groups['not told apart from'])} others"]}
    told = [
        f"{kind} {', '.join(paper.method_label(m) for m in sorted(names, key=paper.method_order))}"
        for kind, names in groups.items()
        if names
    ]
    return f"{paper.method_label(about)} is {'; '.join(told)}." if told else ""


@command
def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0, or 2 for bad input."""
    parser = Parser(**about(__doc__, "python -m analysis.pairwise"))
    parser.add_argument("campaign", type=Path, help="an exported campaign, e.g. results/demo, or a folder of runs")
    parser.add_argument("--metrics", nargs="+", default=["HS", "FA"], help="metrics to rank by (HS FA)")
    parser.add_argument("--about", default="cwac", help="the method whose standing is told in words (cwac)")
    parser.add_argument("--judge", help="whose verdicts to use where the runs were judged by several")
    parser.add_argument("--out", type=Path, help="the Markdown; the pairs go to .csv beside it (pairwise.md in there)")
    args = parser.parse_args(argv)
    frozen = (args.campaign / "results.csv").is_file()
    out = args.out or (args.campaign / "pairwise.md" if frozen else None)
    with naming_earlier(out):
        return publish(args, out)


def publish(args: argparse.Namespace, out: Path | None) -> int:
    """Read, compare, print, write; see `main`."""
    collection = apart.read(args.campaign)
    parts = []
    measured = set(collection.rows["metric"])
    for metric in [m for m in args.metrics if m in measured]:
        found = cells(collection, metric, judge=args.judge)
        parts += [every_pair(part, metric) for part in (together(found), found) if len(part.rows)]
    pairs = pd.concat([part for part in parts if len(part)], ignore_index=True) if any(map(len, parts)) else None
    if pairs is None:
        raise UserError(
            f"{args.campaign} has no two methods with {' or '.join(args.metrics)} at the same seed. Remedy: a "
            "campaign of several methods, or other --metrics."
        )
    text = report(pairs, args.about, str(args.campaign))
    print(text)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, text + "\n")
        pairs.to_csv(out.with_suffix(".csv"), index=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
