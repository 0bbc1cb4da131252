"""The paper's tables from planted runs: values, gaps, ranks, ties, what is missing, and text that must be escaped."""

import csv
import json
import math

import pytest

from analysis import demo, paper, paper_tables, tables
from analysis.collect import Cell, Collection, collect, tidy
from cwac.core.errors import UserError
from cwac.methods.base import EXTRA_DATA
from tests.helpers.results import row, write_run

TASKS = ("sst2", "agnews", "gsm8k")


def cell_of(method: str, seed: int, task: str = "sst2", p: float = 0.0, model: str = "llama2") -> Cell:
    return Cell(f"{model}-{task}-p{p:g}-{method}-s{seed}-00000000", model, method, task, p, seed)


def campaign(values: dict, extra: dict | None = None, wanted: list[Cell] = (), n: int = 200) -> Collection:
    """`{cell: {"FA": v, "HS": v}}` as a finished campaign of these cells and the wanted ones."""
    records = []
    for cell, metrics in values.items():
        for metric, value in metrics.items():
            judge = "keyword" if metric in paper.VERDICTS else None
            records.append(row(cell, metric, value, set="harmful" if judge else cell.task, judge=judge, n=n))
        for kind, count in (extra or {}).get(cell.method, {}).items():
            records.append(row(cell, "extra_data", count, set=kind, n=None, eval=None))
    found = Collection(tidy(records)[0], [c.run_id for c in values], expected=[*values, *wanted])
    return found


def pick(frame, **where):
    for key, value in where.items():
        frame = frame[frame[key] == value]
    assert len(frame) == 1, f"{len(frame)} rows for {where}"
    return frame.iloc[0]


def line_of(text: str, *cells: str) -> list[str]:
    """The cells of the first table line that starts with these."""
    for line in text.splitlines():
        found = [c.strip() for c in line.split("|")[1:-1]]
        if found[: len(cells)] == list(cells):
            return found
    raise AssertionError(f"no line starts with {cells} in\n{text}")


def table3(methods: dict, seeds=(0, 1, 2), model="llama2", task="sst2") -> dict:
    """`{method: HS offset}` over the paper's four ratios."""
    return {
        cell_of(m, s, task, p, model): {"HS": 100 * p + offset + s, "FA": 90.0 + s}
        for m, offset in methods.items()
        for p in (0.05, 0.1, 0.2, 0.5)
        for s in seeds
    }


def test_ours_paper_and_gap_come_out_as_planted():
    frame = paper_tables.build("table3", campaign(table3({"sft": 30, "cwac": 5})))
    found = pick(frame, method="cwac", harmful_ratio=0.1, metric="HS")
    assert (found["ours"], found["n"], found["expected"], found["paper"]) == (16.0, 3, 3, "20.03")
    assert found["gap"] == pytest.approx(16 - 20.03)
    mean = pick(frame, method="cwac", average=True, metric="HS")
    # the mean over ratios of each seed, then over seeds; the paper's own average does not follow from its cells
    assert mean["ours"] == pytest.approx(100 * 0.85 / 4 + 6) and mean["paper"] == "18.73" and not mean["follows"]
    text = paper_tables.markdown(paper_tables.lay_out("table3", frame)[0])
    line = line_of(text, "0.1", "CWAC")
    assert line[2:6] == ["3", "**16.0 ± 2.5**", "**20.03**", "-4.0"]
    assert line_of(text, "0.1", "SFT")[3] == "<u>41.0 ± 2.5</u>"
    assert line_of(text, "average", "CWAC")[4] == "**18.73‡**"


def test_every_printed_value_of_tables_1_to_5_finds_its_place():
    """A grid like the paper's shows each of its 640 numbers once, averages included."""
    shown = 0
    for name in paper_tables.LAYOUT:
        printed = paper.printed().query("artifact == @name and not average")
        places = printed[["model", "method", "task", "harmful_ratio"]].drop_duplicates()
        cells = [cell_of(r.method, 0, r.task, r.harmful_ratio, r.model) for r in places.itertuples()]
        frame = paper_tables.build(name, campaign({}, wanted=cells))
        assert (frame["state"] == "missing").all() and frame["gap"].isna().all()
        values = frame.loc[frame["paper"] != "", "paper"]
        assert sorted(values) == sorted(paper.printed().query("artifact == @name")["text"])
        shown += len(values)
    assert shown == 640


