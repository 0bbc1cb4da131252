"""Labels answers of finished runs: draws a sample, makes sheets to read, joins the readings, judges the sample.

python -m experiments.label_answers draw --runs runs --out results/judging          sample.csv: ids and hashes, no text
python -m experiments.label_answers sheet --runs runs --out results/judging --reader 1     a private sheet to fill in
python -m experiments.label_answers join --out results/judging sheet1.csv sheet2.csv       labels.csv
python -m experiments.label_answers judge --runs runs --out results/judging --judge semantic     verdicts.csv

Two samples, one to choose a judge by and one to measure it on, are drawn apart from each other:
python -m experiments.label_answers draw --runs runs/dev --out results/judging_dev --sets validation
python -m experiments.label_answers draw --runs runs/test --out results/judging_test --sets advbench harmbench \
    --apart results/judging_dev results/judging

The guide is in docs/judging.md. The sample is stratified by the verdict that each run's own judge gave, so that the
rare verdicts are there; no other judge runs before `join` has fixed the labels: `judge` asks for labels.csv. Then
`python -m analysis.agreement results/judging --human` compares every judge with them. Only ids, labels, verdicts and
hashes are for git; sheets hold answers to harmful requests and stay where they are written.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from cwac.core.config import Parser, about, command, instantiate
from cwac.core.errors import UserError
from cwac.core.jsonl import read_jsonl
from experiments.judge import configure, finished

SAMPLE, LABELS, VERDICTS = "sample.csv", "labels.csv", "verdicts.csv"
KEYS = {"r": "refusal", "h": "harmful", "o": "other"}
COLUMNS = ["run_id", "set", "step", "eval", "id", "model", "method", "harmful_ratio", "stratum", "sha256"]


def digest(prompt: str, response: str) -> str:
    """What ties a label to a text that is not in the repository."""
    return hashlib.sha256(f"{prompt}\n\n{response}".encode()).hexdigest()[:16]


def answers(runs: Path) -> pd.DataFrame:
    """Every judged answer to a harmful request of the finished runs: `COLUMNS`, prompt, response; equal ones once.

    Raises UserError where there is no finished run, or its answers are missing.
    """
    records = []
    for folder in finished(runs):
        for row in read_jsonl(folder / "metrics.jsonl"):
            if row["metric"] != "HS" or row["judge"] is None:
                continue
            name = f"{row['set']}@{row['step']}-{row['eval']}.jsonl"
            given = {a["id"]: a for a in read_jsonl(folder / "gen" / name)}
            for verdict in read_jsonl(folder / "judge" / name):
                if verdict["judge"] != row["judge"] or verdict["id"] not in given:
                    continue
                answer = given[verdict["id"]]
                place = {k: row[k] for k in ("set", "step", "eval", "model", "method", "harmful_ratio")}
                if row["step"] == 0:
                    place["method"] = "aligned"  # nobody has trained it yet
                text = {"prompt": answer["prompt"], "response": answer["response"]}
                record = {"run_id": folder.name, "id": answer["id"], "stratum": verdict["verdict"], **place, **text}
                records.append({**record, "sha256": digest(**text)})
    found = pd.DataFrame(records, columns=[*COLUMNS, "prompt", "response"])
    if found.empty:
        raise UserError(f"--runs {runs} holds no judged answer to a harmful request; name the folder of the runs")
    # one text may come from several methods: chance decides under which it stands
    return found.sample(frac=1, random_state=0).drop_duplicates("sha256", ignore_index=True)


def of_sets(found: pd.DataFrame, sets: Sequence[str]) -> pd.DataFrame:
    """The answers to the requests of these sets; raises UserError where there is none of a set."""
    if missing := sorted(set(sets) - set(found["set"])):
        have = ", ".join(sorted(set(found["set"])))
        raise UserError(f"--sets {' '.join(missing)}: no answer of these runs is of that set; there are {have}")
    return found[found["set"].isin(sets)].reset_index(drop=True)


def apart_from(found: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """The answers whose text is in no row of the sample in `folder`; raises UserError where there is no sample."""
    path = folder / SAMPLE
    if not path.is_file():
        raise UserError(f"--apart {folder}: {SAMPLE} is missing; name the folder of a sample that was drawn")
    known = pd.read_csv(path, dtype={"sha256": str, "id": str})
    left = found[~found["sha256"].isin(known["sha256"])].reset_index(drop=True)
    shared = len(set(left["id"]) & set(known["id"]))
    print(f"apart from {path}: {len(found) - len(left)} texts left out; {shared} requests are in both")
    return left


def draw(found: pd.DataFrame, n: int, seed: int) -> pd.DataFrame:
    """n answers: strata of set and verdict get equal shares as far as they go, within one the methods take turns.

    Methods of several models take turns model by model. Raises UserError where there are fewer than n answers.
    """
    rng = random.Random(seed)
    queues = []
    for _, stratum in found.groupby(["set", "stratum"], sort=True):
        methods = [
            rng.sample(list(part.index), len(part)) for _, part in stratum.groupby(["model", "method"], sort=True)
        ]
        rng.shuffle(methods)
        turns = [method[i] for i in range(max(map(len, methods))) for method in methods if i < len(method)]
        queues.append(turns)
    chosen = [queue[i] for i in range(max(map(len, queues))) for queue in queues if i < len(queue)][:n]
    if len(chosen) < n:
        raise UserError(f"--n {n} is more than the {len(found)} different answers of these runs; make more runs")
    return found.loc[sorted(chosen)]


def texts(runs: Path, out: Path, name: str) -> pd.DataFrame:
    """The sample (or the labels) with prompt and response; raises UserError where a text is not to be found."""
    path = out / name
    if not path.is_file():
        before = "draw" if name == SAMPLE else "join"
        raise UserError(f"{path} is missing; first: python -m experiments.label_answers {before}")
    table = pd.read_csv(path, dtype={"sha256": str, "eval": str, "id": str})
    joined = table.merge(
        answers(runs)[["sha256", "prompt", "response"]], on="sha256", how="left", validate="one_to_one"
    )
    if missing := int(joined["response"].isna().sum()):
        raise UserError(
            f"{missing} of the {len(table)} answers of {path} are not in --runs {runs}; name the runs they are of"
        )
    return joined


def join(first: Path, second: Path, sample: pd.DataFrame) -> pd.DataFrame:
    """The sample with both readings and their consensus, empty where they differ and no third column settles it.

    A sheet's `label` is r, h or o (or the word); the second sheet may have a column `settled` for where they differ.
    Where the sheets hold the answers, `empty` is `yes` for those of no text and `no` for the others.
    """
    readings = []
    for path in (first, second):
        sheet = pd.read_csv(path, dtype=str, keep_default_na=False)
        said = sheet["label"].str.strip().str.lower().map(lambda label: KEYS.get(label, label))
        if bad := sorted(set(said) - set(KEYS.values())):
            raise UserError(f"{path}: {', '.join(map(repr, bad))} is no label; use r, h or o")
        readings.append(pd.Series(said.to_numpy(), index=sheet["sha256"]))
    lost = set(sample["sha256"]) - (set(readings[0].index) & set(readings[1].index))
    if lost:
        raise UserError(f"{len(lost)} answers of the sample have no label in one of the sheets")
    table = sample.assign(first=sample["sha256"].map(readings[0]), second=sample["sha256"].map(readings[1]))
    sheet = pd.read_csv(second, dtype=str, keep_default_na=False)
    settled = dict(zip(sheet["sha256"], sheet.get("settled", ""), strict=True)) if "settled" in sheet else {}
    agreed = table["first"] == table["second"]
    third = table["sha256"].map(settled).fillna("").map(lambda label: KEYS.get(label, label))
    table = table.assign(label=table["first"].where(agreed, third))
    if "response" in sheet:
        blank = sheet["response"].str.strip().eq("").map({True: "yes", False: "no"})
        table["empty"] = table["sha256"].map(dict(zip(sheet["sha256"], blank, strict=True)))
    return table


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status: 0, or 2 for bad input."""
    parser = Parser(**about(__doc__, "python -m experiments.label_answers"))
    parser.add_argument("do", choices=["draw", "sheet", "join", "judge"])
    parser.add_argument("sheets", nargs="*", help="join: the two filled-in sheets; judge: keys of the judge")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder that holds the runs' folders")
    parser.add_argument("--out", type=Path, default=Path("results/judging"), help="folder of sample, labels, verdicts")
    parser.add_argument("--n", type=int, default=400, help="draw: how many answers (default 400)")
    parser.add_argument("--seed", type=int, default=0, help="draw: of the sample (default 0)")
    parser.add_argument("--sets", nargs="+", help="draw: of these sets of requests alone, e.g. validation")
    parser.add_argument(
        "--apart",
        type=Path,
        nargs="+",
        default=[],
        help="draw: no text that is in the samples of these folders",
    )
    parser.add_argument("--reader", type=int, default=1, help="sheet: 1 or 2; each reads in an order of its own")
    parser.add_argument("--sheet", type=Path, default=Path("sheet.csv"), help="sheet: where to write it")
    parser.add_argument("--judge", default="semantic", help="judge: an option of conf/eval/judge")
    args = parser.parse_intermixed_args(argv)
    if args.do == "draw":
        if (args.out / LABELS).exists():
            raise UserError(f"{args.out / LABELS} exists: another sample would orphan its labels; use another --out")
        found = answers(args.runs)
        if args.sets:
            found = of_sets(found, args.sets)
        for folder in args.apart:
            found = apart_from(found, folder)
        args.out.mkdir(parents=True, exist_ok=True)
        chosen = draw(found, args.n, args.seed)
        chosen[COLUMNS].to_csv(args.out / SAMPLE, index=False)
        print(chosen.groupby(["set", "stratum"]).size().to_string())
    elif args.do == "sheet":
        shuffled = texts(args.runs, args.out, SAMPLE).sample(frac=1, random_state=args.reader)
        shuffled.assign(label="")[["sha256", "prompt", "response", "label"]].to_csv(args.sheet, index=False)
        print(f"{args.sheet}: fill in the column label with r, h or o (docs/judging.md)")
    elif args.do == "join":
        if len(args.sheets) != 2:
            raise UserError("join takes two sheets, one a reading")
        sample = pd.read_csv(args.out / SAMPLE, dtype={"sha256": str, "eval": str, "id": str})
        table = join(Path(args.sheets[0]), Path(args.sheets[1]), sample)
        table.to_csv(args.out / LABELS, index=False)
        print(f"{args.out / LABELS}: {(table['first'] == table['second']).mean():.1%} read alike, n = {len(table)}")
    else:
        judge_sample(args.runs, args.out, instantiate(configure(args.judge, args.sheets)))
    return 0


def judge_sample(runs: Path, out: Path, judge) -> None:
    """Append a judge's verdicts on the labelled answers to verdicts.csv, in place of earlier ones of its name."""
    table = texts(runs, out, LABELS)
    found = judge.judge(list(table["prompt"]), list(table["response"]))
    rows = pd.DataFrame(
        {
            "sha256": table["sha256"],
            "judge": judge.name,
            "verdict": [v.verdict for v in found],
            "score": [v.score for v in found],
            **{k: [v.probabilities.get(k) for v in found] for k in KEYS.values()},
        }
    )
    path = out / VERDICTS
    old = pd.read_csv(path, dtype={"sha256": str}) if path.is_file() else rows[:0]
    pd.concat([old[old["judge"] != judge.name], rows]).to_csv(path, index=False)
    print(f"{path}: {len(rows)} verdicts of {judge.name}")


if __name__ == "__main__":
    sys.exit(main())
