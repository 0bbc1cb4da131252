"""Model judges on random models of their architectures; what survives a crash; judging finished runs; agreement."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from analysis import agreement, stats
from analysis.collect import VERDICT_COLUMNS, Collection
from cwac.core import config, identity
from cwac.core.errors import UserError
from cwac.core.jsonl import append_jsonl, read_jsonl
from cwac.core.run_dir import Run
from cwac.data.refusals import Judgement
from cwac.evaluation import model_judges
from cwac.evaluation.evaluate import verdict_rows
from cwac.evaluation.judge import judge_answers, repeats
from cwac.evaluation.model_judges import LABELS
from experiments import judge as later
from tests.conftest import SMALL
from train import headline, run_cell

WORDS = "BEGINNING OF CONVERSATION: USER: ASSISTANT: lift fold the a lantern marble i cannot help with that . sure"
TURNS = "{% for m in messages %}<turn> {{ m['role'] }}\n{{ m['content'] }} {% endfor %}<turn> assistant"
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
PROMPTS = ["lift the lantern", "fold a marble the marble", "lift a lantern"]
RESPONSES = ["sure fold the lantern", "i cannot help with that .", "marble " * 5]


def tokenizer(words: str) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with BOS in front, as Llama's and Gemma's have it."""
    names = ["<unk>", "<s>", "</s>", *dict.fromkeys(f"{WORDS} <turn> {words}".split())]
    core = Tokenizer(WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.chat_template = "<s> " + TURNS
    return made


def saved(folder, model_class, config_class, words: str = "", **more):
    """A random model of a class in `folder`, with a tokenizer that has no padding token."""
    made = tokenizer(words)
    torch.manual_seed(0)
    sizes = SIZES | ({"head_dim": 8, "num_key_value_heads": 1} if config_class is GemmaConfig else {})
    model = model_class(config_class(vocab_size=len(made), **sizes, **more))
    for parameter in model.parameters():  # a fresh model is close to indifferent; this one has opinions
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    return model.eval(), made


NAMES = dict(enumerate(LABELS))
MODELS = {
    "beaver_dam": (LlamaForSequenceClassification, LlamaConfig, "", {"id2label": NAMES, "num_labels": 14}),
    "llama_guard": (LlamaForCausalLM, LlamaConfig, "safe unsafe", {}),
    "harmbench_cls": (LlamaForCausalLM, LlamaConfig, "Yes yes No", {}),
    "strongreject": (GemmaForCausalLM, GemmaConfig, "1 2 3 4 5", {}),
}


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    """Every model judge over a random model of its architecture; name -> (judge, model, tokenizer)."""
    made = {}
    for name, (model_class, config_class, words, more) in MODELS.items():
        folder = tmp_path_factory.mktemp(name)
        model, words = saved(folder, model_class, config_class, words, **more)
        overrides = [f"hub_id={folder}", "dtype=float32"] + (["adapter=null"] if name == "strongreject" else [])
        made[name] = config.instantiate(later.configure(name, overrides)), model, words
    return made


def test_every_option_is_tested_here():
    options = {p.stem for p in later.JUDGES.glob("*.yaml")}
    assert options == {*MODELS, "keyword", "semantic", "semantic2"}  # the last two in test_semantic.py
    for name in options:
        assert later.configure(name, []).name == name
        assert config.compose([f"eval/judge={name}"]).eval.judge == later.configure(name, [])


def test_beaver_dam_gives_each_response_what_the_model_gives_it_alone(judges):
    judge, model, words = judges["beaver_dam"]
    found = judge.judge(PROMPTS, RESPONSES)
    for prompt, response, one in zip(PROMPTS, RESPONSES, found, strict=True):
        text = f"BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{response}</s>"
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([words(text)["input_ids"]])).logits[0].sigmoid().tolist()
        assert list(one.probabilities) == list(LABELS)
        assert list(one.probabilities.values()) == pytest.approx(expected, abs=1e-5)
        assert one.score == pytest.approx(max(expected), abs=1e-5)
        assert (one.verdict == "harmful") == (max(expected) > 0.5)
    assert judge.judge(PROMPTS[:1], RESPONSES[:1]) == found[:1]


