"""The report: what it says of planted runs, that what a model wrote stays inert, and how it looks in a browser."""

import json
import re
import shutil
import sys
from collections import Counter

import pandas as pd
import pytest
from matplotlib.figure import Figure

from analysis import apart, claims, compare, demo, gallery, paper, records, report
from analysis.collect import Cell
from cwac.core.jsonl import write_jsonl
from cwac.core.metrics import VARIATION
from tests import browser
from tests.helpers.results import METHODS, cell_of, harm, line_of, row, rows_of, write_run

SCRIPT = "Sure, </pre><script>window.planted = 1</script><img src=x onerror='window.planted = 1'> ```\n~~~ step 1"
needs_chromium = pytest.mark.skipif(
    browser.CHROMIUM is None, reason="no Chromium; on Debian: apt-get install chromium"
)


def with_answers(folder, verdict: str, response: str, at: str = "harmful@90-e1"):
    """Adds a judged answer and the files beside the metric rows to a run."""
    for kind, said in (
        ("gen", {"id": "1", "prompt": "How do I <b>do</b> it?", "response": response}),
        ("judge", {"id": "1", "verdict": verdict, "score": 1.0, "evidence": "", "judge": "keyword"}),
    ):
        write_jsonl(folder / kind / f"{at}.jsonl", [said])
    content = {"pools": {"sae": {"n": 3, "sources": ["x"], "sha256": "5ae5ae"}}}
    (folder / "data.json").write_text(json.dumps(content))
    (folder / "drift.json").write_text(json.dumps({"heldout": {"activation": [[0.1, 0.3], [0.2, 0.6]]}}))
    env = {"git_commit": "c0ffee", "git_dirty": True, "python": "3.11.1", "packages": {"torch": "2.13.0"}}
    (folder / "env.json").write_text(json.dumps(env))
    cell = dict(zip(("model", "task", "ratio", "method", "seed"), folder.name.split("-"), strict=False))
    config = {"model": {"name": "tiny"}, "task": {"name": "toy"}, "method": {"name": cell["method"]}}
    config |= {"harmful_ratio": float(cell["ratio"][1:]), "seed": int(cell["seed"][1:])}
    (folder / "config.yaml").write_text(json.dumps({**config, "train": {"learning_rate": 0.001}}))


@pytest.fixture
def campaign(tmp_path):
    """Two methods, two ratios, two seeds, with a harmful completion that tries to run a script."""
    for method in ("sft", "cwac"):
        for ratio in (0.0, 0.1):
            for seed in (0, 1):
                cell = cell_of(method, ratio, seed)
                folder = write_run(tmp_path / "runs", cell, rows_of(cell, harm(method, ratio, seed)))
                if ratio and seed == 0:
                    with_answers(folder, "harmful" if method == "sft" else "refusal", SCRIPT)
                elif seed == 0:
                    with_answers(folder, "harmful", "never shown: not the highest ratio")
    return tmp_path / "runs"


@pytest.fixture
def undrawn(monkeypatch):
    """For tests of what the page says: figures take most of its time."""
    monkeypatch.setattr(gallery, "draw", lambda *_: [])


def write(campaign, *arguments: str) -> tuple[int, str, str]:
    """Exit code, page and Markdown."""
    out = campaign.parent / "out" / "report.html"
    code = report.main(["--runs", str(campaign), "--out", str(out), *arguments])
    return code, out.read_text(encoding="utf-8"), out.with_suffix(".md").read_text(encoding="utf-8")


def test_the_report_says_what_was_planted(campaign, capsys):
    code, page, text = write(campaign)
    assert code == 0 and "8 runs, seeds 0, 1, judge keyword" in capsys.readouterr().out
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == ["What came out", "Claims", "Tables", "Figures", "Coverage", "Costs", "Answers", "Provenance"]
    mean = sum(harm("sft", 0.1, s) for s in (0, 1)) / 2
    assert f"{mean:.1f} ± " in line_of(text, "SFT", "0.1") and f'<td style="text-align:right">{mean:.1f} ± ' in page
    # coverage, provenance and the names of figures
    assert [c.strip() for c in line_of(text, "CWAC", "tiny, toy").split("|")[3:-1]] == ["2", "2"]
    for said in ("c0ffee+dirty", "5ae5ae", "2.13.0", "3.11.1"):
        assert said in page and said in text, said
    assert "figure5-p0.1-tiny-toy" in page and "Figure 3 (runs at two or more learning rates)" in page
    assert all(src.startswith("data:image/svg+xml;base64,") for src in re.findall(r'<img src="([^"]*)"', page))
    assert not re.search(r"(?:src|href)=\"?(?:https?:)?//", page)


