"""AlpacaEval: the outputs file of a run that kept its weights, what scoring lacks, a score by a planted annotator."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from analysis.collect import collect
from cwac.core import config
from cwac.core.jsonl import append_jsonl, read_jsonl
from cwac.methods.base import Method
from experiments import alpaca_eval as ae
from tests.conftest import ROOT

SET = [
    {"instruction": f"move the lantern {i}", "output": f"moved {i}", "generator": "reference", "dataset": "planted"}
    for i in range(4)
]


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "hub" / ae.HUB_ID
    folder.mkdir(parents=True)
    (folder / "alpaca_eval.json").write_text(json.dumps(SET))
    return tmp_path / "hub"


@pytest.fixture
def run(tmp_path, random_model):
    """A finished run's folder with weights, as train.py leaves it."""
    overrides = ["method=sft", "model.kind=folder", f"+model.path={random_model}", "task=toy_sentiment"]
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config.compose(overrides), resolve=True))
    shutil.copytree(random_model, folder / "model")
    (folder / "status.json").write_text(json.dumps({"status": "done", "run_id": "one", "evaluations": {"e1": []}}))
    row = {"run_id": "one", "model": "tiny", "method": "sft", "task": "alpaca", "harmful_ratio": 0.0, "seed": 0}
    row |= {
        "values": "official",
        "epoch": 3.0,
        "step": 9,
        "final": True,
        "eval": "e1",
        "judge": "keyword",
        "time": 1.0,
    }
    append_jsonl(folder / "metrics.jsonl", [{**row, "metric": "HS", "set": "h", "value": 5.0, "n": 9, "stderr": 1.0}])
    return folder


def arguments(run, data, *more):
    return ["--run", str(run), "--data", str(data), "--max-new-tokens", "3", *more]


def test_the_outputs_file_is_written_and_kept(run, data, capsys, monkeypatch):
    assert ae.main(arguments(run, data)) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == str(run / "alpaca_eval" / "outputs.json") and said[1].startswith("not scored: --score")
    written = json.loads((run / "alpaca_eval" / "outputs.json").read_text())
    assert [r["instruction"] for r in written] == [r["instruction"] for r in SET]
    assert all(set(r) == {"instruction", "output", "generator", "dataset"} for r in written)
    assert {r["generator"] for r in written} == {"one"} and {r["dataset"] for r in written} == {"planted"}
    assert not any(r["output"].startswith("moved") for r in written)  # the reference's answers are not ours
    monkeypatch.setattr(ae, "as_served", lambda cfg: pytest.fail("answered again"))
    assert ae.main(arguments(run, data)) == 0


def test_scoring_without_package_or_key_is_one_line_before_any_answer(run, data, tmp_path, capsys, monkeypatch):
    """Also a package that is installed and cannot be imported, as alpaca_eval 0.6.6 beside setuptools 81."""
    (tmp_path / "alpaca_eval").mkdir()
    (tmp_path / "alpaca_eval" / "__init__.py").write_text("import pkg_resources\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "pkg_resources", None)
    for key in ae.KEYS:
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr(ae, "answer", lambda *_: pytest.fail("answered before it was known that it can be scored"))
    assert ae.main(arguments(run, data, "--score", "--limit", "2")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --score needs the package (pip install -e '.[alpaca]'; ModuleNotFoundError: ")
    assert "OPENAI_API_KEY" in error and error.count("\n") == 1
    assert "setuptools<81" in (ROOT / "pyproject.toml").read_text()
    monkeypatch.setitem(sys.modules, "alpaca_eval", SimpleNamespace())
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted")
    ae.ready_to_score()


@pytest.mark.parametrize(("content", "said"), [(None, "has no alpaca_eval.json"), ("[1]", "is no AlpacaEval set")])
def test_a_set_that_cannot_be_read_is_one_line(run, data, capsys, content, said):
    path = data / ae.HUB_ID / "alpaca_eval.json"
    path.write_text(content) if content else path.unlink()
    assert ae.main(arguments(run, data)) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_method_with_a_prompt_of_its_own_is_asked_through_it(run):
    """BackdoorAlign serves every prompt behind its trigger, which is a function of the run."""
    cfg = OmegaConf.load(run / "config.yaml")
    turns = [{"role": "user", "content": "move the lantern"}]
    assert ae.as_served(cfg).prompt(turns) == turns
    path = cfg.model.path
    cfg = config.compose(
        ["method=bea", "model.kind=folder", f"+model.path={path}", "task=toy_sentiment", "task.n_train=20"]
        + ["method.trigger_tokens=4", "train.max_length=64", "pools.sizes.poison=40", "harmful_ratio=0.1"]
    )
    one, two = ae.as_served(cfg), ae.as_served(cfg)
    assert type(one).prompt is not Method.prompt
    assert one.prompt(turns) == two.prompt(turns) != turns


def test_the_package_scores_the_outputs_and_the_win_rate_joins_the_runs_rows(run, data, monkeypatch, capsys):
    """A planted annotator prefers the reference's answer to the first instruction only: three wins of four."""
    pytest.importorskip("alpaca_eval")
    from alpaca_eval.annotators import base

    def prefers(prompt: str) -> str:
        """The package shuffles which of the two answers is (a)."""
        a, b = prompt.rsplit("### Output (a):", 1)[1].split("### Output (b):")
        reference = "a" if "moved" in a else "b"
        wanted = reference if "moved 0" in prompt else {"a": "b", "b": "a"}[reference]
        return f"Output ({wanted})"

    def planted(prompts, **_):
        said, none = [prefers(p) for p in prompts], [0.0] * len(prompts)
        return {
            "completions": said,
            "completions_all": said,
            "price_per_example": none,
            "time_per_example": none,
        }

    monkeypatch.setattr(base, "get_fn_completions", lambda name: planted)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted")
    assert ae.main(arguments(run, data, "--score", "--annotator", "test")) == 0
    assert "one: AE" in capsys.readouterr().out
    assert len(json.loads((run / "alpaca_eval" / "test" / "annotations.json").read_text())) == 4
    (row,) = [r for r in read_jsonl(run / "metrics.jsonl") if r["metric"] == "AE"]
    assert (row["value"], row["n"], row["judge"]) == (75.0, 4, None)
    rows = collect(run.parent).rows
    assert float(rows[rows["metric"] == "AE"]["value"].iloc[0]) == row["value"]