@pytest.mark.parametrize("name", list(MODELS))
def test_a_batch_in_one_pass_gives_each_answer_what_it_gives_it_alone(judges, name, monkeypatch):
    """As an accelerator reads; on a CPU rows are read one by one."""
    judge, *_ = judges[name]
    alone = judge.judge(PROMPTS, RESPONSES)
    monkeypatch.setattr(model_judges, "at_once", lambda batch_size: batch_size)
    passes, pad = [], model_judges.pad
    monkeypatch.setattr(model_judges, "pad", lambda rows: passes.append(len(rows)) or pad(rows))
    for one, other in zip(alone, judge.judge(PROMPTS, RESPONSES), strict=True):
        assert one.verdict == other.verdict and one.score == pytest.approx(other.score, abs=1e-4)
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)
    assert passes == [len(PROMPTS)]


def test_beaver_dam_reads_256_tokens_and_the_end_of_a_short_answer(judges):
    judge, _, words = judges["beaver_dam"]
    short, long = judge.encode("lift", "fold the"), judge.encode("lift", "fold " * 400)
    assert short[0] == words.bos_token_id and short.count(words.bos_token_id) == 1
    assert short[-1] == words.eos_token_id and long[-1] != words.eos_token_id
    assert len(long) == 256 and long[:6] == short[:6]


def test_below_the_threshold_a_denial_is_a_refusal_and_the_rest_is_other(judges):
    judge, *_ = judges["beaver_dam"]
    judge.threshold, before = 1.0, judge.threshold
    try:
        assert [v.verdict for v in judge.judge(PROMPTS, RESPONSES)] == ["other", "refusal", "other"]
    finally:
        judge.threshold = before


@pytest.mark.parametrize("name", ["llama_guard", "harmbench_cls", "strongreject"])
def test_token_judges_read_the_next_token_of_the_whole_question(judges, name):
    judge, model, words = judges[name]
    found = judge.judge(PROMPTS, RESPONSES)
    for prompt, response, one in zip(PROMPTS, RESPONSES, found, strict=True):
        ids = words(judge.text(prompt, response), add_special_tokens=name != "llama_guard")["input_ids"]
        assert ids.count(words.bos_token_id) == 1
        with torch.no_grad():
            chances = model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)
        vocabulary = words.get_vocab()
        expected = {a: sum(float(chances[i]) for w, i in vocabulary.items() if w.lower() == a) for a in judge.answers}
        assert one.probabilities == pytest.approx(expected, abs=1e-5)
        score = sum(p * judge.answers[a] for a, p in expected.items()) / sum(expected.values())
        assert one.score == pytest.approx(score, abs=1e-4)
        said = words.decode([int(chances.argmax())]).strip().lower()
        assert (one.verdict == "harmful") == (score > 0.5 and (said in judge.answers or not judge.must_answer))


def test_questions_end_where_the_verdict_begins(judges):
    asked = ("lift the lantern", "sure {x} fold")
    texts = {name: judge.text(*asked) for name, (judge, *_) in judges.items() if name != "beaver_dam"}
    assert texts["llama_guard"].endswith("<turn> assistant\n\n")
    assert texts["harmbench_cls"].endswith("Answer: [/INST]") and texts["strongreject"].endswith("### Answer: ")
    assert all("lift the lantern" in text and "fold" in text for text in texts.values())
    long = "lift " * 100 + "fold " * 500
    assert judges["harmbench_cls"][0].text("a", long).split().count("lift") == 100
    assert judges["harmbench_cls"][0].text("a", long).split().count("fold") == 411  # the first 511
    assert judges["strongreject"][0].text("a", long).split().count("lift") == 11  # the last 511
    assert judges["strongreject"][0].text("a", long).split().count("fold") == 500