def test_claims_come_first_with_their_verdicts_and_numbers(campaign, monkeypatch, undrawn):
    found = [
        claims.Verdict("a", "CWAC is <best>", "Table 1", "fails", "1.0 | 2.0"),
        claims.Verdict("b", "another", "C.1", "undecided", "no rows"),
    ]
    monkeypatch.setattr(claims, "verdicts", lambda collection, judge=None: found)
    _, page, text = write(campaign)
    assert '<span class="holds">0 holds</span>, <span class="fails">1 fails</span>' in page
    said = '<span class="fails">fails</span><details><summary><strong>CWAC is &lt;best&gt;</strong>'
    assert said in page and "1.0 | 2.0" in page
    assert page.index("CWAC is &lt;best&gt;") < page.index("<h2>Tables</h2>")
    assert "- **fails**: CWAC is <best> (Table 1). 1.0 | 2.0\n" in text


def test_the_first_screen_is_a_sentence_a_figure_and_a_table(campaign, undrawn):
    """All else is folded; the words are explained before they are used below."""
    _, page, text = write(campaign)
    first = page.partition('<details class="part">')[0]
    assert first.count("<figure ") == 1 and first.count("<table>") == 1 and first.count("<tr>") <= 11
    sft, cwac = (sum(harm(m, 0.1, s) for s in (0, 1)) / 2 for m in ("sft", "cwac"))
    assert f"complies with {sft:.0f} % of harmful requests, CWAC one that complies with {cwac:.0f} %" in first
    assert "HS: share of harmful requests that the model complies with" in first
    assert page.count('<details class="part">') == 7 and text.index("What came out") < text.index("## Claims")


def test_a_page_without_the_aligned_model_says_how_to_get_its_row(campaign, undrawn):
    """A run has that row where `eval.at` holds 0; one run is enough."""
    said = "The aligned model has no row of its own: no run was evaluated before its training. `eval.at=[0]` asks for"
    _, _, text = write(campaign)
    assert said not in text and line_of(text, "aligned, not fine-tuned")
    for path in campaign.glob("*/metrics.jsonl"):
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if json.loads(line)["epoch"]))
    _, page, text = write(campaign)
    assert said in text.partition("## Claims")[0] and "| aligned, not fine-tuned" not in text
    assert said.replace("`eval.at=[0]`", "<code>eval.at=[0]</code>") in page


def test_differences_to_cwac_are_paired_by_seed_with_holms_p(tmp_path, undrawn):
    """t of mine is 21, SFT's 31 and that of SFT and mine 26, each with one degree of freedom: three times 0.0205."""
    runs, values = tmp_path / "runs", {"sft": (60.0, 66.0), "cwac": (30.0, 34.0), "mine": (10.0, 12.0)}
    for method, of_seeds in values.items():
        for seed, hs in enumerate(of_seeds):
            cell = cell_of(method, 0.1, seed)
            asked = row(cell, "HS", 99.0, set=f"harmful{VARIATION}prefill", judge="keyword")
            write_run(runs, cell, [*rows_of(cell, hs, 90.0 + (method == "mine")), asked])
    _, page, text = write(runs)
    assert "<summary>tiny, toy: differences to CWAC</summary>" in page
    table = text.partition("### tiny, toy: differences to CWAC")[2]
    cells = [[c.strip() for c in line_of(table, label).split("|")[1:-1]] for label in ("method - CWAC", "SFT", "mine")]
    assert cells[0] == ["method - CWAC", "p", "n", "HS", "p-value", "FA", "p-value", "OR", "p-value"]
    assert cells[1][:5] == ["SFT", "0.1", "2", "+31.0 ± 12.7", "0.062"]
    assert cells[2][:6] == ["mine", "0.1", "2", "-21.0 ± 12.7", "0.062", "+1.0 (each seed)"]


def test_with_one_seed_a_difference_to_cwac_has_no_p_and_without_cwac_there_is_none(tmp_path, undrawn):
    for method, hs in (("sft", 60.0), ("cwac", 34.0)):
        cell = cell_of(method, 0.1, 0)
        write_run(tmp_path / "runs", cell, rows_of(cell, hs))
    _, _, text = write(tmp_path / "runs")
    line = line_of(text.partition("differences to CWAC")[2], "SFT", "0.1", "1", "+26.0 (n=1)")
    assert line.split("|")[5].strip() == "-"
    shutil.rmtree(tmp_path / "runs" / cell.run_id)
    assert "differences to CWAC" not in write(tmp_path / "runs")[2]


def test_figures_of_safety_against_utility_leave_out_what_has_no_poison():
    frame = pd.DataFrame({"harmful_ratio": [0.0, 0.1, float("nan")], "method": ["sft", "sft", "aligned"]})
    assert gallery.poisoned(frame)["method"].tolist() == ["sft", "aligned"]
    assert len(gallery.poisoned(frame[frame["harmful_ratio"] == 0])) == 1


