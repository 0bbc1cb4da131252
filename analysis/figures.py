"""Figures of a campaign: readable in grey, by colour-blind readers, and with thirty methods.

Colours are Okabe and Ito's (jfly.uni-koeln.de/color, 2008). Every method of `PLACES` has one colour, marker and line
style in every figure; other methods, and the settings of one, take theirs from Tol's muted colours
(SRON/EPS/TN/09-002) and never a listed method's. Up to `OVERLAY` methods share a panel; more get a panel each, in
which the other methods stand in pale grey and SFT as a dotted line. Where nothing but the method varies, methods are
rows. A grey dotted line is the aligned model, not fine-tuned. Crosses are values that the paper prints.
"""

import functools
import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from analysis import paper, stats
from analysis.collect import one_clock

COLOURS = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2", "#8C8C8C"]
OTHERS = ["#332288", "#117733", "#882255", "#999933", "#44AA99", "#AA4499", "#661100", "#DDCC77"]
"""Of methods that are not in `PLACES`."""
MARKERS = ["o", "s", "^", "v", "D", "P", "X", "*", "<", ">", "h", "p", "d"]
DASHES: list[str | tuple] = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1))]
PLACES = (
    *("sft", "lisa", "safeinstr", "bea", "sppft", "asft", "cwac", "activation_only"),
    *("cwac_literal", "weight_only", "weight_only_closed", "cwac_closed", "bea_no_trigger", "safelora", "salora"),
    *("ldifs", "circuit_breaker", "vaccine", "booster", "replay", "weight_only_closed_prefill", "nullspace"),
    *("inflora", "nullspace_cwac", "repnoise", "l2sp", "resta", "ewc", "safe_delta", "constrained_sft"),
)
"""A method's colour, marker and line style are those of its place, each counted on its own: no two methods share a
colour and a marker before place 104. New methods go to the end, so that no look changes."""
PANELS = ("HS", "refusal", "other", "FA")
OVERLAY = 8
"""How many methods one panel holds before their lines can no longer be told apart."""
REFERENCE = "sft"
LOSSES = ("task_loss", "poison_loss")
# In a panel of its own a method needs no colour; what its two lines measure does.
LOOKS = {
    "HS": {"color": "#D55E00", "marker": "o", "linestyle": "-", "markersize": 3.5, "linewidth": 1.5},
    "FA": {
        "color": "#0072B2",
        "marker": "s",
        "linestyle": "--",
        "markersize": 3.5,
        "linewidth": 1.2,
        "markerfacecolor": "white",
    },
}
PRINTED = {"HS": "x", "FA": "+"}
SMALL = {"font.size": 7.5, "axes.titlesize": 8, "axes.linewidth": 0.6}


@dataclass(frozen=True)
class Plate:
    """A drawn figure with what a reader needs beside it."""

    name: str
    """File stem, unique in a campaign."""
    title: str
    caption: str
    figure: Figure


def style(method: str, among: Sequence[str] = ()) -> dict:
    """Colour, marker and line style of a method.

    among: the methods of the figure. One that is not in `PLACES` has a look from its name, and another where a method
    before it in this figure has that one already.
    """
    if method in PLACES:
        place = PLACES.index(method)
        color, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
    else:
        place, color, marker = newcomers([*among, method])[method]
    return {
        "color": color,
        "marker": marker,
        "linestyle": DASHES[place % len(DASHES)],
        "markersize": 5,
        "linewidth": 1.4,
        "markerfacecolor": "white" if "(ours)" in paper.method_label(method) else color,
    }


