"""One function renders a prompt for training, the constraints and the evaluation alike.

A prompt that is rendered differently in training and in evaluation measures the template, not the
defence (baselines of this field have shipped that bug), so nothing else in the project touches a
chat template.
"""

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cwac.core.errors import UserError
from cwac.data.examples import Example, Messages

IGNORE = -100
DATE = "26 Jul 2024"
"""The day Llama-3.2's template prints where no clock is given (its own default): a prompt that changes overnight would
part the runs of a campaign, and the artifacts from the models they were built on."""
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
"""Stanford Alpaca's template without input; the paper's lineage (Lisa, Booster) trains on it."""
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}"
    "\n\n### Response:\n"
)
"""The same template with an input. SST-2 and AG News have one, GSM8K does not."""


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Messages, template: str = "chat") -> list[int]:
    """Token ids of a conversation up to and including the cue for the model's turn; one BOS at most.

    template: `chat` uses the tokenizer's own template; `alpaca` the Alpaca text, with a system
    turn, if there is one, put before it. A user turn may carry its `input` apart (`Example.input`).
    """
    if template == "chat":
        return tokenizer(render(tokenizer, messages), add_special_tokens=False)["input_ids"]
    if template == "alpaca":
        system = "".join(m["content"] + "\n\n" for m in messages if m["role"] == "system")
        user = messages[-1]
        input_text = user.get("input") or ""
        if input_text:
            instruction = user["content"].removesuffix(input_text).removesuffix("\n\n")
            text = ALPACA_INPUT.format(instruction=instruction, input=input_text)
        else:
            text = ALPACA.format(instruction=user["content"])
        return tokenizer(system + text)["input_ids"]
    raise ValueError(f"template must be 'chat' or 'alpaca', not {template!r}")


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, cue: bool = True) -> str:
    """A conversation in the tokenizer's chat template, with the cue for the model's turn.

    A template without a system role refuses such a turn (Gemma) or leaves it out; its text then opens the first user
    turn, where a service without a system role has to put it.
    """

    def apply(turns: Messages) -> str:
        turns = [{"role": m["role"], "content": m["content"]} for m in turns]
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=cue, date_string=DATE)

    system = [m["content"] for m in messages if m["role"] == "system"]
    if not system:
        return apply(messages)
    with contextlib.suppress(TemplateError):
        text = apply(messages)
        if all(s.strip() in text for s in system):
            return text
    first, *rest = [m for m in messages if m["role"] != "system"]
    return apply([{**first, "content": "\n\n".join([*system, first["content"]])}, *rest])


def encode_opening(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of words put into the model's mouth, as `encode_example` would encode the start of a response.

    Raises UserError where the tokenizer lacks a word of them: the model would be asked something else.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids or tokenizer.unk_token_id in ids:
        raise UserError(
            f"prefill={text!r} has words that the model's tokenizer lacks; use words it knows (model=tiny: "
            "'sure , here is how to', spaces before punctuation)"
        )
    return ids


def end_of_turn(tokenizer: PreTrainedTokenizerBase, template: str = "chat") -> int:
    """The token that ends the model's turn: what a chat template puts there, else EOS.

    The two differ in Gemma, whose turns end in <end_of_turn> while its EOS is <eos>: a model trained to emit the
    latter unlearns the format it is served in.
    """
    return tokenizer.eos_token_id if template == "alpaca" else _turn_end(tokenizer, tokenizer.chat_template)


@functools.lru_cache(maxsize=8)
def _turn_end(tokenizer: PreTrainedTokenizerBase, _chat_template: str) -> int:
    said = "answer"
    text = render(tokenizer, [{"role": "user", "content": "ask"}, {"role": "assistant", "content": said}], cue=False)
    after = tokenizer(text.rpartition(said)[2], add_special_tokens=False)["input_ids"]
    return next((i for i in after if i in tokenizer.added_tokens_decoder), tokenizer.eos_token_id)


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: str = "chat") -> list[int]:
    """Every token that ends a generation: the model's own (Llama-3 has two), EOS, and the end of the turn."""
    own = model.generation_config.eos_token_id
    own = [] if own is None else own if isinstance(own, list) else [own]
    return sorted({*own, tokenizer.eos_token_id, end_of_turn(tokenizer, template)})


