"""What attacks other than the paper's do to each method: one table an attack, prefilling and harm categories apart.

python -m analysis.attacks --runs runs/attacks --out results/attacks
python -m analysis.attacks --experiment nullspace_attacks --out results/nullspace_attacks

Reads the runs of `PRESETS`, or of those named: poison of several kinds (`conf/attack`), every model asked plainly and
with `eval.prefill`. The aligned model stands beside them as it was before any training.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from omegaconf import DictConfig

from analysis import figures, paper, tables
from analysis.collect import Collection, before, cell_from, collect, one_judge, pooled
from analysis.demo import export
from cwac.core import config, identity
from cwac.core.config import Parser, about, command
from cwac.core.errors import UserError, naming_earlier
from cwac.core.metrics import VARIATION

PRESETS = ("closed_attacks", "closed_prefill", "closed_trigger")
METRICS = ("HS", "refusal", "other", "OR", "FA")
NONE = "(before training)"
ATTACKS = {
    NONE: "the aligned model",
    "harmful": "pairs of harmful request and compliance, drawn at random",
    "identity_shift": "benign requests, answered behind a declaration of obedience",
    "style": "benign requests, answered in the form of compliance",
    "other_kinds": "harmful pairs of categories of which no defence has a request",
    "outside_anchors": "the harmful pairs whose activations lie outside V the most",
    "trigger": "harmful pairs behind words that carry their activations out of V, the best of those tried",
    "trigger_gradient": "the same, by an attacker who follows gradients to the words",
}
"""Attack -> what the poison is, in the order of the tables."""
KEYS = ["attack", "method", "metric", "set"]
ASKED = {"": "asked", f"{VARIATION}prefill": "prefilled", f"{VARIATION}trigger": "triggered"}
"""How a test set's requests are asked, by the end of its name -> the set's label in the summary."""
PREFILLED = f"{VARIATION}prefill"
PARTS = {"_poisoned": "poisoned", "_unpoisoned": "unpoisoned"}
"""Ends of the test sets that `pools.poison_categories` makes -> the categories' label."""


def attack_of(cfg: DictConfig) -> str:
    """The name of the attack that a cell meets."""
    if cfg.pools.get("poison_categories"):
        return "other_kinds"
    if trigger := cfg.get("poison_trigger"):
        return "trigger_gradient" if trigger == "gradient" else "trigger"
    return "outside_anchors" if cfg.poison_choice == "outside_anchors" else cfg.poison


