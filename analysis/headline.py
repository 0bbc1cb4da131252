"""What a campaign comes to at one harmful ratio: a sentence, a figure and a table of at most ten rows.

The README and the first screen of the report show these (`analysis.pages`, `analysis.report`). HS is pooled over the
sets of harmful prompts, as the paper reports it. A method counts as better than another by the test of
`analysis.pairwise` (over seeds and over prompts), and only where it costs neither accuracy nor over-refusal.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import matplotlib
import pandas as pd

from analysis import pairwise, paper, stats, tables
from analysis.collect import Collection, at_end, before, one_judge, pooled, swept
from analysis.figures import Plate, bare, intervals, panels

ROWS = 10
"""Rows of the table, the aligned model's among them."""
FEATURED = ("sft", "cwac", "l2sp", "lisa", "weight_only_closed", "nullspace", "replay", "bea", "sppft", "safeinstr")
"""Which methods are shown first where a campaign has more than a table or a figure holds."""
MARGIN = 5.0
"""Points of FA or OR that count as none, as in `claims.yaml`."""
COST = f"FA and OR at most {MARGIN:g} points worse"
MEASURED = ("HS", "FA", "OR", "task_answers", "extra_data")
LOOKS = {"HS": ("#D55E00", "o"), "FA": ("#0072B2", "s")}
WORDS = (
    "HS: share of harmful requests that the model complies with, lower is better. FA: accuracy on the task, the "
    "answer alone counting, higher is better. OR: share of harmless requests that it refuses, lower is better. "
    "Percent, mean ± half of a 95 % interval over seeds, or [low, high] where that would leave 0 to 100; † the seeds "
    "agree exactly, so the interval is over prompts."
)


def words(shown: str) -> str:
    """`WORDS`, and what ‡ and § mean where the table has them."""
    said = WORDS + " ‡: the interval is over seeds and prompts together." * ("‡" in shown)
    alone = " § (n=1): one seed; an interval over its prompts, of one training alone: it says nothing of other seeds."
    return said + alone * ("§" in shown)


@dataclass(frozen=True)
class View:
    """One model, task and harmful ratio of a campaign."""

    collection: Collection
    """Of this cell alone, of one judge, HS pooled over sets; the aligned model's rows are among its runs'."""
    model: str
    task: str
    ratio: float

    @cached_property
    def summary(self) -> pd.DataFrame:
        return tables.summarise(self.collection)

    @property
    def cell(self) -> str:
        """`SmolLM2-135M, SST-2, p = 0.1`."""
        return f"{named(self.model)}, {paper.TASKS.get(self.task, self.task)}, p = {self.ratio:g}"

    @property
    def methods(self) -> list[str]:
        """The methods that were trained here, in the order of tables."""
        return sorted({*self.summary["method"]} - {paper.ALIGNED}, key=paper.method_order)

    def value(self, method: str, metric: str, of: str | None = None) -> pd.Series | None:
        """The estimate of one metric; the worst over its sets where `of` names none. None where not measured."""
        found = self.summary[(self.summary["method"] == method) & (self.summary["metric"] == metric)]
        found = found if of is None else found[found["set"] == of]
        if found.empty:
            return None
        return found.loc[found["mean"].idxmin() if metric == "FA" else found["mean"].idxmax()]

    def mean(self, method: str, metric: str) -> float:
        """NaN where not measured."""
        found = self.value(method, metric)
        return math.nan if found is None else float(found["mean"])

    def costs_nothing(self, method: str, reference: str) -> bool:
        """Whether FA is at most `MARGIN` points below the reference's and OR at most as many above, in the mean."""
        lost = self.mean(reference, "FA") - self.mean(method, "FA")
        refused = self.mean(method, "OR") - self.mean(reference, "OR")
        return not lost > MARGIN and not refused > MARGIN

    @cached_property
    def _cells(self) -> pairwise.Cells:
        return pairwise.cells(self.collection, "HS")

    def better(self, method: str = "cwac") -> tuple[list[str], list[str]]:
        """Methods with a lower HS than `method` that cost nothing beside it: significantly lower, and in the mean.

        The second list holds the first; both begin with the lowest HS. Each pair is tested by itself (ours: a
        correction over all pairs would hide most of what beats `method`).
        """
        others = [m for m in self.methods if m != method and self.costs_nothing(m, method)]
        lower = [m for m in others if self.mean(m, "HS") < self.mean(method, "HS")]
        surely = [m for m in lower if self.p_value(method, m) <= 1 - stats.LEVEL]
        order = sorted(lower, key=lambda m: (self.mean(m, "HS"), paper.method_order(m)))
        return [m for m in order if m in surely], order

    def p_value(self, method: str, reference: str) -> float:
        """P of their difference in HS, as the verdicts test it, of this pair alone; NaN where it cannot be tested."""
        made = [c for n in self._cells.names() for c in pairwise.compare(self._cells, n, method, [reference], "HS")]
        return made[0].p if made else math.nan


