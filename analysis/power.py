"""How many seeds and prompts a difference needs: before a campaign is run, from the verdicts of a pilot.

python -m analysis.power results/smollm2_table3 --reference sft --hs 10 --fa 3 --prompts 177
python -m analysis.power --coverage

For each method against the reference, the differences of their verdicts at the same seeds and prompts are taken apart
into what a seed, a prompt and the rest contribute (`analysis.stats.components`), averaged over the pilot's cells. At
other numbers of seeds and prompts these give the error of the difference, and so the power to find it at 5 % (a
two-sided t-test, noncentral t). A negative estimate counts as 0 in its cell, so an average is, if anything, too large;
but it rests on few seeds, and a need computed from it is good to about a factor of two. FA has no verdict a prompt in
an exported campaign: all of its spread is laid to seeds, and more test rows, which might help, are not credited.

Cost: seconds of training as the run logged them, and the rest of the time between its first and last measurement,
which is generation and judging, in proportion to the number of prompts; both on the pilot's machine, without
preparation.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

from analysis import apart, paper, stats
from analysis.collect import Collection, at_end, one_judge
from analysis.pairwise import Cells, cells
from analysis.tables import markdown
from cwac.core.config import Parser, about, command
from cwac.core.errors import UserError, naming_earlier
from cwac.core.files import write_atomic

POWER = 0.8
SEEDS = range(2, 41)
COLUMNS = ["method", "reference", "metric", "difference", "cells", "pilot_seeds", "pilot_prompts", "sd_seeds"]
COLUMNS += ["sd_prompts", "sd_rest", "half_now", "seeds", "prompts", "half", "power", "seconds_a_run", "hours"]
GRID = ((3, 0.0), (3, 0.3), (3, 0.8), (5, 0.0), (5, 0.3), (5, 0.8))
"""Seeds and size of the seeds' effect, of `--coverage`."""


