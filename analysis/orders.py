"""Is the order of the methods on one model that on another? Spearman's correlation of their HS, with its interval.

python -m analysis.orders results/smollm2_main results/qwen_coder_05b

Takes two exported campaigns, at one harmful ratio each, and the methods that both have. A method counts at the setting
without a name where a campaign has one, else at its named one, such as a learning rate of its own. HS is over all
prompts of all sets together. The interval (ours) is a bootstrap over seeds and prompts of both campaigns, drawn
with replacement and the same for all methods of a campaign, since they share them (Owen 2007, "The pigeonhole
bootstrap", arXiv:0712.1111: for the variance of a mean it errs to the safe side). It says how sure the correlation of
these methods is, not that of others. The p-value is exact, over all orders of the methods.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from analysis import paper
from analysis.collect import Collection, at_end, one_judge, read_exported
from analysis.headline import named
from analysis.stats import LEVEL
from analysis.tables import answers_of, markdown, verdict_tables
from cwac.core.config import about, command
from cwac.core.errors import UserError

DRAWS = 2000
MOST = 8
"""Methods up to which all orders are tried: 40,320."""


@dataclass(frozen=True)
class Agreement:
    """How alike two campaigns order the methods that both have."""

    methods: list[str]
    first: list[float]
    """HS in percent of each method, over the seeds and prompts of the first campaign."""
    second: list[float]
    shape: list[tuple[int, int]]
    """Seeds and prompts of each campaign that all of these methods have."""
    rho: float
    """Spearman's correlation, ties at their mean rank; NaN where one campaign has the same HS for all methods."""
    low: float
    high: float
    p: float
    """Two-sided: the share of the orders of the methods whose correlation is at least as far from 0."""


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    if min(np.ptp(x), np.ptp(y)) == 0:
        return math.nan
    return float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])


def verdicts_of(collection: Collection, ratio: float | None = None) -> tuple[float, dict[str, dict[int, dict]]]:
    """The harmful ratio, and method -> seed -> (set, prompt) -> whether the final answer complied.

    ratio: None is the only one with poison that the campaign has. Raises UserError where there are several, and for
    runs without stored verdicts.
    """
    rows = at_end(one_judge(collection.rows), by=["learning_rate"])
    rows = rows[(rows["metric"] == "HS") & ~rows["set"].str.contains("+", regex=False)]
    ratios = sorted(rows.loc[rows["harmful_ratio"] > 0, "harmful_ratio"].unique()) if ratio is None else [ratio]
    if len(ratios) != 1:
        shown = ", ".join(f"{r:g}" for r in ratios) or "none"
        raise UserError(f"the campaign has the harmful ratios {shown}; give --ratio with one of them")
    answers, found = answers_of(collection), {}
    for (method, of), group in rows[rows["harmful_ratio"] == ratios[0]].groupby(["method", "set"]):
        told = verdict_tables(group, "HS", answers)
        if not told:
            raise UserError(f"{method} has no verdicts of {of} in verdicts.csv.gz that give its HS; export it again")
        for seed, verdicts in told.items():
            found.setdefault(method, {}).setdefault(seed, {}).update({(of, k): v for k, v in verdicts.items()})
    return float(ratios[0]), found


def plain(found: Mapping[str, dict]) -> dict[str, dict]:
    """One entry a method by its bare name: the setting without a name, else the first of its named ones."""
    chosen: dict[str, dict] = {}
    for slug in sorted(found, key=len):
        chosen.setdefault(slug.partition(paper.SETTING)[0], found[slug])
    return chosen


def table_of(found: Mapping[str, dict[int, dict]], methods: list[str]) -> np.ndarray:
    """[methods, seeds, prompts], 1 where the answer complied, over the seeds and prompts that all of them have."""
    seeds = sorted(set.intersection(*({*found[m]} for m in methods)))
    prompts = sorted(set.intersection(*({*found[m][s]} for m in methods for s in seeds))) if seeds else []
    if not prompts:
        raise UserError(f"the methods {', '.join(methods)} have no seed and prompts in common")
    return np.array([[[found[m][s][p] for p in prompts] for s in seeds] for m in methods], dtype=float)


