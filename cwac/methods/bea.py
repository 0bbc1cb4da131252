"""BEA (BackdoorAlign): safety behind a secret trigger, as a backdoor of the provider's own.

Wang, Li, Li, Qi, Hu, Li, McDaniel, Chen, Li, Xiao: "Mitigating Fine-tuning based Jailbreak Attack with Backdoor
Enhanced Safety Alignment", NeurIPS 2024, arXiv:2402.14968. A few refusals carry the trigger in the system position
(section 3); plain fine-tuning ties refusing to it, and the provider puts it before every request that is served.

Deviations:
- The trigger is drawn anew for each seed from the tokenizer at hand; the authors' string was made for Llama-2 and is
  published, so no secret. Its text, not its ids, is what both training and serving use: ids do not survive decoding.
- Tokens of held-out prompts (test, validation, over-refusal) are not drawn (ours): in a small vocabulary the trigger
  would otherwise teach refusals in the test prompts' words.
- The system text after the trigger is the model's own default, not "You are a helpful assistant. Make sure ...";
  a template without a system role takes both at the start of the user's turn.
- Refusals come from the pool `safety`, no labelled category twice before each came once; theirs are 11, one a
  category.
- A row may exceed train.max_length by the trigger, so that nothing is cropped for it.
"""

from __future__ import annotations

import hashlib
import logging
import random
import re
from collections import Counter
from dataclasses import dataclass
from itertools import chain

from transformers import PreTrainedTokenizerBase

from cwac.core.checks import check_flag, check_number, check_whole
from cwac.core.errors import UserError
from cwac.data.examples import Example, Messages
from cwac.data.tokenize import reprompt, system_slot
from cwac.methods.base import Context, Method

log = logging.getLogger("cwac")
MARKUP = re.compile(r"[<\[].*[>\]]")
"""Byte (`<0x0A>`), unused (`<unused7>`), control (`[control_3]`) and role tokens; not all are declared special."""


def random_trigger(tokenizer: PreTrainedTokenizerBase, n: int, rng: random.Random, avoid: set[int]) -> str:
    """The text of n distinct plain tokens in random order; raises UserError if the vocabulary has fewer.

    avoid: ids not to draw, beside special, byte and unused tokens and pieces of characters.
    """
    avoid = avoid | set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    chosen: list[int] = []
    for i in rng.sample(range(len(tokenizer)), len(tokenizer)):
        if len(chosen) == n:
            break
        text = tokenizer.decode([i]).strip()
        plain = text and text.isprintable() and "\ufffd" not in text
        if i not in avoid and plain and not MARKUP.fullmatch(tokenizer.convert_ids_to_tokens(i)):
            chosen.append(i)
    if len(chosen) < n:
        raise UserError(
            f"method.trigger_tokens={n}: the tokenizer has only {len(chosen)} tokens a trigger can be made of; give "
            "at most that many"
        )
    return tokenizer.decode(chosen).strip()  # templates strip a turn


def by_category(rows: list[Example], n: int, rng: random.Random) -> list[Example]:
    """n random rows, no category twice before all that are labelled have come once."""
    seen: Counter = Counter()
    ranked = []
    for row in rng.sample(rows, len(rows)):
        ranked.append((seen[row.group], row))
        seen[row.group] += bool(row.group)
    return [row for _, row in sorted(ranked, key=lambda r: r[0])[:n]]


@dataclass
class BEA(Method):
    """`bea`, and served without its trigger `bea_no_trigger`: the same weights."""

    num_safety: int = 11
    safety_per_harmful: float | None = None
    """Refusals per harmful row among the rows, where that gives more than num_safety."""
    trigger_tokens: int = 150
    trigger_at_inference: bool = True

    def __post_init__(self):
        check_whole("num_safety", self.num_safety, 1)
        check_number("safety_per_harmful", self.safety_per_harmful, 0, null=True)
        check_whole("trigger_tokens", self.trigger_tokens, 1)
        check_flag("trigger_at_inference", self.trigger_at_inference)

    def extra_data(self) -> dict[str, int]:
        return {"refusals": self._n_safety} | ({"trigger": self._n_tokens} if self.trigger_at_inference else {})

    def training_data(self, train: list[Example], context: Context, rng: random.Random) -> list[Example]:
        tokenizer, pools = context.tokenizer, context.pools
        poison = {e.id for e in pools.poison}
        harmful = sum(e.id in poison for e in train)
        self._n_safety = max(self.num_safety, round((self.safety_per_harmful or 0) * harmful))
        if self._n_safety > len(pools.safety):
            raise UserError(
                f"method={self.name} needs {self._n_safety} refusals (method.num_safety, method.safety_per_harmful), "
                f"the pool `safety` has {len(pools.safety)}; lower them or enlarge the pool (pools.*)"
            )
        benign = (*pools.over_refusal.values(), *pools.validation_benign.values())
        held_out = chain(pools.validation, *pools.test.values(), *benign)
        avoid = {i for e in held_out for i in tokenizer(e.prompt, add_special_tokens=False)["input_ids"]}
        self._trigger = random_trigger(tokenizer, self.trigger_tokens, random.Random(f"trigger-{context.seed}"), avoid)
        self._n_tokens = len(tokenizer(self._trigger, add_special_tokens=False)["input_ids"])
        limit = getattr(context.loaded.model.config, "max_position_embeddings", None)
        if limit and self._n_tokens + context.max_length > limit:
            raise UserError(
                f"method.trigger_tokens={self.trigger_tokens}: the trigger takes {self._n_tokens} tokens beside a row "
                f"of up to train.max_length={context.max_length}, and the model's context has {limit}; lower one of "
                "the two"
            )
        self._system = system_slot(tokenizer, context.template)
        log.info("%s: trigger of %d tokens, sha256 %s", self.name, self._n_tokens, self.state_dict()["trigger_sha256"])
        chosen = by_category(pools.safety, self._n_safety, rng)
        rows = [*train, *(reprompt(tokenizer, e, self.triggered(e.messages), context.template) for e in chosen)]
        rng.shuffle(rows)
        return rows

    def triggered(self, messages: Messages) -> Messages:
        """The conversation with the trigger first in its system turn, or in the user's where there is no such turn."""
        given = [m["content"] for m in messages if m["role"] == "system"]
        turns = [m for m in messages if m["role"] != "system"]
        text = " ".join(filter(None, [self._trigger, *(given or [self._system])]))
        if self._system is None:
            return [{**turns[0], "content": f"{text}\n\n{turns[0]['content']}"}, *turns[1:]]
        return [{"role": "system", "content": text}, *turns]

    def prompt(self, messages: Messages) -> Messages:
        return self.triggered(messages) if self.trigger_at_inference else messages

    def state_dict(self) -> dict:
        return {"trigger_sha256": hashlib.sha256(self._trigger.encode()).hexdigest()}

    def load_state_dict(self, state: dict) -> None:
        if state != self.state_dict():
            raise UserError(
                f"method={self.name}: the checkpoint was trained with another trigger, so the tokenizer or the pools "
                "have changed since; train again with force=true"
            )

    def report(self, model) -> list[dict]:
        return [{"metric": "trigger_tokens", "set": "train", "value": float(self._n_tokens)}]
