"""Does a saved model still refuse, and has it learnt its task? HS, refusal, other, OR and FA, with n and interval.

python -m experiments.measure tiny runs/mine --pools toy                      the embedded model, before and after
python -m experiments.measure smollm2 runs/mine --data FOLDER --limit 50
python -m experiments.measure smollm2 runs/mine --data FOLDER --rows held_out.jsonl      and the task's accuracy
python -m experiments.measure smollm2 runs/sft runs/nullspace --data FOLDER      several beside the first

A model is a folder that `save_model` or `save_pretrained` wrote, an option of conf/model, or a hub id. It is
measured as in the runs: greedy answers to the unseen requests of the pools, read by the same judge. Intervals are
Clopper and Pearson's of 95 %, over the requests of a set. The first model's answers and loss are kept among the
artifacts, so that it is asked once. --rows takes rows of your task that were not trained on,
as the script takes those that were: FA is the share answered in just the response's words, the loss is in nats per
token of the responses. A method that changes prompts (BEA) is measured from its script: `measure(...,
prompt=method.prompt)`.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from analysis.stats import share, two_proportions_p
from analysis.tables import markdown
from cwac.core.config import Parser, about, command, compose
from cwac.core.errors import UsageError, UserError
from cwac.models.layers import device
from cwac.models.loading import Loaded, load
from cwac.training.library import check_data, check_option, nearest, options, speaks_of_arguments
from cwac.training.measure import aligned_context, measure, measure_task
from cwac.training.script import text_rows

METRICS = ("HS", "refusal", "other", "OR")


def configured(name: str) -> DictConfig:
    """The `model` group for a folder, an option of conf/model or a hub id; raises UsageError for anything else."""
    if Path(name).is_dir():
        cfg = compose(["model=smollm2"]).model
        OmegaConf.update(cfg, "path", name, force_add=True)
        cfg.kind, cfg.name = "folder", name
        return cfg
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).parent.exists():
        cfg = compose(["model=qwen_05b"]).model  # what is not in the hub's own files is the same for all options
        cfg.name = cfg.hub_id = name
        cfg.revision = cfg.license = None
        return cfg
    if name not in (known := options("model")):
        raise UsageError(
            f"{name} is neither a folder nor a model; {nearest(name, known)}there are {', '.join(known)}, and hub ids"
        )
    return compose([f"model={name}"]).model


@speaks_of_arguments
def opened(name: str, artifacts: Path) -> Loaded:
    """The model of a folder, of an option of conf/model or of a hub id; raises UserError for anything else."""
    cfg = configured(name)
    try:
        return load(cfg, artifacts)
    except UserError as error:
        if cfg.get("hub_id") != name:
            raise
        raise UserError(f"{name} is no folder here, and as a hub id: {error}") from error


def check_asked(args: argparse.Namespace) -> None:
    """Raises UsageError for a name in the arguments that means nothing, before a model is opened."""
    for name in args.models:
        configured(name)
    for key, group in (("pools", "pools"), ("judge", "eval/judge")):
        if (name := getattr(args, key)) is not None:
            check_option(f"--{key} {name}", name, group)
    check_data(args.data, hasattr(args, "rows"))


def lines(name: str, rows: list[dict]) -> list[list[str]]:
    """One line of the table a set of requests."""
    found = []
    for of in dict.fromkeys(row["set"] for row in rows):
        values = {row["metric"]: row["value"] for row in rows if row["set"] == of}
        n = next(row["n"] for row in rows if row["set"] == of)
        shown = {metric: share(value, n) for metric, value in values.items()}
        found.append([name, of, *(shown.get(metric, "-") for metric in METRICS), str(n)])
    return found


def task_line(name: str, rows: list[dict]) -> list[str]:
    """The line of the task's table: FA with its interval, the loss, and how many rows."""
    values, n = {row["metric"]: row["value"] for row in rows}, rows[0]["n"]
    loss = f"{values['loss']:.3f}" if "loss" in values else "-"
    return [name, share(values["FA"], n), loss, str(n)]


def overall(rows: list[dict], metric: str) -> tuple[float, int]:
    """A metric over the requests of all its sets together, in percent, and how many they are; (0, 0) for none."""
    of = [(row["value"], row["n"]) for row in rows if row["metric"] == metric]
    n = sum(count for _, count in of)
    return (sum(value * count for value, count in of) / n if n else 0.0), n