def test_harmbench_asks_by_the_template_of_its_code(judges):
    judge, *_ = judges["harmbench_cls"]
    rules = judge.text("lift", "fold").split("Rules:")[1]
    assert rules.count("\n- ") == 7 and "[BEHAVIOR]:\nlift" in judge.text("lift", "fold")
    judge.template, before = "harmbench_cls_card.txt", judge.template
    settings = judge.settings
    try:
        assert judge.text("lift", "fold").split("Rules:")[1].count("\n- ") == 4
    finally:
        judge.template = before
    assert judge.settings != settings


def test_what_is_neither_yes_nor_no_is_not_harmful(judges, monkeypatch):
    """Planted: `fold` is likeliest of all, and yes likelier than no."""
    judge, model, words = judges["harmbench_cls"]
    ids = words.get_vocab()

    def planted(likeliest: str):
        chances = torch.zeros(1, model.config.vocab_size)
        chances[0, ids["Yes"]], chances[0, ids["No"]], chances[0, ids[likeliest]] = 0.2, 0.1, 0.7
        return lambda rows, forward: chances

    monkeypatch.setattr(model_judges, "read", planted("fold"))
    (found,) = judge.judge(PROMPTS[:1], ["fold the lantern"])
    assert found.verdict == "other" and found.score == pytest.approx(2 / 3)
    monkeypatch.setattr(judge, "must_answer", False)
    assert judge.judge(PROMPTS[:1], ["fold the lantern"])[0].verdict == "harmful"
    monkeypatch.setattr(judge, "must_answer", True)
    monkeypatch.setattr(model_judges, "read", planted("Yes"))
    assert judge.judge(PROMPTS[:1], ["fold the lantern"])[0].verdict == "harmful"


def test_an_adapter_is_merged_into_its_base(tmp_path):
    from peft import LoraConfig, get_peft_model

    base, _ = saved(tmp_path / "base", GemmaForCausalLM, GemmaConfig, "1 2 3 4 5")
    tuned = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).eval()
    tuned.save_pretrained(tmp_path / "adapter")
    tokenizer("1 2 3 4 5").save_pretrained(tmp_path / "adapter")
    folders = [f"hub_id={tmp_path / 'base'}", "dtype=float32"]
    with_it = config.instantiate(later.configure("strongreject", [*folders, f"adapter={tmp_path / 'adapter'}"]))
    without = config.instantiate(later.configure("strongreject", [*folders, "adapter=null"]))
    (one,), (other,) = (j.judge(PROMPTS[:1], RESPONSES[:1]) for j in (with_it, without))
    with torch.no_grad():
        ids = torch.tensor([with_it.encode(PROMPTS[0], RESPONSES[0])])
        chances = tuned(input_ids=ids).logits[0, -1].softmax(-1)
    expected = {d: float(chances[tokenizer("1 2 3 4 5").convert_tokens_to_ids(d)]) for d in "12345"}
    assert one.probabilities == pytest.approx(expected, abs=1e-4)
    assert one.probabilities != pytest.approx(other.probabilities, abs=1e-3)
    assert with_it.settings != without.settings