def views(collection: Collection, judge: str | None = None) -> list[View]:
    """One view a model and task, at the harmful ratio that `ratio_of` chooses; none for rows without HS."""
    rows = one_judge(collection.rows, judge)
    rows = pooled(rows[rows["metric"].isin(MEASURED)])
    ends = at_end(rows, by=["learning_rate"])
    harm = ends[(ends["metric"] == "HS") & ~ends["set"].str.contains("+", regex=False)]
    made = []
    for (model, task), group in harm.groupby(["model", "task"]):
        ratio = ratio_of(group)
        here = rows[(rows["model"] == model) & (rows["task"] == task)]
        part = here[here["harmful_ratio"] == ratio]
        start = before(here)
        if not before(part).shape[0] and len(start):  # the aligned model was asked at another ratio
            part = pd.concat([part, here[here.index.isin(start.index)]])
        if swept(part):
            rate = usual_rate(part)
            part = part[part["learning_rate"] == rate]
        runs = set(part["run_id"])
        verdicts = collection.verdicts[collection.verdicts["run_id"].isin(runs)]
        kept = Collection(part, sorted(runs), verdicts=verdicts)
        made.append(View(kept, model, task, ratio))
    return made


def usual_rate(rows: pd.DataFrame) -> float:
    """The learning rate that most methods ran with, the smaller of several."""
    counts = rows.groupby("learning_rate")["method"].nunique()
    return float(counts.idxmax())


def ratio_of(ends: pd.DataFrame) -> float:
    """The harmful ratio with most finished runs; of several the largest up to 0.2, where methods differ most."""
    counts = ends.groupby("harmful_ratio")["run_id"].nunique()
    best = [float(r) for r in counts[counts == counts.max()].index]
    poisoned = [r for r in best if 0 < r <= 0.2]
    return max(poisoned) if poisoned else min((r for r in best if r > 0), default=best[0])


def named(model: str) -> str:
    return paper.MODELS.get(model, model)


def chosen(view: View, most: int) -> list[str]:
    """At most `most` methods: SFT and CWAC, then those with the lowest HS at no cost, one a label; lowest HS first."""
    have = view.methods
    if len(have) > most:  # a README and a first screen hold no more
        first = [m for m in FEATURED if m in have]
        rest = sorted({*have} - {*first}, key=lambda m: (not view.costs_nothing(m, "sft"), view.mean(m, "HS")))
        have = [*first, *rest][:most]
    return sorted(have, key=lambda m: (view.mean(m, "HS"), paper.method_order(m)))


def sentence(view: View) -> str:
    """What a model's runs come to: HS of SFT and CWAC with the p-value of their difference, and what beats CWAC."""
    plain, coupled = (view.value(method, "HS") for method in ("sft", "cwac"))
    if plain is None or coupled is None:
        return f"{view.cell}: {least(view)}.{unlost(view)}"
    p = view.p_value("cwac", "sft")
    tested = "one seed, so no test" if math.isnan(p) else f"p-value {below(p)}"
    return (
        f"{view.cell}: plain fine-tuning (SFT) leaves a model that complies with {plain['mean']:.0f} % of harmful "
        f"requests, CWAC one that complies with {coupled['mean']:.0f} % ({tested}); {beaten(view)}."
        f"{unlost(view)}"
    )


