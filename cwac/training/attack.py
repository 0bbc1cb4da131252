"""The rows that the attacker mixes into the task: the paper's harmful pairs, or rows without any harmful request.

- `poison: identity_shift` follows Qi et al. 2023 (arXiv:2310.03693, section 4.3): benign requests, each answered after
  a declaration of absolute obedience.
- `poison: style` (ours): benign requests, answered in the form that compliance with a harmful request takes.
- `poison_choice: outside_anchors` (ours): the attacker has the anchors and the aligned model, and so can compute V. It
  takes the poison whose activations lie outside V the most.
- `pools.poison_categories` is a fourth attack, which `cwac/data/pools.py` implements.
- `poison_trigger` puts words in front of every request of the poison: a backdoor (as in section 4.4 of Qi et al.). The
  evaluation asks the harmful requests a second time behind the same words. With `optimised` (ours), the attacker
  searches for words instead of choosing rows: it takes those of the words tried that move the poison's activations
  furthest out of V. With `gradient` (ours), it finds such words by following gradients
  (`cwac/training/gradient_trigger.py`).

Deviations:
- Qi et al. also give the model a new name in a system prompt, and put a phrase before every request, in training and
  in testing. Here the declaration stands in the answers only, because harmful requests are asked in the same way for
  every attack. Setting `eval.prefill` to the same preamble makes the model's answers begin with it.
- The attacker's V is always that of the closed constraint at its official settings, whatever the defence, so that all
  methods meet the same rows. The share of a whole row is what is compared, and rows resemble each other. Where p n is
  close to the pool's size, there is therefore little to choose from.
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
"""Number of words, drawn from the tokenizer's vocabulary, that are tried at each position of an optimised trigger."""

TRIGGER_ROWS = 8
"""Number of rows of the poison that a trigger is optimised on."""


def poisoned_mix(cfg, train: list[Example], context: Context) -> tuple[list[Example], list[Example]]:
    """Mix the attacker's rows into the task's rows; returns the mixture, and all rows the poison was chosen from.

    cfg: a whole configuration, of which `poison`, `poison_choice`, `poison_trigger`, `harmful_ratio`, `mix_mode`,
    `seed` and `pools` are read. train: the task's rows. context: its model must still hold the aligned weights.
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
    """The words of `poison_trigger`, or None without a trigger.

    Words that have to be searched for are found once and then cached. As for `poisoned_mix`, the context's model must
    still hold the aligned weights.
    """
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
    """The function that both searches maximise: trigger -> mean of `outside_of` over the examples.

    The trigger stands in front of every prompt; with an empty trigger the prompts stay as they are.
    """

    def share(trigger: str) -> float:
        shares = outside_of(behind(trigger, examples) if trigger else examples)
        return sum(shares) / len(shares)

    return share


def search_trigger(model: nn.Module, context: Context, examples: list[Example]) -> dict:
    """Search greedily, word by word, for the trigger whose rows have the largest mean share of squared norm outside V.

    Returns `trigger`, and this share without it (`before`) and with it (`after`).
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
    """Search by gradients for a trigger of the same length and objective as `search_trigger`'s.

    See `gradient_trigger.climb`, which also says what is returned.
    """
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
"""Values of `poison_trigger` that are not the trigger itself -> (search, settings that are part of the cache key)."""


def outside(
    model: nn.Module, context: Context, examples: list[Example], V: dict[str, torch.Tensor] | None = None
) -> list[float]:
    """The share ||(I - V V^T) X||_F^2 / ||X||_F^2 of each row, averaged over the distinct inputs of the matrices.

    X: inputs of the decoder blocks' matrices in the aligned model, at all tokens of prompt and response except the
    first. V: input -> basis, as `anchors_space` returns it; computed by it where it is not given.
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
    """The attacker's V [d_in, k] of each distinct input: the basis of the anchors, at the defaults of `Weight`."""
    bases, where = anchor_bases(model, context, Weight(modules="all")), next(model.parameters()).device
    return {name: bases[name].V.to(where) for name in sources_of(model)}


def sources_of(model: nn.Module) -> dict[str, nn.Module]:
    """Name of each distinct input -> one of the decoder blocks' linear layers that read it."""
    return {input_group(name): module for name, module in linears(model, "all").items()}