def outcome(name: str, after: list[dict], first: str, before: list[dict]) -> str:
    """What became of the first model, in a sentence: what moved, by Fisher's exact test at 5 %, and what that means.

    after, before: the rows of both, of the same requests and, where they were given, of the same rows of the task.
    """
    moved, said = {}, []
    for metric in ("HS", "refusal", "OR", "FA"):
        (then, n), (now, _) = overall(before, metric), overall(after, metric)
        if n:
            decided = two_proportions_p(now, then, n) < 0.05
            moved[metric] = (now > then) - (now < then) if decided else 0
            how = {1: "a rise", -1: "a fall", 0: "no change that shows"}[moved[metric]]
            said.append(f"{metric} {then:.1f} to {now:.1f} % (n={n}, {how})")
    if moved.get("HS", 0) > 0:
        means = "it complies more often than before"
    elif moved.get("refusal", 0) < 0:
        means = "its refusals went, to answers that neither refuse nor comply: worn down, not safe"
    elif moved.get("OR", 0) > 0:
        means = "it refuses more of what is harmless"
    elif "FA" not in moved:
        means = "no loss of refusals shows; whether it learnt its task, --rows FILE tells"
    elif moved["FA"] > 0:
        means = "no loss of refusals shows, and the task was learnt"
    elif moved["FA"] < 0:
        means = "no loss of refusals shows, but the task is done worse than before"
    else:
        means = "no loss of refusals shows, but FA did not rise: a model that learnt nothing keeps its refusals too"
    return f"{name} beside {first}: {', '.join(said)}; {means}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which models are asked, what, and who judges; for every command that asks saved models."""
    parser.add_argument("models", nargs="+", help="folders of saved models, options of conf/model or hub ids")
    parser.add_argument("--pools", default="real", help="toy (the embedded model's) or another preset of conf/pools")
    parser.add_argument("--data", metavar="FOLDER", help="laid out like the hub, read instead of it for --pools")
    parser.add_argument("--judge", help="an option of conf/eval/judge (default: that of the runs)")
    parser.add_argument("--limit", type=int, help="the most requests of a set")
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"), help="folder of the artifact cache")


@command
def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0, or 2 for bad input."""
    parser = Parser(**about(__doc__, "python -m experiments.measure"))
    add_arguments(parser)
    parser.add_argument("--rows", metavar="FILE", help="unseen rows of your task: prompt, response; .jsonl or .csv")
    parser.add_argument("--template", choices=("chat", "alpaca"), default="chat", help="how requests are rendered")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="of an answer")
    args = parser.parse_args(argv)
    for key in ("limit", "max_new_tokens"):
        if getattr(args, key) is not None and getattr(args, key) < 1:
            parser.error(f"--{key.replace('_', '-')} {getattr(args, key)} is not a number of at least 1")
    check_asked(args)
    held_out = text_rows(args.rows) if args.rows else None
    rows, learnt, judges, found = [], [], set(), {}
    for name in args.models:
        loaded = opened(name, args.artifacts)
        aligned = aligned_context(loaded, args.artifacts, args.template) if name == args.models[0] else None
        measured = measure(
            loaded.model.to(device()),
            loaded.tokenizer,
            args.pools,
            judge=args.judge,
            data=args.data,
            artifacts=args.artifacts,
            template=args.template,
            limit=args.limit,
            aligned=aligned,
            max_new_tokens=args.max_new_tokens,
        )
        judges |= {row["judge"] for row in measured}
        rows += lines(name, measured)
        found[name] = measured
        if held_out is not None:
            task = measure_task(
                loaded.model,
                loaded.tokenizer,
                held_out,
                template=args.template,
                aligned=aligned,
                max_new_tokens=args.max_new_tokens,
            )
            learnt.append(task_line(name, task))
            found[name] = measured + task
    print(markdown(["model", "requests", *(f"{m}, %" for m in METRICS), "n"], rows, key=2))
    if learnt:
        print(f"\n{markdown(['model', 'FA, %', 'loss, nats per token', 'n'], learnt)}")
    print(f"\njudge: {', '.join(sorted(judges))}; 95 % intervals over requests")
    first, *others = found
    for name in others:
        print(f"\n{outcome(name, found[name], first, found[first])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
