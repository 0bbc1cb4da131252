"""What a defence costs beside its task's accuracy: perplexity, distance from the aligned model, and lm-eval's tasks.

python -m experiments.utility --run runs/<run id>                             the built-in set, without any network
python -m experiments.utility --run runs/<run id> --tasks arc_easy hellaswag  by lm-eval: pip install -e '.[utility]'
python -m experiments.utility --run runs/<run id> --tasks mine --include DIR  lm-eval's own format, DIR/mine.yaml
python -m experiments.utility --runs runs --table                             what was measured, a method a row

Runs have to keep their weights (keep_weights=true). Every number is a row `utility` of the run's metrics.jsonl, whose
`set` says which; what is there is measured again and the newest counts.

The built-in set are the harmless instructions with answers of the pool `benign`, teacher-forced. `perplexity` is exp
of the mean negative log-likelihood of an answer's token, `perplexity aligned` that of the model before the run, and
`KL` the mean over the same tokens of KL(aligned || trained), in nats.

L. Gao et al., *A framework for few-shot language model evaluation*, doi:10.5281/zenodo.5371628 (`lm-eval`): tasks,
their metrics and standard errors are the package's own.

Deviations:
- The paper measures no utility; all of it is `ours`.
- Methods that train on the pool's rows (`extra_data`: harmless rows) have seen them; tables name such data beside.
"""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from filelock import FileLock
from torch import nn

from cwac.constraints.anchors import encode_prompts
from cwac.core.config import Parser, about, command
from cwac.core.errors import UserError
from cwac.core.jsonl import append_jsonl, read_jsonl, repair
from cwac.models.hooks import batches, device_of
from cwac.models.layers import device
from cwac.models.loading import SAFE, load_aligned
from cwac.training.context import open_context
from experiments.activations import read_config

METRIC = "utility"


@torch.no_grad()
def answers_kept(trained: nn.Module, aligned: nn.Module, rows: Sequence[dict]) -> dict[str, float]:
    """`perplexity`, `perplexity aligned` and `KL` over the answer tokens of rows, and their number `n`.

    rows: `{"input_ids": [...], "prompt": tokens before the answer}`. Logits are compared in fp32.
    """
    total = dict.fromkeys(("trained", "aligned", "kl"), 0.0)
    n = 0
    for chosen, batch in batches(rows, device_of(trained), 2048):
        now = trained(**batch, use_cache=False).logits.float().log_softmax(-1)
        then = aligned(**batch, use_cache=False).logits.float().log_softmax(-1)
        for place, i in enumerate(chosen):
            ids = torch.tensor(rows[i]["input_ids"], device=now.device)
            at = slice(rows[i]["prompt"] - 1, len(ids) - 1)  # the logits that say the answer's tokens
            target = ids[rows[i]["prompt"] :].unsqueeze(1)
            p, q = then[place, at], now[place, at]
            total["trained"] -= q.gather(1, target).sum().item()
            total["aligned"] -= p.gather(1, target).sum().item()
            total["kl"] += (p.exp() * (p - q)).sum().item()
            n += len(target)
    if not n:
        raise UserError("the pool `benign` has no answer within train.max_length, so there is nothing to measure on")
    return {
        "perplexity": math.exp(total["trained"] / n),
        "perplexity aligned": math.exp(total["aligned"] / n),
        "KL": total["kl"] / n,
        "n": n,
    }


def built_in(folder: Path, artifacts: Path | None, limit: int | None) -> list[dict]:
    """The rows of the built-in set, of a run's weights against the aligned model's."""
    cfg = read_config(folder)
    if artifacts is not None:
        cfg.paths.artifacts = str(artifacts)
    context = open_context(cfg)
    examples = [e for e in context.pools.benign if e.response][:limit]
    prompts, whole = encode_prompts(context, examples), encode_prompts(context, examples, responses=True)
    rows = [
        {"input_ids": row["input_ids"], "prompt": len(prompt["input_ids"])}
        for prompt, row in zip(prompts, whole, strict=True)
        if len(row["input_ids"]) > len(prompt["input_ids"])
    ]
    measured = answers_kept(kept(folder).to(device()), load_aligned(context.loaded).to(device()), rows)
    n = measured.pop("n")
    return [{"set": name, "value": value, "n": n, "stderr": None} for name, value in measured.items()]


def kept(folder: Path) -> nn.Module:
    """The weights that a run kept, in fp32 and evaluation mode; raises UserError where they do not load."""
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, **SAFE).eval()
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}/model does not load ({str(error).splitlines()[0]}); train the run again") from error