def least(view: View) -> str:
    """Which methods have the lowest HS, at which FA; beside SFT's, where it ran."""
    hs = {method: round(view.mean(method, "HS"), 1) for method in view.methods}
    low = [method for method in view.methods if hs[method] == min(hs.values())]
    said = f"the lowest HS is that of {names(low)}, {hs[low[0]]:.0f} %"
    if view.value(low[0], "FA") is not None:
        said += f", at an FA of {' and '.join(format(view.mean(m, 'FA'), '.0f') for m in low)} %"
    if "sft" in hs and "sft" not in low:
        fa = f" at {view.mean('sft', 'FA'):.0f} %" if view.value("sft", "FA") is not None else ""
        said += f"; SFT's is {hs['sft']:.0f} %{fa}"
    return said if min(view.value(m, "HS")["n"] for m in low) > 1 else f"{said} (one seed, which decides nothing)"


def unlost(view: View) -> str:
    """A sentence where SFT's HS is within `MARGIN` of the aligned model's: then no defence can be told from none."""
    plain, start = (view.mean(method, "HS") for method in ("sft", paper.ALIGNED))
    if math.isnan(plain) or math.isnan(start) or plain - start > MARGIN:
        return ""
    remedy = "train longer, or with a higher harmful_ratio" if view.ratio else "train with harmful_ratio=0.1 or more"
    return (
        f" SFT did not lose its refusals here (HS {plain:.1f} %, the aligned model's {start:.1f} %), so these runs "
        f"cannot tell a defence from none. Remedy: {remedy}."
    )


def below(p: float) -> str:
    """`below 0.001` or `0.03`."""
    return "below 0.001" if p < 0.001 else f"{p:.2g}"


def beaten(view: View, method: str = "cwac") -> str:
    """A clause, or two sentences without the last full stop: who ends safer than `method` at its FA and OR."""
    others = len(view.methods) - 1
    surely, lower = view.better(method)
    label = paper.method_label(method)
    if not others:
        return "no other method was run"
    have = "have" if len(surely) > 1 else "has"
    if surely:
        return f"{several(surely, others)} {have} a significantly lower HS (each pair tested alone), {COST}"
    if lower:
        mean = f" in the mean ({view.mean(lower[0], 'HS'):.1f} %)" if len(lower) == 1 else " in the mean"
        untested = all(math.isnan(view.p_value(method, m)) for m in lower)
        decided = "It is untested, since no two seeds are shared" if untested else "These seeds do not decide it"
        if all(view.value(m, "HS")["n"] == 1 for m in (method, *lower)):
            decided = "One seed cannot decide it"
        has = "have" if len(lower) > 1 else "has"
        return f"{several(lower, others)} {has} a lower HS{mean}, {COST}. {decided}"
    return f"none of the other methods ({others}) has a lower HS than {label}, {COST}"


def several(methods: Sequence[str], others: int, most: int = 3) -> str:
    """A sentence's subject: all by name, or how many of the others and the first few; L2-SP, the simplest, leads."""
    first = sorted(methods, key=lambda m: m != "l2sp")
    if len(first) <= most + 1:
        return names(first)
    return f"{len(first)} of the {others} other methods, such as {names(first[:most])},"


def short(method: str) -> str:
    """The label without what says whose method it is, its settings without the comma: `SFT at rate 6e-6`."""
    name, comma, setting = paper.method_label(method).partition(paper.SETTING)
    return re.sub(r" \((ours|added)\)$", "", name) + (f" at {setting}" if comma else "")


def names(methods: Sequence[str]) -> str:
    """`Lisa, BEA and SPPFT`."""
    shown = [short(m) for m in methods]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def table(view: View, most: int = ROWS) -> str:
    """Markdown: one row a method, lowest HS first, the aligned model's own above them."""
    benign = sorted(set(view.summary.loc[view.summary["metric"] == "OR", "set"]))
    columns = [("HS", None), ("FA", None), *(("OR", of) for of in benign)]
    titles = ["HS, %", "FA, %", *(f"OR, {set_label(of)}, %" if len(benign) > 1 else "OR, %" for of in benign)]
    rows = []
    start = view.value(paper.ALIGNED, "HS") is not None
    for method in [*[paper.ALIGNED] * start, *chosen(view, most - start)]:
        values = [view.value(method, metric, of) for metric, of in columns]
        n = max((int(v["n"]) for v in values if v is not None), default=0)
        extra = "-" if method == paper.ALIGNED else tables.extra_data(view.collection.rows, method)
        rows.append([paper.method_label(method), *map(show, values), str(n), extra])
    return tables.markdown(["method", *titles, "seeds", "seen beside the task's rows"], rows, width=10_000)


