"""Builds the anchor rows: harmful prompts, each followed by the aligned model's own answer, as token ids.

The constraints are fitted on these rows, so what the model computes on them is what the constraints preserve.
"""

from __future__ import annotations

from torch import nn

from cwac.core.cache import digest, load_or_build
from cwac.core.errors import UserError
from cwac.core.jsonl import read_jsonl, write_jsonl
from cwac.data.examples import Example
from cwac.data.refusals import KeywordJudge
from cwac.data.tokenize import encode_opening, encode_prompt
from cwac.models.context import Context
from cwac.models.generate import generate


def encode_prompts(context: Context, examples: list[Example], responses: bool = False) -> list[dict]:
    """Token ids of each example's prompt, rendered as it is served, cut at the context's maximum length.

    responses: append the example's own response to its prompt. Returns one `{"input_ids": [...], "prompt": n}` per
    example, where n is the length of the prompt in tokens.
    """
    rows = []
    for example in examples:
        ids = encode_prompt(context.tokenizer, example.messages, context.template)
        n = len(ids)
        if responses and example.response:
            ids = ids + context.tokenizer(example.response, add_special_tokens=False)["input_ids"]
        rows.append({"input_ids": ids[: context.max_length], "prompt": min(n, context.max_length)})
    return rows


def own_answers(
    model: nn.Module, context: Context, examples: list[Example], tokens: int, prefill: str | None = None
) -> list[str]:
    """The aligned model's greedy answers to the examples' prompts, in their order; generated once and cached.

    tokens: the maximum number of new tokens. prefill: an opening that every answer starts with, as in `generate`.
    """
    key = {
        "model": context.loaded.key,
        "template": context.template,
        "prompts": digest({"prompts": [e.messages for e in examples]}),
        "tokens": tokens,
        **({"prefill": prefill} if prefill else {}),
    }

    def build(folder):
        prompts = [e.messages for e in examples]
        answers = generate(
            model,
            context.tokenizer,
            prompts,
            template=context.template,
            prefill=prefill,
            max_new_tokens=tokens,
            description="the aligned model's own answers",
        )
        write_jsonl(
            folder / "answers.jsonl", [{"id": e.id, "response": a} for e, a in zip(examples, answers, strict=True)]
        )

    folder = load_or_build(context.artifacts, "answers", key, build)
    return [row["response"] for row in read_jsonl(folder / "answers.jsonl")]


def refused(model: nn.Module, context: Context, examples: list[Example], tokens: int = 0) -> list[tuple[Example, str]]:
    """The examples whose prompts the aligned model refuses, each with its answer; a keyword rule says which.

    tokens: the maximum length of the answers, at least 16.
    Raises UserError if the model refuses none of the prompts, because there would be nothing to preserve.
    """
    answers = own_answers(model, context, examples, max(tokens, 16))
    verdicts = KeywordJudge().judge([e.prompt for e in examples], answers)
    kept = [(e, a) for e, a, v in zip(examples, answers, verdicts, strict=True) if v.verdict == "refusal"]
    if not kept:
        raise UserError(
            "the aligned model refuses none of the anchor prompts, so there is no refusal to preserve; use an aligned "
            "model (model.kind=tiny or smollm2 align themselves) or other prompts in pools.anchors"
        )
    return kept


def anchor_rows(model: nn.Module, context: Context, examples: list[Example], tokens: int) -> list[dict]:
    """Encoded prompts that the aligned model refuses, each followed by the first `tokens` tokens of its refusal.

    Prompts that the model does not refuse are left out. Returns one `{"input_ids": [...], "prompt": n}` per kept
    prompt, where n is the length of the prompt in tokens. Raises UserError as `refused` does.
    """
    found = refused(model, context, examples, tokens)
    kept = []
    for row, (_, answer) in zip(encode_prompts(context, [e for e, _ in found]), found, strict=True):
        said = context.tokenizer(answer, add_special_tokens=False)["input_ids"][:tokens]
        kept.append({"input_ids": (row["input_ids"] + said)[: context.max_length], "prompt": row["prompt"]})
    return kept


def prefilled_rows(
    model: nn.Module, context: Context, examples: list[Example], tokens: int, prefill: str
) -> list[dict]:
    """Encoded prompts, each followed by the opening `prefill` and `tokens` tokens of the model's continuation of it.

    The continuation may be a refusal or compliance: unlike `anchor_rows`, this keeps every prompt, and whatever the
    aligned model does after the opening is what the constraint preserves. Returns rows as `anchor_rows` does.
    """
    opening = encode_opening(context.tokenizer, prefill)
    rows = encode_prompts(context, examples)
    answers = own_answers(model, context, examples, max(tokens, 16), prefill)
    kept = []
    for row, answer in zip(rows, answers, strict=True):
        # an answer begins with the opening's text; its tokens are dropped here because `opening` itself is put there
        said = context.tokenizer(answer, add_special_tokens=False)["input_ids"][len(opening) :][:tokens]
        ids = row["input_ids"] + opening + said
        kept.append({"input_ids": ids[: context.max_length], "prompt": len(row["input_ids"])})
    return kept
