"""The paper's Figures 3, 4 and 5, and its Figure 1 measured: where the drift of a layer's output comes from.

CWAC, arXiv:2604.12384, section 3 (Eq. 4), section 5 and appendix C.

Deviations:
- The paper prints no values of these figures, so nothing is overlaid; it gives no intervals, ours are 95 %.
- Figure 5: one value a held-out harmful prompt, the mean over blocks of what `cwac/evaluation/drift.py` defines.
- Figure 1 is a sketch in the paper; the terms it names are measured by `experiments.activations`.
"""

import math
from collections.abc import Iterable

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from scipy.stats import gaussian_kde

from analysis import paper, stats
from analysis.collect import at_end, before
from analysis.figures import (
    COLOURS,
    LOOKS,
    SMALL,
    Plate,
    bare,
    intervals,
    legend_below,
    multiples,
    of_set,
    ordered,
    panels,
    wide,
)
from analysis.records import Record

# Eq. 4 keeps the first two; the third is of second order and dropped.
TERMS = {
    "W0_dh": ("W0 dh: its input moved", "#D55E00", "o", "-"),
    "dW_h0": ("dW h0: its weights moved", "#0072B2", "s", "--"),
    "dW_dh": ("dW dh: dropped in Eq. 4", "#000000", "^", ":"),
}
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def figure3(rows: pd.DataFrame, model: str, task: str, of: str) -> list[Plate]:
    """HS and FA against the learning rate (log axis), one figure a harmful ratio; [] without two rates.

    rows: of one judge. Means over seeds with 95 % intervals.
    """
    part = of_set(rows[(rows["model"] == model) & (rows["task"] == task) & rows["metric"].isin(LOOKS)], of)
    ends = at_end(part, by=["learning_rate"])
    records = [
        [*key, *interval(cell)] for key, cell in ends.groupby(["method", "harmful_ratio", "metric", "learning_rate"])
    ]
    lines = pd.DataFrame(records, columns=["method", "harmful_ratio", "metric", "x", "mean", "low", "high", "n"])
    plates = []
    for ratio, here in lines.groupby("harmful_ratio"):
        if here["x"].nunique() < 2:
            continue
        where = f"{model}, {task}; p = {ratio:g}; harmful prompts: {of}"
        start = before(part)
        figure = multiples(
            here, where, "learning rate", "log", start=start.loc[start["metric"] == "HS", "value"].mean()
        )
        plates.append(
            Plate(
                f"figure3-p{ratio:g}",
                f"Figure 3, HS and FA against the learning rate: {where}",
                f"Means over seeds, bars: {intervals(here['n'])}.",
                figure,
            )
        )
    return plates


def interval(cell: pd.DataFrame) -> tuple[float, float, float, int]:
    """Mean and 95 % interval of a percentage of one cell, and over how many seeds."""
    measured = cell.dropna(subset="value")
    if measured.empty:
        return math.nan, math.nan, math.nan, 0
    found = stats.estimate(measured["value"].tolist(), prompts=measured["n"].tolist(), proportion=True)
    return found.mean, found.low, found.high, found.n


def figure4(rows: pd.DataFrame, model: str, task: str, of: str) -> list[Plate]:
    """HS (and FA) against the epoch, epoch 0 being the aligned model; [] where no run was evaluated on the way.

    rows: of one judge, runs of one learning rate. One figure a harmful ratio.
    """
    part = of_set(rows[(rows["model"] == model) & (rows["task"] == task) & rows["metric"].isin(LOOKS)], of)
    plates = []
    for ratio, here in part.groupby("harmful_ratio"):
        latest = here.drop_duplicates(["run_id", "metric", "epoch"], keep="last")
        records = [[*key, *interval(cell)] for key, cell in latest.groupby(["method", "metric", "epoch"])]
        lines = pd.DataFrame(records, columns=["method", "metric", "x", "mean", "low", "high", "n"])
        if lines[lines["metric"] == "HS"].groupby("method")["x"].nunique().max() < 2:
            continue
        where = f"{model}, {task}; p = {ratio:g}; harmful prompts: {of}"
        caption = f"Means over seeds, bars: {intervals(lines['n'])}. Epoch 0: the aligned model."
        figure = multiples(lines, where, "epoch")
        plates.append(Plate(f"figure4-p{ratio:g}", f"Figure 4, HS and FA against the epoch: {where}", caption, figure))
    return plates


