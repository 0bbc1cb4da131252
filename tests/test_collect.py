"""Reading runs back, one function at a time, on rows and folders made by hand."""

import json
import math
import re
from dataclasses import replace

import pandas as pd
import pytest
from filelock import FileLock

from analysis import collect as reading
from analysis.collect import Cell, Collection, collect, tidy
from cwac.core.errors import UserError
from cwac.core.identity import eval_id, run_id
from tests.helpers.results import cell_of, row, write_run

GONE = "running, but its process has gone: the same command goes on from its last checkpoint"


def configure(folder, text: str):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(text)
    return folder


# --- cells and their names ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tiny-toy-p0.1-sft-s3-0badcafe", ("tiny", "toy", 0.1, "sft", 3)),
        ("smollm2-v2-sst2-p1e-05-weight_only-s12-00000000", ("smollm2-v2", "sst2", 1e-5, "weight_only", 12)),
        ("tiny-toy-p0-sft-s0-x", ("tiny", "toy", 0.0, "sft", 0)),
        ("tiny-toy-p0.1-sft-s3", None),
        ("tiny-toy-p0.1-sft-s3-0badcafe.old-1", None),
        ("tiny-toy-plain-sft-s3-0badcafe", None),
        ("", None),
    ],
)
def test_a_runs_id_names_its_cell(name, expected):
    found = reading.cell_of(name)
    if expected is None:
        assert found is None and reading.method_of(name) == "unknown"
    else:
        assert (found.model, found.task, found.harmful_ratio, found.method, found.seed) == expected
        assert (found.run_id, found.eval, found.values, reading.method_of(name)) == (name, "", "", expected[3])


@pytest.mark.parametrize(("values", "method"), [("", "cwac"), ("official", "cwac"), ("tuned", "cwac values=tuned")])
def test_a_cell_is_written_as_the_command_that_trains_it(values, method):
    cell = replace(cell_of("cwac", 0.1, 2), values=values)
    assert str(cell) == f"model=tiny task=toy method={method} p=0.1 seed=2"


def test_the_cell_of_a_configuration():
    cfg = reading.expected_configs("demo", ["seed=5", "method=sft", "harmful_ratio=0.1"])[0]
    assert reading.cell_from(cfg) == Cell(
        run_id(cfg), cfg.model.name, "sft", cfg.task.name, 0.1, 5, eval_id(cfg), cfg["values"]
    )
    assert reading.cell_from(cfg).values == "official"
    assert reading.expected_cells("demo", ["seed=5", "method=sft", "harmful_ratio=0.1"]) == [reading.cell_from(cfg)]


def test_a_preset_that_does_not_compose_is_one_line():
    for preset, overrides in (("nothing_of_this_name", []), ("demo", ["seeed=1"])):
        with pytest.raises(UserError) as error:
            reading.expected_cells(preset, overrides)
        said = str(error.value)
        assert said.startswith(f"experiment={preset} does not compose: ") and "\n" not in said and ".." not in said
        assert said.endswith(". Remedy: a preset of conf/experiment/, with the overrides its sweep was started with.")


# --- the files of one run -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "evaluation", "expected"),
    [
        ('{"status": "done", "run_id": "me"}', "", "done"),
        ('{"status": "done"}', "", "done"),  # older runs do not name their owner
        ('{"status": "done", "run_id": "me", "evaluations": ["e1", "e2"]}', "e2", "done"),
        (
            '{"status": "done", "run_id": "me", "evaluations": ["e1"]}',
            "e2",
            "done, but not with this preset's evaluation settings",
        ),
        ('{"status": "done"}', "e2", "done, but not with this preset's evaluation settings"),
        ('{"status": "failed", "run_id": "me"}', "e2", "failed"),
        ('{"status": "running", "run_id": "me"}', "", GONE),
        ('{"status": "done", "run_id": "another"}', "", "set aside by force=true"),
        ('{"status": "running", "run_id": "another"}', "", "set aside by force=true"),
        ('{"run_id": "me"}', "", "unknown (no readable status.json)"),
        ('{"status": "do', "", "unknown (no readable status.json)"),
        ("[1]", "", "unknown (no readable status.json)"),
        (None, "", "unknown (no readable status.json)"),
    ],
)
def test_only_a_status_of_done_counts(tmp_path, content, evaluation, expected):
    folder = tmp_path / "me"
    folder.mkdir()
    if content:
        (folder / "status.json").write_text(content)
    status, found = reading.read_status(folder, evaluation) if evaluation else reading.read_status(folder)
    assert (status, found) == (expected, {} if "unknown" in expected else json.loads(content))


