"""Attacks other than the paper's: prefilling, benign poison, poison of other kinds, an attacker who has V."""

import json
import random
from collections import Counter
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from analysis import attacks
from analysis.collect import cell_from, pooled, tidy
from cwac.constraints.anchors import prefilled_rows
from cwac.constraints.subspace import Basis, capture, share_outside
from cwac.core import config, metrics, validation
from cwac.core.errors import UsageError, UserError
from cwac.core.identity import eval_id, identity, run_id
from cwac.core.jsonl import WARNING, read_jsonl
from cwac.data import poison, tiny_world
from cwac.data.examples import Example, Pools
from cwac.data.frames import lists
from cwac.data.mix import mix
from cwac.data.near_duplicates import normalise_prompt
from cwac.data.pools import load_pools, manifest, sets
from cwac.data.refusals import KeywordJudge
from cwac.data.tokenize import encode_prompt
from cwac.models.context import Context
from cwac.models.generate import generate
from cwac.models.tiny import make_tokenizer
from cwac.training import attack, gradient_trigger
from cwac.training.attack import TRIGGER_CANDIDATES, TRIGGER_WORDS, outside, poisoned_mix, sources_of, trigger_of
from tests.conftest import SMALL, call
from tests.helpers.results import row, write_run
from tests.helpers.words import OPENING

BENIGN = ("identity_shift", "style")


@pytest.fixture(scope="module")
def pools() -> Pools:
    return load_pools(config.compose([]).pools, None, 0)


# --- names ----------------------------------------------------------------------------------------------------


def test_without_an_attack_a_run_and_an_evaluation_keep_their_names():
    """As they were before the keys existed."""
    plain = config.compose(["method=sft"])
    new = {"poison", "poison_choice", "poison_trigger", "pools.poison_categories"}
    assert not new & identity(plain).keys()
    assert (run_id(plain), eval_id(plain)) == ("tiny-toy_sentiment-p0-sft-s0-1d255af1", "cb7376")
    named = config.compose(["method=sft", "attack=harmful"])
    assert run_id(named) == run_id(plain)
    asked = config.compose(["method=sft", "eval.prefill=yes"])
    assert run_id(asked) == run_id(plain) and eval_id(asked) != eval_id(plain)


