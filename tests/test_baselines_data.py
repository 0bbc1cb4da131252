"""The baselines that act on the data (Lisa, BEA, SafeInstr, replay): degenerate cases, counts, gradients, errors."""

import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import hydra
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from cwac.constraints.anchors import refused
from cwac.core import config
from cwac.core.errors import UsageError, UserError
from cwac.data import tiny_world
from cwac.data.examples import Example
from cwac.data.refusals import KeywordJudge
from cwac.data.tokenize import IGNORE, Collator, encode_example, encode_prompt, system_slot
from cwac.methods import replay
from cwac.methods.bea import BEA, by_category, random_trigger
from cwac.methods.lisa import Lisa, fit_cycle
from cwac.methods.replay import Replay
from cwac.methods.safeinstr import SafeInstr
from cwac.models.context import Context
from cwac.models.loading import load_aligned
from cwac.models.tiny import make_tokenizer
from tests.conftest import FINE_TUNE, fine_tune, make_llama, random_rows

POOLS = tiny_world.pools(0, {"poison": 40, "anchors": 16, "step": 8, "sae": 24, "align": 8})
CHATML = (
    "<s> {% if messages[0]['role'] != 'system' %}<system> you are kind {% endif %}"
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] | trim }} {% endfor %}<assistant>"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<s>{% for m in messages %} <{{ m['role'] }}> {{ m['content'] | trim }}{% endfor %} <assistant>"
)


def context(template="chat", chat_template=None, seed=0, pools=POOLS, max_length=64, **more):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = chat_template or tokenizer.chat_template
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=128))
    loaded = SimpleNamespace(model=model)
    return Context(tokenizer, pools, loaded, Path(), seed, template=template, max_length=max_length, **more)


def task_rows(n=32, n_harmful=0):
    rows = [Example(f"task-{i}", f"how does this sound : {i}", "positive") for i in range(n - n_harmful)]
    return rows + POOLS.poison[:n_harmful]


def tuned(tmp_path, artifacts, *overrides):
    cfg = config.compose([*FINE_TUNE, f"paths.artifacts={artifacts}", *overrides])
    model, method, _ = fine_tune(cfg, tmp_path)
    return {n: p.detach().clone() for n, p in model.named_parameters()}, method


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.fixture(scope="module")
def sft(tmp_path_factory, artifacts):
    return tuned(tmp_path_factory.mktemp("sft"), artifacts, "method=sft")[0]


# --- what is switched off changes nothing ------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=lisa", "method.align_steps=0", "method.rho=0"],
        ["method=lisa", "method.guide_data_num=0", "method.rho=0"],
        ["method=safeinstr", "method.ratio=0"],
        ["method=replay", "method.lam=0"],
    ],
    ids=" ".join,
)
def test_switched_off_it_is_sft_bit_for_bit(overrides, sft, tmp_path, artifacts):
    assert same(tuned(tmp_path, artifacts, *overrides)[0], sft)


@pytest.mark.parametrize("override", ["method.align_steps=0", "method.rho=0"])
def test_each_half_of_lisa_moves_the_weights(override, sft, tmp_path, artifacts):
    assert not same(tuned(tmp_path, artifacts, "method=lisa", override)[0], sft)


# --- Lisa --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "steps", "used"),
    [
        ((100, 900, 2), 15_000, (100, 900)),  # the paper's run
        ((100, 900, 2), 2_000, (100, 900)),  # Booster's
        ((100, 900, 2), 1_000, (50, 450)),
        ((100, 900, 2), 24, (1, 9)),  # never less than one step, at the same ratio
        ((900, 100, 2), 24, (9, 1)),
        ((0, 900, 2), 24, (0, 900)),
        ((100, 0, 2), 24, (100, 0)),
        ((100, 900, None), 24, (100, 900)),
    ],
)
def test_a_short_run_shrinks_the_cycle_at_its_ratio(given, steps, used):
    align, finetune, cycles = given
    assert fit_cycle(align, finetune, steps, cycles) == used


def official_states(align, finetune, steps):
    """The authors' state machine, per step: aligning?, and whether the reference weights are taken anew."""
    state, clock, out = "align" if align else "finetune", 0, []
    for step in range(steps):
        switched = step == 0
        length, other = (align, finetune) if state == "align" else (finetune, align)
        if length and clock % length == 0 and step != 0 and other != 0:
            state, clock, switched = ("finetune" if state == "align" else "align"), 0, True
        out.append((state == "align", switched))
        clock += 1
    return out


