"""Fills the generated blocks of README.md and docs/ from the exported campaigns; no number there is typed by hand.

python -m analysis.pages            rewrite every block and the figure
python -m analysis.pages --check    say which are not current, write nothing

A block stands between `<!-- made:NAME -->` and `<!-- /made:NAME -->`; NAME is a maker below, with what follows a colon
as its argument. `CAMPAIGN` is the campaign that the README shows.
"""

import functools
import hashlib
import json
import math
import os
import re
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from analysis import audit, headline, orders, paper, stats, tables
from analysis.collect import Collection, at_end, pooled, read_exported
from analysis.headline import View
from cwac.core import config, paths
from cwac.core.config import Parser, about, command
from cwac.core.errors import UserError
from cwac.core.jsonl import read_jsonl

CAMPAIGN = "smollm2_main"
"""Folder in `results/` of the README's figure and table."""
EMBEDDED = "demo"
"""Folder of the campaign on the embedded model, at official values."""
TUNED = "demo_tuned"
"""Folder of the same at the values that searches chose."""
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
FIGURE = ROOT / "docs" / "figures" / "headline.png"
SHOWN = 7
"""Methods in the README's figure."""
BLOCK = re.compile(r"(<!-- made:(?P<name>\S+) -->\n).*?(<!-- /made:(?P=name) -->)", re.S)


def there(path: str) -> Path:
    """A file or folder of `results/`; raises UserError where it is missing."""
    found = RESULTS / path
    if not found.exists():
        raise UserError(f"results/{path} is missing. Remedy: restore it from git, or export its campaign first.")
    return found


@functools.cache
def view(name: str) -> View:
    """The first view of an exported campaign."""
    return headline.views(campaign(name))[0]


@functools.cache
def estimates(path: str) -> pd.DataFrame:
    """A table of `results/closed` and its like: means with intervals."""
    return pd.read_csv(there(path))


def benchmarked() -> list[dict]:
    """The rows of `benchmarks/latest.json`: name, rival, ratio, spread, bar, met."""
    return json.loads((ROOT / "benchmarks" / "latest.json").read_text(encoding="utf-8"))


def cell(frame: pd.DataFrame, metric: str, of: str | None = None, **where) -> pd.Series | None:
    """The one estimate of `frame` with these values; None where there is none."""
    found = frame[frame["metric"] == metric]
    found = found if of is None else found[found["set"] == of]
    for column, value in where.items():
        found = found[found[column].isna() if value is None else found[column] == value]
    if len(found) > 1:
        raise UserError(f"{metric} {where}: {len(found)} estimates where one is meant.")
    return found.iloc[0] if len(found) else None


# --- the README ---------------------------------------------------------------------------------------


def figure(page: Path) -> str:
    """The picture, drawn anew where its numbers changed."""
    plate = headline.plate(view(CAMPAIGN), SHOWN)
    return f"![{plate.title}]({os.path.relpath(FIGURE, page.parent)})"


def figure_digest() -> str:
    """Of the numbers and labels that the figure shows: equal digests, equal pictures."""
    here = view(CAMPAIGN)
    values = [
        [paper.method_label(m), metric, *(f"{here.value(m, metric)[c]:.2f}" for c in ("mean", "low", "high"))]
        for m in [*headline.chosen(here, SHOWN)]
        for metric in headline.LOOKS
        if here.value(m, metric) is not None
    ]
    return hashlib.sha256(json.dumps([here.cell, values]).encode()).hexdigest()[:16]


def drawn_digest() -> str:
    """The digest that the committed picture carries; empty without one."""
    if not FIGURE.is_file():
        return ""
    match = re.search(rb"numbers:([0-9a-f]{16})", FIGURE.read_bytes())
    return match[1].decode() if match else ""


def draw() -> None:
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    plate = headline.plate(view(CAMPAIGN), SHOWN)
    plate.figure.savefig(FIGURE, dpi=110, metadata={"Description": f"numbers:{figure_digest()}"})


