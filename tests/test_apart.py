"""Runs that differ in a setting that no table names: the keys are named, and every remedy is one that works."""

import json
import re
import shlex
import shutil
from dataclasses import replace

import pytest

from analysis import (
    attacks,
    claims,
    closed,
    compare,
    demo,
    frontier,
    gallery,
    orders,
    pairwise,
    paper_tables,
    power,
    report,
    restore,
)
from analysis.collect import read_exported
from cwac.core.errors import UserError
from tests.helpers.results import cell_of, line_of, rows_of, write_run

STEPS = (8, 200)


@pytest.fixture
def mixed(tmp_path, monkeypatch):
    """SFT and CWAC at two lengths of training; HS is a tenth of the steps, CWAC's half of that."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gallery, "draw", lambda *_: [])
    train(tmp_path / "runs", lambda steps: {"train": {"max_steps": steps, "learning_rate": 1e-4}})
    return tmp_path


def train(runs, config):
    for k, steps in enumerate(STEPS):
        for method, share in (("sft", 1.0), ("cwac", 0.5)):
            for seed in (0, 1):
                cell = cell_of(method, 0.1, seed)
                cell = replace(cell, run_id=cell.run_id[:-1] + str(k))
                folder = write_run(runs, cell, rows_of(cell, share * steps / 10 + seed))
                named = {"method": {"name": method}, "paths": {"runs": f"elsewhere{k}"}, "eval": {"at": [0] * k}}
                (folder / "config.yaml").write_text(json.dumps(named | config(steps)))


def error_of(main, arguments, capsys) -> str:
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: these runs differ in ") and said.count("\n") == 1
    return said


def test_the_report_names_the_key_with_its_values_and_a_remedy_that_works(mixed, capsys):
    said = error_of(report.main, ["--out", "out/report.html"], capsys)
    ids = ", ".join(f"tiny-toy-p0.1-cwac-s0-0000000{k}" for k in (0, 1))
    assert said == (
        "error: these runs differ in train.max_steps (8, 200), but not in model, task, ratio, method and seed: "
        f"{ids}. Remedy: --by train.max_steps makes a row of each value; or name the preset with --experiment; or "
        "keep them in folders of their own (paths.runs).\n"
    )
    by = shlex.split(re.search(r"Remedy: (--by \S+)", said)[1])
    assert report.main(["--out", "out/report.html", *by]) == 0
    text = (mixed / "out" / "report.md").read_text()
    assert "20.5 ± " in line_of(text, "SFT, max_steps 200", "0.1", "2")
    assert "0.9 ± " in line_of(text, "CWAC, max_steps 8", "0.1", "2")


@pytest.mark.parametrize(
    ("main", "arguments", "path"),
    [
        (report.main, ["--out", "out/report.html"], "out/report.html"),
        (demo.main, ["--out", "out"], "out/table.md"),
        (paper_tables.main, ["table3", "--out", "out"], "out/table3.md"),
        (compare.main, ["exported", "runs", "--out", "out/compare.md"], "out/compare.md"),
        (pairwise.main, ["runs", "--out", "out/pairwise.md"], "out/pairwise.md"),
        (claims.main, ["--runs", "runs", "--csv", "out/claims.csv"], "out/claims.csv"),
        (power.main, ["runs", "--out", "out/power.md"], "out/power.md"),
        (frontier.main, ["--runs", "empty", "--out", "out"], "out/table.md"),
    ],
)
def test_after_an_error_what_an_earlier_call_left_is_named(mixed, monkeypatch, capsys, main, arguments, path):
    shutil.copytree(mixed / "runs", mixed / "exported")
    (mixed / "empty").mkdir()
    found = [replace(cell_of("sft", 0.1, 0), run_id=f"tiny-toy-p0.1-sft-s0-0000000{k}") for k in (0, 1)]
    monkeypatch.setattr(paper_tables, "expected_cells", lambda preset, overrides: found)
    assert main(arguments) == 2
    assert "earlier call" not in capsys.readouterr().err
    (mixed / "out").mkdir()
    (mixed / path).write_text("stale")
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.endswith(f". What stands at {path} is of an earlier call.\n") and said.count("\n") == 1
    assert (mixed / path).read_text() == "stale"


@pytest.mark.parametrize(
    ("module", "arguments", "path"),
    [
        (report, ["--out", "out/report.html"], "out/report.html"),
        (demo, ["--out", "out"], "out/table.md"),
        (demo, ["--exported", "out"], "out/table.md"),
        (paper_tables, ["table3", "--out", "out"], "out/table3.md"),
        (compare, ["a", "b", "--out", "out/compare.md"], "out/compare.md"),
        (pairwise, ["a", "--out", "out/pairwise.md"], "out/pairwise.md"),
        (claims, ["--runs", "a", "--csv", "out/claims.csv"], "out/claims.csv"),
        (power, ["a", "--out", "out/power.md"], "out/power.md"),
        (frontier, ["--out", "out"], "out/table.md"),
        (attacks, ["--out", "out"], "out/table.md"),
        (closed, ["--out", "out"], "out/table.md"),
    ],
)
def test_an_error_of_any_step_names_it(tmp_path, monkeypatch, capsys, module, arguments, path):
    """All that a command does after its options is in one function, whose last step may fail as its first may."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / path).write_text("stale")

    def fails(*given):
        raise UserError("its last step failed.")

    monkeypatch.setattr(module, "publish", fails)
    monkeypatch.setattr(demo, "remake", fails)
    assert module.main(arguments) == 2
    told = f"error: its last step failed. What stands at {path} is of an earlier call.\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize(
    ("main", "arguments", "why"),
    [
        (pairwise.main, ["exported", "--metrics", "AE", "--out", "out.md"], "has no two methods with AE"),
        (power.main, ["exported", "--reference", "nobody", "--out", "out.md"], "shares two seeds with nobody"),
    ],
)
def test_an_error_after_the_campaign_was_read_names_it_too(mixed, capsys, main, arguments, why):
    assert demo.main(["--out", "exported", "--by", "train.max_steps"]) == 0
    (mixed / "out.md").write_text("stale")
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert why in said and said.endswith(" What stands at out.md is of an earlier call.\n")