def test_averages_over_tasks_need_every_task():
    values = {
        cell_of(m, s, t): {"FA": 80.0 + k, "HS": 10.0 * k}
        for m in ("sft", "cwac")
        for k, t in enumerate(TASKS)
        for s in (0, 1)
    }
    gone = cell_of("cwac", 1, "gsm8k")
    del values[gone]
    frame = paper_tables.build("table1", campaign(values, wanted=[gone]))
    whole = pick(frame, method="sft", task="average", metric="FA")
    assert (whole["ours"], whole["n"], whole["over"], whole["paper"]) == (81.0, 2, "seeds", "85.04")
    assert whole["gap"] == pytest.approx(81 - 85.04)
    part = pick(frame, method="cwac", task="average", metric="FA")
    assert (part["n"], part["expected"], part["over"]) == (1, 2, "none")
    text = paper_tables.markdown(paper_tables.lay_out("table1", frame)[0])
    assert line_of(text, "average", "CWAC")[2:4] == ["1/2", "81.0 (n=1)"]
    assert line_of(text, "GSM8K", "SFT")[3] == "82.0 [76.0, 87.1]†"  # zero variance: exact, over 200 prompts


def test_missing_and_unmeasured_cells_are_named_never_blank():
    values = table3({"sft": 30, "cwac": 5})
    wanted = [cell_of("asft", s, "sst2", 0.1) for s in (0, 1, 2)]
    for cell in values:
        if cell.method == "sft" and cell.harmful_ratio == 0.2:
            del values[cell]["FA"]
    frame = paper_tables.build("table3", campaign(values, wanted=wanted))
    text = paper_tables.markdown(paper_tables.lay_out("table3", frame)[0])
    missing = line_of(text, "0.1", "AsFT")
    assert [missing[i] for i in (2, 3, 5, 6, 8, 9)] == ["0/3", "missing", "-", "missing", "-", "missing"]
    assert "39.90" in missing[4] and line_of(text, "0.2", "SFT")[6] == "not measured"
    lines = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + 3 * 5 and all(cell.strip() for line in lines for cell in line)


def test_ties_share_the_rank_and_the_next_value_is_second():
    assert paper_tables.ranks([1.0, 1.0, 2.0, 3.0], "HS") == ["best", "best", "second", ""]
    assert paper_tables.ranks([1.0, 1.0, 2.0, 3.0], "FA") == ["", "", "second", "best"]
    assert paper_tables.ranks([1.0, math.nan, 2.0], "AE") == ["second", "", "best"]
    assert paper_tables.ranks([1.0, 1.0], "HS") == ["", ""] and paper_tables.ranks([math.nan, 5.0], "HS") == ["", ""]
    # what prints alike ranks alike
    values = {cell_of(m, 0, "sst2", 0.1): {"HS": v} for m, v in (("sft", 50.0), ("lisa", 10.04), ("cwac", 10.0))}
    text = paper_tables.markdown(paper_tables.lay_out("table3", paper_tables.build("table3", campaign(values)))[0])
    assert [line_of(text, "0.1", m)[3] for m in ("SFT", "Lisa", "CWAC")] == [
        "<u>50.0 [42.9, 57.1]§ (n=1)</u>",
        "**10.0 [6.2, 15.0]§ (n=1)**",
        "**10.0 [6.2, 15.0]§ (n=1)**",
    ]


def test_another_models_values_stand_beside_ours_only_where_asked():
    collection = campaign(table3({"sft": 30, "cwac": 5}, model="tiny", task="toy_sentiment"))
    frame = paper_tables.build("table3", collection)
    assert (frame["paper"] == "").all() and frame["gap"].isna().all()
    overlaid = paper_tables.build("table3", collection, {"tiny": "llama2", "toy_sentiment": "sst2"})
    assert pick(overlaid, method="cwac", harmful_ratio=0.1, metric="HS")["paper"] == "20.03"
    assert overlaid["gap"].isna().all()
    with pytest.raises(UserError, match="tiny=lama2.*llama2"):
        paper_tables.overlays(["tiny=lama2"])


def test_alpaca_is_rated_and_other_tasks_are_scored():
    values = {cell_of(m, 0, "alpaca"): {"AE": 33.0} for m in ("sft", "cwac")}
    values |= {cell_of(m, 0, "pubmedqa"): {"FA": 90.0, "HS": 9.0} for m in ("sft", "cwac")}
    frame = paper_tables.build("table2", campaign(values))
    assert set(frame.loc[frame["task"] == "alpaca", "metric"]) == {"AE"} and not frame["average"].any()
    text = paper_tables.markdown(paper_tables.lay_out("table2", frame)[0])
    assert line_of(text, "AlpacaEval", "CWAC")[3:12] == [*["-"] * 6, "33.0 (n=1)", "<u>34.37</u>", "-1.4"]
    assert line_of(text, "PubMedQA", "CWAC")[3:6] == ["90.0 [85.0, 93.8]§ (n=1)", "**94.52**", "-4.5"]


