"""Two methods in the same cells of a grid: differences paired by seed and by prompt, with what they rest on.

A difference counts as found only if it is significant over seeds *and* over prompts, where both can be tested: the
same prompts recur at every seed, so the spread of seeds alone says nothing about other prompts, and one seed's prompts
say nothing about other seeds (ours; conservative). See `analysis/stats.py` for the tests.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis import paper, stats
from analysis.collect import Collection, at_end, one_judge, pooled, swept

CELL = ["model", "task", "harmful_ratio"]


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
    bootstrap: stats.Estimate | None
    """The same over seeds and prompts together, where verdicts are at hand."""
    p_seeds: float
    p_prompts: float
    p: float
    """The larger of the two; NaN where training was not repeated, or nothing can be tested."""
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
            "boot_low": self.bootstrap.low if self.bootstrap else math.nan,
            "boot_high": self.bootstrap.high if self.bootstrap else math.nan,
            "p_seeds": self.p_seeds,
            "p_prompts": self.p_prompts,
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
        parts += [f"lr={rate:g}"] if "learning_rate" in by else []
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
        p_seeds, p_prompts, both = stats.paired_p(differences), math.nan, None
        answers = found.answers(cell, method), found.answers(cell, reference)
        if answers[0].keys() & answers[1].keys():
            p_prompts = stats.sign_flip_p(summed_differences(*answers))
            both = stats.bootstrap(*answers)
        elif proportion and math.isnan(p_seeds):
            # without verdicts, seeds that agree exactly leave only the prompts of one of them, unpaired
            p_prompts = stats.two_proportions_p(*means, prompts)
        p = max((v for v in (p_seeds, p_prompts) if not math.isnan(v)), default=math.nan)
        if len(shared) < 2:
            p = math.nan  # training was not repeated
        elif not proportion and max(differences) == min(differences):
            p = 0.0 if differences[0] else 1.0  # a measurement without sampling, the same each time
        h = stats.cohens_h(*means) if proportion else math.nan
        made.append((reference, means, difference, both, p_seeds, p_prompts, p, h))
    adjusted = stats.holm({row[0]: row[6] for row in made})
    return [
        Comparison(cell, metric, method, ref, *means, diff, both, p_s, p_p, p, adjusted[ref], h, prompts)
        for ref, means, diff, both, p_s, p_p, p, h in made
    ]