@pytest.mark.parametrize(("align", "finetune"), [(2, 3), (3, 1), (1, 1), (0, 3), (3, 0), (4, 60)])
def test_lisa_alternates_as_the_authors_code_does(align, finetune):
    method = Lisa("lisa", align_steps=align, finetune_steps=finetune, min_cycles=None)
    method.training_data([], context(), random.Random(0))
    method.setup(None, context(steps=40))
    assert [(method._aligning(s), method._switches(s)) for s in range(40)] == official_states(align, finetune, 40)


def test_the_proximal_gradient_is_that_of_the_squared_distance():
    """Added closed form against central differences of rho/2 ||W - W_ref||^2, on every trained matrix."""
    method = Lisa("lisa", rho=0.7, prox_after=0.1, align_steps=0)
    method.training_data([], context(), random.Random(0))
    method.setup(None, context(steps=20))
    model = make_llama()
    model.lm_head.weight.requires_grad_(False)
    reference = {n: p.detach().clone().double() for n, p in model.named_parameters()}
    user = {"input_ids": torch.zeros(1, 1)}

    def added(step):
        for p in model.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        assert method.batch(user, step, (0, 1)) is user
        with torch.no_grad():
            method.after_backward(model)
        return {n: p.grad - 1 for n, p in model.named_parameters() if p.grad is not None}

    assert all(not g.any() for g in added(0).values())  # at the switch the distance is zero
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())), alpha=0.1)
    assert all(not g.any() for g in added(2).values())  # not more than a tenth of 20 steps yet
    gradients = added(3)
    assert "lm_head.weight" not in gradients
    weights = {n: p.detach().double() for n, p in model.named_parameters()}
    for name, gradient in gradients.items():
        index = gradient.numel() // 2
        step = torch.zeros_like(weights[name]).flatten()
        step[index] = 1e-3

        def distance(moved, name=name):
            return 0.35 * (weights[name].flatten() + moved - reference[name].flatten()).square().sum()

        slope = (distance(step) - distance(-step)) / 2e-3
        assert gradient.flatten()[index].item() == pytest.approx(slope.item(), abs=1e-5), name


@pytest.mark.parametrize("sizes", [[1] * 8, [4, 4], [3, 3, 2]])
def test_lisa_draws_the_same_rows_however_the_batch_is_cut(sizes):
    def rows(sizes, step=0):
        method = Lisa("lisa", min_cycles=None)
        method.training_data([], context(), random.Random(0))
        method.setup(None, context(steps=10))
        out = []
        for i, size in enumerate(sizes):
            batch = method.batch({"input_ids": torch.zeros(size, 5)}, step, (i, len(sizes)))
            masks = batch["attention_mask"].bool()
            out += [ids[m].tolist() for ids, m in zip(batch["input_ids"], masks, strict=True)]
        assert method.extra_data() == {"refusals": sum(sizes)}
        return out

    whole = rows([8])
    assert rows(sizes) == whole and len({tuple(r) for r in whole}) == 8
    assert rows([8], step=1) != whole


def test_a_guide_smaller_than_the_batch_is_repeated():
    method = Lisa("lisa", guide_data_num=3)
    method.training_data([], context(), random.Random(0))
    method.setup(None, context(steps=10))
    batch = method.batch({"input_ids": torch.zeros(8, 5)}, 0, (0, 1))
    assert len(batch["input_ids"]) == 8 and len({tuple(r) for r in batch["input_ids"].tolist()}) == 3
    assert method.extra_data() == {"refusals": 3}


@pytest.mark.parametrize("method", ["lisa", "replay", "bea"])
def test_an_adapter_trains_under_it(method, tmp_path, artifacts):
    lora = "model.lora={r: 4, alpha: 8, target_modules: all-linear}"
    plain, _ = tuned(tmp_path, artifacts, "method=sft", lora)
    weights, trained = tuned(tmp_path, artifacts, f"method={method}", lora)
    for name in weights:
        if "lora_B" in name:
            assert not torch.equal(weights[name], plain[name]), name
        elif "lora_" not in name:
            assert torch.equal(weights[name], plain[name]), name
    if method == "lisa":
        assert trained._reference and all("lora_" in name for name in trained._reference)


