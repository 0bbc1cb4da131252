"""Accuracy against safety: one point a setting of a method, and which setting validation prompts choose.

python -m analysis.frontier --runs runs/nullspace_task --out results/nullspace_task
python -m analysis.frontier --exported results/nullspace_task

The second makes table, numbers and figure of a campaign again from what was exported, without its runs. A setting is a
method with those of `KEYS`, its learning rate among them, in which its runs differ. Points are means over seeds with
95 % intervals as `analysis.stats.estimate` gives them; HS and OR are means over their sets. Runs on validation prompts
(`eval.split`) are a plate of their own: there each method's setting with the least HS - FA + OR is marked, the
objective of the searches (conf/tuning/equal.yaml), and it is the one to be trained at the seeds that are reported on
test prompts.
"""

import argparse
import math
import sys
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf

from analysis import demo, figures, paper, records, restore, stats
from analysis.collect import Collection, collect, one_judge, read_exported
from analysis.tables import markdown, show
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
NOTES = """\
Percentages: mean ± half-width of a 95 % t-interval over n seeds; †: all seeds agree, the exact interval over one
seed's prompts instead, all sets together. §: one seed (n=1), the same interval; it is about one training alone and
says nothing of other seeds, so it does not show which setting is the better one. (n=1) without an interval: sets of
different size together, or no share of prompts."""


@command
def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0, or 2 for bad input."""
    parser = Parser(**about(__doc__, "python -m analysis.frontier"))
    parser.add_argument("--runs", type=Path, help="folder of the run directories (runs)")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, help="folder for the results, e.g. results/nullspace_task")
    where.add_argument("--exported", type=Path, help="an exported campaign whose results are made again")
    parser.add_argument("--judge", help="whose verdicts to use where the runs were judged by several")
    args = parser.parse_args(argv)
    if args.exported and args.runs:
        raise UserError("--runs is for --out. Remedy: leave it out; --exported has rows of its own.")
    args.experiment, args.runs = None, args.runs or Path("runs")
    with naming_earlier((args.exported or args.out) / "table.md"):
        return publish(args, argv if argv is not None else sys.argv[1:])


def publish(args: argparse.Namespace, argv: list[str]) -> int:
    """Collect, compute, write; see `main`."""
    out = args.exported or args.out
    found, known = (of_export if args.exported else of_runs)(args)
    table = points(found, known, args.judge)
    if args.exported:
        first = demo.headline(records.read_json(out / "provenance.json"))
    else:
        first = demo.export(found, args, argv, "analysis.frontier")
        demo.export_verdicts(found, out)
        records.export(records.read_all(args.runs, found.runs), out / records.NAME)
    table.to_csv(out / "frontier.csv", index=False)
    text = f"{first}\n\n{report(table)}\n\n{NOTES}"
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    print(f"written: {out}/table.md, frontier.csv" + ("" if args.exported else ", results.csv"))
    for path in figures.save(draw(table), out / "frontier"):
        print(f"figure: {path}")
    return 0


def of_runs(args: argparse.Namespace) -> tuple[Collection, dict[str, DictConfig]]:
    """The finished runs of a folder, and each one's configuration."""
    found = collect(args.runs)
    if not found.runs:
        raise UserError(f"no finished run in {args.runs}. Remedy: run the campaign first.")
    return found, {run: OmegaConf.load(args.runs / run / "config.yaml") for run in found.runs}


def of_export(args: argparse.Namespace) -> tuple[Collection, dict[str, DictConfig]]:
    """The runs of an exported campaign, and what its rows and records tell of each one's configuration."""
    found, told = read_exported(args.exported), records.read_exported(args.exported / records.NAME)
    if not (args.exported / "provenance.json").is_file():
        raise UserError(f"{args.exported} holds no provenance.json. Remedy: export it from its runs (--out).")
    first = found.rows.drop_duplicates("run_id").set_index("run_id", drop=False)
    known = {run: told[run].settings if run in told else {} for run in found.runs}
    return found, {run: OmegaConf.create(restore.config_of(first.loc[run], known[run])) for run in found.runs}


def settings(cfg: DictConfig) -> dict:
    """`split` and the values of KEYS in a run's configuration; None for a key that it does not have."""
    found = {"split": OmegaConf.select(cfg, "eval.split")}
    for name, places in KEYS.items():
        given = [OmegaConf.select(cfg, place, default=None) for place in places]
        found[name] = next((value for value in given if value is not None), None)
    if OmegaConf.select(cfg, "method.basis") is not None and found["k"] is None:
        found["k"] = "all"
    return found


