"""The closing step of `make demo`: a campaign's runs to a table, figures and a record of where they come from.

python -m analysis.demo --experiment demo --runs runs --out results/demo
python -m analysis.demo --exported results/demo

The second makes the tables and figures of a campaign again from the rows that were exported, without its runs. Its
rows, records and provenance stay as they are.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import shlex
import sys
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import pandas as pd

from analysis import apart, figures, labels, paper, paper_figures, records, tables
from analysis.collect import (
    VERDICTS,
    Collection,
    collect,
    expected_cells,
    expected_configs,
    methods_of,
    one_judge,
    swept,
)
from analysis.headline import sentence, views
from cwac.core.config import Parser, about, command
from cwac.core.environment import PACKAGES, git, installed
from cwac.core.errors import STARTED_AS, UserError, as_typed, naming_earlier

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = (*PACKAGES, "pandas", "scipy", "matplotlib")
"""Distributions whose versions a freeze records."""


@command
def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0, 1 if expected runs are missing, 2 for bad input."""
    parser = Parser(**about(__doc__, "python -m analysis.demo"))
    parser.add_argument("--runs", type=Path, help="folder of the run directories (runs)")
    parser.add_argument("--experiment", help="preset whose runs are expected; without it, every finished run counts")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, help="folder for the results, e.g. results/demo")
    where.add_argument("--exported", type=Path, help="an exported campaign whose tables and figures are made again")
    apart.add_by(parser)
    parser.add_argument("--judge", help="whose verdicts to use where the runs were judged by several")
    parser.add_argument(
        "--readme", type=Path, help="also fill this file's <!-- results:NAME --> block (NAME of --out)"
    )
    parser.add_argument("overrides", nargs="*", help="the sweep's own overrides of the preset, e.g. seed=0,1")
    args = parser.parse_intermixed_args(argv)
    with naming_earlier((args.exported or args.out) / "table.md"):
        if args.exported:
            return remake(args)
        args.runs = args.runs or Path("runs")
        return publish(args, argv if argv is not None else sys.argv[1:])


def publish(args: argparse.Namespace, argv: list[str]) -> int:
    """Collect, print, write; see `main`."""
    collection = collect(args.runs, expected_cells(args.experiment, args.overrides) if args.experiment else None)
    if not collection.runs:
        for cell in collection.missing:
            print(f"missing: {cell}  ({cell.run_id})")
        for line in collection.account():
            print(line)
        raise UserError(f"no finished run in {args.runs}. Remedy: run the campaign first (make demo).")
    collection, args.by = apart.by_setting(
        collection.of_judge(args.judge),
        args.runs,
        args.by,
        lambda: expected_configs(args.experiment, args.overrides) if args.experiment else [],
    )
    if args.readme and swept(collection.rows):
        raise UserError("--readme takes a campaign at one learning rate. Remedy: leave it out, or give one rate.")
    summary, text = tabulate(collection, args.judge)
    first = export(collection, args, argv)
    export_verdicts(collection, args.out)
    methods = methods_of(collection.rows)
    found = records.read_all(args.runs, collection.runs)
    found = {name: replace(record, method=methods[name]) for name, record in found.items()}
    records.export(found, args.out / records.NAME)
    drawn = write(collection, summary, f"{first}\n\n{text}", args.out, args.judge)
    print(f"{first}\n\n{tables.report(collection, summary)}")
    if args.readme:
        overview = f"{first}\n\n{tables.overview(collection, summary)}"
        fill(args.readme, args.out, overview, [path for path in drawn if path.name.startswith("ratio")])
    print(f"with differences, costs and data: {args.out}/table.md")
    for path in drawn:
        if path.suffix == ".png":
            print(f"figure: {path}")
    print(f"\n{ending(collection, args)}")
    return 1 if collection.missing else 0


def ending(collection: Collection, args: argparse.Namespace) -> str:
    """The last sentences: what came out in the cell with most methods, where it is, and the command of its page."""
    found = max(views(collection, args.judge), key=lambda view: len(view.methods), default=None)
    out = f"{sentence(found)} " if found else ""
    gone = f", {len(collection.missing)} expected ones missing" if collection.missing else ""
    return (
        f"{out}The table and figures of {len(collection.runs)} runs{gone} are in {args.out}. "
        f"Next: {page_command(args)}, one page of what came out, with figures, coverage, costs and answers."
    )