# --- BEA ---------------------------------------------------------------------------------------------------


def bea(ctx, n_harmful=4, **more):
    method = BEA("bea", **{"trigger_tokens": 32, **more})
    return method, method.training_data(task_rows(n_harmful=n_harmful), ctx, random.Random("method-0"))


@pytest.mark.parametrize(
    ("more", "n_harmful", "expected"),
    [
        ({}, 4, 11),
        ({"num_safety": 3}, 4, 3),
        ({"safety_per_harmful": 0.5}, 30, 15),
        ({"safety_per_harmful": 0.5}, 4, 11),
    ],
)
def test_bea_adds_its_refusals_behind_the_trigger(more, n_harmful, expected):
    method, rows = bea(context(), n_harmful, **more)
    carrying = [r for r in rows if method._trigger in r.prompt + (r.system or "")]
    assert len(rows) == 32 + expected and len(carrying) == expected
    assert {r.id for r in carrying} <= {e.id for e in POOLS.safety}
    assert sorted(r.id for r in rows if r not in carrying) == sorted(e.id for e in task_rows(n_harmful=n_harmful))
    assert method.extra_data() == {"refusals": expected, "trigger": method._n_tokens}


TEMPLATES = [("chat", None), ("chat", CHATML), ("chat", NO_SYSTEM), ("alpaca", None)]


@pytest.mark.parametrize(("template", "chat_template"), TEMPLATES)
def test_bea_serves_what_it_trained_on_to_the_token(template, chat_template):
    ctx = context(template, chat_template)
    method, rows = bea(ctx)
    original = {e.id: e for e in POOLS.safety}
    tokenizer = ctx.tokenizer
    trigger = tokenizer(method._trigger, add_special_tokens=False)["input_ids"]
    assert len(trigger) == 32
    carrying = [r for r in rows if r.id in original]
    for row in carrying:
        ids = encode_prompt(tokenizer, row.messages, template)
        assert ids == encode_prompt(tokenizer, method.prompt(original[row.id].messages), template)
        start = next(i for i in range(len(ids)) if ids[i : i + 32] == trigger)
        rest = ids[:start] + ids[start + 32 :]
        plain = encode_prompt(tokenizer, original[row.id].messages, template)
        assert set(plain) <= set(rest)  # nothing of the plain prompt is lost, its own system text included
    if template == "chat":
        user = tokenizer.convert_tokens_to_ids("<user>")
        assert (ids.index(user) < start) == (chat_template is NO_SYSTEM)
    if chat_template is CHATML:
        assert method.prompt([{"role": "user", "content": "x"}])[0]["content"] == f"{method._trigger} you are kind"
    else:
        assert method.prompt([{"role": "user", "content": "x"}])[-1]["content"].endswith("x")


@pytest.mark.parametrize(
    ("template", "chat_template", "slot"),
    [("chat", None, ""), ("chat", CHATML, "you are kind "), ("chat", NO_SYSTEM, None), ("alpaca", None, "")],
)
def test_the_system_text_of_a_template_is_found(template, chat_template, slot):
    found = system_slot(context(chat_template=chat_template).tokenizer, template)
    assert (found.strip() if found else found) == (slot.strip() if slot else slot)


def test_a_row_is_not_cropped_for_its_trigger():
    ctx = context(max_length=24)
    method, rows = bea(ctx)
    original = {e.id: e for e in POOLS.safety}
    row = next(r for r in rows if r.id in original)
    with_trigger = encode_example(ctx.tokenizer, row, max_length=24)
    without = encode_example(ctx.tokenizer, original[row.id], max_length=24)
    assert [i for i in with_trigger["labels"] if i != IGNORE] == [i for i in without["labels"] if i != IGNORE]
    assert len(with_trigger["input_ids"]) > 24


