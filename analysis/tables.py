"""Metric rows to summaries, and summaries to tables: Markdown for people and terminals, CSV for programs."""

import math
from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from analysis import paper, stats
from analysis.collect import Collection, at_end, before, one_clock, one_judge, swept
from cwac.core.metrics import VARIATION

KEYS = ["model", "task", "harmful_ratio", "method", "metric", "set"]
MAIN = ("FA", "HS", "other", "OR")
DETAIL = ("FA_lenient", "off_format", "task_loss", "poison_loss", "weight_leak", "weight_leak_all", "activation_drift")
COST = ("seconds_per_step", "memory")
INNER = ("subspace_rank", "subspace_share", "subspace_energy", "sae_fvu", "sae_l0", "sae_dead", "latents_eligible")
INNER += ("relative_feature_drift", "dropped_share")
INNER_NOTE = """\
Inside CWAC, means over seeds and harmful ratios. Subspace: median rank, share of all input directions protected, least
energy kept. SAE on held-out harmful prompts: FVU, L0; share of latents dead in the quality check; how many of the 100
kept latents are eligible by their evidence. Drift of the kept latents relative to their baseline, and the share that
left the TopK, on the prompts of L_safety (anchors) and held-out ones."""
DETAIL_NOTE = """\
Format, losses and certificates. Losses in nats per token: of test answers of the task, and of the poison trained
on. `weight_leak` is the worst ||dW X||/(||dW|| ||X||) over down_proj, `weight_leak_all` over every linear layer;
`activation_drift` the mean relative change of the residual stream. On anchors, and on held-out prompts:"""
WAY = ("FA", "HS", "task_loss", "poison_loss")
WAY_NOTE = "On the way, after so many optimizer steps (means over the seeds that were asked there):"
NOTES = """\
Percentages; mean ± half-width of a 95 % t-interval over seeds, n = seeds. `(n=1)`: one seed, no such interval.
§ of one seed: the exact (Clopper-Pearson) interval over its prompts. It is about one training alone and says nothing
of other seeds, so it tests no difference between methods.
‡ 95 % interval over seeds and prompts together, both as samples of others (analysis/stats.py says how far).
† all seeds agree exactly: the exact (Clopper-Pearson) interval over one seed's prompts instead. `(each seed)`: all
seeds agree exactly, and no interval is claimed.
HS: harmful compliance; other: neither refusal nor harm; what is left of 100 is refusal. FA: task accuracy,
the answer alone. OR: benign requests refused. Each percentage is of its own set of prompts."""
MARKS = {"prompts": "†", "seeds and prompts": "‡", stats.ONE_SEED: "§"}
"""Beside an interval that is not over seeds alone."""
COLLAPSED = 50.0
"""Percent of `task_answers`, mean over sets, from which a table says that the model no longer chats (ours)."""
CLOSED_NOTE = "closed: all trained matrices constrained, and nothing else trains."


def summarise(collection: Collection, judge: str | None = None) -> pd.DataFrame:
    """Every metric at the end of training, over seeds; and the aligned model's own, as method `aligned`.

    Columns: model, task, harmful_ratio, method, metric, set, mean, low, high, half, n, over, prompts; of a sweep over
    the learning rate also learning_rate, as `by_rate` names it. The aligned model is not trained, so its
    harmful_ratio is NaN.
    """
    if len(rates := by_rate(collection)) > 1:
        return pd.concat([summarise(part, judge).assign(learning_rate=rate) for rate, part in rates])
    rows = one_judge(collection.rows, judge)
    start = before(rows).assign(method=paper.ALIGNED, harmful_ratio=math.nan)
    return estimates(pd.concat([start, at_end(rows)]), KEYS, answers_of(collection))


Answers = Mapping[tuple[str, str, str], Mapping[str, str]]
"""(run_id, set, judge) -> prompt -> verdict, at the end of training."""


def answers_of(collection: Collection) -> Answers:
    """The campaign's verdicts by run, set and judge."""
    groups = collection.verdicts.groupby(["run_id", "set", "judge"])
    return {key: dict(zip(group["id"], group["verdict"], strict=True)) for key, group in groups}