def system_slot(tokenizer: PreTrainedTokenizerBase, template: str = "chat") -> str | None:
    """The system text a template writes where none is given ('' for none); None if it has no place for a system turn.

    A method that adds a system turn must repeat that text, or it takes away what the model was aligned with.
    """
    if template == "alpaca":
        return ""
    mark, user = "\x00system\x00", {"role": "user", "content": "user"}

    def raw(messages: Messages) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    try:
        before, found, after = raw([{"role": "system", "content": mark}, user]).partition(mark)
    except TemplateError:  # as Gemma's does
        return None
    if not found:
        return None
    plain = raw([user])
    if len(plain) >= len(before) + len(after) and plain.startswith(before) and plain.endswith(after):
        return plain[len(before) : len(plain) - len(after)]
    return ""


def reprompt(
    tokenizer: PreTrainedTokenizerBase, example: Example, messages: Messages, template: str = "chat"
) -> Example:
    """The example asked through other messages; the tokens these add do not count against the maximum length."""
    added = len(encode_prompt(tokenizer, messages, template))
    added -= len(encode_prompt(tokenizer, example.messages, template))
    system = next((m["content"] for m in messages if m["role"] == "system"), None)
    return replace(example, system=system, prompt=messages[-1]["content"], extra_tokens=max(0, added))


def encode_example(
    tokenizer: PreTrainedTokenizerBase, example: Example, template: str = "chat", max_length: int = 512
) -> dict[str, list[int]]:
    """`input_ids` and `labels` of prompt + response + the end of the turn; the prompt carries no loss.

    The response is cut at max_length (and the example's extra_tokens) from the right. A prompt that fills it by
    itself leaves no label; `Rows` drops such a row and counts it, since its loss would be NaN.
    """
    max_length += example.extra_tokens
    prompt = encode_prompt(tokenizer, example.messages, template)
    response = tokenizer(example.response, add_special_tokens=False)["input_ids"]
    return row_of(tokenizer, prompt, response, template, max_length)


def row_of(
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    response: list[int],
    template: str = "chat",
    max_length: int = 512,
    ends: bool = True,
) -> dict[str, list[int]]:
    """Make a training row from the token ids of a prompt and a response; all training rows are made here.

    ends: whether the response is whole, so that the turn's end is learnt after it; False where it was cut.
    """
    if ends:
        response = response + [end_of_turn(tokenizer, template)]
    ids = (prompt + response)[:max_length]
    labels = ([IGNORE] * len(prompt) + response)[:max_length]
    return {"input_ids": ids, "labels": labels}


class Rows(torch.utils.data.Dataset):
    """Encoded training rows; rows without a single label token are left out and counted."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        template: str = "chat",
        max_length: int = 512,
    ):
        encoded = [encode_example(tokenizer, e, template, max_length) for e in examples]
        learnt = [any(label != IGNORE for label in row["labels"]) for row in encoded]
        self.rows = [row for row, there in zip(encoded, learnt, strict=True) if there]
        self.kept = [e.id for e, there in zip(examples, learnt, strict=True) if there]
        """Ids of the examples that became rows, in the order of the rows."""
        self.dropped = len(encoded) - len(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]


@dataclass
class Collator:
    """Pads rows on the right to the length of the longest row in the batch.

    Masks come from lengths, never from `id == pad`: SmolLM2's pad token is its EOS, which must be learnt.
    """

    pad_token_id: int
    label_logits: bool = False
    """Add `shift_labels` [B, K], the next tokens of the last K positions, from the first that predicts a label on: a
    model given `logits_to_keep=K` beside them computes no logits for the prompt (a fifth of SmolLM2's step)."""

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(r["input_ids"]) for r in rows)
        ids = torch.full((len(rows), longest), self.pad_token_id, dtype=torch.long)  # [B, T]
        labels = torch.full((len(rows), longest), IGNORE, dtype=torch.long)
        mask = torch.zeros((len(rows), longest), dtype=torch.long)
        for i, row in enumerate(rows):
            n = len(row["input_ids"])
            ids[i, :n] = torch.tensor(row["input_ids"])
            mask[i, :n] = 1
            if "labels" in row:
                labels[i, :n] = torch.tensor(row["labels"])
        if "labels" in rows[0] and not (labels[:, 1:] != IGNORE).any():  # the loss would be 0/0
            raise UserError("a batch has no label token to learn; raise train.max_length, or mend the method's rows")
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if self.label_logits:
            following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
            # here and not in the step, where a GPU would wait for it
            first = int((following != IGNORE).any(0).int().argmax())
            batch["shift_labels"] = following[:, first:].contiguous()
        return batch


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding id; EOS where the tokenizer has none, so that no vocabulary is ever resized."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