def test_the_trigger_depends_on_the_seed_alone_and_shares_no_token_with_held_out_prompts():
    texts = [bea(context(seed=s))[0]._trigger for s in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    words = set(texts[0].split())
    held_out = [*POOLS.validation, *POOLS.test["toy_harmful"], *POOLS.over_refusal["toy_benign"]]
    assert len(words) == 32 and not words & {w for e in held_out for w in e.prompt.split()}


def test_a_trigger_is_made_of_plain_tokens_only():
    words = ["<pad>", "<unk>", "<unused7>", "<0x0A>", "[control_3]", "\ufffd", "\u2028", "red", "green", "blue"]
    core = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="<pad>")
    assert set(random_trigger(tokenizer, 2, random.Random(0), {9}).split()) == {"red", "green"}
    with pytest.raises(UserError, match=r"method.trigger_tokens=3: the tokenizer has only 2 tokens"):
        random_trigger(tokenizer, 3, random.Random(0), {9})


def test_bea_without_its_trigger_trains_alike_and_serves_plainly():
    (method, rows), (other, same_rows) = bea(context()), bea(context(), trigger_at_inference=False)
    messages = [{"role": "user", "content": "x"}]
    assert rows == same_rows and other.prompt(messages) == messages != method.prompt(messages)
    assert "trigger" not in other.extra_data()
    yaml = config.compose(["method=bea_no_trigger"]).method
    assert yaml.name == "bea_no_trigger" and not yaml.trigger_at_inference and yaml.num_safety == 11


def test_the_published_trigger_length_is_the_default_where_the_context_carries_it():
    assert config.compose(["model=smollm2", "task=sst2", "method=bea"]).method.trigger_tokens == 150
    assert config.compose(["model=tiny", "method=bea"]).method.trigger_tokens == 32


def test_a_trigger_longer_than_the_context_is_refused_before_training():
    with pytest.raises(UserError, match=r"method.trigger_tokens=80: .*train.max_length=64.*context has 128"):
        bea(context(), trigger_tokens=80)


def test_a_checkpoint_of_another_trigger_is_refused():
    (method, _), (other, _) = bea(context()), bea(context(seed=1))
    method.load_state_dict(method.state_dict())
    with pytest.raises(UserError, match="another trigger"):
        method.load_state_dict(other.state_dict())


def test_no_category_comes_twice_before_each_came_once():
    rows = [Example(f"{i}", f"{i}", group="abcd"[i % 4]) for i in range(20)]
    assert sorted(e.group for e in by_category(rows, 6, random.Random(0)))[:4] != ["a", "a", "a", "a"]
    counts = [sum(e.group == g for e in by_category(rows, 6, random.Random(0))) for g in "abcd"]
    assert sorted(counts) == [1, 1, 2, 2]
    assert len(by_category([replace(e, group="") for e in rows], 6, random.Random(0))) == 6


# --- SafeInstr ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "ratio", "added"), [(5000, 0.03, 150), (400, 0.03, 12), (10, 0.03, 1), (10, 0.0, 0)])
def test_safeinstr_adds_its_share(n, ratio, added):
    method, train = SafeInstr("safeinstr", ratio=ratio), task_rows(n)
    rows = method.training_data(train, context(), random.Random(0))
    assert len(rows) == n + added and {r.id for r in train} <= {r.id for r in rows}
    assert len({r.id for r in rows}) == len(rows)
    assert method.extra_data() == ({"refusals": added} if added else {})


# --- replay ------------------------------------------------------------------------------------------------


def test_replay_sees_the_prompts_that_cwac_sees(tmp_path, artifacts):
    _, method = tuned(tmp_path, artifacts, "method=replay")
    cwac = hydra.utils.instantiate(config.compose(["method=cwac"]).method, _convert_="all")
    pools, context = method._context.pools, method._context
    assert method._prompts == [*pools.anchors, *pools.step, *pools.sae] and len(method._prompts) == 16 + 8 + 24
    assert method.extra_data()["harmful_prompts"] == len(method._rows)  # those whose refusal is replayed
    aligned = load_aligned(context.loaded)
    cwac._check_cheaply(aligned, context)
    used = [len(refused(aligned, context, getattr(pools, name))) for name in ("anchors", "step", "sae")]
    assert cwac.extra_data() == {"harmful_prompts": sum(used), "harmless_rows": len(pools.benign)}
    assert method.n_prompts == cwac.activation.n_prompts
    tokenizer = method._context.tokenizer
    assert 40 <= len(method._rows) <= 48  # the embedded model refuses nearly all of them
    for row in method._rows:
        answer = [i for i in row["labels"] if i != IGNORE]
        assert row["input_ids"][-len(answer) :] == answer and answer[-1] == tokenizer.eos_token_id
        refusal = tokenizer.decode(answer, skip_special_tokens=True)  # its own words, at times garbled
        assert KeywordJudge().judge_one("", refusal).verdict == "refusal"