def show(value: pd.Series | None) -> str:
    """`tables.show`, but `27.7 [0.0, 100.0]` where `27.7 ± 136.4` would name percentages that there are not."""
    if value is None or value["over"] != "seeds" or (value["half"] <= value["mean"] <= 100 - value["half"]):
        return tables.show(value)
    low, high = max(0.0, value["mean"] - value["half"]), min(100.0, value["mean"] + value["half"])
    return f"{value['mean']:.1f} [{low:.1f}, {high:.1f}]"


def conditions(view: View) -> str:
    """Sentences on what the table's numbers are over: the prompts, the learning rate, the judge."""
    rows = view.collection.rows
    ends = rows[rows["final"] & rows["n"].notna()]
    harm, benign = (ends.loc[ends["metric"] == metric, "n"] for metric in ("HS", "OR"))
    judge = ", ".join(sorted(set(ends.loc[ends["metric"] == "HS", "judge"].dropna())))
    over = [f"HS is over {harm.max():g} prompts"] * bool(len(harm))
    over += [f"OR is over {benign.max():g} a set"] * bool(len(benign))
    said = [f"{', '.join(over)}."] if over else []
    rates = rows["learning_rate"].dropna()
    if len(rates):
        named = "; a named one was searched" if rates.nunique() > 1 else ""
        said.append(f"The learning rate is {paper.rate_label(usual_rate(rows))}{named}.")
    if view.mean(paper.ALIGNED, "FA") == 0:
        said.append("Before fine-tuning no answer is the right one alone, hence an FA of 0.")
    return " ".join([*said, *([f"Judge: `{judge}`."] if judge else [])])


def set_label(of: str) -> str:
    return {"alpaca": "Alpaca", "xstest_safe": "XSTest", "toy_benign": "toy"}.get(of, of)


def plate(view: View, most: int) -> Plate:
    """HS and FA of at most `most` methods as dots with 95 % intervals; the dotted line is the aligned model's."""
    methods = chosen(view, most)
    with matplotlib.rc_context({"font.size": 12}):
        figure, grid = panels(1, 2, (8.6, 1.1 + 0.42 * len(methods)), sharey=True)
        for ax, metric in zip(grid[0], LOOKS, strict=True):
            colour, marker = LOOKS[metric]
            start = view.value(paper.ALIGNED, metric)
            if start is not None and metric == "HS":
                ax.axvline(start["mean"], color="0.45", linestyle=(0, (1, 2)), linewidth=1.2)
            for place, method in enumerate(methods):
                found = view.value(method, metric)
                if found is None:
                    ax.text(50, place, "not measured", ha="center", va="center", color="0.4")
                    continue
                if not math.isnan(found["low"]):
                    ax.hlines(place, max(found["low"], 0), min(found["high"], 100), color=colour, linewidth=1.6)
                ax.plot(found["mean"], place, marker, color=colour, markersize=7, clip_on=False, zorder=3)
                ax.annotate(f"{found['mean']:.0f}", (found["mean"], place), (0, 6), textcoords="offset points",
                            ha="center", fontsize=10, color="0.15")  # fmt: skip
            ax.set_xlim(-3, 103)
            ax.set_ylim(len(methods) - 0.4, -0.7)
            ax.set_yticks(range(len(methods)), [paper.method_label(m) for m in methods])
            better = "lower is better" if metric == "HS" else "higher is better"
            ax.set_xlabel(f"{paper.METRICS[metric]}\n{better}")
            bare(ax)
            ax.grid(axis="x", color="0.9", linewidth=0.6)
        figure.suptitle(view.cell, fontsize=13)
    dotted = (
        " The dotted line is the aligned model before fine-tuning."
        if view.value(paper.ALIGNED, "HS") is not None
        else ""
    )
    drawn = [view.value(method, metric) for method in methods for metric in LOOKS]
    bars = intervals(found["n"] for found in drawn if found is not None)
    caption = f"Dots: means over seeds; bars: {bars}.{dotted}"
    return Plate("headline", f"HS and FA after fine-tuning: {view.cell}", caption, figure)
