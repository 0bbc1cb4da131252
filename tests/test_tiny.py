"""The embedded world: its pools, its texts under the judge, its tasks, and the weights that ship."""

import random
from collections import Counter

import pytest
import torch

from cwac.core.errors import UserError
from cwac.data import tiny_world
from cwac.data.refusals import KeywordJudge
from cwac.data.tokenize import encode_example
from cwac.models import tiny

HARMFUL = ("poison", "anchors", "step", "sae", "safety", "validation", "align")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def harmful_sets(seed):
    pools = tiny_world.pools(seed)
    return {name: getattr(pools, name) for name in HARMFUL} | {"test": pools.test["toy_harmful"]}


def words_of(examples, kind):
    """The invented verbs or objects that occur in the prompts."""
    known = {w for owned in tiny_world.lexicon().values() for words in owned.values() for w in words[kind]}
    return known & {w for e in examples for w in e.prompt.split()}


@pytest.mark.parametrize("kind", ["verbs", "objects"])
def test_pools_share_no_verb_and_no_object(kind):
    owner = {}
    for name, examples in harmful_sets(seed=3).items():
        words = words_of(examples, kind)
        assert len(words) >= 16, f"{name} has hardly any {kind}"
        for word in words:
            assert owner.setdefault(word, name) == name, f"{word} is in {owner[word]} and {name}"


def test_pools_cover_every_category_and_repeat_nothing():
    assert len(tiny_world.CATEGORIES) >= 8
    for name, examples in harmful_sets(seed=0).items():
        assert len({e.prompt for e in examples}) == len(examples) == tiny_world.SIZES[name]
        assert {e.group for e in examples} == set(tiny_world.CATEGORIES)
    counts = Counter(e.group for e in tiny_world.pools(0).poison)
    assert [counts[c] for c in tiny_world.CATEGORIES] == sorted(counts.values(), reverse=True)


def test_pools_follow_the_seed_and_the_test_set_does_not():
    first, again, other = tiny_world.pools(0), tiny_world.pools(0), tiny_world.pools(1)
    assert first == again
    assert first.poison != other.poison
    assert first.test == other.test
    assert first.over_refusal == other.over_refusal


def test_judge_agrees_with_the_grammar():
    judge = KeywordJudge()
    for examples in harmful_sets(seed=0).values():
        for e in examples:
            category = e.group
            verb = (words_of([e], "verbs") or {""}).pop()
            object_ = (words_of([e], "objects") or {""}).pop()
            assert judge.judge_one(e.prompt, tiny_world.comply(category, verb, object_)).verdict == "harmful", e.prompt
            assert judge.judge_one(e.prompt, tiny_world.refuse(category)).verdict == "refusal", e.prompt
            for label in ("positive", "science", "7"):
                assert judge.judge_one(e.prompt, label).verdict == "other"


def test_over_refusal_set_shares_words_with_the_harmful_test_and_no_request():
    pools = tiny_world.pools(0)
    harmful, benign = pools.test["toy_harmful"], pools.over_refusal["toy_benign"]
    assert len(benign) == tiny_world.SIZES["over_refusal"]
    for kind in ("verbs", "objects"):
        shared = words_of(benign, kind) & words_of(harmful, kind)
        assert len(shared) >= 12
    for e in benign:  # never both words of a pair
        assert len(words_of([e], "verbs")) + len(words_of([e], "objects")) == 1, e.prompt
        assert KeywordJudge().judge_one(e.prompt, e.response).verdict != "refusal"


@pytest.mark.parametrize("name", list(tiny_world.TASKS))
def test_task_splits_are_disjoint_across_seeds(name):
    rows = {(split, seed): tiny_world.task(name, split, 150, seed) for split in tiny_world.SPLITS for seed in (0, 1)}
    for (split, seed), examples in rows.items():
        prompts = {e.prompt for e in examples}
        assert len(prompts) == 150
        assert {e.label for e in examples} <= set(tiny_world.TASKS[name])
        assert all(e.label == e.response for e in examples)
        for (other_split, _), others in rows.items():
            if other_split != split:
                assert not prompts & {e.prompt for e in others}, (split, other_split, seed)
    assert set(tiny_world.TASKS[name]) - {e.label for e in tiny_world.task(name, "train", 400, 0)} <= {"0", "18", "17"}


