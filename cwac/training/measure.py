"""Measures a model that a script has trained: does it still refuse, only what it should, and has it learnt its task?

The requests, answers, judges and metrics are those of a run's evaluation (`cwac/evaluation/evaluate.py`); no run or
configuration is needed, and the task is a file of rows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cwac.constraints.anchors import own_answers
from cwac.core.config import compose, instantiate
from cwac.core.errors import UsageError
from cwac.data.examples import Example, Messages, Pools
from cwac.data.tokenize import encode_prompt, row_of
from cwac.evaluation.evaluate import percent, verdict_rows
from cwac.evaluation.judge import Judge, judge_answers
from cwac.evaluation.losses import aligned_loss, label_loss
from cwac.evaluation.score import clean
from cwac.models.context import Context, make_context
from cwac.models.generate import generate
from cwac.models.layers import not_finite
from cwac.models.loading import Loaded
from cwac.training.library import check_option, is_embedded, preset_pools, speaks_of_arguments


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
    aligned: Context | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 64,
) -> list[dict]:
    """HS, refusal, other and OR of a model on the unseen requests of the pools; the model is left as it was.

    pools, data, artifacts, template: as for `defend`; the sets are `test` and `over_refusal`. prompt: the defence's
    `method.prompt`, where it changes what is served (BEA). judge: an option of conf/eval/judge; None is the judge of
    the runs: `keyword` for the embedded model, `semantic` for any other. limit: the most requests of a set. aligned:
    what `aligned_context` gives, for the model before its training, which is then asked once, as runs ask it, whatever
    `batch_size` is (prompts at a time).

    Returns rows `{metric, set, value, n, stderr, judge}`, values in percent of n answers. Raises UserError for pools
    without such requests, an unknown judge, and a judge whose weights are out of reach.
    """
    if isinstance(pools, str):
        pools = preset_pools(pools, data, 0, tokenizer)
    sets = [(name, rows[:limit], False) for name, rows in pools.test.items()]
    sets += [(name, rows[:limit], True) for name, rows in pools.over_refusal.items()]
    if not any(rows for _, rows, _ in sets):
        raise UsageError("the pools have no requests to measure with; fill Pools.test and Pools.over_refusal")
    refuse_diverged(model)
    chosen = judge_of(judge, tokenizer, artifacts)
    given = {"template": template, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    measured = []
    for name, rows, harmless in sets:
        if rows:
            answers, verdicts = judged(model, tokenizer, chosen, name, rows, prompt=prompt, aligned=aligned, **given)
            measured += verdict_rows(chosen, name, answers, verdicts, harmless)
    return measured


def aligned_context(loaded: Loaded, artifacts: str | Path, template: str = "chat") -> Context:
    """Under which the answers and losses of a model that no training here changes are kept, and found again.

    They are the artifacts `answers` and `losses` of runs, keyed by the model's weights, the template, the prompts or
    rows, and the number of tokens; judges read the kept answers anew. loaded: as `cwac.models.loading.load` gives it.
    """
    return make_context(loaded, Pools(), artifacts, seed=0, template=template)


def refuse_diverged(model: PreTrainedModel) -> None:
    """Raises UsageError where a weight is no number: such a model answers nothing, and would pass for a safe one."""
    if broken := not_finite(model):
        raise UsageError(
            f"the model's {broken[0]} holds weights that are not finite; train it at a lower learning rate"
        )


def judge_of(name: str | None, tokenizer: PreTrainedTokenizerBase, artifacts: str | Path) -> Judge:
    """An option of conf/eval/judge; None is the runs' own: `keyword` for the embedded model, else `semantic`.

    Raises UsageError for an unknown name, and UserError where the judge's weights are out of reach.
    """
    name = name or ("keyword" if is_embedded(tokenizer) else "semantic")
    check_option(f"judge={name}", name, "eval/judge")
    cfg = compose([f"eval/judge={name}"])
    cfg.paths.artifacts = str(artifacts)
    return instantiate(cfg.eval.judge)


def judged(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    judge: Judge,
    name: str,
    rows: Sequence[Example],
    *,
    prompt: Callable[[Messages], Messages] | None = None,
    aligned: Context | None = None,
    **given,
) -> tuple[list[dict], list[dict]]:
    """A model's greedy answers to one set of requests, and the judge's verdicts on them, in the order of the rows.

    name: of the set, which the progress bar shows. aligned: as for `measure`. given: arguments of
    `cwac.models.generate.generate`.
    """
    texts = answered(model, tokenizer, rows, served(rows, prompt), name, aligned, **given)
    answers = [{"id": e.id, "prompt": e.prompt, "response": t} for e, t in zip(rows, texts, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        return answers, judge_answers(judge, answers, Path(folder) / "verdicts.jsonl")


def served(rows: Sequence[Example], prompt: Callable[[Messages], Messages] | None) -> list[Messages]:
    """The messages of each row as the defence serves them; None changes none."""
    return [e.messages if prompt is None else prompt(e.messages) for e in rows]


def answered(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Example],
    asked: list[Messages],
    name: str,
    aligned: Context | None,
    **given,
) -> list[str]:
    """A model's greedy answers to rows, from the artifacts where it is the aligned one and was asked them before.

    asked: what is served of each row.
    """
    if aligned is not None and asked == [e.messages for e in rows]:
        return own_answers(model, aligned, list(rows), given["max_new_tokens"])
    return generate(model, tokenizer, asked, description=name, **given)


def measure_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Mapping[str, str]],
    *,
    prompt: Callable[[Messages], Messages] | None = None,
    template: str = "chat",
    max_length: int = 512,
    aligned: Context | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 64,
) -> list[dict]:
    """FA and loss of a model on rows of one's own task that it was not trained on; the model is left as it was.

    rows: texts `prompt` and `response`, as `text_rows` gives them. prompt, aligned: as for `measure`. FA is the share
    of rows whose greedy answer is the response, apart from case, spaces and a final full stop (as in the runs), in
    percent; where responses are free text it says little, and the loss says more: nats per token of the responses,
    the turn's end among them, of rows cut at max_length tokens.

    Returns rows `{metric, set, value, n}`, FA's with `stderr`; the loss is left out where no response has a token
    within max_length. Raises UsageError without rows.
    """
    refuse_diverged(model)
    examples = [Example(f"own-{i}", row["prompt"], row["response"]) for i, row in enumerate(rows)]
    if not examples:
        raise UsageError("there are no rows to measure the task with")
    asked = served(examples, prompt)
    given = {"template": template, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    answers = answered(model, tokenizer, examples, asked, "own rows", aligned, **given)
    right = sum(clean(a) == clean(e.response) for a, e in zip(answers, examples, strict=True))
    prompts = [encode_prompt(tokenizer, messages, template) for messages in asked]
    responses = [tokenizer(e.response, add_special_tokens=False)["input_ids"] for e in examples]
    encoded = [row_of(tokenizer, *pair, template, max_length) for pair in zip(prompts, responses, strict=True)]
    measured = [percent("FA", "own rows", right, len(examples))]
    loss = label_loss(model, encoded) if aligned is None else aligned_loss(model, aligned, encoded)
    if loss is not None:
        measured.append({"metric": "loss", "set": "own rows", "value": loss, "n": len(examples)})
    return measured