def reading(page: Path) -> str:
    """What the figure says, and where CWAC is beaten."""
    here, toy = view(CAMPAIGN), view(EMBEDDED)
    model, task = here.cell.split(", ")[:2]
    hs, fa = ({m: here.mean(m, metric) for m in ("sft", "cwac")} for metric in ("HS", "FA"))
    said = (
        f"After fine-tuning on {task} with a share p = {here.ratio:g} of harmful rows, {model} complies with "
        f"{hs['sft']:.1f} % of harmful requests (HS) under SFT, plain fine-tuning, and with {hs['cwac']:.1f} % under "
        f"CWAC. Its accuracy on the task (FA) is {fa['sft']:.1f} and {fa['cwac']:.1f} %{guessing(here.task)}."
    )
    lost = "**Where CWAC is beaten.** On `tiny`, the embedded model (a million parameters), with p = "
    lost += f"{toy.ratio:g}, {headline.beaten(toy)}. {fair(page, toy.ratio)}On {model} {headline.beaten(here)}."
    return f"{wrapped(said)}\n\n{wrapped(lost)}"


def guessing(task: str) -> str:
    """`; guessing gives 50`, of a task with labels."""
    labels = OmegaConf.load(paths.CONF / "task" / f"{task}.yaml").get("labels")
    return f"; guessing gives {100 / len(labels):.0f}" if labels else ""


def fair(page: Path, ratio: float) -> str:
    """How many beat it with every method at the value that its search chose; empty where L2-SP, the simplest, was not.

    With what keeps the count from being a ranking.

    ratio: the harmful ratio that the sentence before named.
    """
    tuned = view(TUNED)
    surely, _ = tuned.better("cwac")
    if "l2sp" not in surely:
        return ""
    other = "" if tuned.ratio == ratio else f", with p = {tuned.ratio:g},"
    few = headline.names(sorted(surely, key=lambda m: m != "l2sp")[:2])
    caveat = os.path.relpath(ROOT / "docs" / "results" / "all_methods.md", page.parent)
    return (
        f"At tuned values{other} {len(surely)} of {len(tuned.methods) - 1} do, such as {few}; but the searches' grids "
        f"were not equally wide, so this is {link('no ranking', f'{caveat}#at-tuned-values')}. "
    )


def wrapped(text: str, indent: str = "") -> str:
    """A paragraph in lines as the pages have them."""
    return textwrap.fill(text, 119, break_long_words=False, break_on_hyphens=False, subsequent_indent=indent)


def compact(markdown: str) -> str:
    """A Markdown table without the padding that lines it up in a terminal."""
    return re.sub(r"-{3,}", "--", re.sub(r" {2,}", " ", markdown))


def table(page: Path) -> str:
    """At most ten rows, and what their words mean."""
    here = view(CAMPAIGN)
    table_ = headline.table(here)
    words = wrapped(f"{headline.words(table_)} From `results/{CAMPAIGN}`: {here.cell}.")
    return f"{compact(table_)}\n\n{words}\n\n{wrapped(headline.conditions(here))}"


def found(page: Path) -> str:
    """What the project found, one sentence each, with the page that shows it."""
    made = (ratio_limit(), second(), all_or_nothing(), holds_for(), adapter(), slower(), averages())
    return "\n".join(wrapped(f"- {text}", "  ") for text in made)


def link(text: str, path: str) -> str:
    return f"[{text}]({path})"


def ratio_limit() -> str:
    """CWAC at the least and the most poison at which SFT loses refusals."""
    hs = pooled_hs(CAMPAIGN)
    lost = [r for r in sorted(hs) if "cwac" in hs[r] and hs[r].get("sft", 0.0) > headline.MARGIN]
    few, many = (f"HS {hs[r]['cwac']:.0f} %, SFT's {hs[r]['sft']:.0f} %" for r in (lost[0], lost[-1]))
    where = link("how much poison", "docs/results/how_much_poison.md")
    worst = hs[lost[-1]]
    kept = "nothing" if worst["cwac"] > worst["sft"] - headline.MARGIN else "less"
    free = next((m for m in worst if m.partition(paper.SETTING)[0] == "nullspace"), None)
    fa = {m: accuracy(m, lost[-1]) for m in ("sft", free) if m}
    also = (
        f"; FA {fa['sft']} %"
        if free is None
        else (f"; a null-space adapter's {worst[free]:.0f} %, at an FA of {fa[free]} % where SFT's is {fa['sft']}")
    )
    return (
        f"CWAC protects SmolLM2 at p = {lost[0]:g} in part ({few}), at {lost[-1]:g} {kept} is left "
        f"({many}{also}{guessing(view(CAMPAIGN).task)}; {where})."
    )