def test_a_run_whose_process_lives_is_running(tmp_path):
    (tmp_path / "me").mkdir()
    (tmp_path / "me" / "status.json").write_text('{"status": "running", "run_id": "me"}')
    with FileLock(tmp_path / ".me.lock"):
        assert reading.read_status(tmp_path / "me")[0] == "running"
    assert reading.read_status(tmp_path / "me")[0] == GONE


def test_damaged_lines_are_counted_wherever_they_stand(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"met\n\n{"metric": "HS", "value": 1}\n   \n{"value": 2}\n[1]\n{"metric": "F\xff"}\n'
        b'{"metric": "FA", "value": 3, "crc": "00000000"}\n{"metric": "OR", "value": 4}\n{"metric": "HS", "va'
    )
    rows, bad = reading.read_rows(path)
    assert rows == [
        {"metric": "HS", "value": 1},
        {"metric": "F\N{REPLACEMENT CHARACTER}"},
        {"metric": "OR", "value": 4},
    ]
    assert bad == 5


@pytest.mark.parametrize(
    ("text", "rate", "settings"),
    [
        ("train: {learning_rate: 2e-05}", 2e-5, {"train.learning_rate": "2e-05"}),
        ("train: {learning_rate: 0.5}", 0.5, {"train.learning_rate": 0.5}),
        ("train: {epochs: 3}", math.nan, {"train.epochs": 3}),
        ("train: {learning_rate: fast}", math.nan, {"train.learning_rate": "fast"}),
        ("train: {learning_rate: [1]}", math.nan, {"train.learning_rate": [1]}),
        ("", math.nan, {}),
        ("just text", math.nan, {}),
        ("train: {learning", math.nan, {}),
        (None, math.nan, {}),
    ],
)
def test_a_runs_configuration_is_read_or_missing(tmp_path, text, rate, settings):
    if text is not None:
        configure(tmp_path, text)
    assert reading.learning_rate(tmp_path) == pytest.approx(rate, nan_ok=True)
    assert reading.settings_of(tmp_path) == settings


def test_settings_are_named_as_tables_print_them():
    assert [reading.text_of(v) for v in (1e-4, 0.1, 2.0, 3, "all", True, None)] == [
        "0.0001",
        "0.1",
        "2",
        "3",
        "all",
        "True",
        "None",
    ]


@pytest.mark.parametrize(
    ("data", "env", "expected"),
    [
        (
            {"datasets": {"toy": {"sha256": "aa", "n": 3}, "pool": {"sha256": "bb"}}},
            {"model": {"hub_id": "org/it", "revision": "c0"}},
            {"toy": "aa", "pool": "bb", "org/it (model)": "c0"},
        ),
        ({"datasets": {}}, {"model": {"hub_id": "org/it", "revision": None}}, {}),
        (None, {"model": {"hub_id": None, "revision": "c0"}}, {}),
        (None, {"model": {"hub_id": "org/it", "revision": "c0"}}, {"org/it (model)": "c0"}),
        ({"other": 1}, {"model": None}, {}),
        ({"datasets": {"toy": {"sha256": "aa"}}}, [], {"toy": "aa"}),
        (None, None, {}),
    ],
)
def test_what_a_run_read(tmp_path, data, env, expected):
    for name, content in (("data", data), ("env", env)):
        if content is not None:
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert reading.data_sets(tmp_path) == expected


def test_versions_of_a_data_set_are_named_and_never_averaged():
    a, b = (f"tiny-toy-p0.1-sft-s{seed}-0000000{seed}" for seed in (0, 1))
    c = "tiny-toy-p0.2-sft-s0-00000002"
    same = {a: {"toy": "x", "pool": "y"}, b: {"toy": "x"}, c: {"toy": "x", "pool": "y"}}
    assert reading.mixed_data(same) == [] and reading.mixed_data({}) == []
    other = {**same, c: {"toy": "z", "pool": "w"}}
    assert reading.mixed_data(other) == [
        f"pool: 2 versions of its rows, first in {a} and {c}",
        f"toy: 2 versions of its rows, first in {a} and {c}",
    ]
    with pytest.raises(UserError) as error:
        reading.mixed_data({**same, b: {"toy": "z"}})
    assert str(error.value) == (
        f"toy was another one for each of these: {a}, {b}. They are no seeds of one experiment. Remedy: train the "
        "older ones again with force=true, or keep them in folders of their own (paths.runs)."
    )


# --- a folder of runs -----------------------------------------------------------------------------------


