"""A trigger found by gradients: words that carry the poison's activations out of the anchors' V (ours).

The search follows GCG, Zou, Wang, Carlini, Nasr, Kolter, Fredrikson 2023, "Universal and Transferable Adversarial
Attacks on Aligned Language Models", arXiv:2307.15043, Algorithm 2: the gradient of an objective with respect to the
one-hot tokens of a few places says which other tokens promise most, these are tried, and the best swap is taken.

Deviations:
- The objective is the share of squared norm outside V (`outside` in cwac/training/attack.py), as for the trigger that
  is found without gradients, not the likelihood of an affirmative answer: the attacker wants rows that training can
  use.
- Tokens are whole words of the vocabulary, so that the trigger is text that encodes to the same tokens again.
- Every place's `TOP` best are tried at each step, not a random batch of all places' best; it ends where none helps.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from cwac.constraints.subspace import share_outside
from cwac.models.hooks import on_inputs

STEPS = 24
TOP = 16
"""Swaps tried at each place in a step: those whose gradient promises the most."""


def climb(
    tokens: dict[str, tuple[int, int]],
    share: Callable[[str], float],
    slopes: Callable[[str], Sequence[torch.Tensor]],
    places: int,
) -> dict:
    """The trigger of `places` words that a climb from random ones ends at.

    tokens: as `single_tokens` gives them. share(trigger): the objective. slopes(trigger): for each of its words, what
    the objective gains to first order by every token in its place, [vocabulary].
    Returns `trigger`, and the objective without it (`before`), with it (`after`), and where it began (`start`).
    """
    words = sorted(tokens)
    trigger = random.Random("gradient").sample(words, places)
    start = best = share(" ".join(trigger))
    with tqdm(total=STEPS, desc="climbing to a trigger", unit="step") as bar:
        for _ in range(STEPS):
            tried = {}
            for place, slope in enumerate(slopes(" ".join(trigger))):
                ids = torch.tensor([tokens[w][place > 0] for w in words], device=slope.device)
                for i in slope[ids].topk(min(TOP, len(words))).indices.tolist():
                    candidate = (*trigger[:place], words[i], *trigger[place + 1 :])
                    if words[i] != trigger[place]:
                        tried[candidate] = share(" ".join(candidate))
            best_candidate = max(tried, key=tried.get)
            bar.update()
            if tried[best_candidate] <= best:
                break
            trigger, best = list(best_candidate), tried[best_candidate]
            bar.set_postfix(outside=f"{best:.3f}")
    return {"trigger": " ".join(trigger), "before": share(""), "after": best, "start": start}


def single_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, tuple[int, int]]:
    """Words of letters alone that are one token each, at the beginning of a text and behind another word: both ids."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    vocabulary = sorted({tokenizer.decode([i]).strip() for i in tokenizer.get_vocab().values()})
    token_ids = {}
    for word in (w for w in vocabulary if w.isascii() and w.isalpha() and len(w) > 2):
        first, doubled = ids(word), ids(f"{word} {word}")
        if len(first) == 1 and len(doubled) == 2 and doubled[0] == first[0]:
            token_ids[word] = (first[0], doubled[1])
    return token_ids


def gradient_of_share(
    model: nn.Module, sources: dict[str, nn.Module], V: dict[str, torch.Tensor], ids: Sequence[int]
) -> torch.Tensor:
    """d share / d one-hot token [T, vocabulary] of one row; share: its squared norm outside V, mean over `sources`.

    sources, V: one module and one [d_in, k] for each distinct input, by name. The first token is not counted.
    """
    embedding, read = model.get_input_embeddings(), {}

    with torch.enable_grad(), on_inputs(sources, lambda name, x: read.update({name: x[0, 1:]})):
        embedded = embedding(torch.tensor([list(ids)], device=embedding.weight.device)).detach().requires_grad_()
        model(inputs_embeds=embedded, use_cache=False)
        shares = [share_outside(x, V[name]) for name, x in read.items()]
        (slope,) = torch.autograd.grad(sum(shares) / len(shares), embedded)
    return slope[0].float() @ embedding.weight.detach().float().T
