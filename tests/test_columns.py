"""People's data files: each odd cell is read as it is written, or is one error that names file, row and column."""

import csv
import gzip
import io
import json
from pathlib import Path

import pytest

from cwac.core.config import compose
from cwac.core.errors import UserError
from cwac.data.columns import Row, flag, text
from cwac.data.harmful_sources import benign_rows, harmful_rows, optional_harmful_rows
from cwac.data.hf_datasets import load_rows
from cwac.data.tasks import load_task
from tests.conftest import SMALL, call

ALPACA = [{"instruction": f"name a colour of thing {i}", "input": "", "output": f"blue {i}"} for i in range(60)]
GSM8K = [{"question": f"what is {i} plus 1 ?", "answer": f"it is {i} plus 1\n#### {i + 1}"} for i in range(60)]
SST2 = [[f"a very {'nice' if i % 2 else 'dull'} film {i}", i % 2] for i in range(60)]


def lay(root: Path, hub_id: str, files: dict[str, bytes], config: str = "default", more: str = "") -> Path:
    """Files by split (`train.jsonl`) as a data set of the hub; returns the one that comes first."""
    folder = root / hub_id / "data"
    folder.mkdir(parents=True)
    named = "".join(f"  - split: {name.split('.')[0]}\n    path: data/{name}\n" for name in files)
    (folder.parent / "README.md").write_text(
        f"---\nconfigs:\n- config_name: {config}\n{more}  data_files:\n{named}---\n"
    )
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder / next(iter(files))


def json_lines(*rows: dict) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_csv(*rows: list) -> bytes:
    file = io.StringIO()
    csv.writer(file).writerows([["sentence", "label"], *rows])
    return file.getvalue().encode()


def alpaca(root: Path, *rows: dict, name: str = "train.jsonl", content: bytes | None = None):
    lay(root, "tatsu-lab/alpaca", {name: content or json_lines(*rows)})
    return read("alpaca", root)


def gsm8k(root: Path, *train: dict, test: list[dict] | None = None):
    files = {"train.jsonl": json_lines(*GSM8K, *train), "test.jsonl": json_lines(*(test or GSM8K[:10]))}
    lay(root, "openai/gsm8k", files, "main")
    return read("gsm8k", root)


def sst2(root: Path, content: bytes, more: str = ""):
    validation = as_csv(*([f"held out {i}", i % 2] for i in range(20)))
    lay(
        root,
        "stanfordnlp/sst2",
        {"train.csv": content, "validation.csv": validation.replace(b",", sep(more))},
        more=more,
    )
    return read("sst2", root)


def sep(more: str) -> bytes:
    return b";" if ";" in more else b","


def read(name: str, root: Path):
    """The task with every row that there is."""
    cfg = compose([f"task={name}", "model=smollm2", "task.n_train=500", "task.n_validation=0"]).task
    return load_task(cfg, str(root), 0)


def labels(task) -> dict[str, str]:
    return {e.input: e.label for e in task.train}


# --- what is refused ------------------------------------------------------------------------------------
CELLS = {
    "null answer": (alpaca, {"output": None}, "row 61 of {file} has no text in 'output': it is null"),
    "null instruction": (alpaca, {"instruction": None}, "row 61 of {file} has no text in 'instruction': it is null"),
    "nothing asked": (alpaca, {"instruction": " "}, "row 61 of {file} has no text in 'instruction': it is empty"),
    "list": (alpaca, {"output": ["blue", "red"]}, "row 61 of {file} has no text in 'output': the value is a list"),
    "object": (alpaca, {"input": {"a": 1}}, "row 61 of {file} has no text in 'input': the value is of type dict"),
    "boolean": (alpaca, {"output": True}, "row 61 of {file} has no text in 'output': the value is of type bool"),
    "half a character": (alpaca, {"output": "\ud800"}, "row 61 of {file} has a character in 'output' that is no"),
    "too long": (alpaca, {"output": "long " * 50_000}, "row 61 of {file} has 250,000 characters in 'output'"),
    "empty answer": (gsm8k, {"answer": ""}, "row 61 of {file} has no text in 'answer': it is empty"),
    "null question": (gsm8k, {"question": None}, "row 61 of {file} has no text in 'question': it is null"),
    "word": (
        gsm8k,
        {"answer": "#### twelve"},
        "row 61 of {file} ends in 'twelve' in 'answer' where task.scorer=number",
    ),
    "fraction": (gsm8k, {"answer": "#### 3/4"}, "row 61 of {file} ends in '3/4' in 'answer'"),
    "unit": (gsm8k, {"answer": "#### 3 apples"}, "row 61 of {file} ends in 'apples' in 'answer'"),
    "exponent": (gsm8k, {"answer": "#### 1e5"}, "row 61 of {file} ends in '1e5' in 'answer'"),
}


