"""Batched greedy generation, longest prompts first, so that a batch wastes little on padding.

What all prompts open with (a template's system message) is read once and stands in every row's cache (ours).
"""

from collections.abc import Sequence
from copy import deepcopy

import torch
from tqdm import tqdm
from transformers import Cache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from cwac.data.examples import Messages
from cwac.data.tokenize import encode_opening, encode_prompt, pad_token_id, stop_tokens
from cwac.models.layers import CACHE, evaluating, unread_logits
from cwac.models.packing import common_opening, takes_any_mask

WORTHWHILE = 8
"""Tokens from which on a common opening is read apart (ours): below, a pass of its own saves nothing."""


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Messages],
    *,
    template: str = "chat",
    prefill: str | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 64,
    description: str | None = "generating",
) -> list[str]:
    """The model's greedy answers, in the order of `prompts`, without prompt and special tokens.

    prefill: an opening put into the model's mouth: every answer begins with it, and the model goes on from there.
    max_new_tokens do not count it.
    description: the progress bar's label; None shows no bar. The model's training mode is restored.
    """
    opening = encode_opening(tokenizer, prefill) if prefill else []
    encoded = [encode_prompt(tokenizer, p, template) + opening for p in prompts]
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_tokens(model, tokenizer, template),
        pad_token_id=pad_token_id(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
    )
    answers: list[str] = [""] * len(encoded)
    use_cache = model.config.use_cache
    model.config.use_cache = True  # gradient checkpointing switches it off
    try:
        with (
            torch.inference_mode(),
            evaluating(model),
            tqdm(total=len(order), desc=description, disable=description is None) as bar,
        ):
            shared, cache = read_opening(model, encoded, max_new_tokens) if batch_size > 1 else (0, None)
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                longest = len(encoded[chosen[0]])
                ids = torch.full((len(chosen), longest), pad_token_id(tokenizer), dtype=torch.long)
                mask = torch.zeros_like(ids)
                for row, i in enumerate(chosen):  # padding behind what is shared: every prompt ends in the last column
                    own = longest - len(encoded[i]) + shared
                    ids[row, :shared] = torch.tensor(encoded[i][:shared])
                    ids[row, own:] = torch.tensor(encoded[i][shared:])
                    mask[row, :shared] = mask[row, own:] = 1
                given = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
                if cache is not None:
                    given[CACHE] = deepcopy(cache)
                    given[CACHE].batch_repeat_interleave(len(chosen))
                out = model.generate(**given, generation_config=config)
                texts = tokenizer.batch_decode(out[:, longest - len(opening) :], skip_special_tokens=True)
                for i, text in zip(chosen, texts, strict=True):
                    answers[i] = text.strip()
                bar.update(len(chosen))
    finally:
        model.config.use_cache = use_cache
    return answers


def read_opening(
    model: PreTrainedModel, encoded: Sequence[list[int]], max_new_tokens: int
) -> tuple[int, Cache | None]:
    """How many tokens all prompts open with, each with at least one more, and the model's cache of them in one row.

    (0, None) where they are few, or the model's cache or attention takes no padding between them and the rest.
    """
    if len(encoded) < 2:
        return 0, None
    shared = min(common_opening(encoded), min(map(len, encoded)) - 1)
    longest = max(map(len, encoded)) + max_new_tokens
    chosen = getattr(getattr(model, "generation_config", None), "cache_implementation", None)
    if shared < WORTHWHILE or chosen is not None or not takes_any_mask(model, longest):
        return 0, None
    ids = torch.tensor([encoded[0][:shared]], device=model.device)
    cache = getattr(model(input_ids=ids, use_cache=True, **unread_logits(model)), CACHE, None)
    return (shared, cache) if hasattr(cache, "batch_repeat_interleave") else (0, None)
