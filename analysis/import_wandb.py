"""Runs that were logged only to Weights & Biases, as run folders that every table and figure reads.

python -m analysis.import_wandb --offline wandb --runs runs       folders that logger=wandb wrote without network
python -m analysis.import_wandb --project ENTITY/cwac --runs runs   the server, through wandb's own client

`cwac/core/tracking.py` logs the configuration, the loss log under `train/`, and the final metrics as `<metric>/<set>`.
What it does not log stays unknown: measurements on the way, answers, each prompt's drift, and of runs logged before
they were (`n/<metric>/<set>`) the number of prompts, so no exact interval where all seeds agree. A run that was killed
and resumed is one run in pieces, which are joined; one that crashed or is still running is named and left out.

Deviations:
- wandb has no public reader of its offline files. They are LevelDB logs (github.com/google/leveldb, doc/log_format.md)
  of protobuf records, read here without checking their checksums; what a crash cut off is not read.
"""

import json
import struct
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from analysis.paper import PROPORTIONS, VERDICTS
from cwac.core.config import Parser, about, command
from cwac.core.errors import UserError
from cwac.core.files import write_atomic
from cwac.core.identity import eval_id
from cwac.core.jsonl import write_jsonl
from cwac.core.tracking import BESIDE

BLOCK, HEADER, MAGIC = 32768, 7, b":W&B"
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4
EVALUATED = (*PROPORTIONS, "task_loss", "poison_loss")
"""Metrics that depend on the evaluation's settings; the others belong to the training."""


@dataclass
class Logged:
    """What wandb knows of a run."""

    id: str
    config: dict[str, Any]
    summary: dict[str, Any]
    finished: bool
    time: float
    history: list[dict] = field(default_factory=list)


def log_records(data: bytes) -> Iterator[bytes]:
    """The payloads of a LevelDB log with wandb's header; ends quietly where the file is cut."""
    position, parts = HEADER, []
    while position + HEADER <= len(data):
        if BLOCK - position % BLOCK < HEADER:  # the rest of a block is padding
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + HEADER])
        piece = data[position + HEADER : position + HEADER + length]
        if kind not in (FULL, FIRST, MIDDLE, LAST) or len(piece) < length:
            return
        parts = [piece] if kind in (FULL, FIRST) else [*parts, piece]
        if kind in (FULL, LAST):
            yield b"".join(parts)
        position += HEADER + length


def items(updates) -> dict[str, Any]:
    """Top-level keys and values of wandb's JSON items."""
    values = {}
    for item in updates:
        key = item.key or (item.nested_key[0] if len(item.nested_key) == 1 else "")
        if key:
            values[key] = json.loads(item.value_json)
    return values


def read_offline(folder: Path) -> list[Logged]:
    """Every offline run below a folder; of the pieces of one that was resumed, the later goes before.

    Raises UserError if there is none, or a file is not wandb's.
    """
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record

    pieces: dict[str, list[Logged]] = {}
    for path in sorted(folder.rglob("run-*.wandb")):
        data = path.read_bytes()
        if not data.startswith(MAGIC):
            raise UserError(f"{path} is not a file of wandb's. Remedy: name a folder that logger=wandb wrote.")
        run = Logged("", {}, {}, False, path.stat().st_mtime)
        for payload in log_records(data):
            try:
                record = Record.FromString(payload)
            except DecodeError:
                break
            kind = record.WhichOneof("record_type")
            if kind == "run":
                run.id = record.run.run_id
                run.config.update(items(record.run.config.update))
                run.time = record.run.start_time.seconds + record.run.start_time.nanos / 1e9
            elif kind == "config":
                run.config.update(items(record.config.update))
            elif kind == "summary":
                run.summary.update(items(record.summary.update))
            elif kind == "history":
                run.history.append(items(record.history.item))
            elif kind == "exit":
                run.finished = record.exit.exit_code == 0
        if run.id:
            pieces.setdefault(run.id, []).append(run)
    if not pieces:
        raise UserError(f"--offline {folder} holds no run of wandb's. Remedy: the folder above offline-run-*.")
    return [joined(sorted(of_one, key=lambda piece: piece.time)) for of_one in pieces.values()]


def joined(pieces: Sequence[Logged]) -> Logged:
    """One run from the pieces that were written before and after each of its interruptions, in order."""
    whole = pieces[0]
    for piece in pieces[1:]:
        whole = Logged(
            whole.id,
            {**whole.config, **piece.config},
            {**whole.summary, **piece.summary},
            piece.finished,
            piece.time,
            [*whole.history, *piece.history],
        )
    return whole


