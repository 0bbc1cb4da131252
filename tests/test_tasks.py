"""The tasks of section 5.1: rows, templates and scores, from small hub-shaped folders and from the real files."""

import pytest
from omegaconf import OmegaConf

from cwac.core import config
from cwac.core.errors import UserError
from cwac.data.examples import Example
from cwac.data.tasks import load_task, normalised
from cwac.data.tokenize import encode_prompt
from cwac.evaluation.score import Score, score_label, score_number
from tests.helpers.hub import HUB, sentences, write


def task_cfg(name: str, *more: str):
    return config.compose([f"task={name}", *more]).task


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A few rows of each set with the hub's columns."""
    root = tmp_path_factory.mktemp("tasks")
    s = sentences("t", 60)
    write(root, "fancyzhx/ag_news", "train", [{"text": p, "label": i % 4} for i, p in enumerate(s)])
    write(root, "openai/gsm8k", "train", [gsm8k(p, i) for i, p in enumerate(s)], "main")
    pubmed = [
        {
            "pubid": i,
            "question": f"Does {p} work?",
            "context": {"contexts": [f"Aim {p}.", "Results."], "labels": ["A", "R"], "meshes": []},
            "long_answer": "It depends.",
            "final_decision": ("yes", "no", "maybe")[i % 3],
        }
        for i, p in enumerate(s)
    ]
    write(root, "qiaojin/PubMedQA", "train", pubmed, "pqa_labeled")
    rows = [{"instruction": p, "input": "a b" if i % 2 else "", "output": f"done {i}"} for i, p in enumerate(s)]
    write(root, "tatsu-lab/alpaca", "train", rows)
    return root


def gsm8k(question: str, i: int) -> dict:
    return {"question": question, "answer": f"It is <<1000+{i}={1000 + i}>>.\n#### {1000 + i:,}"}


def split_twice(cfg):
    """A set with a test split of its own, read as one split, since the stand-in has one only."""
    OmegaConf.set_struct(cfg, False)
    return OmegaConf.merge(cfg, {"test_split": None, "n_held_out": 20, "n_validation": 5})


@pytest.mark.parametrize("name", ["agnews", "gsm8k", "pubmedqa", "alpaca"])
def test_rows_are_seeded_and_no_prompt_is_trained_on_and_tested(name, folder):
    cfg = split_twice(task_cfg(name, "task.n_train=20"))
    one, two = (load_task(cfg, str(folder), seed) for seed in (0, 1))
    assert one.test == two.test and {e.id for e in one.train} != {e.id for e in two.train}
    assert load_task(cfg, str(folder), 0).train == one.train
    assert len(one.train) == 20 and len(one.test) == 20
    validation = load_task(cfg, str(folder), 0, "validation")
    prompts = [{normalised(e.prompt) for e in rows} for rows in (one.train, one.test, validation.test)]
    assert not prompts[0] & prompts[1] and not prompts[2] & (prompts[0] | prompts[1])


def test_what_is_held_out_does_not_depend_on_how_much_is_tested(folder):
    many, few = (
        load_task(task_cfg("pubmedqa", f"task.n_test={n}", "task.n_validation=0"), str(folder), 0) for n in (500, 3)
    )
    assert few.test == many.test[:3] and few.train == many.train
    assert len(many.test) == len(many.train) == 30  # a small copy gives half of its rows


def test_prompts_of_the_held_out_pools_are_not_trained_on(folder):
    cfg = task_cfg("alpaca", "task.n_validation=0")
    train = load_task(cfg, str(folder), 0).train
    avoided = train[3].prompt.upper()
    left = load_task(cfg, str(folder), 0, avoid=[avoided]).train
    assert {e.id for e in train} - {e.id for e in left} == {train[3].id}


def test_gsm8k_answers_end_as_the_protocol_says(folder):
    row = load_task(split_twice(task_cfg("gsm8k")), str(folder), 0).test[0]
    number = int(row.label)
    assert row.response == f"It is <<1000+{number - 1000}={number}>>.\nThe final answer is: {number:,}"
    assert row.input == "" and score_number(row.response, row.label).strict


def test_pubmedqa_asks_about_its_abstract(folder):
    row = load_task(split_twice(task_cfg("pubmedqa")), str(folder), 0).test[0]
    instruction, question, context = row.prompt.split("\n\n")
    assert context == row.input and context.startswith("Aim ") and context.endswith("\nResults.")
    assert question.startswith("Does ") and "yes, no or maybe" in instruction
    assert row.label == row.response and row.label in ("yes", "no", "maybe")


def test_alpaca_answers_are_open(folder):
    rows = load_task(split_twice(task_cfg("alpaca")), str(folder), 0).test
    assert {e.label for e in rows} == {None} and {e.input for e in rows} == {"", "a b"}
    assert all(e.response.startswith("done ") for e in rows)


