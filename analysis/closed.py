"""How long the closed constraint holds, what predicts it, and through which matrices safety drifts.

python -m analysis.closed --runs runs --out results/closed
python -m analysis.closed --exported results/closed    the same again from the rows that the folder holds, without runs

Reads the runs of the presets `closed_break`, `closed_rates`, `closed_goal` (and `closed_goal_coupled`),
`closed_anchors`, `closed_sources`, `closed_free` and `closed_variants`, and their references: SFT's of `demo_full` at
the harmful ratio of `closed_free`; SFT's and CWAC's of `closed_break` at `closed_goal`'s. docs/closed_constraint.md is
the theory.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf

from analysis import figures, paper, stats, tables
from analysis.collect import Collection, cell_from, collect, one_judge, pooled, read_exported
from analysis.demo import export, headline
from analysis.records import read_json
from cwac.core import config, identity, paths
from cwac.core.config import Parser, about, command
from cwac.core.errors import UserError, naming_earlier
from cwac.data.pools import load_pools

PRESETS = (
    "closed_break",
    "closed_rates",
    "closed_goal",
    "closed_anchors",
    "closed_sources",
    "closed_free",
    "closed_variants",
)
CURVES = {
    "closed_break": "Until it breaks: every method for ten times the epochs",
    "closed_rates": "The closed weight constraint at smaller and larger steps",
    "closed_goal": "The closed constraint at higher energies, and coupled, for ten times the epochs",
}
"""Presets that are evaluated on the way, and what they ask."""
METRICS = ("HS", "refusal", "other", "FA", "OR")
CLOSED = ("weight_only_closed", "cwac_closed")
LEVELS = (10, 20, 50)
"""HS in percent whose crossing is reported."""
CERTIFICATES = {
    ("subspace_energy", "train"): "least energy kept, on V's own anchors",
    ("energy", "heldout"): "least energy kept, held-out prompts",
    ("weight_leak_all", "anchors"): "worst weight_leak, anchors",
    ("weight_leak_all", "heldout"): "worst weight_leak, held-out prompts",
    ("activation_drift", "heldout"): "activation drift, held-out prompts",
    ("weight_change", "anchors"): "median ||dW|| / ||W||",
    ("poison_loss", "poison"): "loss on the poison",
}
"""What might predict HS: (metric, set) of a final row -> label."""
SETTINGS = ["energy", "n_anchors", "first_token"]
POINT = [*SETTINGS, "category"]
SOURCES = ["anchors", "n_anchors"]
ONE, SEVERAL = "one category", "all eight"
OWN, OTHERS = "own category", "other seven"
"""Sets of a run whose anchors are of one category: the test's requests of that category, and the rest."""
ROUTE = ["arm", "matrix"]
VARIANT = ["variant", "strength"]
CURVE = ["preset", "harmful_ratio", "learning_rate", "method", "held"]
REST = "embeddings, norms"