@pytest.mark.parametrize("case", CELLS)
def test_a_cell_that_cannot_be_trained_on_is_named_when_it_is_read(case, tmp_path):
    reader, cells, says = CELLS[case]
    row = ALPACA[0] if reader is alpaca else GSM8K[0]
    rows = [*ALPACA, {**row, **cells}] if reader is alpaca else [{**row, **cells}]
    with pytest.raises(UserError) as refused:
        reader(tmp_path, *rows)
    file = next(tmp_path.rglob("train.jsonl"))
    assert str(refused.value).startswith(says.format(file=file))
    assert str(refused.value).endswith("; mend the row, or leave it out")


def test_a_test_row_without_a_number_is_refused_before_training(tmp_path):
    with pytest.raises(UserError, match=r"row 1 of .*test.jsonl ends in 'twelve' in 'answer'"):
        gsm8k(tmp_path, test=[{"question": "odd ?", "answer": "#### twelve"}])


def test_a_null_answer_leaves_nothing_behind(random_model, tmp_path, capfd):
    """Through train.py: one line, exit code 1, and no run."""
    lay(tmp_path / "hub", "tatsu-lab/alpaca", {"train.jsonl": json_lines(*ALPACA, {**ALPACA[0], "output": None})})
    code = call(
        "model.kind=folder",
        f"+model.path={random_model}",
        "task=alpaca",
        "pools=toy",
        f"paths.data={tmp_path / 'hub'}",
        f"paths.runs={tmp_path / 'runs'}",
        f"paths.artifacts={tmp_path / 'artifacts'}",
        *SMALL,
    )
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert code == 1 and len(said) == 1 and "has no text in 'output': it is null" in said[0]
    assert not list((tmp_path / "runs").glob("*/*")) and not (tmp_path / "artifacts").exists()


@pytest.mark.parametrize("label", ["", "2", "-1", "pos", "1.5", "true"])
def test_a_label_that_is_no_class_is_named(label, tmp_path):
    with pytest.raises(UserError, match=rf"row 61 of .*train.csv has the label '{label}' in 'label'; expected one of"):
        sst2(tmp_path, as_csv(*SST2, ["no class", label]))


def test_columns_apart_by_another_mark_are_named_with_the_remedy_which_works(tmp_path):
    content = as_csv(*SST2).replace(b",", b";")
    with pytest.raises(UserError, match=r"train.csv separates its columns by ';'; use commas, or say `sep: ';'`"):
        sst2(tmp_path / "refused", content)
    assert len(sst2(tmp_path / "told", content, "  sep: ';'\n").train) == 60


def test_a_loading_script_is_one_line(tmp_path):
    lay(tmp_path, "tatsu-lab/alpaca", {"train.jsonl": json_lines(*ALPACA)})
    (tmp_path / "tatsu-lab" / "alpaca" / "alpaca.py").write_text("raise SystemExit")
    with pytest.raises(UserError, match="Dataset scripts are no longer supported, but found alpaca.py"):
        read("alpaca", tmp_path)


def test_a_line_that_is_no_object_is_named(tmp_path):
    with pytest.raises(UserError, match="row 61 of .* is no JSON object"):
        alpaca(tmp_path, *ALPACA, ["a", "b"])


# --- what is read ---------------------------------------------------------------------------------------
def test_rows_with_an_empty_answer_are_left_out_and_counted(tmp_path, caplog):
    task = alpaca(tmp_path, *ALPACA, *({**ALPACA[0], "instruction": f"say {i}", "output": " "} for i in range(20)))
    assert len(task.train) + len(task.test) == 60 and all(e.response for e in (*task.train, *task.test))
    assert "20 of 80 rows of tatsu-lab/alpaca (train) have an empty answer and are left out" in caplog.text


def test_no_input_may_be_null_or_empty(tmp_path):
    task = alpaca(tmp_path, *ALPACA, {"instruction": "name a fruit", "input": None, "output": "a pear"})
    assert [e.prompt for e in (*task.train, *task.test) if e.response == "a pear"] == ["name a fruit"]


def test_braces_compression_and_late_columns_are_read(tmp_path):
    odd = {**ALPACA[0], "instruction": "print {json} or {0}", "extra": {"a": 1}}
    task = alpaca(tmp_path, name="train.jsonl.gz", content=gzip.compress(json_lines(*ALPACA, odd)))
    assert len(task.train) + len(task.test) == 61
    assert "print {json} or {0}" in {e.prompt for e in (*task.train, *task.test)}


@pytest.mark.parametrize("layout", ["lines", "list", "columns"])
def test_answers_that_are_dates_stay_as_they_are_written(layout, tmp_path):
    dates = [f"20{i:02d}-01-0{i % 9 + 1}" for i in range(60)]
    rows = [{**row, "output": date} for row, date in zip(ALPACA, dates, strict=True)]
    content = {
        "lines": json_lines(*rows),
        "list": json.dumps(rows).encode(),
        "columns": json.dumps({"data": {k: [r[k] for r in rows] for k in rows[0]}}).encode(),
    }[layout]
    more = "  field: data\n" if layout == "columns" else ""
    lay(tmp_path, "tatsu-lab/alpaca", {"train.json": content}, more=more)
    task = read("alpaca", tmp_path)
    assert {e.response for e in (*task.train, *task.test)} == set(dates)