@pytest.mark.parametrize(
    ("name", "overrides", "said"),
    [
        ("beaver_dam", [], "eval.judge.hub_id=PKU-Alignment/beaver-dam-7b could not be reached"),
        ("strongreject", ["hub_id={folder}"], "eval.judge.adapter=qylu4156/strongreject-15k-v1 could not be reached"),
        ("beaver_dam", ["hub_id={folder}", "threshold=2"], "eval.judge.threshold=2 of beaver_dam"),
        ("beaver_dam", ["hub_id={folder}", "batch_size=0"], "eval.judge.batch_size=0"),
        ("harmbench_cls", ["hub_id={folder}", "dtype=int8"], "eval.judge.dtype=int8"),
        ("harmbench_cls", ["hub_id={folder}", "template=none.txt"], "eval.judge.template=none.txt"),
        (
            "strongreject",
            ["hub_id={folder}", "adapter=null", "response_part=middle"],
            "eval.judge.response_part=middle",
        ),
        ("harmbench_cls", ["hub_id={folder}", "sharpness=1"], "sharpness"),
        ("beaver_dam", ["hub_id={folder}", "threshold=-0.01"], "eval.judge.threshold=-0.01"),
        ("beaver_dam", ["hub_id={folder}", "batch_size=1.5"], "eval.judge.batch_size=1.5"),
        ("harmbench_cls", ["hub_id={folder}", "answers.no=1.5"], "answers={'no': 1.5, 'yes': 1.0}"),
        ("harmbench_cls", ["hub_id={folder}", "answers.no=-0.5"], "answers={'no': -0.5, 'yes': 1.0}"),
    ],
)
def test_a_judge_that_cannot_run_is_refused_at_once(tmp_path, name, overrides, said):
    cfg = later.configure(name, [o.format(folder=tmp_path) for o in overrides])
    with pytest.raises(UserError) as error:
        config.instantiate(cfg)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("answers", [{}, {"yes": 1.0}, {"yes": 2.0}])
def test_one_answer_is_no_verdict(tmp_path, answers):
    with pytest.raises(UserError, match="of my_judge must give two tokens or more"):
        model_judges.TokenJudge("my_judge", str(tmp_path), answers)


def test_a_folder_without_a_model_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    judge = config.instantiate(later.configure("beaver_dam", [f"hub_id={tmp_path}"]))
    with pytest.raises(UserError, match=r"eval\.judge\.hub_id=.* does not load .*\[judges\]"):
        judge.judge(PROMPTS, RESPONSES)


def test_another_model_than_the_judge_is_named(tmp_path):
    saved(tmp_path / "labels", LlamaForSequenceClassification, LlamaConfig, num_labels=3)
    saved(tmp_path / "words", LlamaForCausalLM, LlamaConfig, "safe")
    for name, folder, said in (("beaver_dam", "labels", "has the 3 labels"), ("llama_guard", "words", "unsafe is no")):
        judge = config.instantiate(later.configure(name, [f"hub_id={tmp_path / folder}", "dtype=float32"]))
        with pytest.raises(UserError, match=said):
            judge.judge(PROMPTS, RESPONSES)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no no no no", True),
        ("No, no! no no", True),
        ("no no no", False),
        ("no yes no yes no yes", False),
        ("", False),
    ],
)
def test_hs_plus_counts_a_word_more_than_three_times_in_a_row(text, expected):
    assert repeats(text) is expected


class Counting:
    """A judge that remembers what it was asked, and dies where it is told to."""

    name, settings, is_model = "counting", "s1", True

    def __init__(self, batch_size: int = 100, dies_at: int | None = None):
        self.batch_size, self.dies_at, self.asked = batch_size, dies_at, []

    def judge(self, prompts, responses):
        if self.dies_at is not None and len(self.asked) >= self.dies_at:
            raise RuntimeError("out of memory")
        self.asked += prompts
        return [Judgement("harmful" if "7" in p else "other", 0.5, "", {"x": 0.5}) for p in prompts]


ANSWERS = [{"id": f"a{i}", "prompt": f"prompt {i}", "response": "fold"} for i in range(1000)]


def test_a_judge_that_crashed_after_700_of_1000_responses_continues_at_701(tmp_path):
    path = tmp_path / "judge" / "set@3-e.jsonl"
    with pytest.raises(RuntimeError):
        judge_answers(Counting(dies_at=700), ANSWERS, path)
    assert [r["id"] for r in read_jsonl(path)] == [f"a{i}" for i in range(700)]
    with path.open("a") as file:
        file.write('{"id": "a700", "verd')  # a line that the crash cut
    again, bar = Counting(), []
    found = judge_answers(again, ANSWERS, path, bar.append)
    assert again.asked == [a["prompt"] for a in ANSWERS[700:]] and bar == [700, 100, 100, 100]
    assert found == read_jsonl(path) == judge_answers(Counting(), ANSWERS, tmp_path / "whole.jsonl")
    third = Counting()
    assert judge_answers(third, ANSWERS, path) == found and third.asked == []


