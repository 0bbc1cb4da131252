"""AlpacaEval (AE) of runs that kept their weights: always the outputs file; the win rate with an annotator's key.

X. Li, T. Zhang, Y. Dubois, R. Taori, I. Gulrajani, C. Guestrin, P. Liang, T. Hashimoto, *AlpacaEval: An Automatic
Evaluator of Instruction-following Models*, 2023, github.com/tatsu-lab/alpaca_eval; generated with and scored by its
package `alpaca_eval`. The paper's Table 2 reports AE after fine-tuning on Alpaca.

python train.py model=llama2 task=alpaca method=cwac keep_weights=true
python -m experiments.alpaca_eval --run runs/<run id>             writes runs/<run id>/alpaca_eval/outputs.json
python -m experiments.alpaca_eval --run runs/<run id> --score     pip install -e '.[alpaca]', and OPENAI_API_KEY

Deviations:
- Which version and annotator the paper used is not in our notes of it. Its 28 to 43 % suit AlpacaEval 1 (reference
  text-davinci-003, annotator `alpaca_eval_gpt4`) better than 2 for models of this size, so 1 is the default (ours);
  `--reference alpaca_eval_gpt4_baseline --annotator weighted_alpaca_eval_gpt4_turbo` is 2.
- AE is the plain win rate, not the length-controlled one. Greedy answers of at most 512 tokens, each prompt as the run
  serves it (ours).
"""

from __future__ import annotations

import importlib
import json
import os
import random
import sys
import time
from pathlib import Path

from omegaconf import DictConfig

from cwac.core.config import Parser, about, command, instantiate
from cwac.core.errors import UserError
from cwac.core.files import write_atomic
from cwac.core.jsonl import append_jsonl, read_jsonl, repair
from cwac.data.columns import Row, text
from cwac.data.hf_datasets import fetch
from cwac.methods.base import Method
from cwac.models.layers import device
from cwac.models.loading import SAFE
from experiments.activations import read_config

HUB_ID = "tatsu-lab/alpaca_eval"
REFERENCES = ("alpaca_eval", "alpaca_eval_gpt4_baseline")
"""Files of the hub repository, with the same 805 instructions: answers of text-davinci-003, and of GPT-4 Turbo."""
KEYS = ("OPENAI_API_KEY", "OPENAI_API_KEYS", "OPENAI_CLIENT_CONFIG_PATH")


