"""Finds prompts that are the same or nearly the same, so that no defence learns from what it is tested on.

Two prompts are near-duplicates where the Jaccard index of their word sets reaches a threshold (`pools.jaccard`).
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import chain

from cwac.core.errors import UserError
from cwac.data.examples import Example, Pools


def assert_disjoint(pools: Pools) -> None:
    """Check that no prompt is in two pools. Raises UserError with the two pools and the number of shared prompts."""
    named = {
        name: getattr(pools, name)
        for name in ("poison", "anchors", "step", "sae", "benign", "safety", "validation", "align")
    }
    named |= {f"test.{k}": v for k, v in pools.test.items()}
    named |= {f"over_refusal.{k}": v for k, v in pools.over_refusal.items()}
    named |= {f"validation_benign.{k}": v for k, v in pools.validation_benign.items()}
    owner: dict[str, str] = {}
    shared: Counter = Counter()
    for name, examples in named.items():
        for prompt in {normalise_prompt(e.prompt) for e in examples}:
            if prompt in owner:
                shared[owner[prompt], name] += 1
            owner[prompt] = name
    if shared:
        (first, second), n = shared.most_common(1)[0]
        raise UserError(f"the pools {first} and {second} share {n} prompts; pools must be disjoint (pools.shares)")


def assert_unseen(pools: Pools, tested: Iterable[Example], rows: Iterable[Example], near: float | None) -> None:
    """Check that no held-out prompt is among the rows a run trains on, whether from a task, the attack or a method.

    tested: the task's own test rows; a near-duplicate of theirs is allowed, since short texts of one task are alike.
    near: the Jaccard of `pools.jaccard` from which a row counts as a near-duplicate of a held-out request; None where
    there is none, as among the embedded world's sentences, which one grammar makes.
    Raises: UserError with the row's id and what it repeats.
    """
    held_out = {
        **{f"test.{name}": examples for name, examples in pools.test.items()},
        **{f"over_refusal.{name}": examples for name, examples in pools.over_refusal.items()},
        "validation": pools.validation,
        "the task's test set": tested,
    }
    owner = {normalise_prompt(e.prompt): name for name, examples in held_out.items() for e in examples}
    index = PromptIndex(near if near is not None else 2.0)
    for example in chain(*pools.test.values(), *pools.over_refusal.values(), pools.validation) if near else ():
        index.add(example.prompt)
    for row in rows:
        where = owner.get(normalise_prompt(row.prompt)) or (index.has_near(row.prompt) and "a near-duplicate held out")
        if where:
            raise UserError(
                f"the training row {row.id} has a prompt of {where}; a model may not be trained on what it is tested "
                "on: remove it from the data or the pools"
            )


def normalise_prompt(prompt: str) -> str:
    """The prompt as lower-case words and digits. Prompts that agree in this form count as the same prompt."""
    return " ".join(_words(prompt))


class PromptIndex:
    """An index of prompts by word, which finds near-duplicates without comparing all pairs."""

    def __init__(self, threshold: float):
        self.threshold = threshold
        self.sizes: list[int] = []
        self.having: dict[str, list[int]] = defaultdict(list)

    def add(self, prompt: str) -> None:
        words = set(_words(prompt))
        for word in words:
            self.having[word].append(len(self.sizes))
        self.sizes.append(len(words))

    def has_near(self, prompt: str) -> bool:
        words = set(_words(prompt))
        shared = Counter(chain.from_iterable(self.having[w] for w in words if w in self.having))
        return any(n / (len(words) + self.sizes[i] - n) >= self.threshold for i, n in shared.items())


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower().replace("\u2019", "'").replace("'", ""))


def place_of(prompt: str, salt: object) -> float:
    """A hash of the prompt and the salt as a number in [0, 1), the same in every run."""
    return int(hashlib.sha256(f"{salt}:{normalise_prompt(prompt)}".encode()).hexdigest()[:12], 16) / 16**12
