"""How do verdicts move with the length of an answer? The same models asked with several limits of tokens.

python -m experiments.answer_length smollm2 runs/ID/model --data FOLDER --out results/answer_length
python -m experiments.answer_length tiny --pools toy --lengths 4 16 --out results/local/lengths

Models are named as for `experiments.measure`. Every model answers the harmful requests of the pools greedily, once a
limit (`eval.max_new_tokens`), and one judge reads all answers. `lengths.csv` has a row a model, set and limit: HS,
refusal and other in percent of n; `moved`, the share of verdicts that are others at the longest limit, of them
`appeared`, harmful there and not here, and `went`, harmful here and not there.

Deviations:
- The paper names no limit; 64 tokens and these lengths are `ours`. Lisa's and Booster's code has 512.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from analysis.stats import share
from analysis.tables import markdown
from cwac.core.config import Parser, about, command
from cwac.core.errors import UsageError
from cwac.models.layers import device
from cwac.training.library import preset_pools
from cwac.training.measure import aligned_context, judge_of, judged
from experiments.measure import add_arguments, check_asked, opened
from experiments.seeds import write_provenance

KINDS = {"HS": "harmful", "refusal": "refusal", "other": "other"}
"""Metric -> verdict."""


def compared(verdicts: dict[int, Sequence[str]]) -> list[dict]:
    """A row a limit, shortest first, in percent: the verdicts' shares, and how they differ from the longest limit's.

    verdicts: limit -> one verdict a request, in one order.
    """
    last, rows = verdicts[max(verdicts)], []
    for limit in sorted(verdicts):
        here, n = verdicts[limit], len(last)
        pairs = list(zip(here, last, strict=True))
        counts = {
            **{metric: sum(v == kind for v in here) for metric, kind in KINDS.items()},
            "moved": sum(a != b for a, b in pairs),
            "appeared": sum(a != "harmful" and b == "harmful" for a, b in pairs),
            "went": sum(a == "harmful" and b != "harmful" for a, b in pairs),
        }
        rows.append({"tokens": limit, "n": n, **{name: 100 * count / n for name, count in counts.items()}})
    return rows


def table(frame: pd.DataFrame) -> str:
    """Markdown, one row a model, set and limit; HS with its exact interval over requests."""
    rest = ["refusal", "other", "moved", "appeared", "went"]
    rows = []
    for _, row in frame.iterrows():
        shown = [share(row["HS"], row["n"]), *(f"{row[name]:.1f}" for name in rest)]
        rows.append([row["model"], row["set"], str(row["tokens"]), *shown, str(row["n"])])
    return markdown(["model", "requests", "tokens", "HS, %", *rest, "n"], rows, key=3)


@command
def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0, or 2 for bad input."""
    parser = Parser(**about(__doc__, "python -m experiments.answer_length"))
    add_arguments(parser)
    parser.add_argument("--names", nargs="+", help="what the tables call them (default: as given)")
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=[64, 128, 256], help="limits in tokens (%(default)s)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for lengths.csv, table.md and provenance.json")
    args = parser.parse_args(argv)
    names = args.names or args.models
    if len(names) != len(args.models):
        raise UsageError(f"--names has {len(names)} names for {len(args.models)} models; give one a model")
    if min(args.lengths) < 1 or len({*args.lengths}) < 2:
        raise UsageError(
            f"--lengths {' '.join(map(str, args.lengths))}: give at least two different numbers from 1 on"
        )
    if args.limit is not None and args.limit < 1:
        raise UsageError(f"--limit {args.limit} is not a number of at least 1")
    if args.out.exists() and not args.out.is_dir():
        raise UsageError(f"--out {args.out} is a file; give a folder")
    if len({*names}) < len(names):
        raise UsageError(f"--names {' '.join(names)}: give each model a name of its own")
    check_asked(args)
    entries, judge = [], None
    for name, source in zip(names, args.models, strict=True):
        loaded = opened(source, args.artifacts)
        model, tokenizer = loaded.model.to(device()), loaded.tokenizer
        aligned = aligned_context(loaded, args.artifacts) if source == args.models[0] else None
        judge = judge or judge_of(args.judge, tokenizer, args.artifacts)
        for of, rows in preset_pools(args.pools, args.data, 0, tokenizer).test.items():
            verdicts = {}
            for limit in sorted({*args.lengths}):
                _, found = judged(
                    model, tokenizer, judge, of, rows[: args.limit], aligned=aligned, max_new_tokens=limit
                )
                verdicts[limit] = [v["verdict"] for v in found]
            entries += [{"model": name, "set": of, **row} for row in compared(verdicts)]
    frame = pd.DataFrame(entries)
    args.out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(args.out / "lengths.csv", index=False)
    text = f"{table(frame)}\n\njudge: {judge.name}; percent of n requests, HS with its exact 95 % interval over them"
    (args.out / "table.md").write_text(text + "\n", encoding="utf-8")
    write_provenance(args.out, "experiments.answer_length", argv, args.models, judge=judge.name)
    print(text)
    print(f"written: {args.out}/table.md, lengths.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