@command
def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0, or 2 for bad input."""
    parser = Parser(**about(__doc__, "python -m analysis.power"))
    parser.add_argument("pilot", type=Path, nargs="?", help="an exported campaign with verdicts, or a folder of runs")
    parser.add_argument("--reference", default="sft", help="the method that all are compared with (sft)")
    parser.add_argument("--hs", type=float, default=10.0, help="difference of HS to find, in points (10)")
    parser.add_argument("--fa", type=float, default=3.0, help="difference of FA to find, in points (3)")
    parser.add_argument("--prompts", type=int, help="the most harmful prompts there are (three times the pilot's)")
    parser.add_argument("--judge", help="whose verdicts to use where the runs were judged by several")
    parser.add_argument("--out", type=Path, help="write the table there as Markdown, and its numbers as .csv")
    parser.add_argument("--coverage", action="store_true", help="instead: simulate how often intervals hold")
    args = parser.parse_args(argv)
    with naming_earlier(args.out):
        return publish(args)


def publish(args: argparse.Namespace) -> int:
    """Read, compute, print, write; see `main`."""
    if args.coverage:
        print(coverage_table())
        return 0
    if args.pilot is None or min(args.hs, args.fa) <= 0 or (args.prompts or 1) < 1:
        raise UserError("give a pilot such as results/demo, differences above 0 and at least one prompt; see --help.")
    found = apart.read(args.pilot, by_rate=False)
    table = needs(found, args.reference, {"HS": args.hs, "FA": args.fa}, args.prompts, args.judge)
    if table.empty:
        others = references(found, args.reference, ["HS", "FA"], args.judge)
        remedy = (
            f"another --reference: {', '.join(others)}"
            if others
            else f"train {args.reference} and another method at the same two seeds or more, as by seed=0,1"
        )
        raise UserError(f"{args.pilot} has no method that shares two seeds with {args.reference}. Remedy: {remedy}.")
    text = report(table, str(args.pilot))
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(args.out, text + "\n")
        table.to_csv(args.out.with_suffix(".csv"), index=False)
    return 0


def needs(
    collection: Collection, reference: str, wanted: dict[str, float], most: int | None = None, judge: str | None = None
) -> pd.DataFrame:
    """One row a method and metric; columns `COLUMNS`. Standard deviations and half-widths in points.

    wanted: metric -> difference to find. most: harmful prompts at hand. `seeds` and `prompts` are the cheapest that
    find it with `POWER`, NaN where `SEEDS` do not suffice; of FA, prompts are the pilot's.
    """
    seconds = costs(one_judge(collection.rows, judge))
    records = []
    for metric, difference in wanted.items():
        found = cells(collection, metric, judge=judge)
        for method in sorted(set(found.rows["method"]) - {reference}, key=paper.method_order):
            pilot = parts(found, method, reference)
            if pilot is None:
                continue
            spread, seeds, prompts, count, crossed = pilot
            train, rest = seconds.get(method, (math.nan, math.nan))
            choices = [int(prompts)]
            if crossed:
                top = most or 3 * int(prompts)
                choices = sorted({*range(10, top + 1, 10), top})
            best = cheapest(spread, difference, choices, train, rest / prompts)
            now, _ = precision(spread, seeds, int(prompts), difference)
            half, power = precision(spread, *best, difference) if best else (math.nan, math.nan)
            s, p = best or (math.nan, math.nan)
            a_run = train + rest * p / prompts
            deviations = [math.sqrt(v) for v in spread]
            records.append(
                [method, reference, metric, difference, count, seeds, prompts, *deviations, now, s, p, half, power]
                + [a_run, a_run * s / 3600]
            )
    return pd.DataFrame(records, columns=COLUMNS)


def references(collection: Collection, without: str, metrics: Sequence[str], judge: str | None = None) -> list[str]:
    """The methods but one that share two seeds with another in some cell, so that `needs` has a row against them."""
    tables = [cells(collection, metric, judge=judge) for metric in metrics]
    methods = sorted(set(collection.rows["method"]))
    return [
        reference
        for reference in methods
        if reference != without
        and any(parts(table, method, reference) for table in tables for method in methods if method != reference)
    ]


def parts(
    found: Cells, method: str, reference: str
) -> tuple[tuple[float, float, float], int, float, int, bool] | None:
    """Variances of seeds, prompts and rest, mean over cells; least seeds and prompts, cells, whether from verdicts.

    None without a cell in which both have two seeds or more. Without verdicts all variance is the seeds'.
    """
    taken, plain, seeds, prompts = [], [], [], []
    for cell in found.names():
        ours, theirs = found.values(cell, method), found.values(cell, reference)
        if len(shared := sorted(ours.keys() & theirs.keys())) < 2:
            continue
        table = stats.tabulate(found.answers(cell, method), found.answers(cell, reference))
        made = stats.components(table)
        if made is not None and len(table) == len(shared):
            taken.append((made.seeds, made.prompts, made.rest))
        plain.append(float(np.var([ours[s] - theirs[s] for s in shared], ddof=1)))
        seeds.append(len(shared))
        prompts.append(table.shape[1] or found.prompts(cell, method))
    if not plain:
        return None
    crossed = len(taken) == len(plain)
    spread = tuple(float(v) for v in np.mean(taken, axis=0)) if crossed else (float(np.mean(plain)), 0.0, 0.0)
    return spread, min(seeds), float(min(prompts)), len(plain), crossed


def precision(spread: tuple[float, float, float], seeds: int, prompts: int, difference: float) -> tuple[float, float]:
    """Half-width of the 95 % interval and power at a difference, both as expected of so many seeds and prompts."""
    a, b, rest = spread
    variance, freedom = stats.spread_of(prompts * a + rest, seeds * b + rest, rest, seeds, max(prompts, 2))
    if variance == 0:
        return 0.0, 1.0
    critical, shift = scipy_stats.t.ppf((1 + stats.LEVEL) / 2, freedom), difference / math.sqrt(variance)
    half = float(critical * math.sqrt(variance))
    if abs(shift - critical) > 8:  # the series for the noncentral t needs long there, and adds nothing
        return half, float(shift > critical)
    return half, float(scipy_stats.nct.sf(critical, freedom, shift))


def cheapest(
    spread: tuple[float, float, float], difference: float, prompts: list[int], train: float, each: float
) -> tuple[int, int] | None:
    """The seeds and prompts with `POWER` that cost least; None where `SEEDS` do not suffice.

    train: seconds a run; each: seconds a prompt. Where they are unknown, the fewest seeds count.
    """
    known = math.isfinite(train) and math.isfinite(each)
    found = []
    for p in prompts:
        for s in SEEDS:
            if precision(spread, s, p, difference)[1] >= POWER:
                found.append((s * (train + each * p) if known else s, s, p))
                break
    return min(found)[1:] if found else None


def costs(rows: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """Method -> median seconds of a run's training, and of what else lies between its first and last measurement.

    NaN where runs were measured at the end alone: their rows do not tell when they began.
    """
    found = {}
    ends = at_end(rows)
    for method, part in rows.groupby("method"):
        own = ends[(ends["method"] == method) & (ends["metric"] == "seconds_per_step")]
        steps = part[part["final"]].groupby("run_id")["step"].max()
        training = (own.set_index("run_id")["value"] * steps).median()
        on_the_way = part[part["run_id"].isin(part.loc[part["epoch"] == 0, "run_id"])]
        span = on_the_way.groupby("run_id")["time"].agg(lambda t: t.max() - t.min()).median()
        found[method] = (float(training), float(max(span - training, 0.0)) if span == span else math.nan)
    return found


def report(table: pd.DataFrame, pilot: str) -> str:
    """The needs as Markdown, worst first within a metric."""
    blocks = [f"# Seeds and prompts that a difference needs, from {pilot}"]
    for (metric, difference, reference), part in table.groupby(["metric", "difference", "reference"], sort=False):
        name = paper.method_label(reference)
        order = part["seeds"].fillna(math.inf).sort_values(ascending=False, kind="stable").index
        rows = []
        for row in part.loc[order].itertuples():
            enough = not math.isnan(row.seeds)
            need = [f"{row.seeds:.0f} x {row.prompts:.0f}", f"{row.half:.1f}"] if enough else [f"> {SEEDS[-1]}", "-"]
            cost = ["-" if math.isnan(v) else f"{v:.{d}f}" for v, d in ((row.seconds_a_run, 0), (row.hours, 2))]
            deviations = [f"{v:.1f}" for v in (row.sd_seeds, row.sd_prompts, row.sd_rest)]
            rows.append([paper.method_label(row.method), *deviations, f"{row.half_now:.1f}", *need, *cost])
        first = part.iloc[0]
        header = [
            "method",
            "sd seeds",
            "sd prompts",
            "sd rest",
            "± now",
            "seeds x prompts",
            "± then",
            "s a run",
            "hours",
        ]
        found = part["seeds"].notna()
        most = (
            f"at most {part['seeds'].max():.0f} seeds"
            if found.all()
            else f"{(~found).sum()} need more seeds or prompts than any here"
        )
        blocks += [
            f"## {difference:g} points of {metric} against {name}",
            f"Power {POWER:g} at 5 %. Pilot: {first.pilot_seeds} seeds, {first.pilot_prompts:.0f} prompts, "
            f"{first.cells} cell{'s' * int(first.cells != 1)}; `± now`: half-width to expect of its 95 % intervals. "
            f"{most[0].upper()}{most[1:]}. Hours: all seeds of the method; {name}'s come once to it.",
            markdown(header, rows),
        ]
    return "\n\n".join(blocks)


def coverage(seeds: int, prompts: int, seed_effect: float, draws: int = 500, seed: int = 0) -> dict[str, float]:
    """Share of simulated campaigns whose 95 % intervals hold the truth: of a difference, and of a percentage.

    Verdicts of two methods come from a probit model: a level each, an effect of each prompt that both share (standard
    deviation 1) and one of its own (0.5), an effect of each seed (`seed_effect`), and noise of standard deviation 1.
    The levels are HS near 16 and 50 %; the percentage is the first. `over_seeds` is the t-interval over seeds, of the
    difference. A percentage that is equal at all seeds has the exact interval over prompts, as in the tables.
    """
    rng = np.random.default_rng(seed)
    levels = (-1.5, 0.0)
    width = math.sqrt(1 + seed_effect**2 + 1 + 0.25)
    truth = [100 * float(scipy_stats.norm.cdf(level / width)) for level in levels]
    hits = dict.fromkeys(("difference", "percentage", "over_seeds"), 0)
    for _ in range(draws):
        shared = rng.normal(0, 1, prompts)
        sides = []
        for level in levels:
            latent = level + shared + rng.normal(0, 0.5, prompts) + rng.normal(0, 1, (seeds, prompts))
            sides.append(100.0 * (latent + rng.normal(0, seed_effect, (seeds, 1)) > 0))
        table, values = sides[0] - sides[1], (sides[0] - sides[1]).mean(1)
        apart, level = stats.crossed(table), stats.crossed(sides[0], proportion=True)
        level = level or stats.estimate(list(sides[0].mean(1)), prompts=[prompts] * seeds, proportion=True)
        plain = stats.estimate(list(values))
        for name, made, right in (
            ("difference", apart or plain, truth[0] - truth[1]),
            ("percentage", level, truth[0]),
            ("over_seeds", plain, truth[0] - truth[1]),
        ):
            hits[name] += made.low <= right <= made.high
    return {name: count / draws for name, count in hits.items()}


def coverage_table(prompts: int = 60, draws: int = 500) -> str:
    """`coverage` over `GRID`, as Markdown."""
    rows = []
    for seeds, effect in GRID:
        found = coverage(seeds, prompts, effect, draws)
        rows.append([str(seeds), f"{effect:g}", *(f"{100 * found[k]:.1f}" for k in found)])
    header = ["seeds", "seed effect", "difference", "percentage", "difference, over seeds alone"]
    return f"Coverage of 95 % intervals in percent, {draws} campaigns of {prompts} prompts:\n\n" + markdown(
        header, rows
    )


if __name__ == "__main__":
    sys.exit(main())