def page_command(args: argparse.Namespace) -> str:
    """The command that makes a page of these runs: `make report` where that reads the same ones."""
    whole = args.experiment in (None, "demo") and not args.overrides  # what `make demo` runs, or all that is there
    plain = args.runs == Path("runs") and not (args.by or args.judge) and STARTED_AS not in os.environ
    if plain and whole and Path.cwd() == ROOT and (ROOT / "Makefile").is_file():
        return "make report"
    by = [word for key in args.by for word in ("--by", key)]
    judge = ["--judge", args.judge] if args.judge else []
    page = str(args.out / "report.html")
    preset = ["--experiment", args.experiment] if args.experiment else []
    words = ["python", "-m", "analysis.report", "--runs", str(args.runs), *preset, *by, *judge, "--out", page]
    words += args.overrides
    return as_typed(shlex.join(words))


def remake(args: argparse.Namespace) -> int:
    """Tables and figures of an exported campaign from its own rows; see `main`."""
    if given := [f"--{name}" for name in ("runs", "readme") if getattr(args, name)]:
        raise UserError(f"{given[0]} is for --out. Remedy: leave it out; --exported has rows of its own.")
    collection = apart.of_export(args.exported, "--exported", args)
    record = records.read_json(args.exported / "provenance.json")
    if not record:
        raise UserError(f"{args.exported} holds no readable provenance.json. Remedy: export it from its runs (--out).")
    summary, text = tabulate(collection, args.judge)
    write(collection, summary, f"{headline(record)}\n\n{text}", args.exported, args.judge)
    print(f"made again: {args.exported}/summary.csv, table.md and figures")
    return 0


def tabulate(collection: Collection, judge: str | None) -> tuple[pd.DataFrame, str]:
    """A campaign's summary, and the text of its `table.md` below the first line."""
    summary, difference = tables.summarise(collection, judge), tables.differences(collection, judge=judge)
    return summary, tables.report(collection, summary, difference, judge)


def write(collection: Collection, summary: pd.DataFrame, text: str, out: Path, judge: str | None) -> list[Path]:
    """Write `summary.csv`, `table.md` and the figures of a campaign; returns the figures' files."""
    summary.to_csv(out / "summary.csv", index=False)
    (out / "table.md").write_text(text, encoding="utf-8")
    return draw(collection, summary, out, judge)


def draw(collection: Collection, summary: pd.DataFrame, out: Path, judge: str | None) -> list[Path]:
    """HS against the ratio and against training, every model, task and set of harmful prompts; returns the files.

    Of a sweep over the learning rate: against the rate alone, which the other figures would mix.
    """
    rows = one_judge(collection.rows, judge)
    trained = summary[(summary["metric"] == "HS") & (summary["method"] != paper.ALIGNED)]
    grids = sorted({*zip(trained["model"], trained["task"], trained["set"], strict=True)})
    written = []
    for model, task, of in grids:
        # One grid needs no long name; the demo's figure is `ratio.png`.
        suffix = f"-{model}-{task}-{of}" if len(grids) > 1 else ""
        if swept(rows):
            plates = paper_figures.figure3(rows, model, task, of)
        else:
            plates = figures.against_ratio(summary, model, task, of) + figures.against_training(rows, model, task, of)
        for plate in plates:
            written += figures.save(plate.figure, out / f"{plate.name}{suffix}")
    return written


