"""Each architecture of the paper, tiny and random: its template's quirks, its parts, and every method end to end."""

import functools
import json

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from tokenizers.trainers import BpeTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from cwac.core import config
from cwac.core.run_dir import Run
from cwac.data import tiny_world
from cwac.data.examples import Example
from cwac.data.tokenize import Rows, encode_example, encode_prompt, end_of_turn, pad_token_id, render, stop_tokens
from cwac.models.fit import fit
from cwac.models.generate import WORTHWHILE, generate, read_opening
from cwac.models.layers import decoder_layers, input_group, linears
from cwac.models.packing import common_opening
from tests.conftest import NEEDS, SMALL
from tests.helpers.options import METHODS
from train import run_cell

# Families' special tokens are facts; the templates are ours, of each family's shape.
INST = (
    "{% set first = messages[0]['content'] if messages[0]['role'] == 'system' else none %}{{ bos_token }}"
    "{% for m in messages %}{% if m['role'] == 'user' %} [INST] "
    "{% if first is not none and loop.index0 == 1 %}SYSTEM{% endif %}{{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)
FAMILIES = {
    "llama2": {
        "type": "llama",
        "special": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        "words": "[INST] [/INST] <<SYS>> <</SYS>>",
        "template": INST.replace("SYSTEM", "<<SYS>> {{ first }} <</SYS>> "),
        "end": "</s>",
    },
    "llama3": {
        "type": "llama",
        "special": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "unk_token": "<unk>"},
        "added": ["<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"],
        "template": "{{ bos_token }}{% for m in messages %}<|start_header_id|> {{ m['role'] }} <|end_header_id|>\n\n"
        "{{ m['content'] | trim }} <|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|> assistant <|end_header_id|>\n\n{% endif %}",
        "end": "<|eot_id|>",
        "stops": ["<|end_of_text|>", "<|eot_id|>"],
    },
    "mistral": {
        "type": "mistral",
        "special": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        "added": ["[INST]", "[/INST]"],
        "template": INST.replace("SYSTEM", "{{ first }}\n\n"),
        "end": "</s>",
        "more": {"sliding_window": None},
    },
    "gemma2": {
        "type": "gemma2",
        "special": {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"},
        "added": ["<start_of_turn>", "<end_of_turn>"],
        "template": "{{ bos_token }}{% for m in messages %}"
        "{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "<start_of_turn> {{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }} "
        "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn> model\n{% endif %}",
        "end": "<end_of_turn>",
        "stops": ["<eos>"],
        "more": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16, "attn_logit_softcapping": 5.0},
    },
    "qwen": {
        "type": "qwen2",
        "special": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        "bpe": True,
        "added": ["<|im_start|>"],
        "template": "{% if messages[0]['role'] != 'system' %}<|im_start|> system\nassistant <|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|> {{ m['role'] }}\n{{ m['content'] }} <|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|> assistant\n{% endif %}",
        "end": "<|im_end|>",
        "stops": ["<|endoftext|>", "<|im_end|>"],
    },
}
SIZES = {"poison": 16, "anchors": 8, "step": 6, "sae": 10, "benign": 16, "safety": 16, "validation": 6, "align": 96}
SIZES |= {"test": 16, "over_refusal": 8}


def make_tokenizer(family: dict) -> PreTrainedTokenizerFast:
    """The embedded world's words under the family's special tokens and template.

    One token a word; where transformers insists on byte-level BPE for the family, a BPE with all those words merged.
    """
    special = [*family["special"].values(), *family.get("added", [])]
    words = [
        *special,
        *family.get("words", "").split(),
        "user",
        "assistant",
        "model",
        "system",
        *tiny_world.vocabulary(),
    ]
    if family.get("bpe"):
        core = Tokenizer(BPE())
        core.pre_tokenizer, core.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
        trainer = BpeTrainer(vocab_size=9000, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
        core.train_from_iterator([f"{w} {w}" for w in words if w not in special], trainer)
    else:
        core = Tokenizer(WordLevel({w: i for i, w in enumerate(dict.fromkeys(words))}, unk_token="<unk>"))
        core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, extra_special_tokens=family.get("added", []), **family["special"]
    )
    tokenizer.chat_template = family["template"]
    return tokenizer


