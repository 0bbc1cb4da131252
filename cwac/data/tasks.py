"""Downstream tasks: seeded training and test examples, disjoint by normalised text.

Instructions and answers follow the Lisa code base (git-disl, arXiv:2405.18641), whose protocol the paper adopts;
SST-2, AG News and GSM8K are its tasks, PubMedQA and Alpaca are the paper's own (section 5.1).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from cwac.core.errors import UserError
from cwac.data.examples import Example

LONGEST = 200_000
"""Characters; a longer text is no row but a file read wrongly, and no model's context holds it."""


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
    near: word-set Jaccard from which a drawn row is a near-duplicate of one of them, and dropped; None for none.
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
        return [to_example(cfg, row, f"{cfg.name}-{name}-{i}") for i, row in enumerate(rows)]

    pool = examples(cfg.train_split, "train")
    if cfg.test_split is None:  # a set of one split: its test part depends on no run's seed or sizes
        random.Random("task-held-out").shuffle(pool)
        n = min(cfg.n_held_out, len(pool) // 2)
        test, pool = pool[:n], pool[n:]
    else:
        test = examples(cfg.test_split, "test")
    random.Random("task-validation").shuffle(pool)
    validation, pool = pool[: cfg.n_validation], pool[cfg.n_validation :]
    random.Random("task-test").shuffle(test)
    tested = {normalised(e.prompt) for e in test}
    validation = [e for e in validation if normalised(e.prompt) not in tested]
    chosen = (validation if split == "validation" else test)[: cfg.n_test]
    avoid = avoid | tested | {normalised(e.prompt) for e in validation}
    pool = [e for e in pool if normalised(e.prompt) not in avoid]
    return random.Random(f"task-{seed}").sample(pool, min(cfg.n_train, len(pool))), chosen


def to_example(cfg, row: dict, id: str) -> Example:
    """One hub row as an Example.

    cfg: `instruction`, which may name columns in braces; `text`, the column it is about (dots lead into nested ones,
    lists are joined by lines), or null; `label`, a class by index or name; `response` where the answer is a column of
    its own, in which `replace` exchanges one text for another. Raises UserError for a column that is not there.
    """
    try:
        instruction = (cfg.get("instruction") or "").format_map(row)
    except KeyError as error:
        raise _missing(cfg, error.args[0], row) from error
    content = _column(cfg, row, cfg.text) if cfg.get("text") else ""
    text = str(content if content is not None else "").strip()
    optional = "{" in (cfg.get("instruction") or "") and content is not None  # then the row's instruction is enough
    if cfg.get("text") and (len(text) > LONGEST or not text and not optional):
        problem = f"{len(text):,} characters" if text else "no text"
        raise UserError(f"task={cfg.name}: row {id} of {cfg.hub_id} has {problem} in {cfg.text!r}; mend the data")
    prompt = f"{instruction}\n\n{text}" if instruction and text else text or instruction.strip()
    label = _column(cfg, row, cfg.label) if cfg.get("label") else None
    if cfg.get("labels"):
        names = dict(enumerate(cfg.labels))
        label = names.get(label, label)
        if label not in names.values():
            raise UserError(f"task={cfg.name}: {cfg.hub_id} has the label {label!r}; expected {list(cfg.labels)}")
        return Example(id, prompt, label, label, source=cfg.name, group=label, input=text if instruction else "")
    response = str(_column(cfg, row, cfg.response)).strip()
    if cfg.get("replace"):
        response = response.replace(*cfg.replace)
    label = response.split()[-1].replace(",", "") if cfg.scorer == "number" else None
    return Example(id, prompt, response, label, source=cfg.name, input=text if instruction else "")


def _column(cfg, row: dict, path: str):
    value = row
    for part in path.split("."):
        if not isinstance(value, dict) or part not in value:
            raise _missing(cfg, path, row)
        value = value[part]
    return "\n".join(value) if isinstance(value, list) else value


def _missing(cfg, column: str, row: dict) -> UserError:
    return UserError(f"task={cfg.name}: {cfg.hub_id} has no column {column!r}; it has {', '.join(row)}")