def points(found: Collection, configs: Mapping[str, DictConfig], judge: str | None = None) -> pd.DataFrame:
    """One row a plate (`PLATE`), method and setting: n seeds, objective, chosen, and of each metric its mean.

    Beside a metric stand `_low`, `_high`, `_half` and `_over` of its interval, as in `stats.Estimate`. configs: run_id
    -> its configuration. Raises UserError for a run whose configuration does not say its settings.
    """
    rows = one_judge(found.rows, judge)
    of_run = pd.DataFrame([{"run_id": run, **settings(configs[run])} for run in found.runs])
    if unknown := list(of_run.loc[of_run["split"].isna(), "run_id"]):
        raise UserError(
            f"{len(unknown)} runs do not say their settings (eval.split), {unknown[0]} first: they come from an "
            "export without them. Remedy: train them again, or give --runs a folder without them."
        )
    varied = [key for key in KEYS if of_run[key].dropna().nunique() > 1]
    rows = rows[rows["final"] & rows["metric"].isin((*METRICS, FORM)) & ~rows["set"].str.contains("+", regex=False)]
    groups = rows.groupby([*PLATE[:3], "method", "run_id", "seed", "metric"])
    values, prompts = groups["value"].mean().unstack("metric"), groups["n"].agg(together).unstack("metric")
    each = values.join(prompts.add_suffix("_n")).reset_index().merge(of_run, on="run_id")
    entries = []
    for place, part in each.groupby([*PLATE, "method", *varied], dropna=False, sort=True):
        place = dict(zip([*PLATE, "method", *varied], place, strict=True))
        if part["seed"].duplicated().any():
            alike = ", ".join(part.loc[part["seed"].duplicated(keep=False), "run_id"])
            raise UserError(
                f"these runs have one seed and differ in none of {', '.join(KEYS)}, so they are no seeds of one "
                f"setting: {alike}. Remedy: keep them in folders of their own (paths.runs); in place of an export "
                "whose records lack some of these keys, its runs."
            )
        entry = {**{key: place[key] for key in [*PLATE, "method"]}, "setting": label(place, varied)}
        entry["n"] = len(part)
        for metric in (*METRICS, *([FORM] if FORM in part else [])):
            given = part.dropna(subset=metric) if metric in part else part.head(0)
            made = stats.Estimate(*[math.nan] * 4, 0, "none")
            if len(given):
                counts = given[f"{metric}_n"].tolist()
                made = stats.estimate(given[metric].tolist(), prompts=counts, proportion=True)
            entry |= {metric: made.mean, f"{metric}_low": made.low, f"{metric}_high": made.high}
            entry |= {f"{metric}_half": made.half, f"{metric}_over": made.over}
        entry["objective"] = entry["HS"] - entry["FA"] + entry["OR"]
        entries.append(entry)
    table = pd.DataFrame(entries)
    least = table.groupby([*PLATE, "method"])["objective"].transform("min")
    table["chosen"] = (table["split"] == "validation") & (table["objective"] == least)
    return table


def together(counts: pd.Series) -> float:
    """How many prompts a mean over sets is a share of: all of them where the sets are alike in size, else NaN."""
    return float(counts.sum()) if counts.notna().all() and counts.nunique() == 1 else math.nan


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
            shown = [cell(row, m) for m in measured]
            mark = " (chosen)" if row["chosen"] else ""
            lines.append(
                [paper.method_label(row["method"]), paper.setting_label(row["setting"]) + mark, str(row["n"]), *shown]
            )
            lines[-1].append(f"{row['objective']:.1f}")
        model, task, ratio, split = place
        blocks += [f"### {model}, {task}, p = {ratio:g}, {split} prompts", markdown(head, lines, key=2, width=10_000)]
    return "\n\n".join(blocks)


def cell(row: pd.Series, metric: str) -> str:
    """One value as `tables.show` has it; `-` where it was not measured."""
    if math.isnan(row[metric]):
        return "-"
    told = {key: row[f"{metric}_{key}"] for key in ("low", "high", "half", "over")}
    return show(pd.Series({"metric": metric, "mean": row[metric], **told}))


def bars(own: pd.DataFrame, metric: str) -> list[pd.Series]:
    """How far the intervals of a metric reach below and above its mean; 0 where there is none."""
    return [(own[metric] - own[f"{metric}_low"]).fillna(0), (own[f"{metric}_high"] - own[metric]).fillna(0)]


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
                xerr=bars(own, "HS"),
                yerr=bars(own, "FA"),
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