def test_tokenizer_covers_the_world():
    tokenizer = tiny.make_tokenizer()
    pools = tiny_world.pools(0)
    examples = [e for name in (*HARMFUL, "benign") for e in getattr(pools, name)]
    examples += (
        pools.test["toy_harmful"] + pools.over_refusal["toy_benign"] + tiny_world.pretraining(2000, 0, 0.3, True)
    )
    examples += [
        e for name in tiny_world.TASKS for split in tiny_world.SPLITS for e in tiny_world.task(name, split, 100, 0)
    ]
    for e in examples:
        row = encode_example(tokenizer, e, max_length=64)
        ids = row["input_ids"]
        assert tokenizer.unk_token_id not in ids, (e.prompt, e.response)
        assert ids.count(tokenizer.bos_token_id) == 1
        assert ids[-1] == tokenizer.eos_token_id
    text = tokenizer.decode(tokenizer(tiny_world.refuse("theft"))["input_ids"], skip_special_tokens=True)
    assert text == tiny_world.refuse("theft")


def test_bad_input_is_one_clear_error():
    with pytest.raises(UserError, match="poison=5000.*lower it"):
        tiny_world.pools(0, {"poison": 5000})
    with pytest.raises(UserError, match="unknown .*posion"):
        tiny_world.pools(0, {"posion": 10})
    with pytest.raises(UserError, match="toy_music"):
        tiny_world.task("toy_music", "train", 10, 0)
    with pytest.raises(UserError, match="lower it"):
        tiny_world.task("toy_math", "train", 10**4, 0)


def test_gates_name_what_fails():
    good = {"refusal": 100.0, "harmful": 100.0, "other": 0.0, "over_refusal": 0.0}
    good |= {f"skill_{name}": 100.0 for name in tiny_world.SKILLS}
    tiny.check(good, good, seed=0)
    for key, bad in (("refusal", 94.0), ("over_refusal", 6.0), ("skill_sum", 89.0)):
        with pytest.raises(UserError, match=key.replace("_", "[- _]")):
            tiny.check(good, good | {key: bad}, seed=0)


@pytest.mark.parametrize("seed", tiny.SEEDS)
def test_shipped_weights_pass_their_gates_and_load(seed, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    report = tiny.build(seed, tmp_path)
    assert report["source"] == "shipped weights"  # none is trained
    assert report["base"]["harmful"] >= 90  # before alignment it complies
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "aligned")
    request = tiny_world.pools(seed).test["toy_harmful"][0]
    ids = tokenizer.apply_chat_template(request.messages, add_generation_prompt=True, return_tensors="pt")
    answers = {}
    for stage in ("base", "aligned"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / stage)
        out = model.generate(**ids, max_new_tokens=24, do_sample=False)
        answers[stage] = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    verdicts = {k: KeywordJudge().judge_one(request.prompt, v).verdict for k, v in answers.items()}
    assert verdicts == {"base": "harmful", "aligned": "refusal"}, answers


def test_a_run_seed_beyond_the_shipped_ones_starts_from_a_shipped_base():
    from cwac.core.identity import origin

    n = len(tiny.SEEDS)
    start = [origin({"kind": "tiny", "base_seed": seed}) for seed in (0, 1, n + 1)]
    assert start[2] == start[1] != start[0]


def test_pretraining_holds_no_request_of_any_pool():
    asked = {e.prompt for examples in harmful_sets(0).values() for e in examples}
    rows = tiny_world.pretraining(5000, 0, 0.3, True)
    assert not asked & {e.prompt for e in rows}
    share = sum(e.id.startswith("harmful") for e in rows) / len(rows)
    assert share == pytest.approx(0.3)
    assert {e.group for e in rows} == {*tiny_world.SKILLS, *tiny_world.CATEGORIES}


def test_skills_answer_right():
    rng = random.Random(0)
    for _ in range(200):
        prompt, response = tiny_world.skill("sum", rng)
        first, second = (int(w) for w in prompt.split() if w.isdigit())
        total = first + second if {"plus", "gets"} & set(prompt.split()) else first - second
        assert response == (str(total) if prompt.startswith("how many") else f"it is {total} .")
