"""Measures a model that a script has trained: does it still refuse, and only what it should?

The requests, answers, judges and metrics are those of a run's evaluation (`cwac/evaluation/evaluate.py`); no run, task
or configuration is needed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cwac.core.config import compose, instantiate
from cwac.core.errors import UsageError
from cwac.data.examples import Messages, Pools
from cwac.evaluation.evaluate import verdict_rows
from cwac.evaluation.judge import judge_answers
from cwac.models.generate import generate
from cwac.training.library import is_embedded, nearest, options, preset_pools, speaks_of_arguments


@speaks_of_arguments
def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pools: Pools | str = "real",
    *,
    prompt: Callable[[Messages], Messages] | None = None,
    judge: str | None = None,
    data: str | None = None,
    artifacts: str | Path = "artifacts",
    template: str = "chat",
    limit: int | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 64,
) -> list[dict]:
    """HS, refusal, other and OR of a model on the unseen requests of the pools; the model is left as it was.

    pools, data, artifacts, template: as for `defend`; the sets are `test` and `over_refusal`. prompt: the defence's
    `method.prompt`, where it changes what is served (BEA). judge: an option of conf/eval/judge; None is the judge of
    the runs: `keyword` for the embedded model, `semantic` for any other. limit: the most requests of a set.

    Returns rows `{metric, set, value, n, stderr, judge}`, values in percent of n answers. Raises UserError for pools
    without such requests, an unknown judge, and a judge whose weights are out of reach.
    """
    judge = judge or ("keyword" if is_embedded(tokenizer) else "semantic")
    if judge not in (known := options("eval/judge")):
        raise UsageError(f"judge={judge} is unknown; {nearest(judge, known)}there are {', '.join(known)}")
    if isinstance(pools, str):
        pools = preset_pools(pools, data, 0, tokenizer)
    sets = [(name, rows[:limit], False) for name, rows in pools.test.items()]
    sets += [(name, rows[:limit], True) for name, rows in pools.over_refusal.items()]
    if not any(rows for _, rows, _ in sets):
        raise UsageError("the pools have no requests to measure with; fill Pools.test and Pools.over_refusal")
    cfg = compose([f"eval/judge={judge}"])
    cfg.paths.artifacts = str(artifacts)
    chosen, served = instantiate(cfg.eval.judge), prompt or (lambda messages: messages)
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        for name, rows, harmless in sets:
            if not rows:
                continue
            texts = generate(
                model,
                tokenizer,
                [served(e.messages) for e in rows],
                template=template,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                description=name,
            )
            answers = [{"id": e.id, "prompt": e.prompt, "response": t} for e, t in zip(rows, texts, strict=True)]
            verdicts = judge_answers(chosen, answers, Path(folder) / f"{len(measured)}.jsonl")
            measured += verdict_rows(chosen, name, answers, verdicts, harmless)
    return measured