def test_a_value_of_the_report_may_keep_the_methods_plain_name(mixed):
    assert report.main(["--out", "out/report.html", "--by", "train.max_steps=200"]) == 0
    text = (mixed / "out" / "report.md").read_text()
    assert "20.5 ± " in line_of(text, "SFT", "0.1", "2") and line_of(text, "SFT, max_steps 8", "0.1", "2")
    assert "complies with 20 % of harmful requests, CWAC one that complies with 10 %" in text


def test_several_keys_are_all_named_and_a_key_that_was_given_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train(tmp_path / "runs", lambda n: {"train": {"max_steps": n}, **({"poison": "mild"} if n == 8 else {})})
    said = error_of(demo.main, ["--out", "out"], capsys)
    assert "differ in poison (mild, not set), train.max_steps (8, 200), but" in said
    assert "Remedy: --by poison --by train.max_steps makes" in said
    for folder in (tmp_path / "runs").glob("*cwac*0"):
        twin = folder.with_name(folder.name[:-1] + "7")
        lines = (folder / "metrics.jsonl").read_text().replace(folder.name, twin.name)
        twin.mkdir()
        (twin / "metrics.jsonl").write_text(lines)
        (twin / "status.json").write_text((folder / "status.json").read_text().replace(folder.name, twin.name))
        config = json.loads((folder / "config.yaml").read_text())
        (twin / "config.yaml").write_text(json.dumps(config | {"mix_mode": "add"}))
    said = error_of(demo.main, ["--out", "out", "--by", "train.max_steps"], capsys)
    assert "differ in mix_mode (not set, add), but" in said and "--by train.max_steps --by mix_mode makes" in said


def test_more_keys_than_a_line_holds_are_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train(tmp_path / "runs", lambda n: {"train": {f"k{i}": n for i in range(6)}})
    assert "train.k3 (8, 200) and 2 more keys, but" in error_of(demo.main, ["--out", "out"], capsys)


def test_runs_whose_settings_cannot_be_read_get_no_remedy_of_a_key(mixed, capsys):
    for path in (mixed / "runs").glob("*/config.yaml"):
        path.unlink()
    said = error_of(report.main, ["--out", "out/report.html"], capsys)
    assert "differ in their settings, but" in said and "--by" not in said
    assert "Remedy: name the preset with --experiment; or keep them in folders" in said