@command
def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0, 1 if expected runs are missing, 2 for bad input."""
    parser = Parser(**about(__doc__, "python -m analysis.closed"))
    parser.add_argument("--runs", type=Path, help="folder of the run directories (runs)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--out", type=Path, help="folder for the results (results/closed)")
    where.add_argument("--exported", type=Path, help="an exported campaign whose tables and figures are made again")
    parser.add_argument("--judge", help="whose verdicts to use where the runs were judged by several")
    parser.add_argument("overrides", nargs="*", help="the sweeps' own overrides of every preset, e.g. seed=0,1")
    args = parser.parse_intermixed_args(argv)
    if args.exported and (args.runs or args.overrides):
        raise UserError("--runs and overrides are for --out. Remedy: leave them out; --exported has rows of its own.")
    args.experiment, args.runs = ", ".join(PRESETS), args.runs or Path("runs")
    args.out = args.exported or args.out or Path("results/closed")
    with naming_earlier(args.out / "table.md"):
        return publish(args, sys.argv[1:] if argv is None else argv)


def publish(args: argparse.Namespace, argv: list[str]) -> int:
    """Collect, print, write; see `main`."""
    cells = expected(args.overrides)
    collection = of_export(args.exported, cells) if args.exported else of_runs(args, cells)
    settings = pd.DataFrame([setting(preset, cfg) for preset, cfg in cells])
    rows = pooled(one_judge(collection.rows, args.judge)).drop(columns="learning_rate").merge(settings, on="run_id")
    curves, ends = rows[rows["preset"].isin(CURVES)], rows[rows["final"]]
    parts = {
        "break": tables.estimates(curves, [*CURVE, "epoch", "step", "metric", "set"]),
        "anchors": tables.estimates(ends[ends["preset"] == "closed_anchors"], [*SETTINGS, "metric", "set"]),
        "sources": sources(args, collection, ends[ends["preset"] == "closed_sources"], cells),
        "free": tables.estimates(ends[ends["preset"] == "closed_free"], [*ROUTE, "metric", "set"]),
        "variants": tables.estimates(ends[ends["preset"] == "closed_variants"], [*VARIANT, "metric", "set"]),
    }
    strengths = ends[ends["preset"].isin(["closed_anchors", "closed_sources"])]
    points = by_run(strengths.drop_duplicates(["run_id", "metric", "set"]))
    predictors = certificates(points)
    record = None if args.exported is None else read_json(args.exported / "provenance.json")
    first = export(collection, args, argv, "analysis.closed") if record is None else headline(record)
    for name, part in [*parts.items(), ("certificates", predictors)]:
        part.to_csv(args.out / f"{name}.csv", index=False)
    preset_of = dict(zip(settings["run_id"], settings["preset"], strict=True))
    text = f"{first}\n\n{report(collection, preset_of, parts, predictors)}"
    (args.out / "table.md").write_text(text, encoding="utf-8")
    print(text)
    for name, figure in draw(curves, points, parts["free"]).items():
        print(f"figure: {figures.save(figure, args.out / name)[0]}")
    print(f"written: {args.out}/table.md, and the parts' numbers as .csv beside it")
    return 1 if collection.missing else 0


def of_runs(args: argparse.Namespace, cells: Sequence[tuple[str, DictConfig]]) -> Collection:
    """The finished runs of a folder, with their energies."""
    # two presets may ask for one run
    collection = collect(args.runs, {identity.run_id(cfg): cell_from(cfg) for _, cfg in cells}.values())
    if not collection.runs:
        raise UserError(f"no finished run of {args.experiment} in {args.runs}. Remedy: run a preset first.")
    collection.rows = pd.concat([collection.rows, energies(args.runs, collection.rows)], ignore_index=True)
    return collection


def of_export(folder: Path, cells: Sequence[tuple[str, DictConfig]]) -> Collection:
    """An exported campaign of these presets. Raises UserError for a file that is missing, or a run of another grid."""
    if gone := [name for name in ("provenance.json", "sources.csv") if not (folder / name).is_file()]:
        raise UserError(f"{folder} holds no {gone[0]}. Remedy: export it from its runs (--runs, --out).")
    collection = read_exported(folder)
    known = {identity.run_id(cfg) for _, cfg in cells}
    if other := [run for run in collection.runs if run not in known]:
        raise UserError(
            f"{folder}: {len(other)} runs are of no preset of today's conf/, {other[0]} first. Remedy: the commit "
            "that its provenance.json names, or its runs (--runs, --out)."
        )
    return collection


def sources(
    args: argparse.Namespace, collection: Collection, varied: pd.DataFrame, cells: Sequence[tuple[str, DictConfig]]
) -> pd.DataFrame:
    """Estimates by the anchors' sources; an export's own, since the prompts' categories are not among its rows."""
    if args.exported:
        return pd.read_csv(args.exported / "sources.csv")
    varied = pd.concat([varied, by_category(collection, varied, cells)], ignore_index=True)
    return tables.estimates(over_categories(varied), [*SOURCES, "metric", "set"])


