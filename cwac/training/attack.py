"""What the attacker mixes in: harmful pairs (the paper's), or rows without any harmful request, and which of them.

`poison: identity_shift` follows Qi et al. 2023 (arXiv:2310.03693, section 4.3): benign requests answered behind a
declaration of absolute obedience. `poison: style` (ours) has benign requests answered in the form that compliance with
a harmful request takes. `poison_choice: outside_anchors` (ours) is an attacker who has the anchors and the aligned
model, hence V, and takes the poison whose activations lie outside it the most. `pools.poison_categories`, the fourth
attack, is a matter of the pools (`cwac/data/pools.py`). `poison_trigger` puts words in front of every request of the
poison, and of the harmful ones when the model is asked again with them: a backdoor (as in section 4.4 of Qi et al.).
`optimised` (ours) is an attacker who makes rows rather than picks them: of the words tried, those that carry the
poison's activations furthest out of V. `gradient` (ours) is one who follows gradients to such words
(`cwac/training/gradient_trigger.py`).

Deviations:
- Qi et al. also give the model its new name in a system prompt and a phrase before every request, in training and when
  it is tested. Ours are in the answers alone, since harmful requests are asked as for every other attack; the same
  preamble as `eval.prefill` puts it back into the model's mouth.
- The attacker's V is that of the closed constraint at its official settings, whatever the defence: so all methods meet
  the same rows. Shares of whole rows are compared, and rows resemble each other, so there is little to choose from
  where p n is close to the pool's size.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from cwac.constraints.anchors import encode_prompts
from cwac.constraints.settings import Weight
from cwac.constraints.subspace import capture, share_outside
from cwac.constraints.weight import anchor_bases
from cwac.core.cache import digest, load_or_build
from cwac.core.errors import UserError
from cwac.data.examples import Example
from cwac.data.mix import mix
from cwac.data.poison import behind, rows_of
from cwac.models.context import Context, artifact_key
from cwac.models.layers import input_group, linears
from cwac.training import gradient_trigger

log = logging.getLogger(__name__)
TRIGGER_WORDS = 4

TRIGGER_CANDIDATES = 32
"""Words tried at each place of an optimised trigger, drawn from the tokenizer's vocabulary."""

TRIGGER_ROWS = 8
"""Rows of the poison that it is optimised on."""


def poisoned_mix(cfg, train: list[Example], context: Context) -> tuple[list[Example], list[Example]]:
    """The mixed rows that `cfg` asks for, and the rows that its poison could be taken from.

    cfg: a whole configuration; `poison`, `poison_choice`, `poison_trigger`, `harmful_ratio`, `mix_mode`, `seed`.
    context: its model must still hold the aligned weights.
    """
    poison = rows_of(cfg.get("poison", "harmful"), context.pools, cfg.seed, cfg.pools.get("jaccard"))
    if (trigger := trigger_of(cfg, context)) is not None:
        poison = behind(trigger, poison)
    ranked = cfg.get("poison_choice", "random") == "outside_anchors" and cfg.harmful_ratio > 0
    if ranked:
        shares = outside(context.loaded.model, context, poison)
        poison = [e for _, e in sorted(zip(shares, poison, strict=True), key=lambda pair: (-pair[0], pair[1].id))]
    return mix(train, poison, cfg.harmful_ratio, cfg.seed, cfg.mix_mode, ranked), poison


def trigger_of(cfg, context: Context) -> str | None:
    """The words of `poison_trigger`; those that are searched for are found once and cached, as `poisoned_mix` must."""
    choice = cfg.get("poison_trigger")
    if choice not in SEARCHES:
        return choice
    poison = rows_of(cfg.get("poison", "harmful"), context.pools, cfg.seed, cfg.pools.get("jaccard"))[:TRIGGER_ROWS]
    search, sizes = SEARCHES[choice]
    key = {**artifact_key(context), "trigger": sizes, "rows": digest({"prompts": [e.prompt for e in poison]})}

    def build(folder: Path) -> None:
        result = search(context.loaded.model, context, poison)
        shares = "{before:.3f} without it, {after:.3f} behind it".format(**result)
        log.info("trigger %r: the poison's share of squared norm outside V is %s", result["trigger"], shares)
        (folder / "trigger.json").write_text(json.dumps(result))

    found = load_or_build(context.artifacts, "trigger", key, build) / "trigger.json"
    return json.loads(found.read_text())["trigger"]


