"""FA against HS by setting, from planted runs."""

import argparse
import math

import pytest
from omegaconf import OmegaConf
from scipy.stats import beta

from analysis import frontier, records, restore
from analysis.collect import cell_from
from cwac.core import config
from tests.test_analysis import row, write_run


def plant(runs, method, values, *more, split="validation", first=3):
    """One run a seed with its FA and HS."""
    for seed, (fa, hs) in enumerate(values, first):
        cfg = config.compose([f"method={method}", f"seed={seed}", f"eval.split={split}", *more])
        cell = cell_from(cfg)
        rows = [row(cell, "FA", fa, eval=cell.eval), row(cell, "OR", 0.0, eval=cell.eval, judge="keyword")]
        for name, value in (("a", hs), ("b", hs + 10), ("a+prefill", 99.0)):
            rows.append(row(cell, "HS", value, set=name, eval=cell.eval, judge="keyword"))
        OmegaConf.save(cfg, write_run(runs, cell, rows) / "config.yaml")


def points(runs):
    return frontier.points(*frontier.of_runs(argparse.Namespace(runs=runs)))


@pytest.fixture
def planted(tmp_path):
    runs = tmp_path / "runs"
    plant(runs, "nullspace", [(80, 0), (90, 0)], "train.learning_rate=1e-4")
    plant(runs, "nullspace", [(90, 0), (92, 2)], "train.learning_rate=2e-4")
    plant(runs, "nullspace", [(95, 30), (95, 30)], "train.learning_rate=4e-4")
    plant(runs, "sft", [(95, 80), (95, 80)], "train.learning_rate=1e-4")
    plant(runs, "nullspace", [(88, 1)], "train.learning_rate=2e-4", split="test", first=0)
    return runs


def test_a_setting_is_its_varied_keys_and_validation_chooses_one_a_method(planted):
    table = points(planted)
    assert len(table) == 5
    chosen = table[table["chosen"]].set_index("method")
    assert (
        list(chosen["setting"]) == ["rate 0.0002", "rate 0.0001"]
        and not table[table["split"] == "test"]["chosen"].any()
    )
    point = chosen.loc["nullspace"]
    assert (point["n"], point["FA"], point["HS"]) == (2, 91, 6)  # HS over sets, prefilled ones left out
    assert point["objective"] == -85 and point["FA_half"] > 0


def test_one_seed_has_the_interval_of_its_prompts_and_seeds_that_agree_one_seeds(planted):
    """FA over 200 prompts; HS over two sets of 200, so over 400."""
    table = points(planted)
    (alone,) = table[table["split"] == "test"].to_dict("records")
    for metric, hits, of in (("FA", 176, 200), ("HS", 24, 400)):
        low, high = beta.ppf([0.025, 0.975], [hits, hits + 1], [of - hits + 1, of - hits]) * 100
        assert (alone[f"{metric}_low"], alone[f"{metric}_high"]) == pytest.approx((low, high))
        assert alone[f"{metric}_over"] == "prompts of one seed"
    text = frontier.report(table)
    assert "88.0 [82.7, 92.2]§ (n=1)" in text and "0.0 [0.0, 1.8]†" in text and "91.0 ± 12.7" in text
    assert "± 0.0" not in text
    cell = cell_from(cfg := config.compose(["method=lisa", "seed=0", "eval.split=test"]))
    of = {"eval": cell.eval, "judge": "keyword"}
    rows = [row(cell, "HS", 10.0, set=s, n=n, **of) for s, n in (("a", 100), ("b", 50))]
    rows += [row(cell, m, 50.0, set="t", **of) for m in ("FA", "OR")]
    OmegaConf.save(cfg, write_run(planted, cell, rows) / "config.yaml")
    (uneven,) = points(planted).query("method == 'lisa'").to_dict("records")
    assert uneven["HS_over"] == "none" and math.isnan(uneven["HS_low"])  # no share of 150 prompts