def test_what_is_left_out_is_said(tmp_path):
    whole, bad, cut, leaky, empty, failed = (cell_of("sft", 0.1, seed) for seed in range(6))
    for cell in (whole, bad, cut, leaky, failed):
        rows = [row(cell, "FA", 50.0), row(cell, "weight_leak", 0.1, set="anchors")]
        write_run(tmp_path, cell, rows, "failed" if cell is failed else "done", "{" if cell is bad else "")
    write_run(tmp_path, empty, [])
    for cell, more in ((cut, {"rows": 5}), (leaky, {"rows": 2, "guard": False}), (whole, {"guard": True})):
        path = tmp_path / cell.run_id / "status.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
    (tmp_path / "notes").mkdir()
    found = collect(str(tmp_path))
    assert found.runs == [c.run_id for c in (whole, bad, cut, leaky)]
    assert found.unreadable == {bad.run_id: 1, cut.run_id: 3} and found.leaking == [leaky.run_id]
    assert found.unfinished == {
        empty.run_id: "done, but without a readable metric row",
        failed.run_id: "failed",
    }
    assert len(found.rows) == 8 and found.rows["learning_rate"].isna().all() and not found.expected
    (tmp_path / whole.run_id / "metrics.jsonl").unlink()
    found = collect(tmp_path)
    assert found.unfinished[whole.run_id] == "done, but without a readable metric row"
    assert whole.run_id not in found.unreadable  # no line is damaged where there is no file


def test_a_preset_chooses_runs_evaluations_and_what_their_values_are_called(tmp_path):
    mine, other, gone = cell_of("sft", 0.1, 0), cell_of("sft", 0.1, 1), cell_of("sft", 0.1, 2)
    rows = [row(mine, "FA", 1.0), row(mine, "FA", 2.0, eval="e2"), row(mine, "OR", 3.0, eval="")]
    configure(write_run(tmp_path, mine, rows), "train: {learning_rate: 1e-3}")
    write_run(tmp_path, other, [row(other, "FA", 9.0)])
    found = collect(tmp_path, [replace(mine, values="tuned"), gone])
    assert found.rows["value"].tolist() == [1.0, 3.0] and set(found.rows["values"]) == {"tuned"}
    assert found.rows["learning_rate"].tolist() == [1e-3, 1e-3] and found.missing == [gone]
    found = collect(tmp_path, iter([replace(mine, eval="")]))
    assert found.rows["value"].tolist() == [1.0, 2.0, 3.0] and set(found.rows["values"]) == {"official"}
    found = collect(tmp_path, [replace(mine, eval="e2")])
    assert found.unfinished == {mine.run_id: "done, but not with this preset's evaluation settings"}
    assert set(collect(tmp_path).rows["values"]) == {"official"}  # as the rows say, from before there were others
    with pytest.raises(UserError) as error:
        collect(tmp_path / "none")
    assert str(error.value) == (
        f"--runs {tmp_path / 'none'} is not a folder. Remedy: run the campaign first, or name its runs folder."
    )


def test_data_that_changed_between_cells_is_noted(tmp_path):
    for k, ratio in enumerate((0.1, 0.2)):
        cell = cell_of("sft", ratio, 0)
        folder = write_run(tmp_path, cell, [row(cell, "FA", 1.0)])
        (folder / "data.json").write_text(json.dumps({"datasets": {"toy": {"sha256": str(k)}}}))
    (note,) = collect(tmp_path).account()
    assert note.startswith("toy: 2 versions of its rows")


def test_the_account_is_a_line_for_each_thing_a_reader_must_know():
    assert Collection(pd.DataFrame()).account() == []
    ids = [cell_of(method, 0.1, seed).run_id for method, seed in (("cwac", 1), ("bea", 0), ("cwac", 0))]
    found = Collection(pd.DataFrame(), unfinished={"x": "failed", "y": GONE}, unreadable={"z": 2}, duplicates=3)
    found.leaking, found.notes = ids, ["as exported"]
    lines = [
        "as exported",
        "3 duplicate rows (the last one of each was kept)",
        "z: 2 unreadable or lost line(s) in metrics.jsonl",
        f"bea: 1 run(s) leak more than the weight constraint allows, first {ids[1]} (weight_leak_excess)",
        f"cwac: 2 run(s) leak more than the weight constraint allows, first {ids[0]} (weight_leak_excess)",
    ]
    assert found.account() == [*lines, "x: not read, its status is failed", f"y: not read, its status is {GONE}"]
    found.expected = [replace(cell_of("sft", 0.1, 0), run_id="x")]
    assert found.account() == [*lines, "x: not read, its status is failed"]  # of the preset's runs only