def newcomers(methods: Iterable[str]) -> dict[str, tuple[int, str, str]]:
    """Place, colour and marker of the methods that are not in `PLACES`; another colour each while there are any."""
    looks: dict[str, tuple[int, str, str]] = {}
    free = [(c, m) for m in MARKERS for c in OTHERS]
    for method in sorted({*methods} - {*PLACES, paper.ALIGNED}, key=paper.method_order):
        start = int(hashlib.sha256(method.encode()).hexdigest(), 16) % len(free)
        taken = [look[1:] for look in looks.values()]

        def crowd(place: int, taken: list[tuple[str, str]] = taken) -> tuple[bool, int, int]:
            color, marker = free[place]
            return (free[place] in taken, sum(c == color for c, _ in taken), sum(m == marker for _, m in taken))

        place = min(((start + k) % len(free) for k in range(len(free))), key=crowd)
        looks[method] = (place, *free[place])
    return looks


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write `stem`.png (150 dpi) and `stem`.pdf; returns both paths."""
    # not with_suffix: a stem such as ratio-p0.1 has a dot of its own
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "pdf")]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths


def panels(rows: int, columns: int, size: tuple[float, float], **share) -> tuple[Figure, np.ndarray]:
    """A figure with a grid [rows, columns] of axes; not one of pyplot's, which would keep every figure alive."""
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **share)


def legend_below(figure: Figure, axes: Sequence[Axes], columns: int = 3) -> None:
    """One legend for all panels, under them: the aligned model, methods as in tables, then everything else.

    columns: at most; fewer where the longest label would run out of the figure.
    """
    entries = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    slugs = {label: slug for slug, label in paper.METHODS.items()}

    def place(label: str) -> tuple:
        name, comma, setting = label.partition(paper.SETTING)
        return paper.method_order(slugs.get(label) or slugs.get(name, name) + comma + setting)

    labels = sorted(entries, key=place)
    inches = (5 + 0.56 * max(map(len, labels), default=0)) * matplotlib.rcParams["font.size"] / 72  # handle and text
    columns = max(1, min(columns, int(figure.get_figwidth() / inches)))
    figure.legend([entries[k] for k in labels], labels, loc="outside lower center", ncol=columns, frameon=False)


def intervals(seeds: Iterable[int]) -> str:
    """What bars are, for a caption; seeds: how many each value is over."""
    alone = ", of one seed over its prompts alone, which says nothing of other seeds"
    return "95 % intervals" + alone * bool(min(seeds, default=2) == 1)


def rule(ax: Axes, mean: float, across: bool = True) -> None:
    """The line of the aligned model at `mean`: over the panel, or, for methods as rows, down it."""
    look = {"color": "0.45", "linestyle": (0, (1, 2)), "linewidth": 1.2, "zorder": 1.5}
    (ax.axhline if across else ax.axvline)(mean, label=paper.method_label(paper.ALIGNED), **look)


def aligned(summary: pd.DataFrame, metric: str) -> float:
    """The aligned model's mean of a metric in rows of one model, task and set of prompts; NaN if not measured."""
    return summary.loc[(summary["method"] == paper.ALIGNED) & (summary["metric"] == metric), "mean"].mean()


def bare(ax: Axes) -> None:
    """The look all panels share; tick labels are made when drawing, so their size is fixed here."""
    ax.tick_params(labelsize=matplotlib.rcParams["font.size"] - 0.5)
    ax.grid(axis="y", color="0.9", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)


def ordered(methods) -> list[str]:
    """Distinct methods in the order of tables and legends, without the aligned model."""
    return sorted({*methods} - {paper.ALIGNED}, key=paper.method_order)


@functools.cache
def paper_cells() -> pd.DataFrame:
    """The cells of `analysis.paper.printed`, without its averages; read once."""
    frame = paper.printed()
    return frame[~frame["average"]]


def printed(model: str, task: str, methods: Sequence[str]) -> pd.DataFrame:
    """The paper's HS and FA for this model and task, of these methods only, one a method, ratio and metric.

    A cell that several tables print counts as the first of them prints it. Columns as in `analysis.paper.printed`.
    """
    frame = paper_cells()
    chosen = frame[(frame["model"] == model) & (frame["task"] == task) & frame["method"].isin(methods)]
    return chosen.drop_duplicates(["method", "harmful_ratio", "metric"])


def of_set(rows: pd.DataFrame, of: str) -> pd.DataFrame:
    """Rows whose verdicts are about the harmful prompts `of`; other metrics have sets of their own and all stay."""
    return rows[(rows["set"] == of) | ~rows["metric"].isin(paper.VERDICTS)]