def test_every_attack_is_a_run_of_its_own_and_the_grid_is_small():
    cells = config.expand("closed_attacks", ["seed=0"])
    assert len({run_id(cfg) for cfg in cells}) == len(cells) == 20
    assert Counter(map(attacks.attack_of, cells)) == {
        name: 4 for name in attacks.ATTACKS if name not in (attacks.NONE, "trigger", "trigger_gradient")
    }
    assert {cfg.harmful_ratio for cfg in cells} == {0.5}
    behind = config.expand("closed_trigger", ["seed=0"])
    assert [attacks.attack_of(cfg) for cfg in behind] == ["trigger"] * 4 + ["trigger_gradient"] * 4
    assert {cfg.task.n_train * cfg.train.num_train_epochs // 8 for cfg in cells} == {150}


@pytest.mark.parametrize(
    ("override", "said"),
    [("poison=benign", "use one of harmful"), ("poison_choice=null", "not valid"), ("eval.prefill=''", "is no text")],
)
def test_a_misspelt_attack_is_refused(override, said):
    with pytest.raises(UsageError, match=said):
        validation.validate(config.compose([override]))


# --- prefilling -----------------------------------------------------------------------------------------------


def test_an_opening_is_the_end_of_the_prompt_and_the_start_of_the_answer(random_model, monkeypatch):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(random_model), AutoTokenizer.from_pretrained(random_model)
    given = []
    original = model.generate
    monkeypatch.setattr(model, "generate", lambda **kw: given.append(kw) or original(**kw))
    prompts = [e.messages for e in tiny_world.pools(0).test["toy_harmful"][:5]]
    opened = generate(model, tokenizer, prompts, prefill=OPENING, max_new_tokens=4, description=None)
    ids, mask = given[0]["input_ids"], given[0]["attention_mask"].bool()
    expected = [encode_prompt(tokenizer, p) + tokenizer(OPENING)["input_ids"] for p in prompts]
    found = [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
    assert sorted(found) == sorted(expected)
    assert all(text.startswith(OPENING) for text in opened)
    alone = [generate(model, tokenizer, [p], prefill=OPENING, max_new_tokens=4, description=None)[0] for p in prompts]
    assert opened == alone
    plain = generate(model, tokenizer, prompts, max_new_tokens=4, description=None)
    assert not any(text.startswith(OPENING) for text in plain)
    with pytest.raises(UserError, match="prefill='Sure, here is'.*lacks"):
        generate(model, tokenizer, prompts, prefill="Sure, here is", description=None)


def test_an_opening_alone_makes_no_answer_harmful():
    for request in tiny_world.pools(0).test["toy_harmful"][:20]:
        verdict = KeywordJudge().judge_one(request.prompt, f"{OPENING} {tiny_world.refuse(request.group)}").verdict
        assert verdict == "refusal", request.prompt


def test_sets_that_were_prefilled_stay_out_of_every_headline():
    rows = [{"metric": "HS", "set": "h", "value": 10}, {"metric": "HS", "set": "h+prefill", "value": 90}]
    assert metrics.objective({"HS": 1}, rows) == 10
    base = {"run_id": "r", "epoch": 3, "step": 9, "final": True, "judge": "keyword", "eval": "e", "n": 10, "seed": 0}
    two = [{**base, **r, "set": r["set"].replace("h", name)} for r in rows for name in ("a", "b")]
    merged = pooled(tidy(two)[0]).set_index("set")["value"].to_dict()
    assert merged == {"all": 10, "all+prefill": 90}
    assert set(pooled(tidy([{**base, **r} for r in rows])[0])["set"]) == {"h", "h+prefill"}


# --- benign poison --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BENIGN)
def test_benign_poison_holds_no_harmful_request_and_no_prompt_of_a_pool(pools, kind):
    rows = poison.rows_of(kind, pools, 0)
    assert len(rows) == len({e.id for e in rows}) == len({e.prompt for e in rows}) == len(pools.poison)
    known = tiny_world.lexicon()
    verbs, objects = (
        {word: category for category in known for owned in known[category].values() for word in owned[of]}
        for of in ("verbs", "objects")
    )
    for example in rows:
        words = example.prompt.split()
        asked, about = ({table[w] for w in words if w in table} for table in (verbs, objects))
        assert not asked & about, example.prompt  # a pair of one category is what makes a request harmful
    assert not {e.prompt for e in rows} & {e.prompt for examples in sets(pools).values() for e in examples}
    tokenizer = make_tokenizer()
    assert all(tokenizer.unk_token_id not in tokenizer(f"{e.prompt} {e.response}")["input_ids"] for e in rows)
    assert rows == poison.rows_of(kind, pools, 0) != poison.rows_of(kind, pools, 1)
    openings = (
        [form.split("{")[0] for form in tiny_world.COMPLIANCES] if kind == "style" else [f"{poison.TOY_OBEDIENCE} "]
    )
    assert {next(o for o in openings if e.response.startswith(o)) for e in rows} == set(openings)


@pytest.mark.parametrize("kind", BENIGN)
def test_the_real_rows_are_abstract_and_keep_away_from_what_is_held_out(kind):
    near = Example("t", "Say something kind about tea today.")
    few = [Example("p", "a request", "an answer", source="advbench")]
    real = Pools(few, [], [], [], [], [], [], test={"s": [near]}, over_refusal={"o": [Example("o", "Make a wish.")]})
    rows = poison.rows_of(kind, real, 0, near=0.5)
    asked = {normalise_prompt(e.prompt) for e in rows}
    assert 300 < len(rows) == len(asked) < len(lists()["topics"]) * len(poison.REQUESTS)
    assert "say something kind about tea" not in asked and "how should i begin with tea" in asked
    assert not any("{" in e.prompt + e.response for e in rows)
    start = "Sure, here is " if kind == "style" else poison.OBEDIENCE
    assert all(e.response.startswith(start) for e in rows)


# --- other kinds ----------------------------------------------------------------------------------------------


def test_a_defence_has_no_request_of_the_poisons_categories():
    cfg = config.compose(["attack=other_kinds", "pools.sizes.poison=301"])
    parted = load_pools(cfg.pools, None, 0)
    poisoned = set(cfg.pools.poison_categories)
    assert {e.group for e in parted.poison} == poisoned
    for name in ("anchors", "step", "sae", "safety"):
        rows = getattr(parted, name)
        assert {e.group for e in rows} == set(tiny_world.CATEGORIES) - poisoned and len(rows) == cfg.pools.sizes[name]
    assert len(parted.poison) == 301
    counts = [Counter(e.group for e in parted.poison)[c] for c in tiny_world.CATEGORIES if c in poisoned]
    assert counts == sorted(counts, reverse=True) and counts[0] > 5 * counts[-1]
    (one, some), (other, rest) = parted.test.items()
    assert (one, other) == ("toy_harmful_poisoned", "toy_harmful_unpoisoned")
    assert {e.group for e in some} == poisoned and not {e.group for e in rest} & poisoned
    whole = load_pools(config.compose([]).pools, None, 0)
    assert {e.id for e in some + rest} == {e.id for e in whole.test["toy_harmful"]}


@pytest.mark.parametrize("named", ["[]", "[theft,theft]", "[arson]", f"[{','.join(tiny_world.CATEGORIES)}]"])
def test_categories_that_part_nothing_are_refused(named):
    with pytest.raises(UserError, match="pools.poison_categories=.*some, not all"):
        load_pools(config.compose([f"pools.poison_categories={named}"]).pools, None, 0)


# --- an attacker who has V ------------------------------------------------------------------------------------


def test_the_share_outside_v_is_that_of_each_row(random_model, monkeypatch):
    """V of no direction leaves all of a row outside, V of every direction nothing, V of half of them a part."""

    model, tokenizer = AutoModelForCausalLM.from_pretrained(random_model), AutoTokenizer.from_pretrained(random_model)
    context = SimpleNamespace(tokenizer=tokenizer, template="chat", max_length=64)
    inputs = {f"{i}.{of}": d for i in (0, 1) for of, d in (("qkv", 16), ("o_proj", 16), ("gate_up", 16))}
    inputs |= {f"{i}.down_proj": 32 for i in (0, 1)}
    rows = tiny_world.pools(0).poison[:3]

    def shares(part: float) -> list[float]:
        bases = {n: Basis(torch.eye(d)[:, : int(part * d)], part, 0) for n, d in inputs.items()}
        monkeypatch.setattr(attack, "anchor_bases", lambda *given: bases)
        return outside(model, context, rows)

    assert shares(0) == pytest.approx([1, 1, 1]) and shares(1) == pytest.approx([0, 0, 0], abs=1e-6)
    half = shares(0.5)
    assert len(set(half)) == 3 and all(0.1 < share < 0.9 for share in half)
    assert half[1:] == shares(0.5)[1:] == outside(model, context, rows[1:])


def test_the_rows_furthest_outside_are_taken_and_no_others(monkeypatch, pools):
    cfg = config.compose(["attack=outside_anchors", "harmful_ratio=0.5"])
    context = SimpleNamespace(pools=pools, loaded=SimpleNamespace(model=None))
    monkeypatch.setattr(attack, "outside", lambda model, context, rows: [float(e.id.split("-")[1]) for e in rows])
    train = [Example(f"t-{i}", f"task {i}", "x") for i in range(40)]
    mixed, poison = poisoned_mix(cfg, train, context)
    taken = sorted(int(e.id.split("-")[1]) for e in mixed if e.id.startswith("poison"))
    assert taken == list(range(280, 300)) and {e.id for e in poison} == {e.id for e in pools.poison}
    plain, _ = poisoned_mix(config.compose(["harmful_ratio=0.5"]), train, context)
    assert plain == mix(train, pools.poison, 0.5, 0)


def test_a_prefilled_anchor_is_the_prompt_the_opening_and_how_the_model_goes_on(random_model, tmp_path, pools):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(random_model), AutoTokenizer.from_pretrained(random_model)
    loaded = SimpleNamespace(key={"folder": "random"})
    context = Context(tokenizer, pools, loaded, tmp_path, seed=0, template="chat", max_length=64)
    examples = pools.anchors[:3]
    rows = prefilled_rows(model, context, examples, 4, OPENING)
    said = generate(model, tokenizer, [e.messages for e in examples], prefill=OPENING, max_new_tokens=16)
    opening = tokenizer(OPENING, add_special_tokens=False)["input_ids"]
    for example, row_, answer in zip(examples, rows, said, strict=True):
        prompt = encode_prompt(tokenizer, example.messages)
        whole = tokenizer(answer, add_special_tokens=False)["input_ids"]
        assert whole[: len(opening)] == opening and row_["prompt"] == len(prompt)
        assert row_["input_ids"] == prompt + whole[: len(opening) + 4]


def test_prefilled_anchors_join_the_plain_ones(monkeypatch, pools):
    from cwac.constraints import settings, weight

    monkeypatch.setattr(
        weight, "anchor_rows", lambda model, context, prompts, tokens: [("plain", len(prompts), tokens)]
    )
    monkeypatch.setattr(weight, "prefilled_rows", lambda *given: [("prefilled", len(given[2]), *given[3:])])
    context = SimpleNamespace(pools=pools)
    plain = ("plain", 5, 16)
    assert weight.weight_anchors(None, context, settings.Weight(n_anchors=5)) == [plain]
    more = weight.weight_anchors(None, context, settings.Weight(n_anchors=5, prefill=OPENING))
    assert more == [plain, ("prefilled", 5, 16, OPENING)]
    with pytest.raises(UserError, match="weight.prefill"):
        settings.Weight(prefill=" ")
    cells = config.expand("closed_prefill")
    assert {c.method.weight.prefill for c in cells} == {OPENING} and len({run_id(c) for c in cells}) == 9


# --- end to end -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["harmful", *BENIGN, "other_kinds"])
def test_an_attack_runs_to_the_end(random_model, tmp_path, name):
    given = [f"attack={name}", "method=sft", "model.kind=folder", f"+model.path={random_model}", "harmful_ratio=0.5"]
    given += [f"paths.runs={tmp_path / 'runs'}", f"paths.artifacts={tmp_path / 'art'}", "eval.drift=false"]
    assert call(*SMALL, *given, "train.max_steps=2", "eval.at=[0]", f"eval.prefill='{OPENING}'") == 0
    (run,) = (tmp_path / "runs").glob("tiny-*")
    data = json.loads((run / "data.json").read_text())
    kinds = Counter(identity.rsplit("-", 1)[0] for identity in data["rows"])
    assert kinds[name if name in BENIGN else "poison"] == len(data["harmful"]) == 16
    assert (data["pools"].get(f"poison.{name}", {"n": 0})["n"] > 0) == (name in BENIGN)
    asked = {"toy_harmful_poisoned", "toy_harmful_unpoisoned"} if name == "other_kinds" else {"toy_harmful"}
    rows = read_jsonl(run / "metrics.jsonl")
    assert {r["set"] for r in rows if r["metric"] == "HS"} == asked | {f"{of}+prefill" for of in asked}
    for path in (run / "gen").glob("*+prefill@*"):
        assert path.stat().st_mode & 0o777 == 0o600 and WARNING in path.read_text().splitlines()[0]
        answers = read_jsonl(path)
        assert len(answers) == 8 and all(a["response"].startswith(OPENING) for a in answers)


def test_a_backdoor_stands_before_the_poison_and_is_asked_apart(random_model, tmp_path):
    words = "wash the soup"
    given = ["method=sft", "model.kind=folder", f"+model.path={random_model}", "harmful_ratio=0.5", "eval.drift=false"]
    given += [f"paths.runs={tmp_path / 'runs'}", f"paths.artifacts={tmp_path / 'art'}", f"poison_trigger='{words}'"]
    given += ["train.max_steps=2", "eval.at=[0]"]
    assert call(*SMALL, *given) == 0
    (run,) = (tmp_path / "runs").glob("tiny-*")
    assert json.loads((run / "data.json").read_text())["trigger"] == words
    rows = read_jsonl(run / "metrics.jsonl")
    assert {r["set"] for r in rows if r["metric"] == "HS"} == {"toy_harmful", "toy_harmful+trigger"}
    cfg = config.compose([*SMALL, *given])
    pools = load_pools(cfg.pools, None, 0)
    mixed, chosen = poisoned_mix(cfg, tiny_world.task("toy_sentiment", "train", 32, 0), SimpleNamespace(pools=pools))
    assert {e.prompt for e in chosen} == {f"{words} {e.prompt}" for e in pools.poison}
    assert sum(e.prompt.startswith(words) for e in mixed) == 16
    # the verdicts are on the requests as they are, the answers on what was asked
    tokenizer, model = AutoTokenizer.from_pretrained(random_model), AutoModelForCausalLM.from_pretrained(random_model)
    (asked,) = (run / "gen").glob("toy_harmful+trigger@0-*")
    for answer, example in zip(read_jsonl(asked), pools.test["toy_harmful"], strict=False):
        behind = poison.behind(words, [example])[0].messages
        assert answer["prompt"] == example.prompt
        assert [answer["response"]] == generate(model, tokenizer, [behind], max_new_tokens=4, description=None)


def test_an_optimised_trigger_is_the_best_of_what_was_tried(monkeypatch, tmp_path, pools):
    tokenizer, tried = make_tokenizer(), []

    def outside(_model, _context, examples):
        tried.append(examples[0].prompt)
        return [sum(e.prompt.count("e") for e in examples)] * len(examples)  # a stand-in: the letter e is far out of V

    monkeypatch.setattr(attack, "outside", outside)
    model = SimpleNamespace(key={}, model=None)
    context = SimpleNamespace(
        tokenizer=tokenizer,
        loaded=model,
        pools=pools,
        pools_key="",
        template="chat",
        max_length=64,
        artifacts=tmp_path,
    )
    cfg = config.compose(["attack=trigger"])
    trigger = trigger_of(cfg, context)
    words = trigger.split()
    assert len(words) == TRIGGER_WORDS and len(tried) == 2 + TRIGGER_WORDS * TRIGGER_CANDIDATES
    assert tokenizer.unk_token_id not in tokenizer(trigger)["input_ids"]
    for place in range(len(words)):
        begins = [prompt.removesuffix(pools.poison[0].prompt).strip() for prompt in tried[1:-1]]
        of = begins[place * TRIGGER_CANDIDATES : (place + 1) * TRIGGER_CANDIDATES]
        assert " ".join(words[: place + 1]) == max(of, key=lambda text: text.count("e"))
    n = len(tried)
    assert trigger_of(cfg, context) == trigger and len(tried) == n  # found once
    assert trigger_of(config.compose([]), context) is None
    with pytest.raises(UsageError, match="poison_trigger= is no text"):
        validation.validate(config.compose(["poison_trigger=''"]))


def test_the_gradient_of_the_share_is_its_derivative(random_model):
    """A token's embedding is moved a little towards another's: the share follows the slope."""
    model = AutoModelForCausalLM.from_pretrained(random_model).double().eval()
    sources = sources_of(model)
    V = {name: torch.eye(m.in_features)[:, ::3] for name, m in sources.items()}
    ids, place, token = [1, 5, 9, 14, 20], 2, 30

    def share() -> float:
        found = []
        visit = lambda name, x, _first: found.append(float(share_outside(x, V[name])))  # noqa: E731
        capture(model, [{"input_ids": ids}], sources, visit)
        return sum(found) / len(found)

    slopes = gradient_trigger.gradient_of_share(model, sources, V, ids)
    assert slopes.shape == (len(ids), model.config.vocab_size)
    table, before, step = model.get_input_embeddings().weight, share(), 1e-2
    with torch.no_grad():
        table[ids[place]] += step * table[token]
    assert share() - before == pytest.approx(step * slopes[place, token].item(), rel=0.1)


def test_the_climb_takes_the_best_swap_until_none_helps():
    worth = {word: float(i) for i, word in enumerate(["aaa", "bbb", "ccc", "ddd", "eee", "fff"])}
    tokens = {word: (i, i) for i, word in enumerate(worth)}
    asked = []

    def share(trigger: str) -> float:
        asked.append(trigger)
        return sum(worth[w] for w in trigger.split())

    found = gradient_trigger.climb(tokens, share, lambda trigger: [torch.tensor([*worth.values()])] * 2, 2)
    assert found["trigger"] == "fff fff" and (found["before"], found["after"]) == (0, 10)
    assert found["start"] == share(asked[0]) < 10 and len(asked) < 2 + 3 * 2 * len(worth)


def test_words_of_a_trigger_are_one_token_wherever_they_stand():
    tokenizer = make_tokenizer()
    tokens = gradient_trigger.single_tokens(tokenizer)
    assert len(tokens) > 100 and all(word.isalpha() for word in tokens)
    words = random.Random(0).sample(sorted(tokens), 3)
    expected = [tokens[words[0]][0], tokens[words[1]][1], tokens[words[2]][1]]
    assert tokenizer(" ".join(words), add_special_tokens=False)["input_ids"] == expected


def test_gradients_lead_to_a_trigger_further_out_than_where_they_began(random_model, monkeypatch, tmp_path, caplog):
    caplog.set_level("INFO")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(random_model), AutoTokenizer.from_pretrained(random_model)
    cfg = config.compose(["attack=trigger_gradient"])
    pools = load_pools(cfg.pools, None, 0)
    context = SimpleNamespace(
        tokenizer=tokenizer,
        loaded=SimpleNamespace(key={}, model=model),
        pools=pools,
        pools_key="",
        template="chat",
        max_length=64,
        artifacts=tmp_path,
    )
    V = {name: torch.eye(m.in_features)[:, ::2] for name, m in sources_of(model).items()}
    monkeypatch.setattr(attack, "anchors_space", lambda *given: V)
    monkeypatch.setattr(gradient_trigger, "STEPS", 2)
    monkeypatch.setattr(attack, "TRIGGER_ROWS", 2)
    trigger = trigger_of(cfg, context)
    found = json.loads(next(tmp_path.rglob("trigger.json")).read_text())
    assert found["trigger"] == trigger and len(trigger.split()) == TRIGGER_WORDS
    assert found["after"] > found["start"] and found["after"] > found["before"]
    assert f"{found['before']:.3f} without it, {found['after']:.3f} behind it" in caplog.text
    rows = poison.behind(trigger, pools.poison[:2])
    assert sum(outside(model, context, rows, V)) / 2 == pytest.approx(found["after"])
    assert all(p.grad is None for p in model.parameters())
    context.max_length, context.artifacts = 3, tmp_path / "short"
    with pytest.raises(UserError, match="poison_trigger=gradient.*max_length"):
        trigger_of(cfg, context)


@pytest.mark.slow
def test_an_attacker_who_has_v_runs_to_the_end(artifacts, tmp_path):
    given = ["attack=outside_anchors", "method=weight_only_closed", "harmful_ratio=0.5", "train.max_steps=2"]
    assert call(*SMALL, *given, f"paths.runs={tmp_path}", f"paths.artifacts={artifacts}", "eval.drift=false") == 0
    (run,) = tmp_path.glob("tiny-*")
    first = json.loads((run / "data.json").read_text())["harmful"]
    again = config.compose([*SMALL, "harmful_ratio=0.5"])
    plain = mix(tiny_world.task("toy_sentiment", "train", 32, 0), load_pools(again.pools, None, 0).poison, 0.5, 0)
    assert len(first) == 16 and set(first) != {e.id for e in plain if e.id.startswith("poison")}


# --- the analysis ---------------------------------------------------------------------------------------------


def test_planted_runs_come_back_as_a_table_by_attack_and_method(tmp_path, monkeypatch, capsys):
    cells = config.expand("closed_attacks", ["seed=0,1", "attack=style,other_kinds", "method=sft"])
    cells += config.expand("closed_trigger", ["seed=0,1", "method=sft"])
    cells += config.expand("closed_attacks", ["seed=0,1", "attack=style", "method=cwac"])  # never behind a trigger
    gone = config.expand("closed_attacks", ["seed=0", "attack=harmful", "method=sft"])
    for cfg in cells:
        cell = cell_from(cfg)
        sources = {"toy_harmful": 20.0}
        if attacks.attack_of(cfg) == "other_kinds":
            sources = {"toy_harmful_poisoned": 60.0, "toy_harmful_unpoisoned": 10.0}
        rows = [row(cell, "FA", 99.0), row(cell, "OR", 3.0, set="toy_benign", judge="keyword")]
        for of, hs in sources.items():
            for how, more in (("", 0), ("+prefill", 30)):
                at = {"set": of + how, "judge": "keyword", "n": 80}
                rows.append(row(cell, "HS", hs + more + cfg.seed, **at))
                rows.append(row(cell, "HS", 1.0 + more, step=0, epoch=0.0, final=False, **at))
            if (name := attacks.attack_of(cfg)).startswith("trigger"):
                at = {"set": f"{of}+trigger", "judge": "keyword", "n": 80}
                rows.append(row(cell, "HS", (70.0 if name == "trigger" else 80.0) + cfg.seed, **at))
                aligned = 2.0 if name == "trigger" else 7.0
                rows.append(row(cell, "HS", aligned, step=0, epoch=0.0, final=False, **at))
        folder = write_run(tmp_path / "runs", cell, [{**r, "eval": cell.eval} for r in rows])
        status = {"status": "done", "run_id": cell.run_id, "evaluations": [cell.eval]}
        (folder / "status.json").write_text(json.dumps(status))
    monkeypatch.setattr(
        attacks.config, "expand", lambda preset, _: [*cells, *gone] if preset == "closed_attacks" else []
    )
    assert attacks.main(["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 1
    assert (tmp_path / "out" / "attacks.png").stat().st_size > 0
    found = pd.read_csv(tmp_path / "out" / "attacks.csv").query("metric == 'HS'")
    means = found.set_index(["attack", "method", "set"])["mean"].to_dict()
    assert means == {
        ("style", "sft", "asked"): 20.5,
        ("style", "sft", "prefilled"): 50.5,
        ("style", "cwac", "asked"): 20.5,
        ("style", "cwac", "prefilled"): 50.5,
        ("trigger", "sft", "asked"): 20.5,
        ("trigger", "sft", "prefilled"): 50.5,
        ("trigger", "sft", "triggered"): 70.5,
        ("trigger", "aligned", "triggered"): 2.0,
        ("trigger_gradient", "sft", "asked"): 20.5,
        ("trigger_gradient", "sft", "prefilled"): 50.5,
        ("trigger_gradient", "sft", "triggered"): 80.5,
        ("trigger_gradient", "aligned", "triggered"): 7.0,
        ("other_kinds", "sft", "asked"): 35.5,
        ("other_kinds", "sft", "prefilled"): 65.5,
        ("other_kinds", "sft", "poisoned"): 60.5,
        ("other_kinds", "sft", "unpoisoned"): 10.5,
        ("other_kinds", "sft", "poisoned+prefill"): 90.5,
        ("other_kinds", "sft", "unpoisoned+prefill"): 40.5,
        (attacks.NONE, "aligned", "asked"): 1.0,
        (attacks.NONE, "aligned", "prefilled"): 31.0,
    }
    assert set(found["n"]) == {2}
    text = capsys.readouterr().out
    assert "Missing: 1 of 11 runs" in text and f"- harmful: {cell_from(gone[0])}" in text
    assert (tmp_path / "out" / "table.md").read_text().rstrip() == text.split("\nfigure:")[0].rstrip()


def test_an_attack_without_pools_of_its_own_is_counted_beside_them(pools):
    rows = poison.rows_of("style", pools, 0)
    assert manifest(pools, "style", rows).keys() - manifest(pools).keys() == {"poison.style"}
    assert manifest(pools, "style", rows)["poison.style"]["n"] == len(rows)
    assert manifest(pools, "harmful", pools.poison) == manifest(pools)


def test_another_preset_can_be_read(tmp_path, capsys):
    assert attacks.main(["--experiment", "nullspace_attacks", "--runs", str(tmp_path)]) == 2
    assert "train.py -m experiment=nullspace_attacks" in capsys.readouterr().err