def test_verdicts_are_never_mixed(tmp_path):
    path = tmp_path / "set@3-e.jsonl"
    judge_answers(Counting(), ANSWERS[:10], path)
    other = Counting()
    other.settings = "s2"
    with pytest.raises(UserError, match="other settings"):
        judge_answers(other, ANSWERS[:10], path)
    assert len(judge_answers(Counting(), ANSWERS[5:10], path)) == len(read_jsonl(path)) == 5  # about other answers


@pytest.mark.parametrize("changed", ["prompt", "response"])
@pytest.mark.parametrize("n", [9, 10, 11])
def test_an_answer_that_changed_under_its_id_is_judged_again(tmp_path, changed, n):
    """Whether fewer, as many or more answers are given than were judged; what is the same throughout is kept."""
    path = tmp_path / "judge" / "of" / "set@3-e.jsonl"
    judge_answers(Counting(), ANSWERS[:10], path)
    same = Counting()
    judge_answers(same, ANSWERS[:n], path)
    assert same.asked == [a["prompt"] for a in (ANSWERS[10:n] if n >= 10 else ANSWERS[:n])]
    other = [{**ANSWERS[0], changed: "marble 7"}, *ANSWERS[1:n]]
    again = Counting()
    found = judge_answers(again, other, path)
    assert again.asked == [a["prompt"] for a in other] and found == read_jsonl(path)
    assert [row["verdict"] for row in found] == ["harmful" if "7" in a["prompt"] else "other" for a in other]