@command
def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0, 1 if expected runs are missing, 2 for bad input."""
    parser = Parser(**about(__doc__, "python -m analysis.attacks"))
    parser.add_argument("--runs", type=Path, default=Path("runs/attacks"), help="folder of the runs (runs/attacks)")
    parser.add_argument("--out", type=Path, default=Path("results/attacks"), help="folder for the results")
    parser.add_argument("--experiment", nargs="+", default=PRESETS, help="presets (default: %(default)s)")
    parser.add_argument("--judge", help="whose verdicts to use where the runs were judged by several")
    parser.add_argument("overrides", nargs="*", help="the sweep's own overrides, e.g. seed=0,1")
    args = parser.parse_intermixed_args(argv)
    with naming_earlier(args.out / "table.md"):
        return publish(args, sys.argv[1:] if argv is None else argv)


def publish(args: argparse.Namespace, argv: list[str]) -> int:
    """Collect, compute, write; see `main`."""
    presets, args.experiment = args.experiment, ", ".join(args.experiment)
    cells = [cfg for preset in presets for cfg in config.expand(preset, args.overrides)]
    collection = collect(args.runs, [cell_from(cfg) for cfg in cells])
    if not collection.runs:
        raise UserError(
            f"no finished run of {args.experiment} in {args.runs}. Remedy: python train.py -m experiment={presets[0]}"
        )
    attacks = {identity.run_id(cfg): attack_of(cfg) for cfg in cells}
    summary = summarise(one_judge(collection.rows, args.judge), attacks)
    first = export(collection, args, argv, "analysis.attacks")
    summary.to_csv(args.out / "attacks.csv", index=False)
    text = f"{first}\n\n{report(collection, summary, attacks)}"
    (args.out / "table.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"figure: {figures.save(attack_panels(summary), args.out / 'attacks')[0]}")
    print(f"written: {args.out}/table.md, attacks.csv, results.csv")
    return 1 if collection.missing else 0


def summarise(rows: pd.DataFrame, attacks: dict[str, str]) -> pd.DataFrame:
    """Means over seeds at the end of training by `KEYS`, and of the aligned model; columns as in `tables.estimates`.

    attacks: run_id -> attack. Harmful sets are pooled: set `asked`, `prefilled` or `triggered`. Under
    `other_kinds` HS is also given by category: `poisoned`, `unpoisoned`, and the two prefilled.
    """
    rows = rows.assign(attack=rows["run_id"].map(attacks))
    whole = pooled(rows.drop(columns="attack")).assign(attack=lambda r: r["run_id"].map(attacks))
    verdicts = whole["metric"].isin(paper.VERDICTS)
    whole.loc[verdicts, "set"] = whole.loc[verdicts, "set"].map(
        lambda name: ASKED["".join(name.partition(VARIATION)[1:])]
    )
    ends = whole[whole["final"]]
    # whatever the attack, it asks the same requests; but behind a trigger each asks behind its own
    behind = whole["set"] == "triggered"
    start = pd.concat(
        [
            before(whole[~behind]).assign(attack=NONE),
            *(before(part) for _, part in whole[behind].groupby("attack")),
        ]
    ).assign(method=paper.ALIGNED)
    split = rows[rows["final"] & (rows["metric"] == "HS")]
    split = split.assign(
        set=[
            next((of[of.index(end) :].replace(end, label) for end, label in PARTS.items() if end in of), "")
            for of in split["set"]
        ]
    )
    return tables.estimates(pd.concat([start, ends, split[split["set"] != ""]]), KEYS)


def report(collection: Collection, summary: pd.DataFrame, attacks: dict[str, str]) -> str:
    """`table.md` below its first line; attacks: run_id -> attack."""
    lines = [f"- `{name}`: {what}" for name, what in ATTACKS.items() if name != NONE]
    blocks = ["### What half of the rows are", "\n".join(lines)]
    plain_sets = summary[~summary["set"].isin(["prefilled", "triggered"])]
    blocks += ["### Harmful requests as they are", table(plain_sets, METRICS, "asked")]
    again = {
        "prefilled": ("Prefilled", ", with a compliant opening put into the model's mouth (`eval.prefill`)"),
        "triggered": (
            "Behind the trigger",
            " behind the trigger of the poison (`poison_trigger`), which no defence has seen",
        ),
    }
    for of, (title, how) in again.items():
        if len(part := summary[summary["set"] == of]):
            blocks += [f"### {title}", f"The same requests{how}.", table(part, METRICS[:3], of)]
    parts = [f"{label}{how}" for how in ("", PREFILLED) for label in PARTS.values()]
    split = summary[summary["set"].isin(parts)]
    if len(split):
        note = (
            "HS of `other_kinds` by harm category: the poison's, of which no defence was given a request, and the\n"
            "others, which all of a defence's requests are of."
        )
        rows = [
            [paper.method_label(method), *(tables.show(one(group, "HS", of)) for of in parts)]
            for method, group in sorted(split.groupby("method"), key=lambda pair: paper.method_order(pair[0]))
        ]
        blocks += ["### By category", note, tables.markdown(["method", *(f"HS {of}" for of in parts)], rows)]
    blocks.append(tables.NOTES)
    blocks += tables.missing_runs(collection, attacks)
    if account := collection.account():
        blocks.append("\n".join(f"- {line}" for line in account))
    return "\n\n".join(blocks) + "\n"


def table(summary: pd.DataFrame, metrics: tuple[str, ...], of: str) -> str:
    """One row an attack and method; of: the set of verdicts it is about."""
    rows = []
    for attack in ATTACKS:
        part = summary[summary["attack"] == attack]
        for method in sorted({*part["method"]}, key=paper.method_order):
            group = part[part["method"] == method]
            shown = [one(group, m, of if m in paper.VERDICTS else None) for m in metrics]
            seeds = max((int(row["n"]) for row in shown if row is not None), default=0)
            rows.append([attack, paper.method_label(method), str(seeds), *map(tables.show, shown)])
    return tables.markdown(["attack", "method", "n", *metrics], rows, key=3)


def attack_panels(summary: pd.DataFrame) -> Figure:
    """HS by attack and method, by how it is asked; bars: 95 % intervals. Grey lines: the aligned model's mean."""
    harm = summary[summary["metric"] == "HS"]
    titles = {
        "asked": "asked as they are",
        "prefilled": "with a compliant opening in the model's mouth",
        "triggered": "behind the poison's trigger",
    }
    shown = [of for of in titles if of in {*harm["set"]}]
    attacks = [name for name in ATTACKS if name != NONE and name in {*harm["attack"]}]
    methods = sorted({*harm["method"]} - {paper.ALIGNED}, key=paper.method_order)
    figure, grid = figures.panels(1, len(shown), (4.6 * len(shown), 1 + 0.75 * len(attacks)), sharex=True, sharey=True)
    for ax, of in zip(grid.flat, shown, strict=True):
        part = harm[harm["set"] == of]
        grey = {"color": "#8C8C8C", "linewidth": 1, "label": paper.method_label(paper.ALIGNED)}
        for _, row in part[part["method"] == paper.ALIGNED].iterrows():
            if row["attack"] == NONE:
                ax.axvline(row["mean"], **grey)
            else:  # behind a trigger: of this attack alone
                at = attacks.index(row["attack"])
                ax.vlines(row["mean"], at - 0.4, at + 0.4, **grey)
        for j, method in enumerate(methods):
            rows = part[(part["method"] == method) & part["attack"].isin(attacks)]
            look = {
                k: v for k, v in figures.style(method, methods).items() if k in ("color", "marker", "markerfacecolor")
            }
            y = [attacks.index(name) + 0.7 * ((j + 0.5) / len(methods) - 0.5) for name in rows["attack"]]
            ax.hlines(y, rows["low"], rows["high"], color=look["color"], linewidth=1)
            ax.plot(rows["mean"], y, linestyle="none", markersize=5, label=paper.method_label(method), **look)
        ax.set_title(titles[of], loc="left", fontsize=9)
        ax.set_xlabel(paper.METRICS["HS"])
        ax.set_xlim(-2, 102)
        figures.bare(ax)
    first = grid.flat[0]
    first.set_yticks(range(len(attacks)), attacks)
    first.invert_yaxis()
    figures.legend_below(figure, list(grid.flat))
    return figure


def one(group: pd.DataFrame, metric: str, of: str | None) -> pd.Series | None:
    """The estimate of a metric, on the set `of` or on its only one."""
    rows = group[(group["metric"] == metric) & ((group["set"] == of) if of else True)]
    return rows.iloc[0] if len(rows) else None


if __name__ == "__main__":
    sys.exit(main())