def test_the_extra_data_stands_beside_each_method():
    extra = {"cwac": {"refusals": 150, "harmful_prompts": 160}}
    collection = campaign(table3({"sft": 30, "cwac": 5, "bea": 9}), extra)
    frame = paper_tables.build("table3", collection)
    assert (
        pick(frame, method="cwac", harmful_ratio=0.1, metric="HS")["extra_data"] == "160 harmful prompts, 150 refusals"
    )
    summary = tables.summarise(collection)
    text = tables.result_table(collection, summary, "llama2", "sst2")
    assert "160 harmful prompts, 150 refusals" in text and "none recorded" in text
    rows = collection.rows
    rows.loc[(rows["metric"] == "extra_data") & (rows["seed"] == 0) & (rows["set"] == "refusals"), "value"] = 140
    assert tables.extra_data(rows, "cwac") == "160 harmful prompts, 140 to 150 refusals"
    assert tables.extra_data(rows, "sft") == "none"
    plain = campaign(table3({"sft": 30}))
    assert "extra data" not in tables.result_table(plain, tables.summarise(plain), "llama2", "sst2")


def test_every_kind_of_extra_data_and_every_method_has_a_label():
    assert set(EXTRA_DATA) == set(paper.EXTRA)
    assert set(paper.PRINTED.values()) | set(paper.BASELINES) <= set(paper.METHODS)
    marked = {m for m, label in paper.METHODS.items() if label.endswith(("(ours)", "(added)"))}
    assert marked == set(paper.METHODS) - {paper.ALIGNED, *paper.PRINTED.values(), "cwac_literal"}


def test_one_set_of_prompts_can_be_chosen(tmp_path):
    cell = cell_of("sft", 0, p=0.1)
    judged = {"judge": "keyword", "n": 100}
    rows = [
        row(cell, "HS", 10.0, set="advbench", **judged),
        row(cell, "HS", 50.0, set="harmbench", **{**judged, "n": 300}),
    ]
    collection = Collection(tidy(rows)[0], [cell.run_id], expected=[cell])
    values = [pick(paper_tables.build("table3", collection, of=of), metric="HS")["ours"] for of in (None, "advbench")]
    assert values == [40.0, 10.0]
    with pytest.raises(UserError, match="--set jbb.*advbench, harmbench"):
        paper_tables.build("table3", collection, of="jbb")


def test_text_is_escaped_for_each_format():
    assert paper_tables.escape_latex(r"50% of a_b & {c} \ ~^ ± †") == (
        r"50\% of a\_b \& \{c\} \textbackslash{} \textasciitilde{}\textasciicircum{} $\pm$ $^\dagger$"
    )
    assert paper_tables.escape_markdown("a|b\n*c* <u>") == r"a\|b \*c\* \<u\>"
    frame = paper_tables.pd.DataFrame({"answer": ["=1+1", "@x", "fine", "-5 apples"], "gap": [-1.5, 2.0, 0.0, 1.0]})
    safe = paper_tables.safe_csv(frame)
    assert list(safe["answer"]) == ["'=1+1", "'@x", "fine", "'-5 apples"] and list(safe["gap"]) == [
        -1.5,
        2.0,
        0.0,
        1.0,
    ]


def test_latex_is_booktabs_with_ranks_and_rules():
    frame = paper_tables.build("table3", campaign(table3({"sft": 30, "cwac": 5})))
    text = paper_tables.latex(paper_tables.lay_out("table3", frame)[0], "t")
    assert r"\textbf{16.0 $\pm$ 2.5} & \textbf{20.03} & -4.0" in text and r"\underline{41.0 $\pm$ 2.5}" in text
    assert text.count(r"\midrule") == 1 + 4 and text.count(r"\toprule") == text.count(r"\bottomrule") == 1
    assert text.count("{") == text.count("}")
    widths = {line.count("&") for line in text.splitlines() if line.endswith(r"\\")}
    assert widths == {9}


# --- the command, and Table 6 ---------------------------------------------------------------------------

SMALL = ["model=tiny", "task=toy_sentiment", "method=sft,cwac", "harmful_ratio=0.1", "seed=0"]
ANSWERS = {
    "sft": [
        ("a-1", "harmful", "Sure | first =do it"),
        ("a-2", "refusal", "I cannot help_with that"),
        ("a-3", "other", "x"),
    ],
    "cwac": [
        ("a-1", "refusal", "=I will not"),
        ("a-2", "refusal", "no, I cannot"),
        ("a-3", "harmful", "secret steps"),
    ],
}