def spread(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions for labels near `values`: in their order, at least `gap` apart where [low, high] has room for it."""
    if not values:
        return []
    gap = min(gap, (high - low) / max(1, len(values) - 1))
    order = sorted(range(len(values)), key=lambda i: values[i])
    placed: list[float] = []
    for i in order:
        placed.append(max(values[i], low, placed[-1] + gap if placed else low))
    ceiling = high
    for k in reversed(range(len(placed))):
        placed[k] = min(placed[k], ceiling)
        ceiling = placed[k] - gap
    result = [0.0] * len(values)
    for i, position in zip(order, placed, strict=True):
        result[i] = position
    return result


def multiples(
    lines: pd.DataFrame,
    title: str,
    xlabel: str,
    scale: str = "linear",
    marks: pd.DataFrame | None = None,
    start: float = math.nan,
) -> Figure:
    """One small panel a method: its HS and FA (percent) along x, every other method's HS behind it in pale grey.

    lines: columns method, metric, x, mean, low, high. scale: `linear`, `log`, or `even`, which sets the distinct x
    side by side. marks: the paper's values, columns method, metric, x, value. start: HS of the aligned model.
    """
    methods = ordered(lines["method"])
    ticks = sorted(lines["x"].unique())
    place = {x: k for k, x in enumerate(ticks)} if scale == "even" else {x: x for x in ticks}
    columns = min(5, len(methods))
    height = math.ceil(len(methods) / columns)
    paths = {
        key: group.sort_values("x").assign(at=lambda g: g["x"].map(place))
        for key, group in lines.groupby(["method", "metric"])
    }
    with matplotlib.rc_context(SMALL):
        size = (max(4.2, 2.0 * columns), 0.9 + 1.55 * height)
        figure, grid = panels(height, columns, size, sharex=True, sharey=True)
        for ax, method in zip(grid.flat, methods, strict=False):
            for other in methods:
                if other not in (method, REFERENCE) and (other, "HS") in paths:
                    path = paths[other, "HS"]
                    ax.plot(path["at"], path["mean"], color="0.87", linewidth=0.8, zorder=1)
            if method != REFERENCE and (REFERENCE, "HS") in paths:
                path = paths[REFERENCE, "HS"]
                label = f"HS of {paper.method_label(REFERENCE)}"
                ax.plot(path["at"], path["mean"], color="black", linestyle=":", linewidth=1, zorder=2, label=label)
            if not math.isnan(start):
                rule(ax, start)
            for metric, look in LOOKS.items():
                if (path := paths.get((method, metric))) is not None:
                    ax.plot(path["at"], path["mean"], label=metric, zorder=3, **look)
                    ax.vlines(path["at"], path["low"], path["high"], color=look["color"], linewidth=0.8, zorder=3)
                if marks is not None:
                    paper_values = marks[
                        (marks["method"] == method) & (marks["metric"] == metric) & marks["x"].isin(place)
                    ]
                    at = [place[x] for x in paper_values["x"]]
                    ax.plot(
                        at,
                        paper_values["value"],
                        PRINTED[metric],
                        color=look["color"],
                        markersize=6,
                        zorder=4,
                        label=f"{metric} in the paper" if len(paper_values) else None,
                    )
            ax.set_title(paper.method_label(method), loc="left", pad=3)
            ax.set_ylim(-4, 104)
            bare(ax)
            if scale == "log":
                logarithmic(ax, lines["x"])
            elif scale == "even":
                ax.set_xticks(range(len(ticks)), [f"{x:g}" for x in ticks])
                ax.set_xlim(-0.5, len(ticks) - 0.5)
        for ax in list(grid.flat)[len(methods) :]:
            ax.set_axis_off()
        # a column's last panel shows the ticks, also where the grid's last row ends before it
        for column in range(columns):
            last = grid[(len(methods) - 1 - column) // columns][column]
            last.tick_params(labelbottom=True)
            last.set_xlabel(xlabel, fontsize=8.5)  # not the figure's: an outside legend would lie on it
        figure.supylabel("%", fontsize=8.5)
        figure.suptitle(title, fontsize=9.5)
        legend_below(figure, list(grid.flat)[: len(methods)], columns=min(5, columns + 1))
    return figure


def lines_of(summary: pd.DataFrame, x: str) -> pd.DataFrame:
    """HS and FA of a summary as `multiples` wants them."""
    chosen = summary[summary["metric"].isin(LOOKS) & (summary["method"] != paper.ALIGNED)]
    return chosen.assign(x=chosen[x])[["method", "metric", "x", "mean", "low", "high"]]


def against_ratio(summary: pd.DataFrame, model: str, task: str, of: str) -> list[Plate]:
    """HS, refusal, other and FA against the harmful ratio, bars = 95 % interval; crosses = the paper's Tables 1-4.

    of: the set of harmful prompts the verdicts are about. The dotted grey line is the aligned model. Of one ratio the
    methods are rows. Several ratios are categories side by side, in which the methods of a shared panel stand in the
    order of the tables.
    """
    part = of_set(summary[(summary["model"] == model) & (summary["task"] == task)], of)
    methods = ordered(part["method"])
    if not methods:
        return []
    ratios = sorted(part.loc[part["method"] != paper.ALIGNED, "harmful_ratio"].unique())
    title = f"{model}, {task}; harmful prompts: {of}"
    paper_values = printed(model, task, methods)
    bars = intervals(part.loc[part["metric"].isin(PANELS), "n"])
    caption = f"Bars: {bars}." + " Crosses: the paper's Tables 1 to 4." * bool(len(paper_values))
    if len(ratios) == 1:
        title += f"; p = {ratios[0]:g}"
        figure = rows_of_methods(part, methods, paper_values[paper_values["harmful_ratio"] == ratios[0]], title)
    elif len(methods) > OVERLAY:
        figure = multiples(
            lines_of(part, "harmful_ratio"),
            title,
            "harmful ratio p",
            "even",
            paper_values.assign(x=paper_values["harmful_ratio"]),
            aligned(part, "HS"),
        )
    else:
        figure = overlay(part, methods, ratios, paper_values, title)
    return [Plate("ratio", f"HS and FA against the harmful ratio: {title}", caption, figure)]


def rows_of_methods(part: pd.DataFrame, methods: list[str], paper_values: pd.DataFrame, title: str) -> Figure:
    """`against_ratio` at one ratio: a row a method, a panel a metric; no value but the measured one has a place."""
    place = {method: k for k, method in enumerate(methods)}
    with matplotlib.rc_context(SMALL):
        size = (11, 1.4 + 0.24 * len(methods))
        figure, grid = panels(1, len(PANELS), size, sharey=True, sharex=True)
        for ax, metric in zip(grid[0], PANELS, strict=True):
            rows = part[(part["metric"] == metric) & (part["method"] != paper.ALIGNED)]
            if not math.isnan(start := aligned(part, metric)):
                rule(ax, start, across=False)
            for row in rows.itertuples():
                look = {**style(row.method, methods), "linestyle": "none"}
                ax.hlines(place[row.method], row.low, row.high, color=look["color"], linewidth=1)
                ax.plot([row.mean], [place[row.method]], zorder=3, **look)
            values = paper_values[paper_values["metric"] == metric]
            at = [place[method] for method in values["method"]]
            if at:
                ax.plot(values["value"], at, "x", color="black", markersize=6, zorder=4, label="in the paper")
            ax.set_xlabel(paper.METRICS[metric])
            ax.set_xlim(-4, 104)
            bare(ax)
            ax.grid(axis="x", color="0.93", linewidth=0.6)
            if rows.empty:
                ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", color="0.4")
        grid[0][0].set_yticks(range(len(methods)), [paper.method_label(m) for m in methods])
        grid[0][0].set_ylim(len(methods) - 0.5, -0.5)  # the first method on top, as in the tables
        figure.suptitle(title, fontsize=9.5)
        legend_below(figure, list(grid[0]))
    return figure


def overlay(
    part: pd.DataFrame, methods: list[str], ratios: list[float], paper_values: pd.DataFrame, title: str
) -> Figure:
    """`against_ratio` with all methods in one panel a metric; each ratio is a band, as wide as all of its methods."""
    figure, grid = panels(2, 2, (9, 6.4), sharex=True)
    for ax, metric in zip(grid.flat, PANELS, strict=True):
        rows = part[part["metric"] == metric]
        if not math.isnan(start := aligned(part, metric)):
            rule(ax, start)
        for band in range(0, len(ratios), 2):
            ax.axvspan(band - 0.5, band + 0.5, color="0.965", zorder=0)
        for k, method in enumerate(methods):
            line = rows[rows["method"] == method].groupby("harmful_ratio")[["mean", "low", "high"]].mean()
            if line.empty:
                continue
            aside = (k - (len(methods) - 1) / 2) * 0.7 / len(methods)
            x = [ratios.index(r) + aside for r in line.index]
            look = style(method, methods)
            ax.plot(x, line["mean"], label=paper.method_label(method), **look)
            bars = line.dropna()
            at = [x[list(line.index).index(r)] for r in bars.index]
            ax.vlines(at, bars["low"], bars["high"], color=look["color"], linewidth=0.9)
            values = paper_values[
                (paper_values["method"] == method)
                & (paper_values["metric"] == metric)
                & paper_values["harmful_ratio"].isin(ratios)
            ]
            if len(values):
                at = [ratios.index(r) + aside for r in values["harmful_ratio"]]
                ax.plot(at, values["value"], "x", color=look["color"], markersize=7, label="in the paper")
        ax.set_ylabel(paper.METRICS[metric])
        ax.set_ylim(-4, 104)
        ax.set_xlim(-0.5, len(ratios) - 0.5)
        ax.set_xticks(range(len(ratios)), [f"p = {r:g}" for r in ratios])
        bare(ax)
        ax.tick_params(axis="x", length=0)  # a band has no point
        if not rows.shape[0]:
            ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", color="0.4")
    for ax in grid[-1]:
        ax.set_xlabel("harmful ratio")
    figure.suptitle(title, fontsize=11)
    legend_below(figure, list(grid.flat))
    return figure


def trajectory(rows: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds at each training step (`one_clock`), before and at the end of training.

    rows: metric rows of one model and task, one set of harmful prompts. Columns of the result: method,
    harmful_ratio, step, HS, low, high, n, task_loss, poison_loss. Points at which a loss was not measured
    have NaN in it.
    """
    columns = ["method", "harmful_ratio", "step", "HS", "low", "high", "n", *LOSSES]
    records = []
    for (method, ratio, at), group in one_clock(rows).groupby(["method", "harmful_ratio", "step"]):
        latest = group.drop_duplicates(["seed", "metric"], keep="last").dropna(subset="value")
        harm = latest[latest["metric"] == "HS"]
        losses = [latest.loc[latest["metric"] == name, "value"].mean() for name in LOSSES]
        if harm.empty:
            continue
        found = stats.estimate(harm["value"].tolist(), prompts=harm["n"].tolist(), proportion=True)
        records.append([method, ratio, at, found.mean, found.low, found.high, found.n, *losses])
    return pd.DataFrame(records, columns=columns)


def against_training(rows: pd.DataFrame, model: str, task: str, of: str) -> list[Plate]:
    """HS against optimizer steps, the task loss and, of few methods, the poison's: safer, or only slower?

    A defence that only learns slower lies on SFT's curve over the task loss. Bars: 95 % intervals. Without
    any measurement before the end of training there is no curve and no figure: [] then.
    """
    part = rows[(rows["model"] == model) & (rows["task"] == task)]
    part = part[part["metric"].isin(LOSSES) | ((part["metric"] == "HS") & (part["set"] == of))]
    points = trajectory(part)
    curves = points.groupby(["harmful_ratio", "method"])["step"].nunique()
    ratios = sorted({ratio for (ratio, _), steps in curves.items() if steps > 1})
    if not ratios:
        return []
    title = f"{model}, {task}; harmful prompts: {of}"
    caption = (
        f"Bars: {intervals(points['n'])}. A defence that only learns slower lies on SFT's curve over the task loss. "
        "Over the poison's loss one sees whether HS stays low because the poison is not learnt."
    )
    heading = "HS against training"
    if points["method"].nunique() <= OVERLAY:
        return [Plate("training", f"{heading}: {title}", caption, training_overlay(points, ratios, title))]
    plates = []
    for ratio in ratios:
        here = points[points["harmful_ratio"] == ratio].assign(metric="HS", mean=lambda p: p["HS"])
        for along, label in (("step", "optimizer steps"), ("task_loss", paper.METRICS["task_loss"])):
            lines = here.dropna(subset=along).assign(x=lambda p, along=along: p[along])
            if lines.empty:
                continue
            falls = along == "task_loss"
            scale = "log" if falls and wide(lines["x"]) else "linear"
            where = f"{title}; p = {ratio:g}"
            figure = multiples(lines, where, label + "\n(falls to the right)" * falls, scale)  # panels are narrow
            if falls:
                figure.axes[0].invert_xaxis()  # shared: time runs left to right in all panels
            plates.append(Plate(f"training-p{ratio:g}-{along}", f"{heading} ({label}): {where}", caption, figure))
    return plates


def wide(values: pd.Series) -> bool:
    """Whether positive values span so much that only a logarithmic axis shows them."""
    return bool(values.min() > 0 and values.max() > 20 * values.min())


def logarithmic(ax: Axes, values: pd.Series) -> None:
    """A logarithmic x axis for `values`: over less than two decades 1, 2 and 5 of each are labelled."""
    ax.set_xscale("log")
    if values.max() < 100 * values.min():
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(lambda value, _: paper.rate_label(value))
    ax.xaxis.set_minor_formatter(NullFormatter())  # labels of minor ticks would overlap


def training_overlay(points: pd.DataFrame, ratios: Sequence[float], title: str) -> Figure:
    """`against_training` with all methods in one panel, one row of panels a harmful ratio."""
    losses = [name for name in LOSSES if name == "task_loss" or points[name].notna().any()]
    figure, grid = panels(len(ratios), 1 + len(losses), (3 + 3 * len(losses), 1.2 + 2.7 * len(ratios)), sharey=True)
    for row, ratio in zip(grid, ratios, strict=True):
        here = points[points["harmful_ratio"] == ratio]
        for ax, across in zip(row, ("step", *losses), strict=True):
            for method in ordered(here["method"]):
                line = here[here["method"] == method].sort_values("step").dropna(subset=across)
                look = style(method, [*points["method"]])
                ax.plot(line[across], line["HS"], label=paper.method_label(method), **look)
                ax.vlines(line[across], line["low"], line["high"], color=look["color"], linewidth=0.8)
            ax.set_ylim(-4, 104)
            bare(ax)
        row[0].set_ylabel(f"p = {ratio:g}\nHS (%)")
        for ax, name in zip(row[1:], losses, strict=True):
            if here[name].notna().any():
                # Training lowers the losses, so time runs left to right in all columns.
                if wide(here[name].dropna()):
                    logarithmic(ax, here[name])
                ax.invert_xaxis()
            else:
                ax.text(0.5, 0.5, f"no {name} rows", transform=ax.transAxes, ha="center", color="0.4")
    grid[-1][0].set_xlabel("optimizer steps")
    for ax, name in zip(grid[-1][1:], losses, strict=True):
        ax.set_xlabel(f"{paper.METRICS[name]}\n(falls to the right)")
    figure.suptitle(title, fontsize=11)
    legend_below(figure, list(grid.flat))
    return figure


def front(points: pd.DataFrame) -> pd.DataFrame:
    """The points that no other beats: none has at least their FA and at most their HS and is better in one.

    points: columns FA and HS. Tied points stand or fall together. Sorted by FA, then HS.
    """
    kept = [
        not (
            (points["FA"] >= row["FA"])
            & (points["HS"] <= row["HS"])
            & ((points["FA"] > row["FA"]) | (points["HS"] < row["HS"]))
        ).any()
        for _, row in points.iterrows()
    ]
    return points[kept].sort_values(["FA", "HS"])


def pareto(summary: pd.DataFrame, model: str, task: str, of: str) -> list[Plate]:
    """Safety against utility: HS over FA, one panel a harmful ratio, and the front of what no other method beats.

    Bars are 95 % intervals. The front is of the means: where intervals overlap, it is not established.
    """
    part = of_set(summary[(summary["model"] == model) & (summary["task"] == task)], of)
    part = part[part["metric"].isin(("FA", "HS"))]
    # the aligned model has no ratio of its own and stands in every panel
    ratios = sorted(part.loc[part["method"] != paper.ALIGNED, "harmful_ratio"].unique())
    found = []
    for ratio in ratios:
        here = part[(part["harmful_ratio"] == ratio) | (part["method"] == paper.ALIGNED)]
        wide_form = here.pivot_table(index="method", columns="metric", values=["mean", "low", "high"], dropna=False)
        if {("mean", "FA"), ("mean", "HS")} <= set(wide_form.columns):
            points = wide_form["mean"].dropna()
            if len(points.index.difference([paper.ALIGNED])):
                found.append((ratio, points, wide_form))
    if not found:
        return []
    title = f"{model}, {task}; harmful prompts: {of}"
    columns = min(2, len(found))
    height = math.ceil(len(found) / columns)
    with matplotlib.rc_context(SMALL):
        figure, grid = panels(height, columns, (4.8 * columns, 1.2 + 2.9 * height))
        for ax, (ratio, points, around) in zip(grid.flat, found, strict=False):
            pareto_panel(ax, points, around, printed(model, task, list(points.index)), ratio)
        for ax in list(grid.flat)[len(found) :]:
            ax.set_axis_off()
        figure.suptitle(title, fontsize=9.5)
        legend_below(figure, list(grid.flat)[: len(found)], columns=3 * columns)
    caption = (
        "Lower right is better. Grey steps: the front of means that no other trained method beats; where bars ("
        f"{intervals(part['n'])}) overlap it is not established."
    )
    return [Plate("pareto", f"Safety against utility: {title}", caption, figure)]


def pareto_panel(
    ax: Axes, points: pd.DataFrame, around: pd.DataFrame, paper_values: pd.DataFrame, ratio: float
) -> None:
    """One panel of `pareto`: a marker a method; names beside the front, SFT and the aligned model."""
    best = front(points.drop(index=paper.ALIGNED, errors="ignore"))
    ax.step(best["FA"], best["HS"], where="post", color="0.6", linewidth=1.2, zorder=1, label="front")
    for method in sorted(points.index, key=paper.method_order):
        look = (
            {"color": "0.5", "marker": "*", "markersize": 7}
            if method == paper.ALIGNED
            else style(method, [*points.index])
        )
        look = {**look, "linestyle": "none"}
        x, y = points.loc[method, ["FA", "HS"]]
        ax.plot([x], [y], label=paper.method_label(method), **look)
        limits = around.loc[method]
        ax.hlines(y, limits.get(("low", "FA")), limits.get(("high", "FA")), color=look["color"], linewidth=0.7)
        ax.vlines(x, limits.get(("low", "HS")), limits.get(("high", "HS")), color=look["color"], linewidth=0.7)
        values = paper_values[(paper_values["method"] == method) & (paper_values["harmful_ratio"] == ratio)].set_index(
            "metric"
        )["value"]
        if {"FA", "HS"} <= set(values.index):
            ax.plot(values["FA"], values["HS"], "x", color=look["color"], markersize=6, label="in the paper")
    ax.set_ylim(-4, 104)
    low, high = ax.get_xlim()
    ax.set_xlim(max(low, -4), min(high, 104))
    named = [m for m in points.index if m in best.index or m in (REFERENCE, paper.ALIGNED)]
    named.sort(key=lambda m: (points.loc[m, "HS"], -points.loc[m, "FA"]))
    heights = spread([points.loc[m, "HS"] for m in named], 6, 0, 100)
    for method, height in zip(named, heights, strict=True):
        ax.annotate(
            paper.method_label(method),
            xy=tuple(points.loc[method, ["FA", "HS"]]),
            xytext=(1.04, (height + 4) / 108),
            textcoords="axes fraction",
            va="center",
            fontsize=6.5,
            arrowprops={"arrowstyle": "-", "color": "0.7", "linewidth": 0.5, "shrinkB": 3, "relpos": (0, 0.5)},
        )
    ax.set_title(f"p = {ratio:g}", loc="left")
    ax.set_xlabel(paper.METRICS["FA"])
    ax.set_ylabel(paper.METRICS["HS"])
    bare(ax)