def accuracy(method: str, ratio: float) -> str:
    """`58 ± 35`: a method's FA at the end of training in `CAMPAIGN`, over seeds."""
    rows = at_end(campaign(CAMPAIGN).rows)
    found = rows[(rows["metric"] == "FA") & (rows["method"] == method) & (rows["harmful_ratio"] == ratio)]
    value = stats.estimate(found["value"].tolist(), prompts=found["n"].tolist(), proportion=True)
    return f"{value.mean:.0f}" + ("" if math.isnan(value.half) else f" ± {value.half:.0f}")


def second() -> str:
    """What became of the second real model under SFT, CWAC and the null-space adapter."""
    here = view("qwen_main")
    adapter_ = next(m for m in here.methods if m.partition(paper.SETTING)[0] == "nullspace")
    sft, cwac, ours, start = (here.mean(m, "HS") for m in ("sft", "cwac", adapter_, paper.ALIGNED))
    began = ", as before fine-tuning" if abs(ours - start) < headline.MARGIN else f"; it began at {start:.0f} %"
    fa = "{:.0f}, {:.0f} and {:.0f} %".format(*(here.mean(m, "FA") for m in ("sft", "cwac", adapter_)))
    return (
        f"A second model, {headline.named(here.model)}, ends at an HS of {sft:.0f} % under SFT, {cwac:.0f} % under "
        f"CWAC and {ours:.0f} % under a null-space adapter{began} (FA {fa}; "
        f"{link('real models', 'docs/results/real_model.md')})."
    )


@functools.cache
def pooled_hs(name: str) -> dict[float, dict[str, float]]:
    """Mean HS over all sets of harmful prompts: harmful ratio -> method -> percent."""
    frame = harm(name).groupby(["harmful_ratio", "method"])["value"].mean()
    made: dict[float, dict[str, float]] = {}
    for (ratio, method), value in frame.items():
        made.setdefault(float(ratio), {})[method] = float(value)
    return made


@functools.cache
def harm(name: str) -> pd.DataFrame:
    """HS at the end of training, pooled over sets, one row a run."""
    rows = campaign(name).rows
    return at_end(pooled(rows[rows["metric"] == "HS"]))


def all_or_nothing() -> str:
    free = estimates("closed/free.csv")
    hs = free[(free["metric"] == "HS") & (free["arm"] == "constrained") & (free["matrix"] != "none")]["mean"]
    freed = free[(free["metric"] == "HS") & (free["arm"] == "freed")].set_index("matrix")["mean"]
    worst = freed.drop("none").max()
    fa = free[free["metric"] == "FA"]["mean"].min()
    return (
        "*Closed* is a constraint on every kind of weight matrix: on the embedded model it leaves HS at "
        f"{freed['none']:.0f} %, one on a single kind at {hs.min():.0f} % or more, one on all but one at up to "
        f"{worst:.0f} %, all at an FA of {fa:.0f} % ({link('findings', 'docs/findings.md')})."
    )


def holds_for() -> str:
    goal = estimates("closed/break.csv")
    last = goal[(goal["preset"] == "closed_goal") & (goal["step"] == goal["step"].max())]
    worst = last["harmful_ratio"].max()
    closed, sft = (
        {m: cell(last, m, method=method, held=held, harmful_ratio=worst)["mean"] for m in ("HS", "FA")}
        for method, held in (("weight_only_closed", 0.999), ("sft", None))
    )
    return (
        "The embedded model, closed with 99.9 % of the activations of *anchors*, harmful prompts that it refuses, "
        "protected (energy 0.999), held for ten times the paper's epochs of harmful rows alone: HS "
        f"{closed['HS']:.0f} %, SFT's {sft['HS']:.0f} %; FA {closed['FA']:.0f} and {sft['FA']:.0f} % "
        f"({link('how long', 'docs/results/how_long.md')})."
    )


def adapter() -> str:
    ratios = [r["ratio"] for r in benchmarked() if "nullspace, k 64" in r["name"] and "Trainer" in r["rival"]]
    cost = "it needs no projection"
    if ratios:
        cost = f"on SmolLM2 a step takes {ratios[0]:.2f} of the time of transformers' SFT"
    return (
        "An adapter in the anchors' null space leaves what layers make of them nearly as it was; "
        f"{cost} ({link('null-space adapters', 'docs/nullspace.md')})."
    )