def test_verdicts_are_those_behind_the_last_evaluation(tmp_path):
    cell = cell_of("sft", 0.1, 0)
    fields = {"set": "harmful", "judge": "keyword"}
    rows = [
        row(cell, "HS", 1.0, step=30, final=False, **fields),
        row(cell, "HS", 2.0, **fields),
        row(cell, "HS", 3.0, eval="e2", time=5.0, **fields),
        row(cell, "refusal", 3.0, eval="e3", time=9.0, **fields),
        row(cell, "HS", 4.0, set="harmful", judge="later"),
        row(cell, "HS", 5.0, set="gone", judge="keyword"),
    ]
    folder = tmp_path / cell.run_id / "judge"
    (folder / "later").mkdir(parents=True)

    def write(name: str, *answers):
        keys = ("id", "verdict", "judge")
        lines = [a if isinstance(a, str) else json.dumps(dict(zip(keys, a, strict=True))) for a in answers]
        (folder / name).write_text("\n".join(lines))

    for name in ("harmful@30-e1", "harmful@90-e3"):
        write(f"{name}.jsonl", ("old", "harmful", "keyword"))
    write("harmful@90-e1.jsonl", ("old", "harmful", "keyword"))
    write(
        "harmful@90-e2.jsonl",
        ("a", "harmful", "keyword"),
        "[]",
        '{"id": "b", "judge": "keyword"}',
        ("c", "refusal", "another"),
        (7, "refusal", "keyword"),
        ("a", "refusal", "keyword"),
        '{"id": "d", "ver',
    )
    with (folder / "harmful@90-e2.jsonl").open("ab") as file:
        file.write(b"\xff")  # not even text
    write("later/harmful@90-e1.jsonl", ("a", "other", "later"))
    found = reading.read_verdicts(tmp_path, tidy(rows)[0])
    assert list(found.columns) == ["run_id", "set", "judge", "id", "verdict"]
    assert found.to_numpy().tolist() == [
        [cell.run_id, "harmful", "keyword", "a", "harmful"],
        [cell.run_id, "harmful", "keyword", "7", "refusal"],
        [cell.run_id, "harmful", "later", "a", "other"],
    ]
    none = reading.read_verdicts(tmp_path, tidy(rows[:1])[0])
    assert none.empty and list(none.columns) == list(found.columns)


# --- several settings of one method ---------------------------------------------------------------------


def sweep(tmp_path, settings: list[str], seeds=(0,)) -> Collection:
    for seed in seeds:
        for k, text in enumerate(settings):
            cell = cell_of("cwac", 0.1, seed)
            cell = replace(cell, run_id=f"{cell.run_id[:-1]}{k}")
            configure(write_run(tmp_path, cell, [row(cell, "FA", 50.0)]), text)
    return collect(tmp_path)


@pytest.mark.parametrize(
    ("keys", "methods"),
    [
        (["method.weight.energy"], ["cwac, energy 0.9", "cwac, energy 0.99"]),
        (["method.weight.energy=9e-1"], ["cwac", "cwac, energy 0.99"]),
        (["train.learning_rate"], ["cwac, rate 0.001", "cwac, rate 0.002"]),
        (["method.weight.energy", "train.learning_rate=1e-3"], ["cwac, energy 0.9", "cwac, energy 0.99, rate 0.002"]),
        (
            ["method.weight.rank", "method.activation.rank"],
            [
                "cwac, method.weight.rank 2, method.activation.rank 4",
                "cwac, method.weight.rank 2, method.activation.rank 4",
            ],
        ),
        (["method.only"], ["cwac, only x", "cwac"]),
    ],
)
def test_settings_become_methods_of_their_own(tmp_path, keys, methods):
    both = "weight: {{energy: {}, rank: 2}}, activation: {{rank: 4}}"
    found = sweep(
        tmp_path,
        [
            f"method: {{{both.format(0.9)}, only: x}}\ntrain: {{learning_rate: 1.0e-3}}",
            f"method: {{{both.format(0.99)}}}\ntrain: {{learning_rate: 2.0e-3}}",
        ],
    )
    found.expected = [replace(cell_of("cwac", 0.1, 0), run_id=name) for name in [*found.runs, "not-run"]]
    made = reading.split(found, tmp_path, keys)
    assert made.rows["method"].tolist() == methods
    assert [c.method for c in made.expected] == [*methods, "cwac"]
    assert found.rows["method"].tolist() == ["cwac", "cwac"]