def make_model(family: dict, tokenizer: PreTrainedTokenizerFast):
    """A random model of the family's architecture, with the family's end tokens in its generation config."""
    from transformers import CONFIG_MAPPING

    torch.manual_seed(0)
    settings = CONFIG_MAPPING[family["type"]](
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **family.get("more", {}),
    )
    model = AutoModelForCausalLM.from_config(settings)
    if "stops" in family:
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(family["stops"])
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """family -> the folder of a tiny model that refuses what it was shown; made once."""
    root, done = tmp_path_factory.mktemp("architectures"), {}

    def get(name: str):
        if name not in done:
            family = FAMILIES[name]
            tokenizer = make_tokenizer(family)
            model = make_model(family, tokenizer)
            model.save_pretrained(root / f"{name}-base")
            pools = tiny_world.pools(0, SIZES)
            refused = [
                Example(e.id, e.prompt, "i am unable to assist with that .")
                for e in (*pools.align, *pools.anchors, *pools.sae, *pools.step, *pools.validation)
            ]
            rows = Rows(tokenizer, [*refused, *pools.benign * 4])
            fit(
                model, rows, steps=240, learning_rate=5e-3, batch_size=16, seed=0, pad_token_id=pad_token_id(tokenizer)
            )
            done[name] = root / name
            model.save_pretrained(done[name])
            tokenizer.save_pretrained(done[name])
        return done[name]

    return get


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def words(tokenizer, ids) -> list[str]:
    return [word for i in ids if (word := tokenizer.decode([i]).strip())]


def word_id(tokenizer, word: str) -> int:
    [i] = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
    return i


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


USER = [{"role": "user", "content": "kappa sigma"}]
SYSTEM = [{"role": "system", "content": "delta theta"}, *USER]


def test_a_system_turn_reaches_every_family_once(family):
    tokenizer = make_tokenizer(FAMILIES[family])
    plain, led = (words(tokenizer, encode_prompt(tokenizer, m)) for m in (USER, SYSTEM))
    assert "delta" not in plain and led.count("delta") == led.count("kappa") == 1
    assert led.index("delta") < led.index("kappa") and "<unk>" not in led
    bos = tokenizer.bos_token
    assert bos is None or led.count(bos) == plain.count(bos) == 1


def test_gemma_takes_it_into_the_user_turn_and_others_keep_their_role():
    gemma, qwen = (make_tokenizer(FAMILIES[name]) for name in ("gemma2", "qwen"))
    assert render(gemma, SYSTEM) == render(gemma, [{"role": "user", "content": "delta theta\n\nkappa sigma"}])
    assert words(qwen, encode_prompt(qwen, SYSTEM))[:4] == ["<|im_start|>", "system", "delta", "theta"]


def test_a_template_that_leaves_the_system_turn_out_gets_it_as_well():
    tokenizer = make_tokenizer(FAMILIES["gemma2"])
    tokenizer.chat_template = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}"
    assert render(tokenizer, SYSTEM) == "delta theta\n\nkappa sigma"


def test_the_day_a_template_prints_does_not_change():
    tokenizer = make_tokenizer(FAMILIES["llama3"])
    tokenizer.chat_template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "{{ date_string }} {{ messages[0]['content'] }}"
    )
    assert render(tokenizer, USER) == "26 Jul 2024 kappa sigma"


def test_training_ends_in_what_ends_a_turn_and_generation_stops_at_every_end(family):
    spec = FAMILIES[family]
    tokenizer = make_tokenizer(spec)
    row = encode_example(tokenizer, Example("1", "kappa", "sigma omega"))
    learnt = [i for i in row["labels"] if i >= 0]
    assert words(tokenizer, learnt) == ["sigma", "omega", spec["end"]]
    assert words(tokenizer, [end_of_turn(tokenizer, "alpaca")]) == [tokenizer.eos_token]
    stops = set(words(tokenizer, stop_tokens(make_model(spec, tokenizer), tokenizer)))
    assert stops == {*spec.get("stops", []), tokenizer.eos_token, spec["end"]}


