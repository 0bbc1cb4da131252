"""Read finished runs back into one table of metric rows.

A row is one measured number (`design` of the run directory: `cwac/core/run_dir.py`): run_id, model, method,
task, harmful_ratio, seed, values, epoch, step, final, metric, set, value, n, stderr, judge, eval, time; and the run's
learning_rate, from its `config.yaml`, by which the runs of a sweep over it differ.
Only runs whose `status.json` says `done` count; what is skipped is counted and named, never silent.
"""

import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd
import yaml
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from analysis.paper import PROPORTIONS, SETTING
from analysis.paper import VERDICTS as VERDICT_METRICS
from cwac.core.config import DIGITS, expand
from cwac.core.errors import UserError
from cwac.core.files import LOADER
from cwac.core.identity import eval_id, flatten, run_id
from cwac.core.jsonl import from_line
from cwac.core.keys import explain
from cwac.core.method_code import THEN
from cwac.core.metrics import VARIATION
from cwac.core.run_dir import is_held

COLUMNS = [
    "run_id",
    "model",
    "method",
    "task",
    "harmful_ratio",
    "seed",
    "values",
    "epoch",
    "step",
    "final",
    "metric",
    "set",
    "value",
    "n",
    "stderr",
    "judge",
    "eval",
    "time",
    "learning_rate",
]
LATER = ("learning_rate", "values")
"""Columns that older exported campaigns lack, since they were added later; their values are NaN there."""
VERDICTS = "verdicts.csv.gz"
VERDICT_COLUMNS = ["run_id", "set", "judge", "id", "verdict"]
# Two rows with equal identity measure the same thing; a run never writes such a pair by design.
IDENTITY = ["run_id", "epoch", "step", "metric", "set", "judge", "eval"]


@dataclass(frozen=True)
class Cell:
    """One run that a preset asks for."""

    run_id: str
    model: str
    method: str
    task: str
    harmful_ratio: float
    seed: int
    eval: str = ""
    """Id of the evaluation settings the preset asks for; empty accepts any."""
    values: str = ""
    """Whether the method's keys are `official` or `tuned`; empty leaves what the run's rows say."""

    def __str__(self) -> str:
        method = f"{self.method} values=tuned" if self.values == "tuned" else self.method
        return f"model={self.model} task={self.task} method={method} p={self.harmful_ratio:g} seed={self.seed}"


@dataclass
class Collection:
    """Metric rows and an account of what was left out."""

    rows: pd.DataFrame
    """Columns: `COLUMNS`. One row per measured number, in the order of runs and lines."""
    runs: list[str] = field(default_factory=list)
    """Ids of the runs that are done and were read."""
    unfinished: dict[str, str] = field(default_factory=dict)
    """run_id -> status, for the directories whose run is not done."""
    unreadable: dict[str, int] = field(default_factory=dict)
    """run_id -> number of lines that are damaged or gone: a half-written last line after a crash, a flipped bit."""
    duplicates: int = 0
    """Rows replaced by a later row of the same identity."""
    expected: list[Cell] = field(default_factory=list)
    """The cells of the preset; empty where no preset was named."""
    leaking: list[str] = field(default_factory=list)
    """Ids of the runs whose guard found a weight constraint broken (`Evaluator.drift`)."""
    verdicts: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=VERDICT_COLUMNS))
    """The judge's verdict on each answer to a harmful request at the end of training; columns `VERDICT_COLUMNS`."""
    notes: list[str] = field(default_factory=list)
    """What was left out when an exported campaign was collected, as its export recorded it."""

    @property
    def missing(self) -> list[Cell]:
        """Expected cells without a finished run."""
        done = set(self.runs)
        return [cell for cell in self.expected if cell.run_id not in done]

    def of_judge(self, judge: str | None) -> "Collection":
        """Without the runs that only other judges read, which a note counts; as it is without such a choice."""
        by = self.rows[self.rows["judge"] != ""].groupby("run_id")["judge"].agg(set)
        others = {run: judges for run, judges in by.items() if judge not in judges}
        if judge is None or not others or len(others) == len(by):
            return self
        whose = ", ".join(sorted(set().union(*others.values())))
        return replace(
            self,
            rows=self.rows[~self.rows["run_id"].isin(others)],
            runs=[run for run in self.runs if run not in others],
            verdicts=self.verdicts[~self.verdicts["run_id"].isin(others)],
            expected=[cell for cell in self.expected if cell.run_id not in others],
            leaking=[run for run in self.leaking if run not in others],
            unreadable={run: n for run, n in self.unreadable.items() if run not in others},
            notes=[*self.notes, f"{len(others)} run(s) judged by {whose} alone are left out"],
        )

    def account(self) -> list[str]:
        """Warnings that a reader must know before trusting the rows, one line each; empty if there are none."""
        lines = list(self.notes)
        if self.duplicates:
            lines.append(f"{self.duplicates} duplicate rows (the last one of each was kept)")
        for name, count in self.unreadable.items():
            lines.append(f"{name}: {count} unreadable or lost line(s) in metrics.jsonl")
        for method, names in itertools.groupby(sorted(self.leaking, key=method_of), method_of):
            first, *more = names
            lines.append(
                f"{method}: {1 + len(more)} run(s) leak more than the weight constraint allows, first {first} "
                "(weight_leak_excess)"
            )
        wanted = {cell.run_id for cell in self.expected}
        for name, status in self.unfinished.items():
            if not wanted or name in wanted:
                lines.append(f"{name}: not read, its status is {status}")
        return lines