def test_a_missing_runs_setting_is_known_from_the_preset(tmp_path):
    found = sweep(tmp_path, ["method: {weight: {energy: 0.9}}"])
    (cfg,) = reading.expected_configs("demo", ["seed=5", "method=cwac", "harmful_ratio=0.1"])
    cfg.method.weight.energy = "${harmful_ratio}"
    found.expected = [reading.cell_from(cfg)]
    made = reading.split(found, tmp_path, ["method.weight.energy"], [cfg])
    assert [c.method for c in made.expected] == ["cwac, energy 0.1"]


def test_a_key_of_no_run_is_refused_with_those_there_are(tmp_path):
    found = sweep(tmp_path, ["method: {name: cwac, b: 1}\ntrain: {epochs: 1}", "method: {a: 1}"])
    with pytest.raises(UserError) as error:
        reading.split(found, tmp_path, ["method.c=3"])
    assert str(error.value) == "--by method.c: no run has this key. Remedy: one of method.a, method.b."
    with pytest.raises(UserError, match=re.escape("Remedy: one of (none).")):
        reading.split(Collection(tidy([])[0]), tmp_path, ["method.c"])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["method: {a: 1, b: {c: 1}}", "method: {a: 1, b: {c: 2}}"], ["method.b.c"]),
        (["method: {a: 1, b: 1}", "method: {a: 2, b: 1}", "method: {a: 2, b: 3}"], ["method.a", "method.b"]),
        (["method: {a: 1}", "method: {}"], ["method.a"]),
        (["method: {a: 1}", "method: {a: '1'}"], ["method.a"]),
        (["method: {a: 1}\nforce: true\npaths: {runs: x}", "method: {a: 2}\nforce: false"], ["method.a"]),
        (["method: {a: 1}\ntrain: {epochs: 1}", "method: {a: 2}\ntrain: {epochs: 2}"], []),
        (["method: {a: 1}\nforce: true", "method: {a: 1}"], []),
        (["method: {a: 1}"], []),
    ],
)
def test_the_keys_in_which_runs_of_one_cell_differ(tmp_path, settings, expected):
    found = sweep(tmp_path, settings, seeds=(0, 1))
    assert reading.own_keys(found, tmp_path) == expected


def test_every_cell_may_differ_in_keys_of_its_own(tmp_path):
    for ratio, key in ((0.1, "a"), (0.2, "b")):
        for value in (1, 2):
            cell = cell_of("cwac", ratio, 0)
            cell = replace(cell, run_id=f"{cell.run_id[:-1]}{value}")
            configure(write_run(tmp_path, cell, [row(cell, "FA", 1.0)]), f"method: {{{key}: {value}}}")
    assert reading.own_keys(collect(tmp_path), tmp_path) == ["method.a", "method.b"]


def test_runs_of_other_cells_have_no_keys_in_common(tmp_path):
    for ratio, energy in ((0.1, 0.9), (0.2, 0.99)):
        cell = cell_of("cwac", ratio, 0)
        configure(write_run(tmp_path, cell, [row(cell, "FA", 1.0)]), f"method: {{energy: {energy}}}")
    assert reading.own_keys(collect(tmp_path), tmp_path) == []


# --- tables of rows -------------------------------------------------------------------------------------


def test_rows_get_their_types_and_the_last_of_equals():
    cell = cell_of("sft", 0.1, 0)
    rows = [
        row(cell, "HS", "12.5", harmful_ratio=0.1 + 0.2, judge=None, eval=537439, final="True", values=None),
        row(cell, "HS", "oops", harmful_ratio="0.3", seed="1", final="no", values="tuned", epoch=None),
        row(cell, "HS", 13.5, time=0.0, judge=None, eval="537439", final=True),
    ]
    found, duplicates = tidy(rows)
    assert list(found.columns) == reading.COLUMNS and list(found.index) == [0, 1] and duplicates == 1
    assert found["value"].tolist()[1] == 13.5 and math.isnan(found["value"][0])
    assert found["harmful_ratio"].tolist() == [0.3, 0.1] and found["seed"].tolist() == [1, 0]
    assert found["seed"].dtype == "Int64" and found["final"].tolist() == [False, True] and found["final"].dtype == bool
    assert found["values"].tolist() == ["tuned", "official"] and found["judge"].tolist() == ["", ""]
    assert found["eval"].tolist() == ["e1", "537439"]
    for column in reading.NUMBERS:
        assert found[column].dtype == float or found[column].dtype == int, column
    none, duplicates = tidy([])
    assert list(none.columns) == reading.COLUMNS and none.empty and duplicates == 0