def harness():
    """The package lm-eval; raises UserError where it cannot be imported."""
    try:
        import lm_eval
        from lm_eval import models, tasks  # noqa: F401  # what `simple_evaluate` needs, missing where half installed
    except Exception as error:
        raise UserError(
            f"--tasks needs lm-eval (pip install -e '.[utility]'; {type(error).__name__}: {error}); without --tasks "
            "the built-in set is measured"
        ) from error
    return lm_eval


def by_harness(folder: Path, tasks: Sequence[str], include: Path | None, limit: int | None, batch: int) -> list[dict]:
    """The rows of lm-eval's tasks: each metric of each task, with its standard error and number of samples.

    include: a folder of task files. Raises UserError for a task that is none, or whose data cannot be had.
    """
    lm_eval = harness()
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    manager = TaskManager(include_path=str(include) if include else None)
    if unknown := sorted(set(tasks) - set(manager.all_tasks)):
        where = f" and {include}" if include else ""
        raise UserError(f"--tasks {unknown[0]} is no task of lm-eval's{where}; `lm-eval ls tasks` lists its own")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model", local_files_only=True)
    model = HFLM(pretrained=kept(folder).to(device()), tokenizer=tokenizer, batch_size=batch, backend="causal")
    try:
        found = lm_eval.simple_evaluate(
            model=model, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=1000, log_samples=False
        )
    except (OSError, ConnectionError, ValueError) as error:
        raise UserError(
            f"--tasks {' '.join(tasks)}: {type(error).__name__}: {str(error).splitlines()[0][:200]}; with local data, "
            "give a task file of your own with --include"
        ) from error
    rows = []
    for task, results in found["results"].items():
        n = (found.get("n-samples") or {}).get(task, {}).get("effective")
        for key, value in results.items():
            metric, _, how = key.partition(",")
            if how and not metric.endswith("_stderr") and isinstance(value, int | float):
                error = results.get(f"{metric}_stderr,{how}")
                name = f"{task} {metric}" + ("" if how == "none" else f" {how}")
                stderr = float(error) if isinstance(error, int | float) else None
                rows.append({"set": name, "value": float(value), "n": n, "stderr": stderr})
    return rows


def record(folder: Path, rows: Sequence[dict]) -> None:
    """Append the rows to the run's, at the place of its final evaluation."""
    with FileLock(folder.parent / f".{folder.name}.lock"):
        final = [row for row in read_jsonl(folder / "metrics.jsonl") if row.get("final")]
        if not final:
            raise UserError(f"--run {folder} has no final evaluation; run its command again until it is done")
        where = {**final[-1], "metric": METRIC, "judge": None, "eval": None, "time": time.time()}
        repair(folder / "metrics.jsonl")
        append_jsonl(folder / "metrics.jsonl", [{**where, **row} for row in rows])


@command
def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0, or 2 for a run or a task that cannot be measured."""
    parser = Parser(**about(__doc__, "python -m experiments.utility"))
    parser.add_argument("--run", type=Path, nargs="+", default=[], help="folders of runs with keep_weights=true")
    parser.add_argument("--tasks", nargs="+", default=[], help="tasks of lm-eval, instead of the built-in set")
    parser.add_argument("--include", type=Path, help="a folder of lm-eval's task files")
    parser.add_argument("--limit", type=int, help="only the first instructions, or samples of a task")
    parser.add_argument("--batch-size", type=int, default=8, help="of lm-eval")
    parser.add_argument("--artifacts", type=Path, help="folder of the artifact cache (the run's own)")
    parser.add_argument("--runs", type=Path, help="with --table: the folder of the runs")
    parser.add_argument("--table", action="store_true", help="print what was measured, and measure nothing")
    args = parser.parse_args(argv)
    if args.table:
        from analysis.collect import collect
        from analysis.tables import utility

        print(utility(collect(args.runs or Path("runs")).rows) or "no run has a row `utility`")
        return 0
    if not args.run:
        parser.error("give --run, or --runs with --table")
    for folder in args.run:
        read_config(folder)  # all are refused before the first is measured
    if args.tasks:
        harness()
    for folder in args.run:
        if args.tasks:
            rows = by_harness(folder, args.tasks, args.include, args.limit, args.batch_size)
        else:
            rows = built_in(folder, args.artifacts, args.limit)
        record(folder, rows)
        shown = "  ".join(f"{row['set']} {row['value']:.4g}" for row in rows)
        print(re.sub(r"\s+$", "", f"{folder.name}: {shown}"))
    print("written to the runs' metrics.jsonl; --table shows them side by side")
    return 0


if __name__ == "__main__":
    sys.exit(main())