def slower() -> str:
    """What SFT comes to at the rate that validation prompts chose: on both models, on a task to be learnt."""
    here, toy = view(CAMPAIGN), view(TUNED)
    slow, toy_slow = (next(m for m in v.methods if m.startswith(f"sft{paper.SETTING}rate")) for v in (here, toy))
    usual, low = here.mean("sft", "HS"), here.mean(slow, "HS")
    agrees = "likewise" if toy.mean(toy_slow, "HS") < toy.mean("sft", "HS") - headline.MARGIN else "not"
    return (
        "The plainest defence is a lower learning rate: SFT's, chosen on validation prompts, takes "
        f"{headline.named(here.model).split('-')[0]} from an HS of {usual:.0f} to {low:.0f} % (FA "
        f"{here.mean('sft', 'FA'):.0f} and {here.mean(slow, 'FA'):.0f} %), and the embedded model "
        f"{agrees} ({link('all methods', 'docs/results/all_methods.md')}); {learnt()}."
    )


def learnt() -> str:
    """The same on a task that has to be learnt: the best defence, and SFT at the rate that comes nearest to its FA."""
    points = estimates("nullspace_task/frontier.csv")
    plain, defended = points[points["method"] == "sft"], points[points["method"] != "sft"]
    kept = defended.loc[defended["objective"].idxmin()]
    plain = plain.loc[(plain["FA"] - kept["FA"]).abs().idxmin()]
    holds = "holds as well" if plain["HS"] < kept["HS"] + headline.MARGIN else "does not hold"
    return (
        f"on arithmetic, which is new to it, this {holds}: HS {plain['HS']:.0f} % at FA {plain['FA']:.0f} %, the "
        f"{headline.short(kept['method'])}'s {kept['HS']:.0f} at {kept['FA']:.0f}{energy(kept['method'])}"
    )


def energy(method: str) -> str:
    """` (energy 0.9999)` of a method's runs in `results/nullspace_task`; empty where they have none, or several."""
    path = there("nullspace_task/records.jsonl")
    settings = [r["settings"] for r in read_jsonl(path) if r["method"] == method.partition(paper.SETTING)[0]]
    found = {s[key] for s in settings for key in ("method.energy", "method.weight.energy") if s.get(key) is not None}
    return f" (energy {found.pop():g})" if len(found) == 1 else ""


def averages() -> str:
    counts = audit.counts(audit.findings())
    wrong = next(n for kind, n in counts.items() if "average" in kind.lower())
    return (
        f"Of the paper's {int(paper.printed()['average'].sum())} averages {wrong} do not follow from their cells "
        f"({link('audit', 'analysis/AUDIT.md')})."
    )


# --- pages of results ---------------------------------------------------------------------------------


def held(page: Path) -> str:
    """Which defences held on the embedded model at the values that searches chose; cheapest data, then steps, first.

    HS within `headline.MARGIN` points of the aligned model's, FA and OR as near to SFT's. What a step costs is
    `python -m benchmarks.methods`' ratio to SFT's.
    """
    here = view(TUNED)
    costs = {
        r["name"].removeprefix("step of ").removesuffix(", LoRA"): r["ratio"]
        for r in benchmarked()
        if r["rival"] == "step of sft on the same batches"
    }
    limit = here.mean(paper.ALIGNED, "HS") + headline.MARGIN
    rows = []
    for method in here.methods:
        if here.mean(method, "HS") > limit or not here.costs_nothing(method, "sft"):
            continue
        extra = tables.extra_data(here.collection.rows, method)
        step = costs.get(method.partition(paper.SETTING)[0], math.nan)
        shown = [headline.show(here.value(method, metric)) for metric in ("HS", "FA", "OR")]
        row = [paper.method_label(method), *shown, "-" if math.isnan(step) else f"{step:.2f}", extra]
        rows.append((extra != "none", step, row))
    columns = ["method", "HS, %", "FA, %", "OR, %", "step / SFT's", "seen beside the task's rows"]
    table_ = tables.markdown(columns, [row for *_, row in sorted(rows, key=lambda r: r[:2])], width=10_000)
    marks = wrapped(
        f"On the {here.cell}. {headline.words(table_)} From `results/{TUNED}` and `benchmarks/latest.json`."
    )
    return f"{compact(table_)}\n\n{marks}"


@functools.cache
def campaign(name: str) -> Collection:
    """An exported campaign, with what the pages show of it: HS, FA, OR and extra data, before and after training."""
    found = read_exported(there(name))
    rows = found.rows[found.rows["metric"].isin(headline.MEASURED)]
    rows = rows[rows["final"] | (rows["epoch"] == 0)]
    return replace(found, rows=rows)