def figure5(records: Iterable[Record], model: str, task: str) -> list[Plate]:
    """Distribution of normalised L2 activation distances on held-out harmful prompts, a row a method.

    One figure a harmful ratio; [] where no run recorded drift. Grey shape: density over prompts of all seeds; thick
    bar: middle half; thin bar: 5th to 95th percentile; marker: median.
    """
    chosen = [r for r in records if (r.model, r.task) == (model, task) and r.drift]
    plates = []
    for ratio in sorted({r.harmful_ratio for r in chosen}):
        here: dict[str, list[float]] = {}
        for record in chosen:
            if record.harmful_ratio == ratio:
                here.setdefault(record.method, []).extend(record.drift)
        methods = ordered(here)
        with matplotlib.rc_context(SMALL):
            figure, grid = panels(1, 1, (6.5, 0.9 + 0.34 * len(methods)))
            ax = grid[0][0]
            logarithmic = wide(pd.Series([v for values in here.values() for v in values]))
            for row, method in enumerate(methods):
                distribution(ax, np.array(here[method]), row, logarithmic)
            if logarithmic:
                ax.set_xscale("log")
            ax.set_yticks(range(len(methods)), [paper.method_label(m) for m in methods])
            ax.set_ylim(len(methods) - 0.4, -0.6)  # the first method on top, as in the tables
            ax.set_xlabel("normalised L2 distance to the aligned model's activations")
            bare(ax)
            ax.grid(axis="x", color="0.9", linewidth=0.6)
            where = f"{model}, {task}; p = {ratio:g}"
            ax.set_title(where, fontsize=9.5)
        seeds = len({r.seed for r in chosen if r.harmful_ratio == ratio})
        caption = (
            f"Held-out harmful prompts of {seeds} seed{'s' * (seeds != 1)}. Grey: density; thick: middle half; thin: "
            "5th to 95th percentile; dot: median."
        )
        title = f"Figure 5, activation drift on harmful prompts: {where}"
        plates.append(Plate(f"figure5-p{ratio:g}", title, caption, figure))
    return plates


def distribution(ax: Axes, values: np.ndarray, row: int, logarithmic: bool) -> None:
    """One row of `figure5`. Values that do not vary have no density and get their marker alone."""
    low, first, median, third, high = np.percentile(values, [5, 25, 50, 75, 95])
    points = np.log(values) if logarithmic else values
    if np.ptp(points) > 1e-9:
        at = np.linspace(points.min(), points.max(), 100)
        density = gaussian_kde(points)(at)
        x, half = (np.exp(at) if logarithmic else at), 0.38 * density / density.max()
        ax.fill_between(x, row - half, row + half, color="0.85", linewidth=0, zorder=1)
    ax.hlines(row, low, high, color=COLOURS[0], linewidth=0.8, zorder=2)
    ax.hlines(row, first, third, color=COLOURS[6], linewidth=3.5, zorder=2)
    ax.plot([median], [row], marker="o", color="white", markeredgecolor=COLOURS[0], markersize=4.5, zorder=3)


def decomposition(records: Iterable[Record], model: str, task: str) -> list[Plate]:
    """The two terms of Eq. 4 and the dropped one, relative to ||W0 h0||, over blocks; a row of panels a method.

    One figure a harmful ratio, medians over runs; [] where `experiments.activations` has measured none.
    """
    chosen = [r for r in records if (r.model, r.task) == (model, task) and r.decomposition]
    plates = []
    for ratio in sorted({r.harmful_ratio for r in chosen}):
        frame = pd.DataFrame(
            [{**m, "method": r.method} for r in chosen if r.harmful_ratio == ratio for m in r.decomposition]
        )
        methods = ordered(frame["method"])
        kinds_present = set(frame["kind"])
        kinds = [k for k in KINDS if k in kinds_present] + sorted(kinds_present - set(KINDS))
        with matplotlib.rc_context(SMALL):
            size = (1.2 + 1.35 * len(kinds), 0.9 + 1.25 * len(methods))
            figure, grid = panels(len(methods), len(kinds), size, sharex=True, sharey=True)
            for line, method in zip(grid, methods, strict=True):
                for ax, kind in zip(line, kinds, strict=True):
                    here = frame[(frame["method"] == method) & (frame["kind"] == kind)]
                    middle = here.groupby("layer")[list(TERMS)].median()
                    for term, (label, colour, marker, dash) in TERMS.items():
                        shown = middle[term].where(middle[term] > 0)  # a zero has no place on a log axis
                        ax.plot(middle.index, shown, color=colour, marker=marker, linestyle=dash, ms=3, label=label)
                    ax.set_yscale("log")
                    bare(ax)
                    if ax in grid[0]:
                        ax.set_title(kind)
                line[0].set_ylabel(paper.method_label(method).replace(" (", "\n("), fontsize=7)
            figure.supxlabel("block", fontsize=8.5)
            where = f"{model}, {task}; p = {ratio:g}"
            figure.suptitle(where, fontsize=9.5)
            legend_below(figure, [grid[0][0]])
        caption = (
            "Norms at the last token of held-out harmful prompts, each relative to ||W0 h0||; medians over prompts "
            "and runs. A term that is exactly zero is not drawn."
        )
        title = f"Figure 1, measured: what moves a layer's output: {where}"
        plates.append(Plate(f"decomposition-p{ratio:g}", title, caption, figure))
    return plates