def read_status(folder: Path, evaluation: str = "") -> tuple[str, dict]:
    """`done`, or why the run in this directory does not count; and what its `status.json` says.

    evaluation: id of the evaluation settings it must have been evaluated with; empty accepts any.
    """
    try:
        content = json.loads((folder / "status.json").read_text(encoding="utf-8"))
        status, owner = str(content["status"]), content.get("run_id", folder.name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "unknown (no readable status.json)", {}
    if status == "running" and not is_held(folder):
        status = "running, but its process has gone: the same command goes on from its last checkpoint"
    if owner != folder.name:
        status = "set aside by force=true"
    elif status == "done" and evaluation and evaluation not in content.get("evaluations", []):
        status = "done, but not with this preset's evaluation settings"
    return status, content


def read_rows(path: Path) -> tuple[list[dict], int]:
    """The rows of one `metrics.jsonl` and the number of damaged lines; reads line by line."""
    rows, bad = [], 0
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                row = from_line(line)
            except ValueError:
                bad += 1
                continue
            if "metric" in row:
                rows.append(row)
            else:
                bad += 1
    return rows, bad


def cell_from(cfg: DictConfig) -> Cell:
    """The run that a composed configuration asks for."""
    return Cell(
        run_id=run_id(cfg),
        model=cfg.model.name,
        method=cfg.method.name,
        task=cfg.task.name,
        harmful_ratio=float(cfg.harmful_ratio),
        seed=int(cfg.seed),
        eval=eval_id(cfg),
        values=cfg["values"],
    )


def expected_configs(preset: str, overrides: list[str] | None = None) -> list[DictConfig]:
    """The configurations of the runs that `train.py -m experiment=<preset> <overrides>` makes, in its order.

    Raises UserError if there is no such preset or an override does not fit.
    """
    try:
        return expand(preset, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        first = explain(str(error)).split("\n")[0].rstrip(".")
        raise UserError(
            f"experiment={preset} does not compose: {first}. Remedy: a preset of conf/experiment/, "
            "with the overrides its sweep was started with."
        ) from error


def expected_cells(preset: str, overrides: list[str] | None = None) -> list[Cell]:
    """The cells of `expected_configs`."""
    return [cell_from(cfg) for cfg in expected_configs(preset, overrides)]


def collect(runs: Path | str, expected: Iterable[Cell] | None = None) -> Collection:
    """All rows of the finished runs below `runs`; of the expected ones only, where a preset's cells are given.

    Raises UserError if `runs` is not a folder.
    """
    runs = Path(runs)
    if not runs.is_dir():
        raise UserError(f"--runs {runs} is not a folder. Remedy: run the campaign first, or name its runs folder.")
    cells = list(expected or [])
    evaluations = {cell.run_id: cell.eval for cell in cells}
    # a search may choose the official value: then one run serves both, and the preset knows which is meant
    values = {cell.run_id: {"values": cell.values} if cell.values else {} for cell in cells}
    folders = (
        [runs / cell.run_id for cell in cells if (runs / cell.run_id).is_dir()]
        if cells
        else sorted(p for p in runs.iterdir() if (p / "status.json").is_file())
    )
    collection = Collection(pd.DataFrame(columns=COLUMNS), expected=cells)
    records: list[dict] = []
    for folder in folders:
        wanted = evaluations.get(folder.name, "")
        status, content = read_status(folder, wanted)
        if status != "done":
            collection.unfinished[folder.name] = status
            continue
        path = folder / "metrics.jsonl"
        rows, bad = read_rows(path) if path.is_file() else ([], 0)
        if content.get("guard") is False:
            collection.leaking.append(folder.name)
        bad = max(bad, content.get("rows", 0) - len(rows))  # lines cut at a line's end leave no other trace
        if bad:
            collection.unreadable[folder.name] = bad
        if rows:
            collection.runs.append(folder.name)
            rate = learning_rate(folder)
            records += [
                {"learning_rate": rate, **row, "run_id": folder.name, **values.get(folder.name, {})}
                for row in rows
                if not wanted or row.get("eval") in (None, "", wanted)
            ]
        else:
            collection.unfinished[folder.name] = "done, but without a readable metric row"
    collection.rows, collection.duplicates = tidy(records)
    collection.verdicts = read_verdicts(runs, collection.rows)
    collection.notes += mixed_data({name: data_sets(runs / name) for name in collection.runs})
    methods = methods_of(collection.rows)
    collection.notes += mixed_code({name: method_code(runs / name) for name in methods}, methods)
    return collection


def split(collection: Collection, runs: Path, keys: Sequence[str], cells: Iterable[DictConfig] = ()) -> Collection:
    """The campaign with every value of `keys` as a method of its own: `cwac, energy 0.99` (`paper.SETTING`).

    keys: dotted keys of a run's configuration, such as method.weight.energy; a method without them keeps its name, and
    so does one at the value that stands behind a key: train.learning_rate=2e-5.
    cells: the configurations of the expected runs, since one that is missing has left none. Raises UserError for a key
    that no run has.
    """
    settings = {name: settings_of(runs / name) for name in collection.runs}
    for cfg in cells:
        settings.setdefault(run_id(cfg), flatten(OmegaConf.to_container(cfg, resolve=True)))
    given = [key.partition("=") for key in keys]
    plain = {key: text_of(OmegaConf.create(f"value: {value}").value) for key, equals, value in given if equals}
    keys = [key for key, _, _ in given]
    short = {key: "rate" if key == "train.learning_rate" else key.rpartition(".")[2] for key in keys}
    names = {key: key if list(short.values()).count(name) > 1 else name for key, name in short.items()}
    for key in keys:
        if not any(key in found for found in settings.values()):
            known = sorted(
                {k for found in settings.values() for k in found if k.startswith("method.")} - {"method.name"}
            )
            raise UserError(f"--by {key}: no run has this key. Remedy: one of {', '.join(known) or '(none)'}.")

    def method(name: str, of: str) -> str:
        found = settings.get(name, {})
        values = {key: text_of(found[key]) for key in keys if key in found}
        _, *there = of.split(SETTING)  # of a restored run, which was split before
        shown = [f"{names[key]} {value}" for key, value in values.items() if value != plain.get(key)]
        return SETTING.join([of, *(setting for setting in shown if setting not in there)])

    rows = collection.rows
    methods = [method(name, of) for name, of in zip(rows["run_id"], rows["method"], strict=True)]
    expected = [replace(cell, method=method(cell.run_id, cell.method)) for cell in collection.expected]
    return replace(collection, rows=rows.assign(method=methods), expected=expected)


def settings_of(folder: Path) -> dict:
    """A run's configuration as dotted keys; {} where it cannot be read."""
    try:
        content = yaml.load((folder / "config.yaml").read_text(encoding="utf-8"), Loader=LOADER)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return flatten(content) if isinstance(content, dict) else {}


def text_of(value: object) -> str:
    """A setting as slugs name it: 0.0001 and not 1e-4, whatever its yaml says; `paper.setting_label` is for tables."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def own_keys(collection: Collection, runs: Path) -> list[str]:
    """The keys of a method in which runs of one cell and seed differ, as `-m method.strength=0.1,1` makes them.

    [] where no two runs share a cell and seed, or where they differ in other keys too: those are no settings of one
    method, and `analysis.apart` refuses them.
    """
    _, keys = mixed(collection, lambda name: settings_of(runs / name))
    return sorted(keys) if all(key.startswith("method.") for key in keys) else []


def mixed(
    collection: Collection, settings: Callable[[str], Mapping], by_rate: bool = True
) -> tuple[list[str], dict[str, list]]:
    """The first runs that share a cell and seed, and each key in which runs that do so differ, with its values.

    settings: gives a run's configuration as dotted keys by its id; a key that a run lacks counts as None. by_rate:
    runs at several learning rates are told apart already. ([], {}) where no two runs share a cell and seed.
    """
    cell = ["model", "task", "harmful_ratio", "method", "seed", *(["learning_rate"] if by_rate else [])]
    ends = collection.rows[collection.rows["final"]]
    groups = ends.groupby(cell, dropna=False)["run_id"].agg(lambda ids: sorted(set(ids)))
    groups = groups[groups.map(len) > 1]
    keys: dict[str, list] = {}
    for names in groups:
        found = [settings(name) for name in names]
        for key in sorted({k for s in found for k in s}):
            values = [s.get(key) for s in found]
            if len({repr(v) for v in values}) > 1 and not key.startswith(NO_SETTING):
                known = keys.setdefault(key, [])
                known += [v for k, v in enumerate(values) if repr(v) not in map(repr, [*known, *values[:k]])]
    return (groups.iloc[0] if len(groups) else []), keys


NO_SETTING = ("paths.", "hydra.", "logger.", "keep_", "force", "debug")
"""Keys, by their beginning, that say where and how a run was kept and not what it is."""


def data_sets(folder: Path) -> dict[str, str]:
    """Identifies a run's inputs whose content may change under the same name.

    Returns data set -> hash of its rows, and hub model -> commit; {} where the run's folder does not record them.
    """
    found = {}
    for file, key in (("data.json", "datasets"), ("env.json", "model")):
        try:
            content = json.loads((folder / file).read_text(encoding="utf-8"))[key]
            if key == "datasets":
                found |= {name: entry["sha256"] for name, entry in content.items()}
            elif content["hub_id"] and content["revision"]:
                found[f"{content['hub_id']} (model)"] = content["revision"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return found


def mixed_data(read: dict[str, dict[str, str]]) -> list[str]:
    """Warnings, one line each, where runs read different data sets or models under the same name.

    read: run id -> as `data_sets` gives it. Raises UserError where seeds of one cell did: their mean would be of
    no experiment.
    """
    lines = []
    for name in sorted({name for sets in read.values() for name in sets}):
        versions: dict[str, list[str]] = {}
        for run, sets in read.items():
            if name in sets:
                versions.setdefault(sets[name], []).append(run)
        if len(versions) < 2:
            continue
        cells: dict[str, dict[str, str]] = {}
        for version, ids in versions.items():
            for run in ids:
                cells.setdefault(re.sub(r"-s\d+-[^-]+$", "", run), {}).setdefault(version, run)
        for several in (runs for runs in cells.values() if len(runs) > 1):
            raise UserError(
                f"{name} was another one for each of these: {', '.join(several.values())}. They are no seeds of one "
                "experiment. Remedy: train the older ones again with force=true, or keep them in folders of their "
                "own (paths.runs)."
            )
        lines.append(
            f"{name}: {len(versions)} versions of its rows, first in {' and '.join(v[0] for v in versions.values())}"
        )
    return lines


def method_code(folder: Path) -> str | None:
    """The hash of its method's code that a run recorded (`cwac.core.method_code`); None where it recorded none."""
    try:
        return json.loads((folder / "env.json").read_text(encoding="utf-8"))["method_code"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def mixed_code(codes: dict[str, str | None], methods: dict[str, str]) -> list[str]:
    """Warnings, one line each, for the methods whose code changed between their runs.

    codes: run id -> as `method_code` gives it; methods: run id -> name. Runs without a recorded code count as any.
    """
    first: dict[str, dict[str, str]] = {}
    for run, code in codes.items():
        for part in (code or "").split(THEN):  # a run that went on under other code has several
            if part:
                first.setdefault(methods[run], {}).setdefault(part, run)
    return [
        f"{method}: its runs were made with {len(runs)} versions of its code, first "
        f"{' and '.join(dict.fromkeys(runs.values()))} "
        "(force=true trains a run again)"
        for method, runs in first.items()
        if len(runs) > 1
    ]


def methods_of(rows: pd.DataFrame) -> dict[str, str]:
    """run id -> the method that its rows name, which `split` may have given a setting."""
    return dict(zip(rows["run_id"], rows["method"], strict=True))


def learning_rate(folder: Path) -> float:
    """The learning rate a run was trained with, from its `config.yaml`; NaN where there is none to read."""
    try:
        content = yaml.load((folder / "config.yaml").read_text(encoding="utf-8"), Loader=LOADER)
        return float(content["train"]["learning_rate"])  # PyYAML reads 2e-05 as a string
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return math.nan


def read_verdicts(runs: Path, rows: pd.DataFrame) -> pd.DataFrame:
    """Per-prompt verdicts behind the HS rows at the end of training; columns `VERDICT_COLUMNS`.

    Tests that pair by prompt need them. A run without judge files (imported, or written by hand) contributes none.
    """
    ends = rows[rows["final"] & (rows["metric"] == "HS")].sort_values("time", kind="stable")
    ends = ends.drop_duplicates(["run_id", "set", "judge"], keep="last").sort_index()
    records = []
    for row in ends.itertuples():
        name = f"{row.set}@{row.step:g}-{row.eval}.jsonl"
        path = runs / row.run_id / "judge" / row.judge / name  # of a judge that came later
        path = path if path.is_file() else path.parent.parent / name
        if not path.is_file():
            continue
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                verdict = from_line(line)
                if verdict["judge"] == row.judge:
                    records.append([row.run_id, row.set, row.judge, str(verdict["id"]), verdict["verdict"]])
            except (ValueError, KeyError, TypeError):
                continue  # a line cut by a crash; its prompt then pairs with nothing
    return pd.DataFrame(records, columns=VERDICT_COLUMNS).drop_duplicates(["run_id", "set", "judge", "id"])


RUN_ID = re.compile(
    r"(?P<model>.+)-(?P<task>[^-]+)-p(?P<ratio>\d+(?:\.\d+)?(?:e-\d+)?)-(?P<method>[^-]+)-s(?P<seed>\d+)-[^-]+"
)


def method_of(run_id: str) -> str:
    return cell_of(run_id).method if cell_of(run_id) else "unknown"


def cell_of(run_id: str) -> Cell | None:
    """The cell that a run's id names (`cwac.core.identity.run_id` makes ids); None if the text is not such an id."""
    match = RUN_ID.fullmatch(run_id)
    if not match:
        return None
    return Cell(run_id, match["model"], match["method"], match["task"], float(match["ratio"]), int(match["seed"]))


def read_exported(folder: Path | str) -> Collection:
    """An exported campaign (`results/NAME`, written by `analysis.demo`) as a collection, with what it then lacked.

    folder: holds `results.csv`; `verdicts.csv.gz` for tests that pair by prompt; and `provenance.json` for the runs
    that were missing or left out. Raises UserError if there is no readable `results.csv` with the columns of a row.
    """
    folder = Path(folder)
    remedy = "Remedy: a folder written by python -m analysis.demo, such as results/demo."
    try:
        frame = read_csv(folder / "results.csv")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no readable results.csv. {remedy}") from error
    if absent := [c for c in COLUMNS if c not in (*frame.columns, *LATER)]:
        raise UserError(f"{folder}/results.csv lacks the columns {', '.join(absent)}. {remedy}")
    try:
        record = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = {}
    rows, duplicates = tidy(frame.to_dict("records"))
    collection = Collection(rows, list(dict.fromkeys(rows["run_id"])), duplicates=duplicates)
    collection.notes = list(record.get("left_out", []))
    if (folder / VERDICTS).is_file():
        collection.verdicts = pd.read_csv(folder / VERDICTS, dtype=str, keep_default_na=False)
    if record.get("experiment"):
        cells = [cell_of(name) for name in [*collection.runs, *record.get("missing", [])]]
        methods = methods_of(rows) | (record.get("by") or {}).get("missing", {})
        collection.expected = [replace(c, method=methods.get(c.run_id, c.method)) for c in cells if c]
    return collection


NUMBERS = ("harmful_ratio", "epoch", "step", "value", "n", "stderr", "time", "learning_rate")
"""Columns of numbers; all others but `seed` and `final` are text, whatever they look like: an evaluation's id may be
all digits, or digits around one `e`."""


def read_csv(path: Path) -> pd.DataFrame:
    """A table of metric rows as `to_csv` wrote it: numbers in the columns `NUMBERS`, text everywhere else."""
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    for column in frame.columns.intersection([*NUMBERS, "seed"]):
        frame[column] = pd.to_numeric(frame[column], errors="coerce")
    return frame.mask(frame == "")


def tidy(records: list[dict]) -> tuple[pd.DataFrame, int]:
    """Rows as a frame with `COLUMNS` and their types, without duplicates; and how many duplicates there were."""
    frame = pd.DataFrame.from_records(records).reindex(columns=COLUMNS)
    for column in NUMBERS:
        frame[column] = pd.to_numeric(frame[column], errors="coerce")
    # a sum of steps is not exact: 0.30000000000000004 is the cell 0.3
    frame["harmful_ratio"] = frame["harmful_ratio"].round(DIGITS)
    frame["seed"] = pd.to_numeric(frame["seed"], errors="coerce").astype("Int64")
    frame["final"] = frame["final"].map(lambda flag: str(flag).lower() == "true").astype(bool)
    for column in ("set", "judge", "eval", "model", "method", "task", "metric"):
        frame[column] = frame[column].map(lambda text: "" if pd.isna(text) else str(text))
    # what was measured before this column existed was all official
    frame["values"] = frame["values"].map(lambda text: "official" if pd.isna(text) else str(text))
    kept = frame.drop_duplicates(IDENTITY, keep="last")
    return kept.reset_index(drop=True), len(frame) - len(kept)


def at_end(rows: pd.DataFrame, by: Sequence[str] = ()) -> pd.DataFrame:
    """The rows measured at the end of training, one evaluation each.

    by: further columns in which runs may differ on purpose (`learning_rate` in a sweep over it). Where a run was
    evaluated under several eval settings, the latest counts. Raises UserError where two runs would count as one cell
    and seed: they are no seeds of each other.
    """
    end = rows[rows["final"]].sort_values("time", kind="stable")
    cell = ["model", "task", "harmful_ratio", "method", "seed", *by]
    runs = end.groupby(cell, dropna=False)["run_id"].agg(lambda ids: sorted(set(ids)))
    for ids in runs[runs.map(len) > 1]:
        raise UserError(
            f"these runs differ in their settings, but not in model, task, ratio, method and seed: {', '.join(ids)}. "
            "Remedy: python -m analysis.demo --by KEY makes a row of each value of a key in which they differ; or "
            "keep them in folders of their own (paths.runs)."
        )
    return end.drop_duplicates(["run_id", "metric", "set", "judge"], keep="last").sort_index()


def swept(rows: pd.DataFrame) -> list[str]:
    """`["learning_rate"]` if some method was trained with several at the same cell and seed, else []."""
    cell = ["model", "task", "harmful_ratio", "method", "seed"]
    counts = rows[rows["final"]].groupby(cell, dropna=False)["learning_rate"].nunique()
    return ["learning_rate"] if len(counts) and counts.max() > 1 else []


def one_clock(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with a `step` that the seeds of a method at a harmful ratio share, so that they can be averaged.

    Rows too long for a task are left out, which are others in each seed: an epoch then has more steps in one than in
    another. There a step becomes the mean over the seeds at its epoch, to a tenth; elsewhere it stays.
    """
    cell = ["model", "task", "harmful_ratio", "method"]
    seeds = rows.groupby(cell, dropna=False)["seed"].transform("nunique")
    here = rows.groupby([*cell, "step"], dropna=False)["seed"].transform("nunique")
    differ = (here < seeds).groupby([rows[c] for c in cell], dropna=False).transform("any")
    points = (
        rows.drop_duplicates([*cell, "seed", "epoch", "step"])
        .groupby([*cell, "epoch"], dropna=False)["step"]
        .mean()
        .round(1)
    )
    shared = rows[[*cell, "epoch"]].merge(points.rename("shared").reset_index(), "left")["shared"].to_numpy()
    return rows.assign(step=rows["step"].where(~differ | rows["epoch"].isna(), shared))


def before(rows: pd.DataFrame) -> pd.DataFrame:
    """The percentages of the aligned model before fine-tuning (epoch 0), one a model, task and seed.

    Runs have them where `eval.at` holds 0. SFT's are preferred; those of a method that puts a trigger into the prompt
    at inference come last.
    """
    triggered = rows.loc[(rows["metric"] == "extra_data") & (rows["set"] == "trigger"), "run_id"]
    start = rows[(rows["epoch"] == 0) & ~rows["final"] & rows["metric"].isin(PROPORTIONS)]
    preferred = (start["method"] == "sft").astype(int) - start["run_id"].isin(triggered).astype(int)
    start = start.assign(preferred=preferred).sort_values("preferred", kind="stable")
    return start.drop_duplicates(["model", "task", "seed", "metric", "set", "judge"], keep="last").drop(
        columns="preferred"
    )


def one_judge(rows: pd.DataFrame, judge: str | None = None) -> pd.DataFrame:
    """The rows of one judge, and those that no judge made. Verdicts of two judges never share a mean.

    Raises UserError if there are several and none was chosen, or the chosen one has no rows.
    """
    names = sorted(set(rows["judge"]) - {""})
    if judge is None and len(names) > 1:
        raise UserError(f"these runs were judged by {', '.join(names)}. Remedy: choose one with --judge.")
    if judge is not None and judge not in names:
        raise UserError(f"--judge {judge} made no row here. Remedy: one of {', '.join(names) or '(none)'}.")
    return rows[rows["judge"].isin(["", judge or (names[0] if names else "")])]


def pooled(rows: pd.DataFrame) -> pd.DataFrame:
    """HS, refusal and other over all sets of harmful prompts of a run together, weighted by prompts; set `all`.

    The paper reports one HS over prompts of several benchmarks. Sets without a number of prompts weigh alike. Sets of
    one `VARIATION` are pooled among themselves (`all+prefill`). Other metrics, and runs with one set, are left as they
    are.
    """
    verdicts = rows[rows["metric"].isin(VERDICT_METRICS)]
    verdicts = verdicts.assign(variation=["".join(name.partition(VARIATION)[1:]) for name in verdicts["set"]])
    key = ["run_id", "epoch", "step", "final", "metric", "judge", "eval", "variation"]
    several = verdicts.groupby(key, dropna=False)["set"].transform("nunique") > 1
    parts = verdicts[several].dropna(subset="value")
    if parts.empty:
        return rows.drop(verdicts[several].index)
    uncounted = parts["n"].isna().groupby([parts[k] for k in key], dropna=False).transform("any")
    weights = parts["n"].where(~uncounted, 1.0)
    parts = parts.assign(value=parts["value"] * weights, weight=weights)
    groups = parts.groupby(key, dropna=False, sort=False, as_index=False)
    merged = groups.first()
    sums = groups[["value", "weight"]].sum()
    merged["value"] = sums["value"] / sums["weight"]
    merged["n"] = sums["weight"].where(~groups["n"].agg(lambda n: n.isna().any())["n"].astype(bool))
    merged = merged.assign(set="all" + merged["variation"], stderr=math.nan)[rows.columns]
    return pd.concat([rows.drop(verdicts[several].index), merged], ignore_index=True)
