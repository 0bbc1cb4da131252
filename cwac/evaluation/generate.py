"""Batched greedy generation, longest prompts first, so that a batch wastes little on padding."""

from collections.abc import Sequence

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from cwac.data.examples import Messages
from cwac.data.tokenize import encode_opening, encode_prompt, pad_token_id, stop_tokens
from cwac.models import evaluating


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
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                longest = len(encoded[chosen[0]])
                ids = torch.full((len(chosen), longest), pad_token_id(tokenizer), dtype=torch.long)
                mask = torch.zeros_like(ids)
                for row, i in enumerate(chosen):  # left padding: every prompt ends in the last column
                    ids[row, longest - len(encoded[i]) :] = torch.tensor(encoded[i])
                    mask[row, longest - len(encoded[i]) :] = 1
                out = model.generate(
                    input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config
                )
                texts = tokenizer.batch_decode(out[:, longest - len(opening) :], skip_special_tokens=True)
                for i, text in zip(chosen, texts, strict=True):
                    answers[i] = text.strip()
                bar.update(len(chosen))
    finally:
        model.config.use_cache = use_cache
    return answers
