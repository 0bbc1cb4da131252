"""experiments/utility.py: the built-in set by hand, lm-eval's tasks where it is installed, and the table."""

import json
import math
import shutil
import sys

import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf

from analysis.tables import utility as utility_table
from cwac.core.config import compose
from cwac.core.errors import UserError
from cwac.core.jsonl import append_jsonl, read_jsonl
from experiments import utility
from tests.conftest import SMALL, make_llama

FINAL = {"run_id": "x", "model": "tiny", "task": "toy_sentiment", "method": "sft", "harmful_ratio": 0.0, "seed": 0}


def test_the_built_in_numbers_by_hand():
    """Of one row at a time, without padding: -log p of the answer's tokens, and sum p log(p / q) at the same."""
    trained, aligned = make_llama(seed=1).eval(), make_llama(seed=2).eval()
    rows = [{"input_ids": [0, 5, 9, 7, 11], "prompt": 3}, {"input_ids": [0, 8, 4], "prompt": 2}]
    nll, base, kl = [], [], []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            q, p = (m(input_ids=ids).logits[0].softmax(-1).double() for m in (trained, aligned))
        for at in range(row["prompt"], ids.shape[1]):
            token = ids[0, at]
            nll.append(-q[at - 1, token].log())
            base.append(-p[at - 1, token].log())
            kl.append((p[at - 1] * (p[at - 1] / q[at - 1]).log()).sum())
    found = utility.answers_kept(trained, aligned, rows)
    assert found["n"] == 3
    assert found["perplexity"] == pytest.approx(math.exp(sum(nll) / 3), rel=1e-5)
    assert found["perplexity aligned"] == pytest.approx(math.exp(sum(base) / 3), rel=1e-5)
    assert found["KL"] == pytest.approx(float(sum(kl)) / 3, rel=1e-4)
    assert utility.answers_kept(aligned, aligned, rows)["KL"] == 0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of the embedded model that ended with the aligned model's own weights."""
    from cwac.training.context import open_context

    folder = tmp_path_factory.mktemp("runs") / "x"
    folder.mkdir()
    sizes = "pools.sizes={anchors: 4, step: 4, sae: 8, benign: 6, safety: 4, validation: 4}"
    cfg = compose(["method=sft", *SMALL, sizes, f"paths.artifacts={folder.parent / 'artifacts'}"])
    OmegaConf.save(cfg, folder / "config.yaml")
    context = open_context(cfg)
    context.loaded.model.save_pretrained(folder / "model")
    context.tokenizer.save_pretrained(folder / "model")
    append_jsonl(
        folder / "metrics.jsonl", [{**FINAL, "metric": "FA", "set": "t", "final": True, "step": 3, "value": 1.0}]
    )
    return folder


def test_the_command_adds_rows_that_tables_show(run, capsys):
    assert utility.main(["--run", str(run)]) == 0
    rows = [row for row in read_jsonl(run / "metrics.jsonl") if row["metric"] == "utility"]
    value = {row["set"]: row["value"] for row in rows}
    assert value["KL"] == pytest.approx(0, abs=1e-6) and value["perplexity"] == pytest.approx(
        value["perplexity aligned"]
    )
    assert 1 <= value["perplexity"] < 3  # of a world whose sentences the embedded model knows
    assert all(row["final"] and row["step"] == 3 and row["n"] > 20 for row in rows)
    assert "KL " in capsys.readouterr().out


def test_a_run_measured_twice_counts_once():
    rows = [
        {**FINAL, "run_id": run, "method": method, "metric": "utility", "set": of, "value": value, "time": time}
        for run, method, of, value, time in (
            ("a", "sft", "KL", 9.0, 1.0),
            ("a", "sft", "KL", 1.0, 2.0),
            ("b", "sft", "KL", 2.0, 1.0),
            ("c", "lisa", "arc acc", 0.25, 1.0),
        )
    ]
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in utility_table(pd.DataFrame(rows)).splitlines()
    ]
    assert lines[0] == ["grid", "method", "p", "n", "KL", "arc acc"]
    assert lines[2:] == [
        ["tiny, toy_sentiment", "SFT", "0", "2", "1.5", "not measured"],
        ["tiny, toy_sentiment", "Lisa", "0", "1", "not measured", "0.25"],
    ]
    assert utility_table(pd.DataFrame([{**rows[0], "metric": "FA"}])) == ""


def test_lm_evals_own_format_on_local_data(run, tmp_path):
    """A multiple-choice task of one's own: accuracy, its standard error and n are lm-eval's."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install -e '.[utility]')")
    rows = [{"question": q, "answer": a} for q, a in (("the film was good", 1), ("the film was bad", 0)) * 3]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.json").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "local_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data" / "test.json")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_choice": ["negative", "positive"],
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local_choice.yaml").write_text(json.dumps(task))
    mine = tmp_path / "runs" / "x"
    shutil.copytree(run, mine)
    command = ["--run", str(mine), "--include", str(tmp_path / "tasks")]
    assert utility.main([*command, "--tasks", "local_choice"]) == 0
    (row,) = [r for r in read_jsonl(mine / "metrics.jsonl") if r["set"] == "local_choice acc"]
    assert row["n"] == 6 and row["value"] * 6 == pytest.approx(round(row["value"] * 6)) and 0 <= row["value"] <= 1
    assert row["stderr"] == pytest.approx((row["value"] * (1 - row["value"]) / 5) ** 0.5)
    assert utility.main([*command, "--tasks", "no_such_task"]) == 2


def test_what_cannot_be_measured_is_one_line(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert utility.main(["--run", str(run), "--tasks", "arc_easy"]) == 2
    assert "pip install -e '.[utility]'" in capsys.readouterr().err
    assert utility.main(["--run", str(tmp_path)]) == 2 and "holds no readable config.yaml" in capsys.readouterr().err
    with pytest.raises(UserError, match="no final evaluation"):
        (tmp_path / "r").mkdir()
        (tmp_path / "r" / "metrics.jsonl").write_text("")
        utility.record(tmp_path / "r", [])