def export(collection: Collection, args: argparse.Namespace, argv: list[str], module: str = "analysis.demo") -> str:
    """Write `results.csv`, every row, and `provenance.json` to args.out; returns the line that tables open with."""
    args.out.mkdir(parents=True, exist_ok=True)
    collection.rows.to_csv(args.out / "results.csv", index=False)
    record = provenance(collection, args, argv, module)
    (args.out / "provenance.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return headline(record)


def export_verdicts(collection: Collection, out: Path) -> None:
    """Write `verdicts.csv.gz` where there are verdicts, without a time stamp: the same runs give the same bytes."""
    if len(collection.verdicts):
        collection.verdicts.to_csv(out / VERDICTS, index=False, compression={"method": "gzip", "mtime": 0})


def provenance(collection: Collection, args: argparse.Namespace, argv: list[str], module: str) -> dict:
    """Where the numbers come from: commit, versions, seeds, the command, the date, and the runs' own records."""
    rows = collection.rows
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": f"python -m {module} " + shlex.join(argv),
        "experiment": args.experiment,
        "git": git_state(),
        "runs_git": sorted({commit for run in collection.runs if (commit := run_commit(args.runs / run))}),
        "by": by_keys(collection, args) if getattr(args, "by", None) else None,
        "imported": {run: source for run in collection.runs if (source := imported_from(args.runs / run))},
        "python": platform.python_version(),
        "machine": platform.platform(),
        "versions": installed(VERSIONS),
        "seeds": sorted(int(s) for s in rows["seed"].dropna().unique()),
        "judges": (judges := sorted(set(rows["judge"]) - {""})),
        # of real models' answers: what is known of a judge's verdicts on them says nothing of tiny's grammar
        "agreement": {j: a for j, a in labels.agreements().items() if j in judges and set(rows["model"]) != {"tiny"}},
        "runs": collection.runs,
        "missing": [cell.run_id for cell in collection.missing],
        "left_out": collection.account(),
        "results_sha256": hashlib.sha256((args.out / "results.csv").read_bytes()).hexdigest(),
    }


def by_keys(collection: Collection, args: argparse.Namespace) -> dict:
    """The keys that made methods of their own, and what the missing runs would have been; the others' rows tell."""
    return {"keys": args.by, "missing": {cell.run_id: cell.method for cell in collection.missing}}


def git_state() -> dict:
    """{"commit", "dirty"} of the checkout, less `results/`, where an export has just written; None outside of one."""
    here = ("-C", str(ROOT))
    commit = git(*here, "rev-parse", "HEAD")
    changed = git(*here, "status", "--porcelain", "--", ".", ":!results")
    return {"commit": commit, "dirty": None if commit is None else bool(changed)}


def run_commit(folder: Path) -> str | None:
    """The commit that a run's `env.json` names, `+dirty` where it had uncommitted changes; None if it names none."""
    env = records.read_json(folder / "env.json")
    return f"{env['git_commit']}{'+dirty' * bool(env.get('git_dirty'))}" if env.get("git_commit") else None


def imported_from(folder: Path) -> str | None:
    """What a run's folder was made from, if not by training here (`analysis.restore`, `import_wandb`); else None."""
    return records.read_json(folder / "status.json").get("source")


def headline(record: dict) -> str:
    """One line that says what a table rests on."""
    commit = record["git"]["commit"]
    dirty = " with uncommitted changes" if record["git"]["dirty"] else ""
    return (
        f"{len(record['runs'])} runs, seeds {', '.join(map(str, record['seeds']))}, "
        f"judge {labels.named(record['judges'], record.get('agreement', {}))}; {record['date'][:10]}, "
        f"commit {commit[:10] + dirty if commit else 'unknown'}."
    )


def fill(readme: Path, out: Path, text: str, drawn: list[Path]) -> None:
    """Replace what stands between `<!-- results:NAME -->` and `<!-- /results:NAME -->`, NAME being `out`'s.

    Raises UserError if the file has no such block.
    """
    name = out.name
    pattern = re.compile(rf"(<!-- results:{re.escape(name)} -->).*?(<!-- /results:{re.escape(name)} -->)", re.S)
    old = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    if not pattern.search(old):
        raise UserError(f"--readme {readme} has no block <!-- results:{name} --> ... <!-- /results:{name} -->.")
    base = readme.resolve().parent
    pictures = []
    for path in (p.resolve() for p in drawn if p.suffix == ".png"):
        link = path.relative_to(base) if path.is_relative_to(base) else path
        pictures.append(f"![{path.stem} of the {name} campaign]({link.as_posix()})")
    body = "\n\n".join([text.strip(), *pictures])
    readme.write_text(pattern.sub(lambda m: f"{m[1]}\n{body}\n{m[2]}", old), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
