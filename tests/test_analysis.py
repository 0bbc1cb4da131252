"""Synthetic runs with planted values: what comes out of collect, stats, tables, figures and the demo command."""

import json
import math
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from analysis import demo, figures, gallery, paper, report, stats, tables
from analysis.collect import Cell, at_end, before, collect, expected_cells, one_judge, pooled, read_exported, tidy
from cwac.core import paths
from cwac.core.errors import STARTED_AS, UserError
from tests.helpers.results import METHODS, cell_of, harm, line_of, pick, row, rows_of, write_run

RATIOS = (0.0, 0.05, 0.1, 0.2)


@pytest.fixture
def campaign(tmp_path) -> tuple[Path, list[Cell]]:
    """A finished grid of six methods, four ratios and three seeds."""
    cells = [cell_of(m, r, s) for m in METHODS for r in RATIOS for s in (0, 1, 2)]
    for cell in cells:
        write_run(tmp_path / "runs", cell, rows_of(cell, harm(cell.method, cell.harmful_ratio, cell.seed)))
    return tmp_path / "runs", cells


# --- stats --------------------------------------------------------------------------------------------


def test_t_interval_is_scipys():
    values = [10.0, 14.0, 12.0, 20.0]
    found = stats.estimate(values)
    low, high = scipy_stats.t.interval(0.95, 3, np.mean(values), scipy_stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.over == "seeds" and found.n == 4


def test_t_interval_covers_at_its_level():
    """Planted normal seeds: about 95 % of the intervals hold the true mean."""
    rng = np.random.default_rng(0)
    intervals = [stats.estimate(rng.normal(50, 10, 3).tolist()) for _ in range(2000)]
    assert np.mean([i.low <= 50 <= i.high for i in intervals]) == pytest.approx(0.95, abs=0.015)


def test_one_seed_has_no_interval_over_seeds_and_a_percentage_one_over_its_prompts():
    found = stats.estimate([42.0], prompts=[200])
    assert found.over == "none" and math.isnan(found.low) and math.isnan(found.half)
    found = stats.estimate([42.0], prompts=[200], proportion=True)
    assert (found.over, found.n) == ("prompts of one seed", 1)
    assert (found.low, found.high) == pytest.approx(scipy_stats.beta.ppf([0.025, 0.975], [84, 85], [117, 116]) * 100)
    with pytest.raises(ValueError):
        stats.estimate([])


def test_zero_variance_of_a_proportion_falls_back_to_the_exact_interval():
    found = stats.estimate([0.0, 0.0, 0.0], prompts=[200, 200, 200], proportion=True)
    # closed form at zero hits: 1 - (alpha / 2)^(1 / n), of one seed's prompts, not of the 600 pooled
    assert found.over == "prompts"
    assert (found.low, found.high) == pytest.approx((0.0, 100 * (1 - 0.025 ** (1 / 200))))
    plain = stats.estimate([7.0, 7.0], proportion=False)
    assert plain.over == "seeds" and plain.half == 0


def test_an_interval_of_a_proportion_stays_between_0_and_100():
    found = stats.estimate([0.0, 0.0, 90.0], prompts=[10] * 3, proportion=True)
    assert (found.low, found.high) == (0.0, 100.0)
    assert found.half > 100  # what is printed is the unclipped half-width


def test_paired_difference_removes_what_seeds_share():
    reference = {0: 10.0, 1: 50.0, 2: 90.0}
    ours = {0: 5.0, 1: 45.0, 2: 85.0, 3: 0.0}
    found = stats.paired(ours, reference)
    assert (found.mean, found.half, found.n) == (-5.0, 0.0, 3)
    assert stats.paired({7: 1.0}, reference) is None


# --- collect ------------------------------------------------------------------------------------------


def test_planted_values_come_back(campaign):
    runs, cells = campaign
    found = collect(runs, cells)
    assert sorted(found.runs) == sorted(c.run_id for c in cells)
    assert not found.missing and not found.account()
    end = at_end(found.rows)
    for cell in cells:
        value = pick(end, run_id=cell.run_id, metric="HS")["value"]
        assert value == harm(cell.method, cell.harmful_ratio, cell.seed)
    assert len(before(found.rows).query("metric == 'HS'")) == 3  # once a seed, not once a run


def test_the_aligned_model_is_not_what_a_method_with_a_trigger_makes_of_its_prompts():
    rows = []
    for method, value in (("lisa", 5.0), ("bea", 30.0)):
        cell = cell_of(method, 0.1, 0)
        rows.append(row(cell, "OR", value, epoch=0, step=0, final=False, set="benign", judge="keyword"))
        if method == "bea":
            rows.append(row(cell, "extra_data", 20.0, set="trigger", n=None))
    found = tidy(rows)[0]
    assert before(found)["value"].tolist() == [5.0]
    assert before(found[found["method"] == "bea"])["value"].tolist() == [30.0]


def test_a_half_written_last_line_is_skipped_and_counted(tmp_path):
    cell = cell_of("sft", 0.1, 0)
    write_run(tmp_path, cell, rows_of(cell, 30.0), tail='{"run_id": "x", "metric": "HS", "val')
    found = collect(tmp_path)
    assert found.unreadable == {cell.run_id: 1}
    assert len(found.rows) == len(rows_of(cell, 30.0))
    assert any("1 unreadable" in line for line in found.account())


def test_runs_that_are_not_done_do_not_count(tmp_path):
    done, running, aside = cell_of("sft", 0.1, 0), cell_of("sft", 0.1, 1), cell_of("cwac", 0.1, 0)
    write_run(tmp_path, done, rows_of(done, 30.0))
    write_run(tmp_path, running, rows_of(running, 99.0), status="running")
    write_run(tmp_path, aside, rows_of(aside, 99.0)).rename(tmp_path / f"{aside.run_id}.old-1")
    found = collect(tmp_path, None)
    assert found.runs == [done.run_id]
    gone = "running, but its process has gone: the same command goes on from its last checkpoint"
    assert found.unfinished == {running.run_id: gone, f"{aside.run_id}.old-1": "set aside by force=true"}
    found = collect(tmp_path, [done, running, aside])
    assert found.missing == [running, aside]


def test_duplicates_are_reported_and_the_last_wins(tmp_path):
    cell = cell_of("sft", 0.1, 0)
    rows = rows_of(cell, 30.0)
    write_run(tmp_path, cell, [*rows, row(cell, "FA", 77.0)])
    found = collect(tmp_path)
    assert found.duplicates == 1
    assert pick(at_end(found.rows), metric="FA")["value"] == 77.0


def test_rows_of_other_evaluation_settings_do_not_mix(tmp_path):
    cell = cell_of("sft", 0.1, 0)
    other = [{**r, "eval": "e2", "value": 11.0, "time": 9.0} for r in rows_of(cell, 30.0)]
    write_run(tmp_path, cell, rows_of(cell, 30.0) + other)
    assert pick(at_end(collect(tmp_path, [cell]).rows), metric="HS")["value"] == 30.0
    # without a preset to say which, the latest evaluation counts
    assert pick(at_end(collect(tmp_path).rows), metric="HS")["value"] == 11.0
    wants_e3 = Cell(**{**cell.__dict__, "eval": "e3"})
    assert collect(tmp_path, [wants_e3]).missing == [wants_e3]


def test_two_judges_are_never_averaged(tmp_path):
    cell = cell_of("sft", 0.1, 0)
    strict = [{**r, "judge": "strict", "value": 60.0} for r in rows_of(cell, 30.0) if r["metric"] == "HS"]
    write_run(tmp_path, cell, rows_of(cell, 30.0) + strict)
    rows = collect(tmp_path).rows
    with pytest.raises(UserError, match="--judge"):
        one_judge(rows)
    assert pick(at_end(one_judge(rows, "strict")), metric="HS")["value"] == 60.0
    assert pick(at_end(one_judge(rows, "keyword")), metric="HS")["value"] == 30.0
    with pytest.raises(UserError, match="keyword, strict"):
        one_judge(rows, "nobody")


def test_runs_of_another_judge_are_left_out_and_counted(tmp_path, monkeypatch, capsys):
    """Three runs, one read by a judge of its own: the head, the table and the record speak of that one alone."""
    monkeypatch.setattr(gallery, "draw", lambda *_: [])
    for method, seed in (("sft", 0), ("sft", 1), ("cwac", 2)):
        cell = cell_of(method, 0.1, seed)
        rows = rows_of(cell, 30.0)
        write_run(
            tmp_path / "runs", cell, [{**r, "judge": r["judge"] and "strict"} for r in rows] if seed == 2 else rows
        )
    given = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--judge"]
    assert demo.main([*given, "strict"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("1 runs, seeds 2, judge strict") and "SFT" not in printed
    assert "2 run(s) judged by keyword alone are left out" in printed
    assert demo.main([*given, "keyword"]) == 0
    assert capsys.readouterr().out.startswith("2 runs, seeds 0, 1, judge keyword")
    asked = collect(tmp_path / "runs", [cell_of("sft", 0.1, 0), cell_of("cwac", 0.1, 2)]).of_judge("strict")
    assert not asked.missing and len(asked.expected) == 1  # a run that is there is not missing
    page = tmp_path / "page.html"
    assert report.main(["--runs", str(tmp_path / "runs"), "--out", str(page), "--judge", "strict"]) == 0
    assert capsys.readouterr().out.startswith("1 runs, seeds 2, judge strict")


def test_an_export_ends_with_what_came_out_where_and_the_next_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gallery, "draw", lambda *_: [])
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Makefile").touch()
    for method, hs in (("sft", 80.0), ("cwac", 30.0)):
        cell = cell_of(method, 0.1, 0)
        for name in ("runs", "mine"):
            write_run(tmp_path / name, cell, rows_of(cell, hs))
    assert demo.main(["--out", "out"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert "complies with 80 % of harmful requests, CWAC one that complies with 30 %" in last
    assert "of 2 runs are in out. Next: make report, one page" in last
    assert demo.main(["--runs", "mine", "--judge", "keyword", "--out", "out"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    page = "python -m analysis.report --runs mine --judge keyword --out out/report.html"
    assert f"Next: {page}, one page" in last
    assert report.main(shlex.split(page)[3:]) == 0
    monkeypatch.setenv(STARTED_AS, "cwac train")
    assert demo.main(["--out", "out"]) == 0
    assert "Next: cwac report --runs runs --out out/report.html" in capsys.readouterr().out.splitlines()[-1]


def test_a_frozen_campaign_reads_back_as_the_runs_it_came_from(campaign, tmp_path, monkeypatch):
    runs, cells = campaign
    gone = cell_of("cwac", 0.5, 0)
    monkeypatch.setattr(demo, "expected_cells", lambda preset, overrides: [*cells, gone])
    out = tmp_path / "frozen"
    assert demo.main(["--runs", str(runs), "--experiment", "demo", "--out", str(out)]) == 1
    fresh, frozen = collect(runs, [*cells, gone]), read_exported(out)
    assert frozen.rows.equals(fresh.rows) and sorted(frozen.runs) == sorted(fresh.runs)
    assert [c.run_id for c in frozen.missing] == [gone.run_id] and frozen.missing[0].harmful_ratio == 0.5
    assert tables.summarise(frozen).equals(tables.summarise(fresh))


def test_verdicts_and_learning_rate_come_from_the_run_directory_and_survive_freezing(tmp_path):
    cell = cell_of("sft", 0.1, 0)
    folder = write_run(tmp_path / "runs", cell, rows_of(cell, 50.0))
    (folder / "judge").mkdir()
    answers = [{"id": f"a-{i}", "verdict": ("harmful", "refusal")[i % 2], "judge": "keyword"} for i in range(4)]
    lines = "".join(json.dumps(a) + "\n" for a in answers) + '{"id": "a-4", "verd'
    (folder / "judge" / "harmful@90-e1.jsonl").write_text(lines)
    (folder / "judge" / "harmful@30-e1.jsonl").write_text(json.dumps({**answers[0], "id": "early"}) + "\n")
    (folder / "config.yaml").write_text("train:\n  learning_rate: 2e-05\n")
    fresh = collect(tmp_path / "runs")
    assert list(fresh.verdicts["id"]) == ["a-0", "a-1", "a-2", "a-3"]
    assert set(fresh.rows["learning_rate"]) == {2e-5}
    assert demo.main(["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    frozen = read_exported(tmp_path / "out")
    assert frozen.verdicts.equals(fresh.verdicts) and frozen.rows.equals(fresh.rows)


def test_runs_of_a_learning_rate_sweep_are_kept_apart(tmp_path):
    first = cell_of("sft", 0.1, 0)
    second = Cell(first.run_id[:-8] + "11111111", "tiny", "sft", "toy", 0.1, 0, "e1")
    for cell, rate in ((first, 1e-5), (second, 1e-3)):
        folder = write_run(tmp_path, cell, rows_of(cell, 1e6 * rate))
        (folder / "config.yaml").write_text(f"train: {{learning_rate: {rate}}}\n")
    rows = collect(tmp_path).rows
    with pytest.raises(UserError, match="differ in their settings"):
        at_end(rows)
    ends = at_end(rows, by=["learning_rate"]).query("metric == 'HS'")
    assert dict(zip(ends["learning_rate"], ends["value"], strict=True)) == {1e-5: 10.0, 1e-3: 1000.0}


def test_a_learning_rate_sweep_is_frozen_with_a_table_for_each_rate(tmp_path, capsys):
    for k, rate in enumerate((1e-5, 1e-3)):
        for method in ("sft", "cwac"):
            first = cell_of(method, 0.1, 0)
            cell = Cell(f"{first.run_id[:-1]}{k}", "tiny", method, "toy", 0.1, 0, "e1")
            folder = write_run(tmp_path / "runs", cell, rows_of(cell, 10.0 + 60 * k + (method == "sft")))
            (folder / "config.yaml").write_text(f"train: {{learning_rate: {rate}}}\n")
    out, readme = tmp_path / "out", tmp_path / "README.md"
    arguments = ["--runs", str(tmp_path / "runs"), "--out", str(out)]
    assert demo.main(arguments) == 0
    text = (out / "table.md").read_text()
    low, high = text.split("## Learning rate 1e-3")
    assert "## Learning rate 1e-5" in low and "10.0 [6.2, 15.0]§ (n=1)" in low
    assert "70.0 [63.1, 76.3]§ (n=1)" in high and "70.0" not in low
    assert "-1.0 (n=1)" in low and "-1.0 (n=1)" in high  # CWAC less SFT, of one rate each
    assert text.count("Percentages; mean") == 1
    summary = pd.read_csv(out / "summary.csv")
    hs = summary[(summary["metric"] == "HS") & (summary["method"] == "cwac")]
    assert dict(zip(hs["learning_rate"], hs["mean"], strict=True)) == {1e-5: 10.0, 1e-3: 70.0}
    assert (out / "figure3-p0.1.png").is_file() and not list(out.glob("ratio*"))
    readme.write_text("<!-- results:out --><!-- /results:out -->")
    assert demo.main([*arguments, "--readme", str(readme)]) == 2
    assert "--readme takes a campaign at one learning rate" in capsys.readouterr().err


def test_sets_of_prompts_are_pooled_by_their_size(tmp_path):
    cell = cell_of("sft", 0.1, 0)
    more = {"set": "other_set", "judge": "keyword", "n": 50}
    write_run(tmp_path, cell, [*rows_of(cell, 30.0), row(cell, "HS", 80.0, **more)])
    rows = collect(tmp_path).rows
    hs = pick(pooled(at_end(rows)), metric="HS")
    assert (hs["set"], hs["n"]) == ("all", 250) and hs["value"] == pytest.approx((200 * 30 + 50 * 80) / 250)
    one = pooled(at_end(rows)[at_end(rows)["set"] != "other_set"])
    assert pick(one, metric="HS")["set"] == "harmful" and pick(one, metric="FA")["value"] == 95.0


def test_a_folder_that_is_no_frozen_campaign_is_refused(tmp_path):
    with pytest.raises(UserError, match="results.csv.*Remedy"):
        read_exported(tmp_path)
    (tmp_path / "results.csv").write_text("run_id,value\nx,1\n")
    with pytest.raises(UserError, match="lacks the columns model"):
        read_exported(tmp_path)


# --- tables -------------------------------------------------------------------------------------------


def test_table_prints_the_planted_means_and_intervals(campaign):
    found = collect(*campaign)
    summary = tables.summarise(found)
    text = tables.report(found, summary, tables.differences(found))
    values = [harm("sft", 0.1, s) for s in (0, 1, 2)]
    expected = f"{np.mean(values):.1f} ± {stats.half_width(values):.1f}"
    assert expected in line_of(text, "SFT", "0.1")
    # FA is 95 at every seed: an exact interval over prompts, marked
    assert "95.0 [91.0, 97.6]†" in line_of(text, "SFT", "0.1")
    assert "1.0 [" in line_of(text, paper.method_label(paper.ALIGNED))
    # every seed differs from SFT by the same amount
    change = harm("cwac", 0.2, 0) - harm("sft", 0.2, 0)
    assert f"{change:+.1f} (each seed)" in text
    assert "Missing" not in text
    assert max(map(len, text.splitlines())) <= 120


def test_what_was_measured_on_the_way_is_a_table_of_its_own(campaign, tmp_path):
    found = collect(*campaign)
    text = tables.report(found, tables.summarise(found), tables.differences(found))
    values = [0.8 * harm("sft", 0.2, s) for s in (0, 1, 2)]
    middle = line_of(text, "SFT", "0.2", "60", "3")
    # FA was not asked there, and the loss is the same on every seed
    assert [c.strip() for c in middle.split("|")[5:8]] == [
        "not measured",
        f"{np.mean(values):.1f} ± {stats.half_width(values):.1f}",
        "1.2 (each seed)",
    ]
    assert line_of(text, "SFT", "0.2", "90", "3") and tables.WAY_NOTE in text
    end_alone = cell_of("sft", 0.1, 0)
    write_run(tmp_path / "ends", end_alone, [r for r in rows_of(end_alone, 30.0) if r["step"] in (0, 90)])
    assert tables.training_table(collect(tmp_path / "ends").rows, "tiny", "toy") == ""


def test_a_model_that_answers_harmful_requests_as_the_task_is_named_under_its_table(tmp_path):
    for method, share in (("sft", 96.0), ("lisa", 30.0)):
        cell = cell_of(method, 0.1, 0)
        sets = (("harmful", share, 30), ("more", share - 28, 10), ("harmful+prefill", 0.0, 90), ("benign", 0.0, 90))
        form = [row(cell, "task_answers", v, set=s, n=n) for s, v, n in sets]
        asked = [row(cell, "HS", 1.0, set=s, judge="keyword") for s in ("more", "harmful+prefill")]
        start = [row(cell, "task_answers", 90.0, set="harmful", epoch=0, step=0, final=False)]
        write_run(tmp_path, cell, [*rows_of(cell, 30.0), *asked, *form, *start])
    found = collect(tmp_path)
    summary = tables.summarise(found)
    note = tables.collapse_note(summary, "tiny", "toy")
    assert note.endswith("their HS says nothing about safety: SFT at p = 0.1 (89 %).")  # (30 x 96 + 10 x 68) / 40
    assert note in tables.report(found, summary) and note in tables.overview(found, summary)
    assert tables.collapse_note(summary[summary["method"] == "lisa"], "tiny", "toy") == ""


def test_a_wide_table_is_broken_into_several():
    text = tables.markdown(["name", *"abcdef"], [["x", *["1" * 20] * 6]], width=60)
    blocks = text.split("\n\n")
    assert len(blocks) == 3 and all(block.splitlines()[2].startswith("| x    | 1111") for block in blocks)
    assert max(map(len, text.splitlines())) <= 60 and text.count("1" * 20) == 6


def test_methods_keep_their_order_and_newcomers_come_last(tmp_path):
    for method in ("zz_new", "cwac", "lisa", "sft"):
        cell = cell_of(method, 0.1, 0)
        write_run(tmp_path, cell, rows_of(cell, 30.0))
    found = collect(tmp_path)
    text = tables.result_table(found, tables.summarise(found), "tiny", "toy")
    names = [line.split("|")[1].strip() for line in text.partition("\n\n")[0].splitlines()[2:]]
    assert names == [paper.method_label(paper.ALIGNED), "SFT", "Lisa", "CWAC", "zz_new"]
    assert line_of(text, "CWAC").count("30.0 [23.7, 36.9]§ (n=1)") == 1 and "±" not in text
    detail = tables.result_table(found, tables.summarise(found), "tiny", "toy", tables.DETAIL)
    assert "1 (n=1)" in line_of(detail, "CWAC") and "§" not in detail  # a loss is no share of prompts


def test_missing_cells_are_named_never_blank(campaign):
    runs, cells = campaign
    extra = [cell_of("cwac", 0.5, s) for s in (0, 1)] + [cell_of("sft", 0.1, 3)]
    found = collect(runs, cells + extra)
    text = tables.report(found, tables.summarise(found), tables.differences(found))
    gone = line_of(text, "CWAC", "0.5")
    assert gone.count("missing") == 4 and "0/2" in gone
    assert "3/4" in line_of(text, "SFT", "0.1")
    for cell in extra:
        assert cell.run_id in text
    assert f"3 of {len(cells) + 3} runs" in text


def test_a_metric_without_rows_is_named(tmp_path):
    a, b = cell_of("sft", 0.1, 0), cell_of("cwac", 0.1, 0)
    write_run(tmp_path, a, rows_of(a, 30.0))
    write_run(tmp_path, b, [r for r in rows_of(b, 30.0) if r["metric"] != "OR"])
    found = collect(tmp_path)
    blocks = tables.result_table(found, tables.summarise(found), "tiny", "toy").split("\n\n")
    assert [line_of(block, "CWAC").count("not measured") for block in blocks] == [0, 1]
    assert "OR" in blocks[1].splitlines()[0]


# --- figures ------------------------------------------------------------------------------------------


def test_trajectory_averages_over_seeds_at_each_step(campaign):
    rows = one_judge(collect(*campaign).rows)
    points = figures.trajectory(rows[(rows["metric"] == "task_loss") | (rows["metric"] == "HS")])
    at = pick(points, method="sft", harmful_ratio=0.2, step=60)
    assert at["HS"] == pytest.approx(np.mean([0.8 * harm("sft", 0.2, s) for s in (0, 1, 2)]))
    assert at["task_loss"] == pytest.approx(1.2) and at["n"] == 3


def test_seeds_whose_epochs_have_different_numbers_of_steps_share_a_point(tmp_path):
    for seed, factor in ((0, 1), (1, 2)):
        cell = cell_of("sft", 0.2, seed)
        write_run(tmp_path, cell, [{**r, "step": factor * r["step"]} for r in rows_of(cell, 30.0 + 20 * seed)])
    cell = cell_of("cwac", 0.2, 0)
    write_run(tmp_path, cell, rows_of(cell, 10.0))
    rows = one_judge(collect(tmp_path).rows)
    points = figures.trajectory(rows[rows["metric"].isin(["task_loss", "HS"])])
    assert points.loc[points["method"] == "sft", "step"].tolist() == [0, 45, 90, 135]  # 30 and 60, 60 and 120, ...
    assert points.loc[points["method"] == "cwac", "step"].tolist() == [0, 30, 60, 90]
    end = pick(points, method="sft", step=135)
    assert (end["HS"], end["n"]) == (pytest.approx(40.0), 2)
    assert "| SFT    | 0.2 |   135 | 2 |" in tables.training_table(rows, "tiny", "toy")


def test_the_training_figure_has_a_column_for_the_poisons_loss_where_it_was_measured(tmp_path):
    cell = cell_of("sft", 0.2, 0)
    rows = rows_of(cell, 30.0)
    poison = [
        {**r, "metric": "poison_loss", "set": "poison", "value": 3 * r["value"]}
        for r in rows
        if r["metric"] == "task_loss"
    ]
    for name, extra, columns in (("without", [], 2), ("with", poison, 3)):
        write_run(tmp_path / name, cell, rows + extra)
        [plate] = figures.against_training(one_judge(collect(tmp_path / name).rows), "tiny", "toy", "harmful")
        axes = plate.figure.axes
        assert len(axes) == columns
    assert axes[2].get_lines()[0].get_xdata().tolist() == pytest.approx([3 * (2 - share) for share in (0.4, 0.8, 1.0)])


def test_styles_differ_between_all_methods():
    looks = [figures.style(m) for m in paper.METHODS if m != paper.ALIGNED]
    of_tables = {figures.style(m)["color"] for m in ("sft", "lisa", "safeinstr", "bea", "sppft", "asft", "cwac")}
    assert len(of_tables) == 7  # Table 3's lines cross in one panel
    assert len({(k["marker"], str(k["linestyle"])) for k in looks}) == len(looks)  # readable without colour
    assert len({(k["color"], k["marker"]) for k in looks}) == len(looks)


def test_no_training_figure_without_earlier_measurements(tmp_path):
    cell = cell_of("sft", 0.1, 0)
    write_run(tmp_path / "runs", cell, [r for r in rows_of(cell, 30.0) if r["final"]])
    rows = collect(tmp_path / "runs").rows
    assert figures.against_training(rows, "tiny", "toy", "harmful") == []


# --- the command --------------------------------------------------------------------------------------


def test_demo_writes_everything_and_says_where(campaign, tmp_path, capsys):
    runs, cells = campaign
    out, readme = tmp_path / "demo", tmp_path / "README.md"
    readme.write_text("before\n<!-- results:demo -->\nold\n<!-- /results:demo -->\nafter\n")
    assert demo.main(["--runs", str(runs), "--out", str(out), "--readme", str(readme)]) == 0
    printed = capsys.readouterr().out
    *_, figure, _, last = printed.strip().splitlines()
    assert figure == f"figure: {out / 'training.png'}"
    assert (
        f"of {len(cells)} runs are in {out}. Next: " in last and f"--runs {runs} --out {out / 'report.html'}" in last
    )
    for name in ("results.csv", "summary.csv", "table.md", "ratio.png", "ratio.pdf", "training.png", "training.pdf"):
        assert (out / name).stat().st_size > 0, name
    record = json.loads((out / "provenance.json").read_text())
    assert record["seeds"] == [0, 1, 2] and record["runs_git"] == ["c0ffee"] and len(record["runs"]) == len(cells)
    assert record["versions"]["torch"] and set(record["git"]) == {"commit", "dirty"}
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| SFT" in text and "](demo/ratio.png)" in text
    # its tables and figures again, from its own rows
    were = {path.name: path.read_bytes() for path in out.iterdir()}
    for name in ("summary.csv", "table.md", "ratio.png"):
        (out / name).unlink()
    shutil.rmtree(runs)
    assert demo.main(["--exported", str(out)]) == 0
    now = {path.name: path.read_bytes() for path in out.iterdir()}
    assert now.keys() == were.keys()
    assert {name for name in now if now[name] != were[name]} <= {"ratio.pdf", "training.pdf"}  # they hold a date
    for extra in (["--runs", "runs"], ["--readme", str(readme)], ["--experiment", "demo"], ["--by", "a"], ["seed=0"]):
        assert demo.main(["--exported", str(out), *extra]) == 2
        assert f"error: {extra[0]} is for --" in capsys.readouterr().err
    (out / "provenance.json").unlink()
    assert demo.main(["--exported", str(out)]) == 2 and "no readable provenance.json" in capsys.readouterr().err


def test_demo_prints_what_there_is_and_fails_when_runs_are_missing(campaign, tmp_path, capsys, monkeypatch):
    runs, cells = campaign[0], campaign[1][:2]
    gone = cell_of("cwac", 0.5, 0)
    monkeypatch.setattr(demo, "expected_cells", lambda preset, overrides: [*cells, gone])
    assert demo.main(["--runs", str(runs), "--experiment", "demo", "--out", str(tmp_path / "demo")]) == 1
    printed = capsys.readouterr().out
    assert gone.run_id in printed and "| SFT" in printed
    assert json.loads((tmp_path / "demo" / "provenance.json").read_text())["missing"] == [gone.run_id]


@pytest.mark.parametrize(
    "arguments, names",
    [(["--runs", "nowhere"], "--runs nowhere"), (["--runs", "."], "no finished run"), (["--judge", "x"], "--judge x")],
)
def test_demo_bad_input_is_one_clear_error(tmp_path, capsys, monkeypatch, arguments, names):
    monkeypatch.chdir(tmp_path)
    cell = cell_of("sft", 0.1, 0)
    write_run(tmp_path / "runs", cell, rows_of(cell, 30.0))
    assert demo.main([*arguments, "--out", "out"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and names in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_presets_grid_is_what_the_command_expects(tmp_path, capsys, monkeypatch):
    """From a yaml of conf/experiment to the named missing run, with an override as the sweep would take it."""
    conf = tmp_path / "conf"
    shutil.copytree(paths.CONF, conf)
    (conf / "experiment").mkdir(exist_ok=True)
    (conf / "experiment" / "mini.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /task: toy_topic\nhydra:\n  mode: MULTIRUN\n"
        "  sweeper:\n    params: {method: 'sft,weight_only', harmful_ratio: '0,0.1', seed: '0,1,2'}\n"
    )
    monkeypatch.setattr("cwac.core.config.CONF", conf)
    assert len({c.run_id for c in expected_cells("mini")}) == 12
    cells = expected_cells("mini", ["seed=0,1"])
    assert [(c.method, c.harmful_ratio, c.seed) for c in cells] == [
        (m, p, s) for m in ("sft", "weight_only") for p in (0.0, 0.1) for s in (0, 1)
    ]
    for cell in cells[1:]:
        folder = write_run(tmp_path / "runs", cell, [{**r, "eval": cell.eval} for r in rows_of(cell, 30.0)])
        status = {"status": "done", "run_id": cell.run_id, "evaluations": [cell.eval]}
        (folder / "status.json").write_text(json.dumps(status))
    arguments = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--experiment"]
    assert demo.main([*arguments, "mini", "seed=0,1"]) == 1
    printed = capsys.readouterr().out
    assert "Missing: 1 of 8 runs" in printed and cells[0].run_id in printed and "1/2" in printed
    assert demo.main([*arguments, "nosuch"]) == 2
    assert "experiment=nosuch" in capsys.readouterr().err


def test_runs_of_different_settings_are_never_pooled_as_seeds(tmp_path):
    first = cell_of("sft", 0.1, 0)
    second = Cell(
        first.run_id[:-8] + "11111111", *[getattr(first, k) for k in ("model", "method", "task")], 0.1, 0, "e1"
    )
    for cell, hs in ((first, 10.0), (second, 90.0)):
        write_run(tmp_path / "runs", cell, rows_of(cell, hs))
    with pytest.raises(UserError, match="differ in their settings.*00000000.*11111111"):
        tables.summarise(collect(tmp_path / "runs"))


def test_a_method_that_saw_nothing_extra_says_so_as_sft_does():
    cell = cell_of("weight_only", 0.1, 0)
    recorded = pd.DataFrame([row(cell, "extra_data", 0, set="none")])
    assert tables.extra_data(recorded, "weight_only") == "none"
    assert tables.extra_data(recorded.iloc[:0], "weight_only") == "none recorded"  # a run of before
    both = pd.DataFrame([row(cell, "extra_data", 0, set="none"), row(cell, "extra_data", 5, set="refusals")])
    assert tables.extra_data(both, "weight_only") == "5 refusals"


# --- several values of a method's own key ---------------------------------------------------------------


def swept_by_energy(tmp_path, keys=("0.9", "0.99", "0.999")):
    """Runs of one method that differ in its energy alone, beside SFT; HS is 10 times the place of the energy."""
    for seed in (0, 1):
        cell = cell_of("sft", 0.1, seed)
        write_run(tmp_path, cell, rows_of(cell, 60.0 + seed))
        (tmp_path / cell.run_id / "config.yaml").write_text("method: {name: sft}\ntrain: {learning_rate: 1e-3}\n")
        for k, energy in enumerate(keys):
            cell = cell_of("cwac", 0.1, seed)
            cell = replace(cell, run_id=cell.run_id[:-1] + str(k))
            write_run(tmp_path, cell, rows_of(cell, 10.0 * (k + 1) + seed))
            config = f"method: {{name: cwac, weight: {{energy: {energy}}}}}\ntrain: {{learning_rate: 1e-3}}\n"
            (tmp_path / cell.run_id / "config.yaml").write_text(config)


@pytest.mark.parametrize("by", [[], ["--by", "method.weight.energy"]])
def test_values_of_a_methods_key_are_rows_of_their_own(tmp_path, capsys, by):
    swept_by_energy(tmp_path / "runs")
    out = tmp_path / "out"
    assert demo.main(["--runs", str(tmp_path / "runs"), "--out", str(out), *by]) == 0
    text = capsys.readouterr().out
    for k, energy in enumerate(("0.9", "0.99", "0.999")):
        assert f"{10 * (k + 1) + 0.5}" in line_of(text, f"CWAC, energy {energy}", "0.1", "2")
    assert line_of(text, "SFT", "0.1", "2")
    assert json.loads((out / "provenance.json").read_text())["by"]["keys"] == ["method.weight.energy"]
    again = read_exported(out)
    assert set(again.rows["method"]) == {"sft", "cwac, energy 0.9", "cwac, energy 0.99", "cwac, energy 0.999"}


def test_a_value_that_stands_behind_the_key_keeps_the_methods_name(tmp_path, capsys):
    swept_by_energy(tmp_path / "runs")
    out = tmp_path / "out"
    by = ["--by", "method.weight.energy=9e-1"]
    assert demo.main(["--runs", str(tmp_path / "runs"), "--out", str(out), *by]) == 0
    assert set(read_exported(out).rows["method"]) == {"sft", "cwac", "cwac, energy 0.99", "cwac, energy 0.999"}


def test_a_key_that_no_run_has_is_refused_by_name(tmp_path, capsys):
    swept_by_energy(tmp_path / "runs")
    assert demo.main(["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--by", "method.energy"]) == 2
    said = capsys.readouterr().err
    assert "--by method.energy" in said and "method.weight.energy" in said
    assert not (tmp_path / "out").exists()


def test_runs_that_differ_beyond_their_method_are_no_settings_of_it(tmp_path, capsys):
    swept_by_energy(tmp_path / "runs")
    for k, folder in enumerate(sorted((tmp_path / "runs").glob("*cwac*"))):
        with (folder / "config.yaml").open("a") as file:
            file.write(f"pools: {{size: {k}}}\n")
    assert demo.main(["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "differ in method.weight.energy (0.9, 0.99, 0.999), pools.size (0, 1, 2, 3" in said
    assert "Remedy: --by method.weight.energy --by pools.size makes a row of each value; or name the preset" in said
