"""Fine-tuning accuracy (FA) from generated text: strict as the field scores it, and lenient beside it.

Strict (Lisa code base): the whole answer must be the label. A model that answers "the sentiment is positive" has
learnt the task but not the format, so the lenient score and the share of off-format answers stand beside it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

NUMBER = r"-?\d+\.?\d*"


@dataclass(frozen=True)
class Score:
    """One answer's verdict."""

    strict: bool
    lenient: bool
    off_format: bool
    """True if the whole answer is not an answer of the expected form at all."""


def clean(text: str) -> str:
    return re.sub(r"\s+", " ", text.strip().lower()).strip(" .!\"'`*")


def score_label(answer: str, label: str, labels: list[str], aliases: Mapping | None = None) -> Score:
    """strict: the answer is the label; lenient: the label is the first of the class names to occur in it.

    aliases: class name -> `{"strict": [...], "lenient": [...]}`, other names for it; the Lisa code base takes
    "sci" for AG News's "Sci/Tech", AsFT's looser search also "technology" and "tech".
    """
    text, other = clean(answer), aliases or {}
    whole = {clean(name): own for own in labels for name in (own, *other.get(own, {}).get("strict", ()))}
    within = {**whole, **{clean(name): own for own in labels for name in other.get(own, {}).get("lenient", ())}}
    found = [(m.start(), own) for name, own in within.items() if (m := re.search(rf"\b{re.escape(name)}\b", text))]
    first = min(found)[1] if found else None
    return Score(whole.get(text) == label, first == label, text not in whole)


def score_number(answer: str, label: str) -> Score:
    """strict: the answer is the number, or it follows "the final answer is:" at once.

    lenient: the first number anywhere after those words, or else the last one of all.
    """
    text = answer.replace(",", "")
    # the colon first: a gold answer of GSM8K says "the final answer is" on the way to it
    marked = re.search(r"final answer is\s*:(.*)", text, re.I | re.S) or re.search(
        r"final answer is(.*)", text, re.I | re.S
    )
    after = re.match(rf"\s*\$?\s*({NUMBER})", marked.group(1)) if marked else None
    numbers = re.findall(NUMBER, text)
    following = re.findall(NUMBER, marked.group(1)) if marked else []
    value = following[0] if following else (numbers[-1] if numbers else None)
    gold = float(re.findall(NUMBER, label.replace(",", ""))[-1])
    right = value is not None and float(value) == gold
    bare = re.fullmatch(NUMBER, clean(text)) is not None
    return Score(right and (bare or after is not None), right, not (bare or after is not None))


def score(scorer: str, answer: str, label: str, labels: list[str], aliases: Mapping | None = None) -> Score:
    return score_label(answer, label, labels, aliases) if scorer == "label" else score_number(answer, label)
