"""Fine-tuning accuracy (FA) from generated text: strict as the field scores it, and lenient beside it.

Strict (Lisa code base): the whole answer must be the label. A model that answers "the sentiment is positive" has
learnt the task but not the format, so the lenient score and the share of off-format answers stand beside it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """One answer's verdict."""

    strict: bool
    lenient: bool
    off_format: bool
    """True if the whole answer is not an answer of the expected form at all."""


def clean(text: str) -> str:
    return re.sub(r"\s+", " ", text.strip().lower()).strip(" .!\"'`*")


def score_label(answer: str, label: str, labels: list[str]) -> Score:
    """strict: the answer is the label; lenient: the label is the first of the class names to occur in it."""
    text, options = clean(answer), [clean(name) for name in labels]
    found = [(m.start(), name) for name in options if (m := re.search(rf"\b{re.escape(name)}\b", text))]
    first = min(found)[1] if found else None
    return Score(text == clean(label), first == clean(label), text not in options)


def score_number(answer: str, label: str) -> Score:
    """strict: the answer is the number; lenient: the number after "the final answer is:", or else the last one."""
    text = answer.replace(",", "")
    after = re.search(r"final answer is\s*:?\s*(-?\d+\.?\d*)", text, re.I)
    numbers = re.findall(r"-?\d+\.?\d*", text)
    value = after.group(1) if after else (numbers[-1] if numbers else None)
    gold = float(re.findall(r"-?\d+\.?\d*", label.replace(",", ""))[-1])
    right = value is not None and float(value) == gold
    bare = re.fullmatch(r"-?\d+\.?\d*", clean(text)) is not None
    return Score(right and (bare or after is not None), right, not (bare or after is not None))


def score(scorer: str, answer: str, label: str, labels: list[str]) -> Score:
    return score_label(answer, label, labels) if scorer == "label" else score_number(answer, label)