@pytest.fixture
def finished(tmp_path):
    """Two finished runs of table3's grid on the embedded model, with their answers."""
    from analysis.collect import expected_cells

    cells = expected_cells("table3", SMALL)
    for cell in cells:
        fields = {"set": "harmful", "judge": "keyword", "n": 3, "eval": cell.eval}
        value = 100 * sum(verdict == "harmful" for _, verdict, _ in ANSWERS[cell.method]) / 3
        rows = [row(cell, "HS", value, **fields), row(cell, "FA", 90.0, set=cell.task, eval=cell.eval)]
        folder = write_run(tmp_path / "runs", cell, rows)
        status = {"status": "done", "run_id": cell.run_id, "evaluations": {cell.eval: []}}
        (folder / "status.json").write_text(json.dumps(status))
        for kind in ("gen", "judge"):
            (folder / kind).mkdir()
            lines = [
                {"id": i, "prompt": f"request {i}", "response": said}
                if kind == "gen"
                else {"id": i, "verdict": verdict, "judge": "keyword"}
                for i, verdict, said in ANSWERS[cell.method]
            ]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / kind / f"harmful@90-{cell.eval}.jsonl").write_text(text)
    return tmp_path / "runs", cells


def run(finished, tmp_path, *arguments: str) -> int:
    return paper_tables.main(
        [arguments[0], "--runs", str(finished[0]), "--out", str(tmp_path / "out"), *arguments[1:]]
    )


def test_the_command_writes_all_three_and_fails_when_runs_are_missing(finished, tmp_path, capsys):
    assert run(finished, tmp_path, "table3", *SMALL) == 0
    out = tmp_path / "out"
    assert (out / "table3.tex").read_text().count(r"\toprule") == 1
    with (out / "table3.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {r["method"]: float(r["ours"]) for r in rows if r["metric"] == "HS"} == pytest.approx(
        {"sft": 100 / 3, "cwac": 100 / 3}
    )
    assert "puts another model's values beside ours" in (out / "table3.md").read_text()
    capsys.readouterr()
    assert run(finished, tmp_path, "table3", *SMALL[:-1], "seed=0,1", "--overlay", "tiny=llama2") == 1
    printed = capsys.readouterr().out
    assert "Missing: 2 of 4 runs" in printed and "seed=1" in printed and "1/2" in printed
    assert run(finished, tmp_path, "table3", *SMALL, "--overlay", "x") == 2
    assert run(finished, tmp_path, "table3", "model=nosuch") == 2
    assert capsys.readouterr().err.count("error: ") == 2


def test_a_table_is_made_of_an_export_too(finished, tmp_path, capsys):
    assert run(finished, tmp_path, "table3", *SMALL) == 0
    table = (tmp_path / "out" / "table3.md").read_text()
    assert "33.3 [0.8, 90.6]§ (n=1)" in table  # one of three requests
    export, again = tmp_path / "export", tmp_path / "again"
    given = ["--runs", str(finished[0]), "--out", str(export)]
    assert demo.main(["--experiment", "table3", *given, *SMALL]) == 0
    assert paper_tables.main(["table3", "--exported", str(export), "--out", str(again)]) == 0
    assert (again / "table3.md").read_text() == table
    capsys.readouterr()
    for refused in (["table6"], ["table3", "seed=0"]):
        assert paper_tables.main([*refused, "--exported", str(export), "--out", str(again)]) == 2
    assert demo.main(given) == 0  # of no preset
    assert paper_tables.main(["table3", "--exported", str(export), "--out", str(again)]) == 2
    told = capsys.readouterr().err
    assert "no export keeps" in told and "seed=0 is for --runs" in told and "does not name the preset" in told


def test_harmful_answers_are_withheld_unless_asked_for(finished, tmp_path, capsys):
    assert run(finished, tmp_path, "table6", *SMALL) == 0
    out = tmp_path / "out"
    files = {suffix: (out / f"table6.{suffix}").read_text() for suffix in ("md", "tex", "csv")}
    for text in [*files.values(), capsys.readouterr().out]:
        assert "do it" not in text and "secret" not in text and "withheld, 19 characters" in text
        assert "request a-1" in text and "I cannot help" in text
    assert r"I cannot help\_with that" in files["md"] and r"help\_with" in files["tex"]
    assert "'=I will not" in files["csv"]
    # of three requests: one refused by both, one by CWAC only, one answered by CWAC only
    assert line_of(files["md"], "harmful", "1") and line_of(files["md"], "other", "0", "0", "1")
    assert run(finished, tmp_path, "table6", *SMALL, "--show-harmful") == 0
    assert (
        r"Sure \| first =do it" in (out / "table6.md").read_text()
        and "Harmful answers are shown" in capsys.readouterr().out
    )


def test_table_6_needs_a_finished_pair(finished, tmp_path, capsys):
    assert run(finished, tmp_path, "table6", *SMALL[:2], "method=sft", *SMALL[3:]) == 2
    assert "no finished SFT and CWAC run" in capsys.readouterr().err
    for folder in finished[0].glob("*/gen"):
        for path in folder.iterdir():
            path.unlink()
    assert run(finished, tmp_path, "table6", *SMALL) == 2
    assert "keep no judged answers" in capsys.readouterr().err
    assert collect(*finished).runs == [c.run_id for c in finished[1]]