def agreement(first: Mapping[str, dict], second: Mapping[str, dict], draws: int = DRAWS, seed: int = 0) -> Agreement:
    """Compares two campaigns of `verdicts_of`; raises UserError for fewer than three methods in common."""
    first, second = plain(first), plain(second)
    methods = sorted({*first} & {*second}, key=paper.method_order)
    if not 3 <= len(methods) <= MOST:
        raise UserError(
            f"the campaigns have {len(methods)} methods in common ({', '.join(methods) or 'none'}); an order takes "
            f"between 3 and {MOST}"
        )
    sides = [table_of(found, methods) for found in (first, second)]
    means = [side.mean((1, 2)) for side in sides]
    rho, rng = spearman(*means), np.random.default_rng(seed)
    drawn = []
    for _ in range(draws):
        again = []
        for side in sides:
            seeds, prompts = (rng.integers(n, size=n) for n in side.shape[1:])
            again.append(side[:, seeds][:, :, prompts].mean((1, 2)))
        drawn.append(spearman(*again))
    drawn = [r for r in drawn if not math.isnan(r)]
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if drawn else (math.nan, math.nan)
    orders = [spearman(means[0], means[1][list(order)]) for order in itertools.permutations(range(len(methods)))]
    p = float(np.mean([abs(r) >= abs(rho) - 1e-9 for r in orders])) if not math.isnan(rho) else math.nan
    shape = [(side.shape[1], side.shape[2]) for side in sides]
    return Agreement(methods, *(list(100 * m) for m in means), shape, rho, float(low), float(high), p)


def report(found: Agreement, names: tuple[str, str]) -> str:
    """A table of the methods by the first campaign's HS, and the correlation below it."""
    frame = pd.DataFrame({"method": found.methods, "first": found.first, "second": found.second}).sort_values("first")
    lines = [[paper.method_label(r.method), f"{r.first:.1f}", f"{r.second:.1f}"] for r in frame.itertuples()]
    seen = "; ".join(f"{n}: {s} seeds, {p} prompts" for n, (s, p) in zip(names, found.shape, strict=True))
    interval = f"[{found.low:.2f}, {found.high:.2f}]"
    return (
        f"{markdown(['method', *(f'HS on {name}, %' for name in names)], lines)}\n\n"
        f"Spearman's correlation of the {len(found.methods)} methods: {found.rho:.2f}, 95 % interval over seeds and "
        f"prompts {interval}, exact p-value {found.p:.2g}. Over what all of them have: {seen}."
    )


def of_campaigns(first: Path, second: Path, ratio: float | None = None) -> tuple[Agreement, tuple[str, str]]:
    """The agreement of two exported campaigns, and what to call their models."""
    sides, names = [], []
    for folder in (first, second):
        collection = read_exported(folder)
        if len(models := list(collection.rows["model"].unique())) != 1:
            raise UserError(f"{folder} has {len(models)} models ({', '.join(models)}); an order is of one")
        try:
            sides.append(verdicts_of(collection, ratio)[1])
        except UserError as error:
            raise UserError(f"{folder}: {error}") from error
        names.append(named(models[0]))
    return agreement(*sides), (names[0], names[1])


@command
def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(**about(__doc__, "python -m analysis.orders"))
    parser.add_argument("first", type=Path, help="an exported campaign, e.g. results/smollm2_main")
    parser.add_argument("second", type=Path, help="the other one")
    parser.add_argument("--ratio", type=float, help="the harmful ratio (default: the only one with poison)")
    args = parser.parse_args(argv)
    print(report(*of_campaigns(args.first, args.second, args.ratio)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