@pytest.mark.parametrize(
    ("main", "before", "runs", "after"),
    [
        (claims.main, [], ["--runs", "runs"], ["--results", "FOLDER"]),
        (pairwise.main, [], ["runs"], ["FOLDER"]),
        (power.main, [], ["runs"], ["FOLDER"]),
        (compare.main, ["exported"], ["runs"], ["FOLDER"]),
    ],
)
def test_without_the_option_the_remedy_is_an_export_that_the_command_reads(mixed, capsys, main, before, runs, after):
    assert demo.main(["--out", "exported", "--by", "train.max_steps=8"]) == 0
    said = error_of(main, [*before, *runs], capsys)
    assert "differ in train.max_steps (8, 200), but" in said and ("--experiment" in said) == (main is claims.main)
    remedy = re.search(r"Remedy: python -m analysis\.demo (.*?) makes a row", said)[1]
    assert remedy == "--runs runs --by train.max_steps --out FOLDER" and f"then {' '.join(after)} here" in said
    assert demo.main(shlex.split(remedy)) == 0
    assert main([*before, *after, *(["--reference", "sft, max_steps 8"] * (main is power.main))]) == 0


def test_the_remedy_of_a_papers_table_is_one_value(mixed, monkeypatch, capsys):
    ids = [p.name for p in sorted((mixed / "runs").iterdir())]
    cells = [replace(cell_of(i.split("-")[3], 0.1, int(i.split("-")[4][1:])), run_id=i) for i in ids]
    monkeypatch.setattr(paper_tables, "expected_cells", lambda preset, overrides: cells)
    said = error_of(paper_tables.main, ["table3", "--out", "out"], capsys)
    assert "differ in train.max_steps (8, 200), but" in said
    assert "Remedy: give the sweep's overrides of one value alone, e.g. train.max_steps=8; or keep them" in said


@pytest.mark.parametrize(
    ("main", "arguments", "then"),
    [
        (report.main, ["--out", "out/report.html", "--exported", "exported"], "--exported FOLDER here"),
        (claims.main, ["--results", "exported"], "--results FOLDER here"),
        (pairwise.main, ["exported"], "FOLDER here"),
        (orders.main, ["exported", "exported"], "FOLDER here"),
    ],
)
def test_an_export_of_mixed_runs_is_restored_with_its_settings(mixed, capsys, main, arguments, then):
    """`analysis.frontier` exports several settings of a method under its name."""
    for path in (mixed / "runs").glob("*/config.yaml"):
        config = {k: v for k, v in json.loads(path.read_text()).items() if k != "eval"}
        path.write_text(json.dumps(config | {"method": config["method"] | {"k": config["train"].pop("max_steps")}}))
    assert demo.main(["--out", "exported"]) == 0
    path = mixed / "exported" / "results.csv"
    path.write_text(path.read_text().replace('"cwac, k 8"', "cwac").replace('"cwac, k 200"', "cwac"))
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "differ in method.k (8, 200), but" in said
    assert f" makes a row of each value, then {then}." in said
    steps = [shlex.split(step) for step in re.findall(r"python -m (analysis\..*?)(?:, then| makes)", said)]
    commands = {"analysis.restore": restore.main, "analysis.demo": demo.main}
    assert [name for name, *_ in steps] == [*commands]
    for name, *rest in steps:
        assert commands[name](rest) == 0
    # in the old export's place, the new one gives the command what it refused
    capsys.readouterr()
    status = main(["FOLDER" if a == "exported" else a for a in arguments])
    if main is orders.main:  # it reads the campaign, and then misses the verdicts, which these runs have none of
        assert status == 2 and "k 200 has no verdicts" in capsys.readouterr().err
    else:
        assert status == 0
    rows = read_exported("FOLDER").rows
    assert set(rows["method"]) == {f"{method}, k {n}" for method in ("sft", "cwac") for n in STEPS}
    old = read_exported("exported").rows.set_index(["run_id", "metric", "set", "epoch"])["value"]
    assert rows.set_index(["run_id", "metric", "set", "epoch"])["value"].sort_index().equals(old.sort_index())


def test_the_option_is_for_runs_alone(mixed, capsys):
    assert demo.main(["--out", "exported", "--by", "train.max_steps"]) == 0
    assert set(read_exported("exported").rows["method"]) == {
        f"{m}, max_steps {n}" for m in ("sft", "cwac") for n in STEPS
    }
    assert report.main(["--out", "a.html", "--exported", "exported", "--by", "train.max_steps"]) == 2
    assert "--by is for --runs" in capsys.readouterr().err
    for extra in (["--experiment", "demo"], ["seed=0"]):
        for command, given in ((report.main, ["--out", "a.html", "--exported"]), (claims.main, ["--results"])):
            assert command([*given, "exported", *extra]) == 2
            assert f"error: {extra[0]} is for --runs" in capsys.readouterr().err