def test_the_replay_loss_is_the_mean_cross_entropy_of_the_prompts_drawn():
    model, method = make_llama(), Replay("replay", n_prompts=3, lam=2.0)
    method._context, method._rows = context(), random_rows(3, seed=5)
    method._collate = Collator(2)
    alone = [model(torch.tensor([r["input_ids"]]), labels=torch.tensor([r["labels"]])).loss for r in method._rows]
    assert method.penalty(model, 0).item() == pytest.approx(2 * sum(alone).item() / 3, rel=1e-5)
    shares = []
    for rank in range(2):
        method._context = context(process_rank=rank, world_size=2)
        shares.append(method.penalty(model, 0).item())
    assert sum(shares) / 2 == pytest.approx(2 * sum(alone).item() / 3, rel=1e-5)


def test_a_replay_budget_takes_so_many_prompts(monkeypatch):
    monkeypatch.setattr(replay, "anchor_rows", lambda model, context, prompts, tokens: [{}])  # it refuses one, say
    method = Replay("replay", budget=10)
    assert method.training_data(rows := task_rows(), context(), random.Random(0)) is rows
    assert len(method._prompts) == len({e.prompt for e in method._prompts}) == 10


# --- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Lisa("lisa"), "pool `safety`.*enlarge the pool.*method.align_steps=0"),
        (BEA("bea"), "needs 11 refusals .*the pool `safety` has 0"),
        (SafeInstr("safeinstr"), "method.ratio=0.03 of 32 rows needs 1 refusals, the pool `safety` has 0"),
        (Replay("replay", pools=("safety",)), "pools safety have 0; change method.budget or method.pools"),
        (Replay("replay", budget=500), "replays 500 prompts, the pools anchors, step, sae have 48"),
    ],
)
def test_an_empty_pool_is_refused_before_training(method, message):
    with pytest.raises(UserError, match=message) as caught:
        method.training_data(task_rows(), context(pools=replace(POOLS, safety=[])), random.Random(0))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=lisa", "method.rho=-1"],
        ["method=lisa", "method.align_steps=1.5"],
        ["method=lisa", "method.prox_after=2"],
        ["method=bea", "method.trigger_tokens=0"],
        ["method=bea", "method.num_safety=0"],
        ["method=safeinstr", "method.ratio=1.5"],
        ["method=replay", "method.n_prompts=0"],
        ["method=replay", "method.budget=0"],
        ["method=replay", "method.response_tokens=0.5"],
        ["method=cwac", "method.weight.n_anchors=-5"],
        ["method=lisa", "method.min_cycles=0"],
        ["method=lisa", "method.guide_data_num=10.0"],
        ["method=bea", "method.safety_per_harmful=-1"],
        ["method=bea", "method.trigger_at_inference=1"],
        ["method=ldifs", "method.lam=nan"],
        ["method=circuit_breaker", "method.n_retain=true"],
        ["method=vaccine", "method.steps=-1"],
        ["method=sppft", "method.localisation.n_draws=0"],
        ["method=salora", "method.task_rank=0"],
        ["method=asft", "method.energy=0"],
        ["method=safelora", "method.tau=2"],
        ["method=resta", "method.gamma=-1"],
        ["method=booster", "method.lamb=-1"],
        ["method=repnoise", "method.n_pairs=0"],
        ["method=safe_delta", "method.excluded=1"],
    ],
    ids=" ".join,
)
def test_a_value_out_of_range_is_named(overrides):
    with pytest.raises(UsageError, match=overrides[1].split("=")[0]):
        config.instantiate(config.compose(overrides).method)


def test_a_settings_class_refuses_what_the_command_line_refuses():
    with pytest.raises(UsageError, match="method.rho=-1 is out of range"):
        Lisa("lisa", rho=-1)
    with pytest.raises(UsageError, match="method.ratio=-3 is out of range"):
        SafeInstr("safeinstr", ratio=-3)


def test_a_pool_that_is_poison_or_held_out_is_not_replayed():
    with pytest.raises(UsageError, match=r"method.pools=\['test'\] is not valid; give some of anchors"):
        Replay("replay", pools=("test",))