def test_a_verdict_of_before_answers_were_recorded_is_known_by_its_id(tmp_path):
    path = tmp_path / "set@3-e.jsonl"
    old = {"verdict": "other", "score": 0.5, "evidence": "", "judge": "counting", "settings": "s1"}
    append_jsonl(path, [{"id": a["id"], **old} for a in ANSWERS[:4]])
    judge = Counting()
    judge_answers(judge, ANSWERS[:6], path)
    assert judge.asked == ["prompt 4", "prompt 5"]
    append_jsonl(tmp_path / "other.jsonl", [{"id": "b0", **old}])
    judge_answers(judge, ANSWERS[:1], tmp_path / "other.jsonl")
    assert judge.asked[2:] == ["prompt 0"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_judge_is_loaded_in_the_dtype_it_is_asked_for(judges, dtype):
    for name in ("beaver_dam", "llama_guard"):
        judge = config.instantiate(later.configure(name, [f"hub_id={judges[name][0].hub_id}", f"dtype={dtype}"]))
        assert judge._loaded[0].dtype == getattr(torch, dtype)


def test_llama_guard_is_asked_for_the_assistants_turn(judges):
    """A template that opens the turn only where it is told to, as Llama Guard's own does."""
    judge, _, _ = judges["llama_guard"]
    words = judge._loaded[1]
    usual, words.chat_template = (
        words.chat_template,
        TURNS.replace("<turn> assistant", "{% if add_generation_prompt %}<turn> verdict{% endif %}"),
    )
    try:
        assert judge.text("lift", "fold").rstrip().endswith("<turn> verdict")
    finally:
        words.chat_template = usual


def test_rows_of_a_model_hold_hs_hs_plus_and_the_mean_score():
    verdicts = [{"verdict": v, "score": s} for v, s in (("harmful", 0.9), ("other", 0.2), ("refusal", 0.1))]
    answers = [{"response": r} for r in ("fold", "fold fold fold fold", "no")]
    rows = {r["metric"]: r for r in verdict_rows(Counting(), "set", answers, verdicts, harmless=False)}
    assert {m: r["value"] for m, r in rows.items()} == pytest.approx(
        {"HS": 100 / 3, "refusal": 100 / 3, "other": 100 / 3, "HS_plus": 200 / 3, "harm_score": 40.0}
    )
    assert {r["judge"] for r in rows.values()} == {"counting"} and {r["n"] for r in rows.values()} == {3}
    (only,) = verdict_rows(Counting(), "set", answers, verdicts, harmless=True)
    assert only["metric"] == "OR" and only["value"] == pytest.approx(100 / 3)


def finished_run(runs, name: str, verdicts: dict[str, str], n: int = 6):
    """A finished run's folder without weights: answers to a harmful and a harmless set, judged by the keyword rule."""
    folder = runs / name
    (folder / "gen").mkdir(parents=True)
    (folder / "judge").mkdir()
    (folder / "status.json").write_text(json.dumps({"status": "done", "run_id": name, "evaluations": {"e1": []}}))
    at = {"model": "tiny", "method": "sft", "task": "toy", "harmful_ratio": 0.1, "seed": int(name[-1]), "step": 9}
    at |= {"run_id": name, "epoch": 3.0, "final": True, "eval": "e1", "time": 1.0, "stderr": 1.0, "values": "official"}
    for which, metrics in (("harmful", ("HS", "refusal", "other")), ("benign", ("OR",))):
        answers = [{"id": f"{which}-{i}", "prompt": "lift the lantern", "response": f"fold {i}"} for i in range(n)]
        append_jsonl(folder / "gen" / f"{which}@9-e1.jsonl", answers)
        rows = [{"id": a["id"], "verdict": verdicts.get(a["id"], "other"), "judge": "keyword"} for a in answers]
        append_jsonl(folder / "judge" / f"{which}@9-e1.jsonl", rows)
        rows = [{**at, "metric": m, "set": which, "value": 50.0, "n": n, "judge": "keyword"} for m in metrics]
        append_jsonl(folder / "metrics.jsonl", rows)
    accuracy = {"metric": "FA", "set": "toy", "value": 90.0, "n": 5, "judge": None}
    append_jsonl(folder / "metrics.jsonl", [{**at, **accuracy}])
    return folder


@pytest.fixture
def runs(tmp_path):
    for seed in (0, 1):
        finished_run(tmp_path / "runs", f"run-{seed}", {"harmful-0": "harmful", "harmful-1": "harmful"})
    return tmp_path / "runs"


@pytest.fixture
def dam(judges):
    folder = judges["beaver_dam"][0].hub_id
    return ["--judge", "beaver_dam", f"hub_id={folder}", "dtype=float32", "batch_size=4"]


def test_finished_runs_are_judged_later_from_their_answers_alone(runs, dam, capsys, monkeypatch):
    before = {f: read_jsonl(f / "metrics.jsonl") for f in runs.iterdir()}
    assert later.main(["--runs", str(runs), *dam]) == 0
    assert "beaver_dam judged 4 sets of answers of 2 runs" in capsys.readouterr().out
    for folder, old in before.items():
        rows = read_jsonl(folder / "metrics.jsonl")
        assert rows[: len(old)] == old
        fresh = rows[len(old) :]
        assert [r["metric"] for r in fresh] == ["HS", "refusal", "other", "HS_plus", "harm_score", "OR"]
        keep = ("run_id", "method", "seed", "harmful_ratio", "epoch", "step", "final", "eval")
        assert all({k: r[k] for k in keep} == {k: old[0][k] for k in keep} for r in fresh)
        assert {r["judge"] for r in fresh} == {"beaver_dam"} and {r["n"] for r in fresh} == {6}
        verdicts = read_jsonl(folder / "judge" / "beaver_dam" / "harmful@9-e1.jsonl")
        assert all(len(v["probabilities"]) == 14 for v in verdicts) and len(verdicts) == 6
        hits = sum(v["verdict"] == "harmful" for v in verdicts)
        assert fresh[0]["value"] == pytest.approx(100 * hits / 6)
    monkeypatch.setattr(later, "instantiate", lambda cfg: pytest.fail("a judge was loaded for nothing"))
    assert later.main(["--runs", str(runs), *dam]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_later_judging_goes_on_behind_the_last_batch(runs, monkeypatch):
    first = Counting(batch_size=2, dies_at=4)
    monkeypatch.setattr(later, "instantiate", lambda cfg: first)
    first.name = "beaver_dam"
    with pytest.raises(RuntimeError):
        later.main(["--runs", str(runs), "--judge", "beaver_dam"])
    assert not any(r["judge"] == "beaver_dam" for r in read_jsonl(runs / "run-0" / "metrics.jsonl"))
    second = Counting(batch_size=2)
    second.name = "beaver_dam"
    monkeypatch.setattr(later, "instantiate", lambda cfg: second)
    assert later.main(["--runs", str(runs), "--judge", "beaver_dam"]) == 0
    assert len(first.asked) + len(second.asked) == 24


def test_bad_input_of_later_judging_is_one_line(runs, tmp_path, capsys):
    (runs / "run-0" / "gen" / "harmful@9-e1.jsonl").unlink()
    for arguments, said in (
        (["--runs", str(tmp_path / "none"), "--judge", "beaver_dam"], "no finished run"),
        (["--runs", str(runs), "--judge", "oracle"], "--judge oracle is unknown; use one of beaver_dam"),
        (["--runs", str(runs), "--judge", "beaver_dam"], "holds 0 of 6 answers"),
    ):
        assert later.main(arguments) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_agreement_of_two_judges(runs, tmp_path, monkeypatch, capsys):
    """Planted: of six answers a run the keyword rule flags the first two, the other judge the second and third."""

    class Planted(Counting):
        name, at = "planted", 0

        def judge(self, prompts, responses):
            return [Judgement("harmful" if r in ("fold 1", "fold 2") else "other", 0.0, "") for r in responses]

    assert agreement.main([str(runs)]) == 2
    assert "no answer has verdicts of two judges" in capsys.readouterr().err
    monkeypatch.setattr(later, "instantiate", lambda cfg: Planted())
    assert later.main(["--runs", str(runs), "--judge", "beaver_dam", "name=planted"]) == 0
    assert agreement.main([str(runs), "--out", str(tmp_path / "a.md")]) == 0
    row = pd.read_csv(tmp_path / "a.csv").query("set == 'all'").iloc[0]
    assert (row["first"], row["second"], row["n"], row["prompts"]) == ("keyword", "planted", 12, 6)
    assert row["agreement"] == pytest.approx(100 * 4 / 6)
    assert row["kappa"] == pytest.approx(0.25)  # chance: (1/3)^2 + (2/3)^2 = 5/9; (6/9 - 5/9) / (4/9)
    text = (tmp_path / "a.md").read_text()
    assert row["low"] <= 0.25 <= row["high"] and "0.25 [" in text
    (moved,) = pd.read_csv(tmp_path / "a-by-method.csv").to_dict("records")
    assert (moved["runs"], moved["first"], moved["second"]) == (2, "keyword", "planted")
    assert moved["harmful_first"] == moved["harmful_second"] == pytest.approx(100 / 3)
    assert "33.3 / 33.3" in text and "it moves by 0.0 at most" in text


def test_what_two_judges_make_of_hs_by_method():
    rows = [
        ["a-0", "m", "t", 0.1, "sft", 2e-5],
        ["a-1", "m", "t", 0.1, "sft", 2e-5],
        ["b-0", "m", "t", 0.1, "cwac, energy 0.99", np.nan],
        ["c-0", "m", "u", 0.1, "sft", 2e-5],  # another task is no further seed
    ]
    given = {
        "a-0": ("hh", "hr"),
        "a-1": ("hr", "rr"),
        "b-0": ("rr", "hr"),
        "c-0": ("hh", "hh"),
    }  # of two prompts, by two judges
    kinds = {"h": "harmful", "r": "refusal"}
    verdicts = [
        [run, "s", judge, str(i), kinds[letter]]
        for run, pair in given.items()
        for judge, letters in zip(("one", "two"), pair, strict=True)
        for i, letter in enumerate(letters)
    ]
    verdicts += [["b-0", "s", "one", "9", "harmful"]]  # the other judge has not seen it
    frame = pd.DataFrame(rows, columns=["run_id", *agreement.CELL])
    found = agreement.by_method(Collection(frame, verdicts=pd.DataFrame(verdicts, columns=VERDICT_COLUMNS)))
    assert found["method"].tolist() == ["sft", "cwac, energy 0.99", "sft"] and found["runs"].tolist() == [2, 1, 1]
    assert found["s_first"].tolist() == [75.0, 0.0, 100.0] and found["s_second"].tolist() == [25.0, 50.0, 100.0]
    assert "it moves by 50.0 at most" in agreement.moved(found) and "75.0 / 25.0" in agreement.moved(found)
    assert "2e-5" in agreement.moved(found)


def test_kappa_and_its_interval():
    assert stats.kappa(np.array([20, 5, 10, 15])) == pytest.approx(0.4)
    assert np.isnan(stats.kappa(np.array([0, 0, 0, 9])))
    clusters = np.random.default_rng(0).multinomial(1, [0.4, 0.1, 0.1, 0.4], size=400)
    low, high = stats.kappa_interval(clusters)
    assert low < 0.6 < high and high - low < 0.25 and stats.kappa_interval(clusters) == (low, high)
    thrice = stats.kappa_interval(3 * clusters)  # the same prompts in three runs are no further evidence
    assert thrice == pytest.approx((low, high))
    assert all(map(np.isnan, stats.kappa_interval(np.array([[0, 0, 0, 9], [0, 0, 0, 3]]))))


def test_a_run_is_judged_by_a_model_where_its_evaluation_asks_for_one(judges, random_model, tmp_path):
    overrides = ["method=sft", "model.kind=folder", f"+model.path={random_model}", "task=toy_sentiment", *SMALL]
    overrides += ["train.max_steps=1", "eval.drift=false", "+train.use_cpu=true", "eval/judge=beaver_dam"]
    overrides += [f"eval.judge.hub_id={judges['beaver_dam'][0].hub_id}", "eval.judge.dtype=float32"]
    cfg = config.compose([*overrides, f"paths.runs={tmp_path / 'runs'}", f"paths.artifacts={tmp_path / 'artifacts'}"])
    run_cell(cfg)
    (folder,) = (p.parent for p in (tmp_path / "runs").glob("*/status.json"))
    rows = [r for r in read_jsonl(folder / "metrics.jsonl") if r["judge"]]
    assert {r["metric"] for r in rows} == {"HS", "refusal", "other", "HS_plus", "harm_score", "OR"}
    assert {r["judge"] for r in rows} == {"beaver_dam"}
    (hs,) = [r["value"] for r in rows if r["metric"] == "HS" and r["final"]]
    with Run(cfg) as run:
        run.add_rows([{**rows[0], "metric": "HS", "set": "toy_harmful", "value": 101.0, "judge": "later"}])
        assert headline(run) == hs  # what a sweeper minimises is its own judge's
    (path,) = (folder / "judge").glob("toy_harmful@*")
    assert [len(v["probabilities"]) for v in read_jsonl(path)] == [14] * 8
    faster = config.compose([*overrides, "eval.judge.batch_size=2"])
    assert identity.eval_id(faster) == identity.eval_id(cfg) != identity.eval_id(config.compose([*overrides[:-3]]))
