"""Accuracy against safety: one point a setting of a method, and which setting validation prompts choose.

python -m analysis.frontier --runs runs/nullspace_task --out results/nullspace_task

A setting is a method with those of `KEYS`, its learning rate among them, in which the runs below --runs differ. Points
are means over seeds with 95 % t-intervals; HS and OR are means over their sets. Runs on validation prompts
(`eval.split`) are a plate of their own: there each method's setting with the least HS - FA + OR is marked, the
objective of the searches (conf/tuning/equal.yaml), and it is the one to be trained at the seeds that are reported on
test prompts.
"""

import math
import sys
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from analysis import figures, paper, records, stats
from analysis.collect import VERDICTS, Collection, collect, one_judge
from analysis.demo import export
from analysis.tables import markdown
from cwac.core.config import Parser, about, command
from cwac.core.errors import UserError, naming_earlier

KEYS = {
    "energy": ("method.energy", "method.weight.energy"),
    "k": ("method.k",),
    "basis": ("method.basis",),
    "lam": ("method.lam",),
    "rate": ("train.learning_rate",),
    "batch": ("train.per_device_train_batch_size",),
    "warmup": ("train.warmup_steps",),
    "rows": ("task.n_train",),
}
"""Short name -> where a run's configuration may have it."""
PLATE = ["model", "task", "harmful_ratio", "split"]
METRICS = ("FA", "HS", "OR")
FORM = "task_answers"
"""Shown where it was measured: of the answers to requests of both kinds, those in the form of the task's."""


@command
def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0, or 2 for bad input."""
    parser = Parser(**about(__doc__, "python -m analysis.frontier"))
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the run directories (runs)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results, e.g. results/nullspace_task")
    parser.add_argument("--judge", help="whose verdicts to use where the runs were judged by several")
    args = parser.parse_args(argv)
    args.experiment = None
    with naming_earlier(args.out / "table.md"):
        found = collect(args.runs)
        if not found.runs:
            raise UserError(f"no finished run in {args.runs}. Remedy: run the campaign first.")
        table = points(found, args.runs, args.judge)
    first = export(found, args, argv if argv is not None else sys.argv[1:], "analysis.frontier")
    table.to_csv(args.out / "frontier.csv", index=False)
    if len(found.verdicts):  # without a time stamp, so that the same runs give the same bytes
        found.verdicts.to_csv(args.out / VERDICTS, index=False, compression={"method": "gzip", "mtime": 0})
    records.export(records.read_all(args.runs, found.runs), args.out / records.NAME)
    text = f"{first}\n\n{report(table)}"
    (args.out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    print(f"written: {args.out}/table.md, frontier.csv, results.csv")
    for path in figures.save(draw(table), args.out / "frontier"):
        print(f"figure: {path}")
    return 0


def settings(folder: Path) -> dict:
    """`split` and the values of KEYS in a run's configuration; None for a key that it does not have."""
    cfg = OmegaConf.load(folder / "config.yaml")
    found = {"split": OmegaConf.select(cfg, "eval.split")}
    for name, places in KEYS.items():
        given = [OmegaConf.select(cfg, place, default=None) for place in places]
        found[name] = next((value for value in given if value is not None), None)
    if OmegaConf.select(cfg, "method.basis") is not None and found["k"] is None:
        found["k"] = "all"
    return found