def test_a_csvs_text_stays_text(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("run_id,eval,judge,value,seed,set,n\n007,94e947,,12.5,3,NA,\n1e5,537439,None,x,,true,2\n")
    found = reading.read_csv(path)
    assert found["run_id"].tolist() == ["007", "1e5"] and found["eval"].tolist() == ["94e947", "537439"]
    assert found["set"].tolist() == ["NA", "true"]
    assert found["judge"].isna().tolist() == [True, False] and found["judge"][1] == "None"
    assert found["value"][0] == 12.5 and math.isnan(found["value"][1])
    assert found["seed"][0] == 3 and math.isnan(found["n"][0]) and found["n"][1] == 2


def export(folder, records: list[dict], provenance: str = "{}"):
    tidy(records)[0].to_csv(folder / "results.csv", index=False)
    (folder / "provenance.json").write_text(provenance)
    return reading.read_exported(str(folder))


def test_an_exported_campaign_knows_what_it_lacked(tmp_path):
    cell, gone = cell_of("cwac", 0.1, 0), cell_of("cwac", 0.1, 1)
    records = [row(cell, "HS", 1.0, method="cwac, energy 0.9"), row(cell, "FA", 2.0, method="cwac, energy 0.9")]
    record = {
        "experiment": "demo",
        "missing": [gone.run_id, "no id"],
        "left_out": ["one line"],
        "by": {"missing": {gone.run_id: "cwac, energy 0.99"}},
    }
    found = export(tmp_path, records, json.dumps(record))
    assert found.runs == [cell.run_id] and found.rows["value"].tolist() == [1.0, 2.0] and found.duplicates == 0
    assert found.account() == ["one line"] and found.verdicts.empty
    assert [(c.run_id, c.method) for c in found.expected] == [
        (cell.run_id, "cwac, energy 0.9"),
        (gone.run_id, "cwac, energy 0.99"),
    ]
    assert [c.run_id for c in found.missing] == [gone.run_id]
    pd.DataFrame([["r", "s", "j", "007", ""]], columns=reading.VERDICT_COLUMNS).to_csv(
        tmp_path / "verdicts.csv.gz", index=False
    )
    found = export(tmp_path, records, json.dumps({**record, "by": None}))
    assert found.verdicts.to_numpy().tolist() == [["r", "s", "j", "007", ""]]
    assert [c.method for c in found.expected] == ["cwac, energy 0.9", "cwac"]
    for provenance in ("{}", "{", '{"experiment": null, "missing": ["x"]}'):
        found = export(tmp_path, records, provenance)
        assert found.expected == [] and found.notes == []


def test_an_export_without_its_table_is_refused_and_one_from_before_a_column_is_not(tmp_path):
    remedy = "Remedy: a folder written by python -m analysis.demo, such as results/demo."
    with pytest.raises(UserError) as error:
        reading.read_exported(tmp_path)
    assert str(error.value) == f"{tmp_path} holds no readable results.csv. {remedy}"
    frame = tidy([row(cell_of("sft", 0.1, 0), "HS", 1.0)])[0]
    twice = pd.concat([frame, frame]).drop(columns=["values", "learning_rate"])
    twice.to_csv(tmp_path / "results.csv", index=False)
    found = reading.read_exported(tmp_path)
    assert found.duplicates == 1
    assert found.rows["values"].tolist() == ["official"] and found.rows["learning_rate"].isna().all()
    frame.drop(columns=["model", "n"]).to_csv(tmp_path / "results.csv", index=False)
    with pytest.raises(UserError) as error:
        reading.read_exported(tmp_path)
    assert str(error.value) == f"{tmp_path}/results.csv lacks the columns model, n. {remedy}"


def test_the_end_is_the_latest_evaluation_of_each_number():
    cell = cell_of("sft", 0.1, 0)
    rows = [
        row(cell, "HS", 9.0, final=False, step=30, time=99.0),
        row(cell, "HS", 3.0, eval="e2", time=7.0),
        row(cell, "HS", 2.0, time=5.0),
        row(cell, "HS", 4.0, set="other", time=1.0),
        row(cell, "HS", 5.0, judge="late", time=1.0),
        row(cell, "FA", 6.0, time=1.0),
    ]
    assert reading.at_end(tidy(rows)[0])["value"].tolist() == [3.0, 4.0, 5.0, 6.0]


def test_runs_that_differ_in_an_unknown_way_are_no_seeds():
    cell, seed = cell_of("sft", 0.1, 0), cell_of("sft", 0.1, 1)
    twin = replace(cell, run_id=f"{cell.run_id[:-1]}1")
    rows = tidy(
        [row(twin, "FA", 1.0, learning_rate=1e-3), row(cell, "FA", 2.0, learning_rate=1e-5), row(seed, "FA", 3.0)]
    )[0]
    with pytest.raises(UserError) as error:
        reading.at_end(rows)
    assert str(error.value) == (
        "these runs differ in their settings, but not in model, task, ratio, method and seed: "
        f"{cell.run_id}, {twin.run_id}. Remedy: python -m analysis.demo --by KEY makes a row of each value of a key "
        "in which they differ; or keep them in folders of their own (paths.runs)."
    )
    assert len(reading.at_end(rows, ["learning_rate"])) == 3
    assert len(reading.at_end(rows.assign(model=["a", "b", "a"]))) == 3


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ["learning_rate"]),
        ({"learning_rate": 1e-3}, []),
        ({"learning_rate": None}, []),  # not read: no second rate
        ({"seed": 1}, []),
        ({"method": "cwac"}, []),
        ({"model": "small"}, []),
        ({"task": "sst2"}, []),
        ({"harmful_ratio": 0.2}, []),
        ({"final": False}, []),
    ],
)
def test_a_sweep_over_learning_rates_is_noticed(changes, expected):
    cell = cell_of("sft", 0.1, 0)
    rows = [row(cell, "FA", 1.0, learning_rate=1e-3)]
    rows.append({**row(replace(cell, run_id="other"), "FA", 1.0, learning_rate=1e-5), **changes})
    assert reading.swept(tidy(rows)[0]) == expected
    assert reading.swept(tidy([])[0]) == []