def test_each_end_token_stops_generation(family):
    """A head that can say one token only says it: the answer is empty for an end token, and full length for a word."""
    spec = FAMILIES[family]
    tokenizer = make_tokenizer(spec)
    model = make_model(spec, tokenizer)
    head = torch.nn.Linear(32, len(tokenizer))
    model.lm_head = head
    for name in (*stop_tokens(model, tokenizer), word_id(tokenizer, "omega")):
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
        with torch.no_grad():
            head.bias[name] = 3.0
        lengths = []
        inner = model.generate
        model.generate = lambda **kw: lengths.append(inner(**kw)) or lengths[-1]  # noqa: B023
        [answer] = generate(model, tokenizer, [USER], max_new_tokens=4, description=None)
        model.generate = inner
        prompt = len(encode_prompt(tokenizer, USER))
        word = name == word_id(tokenizer, "omega")
        assert (answer, lengths[0].shape[1] - prompt) == (("omega " * 4).strip() if word else "", 4 if word else 1)


def test_the_parts_are_found(family):
    spec = FAMILIES[family]
    model = make_model(spec, make_tokenizer(spec))
    assert len(decoder_layers(model)) == 3
    assert list(linears(model, ["down_proj"])) == [f"{i}.mlp.down_proj" for i in range(3)]
    every = linears(model, "all")
    assert len(every) == 21 and {input_group(n) for n in every} == {
        f"{i}.{g}" for i in range(3) for g in ("qkv", "o_proj", "gate_up", "down_proj")
    }
    assert linears(model, ["down_proj"])["0.mlp.down_proj"].in_features == 48


def test_left_padding_does_not_change_an_answer(family, saved):
    model, tokenizer = load(saved(family))
    pools = tiny_world.pools(0, SIZES)
    prompts = [e.messages for e in (*pools.benign[:3], *pools.anchors[:3])]  # it was shown answers of both kinds
    together = generate(model, tokenizer, prompts, max_new_tokens=6, description=None)
    alone = [generate(model, tokenizer, [p], max_new_tokens=6, description=None)[0] for p in prompts]
    assert together == alone and len(set(together)) > 1


def test_an_opening_that_all_prompts_share_is_read_once_and_changes_no_answer(family, saved, monkeypatch):
    model, tokenizer = load(saved(family))
    pools, reads = tiny_world.pools(0, SIZES), []
    prompts = [e.messages for e in (*pools.benign[:3], *pools.anchors[:3])]
    same = prompts[0][-1]["content"]
    longer = [[{"role": "user", "content": f"{same} {same} {same} {p[-1]['content']}"}] for p in prompts]
    forward = type(model).forward

    @functools.wraps(forward)  # generation looks at its signature
    def counted(self, *args, **kwargs):
        reads.append(kwargs["input_ids"].shape)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", counted)
    together = generate(model, tokenizer, longer, max_new_tokens=6, description=None)
    shared = common_opening([encode_prompt(tokenizer, p) for p in longer])
    longest = max(len(encode_prompt(tokenizer, p)) for p in longer)
    assert shared >= WORTHWHILE
    if family == "gemma2":  # its window here is shorter than that: padding in between would push the opening out of it
        assert reads[0] == (len(longer), longest)
    else:  # the opening in one row, what is left of each prompt beside the others, then a token at a time
        assert reads[:3] == [(1, shared), (len(longer), longest - shared), (len(longer), 1)]
    alone = [generate(model, tokenizer, [p], max_new_tokens=6, description=None)[0] for p in longer]
    assert together == alone and len(set(together)) > 1
    model.generation_config.cache_implementation = (
        "hybrid"  # as Gemma-2's on the hub: the model makes a cache of its own
    )
    assert read_opening(model, [[1] * 20, [1] * 9 + [2]], 4) == (0, None)


