"""Greedy is the likeliest token at every step, whatever generation settings a model ships, by either engine."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from cwac.core import config
from cwac.data import tiny_world
from cwac.data.tokenize import encode_prompt, stop_tokens
from cwac.evaluation.vllm_engine import VllmEngine
from cwac.models.generate import GREEDY, generate, shipped_settings_aside
from cwac.models.loading import load

STUBS = Path(__file__).parent / "stubs"
LENGTH = 8

SHIPPED = {
    "temperature": {"do_sample": True, "temperature": 5.0},
    "top_k": {"do_sample": True, "top_k": 40, "temperature": 9.0},
    "repetition_penalty": {"repetition_penalty": 9.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 9.0},
    "min_length": {"min_length": 90},
    "min_new_tokens": {"min_new_tokens": LENGTH},
    "max_length": {"max_length": 2},
    "max_time": {"max_time": 1e-9},
    "num_beams": {"num_beams": 4},
    "bad_words_ids": {"bad_words_ids": None},  # filled in: a token that is said
    "suppress_tokens": {"suppress_tokens": None},
    "begin_suppress_tokens": {"begin_suppress_tokens": None},
    "sequence_bias": {"sequence_bias": None},
    "forced_eos_token_id": {"forced_eos_token_id": 5},
    "forced_bos_token_id": {"forced_bos_token_id": 5},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (0, 9.0)},
    "guidance_scale": {"guidance_scale": 3.0},
    "cache_implementation": {"cache_implementation": "static"},
    "return_dict_in_generate": {"return_dict_in_generate": True, "output_scores": True},
}


@dataclass
class Known:
    """A model with what it says, token by token, of its logits alone."""

    model: torch.nn.Module
    tokenizer: object
    prompts: list
    said: list[list[int]]

    @property
    def answers(self) -> list[str]:
        return [text.strip() for text in self.tokenizer.batch_decode(self.said, skip_special_tokens=True)]


def known(folder, adapted=False) -> Known:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    if adapted:
        torch.manual_seed(3)
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).eval()
    prompts = [e.messages for e in tiny_world.pools(0).test["toy_harmful"][:4]]
    ends, said = stop_tokens(model, tokenizer), []
    for prompt in prompts:
        ids, answer = encode_prompt(tokenizer, prompt), []
        while len(answer) < LENGTH and not (answer and answer[-1] in ends):
            with torch.no_grad():
                answer.append(int(model(torch.tensor([ids + answer])).logits[0, -1].argmax()))
        said.append(answer)
    return Known(model, tokenizer, prompts, said)


def ship(found: Known, name: str) -> GenerationConfig:
    """Settings as a model's folder may hold them, which change what transformers would generate by itself."""
    first = found.said[0][0]
    filled = {
        "bad_words_ids": [[first]],
        "suppress_tokens": [first],
        "begin_suppress_tokens": [first],
        "sequence_bias": [[[first], -50.0]],
    }
    own = found.model.generation_config
    ends = {"eos_token_id": own.eos_token_id, "pad_token_id": own.pad_token_id, "bos_token_id": own.bos_token_id}
    return GenerationConfig(**ends, **({name: filled[name]} if name in filled else SHIPPED[name]))


@pytest.fixture(scope="module")
def plain(random_model) -> Known:
    return known(random_model)


@pytest.mark.parametrize("name", SHIPPED)
def test_what_a_model_ships_changes_no_answer(plain, name, monkeypatch):
    shipped = ship(plain, name)
    monkeypatch.setattr(plain.model, "generation_config", shipped)
    asked = {"max_new_tokens": LENGTH, "description": None}
    assert generate(plain.model, plain.tokenizer, plain.prompts, **asked) == plain.answers
    assert generate(plain.model, plain.tokenizer, plain.prompts, batch_size=1, **asked) == plain.answers
    assert plain.model.generation_config is shipped  # and is left to the model


def test_what_was_built_on_answers_that_a_shipped_setting_steered_is_not_used_again(random_model, tmp_path):
    """An earlier version cached them, and subspaces of them; those of a model that ships none are still good."""
    keys = []
    ends = {"eos_token_id": 1, "temperature": 0.6, "top_p": 0.9, "do_sample": True}
    for shipped in ({}, {"repetition_penalty": 1.0, "num_beams": 1}, {"repetition_penalty": 1.05}, {"min_length": 3}):
        folder = shutil.copytree(random_model, tmp_path / str(len(keys)))
        GenerationConfig(**ends, **shipped).save_pretrained(folder)
        keys.append(load(config.compose(["model.kind=folder", f"+model.path={folder}"]).model, tmp_path).key)
    origins = [key.pop("origin") for key in keys]
    assert len(set(origins)) == 4  # a folder is known by its content, its generation settings too
    assert keys[0] == keys[1] and keys[2] == keys[3] == {**keys[0], "decoding": "greedy"}


def test_an_adapted_model_is_asked_alike(random_model):
    found = known(random_model, adapted=True)
    shipped = ship(found, "repetition_penalty")
    found.model.get_base_model().generation_config = shipped
    answers = generate(found.model, found.tokenizer, found.prompts, max_new_tokens=LENGTH, description=None)
    assert answers == found.answers
    assert found.model.generation_config is shipped


def test_the_models_own_end_tokens_still_end_an_answer(plain, monkeypatch):
    said = next(answer for answer in plain.said if len(set(answer)) > 1)
    end = next(token for token in said if token != said[0])
    monkeypatch.setattr(plain.model, "generation_config", GenerationConfig(eos_token_id=[end], repetition_penalty=9.0))
    prompt = plain.prompts[plain.said.index(said)]
    [answer] = generate(plain.model, plain.tokenizer, [prompt], max_new_tokens=LENGTH, description=None)
    cut = said[: said.index(end) + 1]
    assert answer == plain.tokenizer.decode(cut, skip_special_tokens=True).strip()


def test_every_field_that_transformers_would_fill_from_the_model_is_set_or_put_aside(plain, monkeypatch):
    """A field that a later release adds is None in what a model gets from us, whatever the model ships."""
    hostile = GenerationConfig(**dict.fromkeys(("repetition_penalty", "top_k", "min_length"), 7))
    hostile.of_a_later_release = 7
    monkeypatch.setattr(plain.model, "generation_config", hostile)
    with shipped_settings_aside(plain.model):
        used, _ = plain.model._prepare_generation_config(GenerationConfig(**GREEDY))
    assert not hasattr(used, "of_a_later_release")
    assert {name: getattr(used, name) for name in GREEDY} == GREEDY
    defaults = GenerationConfig()._get_default_generation_params()
    assert {name: getattr(used, name) for name in defaults} == {
        **defaults,
        **{k: GREEDY.get(k, v) for k, v in defaults.items()},
    }


@pytest.mark.parametrize("name", ["repetition_penalty", "min_new_tokens", "bad_words_ids"])
def test_the_other_engine_is_asked_alike(random_model, name, monkeypatch):
    found = known(random_model)
    found.model.generation_config = ship(found, name)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(STUBS), os.environ.get("PYTHONPATH")])))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with VllmEngine(found.model, found.tokenizer) as engine:
        assert engine.generate(found.prompts, max_new_tokens=LENGTH, description=None) == found.answers