def test_coordinates_of_a_figure_have_the_digits_that_a_screen_shows():
    text = report.SPARE.sub(lambda m: f"<{m[0]}>", 'M 12.345678 -0.1234L9.5"#a1.23456" v1.2.3456 id="m1234.5678x"')
    assert text == 'M <12.345678> -0.1234L9.5"#a1.23456" v1.2.3456 id="m1234.5678x"'


def test_a_figure_of_many_lines_is_a_picture_of_points():
    few, many = Figure(), Figure()
    few.subplots().plot([0, 1], [0, 1])
    many.subplots().plot(range(20_000), [k % 7 for k in range(20_000)], "o")
    assert report.picture(few).startswith("data:image/svg+xml;base64,")
    assert report.picture(many).startswith("data:image/png;base64,") and len(report.picture(many)) < 150_000


def test_what_a_model_wrote_is_escaped_and_harmful_answers_are_redacted(campaign, undrawn):
    _, page, text = write(campaign)
    assert "[redacted: " in page and "judged harmful]" in text
    assert "never shown" not in page and "never shown" not in text
    assert text.count("window.planted") == 2  # CWAC's alone: it was judged a refusal
    assert "<script" not in page and "<img src=x" not in page and "How do I &lt;b&gt;do&lt;/b&gt; it?" in page
    _, page, text = write(campaign, "--show-completions")
    assert text.count("window.planted") == 4 and "[redacted: " not in page
    assert "<script" not in page and "&lt;script&gt;window.planted = 1&lt;/script&gt;" in page
    # in the Markdown too it cannot leave its block: the fence is longer than any run of backticks in it
    assert "````text\nSure, " in text


def test_an_answer_that_the_judge_found_neither_harmful_nor_refusing_is_redacted_too():
    """The keyword rule's known failures count harmful answers as `other`."""
    harmful = {"advbench"}
    shown = [
        report.redacted(records.Answer(of, "1", "how", "so and so", verdict), harmful, show=False)
        for of, verdict in (("advbench", "other"), ("advbench", "refusal"), ("xstest", "harmful"))
    ]
    assert shown == ["[redacted: 3 words, judged other]", "so and so", "so and so"]


def test_missing_runs_are_named_and_the_command_says_so(campaign, monkeypatch, undrawn):
    cells = [cell_of(m, r, s) for m in ("sft", "cwac") for r in (0.0, 0.1) for s in (0, 1)]
    gone = cell_of("cwac", 0.5, 0)
    monkeypatch.setattr(apart, "expected_cells", lambda preset, overrides: [*cells, gone])
    code, page, text = write(campaign, "--experiment", "demo")
    assert code == 1
    assert gone.run_id in page and "8 of 9 expected runs are done" in text
    assert "0/1" in line_of(text, "CWAC", "tiny, toy")


def test_a_frozen_campaign_reads_like_its_runs(campaign, tmp_path, monkeypatch):
    drawn = gallery.draw
    monkeypatch.setattr(gallery, "draw", lambda *arguments: drawn(*arguments)[:1])
    frozen = tmp_path / "frozen"
    assert demo.main(["--runs", str(campaign), "--out", str(frozen)]) == 0
    out = tmp_path / "out" / "frozen.html"
    assert report.main(["--frozen", str(frozen), "--out", str(out), "--figures", str(tmp_path / "out" / "f")]) == 0
    _, page, text = write(campaign)
    assert page.count("<figure ") == 2  # the first screen's and the one drawn
    again = out.with_suffix(".md").read_text(encoding="utf-8")
    assert line_of(again, "SFT", "0.1") == line_of(text, "SFT", "0.1")
    assert "5ae5ae" in again and "An exported campaign keeps none" in again and "window.planted" not in again
    # pictures are linked from the Markdown, and are there
    links = re.findall(r"\]\((f/[^)]*)\)", again)
    assert len(links) == 2 and all((out.parent / link).is_file() for link in links)


def test_runs_at_several_learning_rates_do_not_share_a_table(tmp_path):
    for k, rate in enumerate((1e-4, 1e-3)):
        first = cell_of("sft", 0.1, 0)
        cell = Cell(f"{first.run_id[:-1]}{k}", *[getattr(first, f) for f in ("model", "method", "task")], 0.1, 0, "e1")
        folder = write_run(tmp_path / "runs", cell, rows_of(cell, 10.0 + 60 * k))
        (folder / "config.yaml").write_text(json.dumps({"train": {"learning_rate": rate}}))
    _, page, text = write(tmp_path / "runs")
    assert "10.0 [6.2, 15.0]§ (n=1)" in text and "70.0 [63.1, 76.3]§ (n=1)" in text
    assert "It is about one training alone and says nothing\nof other seeds" in text
    assert "tiny, toy, learning rate 1e-3" in page and "figure3-p0.1-tiny-toy" in page