def bench(page: Path, part: str) -> str:
    """The rows of `benchmarks/latest.json` whose name holds `part`; `+` stands for a space there."""
    rows = []
    for r in benchmarked():
        if part.replace("+", " ") in r["name"]:
            low, high = r["spread"]
            ratio = f"{r['ratio']:.2f}" + (f" [{low:.2f}, {high:.2f}]" if low < high else "")
            rows.append([r["name"], r["rival"], ratio, "-" if r["bar"] is None else f"{r['bar']:g}"])
    if not rows:
        raise UserError(f"{page.name}: benchmarks/latest.json has no row with {part}. Remedy: run the benchmark.")
    table_ = tables.markdown(["what", "rival", "ours / rival", "bar"], rows, width=10_000)
    return f"{compact(table_)}\n\nFrom `benchmarks/latest.json`."


def overview(page: Path, name: str) -> str:
    """Every method of a campaign: HS at each ratio, FA and OR where they are worst."""
    collection = campaign(name)
    summary = tables.summarise(collection)
    parts = []
    for m, t in tables.grids(collection, summary):
        parts += [
            f"**{headline.named(m)}, {paper.TASKS.get(t, t)}**",
            tables.overview_table(collection, summary, m, t),
        ]
        parts += [note] if (note := tables.collapse_note(summary, m, t)) else []
    seeds = ", ".join(str(s) for s in sorted(collection.rows["seed"].dropna().unique()))
    judges = ", ".join(f"`{judge}`" for judge in sorted({*collection.rows["judge"].dropna()} - {""}))
    earlier = ", on an alignment before the one that ships" if name.startswith("earlier/") else ""
    return "\n\n".join(
        [*parts, f"`results/{name}`: {len(collection.runs)} runs, seeds {seeds}, judge {judges}{earlier}."]
    )


def course(page: Path, name: str) -> str:
    """Every run of a small campaign at each step that was evaluated, with exact intervals over its own prompts."""
    metrics, rows = ("FA", "HS", "other"), pooled(read_exported(there(name)).rows)
    rows, lines = rows[rows["metric"].isin(metrics)], []
    for (model, method, seed, step), part in rows.groupby(["model", "method", "seed", "step"], sort=False):
        found = [cell(part, metric) for metric in metrics]
        shares = [stats.share(row["value"], row["n"]) for row in found]
        line = [headline.named(model), paper.method_label(method), f"{seed:g}", f"{step:g}", *shares]
        lines.append([*line, " / ".join(f"{row['n']:g}" for row in found)])
    header = ["model", "method", "seed", "step", *(f"{metric}, %" for metric in metrics), "n"]
    table_ = compact(tables.markdown(header, lines, width=10_000))
    return f"{table_}\n\n" + wrapped(
        "Step 0 is the aligned model. In brackets the exact 95 % interval over a run's prompts, none over seeds. The "
        f"last column has the numbers of prompts of {', '.join(metrics)}. From `results/{name}`."
    )


def order(page: Path, names: str) -> str:
    """Two campaigns' order of the methods that both have (`analysis.orders`)."""
    first, *_ = names.split(",")
    found, titles = orders.of_campaigns([there(name) for name in names.split(",")], view(first).ratio)
    table_, _, said = orders.report(found, titles).partition("\n\n")
    sources = " and ".join(f"`results/{name}`" for name in names.split(","))
    return f"{compact(table_)}\n\n{wrapped(f'{said} From {sources}.')}"


def picture(page: Path, name: str) -> str:
    """A picture of an exported campaign, copied beside the pages so that the site holds it."""
    path = there(name)
    return f"![{path.stem} of {path.parent.name}]({os.path.relpath(path, page.parent)})"


def beside_paper(page: Path, name: str) -> str:
    """`tableN.md` of an exported campaign: ours, the paper's and the gap."""
    folder = there(name)
    text = next(iter(sorted(folder.glob("table[1-6].md")))).read_text(encoding="utf-8")
    body = text.split("\n", 2)[2] if text.startswith("#") else text
    return re.split(r"\n(?=Percentages|\*\*Missing)", body)[0].strip() + f"\n\nFrom `results/{name}`."


