"""Is the order of the methods on one model that on another? Spearman's correlation of their HS, with its interval.

python -m analysis.orders results/smollm2_main results/qwen_main

Takes two exported campaigns of one model, task and harmful ratio each, and the methods that both have. A method counts
at the setting without a name where a campaign has one, else at its named one, such as a learning rate of its own; the
table shows which. HS is over the seeds that all of these methods have, and over the prompts that both campaigns asked
(where they share none, over each one's own).

The interval (ours) is a bootstrap: seeds and prompts are drawn with replacement, alike for all methods of a campaign,
and the same prompts for both (Owen 2007, "The pigeonhole bootstrap", arXiv:0712.1111). With three seeds it is too
narrow, as such a bootstrap was for means (analysis/stats.py). It says how sure the correlation of these methods is,
not that of others. The p-value is over all orders of the methods, of nine and more over `DRAWS` random ones.
"""

import itertools
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from analysis import apart, paper
from analysis.collect import Collection, at_end, one_judge
from analysis.headline import named
from analysis.stats import LEVEL, spearman
from analysis.tables import answers_of, markdown, verdict_tables
from cwac.core.config import Parser, about, command
from cwac.core.errors import UserError
from cwac.core.metrics import VARIATION

DRAWS = 2000
MOST = 8
"""Methods up to which all orders are tried: 40,320."""

Told = dict[int, dict[tuple[str, str], bool]]
"""seed -> (set, prompt) -> whether the final answer complied."""


@dataclass(frozen=True)
class Campaign:
    """What is compared of an exported campaign."""

    model: str
    ratio: float
    told: dict[str, Told]
    """By method, settings in its name."""


@dataclass(frozen=True)
class Agreement:
    """How alike two campaigns order the methods that both have."""

    methods: list[tuple[str, str]]
    """Each one's name in both campaigns, with its setting."""
    hs: np.ndarray
    """[2, methods], percent, over the seeds and prompts that count."""
    seeds: tuple[int, int]
    prompts: tuple[int, int]
    rho: float
    """Spearman's correlation, ties at their mean rank; NaN where one campaign has the same HS for all methods."""
    low: float
    high: float
    p: float
    """Two-sided: the share of the orders of the methods whose correlation is at least as far from 0."""


def verdicts_of(collection: Collection, ratio: float | None = None, judge: str | None = None) -> Campaign:
    """A campaign's final verdicts on its harmful prompts.

    ratio: None is the only one with poison that it has. Raises UserError where the campaign has several models, tasks,
    ratios, judges or learning rates under one name, and for runs without stored verdicts.
    """
    rows = at_end(one_judge(collection.rows, judge))
    rows = rows[(rows["metric"] == "HS") & ~rows["set"].str.contains(VARIATION, regex=False)]
    for column in ("model", "task"):
        if len(names := sorted(rows[column].unique())) != 1:
            raise UserError(f"it has {len(names)} {column}s ({', '.join(names)}); export the runs of one alone")
    there = sorted(rows.loc[rows["harmful_ratio"] > 0, "harmful_ratio"].unique())
    if (ratio is None and len(there) != 1) or (ratio is not None and ratio not in there):
        shown = ", ".join(f"{r:g}" for r in there) or "none"
        raise UserError(f"its harmful ratios are {shown}; give --ratio with one of them")
    ratio = there[0] if ratio is None else ratio
    rows = rows[rows["harmful_ratio"] == ratio]
    answers, found = answers_of(collection), {}
    for (method, of), group in rows.groupby(["method", "set"]):
        verdicts = verdict_tables(group, "HS", answers)
        if not verdicts:
            raise UserError(f"{method} has no verdicts of {of} in verdicts.csv.gz that give its HS; export it again")
        for seed, told in verdicts.items():
            found.setdefault(method, {}).setdefault(seed, {}).update({(of, k): v for k, v in told.items()})
    return Campaign(rows["model"].iloc[0], float(ratio), found)


def plain(found: Iterable[str]) -> dict[str, str]:
    """Bare name -> the method that counts for it: the setting without a name, else the only one with a name.

    Raises UserError where a method has several named settings alone.
    """
    chosen: dict[str, str] = {}
    for slug in sorted(found):  # a bare name is the shortest that begins so
        name = slug.partition(paper.SETTING)[0]
        if name in chosen and chosen[name] != name:
            raise UserError(f"it has {chosen[name]} and {slug}, and no {name} alone; export one of them")
        chosen.setdefault(name, slug)
    return chosen


def shared(maps: Iterable[Mapping]) -> list:
    """The keys that all of these have, sorted."""
    return sorted(set.intersection(*map(set, maps)))