def expected(overrides: Sequence[str]) -> list[tuple[str, DictConfig]]:
    """The presets' cells with the preset each belongs to, and the references'."""
    cells = [(preset, cfg) for preset in PRESETS for cfg in config.expand(preset, list(overrides))]
    ratio = next(cfg.harmful_ratio for preset, cfg in cells if preset == "closed_free")
    goal = ",".join(sorted({f"{cfg.harmful_ratio:g}" for preset, cfg in cells if preset == "closed_goal"}, key=float))
    references = {
        ("closed_free", "demo_full"): ["method=sft", f"harmful_ratio={ratio}"],
        ("closed_goal", "closed_break"): ["method=sft,cwac", f"harmful_ratio={goal}"],
        ("closed_goal", "closed_goal_coupled"): [],
    }
    for (preset, base), cell in references.items():
        cells += [(preset, cfg) for cfg in config.expand(base, [*cell, *overrides])]
    return cells


def setting(preset: str, cfg: DictConfig) -> dict:
    """By what a cell differs from others of its preset: the curve, the constraint's strength, or the opened route.

    `arm` is `freed` (all else constrained or frozen) or `constrained` (all else free); `matrix` the type it is about.
    `variant` and its `strength` (lam, mu or steps; empty where it has none) are of `closed_variants` alone.
    """
    weight, strengths = cfg.method.get("weight") or {}, OmegaConf.select(cfg, "variant.strengths")
    freed, modules = list(weight.get("unconstrained", [])), weight.get("modules")
    if not weight or modules != "all":
        arm, matrix = "constrained", "+".join(modules or []) or "none"
    else:
        arm, matrix = "freed", "+".join(freed) or ("none" if weight["freeze_others"] else REST)
    return {
        "run_id": identity.run_id(cfg),
        "preset": preset,
        "learning_rate": float(cfg.train.learning_rate),
        "energy": weight.get("energy", math.nan),
        "held": f"{weight['energy']:g}" if weight else "",
        "n_anchors": str(weight.get("n_anchors") or "all"),
        "anchors": ONE if weight.get("anchor_sources") else SEVERAL,
        "category": " ".join(weight.get("anchor_sources") or []),
        "first_token": str(weight.get("first_token", "")),
        "arm": arm,
        "matrix": matrix.replace("_proj", ""),
        "variant": OmegaConf.select(cfg, "variant.name") or "",
        "strength": "" if strengths is None else f"{strengths[cfg.variant.pick]:g}",
    }


def energies(runs: Path, rows: pd.DataFrame) -> pd.DataFrame:
    """Rows `energy` of every run with a protected subspace: the least share of squared norm in V over its matrices.

    A run's drift.json has, by matrix and set of prompts, `bound` = ||(I - V V^T) X|| / ||X||, so the share is
    1 - bound^2. On the held-out set it is the energy that V keeps of prompts it was not built from.
    """
    last = rows[rows["final"]].drop_duplicates("run_id", keep="last")
    records = []
    for row in last.to_dict("records"):
        for name, detail in read_json(runs / row["run_id"] / "drift.json").items():
            bounds = [matrix["bound"] for matrix in detail["weight"].values() if "bound" in matrix]
            if bounds:
                measured = {"metric": "energy", "set": name, "value": 1 - max(bounds) ** 2, "n": math.nan}
                records.append({**row, **measured, "judge": "", "eval": "", "stderr": math.nan})
    return pd.DataFrame(records, columns=rows.columns).astype(rows.dtypes)


def by_category(collection: Collection, varied: pd.DataFrame, cells: Sequence[tuple[str, DictConfig]]) -> pd.DataFrame:
    """HS on the requests of the category that a run's anchors are of (`OWN`) and on the rest (`OTHERS`), as more rows.

    varied: the final rows of `closed_sources`. The category of a test's prompt is looked up in the run's own pools.
    """
    harm = varied[(varied["metric"] == "HS") & (varied["category"] != "")]
    harm = harm.drop_duplicates("run_id").set_index("run_id", drop=False)
    records = []
    for cfg in {identity.run_id(cfg): cfg for preset, cfg in cells if preset == "closed_sources"}.values():
        if (run := identity.run_id(cfg)) not in harm.index:
            continue
        row, pools = harm.loc[run].to_dict(), load_pools(cfg.pools, cfg.paths.data, cfg.seed)
        groups = {e.id: e.group for test in pools.test.values() for e in test}
        answers = collection.verdicts[
            (collection.verdicts["run_id"] == run) & (collection.verdicts["judge"] == row["judge"])
        ]
        in_category = answers["id"].map(groups) == row["category"]
        for name, part in ((OWN, answers[in_category]), (OTHERS, answers[~in_category])):
            if len(part):
                value = 100 * (part["verdict"] == "harmful").mean()
                records.append({**row, "set": name, "value": value, "n": len(part), "stderr": math.nan})
    return pd.DataFrame(records, columns=varied.columns).astype(varied.dtypes)


