"""An exported campaign as run folders again, so that its grid goes on elsewhere, without the runs it has.

python -m analysis.restore results/NAME --runs runs

A sweep skips a restored run as it skips any finished one, and every table and figure reads it. Of a run's folder come
back its metric rows, verdicts, settings, drift and provenance; its answers, loss log and weights were never exported,
so it cannot be evaluated or judged again.
"""

import json
import sys
from pathlib import Path

import pandas as pd
import yaml
from omegaconf import OmegaConf

from analysis import records
from analysis.collect import read_exported
from cwac.core.config import Parser, about, command
from cwac.core.errors import UserError
from cwac.core.files import write_atomic
from cwac.core.jsonl import write_jsonl
from cwac.core.run_dir import GUARD_SLACK


def status_of(rows: pd.DataFrame, source: str) -> dict:
    """What `status.json` said of a run with these rows; `source` is where they come from."""
    measured = rows[rows["eval"] != ""]
    end = rows[rows["final"]]
    excess = rows.loc[rows["metric"] == "weight_leak_excess", "value"]
    return {
        "status": "done",
        "run_id": rows["run_id"].iloc[0],
        "evaluations": {name: sorted(set(of["epoch"])) for name, of in measured.groupby("eval")},
        "step": int(end["step"].max()),
        "epoch": float(end["epoch"].max()),
        "guard": bool((excess <= GUARD_SLACK).all()) if len(excess) else None,
        "rows": len(rows),
        "finished": float(rows["time"].max()),
        "source": source,
    }


def config_of(first: pd.Series, settings: dict) -> dict:
    """The keys of a run's `config.yaml` that its rows and its record's settings tell; whole ratios as the presets
    write them."""
    named = {key: {"name": first[key]} for key in ("model", "task", "method")}
    rate = {} if pd.isna(first["learning_rate"]) else {"train": {"learning_rate": float(first["learning_rate"])}}
    ratio = float(first["harmful_ratio"])
    cell = {"harmful_ratio": int(ratio) if ratio.is_integer() else ratio, "seed": int(first["seed"])}
    told = OmegaConf.create({**named, **cell, **rate, "values": first["values"]})
    for key, value in settings.items():
        OmegaConf.update(told, key, value, merge=True)
    return OmegaConf.to_container(told)


def restore(folder: Path, runs: Path) -> tuple[list[str], list[str], list[str]]:
    """Write a folder below `runs` for each finished run of a campaign; returns the ids written and
    those left alone, and what the campaign lacked when it was exported.

    folder: as `analysis.demo` writes it. A run with a status already, whatever it is, is left alone. Raises UserError
    where the campaign cannot be read, or names a run by what is no name of a folder.
    """
    collection, records_by_run = read_exported(folder), records.read_exported(folder / records.NAME)
    written, already_there = [], []
    for name, rows in collection.rows.groupby("run_id", sort=False):
        target = runs / name
        if target.parent != runs or name.startswith("."):
            raise UserError(f"{folder}/results.csv has the run_id {name!r}, which is no name of a run's folder.")
        if (target / "status.json").exists():
            already_there.append(name)
            continue
        target.mkdir(parents=True, exist_ok=True)
        record = records_by_run.get(name)
        config = config_of(rows.iloc[0], record.settings if record else {})
        write_atomic(target / "config.yaml", yaml.safe_dump(config))
        if record:
            write_record(record, target)
        verdicts = collection.verdicts[collection.verdicts["run_id"] == name]
        for (of, judge), some in verdicts.groupby(["set", "judge"], sort=False):
            (end, *_) = rows[rows["final"] & (rows["set"] == of) & (rows["judge"] == judge)].itertuples()
            path = target / "judge" / judge / f"{of}@{end.step:g}-{end.eval}.jsonl"
            write_jsonl(path, some[["id", "verdict", "judge"]].to_dict("records"))
        plain = [{k: None if pd.isna(v) else v for k, v in row.items()} for row in rows.to_dict("records")]
        write_jsonl(target / "metrics.jsonl", plain)
        write_atomic(target / "status.json", json.dumps(status_of(rows, str(folder)), indent=1))
        written.append(name)
    return written, already_there, collection.account()


def write_record(record: records.Record, target: Path) -> None:
    """The files from which `analysis.records.read` makes this record again."""
    env = {key: getattr(record, key) for key in ("method_code", "python", "platform", "packages")}
    env |= {"git_commit": record.commit, "git_dirty": record.dirty}
    files = {
        "env.json": env,
        "data.json": {
            key: {name: {"sha256": digest} for name, digest in of.items()}
            for key, of in (("pools", record.pools), ("datasets", record.datasets))
        },
        "drift.json": {"heldout": {"activation": [[value] for value in record.drift]}},
        records.DECOMPOSITION: {"matrices": record.decomposition},
    }
    for name, content in files.items():
        write_atomic(target / name, json.dumps(content))


@command
def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0, or 2 for bad input."""
    parser = Parser(**about(__doc__, "python -m analysis.restore"))
    parser.add_argument("campaign", type=Path, help="an exported campaign, such as results/demo")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where to write the run folders (runs)")
    args = parser.parse_args(argv)
    written, already_there, left_out = restore(args.campaign, args.runs)
    print(f"{len(written)} runs of {args.campaign} written to {args.runs}; {len(already_there)} were there already")
    for line in left_out:
        print(f"left out when it was exported: {line}")
    judges = json.loads((args.campaign / "provenance.json").read_text()).get("judges") or []
    if len(judges) == 1:
        print(f"its verdicts are of the judge {judges[0]}: a sweep goes on with it by eval/judge={judges[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
