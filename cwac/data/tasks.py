"""Downstream tasks: seeded training and test examples, disjoint by normalised text.

Instructions and answers follow the Lisa code base (git-disl, arXiv:2405.18641), whose protocol the paper adopts;
SST-2, AG News and GSM8K are its tasks, PubMedQA and Alpaca are the paper's own (section 5.1).
"""

from __future__ import annotations

import logging
import random
import re
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from omegaconf import OmegaConf

from cwac.core.errors import UserError
from cwac.data.columns import cell, lines, problem, text
from cwac.data.examples import Example

log = logging.getLogger(__name__)
NUMBER = re.compile(r"[$€£]?(-?\d+(?:\.\d+)?)[.%]?")
"""The form of a correct answer for the scorer `number`, after thousands separators were removed."""


@dataclass(frozen=True)
class Task:
    """Examples of one downstream task."""

    train: list[Example]
    test: list[Example]
    labels: list[str]
    """Class names; empty for open answers and numbers."""
    aliases: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    """Class name -> its other names: `strict` ones count as the label, `lenient` ones in the lenient score alone."""


def load_task(
    cfg, data: str | None, seed: int, split: str = "test", avoid: Iterable[str] = (), near: float | None = None
) -> Task:
    """`cfg.n_train` training and `cfg.n_test` test examples, fewer where the set is smaller.

    The test examples do not depend on the seed, so that every run is scored on the same prompts.
    split: `test`, or `validation` for tuning; the two never share a prompt.
    avoid: prompts that may not be trained on: the held-out pools, one of which comes from Alpaca, as the task does.
    near: a training row whose word-set Jaccard index with one of them reaches this is dropped; None keeps all.
    """
    avoid = list(avoid)
    if cfg.kind == "toy":
        from cwac.data.tiny_world import task

        train = task(cfg.name, "train", cfg.n_train, seed)
        test = task(cfg.name, split, cfg.n_test, 0)
    else:
        train, test = _real(cfg, data, seed, split, {normalised(prompt) for prompt in avoid})
    seen = {normalised(e.prompt) for e in test}
    train = [e for e in train if normalised(e.prompt) not in seen]
    if near is not None:
        from cwac.data.near_duplicates import PromptIndex

        index = PromptIndex(near)
        for prompt in avoid:
            index.add(prompt)
        train = [e for e in train if not index.has_near(e.prompt)]
    if not train or not test:
        raise UserError(f"task={cfg.name} has {len(train)} training and {len(test)} test rows; check paths.data")
    return Task(train, test, list(cfg.get("labels") or []), dict(cfg.get("aliases") or {}))


def normalised(text: str) -> str:
    return re.sub(r"\W+", " ", text.lower()).strip()


def _real(cfg, data: str | None, seed: int, split: str, avoid: set[str]) -> tuple[list[Example], list[Example]]:
    from cwac.data.hf_datasets import load_rows

    def examples(of: str, name: str) -> list[Example]:
        rows = load_rows(cfg.hub_id, cfg.get("hub_config"), of, data)
        found = [to_example(columns, row, f"{cfg.name}-{name}-{i}") for i, row in enumerate(rows)]
        kept = [e for e in found if e.response]
        if len(kept) < len(found):
            log.warning(
                "task=%s: %d of %d rows of %s (%s) have an empty answer and are left out",
                *(cfg.name, len(found) - len(kept), len(found), cfg.hub_id, of),
            )
        return kept

    columns = OmegaConf.to_container(cfg, resolve=True)  # a dict: read ten times a row, where OmegaConf takes its time
    pool = examples(cfg.train_split, "train")
    if cfg.test_split is None:  # a set of one split: its test part depends on no run's seed or sizes
        random.Random("task-held-out").shuffle(pool)
        n = min(cfg.n_held_out, len(pool) // 2)
        test, pool = pool[:n], pool[n:]
    else:
        test = examples(cfg.test_split, "test")
    if 0 < len(pool) <= cfg.n_validation:
        raise UserError(
            f"task.n_validation={cfg.n_validation} takes all {len(pool)} rows of task={cfg.name} that could be "
            "trained on; give a smaller task.n_validation, or more rows"
        )
    random.Random("task-validation").shuffle(pool)
    validation, pool = pool[: cfg.n_validation], pool[cfg.n_validation :]
    random.Random("task-test").shuffle(test)
    tested = {normalised(e.prompt) for e in test}
    validation = [e for e in validation if normalised(e.prompt) not in tested]
    chosen = (validation if split == "validation" else test)[: cfg.n_test]
    avoid = avoid | tested | {normalised(e.prompt) for e in validation}
    pool = [e for e in pool if normalised(e.prompt) not in avoid]
    return random.Random(f"task-{seed}").sample(pool, min(cfg.n_train, len(pool))), chosen


def to_example(cfg: Mapping, row: Mapping, id: str) -> Example:
    """One hub row as an Example; an empty open answer is kept, for the caller to leave out.

    cfg: `instruction`, which may name columns in braces; `text`, the column it is about (dots lead into nested ones,
    lists are joined by lines), or null; `label`, a class by index or name; `response` where the answer is a column of
    its own, in which `replace` exchanges one text for another. Raises UserError that names file, row and column for a
    column that is not there, and for a cell that is null, no text, no class or (scorer `number`) no number.
    """
    named = [name for _, name, _, _ in string.Formatter().parse(cfg.get("instruction") or "") if name]
    columns = {name: text(row, name, empty=True) for name in named if name.isidentifier()}
    try:
        instruction = (cfg.get("instruction") or "").format_map({**row, **columns})
    except (LookupError, AttributeError, ValueError) as error:
        raise problem(row, f"does not fit task.instruction={cfg['instruction']!r} ({error})") from error
    absent = not cfg.get("text") or bool(named) and cell(row, cfg["text"]) is None  # the row's instruction is enough
    content = "" if absent else lines(row, cfg["text"]).strip()
    if cfg.get("text") and not content and not named:
        raise problem(row, f"has no text in {cfg['text']!r}: it is empty")
    prompt = f"{instruction}\n\n{content}" if instruction and content else content or instruction.strip()
    if not prompt:
        raise problem(row, f"has no text in {', '.join(map(repr, named))}: it is empty")
    apart = content if instruction else ""
    if cfg.get("labels"):
        label = _class(cfg, row)
        return Example(id, prompt, label, label, source=cfg["name"], group=label, input=apart)
    response = text(row, cfg["response"], empty=cfg["scorer"] != "number").strip()
    if cfg.get("replace"):
        response = response.replace(*cfg["replace"])
    label = _number(row, cfg["response"], response) if cfg["scorer"] == "number" else None
    return Example(id, prompt, response, label, source=cfg["name"], input=apart)


def _class(cfg: Mapping, row: Mapping) -> str:
    """The name of a row's class, from its name in any case or its index, either of which a text file spells."""
    column, labels = cfg["label"], cfg["labels"]
    value = cell(row, column)
    names = {name.strip().lower(): name for name in labels}
    said = str(value).strip().lower()
    if said in names:
        return names[said]
    index = re.fullmatch(r"(\d+)(\.0)?", said)
    if index and int(index[1]) < len(labels):
        return labels[int(index[1])]
    raise problem(row, f"has the label {value!r} in {column!r}; expected one of {list(labels)}, or its index")


def _number(row: Mapping, column: str, response: str) -> str:
    """The number at the end of an answer, as text without commas; raises UserError if there is none."""
    last = response.split()[-1].replace(",", "")
    if not NUMBER.fullmatch(last):
        raise problem(row, f"ends in {last!r} in {column!r} where task.scorer=number needs a number")
    return last
