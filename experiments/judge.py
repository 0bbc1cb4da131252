"""Judges finished runs again with another judge: one model load for a folder of runs, from their answers alone.

python -m experiments.judge --runs runs --judge beaver_dam
python -m experiments.judge --runs runs --judge semantic --unsure     lists what the judge is unsure of
python -m experiments.judge --runs runs --judge llama_guard batch_size=64 hub_id=/models/Llama-Guard-3-8B

The weights of the runs are not needed. What is judged is skipped, and a judge that was stopped goes on behind the
last batch on disk. Rows with the judge's name join each run's metrics.jsonl; tables take them with `--judge
beaver_dam`, and `python -m analysis.agreement` compares judges.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from filelock import FileLock
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm
from transformers.utils import logging

from analysis import tables
from cwac.core.config import Parser, about, command, instantiate
from cwac.core.errors import UserError
from cwac.core.jsonl import append_jsonl, read_jsonl, repair
from cwac.core.paths import CONF
from cwac.evaluation.evaluate import verdict_rows
from cwac.evaluation.judge import Judge, judge_answers

UNSURE = 0.6
JUDGES = CONF / "eval" / "judge"


@dataclass(frozen=True)
class Work:
    """One set of a run's answers at one point of its training that the judge has not judged."""

    folder: Path
    row: dict
    """The run's own metric row of this set: its coordinates are those of the new rows."""
    answers: list[dict]

    @property
    def file(self) -> str:
        return f"{self.row['set']}@{self.row['step']}-{self.row['eval']}.jsonl"

    @property
    def harmless(self) -> bool:
        return self.row["metric"] == "OR"


def configure(name: str, overrides: Sequence[str]) -> DictConfig:
    """An option of conf/eval/judge with its keys overridden; raises UserError where there is none of that name."""
    known = sorted(p.stem for p in JUDGES.glob("*.yaml"))
    if name not in known:
        raise UserError(f"--judge {name} is unknown; use one of {', '.join(known)}")
    try:
        return OmegaConf.merge(OmegaConf.load(JUDGES / f"{name}.yaml"), OmegaConf.from_dotlist(list(overrides)))
    except OmegaConfBaseException as error:
        raise UserError(f"{' '.join(overrides)}: {str(error).splitlines()[0]}") from error


def finished(runs: Path) -> list[Path]:
    """The folders of the finished runs below `runs`; raises UserError where there is none."""
    found = []
    for path in sorted(runs.glob("*/status.json")):
        try:
            status = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if status.get("status") == "done" and status.get("run_id") == path.parent.name:
            found.append(path.parent)
    if not found:
        raise UserError(f"--runs {runs} holds no finished run; name the folder that holds the runs' folders")
    return found


def pending(folder: Path, judge: str) -> list[Work]:
    """What `judge` has left to judge in a run: the sets that its own judge gave an HS or an OR.

    Raises UserError where an answer file is missing or damaged.
    """
    rows = [row for row in read_jsonl(folder / "metrics.jsonl") if row["metric"] in ("HS", "OR")]
    place = lambda row: (row["set"], row["step"], row["eval"])  # noqa: E731
    judged = {place(row) for row in rows if row["judge"] == judge}
    left = {place(row): row for row in rows if place(row) not in judged}
    work = []
    for row in left.values():
        path = folder / "gen" / f"{row['set']}@{row['step']}-{row['eval']}.jsonl"
        answers = read_jsonl(path)
        if len(answers) != row["n"]:
            raise UserError(f"{path} holds {len(answers)} of {row['n']} answers; evaluate {folder.name} again")
        work.append(Work(folder, row, answers))
    return work


def judge_set(judge: Judge, work: Work, progress) -> None:
    """Judge one set and append its metric rows; the run's lock is held, so that nobody else appends meanwhile."""
    with FileLock(work.folder.parent / f".{work.folder.name}.lock"):
        verdicts = judge_answers(judge, work.answers, work.folder / "judge" / judge.name / work.file, progress)
        rows = verdict_rows(judge, work.row["set"], work.answers, verdicts, work.harmless)
        repair(work.folder / "metrics.jsonl")
        append_jsonl(
            work.folder / "metrics.jsonl", [{**work.row, "stderr": None, **row, "time": time.time()} for row in rows]
        )


def unsure(runs: Path, judge: str, below: float) -> pd.DataFrame:
    """Verdicts of a judge that it gave a probability below `below`, least sure first; no text.

    Columns: probability, verdict, run_id, file, id. Raises UserError where the judge gave no probabilities.
    """
    records, seen = [], 0
    for folder in finished(runs):
        for path in sorted((folder / "judge").glob("*.jsonl")) + sorted((folder / "judge" / judge).glob("*.jsonl")):
            for row in read_jsonl(path):
                probability = row.get("probabilities", {}).get(row["verdict"]) if row["judge"] == judge else None
                if probability is None:
                    continue
                seen += 1
                if probability < below:
                    records.append([probability, row["verdict"], folder.name, path.name, row["id"]])
    if not seen:
        raise UserError(
            f"--unsure: {runs} holds no verdict of {judge} with its probability; judge the runs with it first"
        )
    columns = ["probability", "verdict", "run_id", "file", "id"]
    return pd.DataFrame(records, columns=columns).sort_values(["probability", "run_id", "file", "id"])


def listed(found: pd.DataFrame, judge: str, below: float) -> str:
    """The list as Markdown."""
    rows = [[row.run_id, row.file, row.id, row.verdict, f"{row.probability:.2f}"] for row in found.itertuples()]
    header = ["run", "gen/ and judge/", "answer", "verdict", "probability"]
    return f"{len(rows)} verdicts of {judge} below {below:g}\n\n{tables.markdown(header, rows, key=3)}"


@command
def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0, or 2 for bad input."""
    parser = Parser(**about(__doc__, "python -m experiments.judge"))
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder that holds the runs' folders")
    parser.add_argument("--judge", required=True, help="an option of conf/eval/judge")
    parser.add_argument(
        "--unsure",
        type=float,
        nargs="?",
        const=UNSURE,
        help=f"judge nothing; list verdicts of --judge less likely than this (default {UNSURE})",
    )
    parser.add_argument("overrides", nargs="*", help="keys of that option, e.g. batch_size=64 hub_id=<folder>")
    args = parser.parse_intermixed_args(argv)
    cfg = configure(args.judge, args.overrides)
    if args.unsure is not None:
        print(listed(unsure(args.runs, cfg.name, args.unsure), cfg.name, args.unsure))
        return 0
    work = [one for folder in finished(args.runs) for one in pending(folder, cfg.name)]
    if not work:
        print(f"{args.runs}: every run is judged by {cfg.name}; nothing to do")
        return 0
    logging.disable_progress_bar()  # of the judge's files; ours counts responses
    judge = instantiate(cfg)
    with tqdm(total=sum(len(one.answers) for one in work), desc=f"judging with {judge.name}") as bar:
        for one in work:
            judge_set(judge, one, bar.update)
    print(f"{judge.name} judged {len(work)} sets of answers of {len({one.folder for one in work})} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