def agreement(first: Mapping[str, Told], second: Mapping[str, Told], draws: int = DRAWS, seed: int = 0) -> Agreement:
    """Compares two campaigns' verdicts; raises UserError where too little is common."""
    names = [plain(first), plain(second)]
    methods = sorted(shared(names), key=paper.method_order)
    if len(methods) < 3:
        raise UserError(
            f"the campaigns have {len(methods)} methods in common ({', '.join(methods) or 'none'}); an order "
            "takes three, so run more of them on both"
        )
    chosen = [[side[of[m]] for m in methods] for side, of in ((first, names[0]), (second, names[1]))]
    seeds = [shared(side) for side in chosen]
    if not all(seeds):
        raise UserError(f"the methods {', '.join(methods)} have no seed in common; run them at one")
    prompts = [shared(told[s] for told in side for s in own) for side, own in zip(chosen, seeds, strict=True)]
    both = shared(prompts)
    prompts = [both, both] if both else prompts
    if not all(prompts):
        raise UserError(f"the methods {', '.join(methods)} have no prompt in common; evaluate them on the same")
    # [methods, seeds, prompts], 1 where the answer complied
    sides = [
        np.array([[[told[s][p] for p in asked] for s in own] for told in side], dtype=float)
        for side, own, asked in zip(chosen, seeds, prompts, strict=True)
    ]
    means = [side.mean((1, 2)) for side in sides]
    rho, rng, drawn = spearman(*means), np.random.default_rng(seed), []
    for _ in range(draws if not math.isnan(rho) else 0):
        again, of = [], rng.integers(len(prompts[0]), size=len(prompts[0]))
        for side in sides:
            if not both and side is sides[1]:
                of = rng.integers(side.shape[2], size=side.shape[2])
            again.append(side[:, rng.integers(side.shape[1], size=side.shape[1])][:, :, of].mean((1, 2)))
        drawn.append(spearman(*again))
    drawn = [r for r in drawn if not math.isnan(r)]
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if drawn else (math.nan, math.nan)
    n = len(methods)
    if n <= MOST:
        orders, own = list(itertools.permutations(range(n))), 0
    else:  # of random orders the true one counts as another
        orders, own = [rng.permutation(n) for _ in range(DRAWS)], 1
    far = sum(abs(spearman(means[0], means[1][list(order)])) >= abs(rho) - 1e-9 for order in orders)
    return Agreement(
        [(names[0][m], names[1][m]) for m in methods],
        100 * np.array(means),
        (len(seeds[0]), len(seeds[1])),
        (len(prompts[0]), len(prompts[1])),
        rho,
        float(low),
        float(high),
        math.nan if math.isnan(rho) else (far + own) / (len(orders) + own),
    )


def report(found: Agreement, names: tuple[str, str]) -> str:
    """A table of the methods by the first campaign's HS, and the correlation below it."""
    lines = []
    for i in np.argsort(found.hs[0], kind="stable"):
        first, second = map(paper.method_label, found.methods[i])
        both = first if first == second else f"{first} / {second.partition(paper.SETTING)[2] or second}"
        lines.append([both, *(f"{hs:.1f}" for hs in found.hs[:, i])])
    table = markdown(["method", *(f"HS on {name}, %" for name in names)], lines, width=10_000)
    over = "; ".join(
        f"{name}: {s} seed{'s' * (s > 1)}, {p} prompts"
        for name, s, p in zip(names, found.seeds, found.prompts, strict=True)
    )
    if math.isnan(found.rho):
        return f"{table}\n\nNo order: one model has the same HS under all of these methods. {over}."
    of = "prompts" if max(found.seeds) == 1 else "seeds and prompts"
    return (
        f"{table}\n\nSpearman's correlation of the {len(found.methods)} methods: {found.rho:.2f}, 95 % interval "
        f"over {of} [{found.low:.2f}, {found.high:.2f}], p-value {found.p:.2g}. {over}."
    )


def of_campaigns(
    folders: Iterable[Path], ratio: float | None = None, judge: str | None = None
) -> tuple[Agreement, tuple[str, str]]:
    """The agreement of two exported campaigns, and what to call them."""
    found = []
    for folder in folders:
        try:
            found.append(verdicts_of(apart.exported(folder, "FOLDER", by_rate=False), ratio, judge))
        except UserError as error:
            raise UserError(f"{folder}: {error}") from error
    first, second = found
    if first.ratio != second.ratio:
        raise UserError(
            f"one campaign is at p = {first.ratio:g}, the other at {second.ratio:g}; compare like with like"
        )
    titles = [f"{named(side.model)}, p = {side.ratio:g}" for side in found]
    return agreement(first.told, second.told), (titles[0], titles[1])


@command
def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0, or 2 for bad input."""
    parser = Parser(**about(__doc__, "python -m analysis.orders"))
    parser.add_argument("campaigns", type=Path, nargs=2, help="two exported campaigns, e.g. results/smollm2_main")
    parser.add_argument("--ratio", type=float, help="the harmful ratio (default: the only one with poison)")
    parser.add_argument("--judge", help="whose verdicts to use where the runs were judged by several")
    args = parser.parse_args(argv)
    print(report(*of_campaigns(args.campaigns, args.ratio, args.judge)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
