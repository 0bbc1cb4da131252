"""Runs that a table would take for one: which settings tell them apart, and what each command can do about it.

Two runs with equal model, task, harmful ratio, method and seed are no seeds of each other, so nothing averages them.
Every command that reads a folder of runs or an exported campaign asks here first; the error names the keys in which
they differ, their values, and remedies that exist for that command.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd
from omegaconf import DictConfig

from analysis import records
from analysis.collect import (
    Collection,
    collect,
    expected_cells,
    expected_configs,
    mixed,
    own_keys,
    read_exported,
    settings_of,
    split,
    text_of,
)
from cwac.core.errors import UserError
from cwac.core.identity import IDENTITY, NOT_IDENTITY

ROWS = "{by} makes a row of each value"
PRESET = "name the preset with --experiment"
FOLDERS = "keep them in folders of their own (paths.runs)"
MOST = 4
"""Keys that the error names."""


def add_by(parser: argparse.ArgumentParser) -> None:
    """The option `--by` of a command that reads runs."""
    parser.add_argument(
        "--by",
        action="append",
        default=[],
        metavar="KEY",
        help="a row for each value of this key, e.g. method.weight.energy; given as train.learning_rate=2e-5, that "
        "value keeps the method's plain name; may be given several times; without it, for each value of those keys of "
        "a method in which runs of one cell and seed differ",
    )


def by_setting(
    collection: Collection, runs: Path, by: Sequence[str], cells: Callable[[], Iterable[DictConfig]] = tuple
) -> tuple[Collection, list[str]]:
    """The campaign with a method for each value of the keys `by`, and these keys.

    Without any, they are those keys of a method in which runs of one cell and seed differ (`collect.own_keys`). cells:
    gives what `split` takes, where it is needed. Raises UserError where runs of one cell and seed still differ.
    """
    keys = list(by) or own_keys(collection, runs)
    collection = split(collection, runs, keys, cells()) if keys else collection
    refuse(collection, lambda name: settings_of(runs / name), [ROWS, PRESET, FOLDERS], keys)
    return collection, keys


def chosen(args: argparse.Namespace, export: Path | None, option: str, remedies: Sequence[str] = ()) -> Collection:
    """The campaign that a command line names, of the judge that it chooses: an export, or a folder's finished runs.

    args: its --runs, --experiment, --judge, overrides and, where it has that option, --by. export: the folder of
    `option`, None without it. remedies: what a command without --by can do about runs that it would take for one.
    Raises UserError where there is no finished run, and as `of_export`, `refuse_runs` and `by_setting` do.
    """
    if export:
        return of_export(export, option, args)
    collection = collect(args.runs, expected_cells(args.experiment, args.overrides) if args.experiment else None)
    if not collection.runs:
        raise UserError(
            f"no finished run in {args.runs}. Remedy: run the campaign first (make demo), or give {option}."
        )
    collection = collection.of_judge(args.judge)
    if remedies:
        refuse_runs(collection, args.runs, remedies)
        return collection
    split_up, _ = by_setting(
        collection,
        args.runs,
        args.by,
        lambda: expected_configs(args.experiment, args.overrides) if args.experiment else [],
    )
    return split_up


def of_export(folder: Path, option: str, args: argparse.Namespace) -> Collection:
    """The exported campaign that a command line names, of the judge that it chooses.

    option: how the command is given it. args: its other options; raises UserError for one that only runs have, and as
    `exported` does.
    """
    if args.experiment or args.overrides:
        named = "--experiment" if args.experiment else args.overrides[0]
        raise UserError(f"{named} is for --runs. Remedy: leave it out; an exported campaign knows its own grid.")
    if getattr(args, "by", None):
        raise UserError(
            "--by is for --runs. Remedy: leave it out, or export the campaign with it (python -m analysis.demo)."
        )
    return exported(folder, f"{option} FOLDER").of_judge(args.judge)


def read(folder: Path, by_rate: bool = True) -> Collection:
    """A folder of runs or an exported campaign, for a command that takes either and has no `--by`.

    by_rate: whether the command keeps runs at several learning rates apart. Raises UserError where runs differ in
    another way.
    """
    if (folder / "results.csv").is_file():
        return exported(folder, "FOLDER", by_rate)
    collection = collect(folder)
    refuse_runs(collection, folder, [exporting(folder, f"FOLDER here in place of {folder}"), FOLDERS], by_rate)
    return collection


def refuse_runs(collection: Collection, runs: Path, remedies: Sequence[str], by_rate: bool = True) -> None:
    """`refuse` for the runs of a folder."""
    refuse(collection, lambda name: settings_of(runs / name), remedies, by_rate=by_rate)


def exporting(runs: Path, then: str) -> str:
    """The remedy of a command without `--by`: an export of the same runs that has it."""
    return f"python -m analysis.demo --runs {runs} {{by}} --out FOLDER makes a row of each value, then {then}"


def exported(folder: Path, then: str, by_rate: bool = True) -> Collection:
    """An exported campaign; raises UserError where it holds runs that differ in an unnamed setting.

    then: how the command is given the new export that the remedy makes.
    """
    collection, known = read_exported(folder), records.read_exported(folder / records.NAME)
    rates = collection.rows.drop_duplicates("run_id").set_index("run_id")["learning_rate"]

    def settings(name: str) -> dict:
        told = {} if pd.isna(rates[name]) else {"train.learning_rate": float(rates[name])}
        return told | (known[name].settings if name in known else {})

    remedy = f"python -m analysis.restore {folder} --runs NEW, then {exporting(Path('NEW'), f'{then} here')}"
    refuse(collection, settings, [remedy], by_rate=by_rate)
    return collection


def refuse(
    collection: Collection,
    settings: Callable[[str], Mapping],
    remedies: Sequence[str],
    by: Sequence[str] = (),
    by_rate: bool = True,
) -> None:
    """Raises UserError where runs of one cell and seed differ in a setting; settings, by_rate: as `mixed` takes them.

    remedies: each may hold `{by}`, for which the options stand that tell the runs apart, or `{one}`, the overrides of
    one value of each key; such a remedy is left out where no key is known. by: the keys that were given.
    """
    ids, differing = mixed(collection, settings, by_rate)
    if not ids:
        return
    weights = [k for k in differing if k.partition(".")[0] in IDENTITY and k not in NOT_IDENTITY]
    keys = weights or list(differing)  # what only an evaluation reads made no run of its own
    shown = keys[:MOST]
    told = ", ".join(f"{key} ({', '.join(map(value, differing[key]))})" for key in shown)
    told += f" and {len(keys) - MOST} more keys" * (len(keys) > MOST)
    options = " ".join(f"--by {key}" for key in [*by, *shown])
    one = " ".join(f"{key}={next(value(v) for v in differing[key] if v is not None)}" for key in shown)
    fitting = [r for r in remedies if shown or not ("{by}" in r or "{one}" in r)]
    remedy = "; or ".join(r.replace("{by}", options).replace("{one}", one) for r in fitting) or FOLDERS
    raise UserError(
        f"these runs differ in {told or 'their settings'}, but not in model, task, ratio, method and seed: "
        f"{', '.join(ids)}. Remedy: {remedy}."
    )


def value(of: object) -> str:
    return "not set" if of is None else text_of(of)
