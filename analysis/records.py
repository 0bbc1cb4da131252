"""What figures and the report need of a run beyond its metric rows, and how it is exported with a campaign.

Metric rows say what was measured; where the weights came from, the hashes of the data, each prompt's drift and the
answers themselves stand in other files of the run's folder (`cwac/core/run_dir.py`). An exported campaign keeps them
in `records.jsonl`, one line a run, without any answer.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from analysis.collect import LOADER
from cwac.core.errors import UserError
from cwac.core.identity import flatten
from cwac.core.jsonl import from_line

NAME = "records.jsonl"
DECOMPOSITION = "decomposition.json"


@dataclass(frozen=True)
class Answer:
    """One judged response to a harmful or harmless request."""

    set: str
    id: str
    prompt: str
    response: str
    verdict: str


@dataclass(frozen=True)
class Record:
    """One run; a field that its folder does not tell is None or empty."""

    run_id: str
    model: str = ""
    method: str = ""
    task: str = ""
    harmful_ratio: float | None = None
    seed: int | None = None
    commit: str | None = None
    dirty: bool = False
    method_code: str | None = None
    """Hash of the method's code (`cwac.core.method_code`)."""
    python: str | None = None
    platform: str | None = None
    packages: dict[str, str] = field(default_factory=dict)
    pools: dict[str, str] = field(default_factory=dict)
    """Set of prompts -> SHA-256 digest of its prompts and responses in order."""
    datasets: dict[str, str] = field(default_factory=dict)
    """Data set -> hash of the rows that were read of it."""
    drift: list[float] = field(default_factory=list)
    """Per held-out harmful prompt: normalised L2 distance of residual activations, mean over blocks."""
    decomposition: list[dict] = field(default_factory=list)
    """One entry a matrix, as `experiments.activations` writes them."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Dotted key -> value of what no column of the metric rows tells: the method's keys, and `eval.split`."""
    answers: list[Answer] = field(default_factory=list)
    """At the end of training; never exported."""


def read_json(path: Path) -> Any:
    """The content of a JSON file; {} where there is none or it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def read(folder: Path, answers: int = 0) -> Record:
    """The record of one run's folder; whatever is missing or damaged there stays empty.

    answers: how many judged answers of each set to read.
    """
    try:
        config = yaml.load((folder / "config.yaml").read_text(encoding="utf-8"), Loader=LOADER) or {}
    except (OSError, ValueError, yaml.YAMLError):
        config = {}
    env, data = read_json(folder / "env.json"), read_json(folder / "data.json")
    drift = read_json(folder / "drift.json").get("heldout", {}).get("activation", [])
    return Record(
        run_id=folder.name,
        model=(config.get("model") or {}).get("name", ""),
        method=(config.get("method") or {}).get("name", ""),
        task=(config.get("task") or {}).get("name", ""),
        harmful_ratio=config.get("harmful_ratio"),
        seed=config.get("seed"),
        commit=env.get("git_commit"),
        dirty=bool(env.get("git_dirty")),
        method_code=env.get("method_code"),
        python=env.get("python"),
        platform=env.get("platform"),
        packages=env.get("packages", {}),
        pools={name: entry["sha256"] for name, entry in data.get("pools", {}).items()},
        datasets={name: entry["sha256"] for name, entry in data.get("datasets", {}).items() if "sha256" in entry},
        drift=[sum(blocks) / len(blocks) for blocks in drift if blocks],
        decomposition=read_json(folder / DECOMPOSITION).get("matrices", []),
        settings=settings(config),
        answers=read_answers(folder, answers) if answers else [],
    )


BESIDE = ("train.per_device_train_batch_size", "train.warmup_steps", "task.n_train", "eval.split")
"""Keys in which runs of one method, rate and seed differ as well; `analysis.frontier` tells them apart by these."""


def settings(config: Mapping) -> dict[str, Any]:
    """`Record.settings` of a run's configuration; its method's name and class are told elsewhere."""
    flat = flatten(config)
    return {
        key: value
        for key, value in flat.items()
        if (key.startswith("method.") and key.rpartition(".")[2] not in ("name", "_target_"))
        or (key in BESIDE and value is not None)
    }


def read_answers(folder: Path, count: int) -> list[Answer]:
    """The first `count` judged answers of each set, at the last step the run was evaluated at."""
    last: dict[str, tuple[int, float, Path]] = {}
    for path in sorted((folder / "judge").glob("*@*-*.jsonl")):
        name, _, rest = path.stem.rpartition("@")
        step, _, _ = rest.partition("-")
        if step.isdigit():
            newest = (int(step), path.stat().st_mtime, path)
            last[name] = max(last.get(name, newest), newest)
    answers = []
    for name, (_, _, path) in sorted(last.items()):
        verdicts = {row.get("id"): row.get("verdict", "") for row in head(path, count)}
        for row in head(folder / "gen" / path.name, count):
            if row.get("id") in verdicts:
                texts = [str(row.get(k, "")) for k in ("id", "prompt", "response")]
                answers.append(Answer(name, *texts, verdicts[row["id"]]))
    return answers


def head(path: Path, count: int) -> list[dict]:
    """The first `count` rows of a JSON-lines file; a damaged line is passed over."""
    rows: list[dict] = []
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if len(rows) == count:
                    break
                try:
                    row = from_line(line)
                except ValueError:
                    continue
                if "warning" not in row:
                    rows.append(row)
    except OSError:
        return []
    return rows


def read_all(runs: Path, ids: Iterable[str], answers: int = 0) -> dict[str, Record]:
    """The records of these runs, by id."""
    return {name: read(runs / name, answers) for name in ids}


def export(records: Mapping[str, Record], path: Path) -> None:
    """Write records without their answers, numbers to four digits; `read_exported` reads them."""
    lines = []
    for record in records.values():
        short = asdict(replace(record, answers=[]))
        lines.append(json.dumps({k: rounded(v) for k, v in short.items() if v not in (None, "", [], {})}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def rounded(value: Any) -> Any:
    """A list of numbers, or of entries with numbers, to four significant digits; what is no list stays as it is."""
    if not isinstance(value, list):
        return value
    return [
        {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in entry.items()}
        if isinstance(entry, dict)
        else float(f"{entry:.4g}")
        for entry in value
    ]


def read_exported(path: Path) -> dict[str, Record]:
    """The exported records, by run id; {} where the campaign was exported without them.

    Raises UserError naming the line if it is damaged.
    """
    if not path.is_file():
        return {}
    known = {f.name for f in fields(Record)}
    records_by_run = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = Record(**{k: v for k, v in json.loads(line).items() if k in known})
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}, line {number}, is no record of a run. Remedy: export the campaign again with "
                "python -m analysis.demo, or delete the file to do without drift and provenance."
            ) from error
        records_by_run[record.run_id] = record
    return records_by_run
