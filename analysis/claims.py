"""Each claim of the paper as a test on metric rows: holds, fails, or undecided at this scale, with the numbers.

Peng, Zhang, Zeng, Jiang and Gao, arXiv:2604.12384; the claims, their sources and tests are in `claims.yaml`.

A verdict is about the cells (model, task, p) a campaign has. `fails`: in some cell the opposite is significant at 5 %,
after Holm's correction over all comparisons of the claim, or an interval excludes the claim. `holds`: in every cell
the claim itself is, corrected over its baselines, and no method it speaks of is missing. Everything else is
`undecided`, with the reason: one seed, a tie, an interval that holds both, a method that was not run. Cells in which
all compared methods are equal at every seed (no harm under any) say nothing and are set aside. A cell of another model
than the paper's says something about that model only.

python -m analysis.claims --results results/demo        (or --runs runs --experiment demo)
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pandas as pd
import yaml

from analysis import apart, paper, stats
from analysis.collect import Collection
from analysis.pairwise import Cells, Comparison, cells, compare, holm_over
from analysis.tables import markdown
from cwac.core.config import Parser, about, command
from cwac.core.errors import UserError, naming_earlier

CLAIMS = Path(__file__).with_name("claims.yaml")
ALPHA = 1 - stats.LEVEL
PAPER_MODELS = ("llama2", "llama3", "mistral", "gemma2")


@dataclass(frozen=True)
class Verdict:
    """What a campaign says about one claim."""

    claim: str
    """Its id in claims.yaml."""
    text: str
    source: str
    verdict: str
    """holds | fails | undecided"""
    evidence: str
    """Why, with the numbers that decide, in a sentence or two."""
    numbers: list[dict] = field(default_factory=list)
    """One row per comparison: cell, metric, method, reference, difference, interval, p-values, effect size."""


@dataclass(frozen=True)
class Outcome:
    """What the runs of one cell say about one claim."""

    cell: str
    verdict: str
    """holds | fails | undecided | tie"""
    why: str
    numbers: list[dict] = field(default_factory=list)


def points(metric: str, value: float, sign: str = "+") -> str:
    """`-12.3` percentage points, or three significant digits for what is no percentage."""
    return f"{value:{sign}.1f}" if metric in paper.PROPORTIONS else f"{value:{sign}.3g}"


def interval(metric: str, found: stats.Estimate) -> str:
    return f"[{points(metric, found.low)}, {points(metric, found.high)}]"


def methods_of(test: dict) -> list[str]:
    """The methods a claim compares with."""
    if "of" in test:
        return [test["of"]]
    than = test.get("than", [])
    return [m for m in paper.BASELINES if m != test["method"]] if than == "baselines" else list(than)


def lacking(found: Cells, cell: str, test: dict) -> list[str]:
    """Methods of the claim that were run in other cells, but that share no seed with the others in this cell."""
    measured = set(found.rows["method"])
    ours = found.values(cell, test["method"])
    others = [m for m in methods_of(test) if m in measured and not ours.keys() & found.values(cell, m).keys()]
    return [test["method"]] if not ours else others


def gaps(found: Cells, test: dict) -> list[Outcome]:
    """The cells in which a method of the claim is missing; no claim can hold there."""
    outcomes = []
    for cell in found.names():
        if lacks := lacking(found, cell, test):
            outcomes.append(
                Outcome(cell, "undecided", f"no run of {', '.join(map(paper.method_label, lacks))} to pair")
            )
    return outcomes


def ordered(found: Cells, test: dict) -> list[Outcome]:
    """`lower` and `higher`: one outcome a cell. Contradictions are corrected over all cells, since one is enough."""
    sign, metric = (1 if test["kind"] == "lower" else -1), test["metric"]
    word, opposite = ("below", "above") if sign > 0 else ("above", "below")
    by_cell = {cell: compare(found, cell, test["method"], methods_of(test), metric) for cell in found.names()}
    everything = [c for made in by_cell.values() for c in made]
    p_all = dict(zip(map(id, everything), holm_over(everything), strict=True))
    outcomes = []
    for cell, made in by_cell.items():
        if not made:
            continue
        against = [c for c in made if p_all[id(c)] <= ALPHA and sign * c.difference.mean > 0]
        open_ = [c for c in made if not (c.p_holm <= ALPHA and sign * c.difference.mean < 0)]
        worse = [c for c in open_ if sign * c.difference.mean > 0]
        if against:
            verdict, parts = "fails", [(opposite, against)]
        elif all(c.tie for c in made):
            verdict, parts = "tie", [("level with", made)]
        elif open_:
            shown = [c for c in open_ if c not in worse]
            verdict, parts = "undecided", [(f"not shown {word}", shown), (f"{opposite}, not significantly,", worse)]
        else:
            verdict, parts = "holds", [(word, made)]
        # what contradicts a claim is corrected over all cells, what supports it over this cell's references
        p = {id(c): p_all[id(c)] if sign * c.difference.mean > 0 else c.p_holm for c in made}
        why = "; ".join(f"{how} {', '.join(describe(c, p[id(c)]) for c in told)}" for how, told in parts if told)
        outcomes.append(Outcome(cell, verdict, why, [c.numbers() for c in made]))
    return outcomes


def describe(c: Comparison, p: float) -> str:
    """`SFT by -31.0 [-40.2, -21.8], p 0.01`: reference, difference, interval or what stands for it, p."""
    text = f"{paper.method_label(c.reference)} by {points(c.metric, c.difference.mean)}"
    if c.difference.n < 2:
        return f"{text} (one seed)"
    if c.difference.half > 0:
        text += f" {interval(c.metric, c.difference)}"
    elif c.tie:
        return f"{text} (equal at all {c.difference.n} seeds)"
    return f"{text}, p {p:.2g}"


def within(found: Cells, test: dict) -> list[Outcome]:
    """Outcomes of the kind of claim that a method is not worse than `of` by more than a margin."""
    metric, margin, outcomes = test["metric"], test["margin"], []
    for cell in found.names():
        made = compare(found, cell, test["method"], methods_of(test), metric)
        for c in made:
            low, high = c.difference.low, c.difference.high
            if c.difference.n >= 2 and not c.difference.half > 0 and metric in paper.PROPORTIONS:
                # all seeds differ by the same: bounds from the exact intervals over one seed's prompts, unpaired
                (a, b), (x, y) = stats.exact(c.ours, c.prompts), stats.exact(c.theirs, c.prompts)
                low, high = a - y, b - x
            shown = f"{points(metric, c.difference.mean)} [{points(metric, low)}, {points(metric, high)}]"
            if c.difference.n < 2 or math.isnan(low):
                verdict, shown = "undecided", f"{points(metric, c.difference.mean)} (one seed, or no prompts counted)"
            else:
                verdict = "holds" if low > -margin else "fails" if high < -margin else "undecided"
            why = f"{shown} to {paper.method_label(c.reference)}, margin {margin:g}"
            outcomes.append(Outcome(cell, verdict, why, [{**c.numbers(), "low": low, "high": high}]))
    return outcomes


def judged(cell: str, test: dict, values: Sequence[float], limit: float, what: Callable[[float], str]) -> Outcome:
    """Whether the mean of `values`, one value per seed, is below `limit`."""
    found = stats.estimate(list(values))
    shown = f"{what(found.mean)} [{what(found.low)}, {what(found.high)}]" if found.half > 0 else what(found.mean)
    if found.n < 2:
        verdict, shown = "undecided", f"{what(found.mean)} (one seed)"
    else:
        verdict = "holds" if found.high < limit else "fails" if found.low > limit else "undecided"
        if found.mean == limit and found.half == 0:
            verdict = "tie"
    numbers = {
        "cell": cell,
        "metric": test["metric"],
        "method": test["method"],
        "reference": test.get("of", ""),
        "difference": found.mean,
        "low": found.low,
        "high": found.high,
        "seeds": found.n,
        "limit": limit,
    }
    return Outcome(cell, verdict, shown, [numbers])


def ratio(found: Cells, test: dict) -> list[Outcome]:
    """Compares the quotient of a measurement for two methods, paired by seed, with a limit."""
    outcomes = []
    for cell in found.names():
        ours, theirs = found.values(cell, test["method"]), found.values(cell, test["of"])
        shared = [s for s in ours if theirs.get(s)]
        if shared:
            quotients = [ours[s] / theirs[s] for s in shared]
            outcome = judged(cell, test, quotients, test["limit"], lambda v: f"{v:.2f}")
            why = f"{outcome.why} times {paper.method_label(test['of'])}'s, limit {test['limit']:g}"
            outcomes.append(Outcome(cell, outcome.verdict, why, outcome.numbers))
    return outcomes


def bound(found: Cells, test: dict) -> list[Outcome]:
    """Whether every run is below a limit. The metric is a certificate, so a single seed decides."""
    outcomes = []
    for cell in found.names():
        values = found.values(cell, test["method"])
        if values:
            worst, limit = max(values.values()), test["limit"]
            numbers = {"cell": cell, "metric": test["metric"], "method": test["method"], "reference": ""}
            numbers |= {"difference": worst, "seeds": len(values), "limit": limit}
            verdict = "holds" if worst < limit else "fails"
            outcomes.append(
                Outcome(cell, verdict, f"worst of {len(values)} runs {worst:.2g}, limit {limit:g}", [numbers])
            )
    return outcomes


def changes(found: Cells, test: dict, axis: str, change: Callable[[list[float]], float]) -> list[Outcome]:
    """`change` of the metric along an axis, `method` minus `of`, paired by seed: below 0?

    change: of the values in the order of the axis. Only values of the axis at which both were measured count.
    """
    rest = [c for c in ("model", "task", "harmful_ratio", "learning_rate") if c != axis]
    rest = rest if axis == "learning_rate" else rest[:2]
    show = partial(points, test["metric"])
    outcomes = []
    for key, group in found.rows.groupby(rest, dropna=False, sort=False):
        table = group.pivot_table(index=axis, columns=["method", "seed"], values="value")
        pairs = {}
        for seed in sorted(set(group["seed"])):
            both = [(test["method"], seed), (test["of"], seed)]
            if all(b in table.columns for b in both):
                shared = table[both].dropna().sort_index()
                if len(shared) > 1:
                    pairs[seed] = [change(shared[b].tolist()) for b in both]
        if not pairs:
            continue
        cell = ", ".join([*map(str, key[:2]), *([f"p={key[2]:g}"] if len(rest) > 2 else [])])
        outcome = judged(cell, test, [round(a - b, 9) for a, b in pairs.values()], 0.0, show)
        ours, theirs = (show(sum(side) / len(pairs)) for side in zip(*pairs.values(), strict=True))
        why = f"{ours} against {paper.method_label(test['of'])}'s {theirs}, difference {outcome.why}"
        outcomes.append(Outcome(cell, outcome.verdict, why, outcome.numbers))
    return outcomes


def flatter(found: Cells, test: dict) -> list[Outcome]:
    """How much the metric rises from the smallest to the largest p."""
    return changes(found, test, "harmful_ratio", lambda values: values[-1] - values[0])


def steadier(found: Cells, test: dict) -> list[Outcome]:
    """How far the metric ranges over learning rates."""
    return changes(found, test, "learning_rate", lambda values: max(values) - min(values))


KINDS: dict[str, Callable[[Cells, dict], list[Outcome]]] = {
    "lower": ordered,
    "higher": ordered,
    "within": within,
    "ratio": ratio,
    "bound": bound,
    "flatter": flatter,
    "steadier": steadier,
}


def aggregate(claim: dict, outcomes: list[Outcome], absent: list[str]) -> Verdict:
    """One verdict from those of the cells; `absent` are compared methods without a value."""
    fixed = (claim["id"], claim["text"], claim["source"])
    numbers = [row for o in outcomes for row in o.numbers]
    of = {v: [o for o in outcomes if o.verdict == v] for v in ("holds", "fails", "undecided", "tie")}
    if not outcomes:
        missing = f"no value for {', '.join(map(paper.method_label, absent))}" if absent else "no comparison at hand"
        return Verdict(*fixed, "undecided", f"Not measured: {missing}.", [])
    judged_cells = len(outcomes) - len(of["tie"])
    parts = []
    if of["fails"]:
        verdict = "fails"
        parts.append(f"fails in {len(of['fails'])} of {judged_cells} cells: {told(of['fails'])}")
    elif of["holds"] and not of["undecided"] and not absent:
        verdict = "holds"
        parts.append(
            f"holds in {'the one cell' if judged_cells == 1 else f'all {judged_cells} cells'}: {told(of['holds'])}"
        )
    else:
        verdict = "undecided"
        if of["undecided"]:
            parts.append(f"open in {len(of['undecided'])} of {judged_cells} cells: {told(of['undecided'])}")
        if of["holds"]:
            parts.append(f"holds in {len(of['holds'])} of {judged_cells} cells")
    if of["tie"]:
        parts.append(f"{len(of['tie'])} of {len(outcomes)} cells tie exactly and say nothing")
    if absent:
        parts.append(f"not run: {', '.join(map(paper.method_label, absent))}")
    if not any(o.cell.split(", ")[0] in PAPER_MODELS for o in outcomes):
        parts.append("none of the paper's models")
    evidence = "; ".join(parts)
    return Verdict(*fixed, verdict, evidence[0].upper() + evidence[1:] + ".", numbers)


def told(outcomes: list[Outcome], most: int = 2) -> str:
    """The first cells in words, and how many more there are."""
    more = f" (and {len(outcomes) - most} more)" if len(outcomes) > most else ""
    return "; ".join(f"{o.cell}: {o.why}" for o in outcomes[:most]) + more


def load_claims(path: Path = CLAIMS) -> list[dict]:
    """The claims of claims.yaml. Raises UserError for a claim of an unknown kind or without a required key."""
    claims = yaml.safe_load(path.read_text(encoding="utf-8"))
    needs = {"lower": {"than"}, "higher": {"than"}, "within": {"of", "margin"}, "ratio": {"of", "limit"}}
    needs |= {"bound": {"limit"}, "flatter": {"of"}, "steadier": {"of"}}
    for claim in claims:
        if absent := {"id", "text", "source", "test"} - claim.keys():
            raise UserError(f"{path.name}: a claim lacks {', '.join(sorted(absent))}. Remedy: see its other claims.")
        kind = claim["test"].get("kind")
        if kind not in KINDS:
            raise UserError(f"{path.name}: {claim['id']}: kind={kind} is unknown. Remedy: one of {', '.join(KINDS)}.")
        if absent := ({"metric", "method"} | needs[kind]) - claim["test"].keys():
            raise UserError(f"{path.name}: {claim['id']}: its test lacks {', '.join(sorted(absent))}.")
    return claims


def verdicts(
    collection: Collection, judge: str | None = None, reading: str = "cwac", claims: list[dict] | None = None
) -> list[Verdict]:
    """What a campaign says about every claim, in the order of claims.yaml.

    reading: the method that stands for CWAC, e.g. `cwac_literal`. Raises UserError as `one_judge` does.
    """
    made, measured_cells = [], {}
    for claim in load_claims() if claims is None else claims:
        test = {k: (reading if k == "method" and v == "cwac" else v) for k, v in claim["test"].items()}
        if isinstance(test.get("than"), list):
            test["than"] = [reading if m == "cwac" else m for m in test["than"]]
        what = (test["metric"], test.get("set"), judge, test.get("at", "end"))
        if what not in measured_cells:
            measured_cells[what] = cells(collection, *what)
        found = measured_cells[what]
        if test.get("poisoned"):
            found = replace(found, rows=found.rows[found.rows["harmful_ratio"] > 0])
        measured = set(found.rows["method"])
        absent = [m for m in [test["method"], *methods_of(test)] if m not in measured]
        outcomes = KINDS[test["kind"]](found, test)
        if test["kind"] in ("lower", "higher", "within", "ratio") and not set(absent) & {test["method"]}:
            incomplete = {o.cell: o for o in gaps(found, test)}
            decided = {o.cell for o in outcomes if o.verdict == "fails"}
            outcomes = [incomplete.pop(o.cell, o) if o.cell not in decided else o for o in outcomes]
            outcomes += [o for o in incomplete.values() if o.cell not in decided]
        made.append(aggregate(claim, outcomes, absent))
    return made


LABELS = {"holds": "holds", "fails": "fails", "undecided": "undecided at this scale"}


def report(found: list[Verdict]) -> str:
    """The verdicts as Markdown: a count, a table, and the evidence of each."""
    tally = ", ".join(f"{sum(v.verdict == kind for v in found)} {label}" for kind, label in LABELS.items())
    rows = [[v.text, v.source, LABELS[v.verdict]] for v in found]
    details = [f"- **{v.text}** ({v.source}): {LABELS[v.verdict]}. {v.evidence}" for v in found]
    table = markdown(["claim", "source", "verdict"], rows, width=10_000)
    return "\n\n".join([f"{len(found)} claims: {tally}.", table, "\n".join(details)]) + "\n"


@command
def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0, or 2 for bad input."""
    parser = Parser(**about(__doc__, "python -m analysis.claims"))
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--runs", type=Path, help="folder of the run directories")
    source.add_argument("--results", type=Path, help="an exported campaign, e.g. results/demo")
    parser.add_argument(
        "--experiment", help="with --runs: the preset whose runs count; without it, every finished run"
    )
    parser.add_argument("--judge", help="whose verdicts to use where the runs were judged by several")
    parser.add_argument("--reading", default="cwac", help="the method that stands for CWAC (cwac)")
    parser.add_argument("--csv", type=Path, help="also write every comparison's numbers here")
    parser.add_argument("overrides", nargs="*", help="the sweep's own overrides of the preset, e.g. seed=0,1")
    args = parser.parse_intermixed_args(argv)
    with naming_earlier(args.csv):
        return publish(args)


def publish(args: argparse.Namespace) -> int:
    """Read, judge, print, write; see `main`."""
    remedies = [apart.exporting(args.runs, "--results FOLDER here"), apart.PRESET, apart.FOLDERS]
    collection = apart.chosen(args, args.results, "--results", remedies)
    found = verdicts(collection, args.judge, args.reading)
    print(report(found), end="")
    for line in [*map(str, collection.missing), *collection.account()]:
        print(f"not counted: {line}")
    if args.csv:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"claim": v.claim, "verdict": v.verdict, **row} for v in found for row in v.numbers]
        pd.DataFrame(rows).to_csv(args.csv, index=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