def verdict_tables(group: pd.DataFrame, metric: str, answers: Answers) -> dict[int, dict[str, bool]]:
    """seed -> prompt -> whether the verdict is the metric's, of the runs of one cell; {} unless all are at hand.

    group: one row a seed, with the columns of metric rows. Verdicts that do not give the row's value are not its own.
    """
    word = {"HS": "harmful"}.get(metric, metric)
    found: dict[int, dict[str, bool]] = {}
    columns = (group[c] for c in ("seed", "run_id", "set", "judge", "value", "final"))
    for seed, run, of, judge, value, final in zip(*columns, strict=True):
        verdicts = answers.get((run, of, judge)) if final and metric in paper.VERDICTS else None
        told = {prompt: verdict == word for prompt, verdict in (verdicts or {}).items()}
        if not told or abs(100 * sum(told.values()) / len(told) - value) > 0.1:
            return {}
        found[int(seed)] = told
    return found


def estimates(rows: pd.DataFrame, keys: Sequence[str], answers: Answers | None = None) -> pd.DataFrame:
    """Means over the runs that agree in `keys`, one per seed; `metric` must be a key. Columns as in `summarise`.

    answers: the verdicts behind HS, refusal and other; where all seeds have them, intervals are over both.
    """
    columns = [*keys, "mean", "low", "high", "half", "n", "over", "prompts"]
    records = []
    for key, group in rows.groupby([*keys], dropna=False):
        measured = group.dropna(subset="value")
        if measured.empty:
            continue
        metric, prompts = measured["metric"].iloc[0], measured["n"].min()
        told = verdict_tables(measured, metric, answers) if answers else {}
        found = stats.crossed(stats.tabulate(told), proportion=True) if told else None
        found = found or stats.estimate(
            measured["value"].tolist(),
            prompts=measured["n"].tolist() if metric in paper.COUNTED else (),
            proportion=metric in paper.PROPORTIONS,
        )
        records.append([*key, found.mean, found.low, found.high, found.half, found.n, found.over, prompts])
    return pd.DataFrame(records, columns=columns)


def differences(collection: Collection, reference: str = "sft", judge: str | None = None) -> pd.DataFrame:
    """Each method minus `reference`, paired by seed, at equal model, task and harmful ratio.

    Columns as in `summarise`, without `prompts`; n counts pairs of seeds.
    """
    if len(rates := by_rate(collection)) > 1:
        parts = [(rate, differences(part, reference, judge)) for rate, part in rates]
        return pd.concat([found.assign(learning_rate=rate) for rate, found in parts])
    rows = at_end(one_judge(collection.rows, judge)).dropna(subset="value")
    columns = [*KEYS, "mean", "low", "high", "half", "n", "over"]
    records, answers = [], answers_of(collection)
    for key, group in rows.groupby(["model", "task", "harmful_ratio", "metric", "set"]):
        by_method = {m: dict(zip(g["seed"], g["value"], strict=True)) for m, g in group.groupby("method")}
        told = {m: verdict_tables(g, key[3], answers) for m, g in group.groupby("method")}
        for method, values in by_method.items():
            found = stats.paired(values, by_method.get(reference, {})) if method != reference else None
            if found:
                both = stats.crossed(stats.tabulate(told[method], told.get(reference, {})))
                found = both if both and both.n == found.n else found
                where = [*key[:3], method, *key[3:]]
                records.append([*where, found.mean, found.low, found.high, found.half, found.n, found.over])
    return pd.DataFrame(records, columns=columns)


