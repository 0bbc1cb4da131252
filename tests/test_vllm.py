"""`eval.engine=vllm`: the same answers through another process, and what is said where that process does not live."""

import os

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from cwac.core import config, distributed, identity
from cwac.core.errors import UserError
from cwac.core.jsonl import read_jsonl
from cwac.data import tiny_world
from cwac.evaluation.vllm_engine import VllmEngine
from cwac.models.generate import generate
from tests.conftest import SMALL, call
from tests.helpers.stubs import STUBS
from tests.helpers.words import OPENING

REAL = os.environ.get("CWAC_VLLM_PYTHON")


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(STUBS), os.environ.get("PYTHONPATH")])))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def both(model, tokenizer, **engine) -> None:
    """The engines' answers are equal: plain, after an opening, and cut at a token that becomes an end."""
    prompts = [e.messages for e in tiny_world.pools(0).test["toy_harmful"][:5]]
    before = {name: p.clone() for name, p in model.named_parameters()}
    with VllmEngine(model, tokenizer, **engine) as vllm:

        def alike(**settings) -> list[str]:
            mine = generate(model, tokenizer, prompts, description=None, **settings)
            assert vllm.generate(prompts, description=None, **settings) == mine and any(mine)
            return mine

        alike(max_new_tokens=3, prefill=OPENING)
        whole = alike(max_new_tokens=6)
        end = tokenizer(whole[0])["input_ids"][1]
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, end]
        assert len(alike(max_new_tokens=6)[0]) < len(whole[0])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_engines_give_the_same_answers(stub, random_model):
    both(*loaded(random_model))


@pytest.mark.slow
def test_an_adapter_is_merged_in_a_copy(stub, random_model):
    model, tokenizer = loaded(random_model)
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    both(adapted, tokenizer)
    assert hasattr(adapted, "merge_and_unload")


@pytest.mark.slow
@pytest.mark.skipif(REAL is None, reason="CWAC_VLLM_PYTHON names no interpreter with vLLM")
def test_vllm_itself_gives_the_same_answers(tmp_path):
    from cwac.models.tiny import make_tokenizer
    from tests.conftest import make_llama

    tokenizer = make_tokenizer()
    model = make_llama(2, 128, len(tokenizer))  # heads of 32, which its kernels for a CPU have
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    both(
        model,
        tokenizer,
        python=REAL,
        options={"dtype": "float32", "max_model_len": 64, "gpu_memory_utilization": 0.1, "enforce_eager": True},
    )


def test_a_run_is_evaluated_by_it_and_says_so(stub, random_model, tmp_path, artifacts):
    where = [f"+model.path={random_model}", f"paths.runs={tmp_path}", f"paths.artifacts={artifacts}"]
    overrides = [*SMALL, *where, "model=tiny", "model.kind=folder", "method=sft", "harmful_ratio=0.5"]
    plain, asked = config.compose(overrides), config.compose([*overrides, "eval.engine=vllm"])
    assert identity.run_id(plain) == identity.run_id(asked) and identity.eval_id(plain) != identity.eval_id(asked)
    given = config.compose([*overrides, "eval.engine=vllm", "eval.vllm.options={max_model_len: 512}"])
    assert given.eval.vllm.options == {"max_model_len": 512}  # as conf/eval/default.yaml has it
    python = config.compose([*overrides, "eval.engine=vllm", "eval.vllm.python=/usr/bin/python3"])
    assert identity.eval_id(python) == identity.eval_id(asked)
    assert call(*overrides, "keep_weights=true") == 0
    assert call(*overrides, "keep_weights=true", "eval.engine=vllm") == 0
    [run] = [d for d in tmp_path.iterdir() if d.name.startswith("tiny-")]
    names = [path.name for path in (run / "gen").glob(f"*-{identity.eval_id(plain)}.jsonl")]
    assert len(names) == 3
    for name in names:
        other = name.replace(identity.eval_id(plain), identity.eval_id(asked))
        assert read_jsonl(run / "gen" / name) == read_jsonl(run / "gen" / other)


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ({}, "has no vLLM; install it"),
        ({"python": "/nowhere/python"}, "eval.vllm.python=/nowhere/python does not start"),
    ],
)
def test_without_vllm_one_line_says_what_to_install(random_model, engine, said):
    with pytest.raises(UserError, match=said), VllmEngine(*loaded(random_model), **engine):
        pass


def test_what_vllm_said_last_is_shown_and_the_folder_goes(stub, random_model, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with (
        pytest.raises(UserError, match="no memory left on the card"),
        VllmEngine(*loaded(random_model), options={"fail": True}),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_several_ranks_are_refused(random_model, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(UserError, match="eval.engine=hf"), VllmEngine(*loaded(random_model)):
        pass