def clock(steps: dict[int, list[float]], method: str = "sft", ratio: float = 0.1) -> list[dict]:
    return [
        row(cell_of(method, ratio, seed), "HS", float(seed), step=step, epoch=float(epoch), final=False)
        for seed, points in steps.items()
        for epoch, step in enumerate(points)
    ]


def test_seeds_of_unequal_epochs_share_their_mean_step():
    found = reading.one_clock(tidy(clock({0: [0, 10, 20], 1: [0, 11, 22], 2: [0, 11, 23]}))[0])
    assert found["step"].tolist() == [0, 10.7, 21.7] * 3
    assert found["value"].tolist() == [0.0] * 3 + [1.0] * 3 + [2.0] * 3
    unknown = reading.one_clock(tidy(clock({0: [0, 10], 1: [0, 12]}, ratio=math.nan))[0])  # of an imported run
    assert unknown["step"].tolist() == [0, 11, 0, 11]


def test_steps_that_are_shared_stay_and_other_cells_are_left_alone():
    rows = [*clock({0: [0, 10], 1: [0, 12]}), *clock({0: [5, 6], 1: [5, 6]}, "cwac")]
    rows += clock({0: [0, 100]}, ratio=0.2)  # one seed
    found = reading.one_clock(tidy(rows)[0])
    assert found["step"].tolist() == [0, 11, 0, 11, 5, 6, 5, 6, 0, 100]
    # a metric measured once more at a point does not weigh more, and a row without an epoch keeps its step
    twice = [*clock({0: [0, 10], 1: [0, 12]}), row(cell_of("sft", 0.1, 0), "FA", 1.0, step=10, epoch=1.0)]
    twice.append(row(cell_of("sft", 0.1, 0), "FA", 1.0, step=77, epoch=None))
    assert reading.one_clock(tidy(twice)[0])["step"].tolist() == [0, 11, 0, 11, 11, 77]


def test_the_aligned_model_is_measured_once_a_seed_by_sft_where_it_can_be():
    def start(method, value, seed=0, **fields):
        fields = {"epoch": 0, "step": 0, "final": False, "set": "harmful", "judge": "keyword", **fields}
        return row(cell_of(method, fields.pop("p", 0.1), seed), fields.pop("metric", "HS"), value, **fields)

    rows = [
        start("sft", 1.0),
        start("lisa", 2.0),
        start("bea", 3.0),
        start("sft", 4.0, seed=1),
        start("sft", 5.0, set="other"),
        start("lisa", 6.0, metric="FA"),
        start("lisa", 7.0, metric="weight_leak"),  # no percentage
        start("lisa", 8.0, metric="OR", final=True),
        start("lisa", 9.0, metric="OR", epoch=1.0),
        row(cell_of("bea", 0.1, 0), "extra_data", 20.0, set="trigger", n=None),
        row(cell_of("lisa", 0.1, 0), "extra_data", 20.0, set="refusals", n=None),
    ]
    found = reading.before(tidy(rows)[0])
    assert sorted(found["value"]) == [1.0, 4.0, 5.0, 6.0] and list(found.columns) == reading.COLUMNS
    assert reading.before(tidy(rows[1:3] + rows[9:])[0])["value"].tolist() == [2.0]
    assert reading.before(tidy([rows[2], rows[1], *rows[9:]])[0])["value"].tolist() == [2.0]
    assert reading.before(tidy([rows[2], rows[9]])[0])["value"].tolist() == [3.0]