def loss_log(history: Iterable[dict]) -> list[dict]:
    """The loss log that a run's folder holds: one line a step, the last one written, since a resume repeats steps."""
    lines: dict = {}
    for row in history:
        line = {k.removeprefix("train/"): v for k, v in row.items() if k.startswith("train/")}
        if line:
            lines[line.get("step", len(lines))] = line
    return sorted(lines.values(), key=lambda line: line.get("step", 0))


def read_server(api: Any, project: str) -> list[Logged]:
    """The runs of `entity/project`, through a `wandb.Api`; raises UserError if it cannot be reached."""
    import requests
    import wandb

    try:
        return [
            Logged(
                id=run.id,
                config=dict(run.config),
                summary=dict(run.summary),
                finished=run.state == "finished",
                time=float(run.summary.get("_timestamp", 0)),
                history=list(run.scan_history()),
            )
            for run in api.runs(project)
        ]
    except (wandb.errors.Error, requests.RequestException, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"--project {project} cannot be read: {first}. Remedy: `wandb login`, ENTITY/PROJECT."
        ) from error


def rows_of(run: Logged) -> list[dict]:
    """The final metric rows of a logged run, as `cwac.core.run_dir.Run.add_rows` would have written them.

    Raises UserError if its configuration is not one of ours.
    """
    try:
        cfg = OmegaConf.create({k: v for k, v in run.config.items() if not k.startswith("_")})
        fixed = {
            "run_id": run.id,
            "model": cfg.model.name,
            "method": cfg.method.name,
            "task": cfg.task.name,
            "harmful_ratio": float(cfg.harmful_ratio),
            "seed": int(cfg.seed),
            "epoch": run.summary.get("train/epoch"),
            "step": run.summary.get("train/step"),
            "final": True,
        }
        evaluation, judge = eval_id(cfg), cfg.eval.judge.name
    except (OmegaConfBaseException, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"the configuration of wandb run {run.id} is not one of train.py's ({error})") from error
    rows = []
    for key, value in run.summary.items():
        metric, slash, of = key.partition("/")
        if not slash or metric in ("train", *BESIDE) or key.startswith("_") or not isinstance(value, int | float):
            continue
        judged = metric in VERDICTS or metric == "OR"
        rows.append(
            {
                **fixed,
                "metric": metric,
                "set": of,
                "value": value,
                **{name: run.summary.get(f"{name}/{key}") for name in BESIDE},
                "judge": judge if judged else None,
                "eval": evaluation if metric in EVALUATED else None,
                "time": run.time,
            }
        )
    return rows


def write(logged: Iterable[Logged], runs: Path) -> tuple[list[str], list[str]]:
    """Write a folder for each finished run that is not there yet; returns the ids written, and why others were not."""
    written, skipped = [], []
    for run in logged:
        folder = runs / run.id
        if folder.parent != runs or run.id.startswith("."):
            skipped.append(f"{run.id!r}: not a name for a folder")
        elif folder.exists():
            skipped.append(f"{run.id}: already in {runs}")
        elif not run.finished:
            skipped.append(f"{run.id}: wandb does not say that it finished")
        elif not (rows := rows_of(run)):
            skipped.append(f"{run.id}: no final metric was logged")
        else:
            folder.mkdir(parents=True)
            config = {k: v for k, v in run.config.items() if not k.startswith("_")}
            write_atomic(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)))
            write_jsonl(folder / "train_log.jsonl", loss_log(run.history))
            write_jsonl(folder / "metrics.jsonl", rows)
            evaluations = {row["eval"]: [] for row in rows if row["eval"]}
            status = {"status": "done", "run_id": run.id, "evaluations": evaluations, "source": "wandb"}
            write_atomic(folder / "status.json", json.dumps(status, indent=1))
            written.append(run.id)
    return written, skipped


@command
def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0, or 2 for bad input."""
    parser = Parser(**about(__doc__, "python -m analysis.import_wandb"))
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--offline", type=Path, help="folder above wandb's offline-run-* folders")
    source.add_argument("--project", help="ENTITY/PROJECT on the server")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where to write the run folders (runs)")
    args = parser.parse_args(argv)
    if args.offline:
        logged = read_offline(args.offline)
    else:
        import wandb

        logged = read_server(wandb.Api(), args.project)
    written, skipped = write(logged, args.runs)
    for line in skipped:
        print(f"left out: {line}")
    print(f"{len(written)} of {len(written) + len(skipped)} runs imported into {args.runs}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