def steps(page: Path, preset: str) -> str:
    """`results/closed/break.csv`: HS at the last step, method and energy by harmful ratio."""
    frame = estimates("closed/break.csv")
    frame = frame[(frame["preset"] == preset) & (frame["metric"] == "HS")]
    frame = frame[frame["step"] == frame["step"].max()]
    axis = "learning_rate" if frame["learning_rate"].nunique() > 1 else "harmful_ratio"
    columns = sorted(frame[axis].unique())
    rows = []
    keys = frame[["method", "held"]].drop_duplicates().sort_values(["method", "held"])
    for method, held in sorted(keys.to_numpy().tolist(), key=lambda k: (paper.method_order(k[0]), k[1])):
        one = {axis: None, "method": method, "held": None if pd.isna(held) else held}
        values = [cell(frame, "HS", **{**one, axis: c}) for c in columns]
        energy = "-" if pd.isna(held) else f"{held:g}"
        rows.append([paper.method_label(method), energy, *map(tables.show, values)])
    titles = [f"p = {c:g}" if axis == "harmful_ratio" else f"rate = {paper.rate_label(c)}" for c in columns]
    table_ = tables.markdown(["method", "energy", *titles], rows, key=2)
    return f"{table_}\n\nHS after {frame['step'].max():g} steps. From `results/closed/break.csv`."


def settings(page: Path, spec: str) -> str:
    """`PRESET:KEYS`: the sentence under a table, with those of task, p, rate, steps and energy that its rows share."""
    preset, _, keys = spec.partition(":")
    shared, cells = [], cells_of(preset)
    for key in ("model", *keys.split(",")):
        values = {cell[key] for cell in cells if key in cell}
        if len(values) != 1:
            raise UserError(
                f"settings:{spec}: its cells have {len(values)} values of {key}. Remedy: keys that have one, of "
                f"{', '.join(cells[0])}."
            )
        shared += values
    return wrapped(f"All rows: {', '.join(shared)}. Preset `{preset}`.")


@functools.cache
def cells_of(preset: str) -> list[dict[str, str]]:
    """`of_cell` of each cell of a preset at one seed; composed once, though several blocks ask."""
    return [of_cell(cfg) for cfg in config.expand(preset, ["seed=0"])]


def of_cell(cfg: DictConfig) -> dict[str, str]:
    """What a cell trains on, as sentences have it; without an energy where the method has none."""
    train = cfg.train
    weight = cfg.method.get("weight") or cfg.method
    rows = cfg.task.n_train / (train.per_device_train_batch_size * train.gradient_accumulation_steps)
    said = {
        "model": f"{headline.named(cfg.model.name)} (`{cfg.model.name}`)",
        "task": cfg.task.name,
        "p": f"p = {cfg.harmful_ratio:g}",
        "rate": f"learning rate {paper.rate_label(train.learning_rate)}",
        "steps": f"{train.max_steps if train.max_steps > 0 else math.ceil(rows) * train.num_train_epochs:g} steps",
    }
    return said | ({"energy": f"energy {weight.energy:g}"} if weight.get("energy") else {})


def grid(page: Path, spec: str) -> str:
    """`FILE:KEYS:METRICS`: an estimates file of `results/closed` as a table, one row a setting.

    A metric may name its set, `HS/own+category`; `+` stands for a space there.
    """
    name, keys, metrics = spec.split(":")
    frame, by = estimates(f"closed/{name}.csv"), keys.split(",")
    rows = []
    for key, part in frame.groupby(by, dropna=False, sort=False):
        values = []
        for metric in metrics.split(","):
            metric, _, of = metric.partition("/")
            value = cell(part, metric, of.replace("+", " ") or None)
            values.append("-" if value is None else tables.show(value))
        rows.append([*("-" if pd.isna(k) else f"{k:g}" if isinstance(k, float) else str(k) for k in key), *values])
    titles = [m.replace("/", " ").replace("+", " ") for m in metrics.split(",")]
    table_ = tables.markdown([*by, *titles], rows, key=len(by))
    return f"{table_}\n\nFrom `results/closed/{name}.csv`."


def sheet(page: Path, path: str) -> str:
    """A small CSV file as it stands, numbers to three digits."""
    frame = estimates(path)
    rows = [
        [f"{v:.3g}" if isinstance(v, float) else str(v).replace("|", "\\|") for v in row]
        for row in frame.to_numpy().tolist()
    ]
    return f"{tables.markdown([*frame.columns], rows)}\n\nFrom `results/{path}`."


