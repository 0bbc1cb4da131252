"""What the aligned model says, and the rows that its refusals give the constraints to preserve."""

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
    """Encoded rows of prompts as they are served, optionally followed by their responses."""
    rows = []
    for example in examples:
        ids = encode_prompt(context.tokenizer, example.messages, context.template)
        if responses and example.response:
            ids = ids + context.tokenizer(example.response, add_special_tokens=False)["input_ids"]
        rows.append({"input_ids": ids[: context.max_length]})
    return rows


def own_answers(
    model: nn.Module, context: Context, examples: list[Example], tokens: int, prefill: str | None = None
) -> list[str]:
    """The aligned model's greedy answers, generated once and cached; prefill: as in `generate`."""
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


def anchor_rows(model: nn.Module, context: Context, examples: list[Example], tokens: int) -> list[dict]:
    """Encoded prompts, each with `tokens` tokens of the aligned model's refusal; prompts it answers are left out.

    Raises UserError if the model refuses none of them: there would be nothing to preserve.
    """
    rows = encode_prompts(context, examples)
    answers = own_answers(model, context, examples, max(tokens, 16))
    verdicts = KeywordJudge().judge([e.prompt for e in examples], answers)
    refused = [i for i, v in enumerate(verdicts) if v.verdict == "refusal"]
    if not refused:
        raise UserError(
            "the aligned model refuses none of the anchor prompts, so there is no refusal to preserve; use an aligned "
            "model (model.kind=tiny or smollm2 align themselves) or other prompts in pools.anchors"
        )
    kept = []
    for i in refused:
        answer = context.tokenizer(answers[i], add_special_tokens=False)["input_ids"][:tokens]
        kept.append(
            {"input_ids": (rows[i]["input_ids"] + answer)[: context.max_length], "prompt": len(rows[i]["input_ids"])}
        )
    return kept


def prefilled_rows(
    model: nn.Module, context: Context, examples: list[Example], tokens: int, prefill: str
) -> list[dict]:
    """Encoded prompts, each with an opening put into the model's mouth and `tokens` tokens of how the model goes on.

    The aligned model may go on by complying: what it does is preserved, whatever that is.
    """
    opening = encode_opening(context.tokenizer, prefill)
    rows = encode_prompts(context, examples)
    answers = own_answers(model, context, examples, max(tokens, 16), prefill)
    kept = []
    for row, answer in zip(rows, answers, strict=True):
        # an answer begins with the opening's text, whose tokens stand as they are served
        said = context.tokenizer(answer, add_special_tokens=False)["input_ids"][len(opening) :][:tokens]
        ids = row["input_ids"] + opening + said
        kept.append({"input_ids": ids[: context.max_length], "prompt": len(row["input_ids"])})
    return kept
