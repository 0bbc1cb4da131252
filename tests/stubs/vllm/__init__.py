"""The part of vLLM's interface that `cwac/evaluation/vllm_worker.py` calls, answered by transformers, for the tests.

What it cannot show, that vLLM itself answers alike, is tested where an interpreter with vLLM is named
(`CWAC_VLLM_PYTHON`).
"""

import os
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM

__version__ = "stub"


@dataclass
class SamplingParams:
    temperature: float
    max_tokens: int
    stop_token_ids: list[int]
    detokenize: bool
    n: int
    top_k: int
    top_p: float
    min_p: float
    min_tokens: int
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: dict | None
    bad_words: list | None
    ignore_eos: bool


class LLM:
    def __init__(
        self,
        model: str,
        seed: int,
        skip_tokenizer_init: bool,
        generation_config: str = "auto",
        dtype: str = "auto",
        fail: bool = False,
    ):
        assert generation_config == "vllm"  # else it takes limits from the model's own
        print("vLLM says much on stdout")
        if fail:
            raise RuntimeError("no memory left on the card")
        self.model = AutoModelForCausalLM.from_pretrained(model).eval()

    def generate(self, prompts: list[dict], sampling: SamplingParams, use_tqdm: bool) -> list:
        os.write(1, b"and while it generates\n")
        return [SimpleNamespace(outputs=[self.answer(p["prompt_token_ids"], sampling)]) for p in prompts]

    @torch.inference_mode()
    def answer(self, ids: list[int], sampling: SamplingParams) -> SimpleNamespace:
        assert sampling.temperature == 0 and not sampling.detokenize and sampling.min_tokens == 0
        assert sampling.repetition_penalty == 1 and not sampling.presence_penalty and not sampling.frequency_penalty
        said: list[int] = []
        while len(said) < sampling.max_tokens and not (said and said[-1] in sampling.stop_token_ids):
            said.append(int(self.model(torch.tensor([ids + said])).logits[0, -1].argmax()))
        return SimpleNamespace(token_ids=said)