def include(page: Path, spec: str) -> str:
    """`PATH:N`: the N-th Markdown table of a file in `results/`, counted from 1."""
    path, _, number = spec.rpartition(":")
    text = there(path).read_text(encoding="utf-8")
    found = re.findall(r"(?:^\|.*\n)+", text, re.M)
    return f"{found[int(number) - 1].strip()}\n\nFrom `results/{path}`."


def gradients(page: Path) -> str:
    """`results/gradients`: squared norm outside V by energy, median over matrices, mean over seeds."""
    folder, rows = there("gradients"), []
    files = [*folder.glob("energy-*/gradients.csv"), folder / "gradients.csv"]
    for path in sorted(files, key=energy_of):
        frame = pd.read_csv(path)
        outside = 1 - frame[["poison_inside", "task_inside", "random_inside"]]
        means = 100 * outside.groupby(frame["seed"]).median().mean()
        rows.append([f"{energy_of(path):g}", *(f"{means[c]:.1f}" for c in outside.columns)])
    header = ["energy", "of the poison's gradient outside V, %", "of the task's, %", "of a random direction, %"]
    return f"{tables.markdown(header, rows, width=10_000)}\n\nFrom `results/gradients`."


def energy_of(path: Path) -> float:
    """That a folder of `results/gradients` is named after; the default of `conf/method/cwac.yaml` for the first."""
    return float(path.parent.name.removeprefix("energy-")) if path.parent.name.startswith("energy-") else 0.99


def gate(page: Path) -> str:
    """The checks of SmolLM2's alignment that ships, on validation prompts, with exact intervals of the percentages."""
    path = ROOT / "cwac" / "assets" / "smollm2_align" / "gate.json"
    rows = []
    for check in json.loads(path.read_text(encoding="utf-8"))["checks"]:
        percent = "nats" not in check["name"]
        shown = stats.share(check["value"], check["n"]) if percent else f"{check['value']:.3g}"
        rows.append([check["name"], shown, str(check["n"]), f"{check['threshold']:g}"])
    table_ = tables.markdown(["check", "value", "n", "threshold"], rows, width=10_000)
    return f"{table_}\n\nFrom `cwac/assets/smollm2_align/gate.json`."


MAKERS: dict[str, Callable[..., str]] = {
    "figure": figure,
    "reading": reading,
    "table": table,
    "found": found,
    "held": held,
    "bench": bench,
    "overview": overview,
    "course": course,
    "order": order,
    "picture": picture,
    "beside_paper": beside_paper,
    "steps": steps,
    "settings": settings,
    "grid": grid,
    "sheet": sheet,
    "include": include,
    "gradients": gradients,
    "gate": gate,
}


# --- the command --------------------------------------------------------------------------------------


def pages() -> list[Path]:
    """README.md and every page of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def fill(page: Path, text: str) -> str:
    """The text of a page with every block made anew. Raises UserError for a block without a maker."""

    def make(match: re.Match) -> str:
        name, _, argument = match["name"].partition(":")
        if name not in MAKERS:
            raise UserError(f"{page.name}: no maker of block {name}. Remedy: one of {', '.join(MAKERS)}.")
        body = MAKERS[name](page, argument) if argument else MAKERS[name](page)
        if page.parent != ROOT and name == "found":
            body = re.sub(r"\]\(docs/", "](", body)
        return f"{match[1]}{body}\n{match[3]}"

    return BLOCK.sub(make, text)


def stale() -> dict[Path, str]:
    """What is not as the exported campaigns say, and what it should hold; the figure with an empty text."""
    old = {page: page.read_text(encoding="utf-8") for page in pages()}
    found = {page: new for page, text in old.items() if (new := fill(page, text)) != text}
    return found | ({FIGURE: ""} if drawn_digest() != figure_digest() else {})


@command
def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0, 1 if --check found something, 2 for bad input."""
    parser = Parser(**about(__doc__, "python -m analysis.pages"))
    parser.add_argument("--check", action="store_true", help="say which pages are not current, and write nothing")
    args = parser.parse_args(argv)
    changed = stale()
    for page, text in changed.items():
        print(f"{'not current' if args.check else 'written'}: {page.relative_to(ROOT).as_posix()}")
        if not args.check and page != FIGURE:
            page.write_text(text, encoding="utf-8")
    if FIGURE in changed and not args.check:
        draw()
    if not changed:
        print(f"{len(pages())} pages and the figure are as the exported campaigns say")
    return 1 if changed and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