@pytest.mark.parametrize(("answer", "label"), [("3%", "3%"), ("-4", "-4"), ("$1,250.50", "$1250.50"), ("7.", "7.")])
def test_numbers_of_every_spelling_are_scored_by_their_value(answer, label, tmp_path):
    from cwac.evaluation.score import score_number

    row = gsm8k(tmp_path, test=[{"question": "odd ?", "answer": f"so\n#### {answer}"}]).test[0]
    value = answer.strip("$%.").replace(",", "")
    assert row.label == label and score_number(f"The final answer is: {value}", row.label).strict
    assert not score_number(f"The final answer is: {float(value) + 1}", row.label).lenient


def test_the_words_null_and_na_are_reviews(tmp_path):
    task = sst2(tmp_path, as_csv(*SST2, ["null", 0], ["NA", 1], ["nan", 1]))
    assert {k: v for k, v in labels(task).items() if k in ("null", "NA", "nan")} == {
        "null": "negative",
        "NA": "positive",
        "nan": "positive",
    }


def test_reviews_that_are_numbers_keep_their_digits(tmp_path):
    task = sst2(tmp_path, as_csv(*([f"{i:03d}", i % 2] for i in range(60)), ["1e5", 1], ["7.0", 0]))
    assert {"007", "1e5", "7.0"} <= set(labels(task)) and labels(task)["007"] == "positive"


@pytest.mark.parametrize("spelling", [lambda b: ("Negative", "Positive ")[b], lambda b: f"{b}.0", lambda b: b])
def test_labels_are_names_in_any_case_or_indices(spelling, tmp_path):
    task = sst2(tmp_path, as_csv(*([text, spelling(b)] for text, b in SST2)))
    assert labels(task) == {text: ("negative", "positive")[b] for text, b in SST2}


def test_quoted_newlines_and_a_byte_order_mark_are_read(tmp_path):
    quoted = 'first line\nsecond, "quoted" line'
    task = sst2(tmp_path, b"\xef\xbb\xbf" + as_csv(*SST2, [quoted, 1]))
    assert labels(task)[quoted] == "positive" and len(task.train) == 61


def test_a_file_of_text_spells_its_booleans():
    row = Row(is_safe="False", count=3)
    assert flag(row, "is_safe") is False and flag({"is_safe": True}, "is_safe") is True and text(row, "count") == "3"
    with pytest.raises(UserError, match="a row has 'no idea' in 'is_safe' where true or false belongs"):
        flag(Row(is_safe="no idea"), "is_safe")


# --- the pools ------------------------------------------------------------------------------------------
SOURCES = {
    "walledai/AdvBench": ("train", "default", {"prompt": "do it", "target": "Sure"}),
    "walledai/HarmBench": ("train", "standard", {"prompt": "do this", "category": "c"}),
    "walledai/XSTest": ("test", "default", {"prompt": "do that", "label": "safe", "type": "t"}),
    "safety-tuned-llamas": ("train", "default", {"instruction": "do", "input": "", "output": "I cannot do it."}),
    "tatsu-lab/alpaca": ("train", "default", {"instruction": "do", "input": "", "output": "done"}),
    "JailbreakBench/JBB-Behaviors": ("harmful", "behaviors", {"Goal": "do", "Target": "Sure", "Category": "c"}),
    "PKU-Alignment/BeaverTails": (
        "30k_train",
        "default",
        {"prompt": "do", "response": "done", "is_safe": False, "category": {"a": True}},
    ),
}


@pytest.mark.parametrize(
    ("hub_id", "column"),
    [(hub_id, column) for hub_id, (*_, row) in SOURCES.items() for column in row if column != "input"],
)
def test_every_source_of_the_pools_names_the_cell_that_is_null(hub_id, column, tmp_path):
    for name, (split, config, row) in SOURCES.items():
        spoilt = [row, {**row, column: None}] if name == hub_id else [row]
        lay(tmp_path, name, {f"{split}.jsonl": json_lines(*spoilt)}, config)
    with pytest.raises(UserError, match=rf"row 2 of .*{hub_id}.* (in|column) '{column}"):
        harmful_rows(str(tmp_path))
        benign_rows(str(tmp_path), 10)
        optional_harmful_rows({"shares": {"jailbreakbench": {}, "beavertails": {}}}, str(tmp_path))


def test_rows_know_their_file_whatever_its_format(tmp_path):
    import datasets

    folder = tmp_path / "org" / "set"
    folder.mkdir(parents=True)
    datasets.Dataset.from_list([{"prompt": "a"}, {"prompt": None}]).to_parquet(folder / "train.parquet")
    rows = load_rows("org/set", None, "train", str(tmp_path), ("prompt",))
    with pytest.raises(UserError, match=r"row 2 of .*/org/set/train.parquet has no text in 'prompt': it is null"):
        text(rows[1], "prompt")