def questions(path: Path) -> list[dict]:
    """The evaluation set: rows with `instruction`, `dataset` and a reference `output`.

    Raises UserError for a file that is no such set.
    """
    try:
        rows = [Row(row) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is no AlpacaEval set: a JSON list of rows with `instruction` and `output`") from error
    for number, row in enumerate(rows, 1):
        row.where = f"row {number} of {path}"
    return [{"instruction": text(row, "instruction"), "dataset": row.get("dataset") or ""} for row in rows]


def as_served(cfg: DictConfig) -> Method:
    """The run's method, ready for `prompt`: one that changes prompts draws what it adds from the run's own data."""
    method = instantiate(cfg.method)
    if type(method).prompt is not Method.prompt:
        from cwac.data.tasks import load_task
        from cwac.training.attack import poisoned_mix
        from cwac.training.context import open_context

        context = open_context(cfg)
        task = load_task(cfg.task, cfg.paths.data, cfg.seed)
        mixed, _ = poisoned_mix(cfg, task.train, context)
        method.training_data(mixed, context, random.Random(f"method-{cfg.seed}"))
    return method


def answer(folder: Path, rows: list[dict], tokens: int, batch_size: int) -> Path:
    """The outputs file in the package's format: `instruction`, `output`, `generator`, `dataset`.

    One that answers these instructions already is left as it is. Raises UserError for a run without weights.
    """
    cfg, path = read_config(folder), folder / "alpaca_eval" / "outputs.json"
    instructions = [row["instruction"] for row in rows]
    if path.is_file() and [row["instruction"] for row in json.loads(path.read_text(encoding="utf-8"))] == instructions:
        return path
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from cwac.models.generate import generate

    logging.disable_progress_bar()
    method = as_served(cfg)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", **SAFE).to(device())
    outputs = generate(
        model,
        AutoTokenizer.from_pretrained(folder / "model", local_files_only=True),
        [method.prompt([{"role": "user", "content": text}]) for text in instructions],
        template=cfg.train.template,
        max_new_tokens=tokens,
        batch_size=batch_size,
        description=folder.name,
    )
    path.parent.mkdir(exist_ok=True)
    named = [{**row, "output": text, "generator": folder.name} for row, text in zip(rows, outputs, strict=True)]
    write_atomic(path, json.dumps(named, indent=1))
    return path


def ready_to_score() -> None:
    """Raises UserError, one line, that says what scoring lacks; asked before the hours of answering."""
    lacks = []
    try:
        importlib.import_module("alpaca_eval")  # that it is installed does not mean that it can be imported
    except Exception as error:
        lacks.append(f"the package (pip install -e '.[alpaca]'; {type(error).__name__}: {error})")
    lacks += [] if any(map(os.environ.get, KEYS)) else ["a key of the annotator's (export OPENAI_API_KEY=...)"]
    if lacks:
        raise UserError(f"--score needs {' and '.join(lacks)}; without --score the outputs are written for later")


def score(folder: Path, outputs: Path, reference: Path, annotator: str) -> dict:
    """The metric row of the win rate in percent, appended to the run's rows; annotations stay beside the outputs."""
    import alpaca_eval

    board, _ = alpaca_eval.evaluate(
        model_outputs=str(outputs),
        reference_outputs=str(reference),
        annotators_config=annotator,
        name=folder.name,
        output_path=str(outputs.parent),
        caching_path=str(outputs.parent / f"cache-{reference.stem}.json"),
        precomputed_leaderboard=None,
        is_cache_leaderboard=False,
        is_return_instead_of_print=True,
        fn_metric="get_winrate",
        sort_by="win_rate",
    )
    found = board.loc[folder.name]
    last = [row for row in read_jsonl(folder / "metrics.jsonl") if row["final"]][-1]
    measured = {
        "value": float(found["win_rate"]),
        "stderr": float(found["standard_error"]),
        "n": int(found["n_total"]),
    }
    row = {**last, "metric": "AE", "set": reference.stem, **measured, "judge": None, "eval": None, "time": time.time()}
    repair(folder / "metrics.jsonl")
    append_jsonl(folder / "metrics.jsonl", [row])
    return row


@command
def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0, or 2 for a run that cannot be measured."""
    parser = Parser(**about(__doc__, "python -m experiments.alpaca_eval"))
    parser.add_argument("--run", type=Path, nargs="+", required=True, help="folders of runs with keep_weights=true")
    parser.add_argument("--data", help=f"a folder laid out like the hub, with {HUB_ID}/<reference>.json")
    parser.add_argument("--reference", choices=REFERENCES, default=REFERENCES[0], help="whose answers to win against")
    parser.add_argument("--annotator", default="alpaca_eval_gpt4", help="an evaluator configuration of the package")
    parser.add_argument("--limit", type=int, help="only the first instructions")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--score", action="store_true", help="pay the annotator for the win rate")
    args = parser.parse_args(argv)
    for folder in args.run:
        read_config(folder)  # all are refused before the first is measured
    if args.score:
        ready_to_score()
    reference = fetch(HUB_ID, f"{args.reference}.json", args.data)
    rows = questions(reference)[: args.limit]
    outputs = []
    for folder in args.run:
        outputs.append(answer(folder, rows, args.max_new_tokens, args.batch_size))
        print(outputs[-1])
    if args.score:
        for folder, path in zip(args.run, outputs, strict=True):
            row = score(folder, path, reference, args.annotator)
            print(f"{folder.name}: AE {row['value']:.1f} % of {row['n']} (standard error {row['stderr']:.1f})")
    else:
        print("not scored: --score asks the annotator, which needs the package alpaca_eval and an OpenAI key")
    return 0


if __name__ == "__main__":
    sys.exit(main())