def test_one_judges_rows_stand_beside_those_of_none():
    cell = cell_of("sft", 0.1, 0)
    rows = tidy([row(cell, "HS", 1.0, judge="a"), row(cell, "FA", 2.0), row(cell, "HS", 3.0, judge="b")])[0]
    assert reading.one_judge(rows, "b")["value"].tolist() == [2.0, 3.0]
    assert reading.one_judge(rows[:2])["value"].tolist() == [1.0, 2.0]
    assert reading.one_judge(rows[1:2])["value"].tolist() == [2.0]
    for chosen, judge, says in (
        (rows, None, "these runs were judged by a, b. Remedy: choose one with --judge."),
        (rows, "c", "--judge c made no row here. Remedy: one of a, b."),
        (rows[1:2], "c", "--judge c made no row here. Remedy: one of (none)."),
    ):
        with pytest.raises(UserError) as error:
            reading.one_judge(chosen, judge)
        assert str(error.value) == says


def pool(*values, **fields) -> pd.DataFrame:
    """What is pooled of values (set, value, n)."""
    cell = cell_of("sft", 0.1, 0)
    rows = [row(cell, "HS", v, set=name, n=n, judge="keyword", stderr=1.0, **fields) for name, v, n in values]
    rows.append(row(cell, "FA", 70.0))
    return reading.pooled(tidy(rows)[0])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([("a", 30, 200), ("b", 80, 50)], [("all", 40, 250)]),
        ([("a", 30, None), ("b", 80, 50)], [("all", 55, None)]),  # weigh alike
        ([("a", 30, 200)], [("a", 30, 200)]),
        ([("a", 30, 200), ("b", None, 50)], [("all", 30, 200)]),
        ([("a", None, 200), ("b", None, 50)], []),
        (
            [("a", 30, 10), ("b", 50, 10), ("a+prefill", 60, 10), ("b+prefill", 80, 30)],
            [("all", 40, 20), ("all+prefill", 75, 40)],
        ),
        ([("a", 30, 10), ("b", 50, 10), ("a+prefill", 60, 10)], [("a+prefill", 60, 10), ("all", 40, 20)]),
        ([("a+x+y", 30, 10), ("b+x+y", 50, 10), ("b+x", 10, 1)], [("all+x+y", 40, 20), ("b+x", 10, 1)]),
    ],
)
def test_sets_of_harmful_prompts_are_pooled_by_prompts(values, expected):
    found = pool(*values)
    hs = found[found["metric"] == "HS"].sort_values("set")
    assert list(found.columns) == reading.COLUMNS and found.loc[found["metric"] == "FA", "value"].tolist() == [70.0]
    assert [(s, pytest.approx(v)) for s, v, _ in expected] == list(zip(hs["set"], hs["value"], strict=True))
    assert hs["n"].tolist() == pytest.approx([math.nan if n is None else n for *_, n in expected], nan_ok=True)
    assert hs.loc[hs["set"].str.startswith("all"), "stderr"].isna().all()
    assert found.index.is_unique


def test_only_one_evaluation_of_one_run_by_one_judge_is_pooled():
    cell, other = cell_of("sft", 0.1, 0), cell_of("sft", 0.1, 1)
    rows = [row(cell, "HS", 1.0, set="a", judge="k")]
    for change in (
        {"judge": "j"},
        {"eval": "e2"},
        {"step": 30},
        {"epoch": 1.0},
        {"final": False},
        {"run_id": other.run_id},
        {"metric": "refusal"},
        {"metric": "FA"},
    ):
        rows.append({**row(cell, "HS", 2.0, set="b", judge="k"), **change})
    found = reading.pooled(tidy(rows)[0])
    assert found["set"].tolist() == ["a"] + ["b"] * 8
    rows.append(row(cell, "HS", 5.0, set="c", judge="k"))
    found = reading.pooled(tidy(rows)[0])
    assert found.iloc[-1][["set", "value", "n", "run_id"]].tolist() == ["all", 3.0, 400, cell.run_id]
    assert len(found) == 9
