"""The closing step of a search: its runs to a log, and the chosen values to the yaml that `values=tuned` uses.

python -m analysis.tuning --experiment tune_cwac --runs runs
"""

import argparse
import sys
from pathlib import Path

import pandas as pd
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from analysis.collect import Collection, cell_from, collect
from cwac.core import config, identity, metrics, paths
from cwac.core.errors import UserError
from cwac.core.keys import explain

SHOWN = ("HS", "other", "FA", "OR")


@config.command
def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0, 1 if a run is missing (nothing is chosen then), 2 for bad input."""
    parser = config.Parser(**config.about(__doc__, "python -m analysis.tuning"))
    parser.add_argument("--experiment", required=True, help="a search of conf/experiment/, e.g. tune_cwac")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the run directories (runs)")
    parser.add_argument("--out", type=Path, default=Path("results/tuning"), help="folder of the logs (results/tuning)")
    parser.add_argument("--conf", type=Path, default=paths.CONF, help="configuration folder to write to (conf)")
    parser.add_argument("overrides", nargs="*", help="the search's own overrides, e.g. model=smollm2 task=sst2 seed=3")
    args = parser.parse_intermixed_args(argv)
    try:
        return log_and_choose(args)
    except (HydraException, OmegaConfBaseException) as error:
        print(
            f"error: experiment={args.experiment} does not compose: {explain(str(error)).splitlines()[0]}",
            file=sys.stderr,
        )
        return 2
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def log_and_choose(args: argparse.Namespace) -> int:
    """Read the runs, print, write; see `main`."""
    cells = config.expand(args.experiment, args.overrides)
    values = tried(cells)
    found = collect(args.runs, map(cell_from, cells))
    missing = [cell for cell in found.missing if found.unfinished.get(cell.run_id) != "failed"]
    if missing:
        for cell in missing:
            print(f"missing: {cell}  ({cell.run_id})")
        print(f"error: {len(missing)} of {len(cells)} runs are missing; nothing is chosen", file=sys.stderr)
        return 1
    log = trials(cells, values, found)
    means = choose(log, values, official(cells[0], values))
    model, method = cells[0].model.name, cells[0].method.name
    path = args.out / model / f"{method}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    best = int(means.loc[means["chosen"], "trial"].iloc[0])
    log.assign(chosen=log["trial"] == best).to_csv(path, index=False)
    print(means.to_string(index=False))
    if not all(key.startswith("method.") for key in values[0]):  # what all presets share is no value of one method
        overrides = " ".join(f"{key}={value}" for key, value in values[best - 1].items())
        print(f"log: {path}\nchosen: {overrides}, to be given on the command line")
        return 0
    target = args.conf / "chosen" / "tuned" / f"{model}_{method}.yaml"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(as_yaml(values[best - 1], len(values), sorted(set(log["seed"])), path), encoding="utf-8")
    print(f"log: {path}\nchosen: {target}")
    return 0


def values_of(cfg: DictConfig, keys: list[str]) -> dict:
    """The keys' values in one cell, as plain Python."""
    flat = identity.flatten(OmegaConf.to_container(cfg, resolve=True))
    return {key: flat[key] for key in keys}


def tried(cells: list[DictConfig]) -> list[dict]:
    """The values a search tries, each a mapping of `method.` keys, or of `train.` keys where it varies none of these.

    In the search's order. Raises UserError where its cells differ in something else than these and the seed, or try
    one value only.
    """
    identities = [identity.identity(cfg) for cfg in cells]
    varied = sorted(k for k in identities[0] if len({str(flat.get(k)) for flat in identities}) > 1)
    keys = [k for k in varied if k.startswith("method.")] or [k for k in varied if k.startswith("train.")]
    if other := sorted(set(varied) - {*keys, "seed", "model.base_seed", "origin"}):
        raise UserError(
            f"this search varies {', '.join(other)}. Remedy: vary keys of the method or of train, and the seed."
        )
    values: list[dict] = []
    for cfg in cells:
        if (value := values_of(cfg, keys)) not in values:
            values.append(value)
    if len(values) < 2:
        raise UserError("this search tries one value only. Remedy: leave its sweep as it is.")
    return values


def official(cfg: DictConfig, values: list[dict]) -> dict:
    """The values of the method's own yaml on this model, of the keys that were searched."""
    usual = config.compose([f"model={cfg.model.name}", f"task={cfg.task.name}", f"method={cfg.method.name}"])
    return values_of(usual, list(values[0]))


def trials(cells: list[DictConfig], values: list[dict], collection: Collection) -> pd.DataFrame:
    """One row a run of the search, in its order: the values tried, the seed, means over validation sets, objective.

    `trial` numbers the values from 1; `status` is `done` or `failed`, and a failed run has no numbers.
    """
    judges = ["", *{cfg.eval.judge.name for cfg in cells}]  # not a judge that came later (experiments/judge.py)
    rows = collection.rows[collection.rows["judge"].isin(judges)]
    log = []
    for cfg in cells:
        name, value = identity.run_id(cfg), values_of(cfg, list(values[0]))
        end = rows[(rows["run_id"] == name) & rows["final"]]
        log.append(
            {
                "trial": values.index(value) + 1,
                **value,
                "seed": int(cfg.seed),
                **{m: end.loc[end["metric"] == m, "value"].mean() for m in SHOWN},
                "objective": metrics.objective(cfg.objective, end.to_dict("records")),
                "status": collection.unfinished.get(name, "done"),
                "split": cfg.eval.split,
                "task": cfg.task.name,
                "harmful_ratio": float(cfg.harmful_ratio),
                "run_id": name,
            }
        )
    return pd.DataFrame(log).astype({"objective": float})


def choose(log: pd.DataFrame, values: list[dict], usual: dict) -> pd.DataFrame:
    """Means over seeds, one row a value, `chosen` where the mean objective is smallest.

    A value that failed at a seed is not eligible. Among equals the official value (`usual`) stays, then the first
    tried. Raises UserError if no value is eligible.
    """
    means = log.groupby("trial")[[*SHOWN, "objective"]].agg(lambda column: column.mean(skipna=False)).reset_index()
    means.insert(1, "value", [", ".join(f"{k}={v}" for k, v in values[t - 1].items()) for t in means["trial"]])
    means["official"] = [values[t - 1] == usual for t in means["trial"]]
    eligible = means.dropna(subset="objective")
    if eligible.empty:
        raise UserError(
            "every value failed at a seed or lacks a metric of `objective`. Remedy: see the runs' train.log."
        )
    best = eligible[eligible["objective"] <= eligible["objective"].min() + 1e-9]
    means["chosen"] = means.index == best.sort_values("official", ascending=False, kind="stable").index[0]
    return means


def as_yaml(chosen: dict, n: int, seeds: list[int], log: Path) -> str:
    """The option of the group `chosen` that lays these values over the method."""
    option = OmegaConf.create({"values": "tuned"})
    for key, value in chosen.items():
        OmegaConf.update(option, key, value)
    over = ", ".join(map(str, seeds))
    return (
        "# @package _global_\n"
        f"# ours: of {n} values, the best mean objective over seeds {over} on validation prompts\n"
        f"# log: {log.as_posix()}\n{OmegaConf.to_yaml(option)}"
    )


if __name__ == "__main__":
    sys.exit(main())
