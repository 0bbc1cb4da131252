"""Figures of a campaign, as PNG and PDF: readable in grey and by colour-blind readers.

Colours are Okabe and Ito's eight (jfly.uni-koeln.de/color, 2008); every method also has a marker and a
line style of its own, fixed by its place in `analysis/paper.py`, so it looks the same in every figure.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from analysis import paper, stats

COLOURS = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2", "#8C8C8C"]
MARKERS = ["o", "s", "^", "v", "D", "P", "X", "*", "<", ">", "h", "p"]
DASHES: list[str | tuple] = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1))]
PANELS = ("HS", "refusal", "other", "FA")


def style(method: str) -> dict:
    """Colour, marker and line style of a method; newcomers get one from their name."""
    place, _ = paper.method_order(method)
    if method not in paper.METHODS:
        place += sum(map(ord, method))
    return {
        "color": COLOURS[(place - 1) % len(COLOURS)],
        "marker": MARKERS[(place - 1) % len(MARKERS)],
        "linestyle": DASHES[(place - 1) % len(DASHES)],
        "markersize": 5,
        "linewidth": 1.4,
        "markerfacecolor": "white" if "(ours)" in paper.method_label(method) else COLOURS[(place - 1) % len(COLOURS)],
    }


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write `stem`.png (150 dpi) and `stem`.pdf; returns both paths."""
    paths = [stem.with_suffix(".png"), stem.with_suffix(".pdf")]
    for path in paths:
        figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
    return paths


def legend_below(figure: Figure, axes: Sequence) -> None:
    """One legend for all panels, under them."""
    entries = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(
        entries.values(), entries.keys(), loc="upper center", bbox_to_anchor=(0.5, 0.0), ncol=3, frameon=False
    )


def against_ratio(summary: pd.DataFrame, model: str, task: str, of: str, stem: Path) -> list[Path]:
    """HS, refusal, other and FA against the harmful ratio, one line a method, bars = 95 % interval.

    of: the set of harmful prompts the verdicts are about. The dotted grey line is the aligned model.
    Ratios are spaced evenly and methods are set a little apart, so that bars do not hide each other.
    """
    part = summary[(summary["model"] == model) & (summary["task"] == task)]
    trained = part[part["method"] != paper.ALIGNED]
    ratios = sorted(trained["harmful_ratio"].unique())
    methods = sorted(trained["method"].unique(), key=paper.method_order)
    figure, grid = plt.subplots(2, 2, figsize=(9, 6.4), sharex=True, layout="constrained")
    for ax, metric in zip(grid.flat, PANELS, strict=True):
        rows = part[(part["metric"] == metric) & ((part["set"] == of) | (metric not in paper.VERDICTS))]
        start = rows[rows["method"] == paper.ALIGNED]
        if len(start):
            label = paper.method_label(paper.ALIGNED)
            ax.axhline(start["mean"].mean(), color="0.5", linestyle=(0, (1, 2)), linewidth=1.2, label=label)
        for k, method in enumerate(methods):
            line = rows[rows["method"] == method].groupby("harmful_ratio")[["mean", "low", "high"]].mean()
            if line.empty:
                continue
            x = [ratios.index(r) + (k - (len(methods) - 1) / 2) * 0.5 / len(methods) for r in line.index]
            ax.plot(x, line["mean"], label=paper.method_label(method), **style(method))
            bars = line.dropna()
            at = [x[list(line.index).index(r)] for r in bars.index]
            ax.vlines(at, bars["low"], bars["high"], color=style(method)["color"], linewidth=0.9)
        ax.set_ylabel(paper.METRICS[metric])
        ax.set_ylim(-4, 104)
        ax.set_xticks(range(len(ratios)), [f"{r:g}" for r in ratios])
        ax.grid(axis="y", color="0.9", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
        if not rows.shape[0]:
            ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", color="0.4")
    for ax in grid[-1]:
        ax.set_xlabel("harmful ratio p")
    figure.suptitle(f"{model}, {task}; harmful prompts: {of}", fontsize=11)
    legend_below(figure, list(grid.flat))
    return save(figure, stem)


def trajectory(rows: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds at each training step, before and at the end of training.

    rows: metric rows of one model and task, one set of harmful prompts. Columns of the result: method,
    harmful_ratio, step, HS, low, high, n, task_loss. Steps at which only one of the two was measured
    have NaN in the other.
    """
    columns = ["method", "harmful_ratio", "step", "HS", "low", "high", "n", "task_loss"]
    records = []
    for (method, ratio, step), group in rows.groupby(["method", "harmful_ratio", "step"]):
        latest = group.drop_duplicates(["seed", "metric"], keep="last").dropna(subset="value")
        harm, loss = latest[latest["metric"] == "HS"], latest[latest["metric"] == "task_loss"]["value"]
        if harm.empty:
            continue
        found = stats.estimate(harm["value"].tolist(), prompts=harm["n"].tolist(), proportion=True)
        records.append([method, ratio, step, found.mean, found.low, found.high, found.n, loss.mean()])
    return pd.DataFrame(records, columns=columns)


def against_training(rows: pd.DataFrame, model: str, task: str, of: str, stem: Path) -> list[Path]:
    """HS against optimizer steps and against the task loss, one row of panels a harmful ratio.

    A defence that only learns slower lies on SFT's curve in the right column. Bars: 95 % interval over
    seeds. Without any measurement before the end of training there is no curve and no figure: [] then.
    """
    part = rows[(rows["model"] == model) & (rows["task"] == task)]
    part = part[(part["metric"] == "task_loss") | ((part["metric"] == "HS") & (part["set"] == of))]
    points = trajectory(part)
    curves = points.groupby(["harmful_ratio", "method"])["step"].nunique()
    ratios = sorted({ratio for (ratio, _), steps in curves.items() if steps > 1})
    if not ratios:
        return []
    figure, grid = plt.subplots(
        len(ratios), 2, figsize=(9, 1.2 + 2.7 * len(ratios)), sharey=True, squeeze=False, layout="constrained"
    )
    for pair, ratio in zip(grid, ratios, strict=True):
        here = points[points["harmful_ratio"] == ratio]
        for ax, across in zip(pair, ("step", "task_loss"), strict=True):
            for method in sorted(here["method"].unique(), key=paper.method_order):
                line = here[here["method"] == method].sort_values("step").dropna(subset=across)
                look = style(method)
                ax.plot(line[across], line["HS"], label=paper.method_label(method), **look)
                ax.vlines(line[across], line["low"], line["high"], color=look["color"], linewidth=0.8)
            ax.set_ylim(-4, 104)
            ax.grid(axis="y", color="0.9", linewidth=0.6)
            ax.spines[["top", "right"]].set_visible(False)
        pair[0].set_ylabel(f"p = {ratio:g}\nHS (%)")
        if here["task_loss"].notna().any():
            # Training lowers the loss, so time runs left to right in both columns.
            losses = here["task_loss"].dropna()
            if losses.min() > 0 and losses.max() > 20 * losses.min():
                pair[1].set_xscale("log")
            pair[1].invert_xaxis()
        else:
            pair[1].text(0.5, 0.5, "no task_loss rows", transform=pair[1].transAxes, ha="center", color="0.4")
    grid[-1][0].set_xlabel("optimizer steps")
    grid[-1][1].set_xlabel(f"{paper.METRICS['task_loss']} (falls to the right)")
    figure.suptitle(f"{model}, {task}; harmful prompts: {of}", fontsize=11)
    legend_below(figure, list(grid.flat))
    return save(figure, stem)