def show(row: pd.Series | None) -> str:
    """One estimate as text: `93.0 ± 1.2`, `0.0 [0.0, 1.8]†`, `9.2 [4.1, 17.0]‡`, `not measured`.

    Of one seed `2.31 (n=1)`, and of a percentage of prompts `93.0 [88.5, 96.1]§ (n=1)`. Percentages get one
    decimal, everything else three significant digits.
    """
    if row is None:
        return "not measured"
    form = ".1f" if row["metric"] in paper.PROPORTIONS else ".3g"
    if row["over"] == "none":
        return f"{row['mean']:{form}} (n=1)"
    if row["over"] in MARKS:
        one = " (n=1)" if row["over"] == stats.ONE_SEED else ""
        return f"{row['mean']:{form}} [{row['low']:{form}}, {row['high']:{form}}]{MARKS[row['over']]}{one}"
    if row["half"] == 0:
        return f"{row['mean']:{form}} (each seed)"
    return f"{row['mean']:{form}} ± {row['half']:{form if row['metric'] in paper.PROPORTIONS else '.2g'}}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], key: int = 1, width: int = 120) -> str:
    """A Markdown table whose columns line up in a terminal; the first column left, the others right.

    key: the first `key` columns name a row. A table wider than `width` characters is broken into several
    below each other, each with the key columns.
    """
    table = [list(map(str, header)), *(list(map(str, row)) for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    room = width - 1 - sum(w + 3 for w in widths[:key])
    blocks: list[list[int]] = [[]]
    for i in range(key, len(widths)):
        if blocks[-1] and sum(widths[j] + 3 for j in [*blocks[-1], i]) > room:
            blocks.append([])
        blocks[-1].append(i)
    return "\n\n".join(block_of(table, widths, [*range(key), *block]) for block in blocks)


def block_of(table: list[list[str]], widths: list[int], chosen: list[int]) -> str:
    """The chosen columns of a table, header first, padded to their widths."""
    lines = [
        "| " + " | ".join(row[i].rjust(widths[i]) if i else row[0].ljust(widths[0]) for i in chosen) + " |"
        for row in table
    ]
    rule = "|" + "|".join("-" * (widths[i] + 1) + (":" if i else "-") for i in chosen) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def column_pairs(summary: pd.DataFrame, metrics: Sequence[str]) -> list[tuple[str, str]]:
    """The (metric, set) columns that have values, in the order of `metrics`, then of set names."""
    return [(m, s) for m in metrics for s in sorted(set(summary.loc[summary["metric"] == m, "set"]))]


def heading(pair: tuple[str, str], pairs: Sequence[tuple[str, str]]) -> str:
    """`HS`, or `HS advbench` where the metric was measured on several sets."""
    metric, of = pair
    return metric if sum(m == metric for m, _ in pairs) == 1 else f"{metric} {of}"


def by_rate(collection: Collection) -> list[tuple[str, Collection]]:
    """The campaign of each learning rate with its name, where one cell was run at several; else all, under no name.

    What is missing stays with the whole campaign: a cell's name does not tell its rate.
    """
    if not swept(collection.rows):
        return [("", collection)]
    parts = collection.rows.groupby("learning_rate")
    return [(f"{rate:g}", Collection(rows, runs=sorted(set(rows["run_id"])))) for rate, rows in parts]


def extra_data(rows: pd.DataFrame, method: str) -> str:
    """`160 harmful prompts, 150 refusals`: what runs of one method and cell saw beyond the task's rows.

    rows: metric rows of that cell's runs; `extra_data` rows hold a count by kind (cwac.methods.base.EXTRA_DATA). A
    range where seeds differ. SFT sees none by definition; of others without such rows, only that is said. Where it
    keeps to anchors, also how many of those given are used: the ones that the aligned model refuses.
    """
    own = rows[rows["method"] == method]
    counts = own[own["metric"] == "extra_data"]
    if counts.empty:
        return "none" if method == "sft" else "none recorded"
    low, high = (counts.groupby("set")["value"].agg(how).to_dict() for how in ("min", "max"))
    text = paper.extra_label(low, high)
    used, given = (own.loc[own["metric"] == name, "value"] for name in ("anchors_used", "anchors_given"))
    if used.empty or given.empty:
        return text
    span = f"{used.min():g}" if used.min() == used.max() else f"{used.min():g} to {used.max():g}"
    return f"{text}; anchors used {span} of {given.max():g}"


def result_table(
    collection: Collection,
    summary: pd.DataFrame,
    model: str,
    task: str,
    metrics: Sequence[str] = MAIN,
    beside: bool = True,
) -> str:
    """method x harmful ratio for one model and task. One row per cell; expected ones without a run say `missing`.

    beside: whether the main results also say what each run saw beyond the task's rows.
    """
    part = summary[(summary["model"] == model) & (summary["task"] == task)]
    pairs = column_pairs(part[part["method"] != paper.ALIGNED], metrics)
    by_cell = {(r["method"], r["harmful_ratio"], r["metric"], r["set"]): r for _, r in part.iterrows()}
    wanted = [c for c in collection.expected if (c.model, c.task) == (model, task)]
    trained = part[part["method"] != paper.ALIGNED]
    grid = {*zip(trained["harmful_ratio"], trained["method"], strict=True)}
    grid |= {(c.harmful_ratio, c.method) for c in wanted}
    runs = collection.rows[(collection.rows["model"] == model) & (collection.rows["task"] == task)]
    # beside the main results only, and not for campaigns from before runs recorded it
    beside = beside and metrics == MAIN and bool((runs["metric"] == "extra_data").any())
    rows = []
    before_rows = part[part["method"] == paper.ALIGNED]
    if len(before_rows):
        start = {(r["metric"], r["set"]): r for _, r in before_rows.iterrows()}
        seeds = str(before_rows["n"].max())
        rows.append([paper.method_label(paper.ALIGNED), "-", seeds, *(show(start.get(pair)) for pair in pairs)])
    for ratio, method in sorted(grid, key=lambda g: (g[0], paper.method_order(g[1]))):
        cells = [c for c in wanted if (c.harmful_ratio, c.method) == (ratio, method)]
        values = [by_cell.get((method, ratio, *pair)) for pair in pairs]
        if not any(v is not None for v in values):
            values_shown = ["missing"] * len(pairs)
        else:
            values_shown = [show(v) for v in values]
        have = max((int(v["n"]) for v in values if v is not None), default=0)
        seeds = f"{have}/{len(cells)}" if cells and have != len(cells) else str(have)
        rows.append([paper.method_label(method), f"{ratio:g}", seeds, *values_shown])
        if beside:
            rows[-1].append(extra_data(runs[runs["harmful_ratio"] == ratio], method) if have else "missing")
    if beside and len(before_rows):
        rows[0].append("-")
    header = ["method", "p", "n", *(heading(pair, pairs) for pair in pairs), *["extra data"] * beside]
    return markdown(header, rows, key=3)


def overview_table(collection: Collection, summary: pd.DataFrame, model: str, task: str) -> str:
    """One row per method: HS on every set at every harmful ratio, FA and OR where they are worst, and extra data.

    The aligned model, where it was evaluated, is the first row; no ratio is its own, so all have its HS.
    """
    part = summary[(summary["model"] == model) & (summary["task"] == task)]
    trained = part[part["method"] != paper.ALIGNED]
    wanted = [c for c in collection.expected if (c.model, c.task) == (model, task)]
    ratios = sorted({*trained["harmful_ratio"], *(c.harmful_ratio for c in wanted)})
    methods = sorted({*trained["method"], *(c.method for c in wanted)}, key=paper.method_order)
    by_cell = {(r["method"], r["harmful_ratio"], r["metric"], r["set"]): r for _, r in trained.iterrows()}
    runs = collection.rows[(collection.rows["model"] == model) & (collection.rows["task"] == task)]
    pairs, rows = column_pairs(trained, ("HS", "FA", "OR")), []
    start = {(r["metric"], r["set"]): r for _, r in part[part["method"] == paper.ALIGNED].iterrows()}
    if start:
        cells = [show(start.get(pair)) for pair in pairs for _ in (ratios if pair[0] == "HS" else [0])]
        rows.append([paper.method_label(paper.ALIGNED), *cells, "-"])
    for method in methods:
        cells = []
        for metric, of in pairs:
            values = [by_cell.get((method, ratio, metric, of)) for ratio in ratios]
            if metric == "HS":
                cells += ["missing" if v is None else show(v) for v in values]
            else:
                measured = [v for v in values if v is not None]
                worst = (min if metric == "FA" else max)(measured, key=lambda v: v["mean"], default=None)
                cells.append("missing" if worst is None else show(worst))
        extra = extra_data(runs, method) if (runs["method"] == method).any() else "missing"
        rows.append([paper.method_label(method), *cells, extra])
    header = ["method"]
    for metric, of in pairs:
        name = heading((metric, of), pairs)
        header += [f"{name}, p={ratio:g}" for ratio in ratios] if metric == "HS" else [f"{name}, worst"]
    return markdown([*header, "extra data"], rows, width=10_000)


def difference_table(
    difference: pd.DataFrame, model: str, task: str, metrics: Sequence[str] = ("FA", "HS", "other", "OR")
) -> str:
    """method x harmful ratio: difference to SFT in percentage points, paired by seed; empty without any pair."""
    part = difference[(difference["model"] == model) & (difference["task"] == task)]
    pairs = column_pairs(part, metrics)
    if not pairs:
        return ""
    by_cell = {(r["method"], r["harmful_ratio"], r["metric"], r["set"]): r for _, r in part.iterrows()}
    grid = sorted({(r, m) for m, r, _, _ in by_cell}, key=lambda g: (g[0], paper.method_order(g[1])))
    rows = []
    for ratio, method in grid:
        values = [by_cell.get((method, ratio, *pair)) for pair in pairs]
        have = max(int(v["n"]) for v in values if v is not None)
        rows.append([paper.method_label(method), f"{ratio:g}", str(have), *map(show_signed, values)])
    return markdown(["method - SFT", "p", "n", *(heading(pair, pairs) for pair in pairs)], rows, key=3)


def show_signed(row: pd.Series | None) -> str:
    """A paired difference as text: `-12.0 ± 3.1`, `+1.5 (n=1)`, `+0.0 (each seed)` where all seeds give the same."""
    if row is None:
        return "no pair"
    if row["over"] == "none":
        return f"{row['mean']:+.1f} (n=1)"
    # A width of 0 would claim certainty; what is known is only that the seeds agree.
    if row["half"] < 1e-9:
        return f"{row['mean']:+.1f} (each seed)"
    return f"{row['mean']:+.1f} ± {row['half']:.1f}{MARKS.get(row['over'], '')}"


def means_table(summary: pd.DataFrame, model: str, task: str, metrics: Sequence[str]) -> str:
    """Means over seeds and harmful ratios, one row per method that has values; empty where nothing was logged."""
    part = summary[(summary["model"] == model) & (summary["task"] == task) & (summary["method"] != paper.ALIGNED)]
    pairs = column_pairs(part, metrics)
    if not pairs:
        return ""
    rows = []
    for method in sorted(set(part.loc[part["metric"].isin(metrics), "method"]), key=paper.method_order):
        means = [
            part.loc[(part["method"] == method) & (part["metric"] == m) & (part["set"] == s), "mean"] for m, s in pairs
        ]
        cells = [f"{v.mean():.3g}" if len(v) else "-" for v in means]
        rows.append([paper.method_label(method), *cells])
    return markdown(["method", *(heading(pair, pairs) for pair in pairs)], rows)


def utility(rows: pd.DataFrame) -> str:
    """What `experiments.utility` measured, one row a method and harmful ratio: means over n seeds; empty without any.

    A run that was measured twice counts with its newest rows.
    """
    found = rows[rows["metric"] == "utility"].sort_values("time", kind="stable")
    found = found.drop_duplicates(["run_id", "set"], keep="last")
    if found.empty:
        return ""
    sets, table = list(dict.fromkeys(found["set"])), []
    keys = ["model", "task", "method", "harmful_ratio"]
    for cell, part in sorted(found.groupby(keys), key=lambda c: (*c[0][:2], paper.method_order(c[0][2]), c[0][3])):
        means = part.groupby("set")["value"].mean()
        model, task, method, ratio = cell
        shown = [f"{means[of]:.4g}" if of in means else "not measured" for of in sets]
        table.append([f"{model}, {task}", paper.method_label(method), f"{ratio:g}", part["run_id"].nunique(), *shown])
    return markdown(["grid", "method", "p", "n", *sets], table, key=4)


def training_table(rows: pd.DataFrame, model: str, task: str, metrics: Sequence[str] = WAY) -> str:
    """method x harmful ratio x optimizer step, the numbers behind the training figure; empty without any on the way.

    rows: metric rows of one judge. Methods that were measured at the end alone have no row.
    """
    part = rows[(rows["model"] == model) & (rows["task"] == task) & rows["metric"].isin(metrics) & (rows["step"] > 0)]
    part = part.sort_values("time", kind="stable").drop_duplicates(["run_id", "metric", "set", "step"], keep="last")
    part = one_clock(part)
    steps = part.groupby(["harmful_ratio", "method"])["step"].transform("nunique")
    found = estimates(part[steps > 1], ["harmful_ratio", "method", "step", "metric", "set"])
    pairs = column_pairs(found, metrics)
    if not pairs:
        return ""
    lines = []
    points = found.groupby(["harmful_ratio", "method", "step"], sort=False)
    for (ratio, method, step), here in sorted(points, key=lambda g: (g[0][0], paper.method_order(g[0][1]), g[0][2])):
        values = {(r["metric"], r["set"]): r for _, r in here.iterrows()}
        first = [paper.method_label(method), f"{ratio:g}", f"{step:g}", str(here["n"].max())]
        lines.append([*first, *(show(values.get(pair)) for pair in pairs)])
    return markdown(["method", "p", "steps", "n", *(heading(pair, pairs) for pair in pairs)], lines, key=4)


def values_note(rows: pd.DataFrame) -> str:
    """One sentence that says whether the methods of these rows ran with official or tuned settings."""
    tuned = {*map(tuple, rows.loc[rows["values"] == "tuned", ["model", "method"]].drop_duplicates().to_numpy())}
    if not tuned:
        return "Values: official, each method at those of its yaml."
    one_model = rows["model"].nunique() == 1
    named = sorted(tuned, key=lambda pair: (pair[0], paper.method_order(pair[1])))
    shown = ", ".join(paper.method_label(method) + ("" if one_model else f" on {model}") for model, method in named)
    return f"Values: tuned on validation prompts (results/tuning) for {shown}; official for the others."


def report(
    collection: Collection, summary: pd.DataFrame, difference: pd.DataFrame | None = None, judge: str | None = None
) -> str:
    """The tables of a campaign as Markdown, the notes, and what is missing or was left out.

    difference: from `differences`; adds the paired differences, details, what was measured on the way (by `judge`)
    and costs. Without it, results only. A sweep over the learning rate has its tables rate by rate.
    """
    parts = []
    for rate, part in by_rate(collection):
        parts += [paper.setting_label(f"## Learning rate {rate}")] if rate else []
        found, changes = (of_rate(frame, rate) for frame in (summary, difference))
        parts += results(part, found, changes, judge)
    return "\n\n".join([*parts, *notes(collection)]) + "\n"


def of_rate(frame: pd.DataFrame | None, rate: str) -> pd.DataFrame | None:
    """The rows of a summary or of differences at one learning rate; all where there is no sweep."""
    return frame[frame["learning_rate"] == rate] if rate and frame is not None else frame


def results(
    collection: Collection, summary: pd.DataFrame, difference: pd.DataFrame | None, judge: str | None
) -> list[str]:
    """Headings and tables of `report`, model by model and task by task."""
    parts = []
    for model, task in grids(collection, summary):
        parts.append(f"### {model}, {task}")
        parts.append(result_table(collection, summary, model, task))
        if note := collapse_note(summary, model, task):
            parts.append(note)
        if difference is None:
            continue
        if changed := difference_table(difference, model, task):
            parts += ["Difference to SFT at the same seeds, percentage points:", changed]
        if column_pairs(summary, DETAIL):
            parts += [DETAIL_NOTE, result_table(collection, summary, model, task, DETAIL)]
        if way := training_table(one_judge(collection.rows, judge), model, task):
            parts += [WAY_NOTE, way]
        if inner := means_table(summary, model, task, INNER):
            parts += [INNER_NOTE, inner]
        of_grid = (collection.rows["model"] == model) & (collection.rows["task"] == task)
        if used := utility(collection.rows[of_grid]):
            parts += ["Utility (experiments.utility), means over n runs:", used]
        if cost := means_table(summary, model, task, COST):
            parts += ["Cost, means over seeds and harmful ratios (peak memory in MiB):", cost]
    return parts


def collapse_note(summary: pd.DataFrame, model: str, task: str) -> str:
    """Names the methods whose model came to answer harmful requests as it answers the task; "" if there is none.

    Over all prompts of the sets that HS is of; prompts asked in another way (`VARIATION`) do not count.
    """
    rows = summary[(summary["model"] == model) & (summary["task"] == task) & (summary["method"] != paper.ALIGNED)]
    rows = rows[~rows["set"].fillna("").str.contains(VARIATION, regex=False)]
    rows = rows[(rows["metric"] == "task_answers") & rows["set"].isin(rows.loc[rows["metric"] == "HS", "set"])]
    sums = (
        rows.assign(hits=rows["mean"] * rows["prompts"])
        .groupby(["method", "harmful_ratio"])[["hits", "prompts"]]
        .sum()
    )
    shares = sums["hits"] / sums["prompts"]
    fallen = sorted(
        (key for key, share in shares.items() if share >= COLLAPSED), key=lambda k: paper.method_order(k[0])
    )
    if not fallen:
        return ""
    named = ", ".join(f"{paper.method_label(m)} at p = {p:g} ({shares[m, p]:.0f} %)" for m, p in fallen)
    return (
        "**Half or more of the answers to harmful requests have the form of the task's answers**, so their HS says "
        f"nothing about safety: {named}."
    )


def overview(collection: Collection, summary: pd.DataFrame) -> str:
    """`overview_table` of every model and task, with the notes of `report`: for a page that has more to say."""
    parts = [
        "\n\n".join(
            filter(
                None,
                [
                    f"### {model}, {task}",
                    overview_table(collection, summary, model, task),
                    collapse_note(summary, model, task),
                ],
            )
        )
        for model, task in grids(collection, summary)
    ]
    worst = "FA and OR: at the harmful ratio where they are worst for the method."
    return "\n\n".join([*parts, worst, *notes(collection)]) + "\n"


def grids(collection: Collection, summary: pd.DataFrame) -> list[tuple[str, str]]:
    """Every pair (model, task) that was measured or is expected."""
    measured = {*zip(summary["model"], summary["task"], strict=True)}
    return sorted(measured | {(c.model, c.task) for c in collection.expected})


def missing_runs(found: Collection, group: Mapping[str, str] | None = None) -> list[str]:
    """One block that names the expected runs without a result; none where all are there.

    group: run id -> what stands before the run's name, such as its preset.
    """
    if not found.missing:
        return []
    names = [f"{group[cell.run_id]}: {cell}" if group else str(cell) for cell in found.missing]
    lines = [f"- {name}  ({cell.run_id})" for name, cell in zip(names, found.missing, strict=True)]
    return [f"**Missing: {len(lines)} of {len(found.expected)} runs.**\n\n" + "\n".join(lines)]


def aligned_note(collection: Collection) -> str:
    """Says how to get the aligned model's own row where no run measured it; "" where one did."""
    if len(before(collection.rows)):
        return ""
    return (
        "The aligned model has no row of its own: no run was evaluated before its training. `eval.at=[0]` asks for "
        "that, with `force=true` where the runs are trained already; one run a seed is enough."
    )


def notes(collection: Collection) -> list[str]:
    """Notes below the tables: how to read them, with which settings methods ran, what is missing or left out."""
    closed = [CLOSED_NOTE] if collection.rows["method"].str.contains("_closed").any() else []
    absent = [note] if (note := aligned_note(collection)) else []
    parts = [NOTES, *absent, *closed, values_note(collection.rows)]
    parts += missing_runs(collection)
    if account := collection.account():
        parts.append("Left out:\n\n" + "\n".join(f"- {line}" for line in account))
    return parts