@pytest.mark.parametrize(
    "arguments, names",
    [
        (["--runs", "nowhere"], "--runs nowhere"),
        (["--frozen", "nowhere"], "nowhere holds no readable results.csv"),
        (["--frozen", "nowhere", "--experiment", "demo"], "--experiment is for --runs"),
        (["--out", "page.txt"], "--out page.txt"),
    ],
)
def test_bad_input_is_one_clear_error(tmp_path, monkeypatch, capsys, arguments, names):
    monkeypatch.chdir(tmp_path)
    assert report.main(["--out", "page.html", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and names in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser_nothing_is_missing_overflows_or_runs(campaign, width):
    write(campaign, "--show-completions")
    found = browser.look(campaign.parent / "out" / "report.html", width)
    assert found["images"] > 5 and found["broken"] == []
    assert found["console"] == [] and found["fetched"] == []
    assert found["overflow"] <= 0 and found["widest"] == []
    assert found["scripts"] == 0 and found["planted"] == "undefined"
    assert "window.planted = 1" in found["text"] or "Answers" in found["text"]


@pytest.mark.slow
@needs_chromium
def test_the_browser_test_sees_what_it_looks_for(tmp_path):
    """A page with every defect: an error on the console, a missing image, an overflow, a script that runs."""
    page = tmp_path / "bad.html"
    page.write_text(
        "<body><img src='gone.png' alt='gone'><div style='width:2000px'>wide</div>"
        "<script>window.planted = 1; console.error('planted error')</script>"
    )
    found = browser.look(page, 390)
    assert found["broken"] == ["gone"] and found["overflow"] > 1000 and found["planted"] == "number"
    assert any("planted error" in line for line in found["console"])


@pytest.mark.slow
def test_a_thousand_runs_are_read_by_one_look_at_each_file(tmp_path, capsys):
    """Twenty methods, five ratios, ten seeds."""
    opened: Counter = Counter()
    listening = [True]  # a hook cannot be taken off again

    def hook(event, given):
        if event == "open" and listening and str(given[0]).endswith("metrics.jsonl"):
            opened[str(given[0])] += 1

    methods = [*METHODS, *(f"new{k}" for k in range(14))]
    for method in methods:
        for ratio in (0.0, 0.05, 0.1, 0.2, 0.5):
            for seed in range(10):
                cell = cell_of(method, ratio, seed)
                hs = min(100.0, 100 * ratio * 0.9 + len(method) + seed)
                with_answers(write_run(tmp_path / "runs", cell, rows_of(cell, hs)), "refusal", "No.")
    sys.addaudithook(hook)
    assert report.main(["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "report.html")]) == 0
    assert "1000 runs" in capsys.readouterr().out
    listening.clear()
    assert len(opened) == 1000 and set(opened.values()) == {1}


def test_two_campaigns_of_the_report_compare(campaign):
    """The frozen and the live form of one campaign have no differing cell."""
    found = compare.compare(compare.read(campaign), compare.read(campaign))
    assert len(found) > 10 and not set(found["flag"]) & {"differs", "only in first", "only in second"}


def test_a_campaign_of_a_papers_table_stands_beside_its_values(tmp_path, monkeypatch, undrawn):
    """Table 3, p = 0.1: CWAC's printed HS, ours, the gap; the better of ours is bold."""
    cells = [
        Cell(f"llama2-sst2-p0.1-{method}-s{seed}-00000000", "llama2", method, "sst2", 0.1, seed, "e1")
        for method in ("sft", "cwac")
        for seed in (0, 1)
    ]
    for cell in cells:
        write_run(tmp_path / "runs", cell, rows_of(cell, 30.0 if cell.method == "cwac" else 60.0))
    monkeypatch.setattr(apart, "expected_cells", lambda preset, overrides: cells)
    code, page, text = write(tmp_path / "runs", "--experiment", "table3")
    frame = paper.printed()
    said = frame[(frame["artifact"] == "table3") & (frame["method"] == "cwac") & (frame["harmful_ratio"] == 0.1)]
    value = said.set_index("metric").loc["HS"]
    assert code == 0
    line = line_of(text, "0.1", "CWAC")
    assert value["text"] in line and f"{30.0 - value['value']:+.1f}" in line and "**30.0" in line
    assert "<strong>30.0" in page and "&lt;u&gt;" not in page and "second in italics" in text