def points(found: Collection, runs: Path, judge: str | None = None) -> pd.DataFrame:
    """One row a plate (`PLATE`), method and setting: n seeds, each metric's mean and half-width, objective, chosen."""
    rows = one_judge(found.rows, judge)
    of_run = pd.DataFrame([{"run_id": run, **settings(Path(runs) / run)} for run in found.runs])
    if unknown := list(of_run.loc[of_run["split"].isna(), "run_id"]):
        raise UserError(
            f"{len(unknown)} runs in {runs} do not say their settings (eval.split), {unknown[0]} first: they come "
            "from an export without them. Remedy: train them again, or give --runs a folder without them."
        )
    varied = [key for key in KEYS if of_run[key].dropna().nunique() > 1]
    rows = rows[rows["final"] & rows["metric"].isin((*METRICS, FORM)) & ~rows["set"].str.contains("+", regex=False)]
    values = rows.groupby([*PLATE[:3], "method", "run_id", "seed", "metric"])["value"].mean().unstack("metric")
    each = values.reset_index().merge(of_run, on="run_id")
    entries = []
    for place, part in each.groupby([*PLATE, "method", *varied], dropna=False, sort=True):
        place = dict(zip([*PLATE, "method", *varied], place, strict=True))
        entry = {**{key: place[key] for key in [*PLATE, "method"]}, "setting": label(place, varied)}
        entry["n"] = len(part)
        for metric in (*METRICS, *([FORM] if FORM in part else [])):
            given = list(part[metric].dropna()) if metric in part else []
            entry[metric] = sum(given) / len(given) if given else math.nan
            entry[f"{metric}_half"] = stats.half_width(given) if given else math.nan
        entry["objective"] = entry["HS"] - entry["FA"] + entry["OR"]
        entries.append(entry)
    table = pd.DataFrame(entries)
    least = table.groupby([*PLATE, "method"])["objective"].transform("min")
    table["chosen"] = (table["split"] == "validation") & (table["objective"] == least)
    return table


def label(place: dict, varied: list[str]) -> str:
    """`energy 0.999, k 16, rate 0.0002` of the keys that a setting has; a column with gaps holds k as 16.0."""

    def shown(value: object) -> object:
        return int(value) if isinstance(value, float) and value.is_integer() else value

    return ", ".join(f"{key} {shown(place[key])}" for key in varied if not pd.isna(place[key]))


def report(table: pd.DataFrame) -> str:
    """A Markdown table a plate, the settings of a method together; a chosen one is marked."""
    blocks = []
    for place, part in table.groupby(PLATE, sort=True):
        measured = [*METRICS, *([FORM] if FORM in part and part[FORM].notna().any() else [])]
        head = ["method", "setting", "n", *measured, "HS - FA + OR"]
        lines = []
        for _, row in part.sort_values("method", key=lambda c: c.map(paper.method_order), kind="stable").iterrows():
            shown = [f"{row[m]:.1f}" + half(row[f"{m}_half"]) for m in measured]
            mark = " (chosen)" if row["chosen"] else ""
            lines.append([paper.method_label(row["method"]), row["setting"] + mark, str(row["n"]), *shown])
            lines[-1].append(f"{row['objective']:.1f}")
        model, task, ratio, split = place
        blocks.append(f"### {model}, {task}, p = {ratio:g}, {split} prompts\n\n{markdown(head, lines, key=2)}")
    return "\n\n".join(blocks)


def half(width: float) -> str:
    return "" if math.isnan(width) else f" ± {width:.1f}"


def draw(table: pd.DataFrame) -> Figure:
    """FA against HS, a plate each; up and to the left is better. A ring marks what validation chose."""
    plates = list(table.groupby(PLATE, sort=True))
    figure = Figure(figsize=(4.2 * len(plates), 3.6), layout="constrained")
    for axes, (place, part) in zip(figure.subplots(1, len(plates), squeeze=False)[0], plates, strict=True):
        methods = figures.ordered(part["method"])
        for method in methods:
            own, looks = part[part["method"] == method].sort_values("HS"), figures.style(method, methods)
            colour, marker = looks["color"], looks["marker"]
            axes.plot(own["HS"], own["FA"], "-", color=colour, alpha=0.35, linewidth=0.8)
            axes.errorbar(
                own["HS"],
                own["FA"],
                xerr=own["HS_half"].fillna(0),
                yerr=own["FA_half"].fillna(0),
                color=colour,
                marker=marker,
                linestyle="none",
                markersize=5,
                elinewidth=0.5,
                label=paper.method_label(method),
            )
            ring = own[own["chosen"]]
            axes.plot(ring["HS"], ring["FA"], "o", color=colour, markersize=11, fillstyle="none")
        model, task, ratio, split = place
        axes.set(xlabel="HS (%)", ylabel="FA (%)", xlim=(-3, 103), ylim=(-3, 103))
        axes.set_title(f"{model}, {task}, p = {ratio:g}, {split} prompts", fontsize=8, loc="left")
        axes.legend(fontsize=7, frameon=False, loc="lower right")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    sys.exit(main())