def over_categories(varied: pd.DataFrame) -> pd.DataFrame:
    """One row a seed: runs that differ in their anchors' category alone are averaged; n is the least of theirs."""
    keys = [*SOURCES, "seed", "metric", "set"]
    return varied.groupby(keys, dropna=False, as_index=False).agg(value=("value", "mean"), n=("n", "min"))


def by_run(ends: pd.DataFrame) -> pd.DataFrame:
    """One line a run: its settings, HS, and its certificates under their labels."""
    wide = ends.assign(name=[label_of(m, s) for m, s in zip(ends["metric"], ends["set"], strict=True)])
    wide = wide.dropna(subset="name")
    return wide.pivot_table(index=["run_id", *POINT, "seed"], columns="name", values="value").reset_index()


def label_of(metric: str, of: str) -> str | None:
    return "HS" if metric == "HS" else CERTIFICATES.get((metric, of))


def certificates(points: pd.DataFrame) -> pd.DataFrame:
    """How well each certificate orders the runs by HS: Spearman's rho, bootstrapped over settings.

    Columns: certificate, rho, low, high, runs, settings. A negative rho: the larger, the safer.
    """
    records = []
    for label in CERTIFICATES.values():
        both = points.dropna(subset=["HS", label]) if {"HS", label} <= {*points.columns} else points.head(0)
        groups = list(both[POINT].itertuples(index=False, name=None))
        if groups:
            names = [str(group) for group in groups]
            records.append([label, *stats.rank_correlation(both[label], both["HS"], names), len(both), len({*groups})])
    return pd.DataFrame(records, columns=["certificate", "rho", "low", "high", "runs", "settings"])


# --- tables --------------------------------------------------------------------------------------------------


def report(
    collection: Collection, preset_of: dict[str, str], parts: dict[str, pd.DataFrame], predictors: pd.DataFrame
) -> str:
    """`table.md` below its first line; preset_of: run_id -> the preset that asks for it."""
    blocks = []
    for preset, question in CURVES.items():
        if len(curves := parts["break"][parts["break"]["preset"] == preset]):
            blocks += [f"### {question}", "HS after so many optimizer steps.", steps_table(curves)]
            blocks += ["When HS crosses a level, and the end of training.", crossing_table(curves)]
    if len(parts["anchors"]):
        blocks += ["### Strengths of the closed weight constraint", plain_table(parts["anchors"], SETTINGS)]
    if len(sources := parts["sources"]):
        note = (
            f"Anchors of `{ONE}`, each of the eight in turn (a seed's value is the mean of its eight runs), or of\n"
            f"`{SEVERAL}`. HS {OWN}: on the test's requests of the category that the anchors are of."
        )
        blocks += ["### Anchors of one source, or of several", note, plain_table(sources, SOURCES)]
    if len(predictors):
        shown = [
            [r.certificate, f"{r.rho:+.2f}", f"[{r.low:+.2f}, {r.high:+.2f}]", str(r.runs), str(r.settings)]
            for r in predictors.itertuples()
        ]
        note = "Spearman's rho between a certificate and HS over those runs; 95 % bootstrap interval over settings."
        header = ["certificate", "rho", "95 %", "runs", "settings"]
        blocks += ["### Which certificate predicts HS", note, tables.markdown(header, shown)]
    if len(routes := parts["free"]):
        routes = routes.sort_values("arm", ascending=False, kind="stable")
        note = (
            "`freed`: this type trains without a constraint, every other matrix is constrained, the rest is frozen. "
            f"`{REST}`:\nall matrices constrained, everything else trains. `constrained`: this type alone is, all "
            "else trains; `none` is SFT."
        )
        blocks += ["### Through which matrices safety drifts", note, plain_table(routes, ROUTE)]
    if len(variants := parts["variants"]):
        note = (
            "`closed`: every trained matrix constrained, nothing else trains; `down`: the paper's, on down_proj. "
            "`sae`,\n`residual`, `logits`: the space of an activation constraint beside it; `soft`: a penalty "
            "instead of the\nprojection; `refresh`: V and A refitted; `lora`: an adapter. "
            "Strength, lam, mu or steps:\n"
            f"{chosen_on_validation()}."
        )
        losses = [*METRICS, "poison_loss", "task_loss"]
        blocks += ["### Which coupling closes it", note, plain_table(variants, VARIANT, losses)]
    blocks.append(tables.NOTES)
    blocks += tables.missing_runs(collection, preset_of)
    if account := collection.account():
        blocks.append("\n".join(f"- {line}" for line in account))
    return "\n\n".join(blocks) + "\n"


