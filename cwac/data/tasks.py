"""Downstream tasks: seeded training and test examples, disjoint by normalised text.

Instructions and answer formats follow the Lisa code base (git-disl), whose protocol the paper adopts.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from cwac.config import UserError
from cwac.data.examples import Example


@dataclass(frozen=True)
class Task:
    """Examples of one downstream task."""

    train: list[Example]
    test: list[Example]
    labels: list[str]
    """Class names; empty for open answers and numbers."""


def load_task(cfg, data: str | None, seed: int, split: str = "test") -> Task:
    """`cfg.n_train` training and `cfg.n_test` test examples, fewer where the set is smaller.

    The test examples do not depend on the seed, so that every run is scored on the same prompts.
    split: `test`, or `validation` for tuning; the two never share a prompt.
    """
    if cfg.kind == "toy":
        from cwac.tiny.world import task

        train = task(cfg.name, "train", cfg.n_train, seed)
        test = task(cfg.name, split, cfg.n_test, 0)
    else:
        train, test = _real(cfg, data, seed, split)
    seen = {normalised(e.prompt) for e in test}
    train = [e for e in train if normalised(e.prompt) not in seen]
    if not train or not test:
        raise UserError(f"task={cfg.name} has {len(train)} training and {len(test)} test rows; check paths.data")
    return Task(train, test, list(cfg.get("labels") or []))


def normalised(text: str) -> str:
    return re.sub(r"\W+", " ", text.lower()).strip()


def _real(cfg, data: str | None, seed: int, split: str) -> tuple[list[Example], list[Example]]:
    from cwac.data.hub import load_rows

    rows = load_rows(cfg.hub_id, cfg.get("hub_config"), cfg.train_split, data)
    held = load_rows(cfg.hub_id, cfg.get("hub_config"), cfg.test_split, data)
    pool = [to_example(cfg, row, f"{cfg.name}-train-{i}") for i, row in enumerate(rows)]
    random.Random("task-validation").shuffle(pool)
    validation, pool = pool[: cfg.n_validation], pool[cfg.n_validation :]
    test = [to_example(cfg, row, f"{cfg.name}-test-{i}") for i, row in enumerate(held)]
    random.Random("task-test").shuffle(test)
    chosen = (validation if split == "validation" else test)[: cfg.n_test]
    avoid = {normalised(e.prompt) for e in [*validation, *test]}
    pool = [e for e in pool if normalised(e.prompt) not in avoid]
    return random.Random(f"task-{seed}").sample(pool, min(cfg.n_train, len(pool))), chosen


def to_example(cfg, row: dict, id: str) -> Example:
    """One hub row as an Example, by the task's `text`, `label` and `instruction` keys."""
    for column in (cfg.text, cfg.label):
        if column not in row:
            raise UserError(f"task={cfg.name}: {cfg.hub_id} has no column {column!r}; it has {', '.join(row)}")
    label = cfg.labels[int(row[cfg.label])] if cfg.get("labels") else str(row[cfg.label])
    prompt = f"{cfg.instruction}\n\n{row[cfg.text].strip()}" if cfg.get("instruction") else row[cfg.text].strip()
    return Example(id, prompt, label, label=label, source=cfg.name, group=label if cfg.get("labels") else "")