def test_answers_in_the_tasks_form_have_a_column_where_they_were_measured(planted):
    assert "task_answers" not in frontier.report(points(planted))
    cell = cell_from(cfg := config.compose(["method=lisa", "seed=3", "eval.split=validation"]))
    of = {"eval": cell.eval, "judge": "keyword"}
    rows = [row(cell, m, v, set=s, **of) for m, v, s in [("FA", 50.0, "t"), ("HS", 1.0, "a"), ("OR", 0.0, "b")]]
    rows += [row(cell, "task_answers", v, set=s, **of) for v, s in [(40.0, "a"), (90.0, "b")]]
    OmegaConf.save(cfg, write_run(planted, cell, rows) / "config.yaml")
    table = points(planted).set_index("method")
    assert table.loc["lisa", "task_answers"] == 65.0 and math.isnan(table.loc["sft", "task_answers"])
    lines = frontier.report(table.reset_index()).splitlines()
    assert any("Lisa" in line and "65.0" in line.replace("|", " ").split() for line in lines)


def test_the_command_writes_table_figure_and_provenance(planted, tmp_path, capsys):
    out = tmp_path / "results"
    assert frontier.main(["--runs", str(planted), "--out", str(out)]) == 0
    text = (out / "table.md").read_text()
    assert "validation prompts" in text and "test prompts" in text and "rate 2e-4 (chosen)" in text
    assert {p.name for p in out.iterdir()} >= {"frontier.csv", "frontier.png", "results.csv", "provenance.json"}
    assert str(out / "frontier.png") in capsys.readouterr().out


def test_a_folder_without_runs_is_one_line(tmp_path, capsys):
    assert frontier.main(["--runs", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no finished run" in error


def test_batch_warmup_and_rows_come_back_from_an_export_and_one_seed_is_no_two(planted, tmp_path, capsys):
    beside = ["train.per_device_train_batch_size=1"], ["train.warmup_steps=3"], ["task.n_train=50"]
    for k, more in enumerate(([], *beside)):
        plant(planted, "lisa", [(60 + k, 5)], "train.learning_rate=1e-4", *more)
    out = tmp_path / "out"
    assert frontier.main(["--runs", str(planted), "--out", str(out)]) == 0
    table = (out / "table.md").read_text()
    assert all(f"{60 + k}.0 [" in table for k in range(4)) and "batch 1, " in table
    assert frontier.main(["--exported", str(out)]) == 0
    assert (out / "table.md").read_text() == table
    path = out / "records.jsonl"
    path.write_text(path.read_text().replace('"train.warmup_steps": 3', '"train.warmup_steps": 0.05'))
    capsys.readouterr()
    assert frontier.main(["--exported", str(out)]) == 2
    said = capsys.readouterr().err
    assert "no seeds of one setting" in said and said.count("-lisa-s3-") == 2 and str(out / "table.md") in said


def test_a_campaign_that_came_back_gives_the_same_points(planted, tmp_path, capsys):
    """An export keeps each run's settings; one without them is refused instead of drawn without its runs."""
    plant(planted, "nullspace", [(70, 0), (71, 0)], "method.k=16", "method.energy=0.99999", "train.learning_rate=1e-4")
    first, again, runs = tmp_path / "first", tmp_path / "again", tmp_path / "restored"
    assert frontier.main(["--runs", str(planted), "--out", str(first)]) == 0
    assert restore.main([str(first), "--runs", str(runs)]) == 0
    assert frontier.main(["--runs", str(runs), "--out", str(again)]) == 0
    for name in ("frontier.csv", "results.csv"):
        assert (again / name).read_bytes() == (first / name).read_bytes(), name
    assert records.read_exported(again / records.NAME) == records.read_exported(first / records.NAME)
    told = (again / "table.md").read_text()
    assert (
        "energy 0.99999, k 16, rate 1e-4" in told
        and told.splitlines()[1:] == ((first / "table.md").read_text().splitlines()[1:])
    )
    were = {p.name: p.read_bytes() for p in first.iterdir() if p.suffix in (".md", ".csv", ".json", ".jsonl")}
    (first / "table.md").unlink()
    assert frontier.main(["--exported", str(first)]) == 0
    assert {name: (first / name).read_bytes() for name in were} == were
    assert frontier.main(["--exported", str(first), "--runs", str(runs)]) == 2
    assert "--runs is for --out" in capsys.readouterr().err
    (first / "records.jsonl").unlink()
    assert frontier.main(["--exported", str(first)]) == 2 and "do not say" in capsys.readouterr().err
    assert restore.main([str(first), "--runs", str(tmp_path / "bare")]) == 0
    capsys.readouterr()
    assert frontier.main(["--runs", str(tmp_path / "bare"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "11 runs" in error and "do not say their settings" in error
    assert not (tmp_path / "out").exists()