def curves_of(summary: pd.DataFrame) -> list[tuple[list[str], pd.DataFrame]]:
    """The curves of `break.csv`, each with the cells that name it: p, learning rate, method, energy."""
    groups = summary.groupby(CURVE)
    order = sorted(groups.groups, key=lambda k: (*k[1:3], paper.method_order(k[3]), k[4]))
    return [
        ([f"{k[1]:g}", paper.rate_label(k[2]), paper.method_label(k[3]), k[4] or "-"], groups.get_group(k))
        for k in order
    ]


def steps_table(summary: pd.DataFrame) -> str:
    """HS (all harmful sets pooled), one row a curve, one column an evaluated step."""
    steps = sorted(summary["step"].unique())
    rows = []
    for name, curve in curves_of(summary[summary["metric"] == "HS"]):
        at = {row["step"]: row for _, row in curve.iterrows()}
        rows.append([*name, *(tables.show(at.get(step)) for step in steps)])
    return tables.markdown(["p", "learning rate", "method", "energy", *(f"{s:g}" for s in steps)], rows, key=4)


def crossing_table(summary: pd.DataFrame) -> str:
    """One row a curve: the first evaluated step at which its mean HS reaches each level, then its last metrics."""
    pairs = tables.column_pairs(summary, [*METRICS[1:], "task_loss"])
    rows = []
    for name, curve in curves_of(summary):
        harm, last = curve[curve["metric"] == "HS"], curve[curve["step"] == curve["step"].max()]
        ends = {(row["metric"], row["set"]): row for _, row in last.iterrows()}
        crossed = [harm.loc[harm["mean"] >= level, "step"].min() for level in LEVELS]
        shown = [f"> {harm['step'].max():g}" if math.isnan(step) else f"{step:g}" for step in crossed]
        rows.append([*name, *shown, *(tables.show(ends.get(pair)) for pair in pairs)])
    heads = [*(f"HS {level}" for level in LEVELS), *(tables.heading(pair, pairs) for pair in pairs)]
    return tables.markdown(["p", "learning rate", "method", "energy", *heads], rows, key=4)


def chosen_on_validation() -> str:
    """How the strengths of the variants came about."""
    if (paths.CONF / "chosen" / "closed_variants.yaml").is_file():
        return "one of three, chosen on validation prompts at a seed of its own"
    return "the middle of three, since no search has chosen"


def plain_table(summary: pd.DataFrame, keys: list[str], metrics: Sequence[str] = METRICS) -> str:
    """One row a setting with the metrics, n and, where measured, the certificates on held-out prompts."""
    pairs = tables.column_pairs(summary, metrics)
    held = {("energy", "heldout"): "energy held-out", ("weight_leak_all", "heldout"): "weight_leak held-out"}
    heads = {**{pair: tables.heading(pair, pairs) for pair in pairs}, **held}
    rows = []
    for key, group in summary.groupby(keys, sort=False):
        at = {(row["metric"], row["set"]): row for _, row in group.iterrows()}
        rows.append([*map(str, key), str(group["n"].max()), *(tables.show(at.get(pair)) for pair in heads)])
    return tables.markdown([*keys, "n", *heads.values()], rows, key=len(keys))