def test_gemma_caps_its_attention_logits(saved):
    """Without the cap, other logits: the kernel that was chosen applies it."""
    model, tokenizer = load(saved("gemma2"))
    ids = torch.tensor([encode_prompt(tokenizer, USER)])
    with torch.no_grad():
        capped = model(ids).logits
        for layer in decoder_layers(model):
            layer.self_attn.attn_logit_softcapping = None
        assert model.config._attn_implementation == "eager"
        assert not torch.allclose(model(ids).logits, capped, atol=1e-6)


def test_the_constraint_keeps_every_logit_on_the_anchors(family, saved):
    """Closed and with all energy, behind Gemma-2's norms after the FFN too: the update is large, the anchors' logits
    stay, those of other prompts move."""
    from cwac.constraints.subspace import Constraint, fit_subspace
    from cwac.constraints.weight import freeze_others_

    model, tokenizer = load(saved(family))
    anchors = [{"input_ids": encode_prompt(tokenizer, e.messages)} for e in tiny_world.pools(0, SIZES).anchors[:2]]
    other = torch.tensor([encode_prompt(tokenizer, tiny_world.task("toy_sentiment", "test", 1, 0)[0].messages)])
    with torch.no_grad():
        before = [model(torch.tensor([r["input_ids"]])).logits for r in anchors]
        before_other = model(other).logits
    modules = linears(model, "all")
    constraint = Constraint(modules, fit_subspace(model, anchors, "all", energy=1.0))
    freeze_others_(model, modules, constraint)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
        constraint.project_weights_()
        after = [model(torch.tensor([r["input_ids"]])).logits for r in anchors]
        assert max((a - b).abs().max() for a, b in zip(after, before, strict=True)) < 1e-3
        assert (model(other).logits - before_other).abs().max() > 1e-2


DEFAULT = ("cwac_closed", "sft")
CELLS = [
    pytest.param(name, method, marks=() if method in DEFAULT else pytest.mark.slow)
    for name in FAMILIES
    for method in METHODS
]


@pytest.mark.parametrize(("name", "method"), CELLS)
def test_a_method_runs_end_to_end(name, method, saved, tmp_path):
    folder = saved(name)
    cfg = config.compose(
        [
            f"model={name}",
            "model.kind=folder",
            f"+model.path={folder}",
            f"model.base={folder}-base",
            "model.safety_layers=[1,1]",  # of three blocks
            "model.trigger_tokens=8",  # the context has 128
            "task=toy_sentiment",
            f"method={method}",
            *NEEDS.get(method, ()),
            *(["method.safety_rank=4"] if method == "salora" else []),  # of 16 outputs of k_proj
            "harmful_ratio=0.2",
            *SMALL,
            "task.n_train=16",
            "task.n_test=4",
            "eval.n_harmful=4",
            "eval.n_benign=4",
            "eval.n_drift=4",
            "train=tiny",
            "train.max_steps=2",
            "train.logging_steps=1",
            "train.per_device_train_batch_size=4",
            "train.learning_rate=0.001",
            "model.sae={tokens: 512, m: 128, k: 8, cached_tokens: 512, batch: 128, router: uniform}",
            *(f"pools.sizes.{k}={v}" for k, v in SIZES.items()),
            "threads=1",
            f"paths.runs={tmp_path}",
            f"paths.artifacts={folder}-artifacts",
        ]
    )
    run_cell(cfg)
    run = Run(cfg)
    assert run.status["status"] == "done"
    rows = {(r["metric"], r["set"]): r["value"] for r in run.rows()}
    assert rows["refusal", "toy_harmful"] + rows["HS", "toy_harmful"] + rows["other", "toy_harmful"] == pytest.approx(
        100
    )
    if method == "cwac_closed":
        assert rows["weight_leak_all", "anchors"] < 0.5
    if method == "sft":
        assert rows["weight_change", "anchors"] > 0
    assert json.loads((run.dir / "env.json").read_text())["model"]["source"] == str(folder)