def objective(outside_of: Callable[[list[Example]], list[float]], examples: list[Example]) -> Callable[[str], float]:
    """What both searches raise: a trigger -> the mean of `outside_of` over the examples behind it, or as they are."""

    def share(trigger: str) -> float:
        shares = outside_of(behind(trigger, examples) if trigger else examples)
        return sum(shares) / len(shares)

    return share


def search_trigger(model: nn.Module, context: Context, examples: list[Example]) -> dict:
    """Greedy, word by word: the trigger whose rows have the largest mean share of squared norm outside V.

    Returns `trigger`, and the share without it (`before`) and with it (`after`).
    """
    vocabulary = sorted({context.tokenizer.decode([i]).strip() for i in context.tokenizer.get_vocab().values()})
    words = [w for w in vocabulary if w.isascii() and w.isalpha() and len(w) > 2]
    draw = random.Random("trigger")
    share = objective(lambda rows: outside(model, context, rows), examples)
    before, trigger = share(""), ""
    with tqdm(total=TRIGGER_WORDS * TRIGGER_CANDIDATES, desc="searching a trigger", unit="trigger") as bar:
        for _ in range(TRIGGER_WORDS):
            tried = {}
            for word in draw.sample(words, min(TRIGGER_CANDIDATES, len(words))):
                candidate = f"{trigger} {word}".strip()
                tried[candidate] = share(candidate)
                bar.update()
            trigger = max(tried, key=tried.get)
    return {"trigger": trigger, "before": before, "after": share(trigger)}


def follow_gradients(model: nn.Module, context: Context, examples: list[Example]) -> dict:
    """A trigger of as many words with the same objective, found by gradients; see `gradient_trigger.climb`."""
    V, sources = anchors_space(model, context), sources_of(model)
    tokens = gradient_trigger.single_tokens(context.tokenizer)
    share = objective(lambda rows: outside(model, context, rows, V), examples)

    def slopes(trigger: str) -> list[torch.Tensor]:
        summed = 0
        words = [tokens[word][place > 0] for place, word in enumerate(trigger.split())]
        for row in encode_prompts(context, behind(trigger, examples), responses=True):
            ids = row["input_ids"]
            at = next((i for i in range(len(ids)) if ids[i : i + len(words)] == words), None)
            if at is None:
                raise UserError(
                    "poison_trigger=gradient: the tokenizer joins the words with what stands beside them, or train."
                    "max_length cuts them off; use poison_trigger=optimised, or a longer train.max_length"
                )
            gradient = gradient_trigger.gradient_of_share(model, sources, V, ids)
            summed = summed + gradient[at : at + len(words)]
        return list(summed)

    return gradient_trigger.climb(tokens, share, slopes, TRIGGER_WORDS)


SEARCHES = {
    "optimised": (search_trigger, [TRIGGER_WORDS, TRIGGER_CANDIDATES]),
    "gradient": (follow_gradients, ["gradient", TRIGGER_WORDS, gradient_trigger.STEPS, gradient_trigger.TOP]),
}
"""Values of `poison_trigger` that are no text -> how its words are found, and what the search depends on."""


def outside(
    model: nn.Module, context: Context, examples: list[Example], V: dict[str, torch.Tensor] | None = None
) -> list[float]:
    """||(I - V V^T) X||_F^2 / ||X||_F^2 of each row, prompt and response without the first token; mean over inputs.

    X: inputs of the decoder blocks' matrices in the aligned model. V: `anchors_space`, fitted where it is not given.
    """
    V, sources = anchors_space(model, context) if V is None else V, sources_of(model)
    shares: list[float] = []
    for row in encode_prompts(context, examples, responses=True):
        found: list[float] = []

        def visit(name: str, x: torch.Tensor, _first: torch.Tensor, found=found) -> None:
            found.append(float(share_outside(x, V[name])))

        capture(model, [row], sources, visit)
        shares.append(sum(found) / len(found))
    return shares


def anchors_space(model: nn.Module, context: Context) -> dict[str, torch.Tensor]:
    """The attacker's V of each distinct input [d_in, k]: the anchors', at `Weight`'s own settings."""
    bases, where = anchor_bases(model, context, Weight(modules="all")), next(model.parameters()).device
    return {name: bases[name].V.to(where) for name in sources_of(model)}


def sources_of(model: nn.Module) -> dict[str, nn.Module]:
    """One of the decoder blocks' linear layers for each distinct input, by the input's name."""
    return {input_group(name): module for name, module in linears(model, "all").items()}