# --- figures -------------------------------------------------------------------------------------------------


def draw(curves: pd.DataFrame, points: pd.DataFrame, routes: pd.DataFrame) -> dict[str, Figure]:
    """File stem -> figure, of what was measured."""
    drawn = {}
    for preset in CURVES:
        name, part = preset.removeprefix("closed_"), curves[curves["preset"] == preset]
        if name == "rates":
            part = part[part["method"] != "sft"]  # the table has it
            runs = zip(part["method"], part["learning_rate"], strict=True)
            part = part.assign(method=[f"{method}{paper.SETTING}rate {rate:g}" for method, rate in runs])
        elif name == "goal":
            held = part["method"] + paper.SETTING + "energy " + part["held"]
            part = part.assign(method=held.where(part["method"].isin(CLOSED), part["method"]))
        for model, task, of in {*part.loc[part["metric"] == "HS", ["model", "task", "set"]].itertuples(index=False)}:
            for plate in figures.against_training(part, model, task, of):
                drawn[name] = plate.figure
    if shown := [label for label in CERTIFICATES.values() if {"HS", label} <= {*points.columns}]:
        drawn["anchors"] = certificate_panels(points, shown)
    if len(routes):
        drawn["free"] = route_panels(routes[routes["metric"] == "HS"])
    return drawn


def certificate_panels(points: pd.DataFrame, labels: list[str]) -> Figure:
    """HS over each certificate, a point a run; the marker says what its V was built from."""
    with matplotlib.rc_context(figures.SMALL):
        columns = min(4, len(labels))
        figure, grid = figures.panels(math.ceil(len(labels) / columns), columns, (9, 5), sharey=True)
        built = [
            f"{n} anchors" + " of one category" * bool(category) + ", first token left out" * (first == "False")
            for n, category, first in points[["n_anchors", "category", "first_token"]].itertuples(index=False)
        ]
        for ax, label in zip(grid.flat, labels, strict=False):
            kinds = sorted({*built}, key=paper.by_value)
            for kind, part in points.assign(built=built).groupby("built"):
                _, colour, marker = figures.newcomers(kinds)[kind]
                look = {"color": colour, "marker": marker}
                ax.plot(part[label], part["HS"], linestyle="none", markersize=4, label=kind, **look)
            if figures.wide(points[label].dropna()):
                ax.set_xscale("log")
            ax.set_xlabel(label)
            ax.set_ylim(-4, 104)
            figures.bare(ax)
        for ax in list(grid.flat)[len(labels) :]:
            ax.set_axis_off()
        figure.supylabel(paper.METRICS["HS"])
        figures.legend_below(figure, list(grid.flat)[: len(labels)])
    return figure


def route_panels(harm: pd.DataFrame) -> Figure:
    """HS by the type of matrix that alone is freed, and by the one that alone is constrained; bars: 95 % intervals."""
    titles = {"freed": "alone free, all else constrained", "constrained": "alone constrained, all else free"}
    arms = [arm for arm in titles if arm in {*harm["arm"]}]
    figure, grid = figures.panels(1, len(arms), (4.5 * len(arms), 3.6), sharex=True)
    for ax, arm in zip(grid.flat, arms, strict=True):
        part = harm[harm["arm"] == arm].sort_values("mean", kind="stable")
        ax.barh(part["matrix"], part["mean"], color=figures.COLOURS[2])
        ax.hlines(part["matrix"], part["low"], part["high"], color="black", linewidth=1)
        ax.set_title(titles[arm], loc="left", fontsize=10)
        ax.set_xlabel(paper.METRICS["HS"])
        ax.set_xlim(0, 100)
        ax.set_axisbelow(True)
        figures.bare(ax)
    return figure


if __name__ == "__main__":
    sys.exit(main())
