"""Batched greedy generation, longest prompts first, so that a batch wastes little on padding.

Greedy means: at every step the likeliest token of the whole vocabulary, until a token that ends the turn or
`max_new_tokens`. Of the generation settings that a model ships only its end tokens count: a repetition penalty,
suppressed words or a minimum length would measure those settings beside the weights, and differently by each engine.
What all prompts open with (a template's system message) is read once and stands in every row's cache (ours).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy

import torch
from torch import nn
from tqdm import tqdm
from transformers import Cache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from cwac.data.examples import Messages
from cwac.data.tokenize import encode_opening, encode_prompt, pad_token_id, stop_tokens
from cwac.models.layers import CACHE, evaluating, unread_logits
from cwac.models.packing import common_opening, takes_any_mask

WORTHWHILE = 8
"""Tokens from which on a common opening is read apart (ours): below, a pass of its own saves nothing."""

GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "min_length": 0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "early_stopping": False,
    "remove_invalid_values": False,
    "use_cache": True,
    "return_dict_in_generate": False,
    "output_scores": False,
}
"""The values of transformers' GenerationConfig at which it changes nothing; without `do_sample`, those of sampling are
not read. A field whose neutral value is None (`bad_words_ids`, `suppress_tokens`, ...) cannot be set, since None is
filled from the model's own settings: see `shipped_settings_aside`."""


STEERING = (
    "num_beams repetition_penalty encoder_repetition_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size "
    "min_length min_new_tokens max_time stop_strings bad_words_ids suppress_tokens begin_suppress_tokens "
    "sequence_bias forced_bos_token_id forced_eos_token_id exponential_decay_length_penalty guidance_scale "
    "watermarking_config prompt_lookup_num_tokens remove_invalid_values"
).split()
"""Settings that change which tokens are chosen, or how many, also where nothing is sampled."""


def decoding_key(model: nn.Module) -> dict[str, str]:
    """What a model's artifacts depend on besides its weights, where it ships a setting that steered its answers before
    they were greedy: what was built on those is stale. {} for any other model, whose artifacts stay valid."""
    settings = getattr(model, "generation_config", None)
    shipped = {} if settings is None else settings.to_dict()
    steered = any(shipped.get(name) not in (None, GREEDY.get(name)) for name in STEERING)
    return {"decoding": "greedy"} if steered else {}


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
        **GREEDY,
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
            shipped_settings_aside(model),
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
    if shared < WORTHWHILE or not takes_any_mask(model, longest):
        return 0, None
    ids = torch.tensor([encoded[0][:shared]], device=model.device)
    cache = getattr(model(input_ids=ids, use_cache=True, **unread_logits(model)), CACHE, None)
    return (shared, cache) if hasattr(cache, "batch_repeat_interleave") else (0, None)


@contextmanager
def shipped_settings_aside(model: nn.Module) -> Iterator[None]:
    """While open, the model and all that it wraps have generation settings that ask for nothing; then their own again.

    transformers fills every field that is None in the settings it is given from the model's own.
    """
    own = [(m, vars(m)["generation_config"]) for m in model.modules() if "generation_config" in vars(m)]
    for module, _ in own:
        module.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for module, settings in own:
            module.generation_config = settings