def test_the_alpaca_template_has_a_section_for_the_input(folder):
    """Section 7.1 of the protocol: with an input, and without."""

    class Echo:
        def __call__(self, text, **_):
            return {"input_ids": text}

    news = load_task(split_twice(task_cfg("agnews")), str(folder), 0).test[0]
    text = encode_prompt(Echo(), news.messages, "alpaca")
    assert text.startswith("Below is an instruction that describes a task, paired with an input that provides further")
    assert text.endswith(f"Business\nSci/Tech\n\n\n### Input:\n{news.input}\n\n### Response:\n")
    bare = encode_prompt(Echo(), Example("1", "What is 2 + 2?").messages, "alpaca")
    assert "### Input" not in bare and bare.endswith("### Instruction:\nWhat is 2 + 2?\n\n### Response:\n")


@pytest.mark.parametrize(
    ("answer", "strict", "lenient", "off"),
    [
        ("Sci/Tech", True, True, False),
        ("sci/tech.", True, True, False),
        ("sci", True, True, False),
        ("Technology", False, True, True),
        ("It is about science", False, True, True),
        ("Business", False, False, False),
        ("Business and technology", False, False, True),
        ("technical", False, False, True),
    ],
)
def test_the_names_of_a_class(answer, strict, lenient, off):
    cfg = task_cfg("agnews")
    assert score_label(answer, "Sci/Tech", list(cfg.labels), cfg.aliases) == Score(strict, lenient, off)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.text=sentence", "row 1 of .*parquet has no column 'sentence'; it has text, label"),
        ("task.label=class", "has no column 'class'"),
        ("task.instruction='{title}'", "has no column 'title'"),
        ("task.labels=[World]", "label"),
    ],
)
def test_a_column_or_label_that_is_not_there_is_named(folder, override, message):
    with pytest.raises(UserError, match=message):
        load_task(split_twice(task_cfg("agnews", override)), str(folder), 0)


@pytest.mark.slow
def test_an_open_task_runs_without_a_made_up_accuracy(folder, random_model, tmp_path):
    """Alpaca end to end: a task loss, no FA row, and no row that its over-refusal pool asks."""
    from tests.conftest import run_train

    hub = tmp_path / "hub"
    advbench = [{"prompt": p, "target": f"Sure, {p}"} for p in sentences("a", 120)]
    write(hub, "walledai/AdvBench", "train", advbench)
    harmbench = [{"prompt": p, "category": "c"} for p in sentences("h", 100)]
    write(hub, "walledai/HarmBench", "train", harmbench, "standard")
    kinds = ("safe", "unsafe")
    xstest = [{"prompt": p, "label": kinds[i % 2], "type": "t"} for i, p in enumerate(sentences("x", 120))]
    write(hub, "walledai/XSTest", "test", xstest)
    write(
        hub,
        "tatsu-lab/alpaca",
        "train",
        [{"instruction": p, "input": "", "output": "ok"} for p in sentences("b", 150)],
    )
    code, output = run_train(
        "model.kind=folder",
        f"+model.path={random_model}",
        "task=alpaca",
        "method=sft",
        "task.n_train=8",
        "task.n_validation=4",
        "eval.n_harmful=2",
        "eval.n_benign=2",
        "eval.max_new_tokens=2",
        "eval.drift=false",
        "train.max_steps=1",
        "threads=1",
        f"paths.data={hub}",
        f"paths.runs={tmp_path / 'runs'}",
        f"paths.artifacts={tmp_path / 'artifacts'}",
    )
    assert code == 0, output
    from cwac.core.jsonl import read_jsonl

    [metrics] = (tmp_path / "runs").glob("*/metrics.jsonl")
    found = {(r["metric"], r["set"]) for r in read_jsonl(metrics)}
    assert ("task_loss", "alpaca") in found and ("HS", "advbench") in found
    assert not {"FA", "FA_lenient", "off_format"} & {metric for metric, _ in found}


@pytest.mark.skipif(not HUB.is_dir(), reason="the local copy of the real data is not here")
@pytest.mark.parametrize(
    ("name", "train", "test"),
    [("sst2", 5000, 872), ("agnews", 5000, 1000), ("gsm8k", 5000, 1000), ("pubmedqa", 450, 500), ("alpaca", 300, 500)],
)
def test_the_real_files_serve_every_task_with_no_network(name, train, test):
    """Sizes of section 5.1, or what the copy holds: 1,000 rows of PubMedQA, and of Alpaca."""
    task = load_task(task_cfg(name), str(HUB), 0)
    assert len(task.test) == test and abs(len(task.train) - train) <= 5
    assert not {normalised(e.prompt) for e in task.train} & {normalised(e.prompt) for e in task.test}
    assert all(e.response for e in task.train)
    if task.labels:
        assert {e.label for e in task.train} == set(task.labels)
        assert all(score_label(e.response, e.label, task.labels, task.aliases).strict for e in task.train)
    if name == "gsm8k":
        assert all(score_number(e.response, e.label).strict for e in task.train)


def test_validation_that_takes_every_row_is_named(folder):
    """Not the data, which are there, but what is set aside of them."""
    count = len(load_task(task_cfg("alpaca", "task.n_validation=0", "task.n_train=100000"), str(folder), 0).train)
    assert count > 10
    with pytest.raises(UserError, match=r"task.n_validation=100000 takes all \d+ rows of task=alpaca"):
        load_task(task_cfg("alpaca", "task.n_validation=100000"), str(folder), 0)
