"""README and docs: generated numbers are current, sentences can be read, links lead somewhere, code blocks run."""

import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from omegaconf import OmegaConf

from analysis import headline, pages, paper
from analysis.collect import collect
from cwac.core import config, paths
from cwac.core.errors import UserError
from tests.helpers.results import METHODS, cell_of, harm, rows_of, write_run

ROOT = pages.ROOT
README = ROOT / "README.md"
FOLDERS = ("conf", "experiments", "results", "findings")
"""Whose README is a page of the site as well."""
TEXTS = [README, *sorted((ROOT / "docs").rglob("*.md")), *(ROOT / name / "README.md" for name in FOLDERS)]
NUMBER = re.compile(r"(?<![\w./=_-])[-+]?\d[\d,.]*(?![\w/_-])(?:e-?\d+)?")
ids = {"ids": lambda p: p.relative_to(ROOT).as_posix()}


def prose(text: str) -> list[str]:
    """Paragraphs and list items, without code, tables, headings and what is generated."""
    text = re.sub(r"<!-- (\w+:\S+) -->.*?<!-- /\1 -->", "\n", text, flags=re.S)
    text = re.sub(r"(?m)^ *(```|~~~).*?^ *\1 *$", "\n", text, flags=re.S)
    text = re.sub(r"(?m)^(\||#| {4,}\S|!\[).*$", "", text)
    return [p for p in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", text) if p.strip()]


def sentences(paragraph: str) -> list[str]:
    plain = re.sub(
        r"`[^`]*`|\]\([^)]*\)|arXiv:[\d.]+|\b(?:section|Section|Table|Tables|Figure|Figures)s? [\d. to,and]+",
        " ",
        paragraph,
    )
    return re.split(r"(?<=[.!?])\s+", plain)


@pytest.mark.parametrize("page", TEXTS, **ids)
def test_no_sentence_has_more_than_three_numbers(page):
    for paragraph in prose(page.read_text(encoding="utf-8")):
        for sentence in sentences(paragraph):
            assert len(NUMBER.findall(sentence)) <= 3, sentence


@pytest.mark.parametrize("page", TEXTS, **ids)
def test_no_paragraph_is_longer_than_five_lines(page):
    for paragraph in prose(page.read_text(encoding="utf-8")):
        assert len(paragraph.strip().splitlines()) <= 5 and len(paragraph) <= 5 * 121, paragraph


def test_the_checks_of_sentences_find_what_they_look_for():
    assert len(NUMBER.findall("HS is 48.9 ± 19.1 below SFT's and 34.4 ± 25.3 there, FA +7.2 ± 21.2")) == 6
    assert NUMBER.findall("Llama-2-7B and SST-2 on one H200, see 4.2 or p = 0.5.") == ["4.2", "0.5."]
    assert (
        len(prose("a\nb\n\n- c\n  d\n- e\n\n| 1 | 2 |\n\n```\n1 2 3 4\n```\n<!-- made:x -->\n1\n<!-- /made:x -->"))
        == 3
    )


def test_the_readme_is_short():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 160 and len(text.encode()) <= 9 * 1024


def test_the_readme_has_no_measured_number_outside_its_blocks():
    for paragraph in prose(README.read_text(encoding="utf-8")):
        plain = re.sub(r"`[^`]*`|\]\([^)]*\)|arXiv:[\d.]+|Apache-2.0|Python 3\.\d+|Version [\d.]+", "", paragraph)
        assert not re.search(r"\d+\.\d|±|\d %", plain), paragraph


def test_generated_blocks_are_those_of_the_exported_campaigns():
    """Remedy: python -m analysis.pages"""
    assert pages.stale() == {}


@pytest.mark.parametrize("page", TEXTS, **ids)
def test_links_lead_to_files_that_are_there(page):
    text = re.sub(r"(?m)^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?:", link):
            path = link.partition("#")[0]
            assert not path or (page.parent / path).exists(), link


@functools.cache
def of_the_clone() -> set[Path]:
    """The files of the working tree that git keeps or would keep, and their folders."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / name for name in listed.split("\0") if name and (ROOT / name).exists()]
    return {place for file in files for place in (file, *file.parents)}


LINKED = [*TEXTS, *(ROOT / name for name in ("benchmarks/README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone")
@pytest.mark.parametrize("page", LINKED, **ids)
def test_links_lead_to_files_that_a_clone_has(page):
    """docs/defend.md linked to a page that `make docs` makes: dead for every reader of the repository itself."""
    text = re.sub(r"(?m)^ *```.*?^ *```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.S)
    links = re.findall(r"\]\(([^)\s]+)\)|<(?:a|img)[^>]*(?:href|src)=\"([^\"]+)\"", text)
    for link in (one or other for one, other in links):
        if not re.match(r"[a-z]+:", link) and (path := link.partition("#")[0]):
            assert Path(os.path.normpath(page.parent / path)) in of_the_clone(), link


def test_a_number_that_changed_makes_a_page_stale(tmp_path, monkeypatch):
    monkeypatch.setitem(pages.MAKERS, "planted", lambda page: "new")
    page = tmp_path / "page.md"
    text = "before\n<!-- made:planted -->\nold\n<!-- /made:planted -->\nafter"
    assert pages.fill(page, text) == text.replace("old", "new")
    with pytest.raises(pages.UserError, match="no maker of block gone"):
        pages.fill(page, text.replace("planted", "gone"))


def planted(**columns) -> pd.DataFrame:
    fixed = {"metric": "HS", "set": "toy", "low": 1.0, "high": 9.0, "half": 4.0, "n": 3, "over": "seeds"}
    return pd.DataFrame({**fixed, **columns})


def test_a_grid_has_one_row_a_setting_with_its_estimate(monkeypatch):
    frame = planted(matrix=["down", "down", "v"], metric=["HS", "FA", "HS"], mean=[5.0, 90.0, 7.5])
    monkeypatch.setattr(pages, "estimates", lambda path: frame)
    lines = pages.grid(README, "free:matrix:HS,FA").splitlines()
    assert [c.strip() for c in lines[2].split("|")[1:-1]] == ["down", "5.0 ± 4.0", "90.0 ± 4.0"]
    assert [c.strip() for c in lines[3].split("|")[1:-1]] == ["v", "7.5 ± 4.0", "-"]
    with pytest.raises(pages.UserError, match="2 estimates where one is meant"):
        pages.cell(pd.concat([frame, frame]), "HS", matrix="v")


def test_the_settings_under_a_table_are_those_of_all_its_cells():
    """Of `closed_attacks` as its exported runs have them; a key that differs from cell to cell is refused."""
    said = " ".join(pages.settings(README, "closed_attacks:task,p,rate,steps").split())
    ends = pd.read_csv(pages.there("attacks/results.csv")).query("final")
    (task,), (p,), (step,), (rate,) = (set(ends[c]) for c in ("task", "harmful_ratio", "step", "learning_rate"))
    shown = f"{task}, p = {p:g}, learning rate {paper.rate_label(rate)}, {step} steps. Preset `closed_attacks`."
    assert said == f"All rows: embedded model (`tiny`), {shown}"
    assert "energy 0.99." in pages.settings(README, "closed_free:energy")
    cfg = config.compose(["model=tiny", "task=toy_sentiment", "train.max_steps=8"])
    assert pages.of_cell(cfg)["steps"] == "8 steps"
    with pytest.raises(pages.UserError, match="its cells have 5 values of rate"):
        pages.settings(README, "closed_rates:rate")
    with pytest.raises(pages.UserError, match="0 values of colour"):
        pages.settings(README, "closed_rates:colour")


def test_steps_shows_the_last_of_them_at_each_ratio(monkeypatch):
    frame = planted(
        preset="closed_goal",
        learning_rate=1e-4,
        method=["sft", "sft", "sft", "weight_only_closed"],
        held=[math.nan, math.nan, math.nan, 0.99],
        harmful_ratio=[0.1, 0.1, 1.0, 0.1],
        step=[30, 60, 60, 60],
        mean=[1.0, 50.0, 99.0, 2.0],
    )
    monkeypatch.setattr(pages, "estimates", lambda path: frame)
    lines = pages.steps(README, "closed_goal").splitlines()
    assert [c.strip() for c in lines[0].split("|")[1:-1]] == ["method", "energy", "p = 0.1", "p = 1"]
    assert [c.strip() for c in lines[2].split("|")[1:-1]] == ["SFT", "-", "50.0 ± 4.0", "99.0 ± 4.0"]
    assert [c.strip() for c in lines[3].split("|")[1:-1]][1:] == ["0.99", "2.0 ± 4.0", "not measured"]
    assert "HS after 60 steps." in lines[-1]


def test_a_course_shows_each_evaluation_with_an_interval_over_its_prompts(monkeypatch):
    """Harmful requests of two sets are pooled by their numbers; a fresh binomial interval, not one of means."""
    values = {("FA", "sst2"): (50.0, 60), ("HS", "a"): (100.0, 10), ("HS", "b"): (0.0, 30)}
    values |= {("other", "a"): (0.0, 10), ("other", "b"): (100.0, 30)}
    same = {
        "run_id": "r",
        "model": "smollm2",
        "method": "cwac",
        "seed": 0,
        "judge": "j",
        "eval": "e",
        "stderr": math.nan,
    }
    rows = pd.DataFrame([
        {**same, "epoch": step / 32, "step": step, "final": step == 32, "metric": m, "set": s, "value": v, "n": n}
        for step in (0, 32)
        for (m, s), (v, n) in values.items()
    ])  # fmt: skip
    monkeypatch.setattr(pages, "read_exported", lambda folder: SimpleNamespace(rows=rows))
    shown = pages.course(README, "two_models").splitlines()
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in shown[:4]]
    assert lines[2][:4] == ["SmolLM2-135M", "CWAC", "0", "0"] and lines[3][3] == "32"
    assert lines[3][4:] == ["50.0 [36.8, 63.2]", "25.0 [12.7, 41.2]", "75.0 [58.8, 87.3]", "60 / 40 / 40"]


# --- what a campaign comes to -------------------------------------------------------------------------


@pytest.fixture
def view(tmp_path):
    """Six methods at three ratios, planted; `cwac_closed` costs accuracy."""
    for method in METHODS:
        for ratio in (0.0, 0.2, 0.5):
            for seed in (0, 1, 2):
                cell = cell_of(method, ratio, seed)
                fa = 60.0 if method == "cwac_closed" else 95.0
                write_run(tmp_path, cell, rows_of(cell, min(99.0, harm(method, ratio, seed)), fa))
    return headline.views(collect(tmp_path))[0]


def test_the_ratio_shown_is_the_largest_up_to_a_fifth(view):
    assert view.ratio == 0.2 and view.methods == [
        "sft",
        "weight_only",
        "activation_only",
        "cwac",
        "weight_only_closed",
        "cwac_closed",
    ]


def test_the_headline_says_what_beats_cwac_at_no_cost(view):
    """The closed methods are lower; one of them loses 35 points of accuracy."""
    mean = sum(harm("cwac", 0.2, s) for s in (0, 1, 2)) / 3
    assert view.better() == (["weight_only_closed"], ["weight_only_closed"])
    text = headline.sentence(view)
    assert f"CWAC one that complies with {mean:.0f} % (p-value " in text
    assert text.endswith(
        "weight-only closed has a significantly lower HS (each pair tested alone), FA and OR at most 5 points worse."
    )


def planted_view(folder, values, seeds=(0,), start=True):
    """One view of methods at p = 0.1 with these HS, a value or one a seed."""
    for method, hs in values.items():
        for k, seed in enumerate(seeds):
            cell = cell_of(method, 0.1, seed)
            rows = rows_of(cell, hs[k] if isinstance(hs, tuple) else hs)
            write_run(folder, cell, [r for r in rows if start or r["epoch"]])
    return headline.views(collect(folder))[0]


@pytest.mark.parametrize(
    ("values", "seeds", "said"),
    [
        (
            {"sft": 60.0, "cwac": 34.0, "mine": 3.8},
            (0,),
            "mine has a lower HS in the mean (3.8 %), {}. One seed cannot decide it",
        ),
        (
            {"sft": 60.0, "cwac": (34.0, 30.0), "mine": (33.0, 29.5)},
            (0, 1),
            "mine has a lower HS in the mean (31.2 %), {}. These seeds do not decide it",
        ),
        (
            {"sft": 60.0, "cwac": 34.0, "mine": 3.8, "lisa": 5.0},
            (0,),
            "mine and Lisa have a lower HS in the mean, {}. One seed cannot decide it",
        ),
        ({"sft": 60.0, "cwac": 34.0}, (0,), "none of the other methods (1) has a lower HS than CWAC, {}"),
    ],
)
def test_what_no_test_decides_is_said_with_its_value(tmp_path, values, seeds, said):
    cost = "FA and OR at most 5 points worse"
    assert headline.beaten(planted_view(tmp_path, values, seeds)) == said.format(cost)


def test_who_shares_no_seeds_and_who_has_one_are_told_apart(tmp_path):
    def planted(name, **runs):
        for method, (hs, *seeds) in runs.items():
            for seed in seeds:
                cell = cell_of(method, 0.1, seed)
                write_run(tmp_path / name, cell, rows_of(cell, hs))

    planted("two", sft=(60.0, 0, 1), cwac=(34.0, 0, 1), mine=(4.0, 2, 3))
    planted("one", sft=(60.0, 0, 1), lisa=(2.0, 0))
    two, one = (headline.views(collect(tmp_path / name))[0] for name in ("two", "one"))
    assert headline.beaten(two).endswith(" worse. It is untested, since no two seeds are shared")
    assert headline.least(one).endswith("; SFT's is 60 % at 95 % (one seed, which decides nothing)")


@pytest.mark.parametrize(
    ("values", "seeds", "said"),
    [
        (
            {"sft": 60.0, "lisa": 5.0, "bea": 5.0},
            (0, 1),
            "the lowest HS is that of Lisa and BEA, 5 %, at an FA of {0} and {0} %",
        ),
        ({"sft": 60.0, "lisa": 5.0}, (0,), "the lowest HS is that of Lisa, 5 %, at an FA of {0} %"),
        ({"lisa": 5.0}, (0, 1), "the lowest HS is that of Lisa, 5 %, at an FA of {0} %"),
        ({"sft": 5.0}, (0,), "the lowest HS is that of SFT, 5 %, at an FA of {0} %"),
    ],
)
def test_without_cwac_the_lowest_stand_beside_sft_with_what_they_cost(tmp_path, values, seeds, said):
    view = planted_view(tmp_path, values, seeds)
    fa = f"{view.mean(view.methods[0], 'FA'):.0f}"
    expected = said.format(fa) + (f"; SFT's is 60 % at {fa} %" if values.get("sft") == 60.0 else "")
    assert headline.least(view) == expected + ("" if len(seeds) > 1 else " (one seed, which decides nothing)")


@pytest.mark.parametrize(
    ("hs", "start", "told"), [(0.0, True, True), (6.0, True, True), (6.2, True, False), (0.0, False, False)]
)
@pytest.mark.parametrize("methods", [("sft", "cwac"), ("sft", "lisa")])
def test_where_sft_lost_nothing_no_defence_can_be_told_from_none(tmp_path, hs, start, told, methods):
    """The aligned model's HS is 1.0, the margin 5 points."""
    text = headline.sentence(planted_view(tmp_path, dict.fromkeys(methods, hs), start=start))
    said = f" SFT did not lose its refusals here (HS {hs:.1f} %, the aligned model's 1.0 %), so these runs cannot"
    assert (said in text) == told and ("train longer, or with a higher harmful_ratio." in text) == told


def test_without_a_harmful_row_longer_training_is_no_remedy(tmp_path):
    view = replace(planted_view(tmp_path, {"sft": 0.0, "cwac": 0.0}), ratio=0.0)
    text = headline.sentence(view)
    assert "Remedy: train with harmful_ratio=0.1 or more." in text and "longer" not in text


def test_the_count_at_tuned_values_stands_beside_what_keeps_it_from_being_a_ranking():
    """A reader of the README took 15 of 26 for a ranking; the caveat stood on another page alone."""
    for page in (README, ROOT / "docs" / "results" / "real_model.md"):
        after = " ".join(page.read_text(encoding="utf-8").split()).partition("At tuned values ")[2]
        sentence = after.partition(". ")[0]
        assert "not equally wide" in sentence, sentence
        where = re.search(r"\[no ranking\]\(([^)#]+)#at-tuned-values\)", sentence)[1]
        assert "## At tuned values" in (page.parent / where).read_text(encoding="utf-8")


def recommended() -> dict[tuple[str, int], tuple[str, str]]:
    """(model, steps) -> energy and rate of the table on docs/nullspace.md."""
    text = (ROOT / "docs" / "nullspace.md").read_text(encoding="utf-8").partition("## Which energy and rate")[2]
    rows = [
        [c.strip(" `") for c in line.split("|")[1:-1]] for line in re.findall(r"(?m)^\| `.*$", text.split("\n## ")[0])
    ]
    return {(model, int(steps)): (energy, rate) for model, _, steps, energy, rate, _ in rows if steps.isdigit()}


def test_the_recommended_pairs_are_those_that_ran():
    pairs = recommended()
    long = OmegaConf.load(paths.CONF / "experiment" / "nullspace_smollm2_long.yaml")
    assert pairs["smollm2", 350] == (f"{long.method.energy:g}", paper.rate_label(long.train.learning_rate))
    default = f"{OmegaConf.load(paths.CONF / 'method' / 'nullspace.yaml').energy:g}"
    for name, key in (("smollm2_main", ("smollm2", 32)), ("qwen_main", ("qwen_coder_05b", 32))):
        (ran,) = {m for m in pages.view(name).methods if m.startswith("nullspace")}
        assert pairs[key] == (default, paper.method_label(ran).partition("rate ")[2])
    points = pages.estimates("nullspace_task/frontier.csv").query("method.str.startswith('nullspace')")
    best = points.loc[points["objective"].idxmin(), "setting"]
    energy = pages.energy("nullspace").strip(" ()").partition(" ")[2]
    assert pairs["tiny", 750] == (energy, paper.setting_label(best).partition("rate ")[2])


def test_commands_for_rows_of_ones_own_name_the_energy_that_is_advised_where_nothing_is_known():
    """Without it the default applies, which did not hold SmolLM2 for long."""
    for page in (README, ROOT / "docs" / "defend.md"):
        text = " ".join(page.read_text(encoding="utf-8").split())
        commands = re.findall(r"examples/defend_your_trainer\.py --method nullspace (.*?)(?=`|python )", text)
        own = [command for command in commands if "--rows" in command]
        assert own and all("method.energy=0.9999" in c and "--learning-rate" in c for c in own), own


NAMED_RATE = re.compile(r"\b(?:rates?|lr|learning_rate)`?(?: ?[=:] ?| of | )`?(\d[\d.]*(?:e[-+]?\d+)?)(?![\d%])")
TITLES = ("lr", "rate", "learning rate", "train.learning_rate")


def rates_in(text: str) -> list[str]:
    """Learning rates as a page has them: behind their name, and in the columns of tables that are named so."""
    found = [number.rstrip(".") for number in NAMED_RATE.findall(text)]
    for table in re.findall(r"(?m)(?:^\|.*\n)+", text):
        head, _, *rows = ([c.strip(" `") for c in line.split("|")[1:-1]] for line in table.splitlines())
        columns = [k for k, title in enumerate(head) if title in TITLES]
        cells = [row[k] for row in rows for k in columns if k < len(row)]
        found += [number for c in cells for number in re.findall(r"\d[\d.]*(?:e[-+]?\d+)?", c)]
    return found


SHOWN = [*LINKED, *(p for p in (ROOT / "results").rglob("*.md") if "local" not in p.relative_to(ROOT).parts)]


@pytest.mark.parametrize("page", sorted(set(SHOWN)), **ids)
def test_a_learning_rate_has_one_form_on_every_page(page):
    """Readers met 2e-4, 0.0002 and 2e-05 for two rates. Remedy: `paper.rate_label`; of an export, --exported."""
    other = {r for r in rates_in(page.read_text(encoding="utf-8")) if paper.rate_label(float(r)) != r}
    assert not other, other


def test_other_forms_of_a_rate_are_found():
    table = "| lr | n |\n|--|--|\n| 0.001 | 5e-05 |\n"
    text = "SFT, rate 6e-06 and `lr=0.0002`, train.learning_rate=1.0e-4; rate 2e-4."
    assert rates_in(f"{text}\n\n{table}") == ["6e-06", "0.0002", "1.0e-4", "2e-4", "0.001"]
    assert rates_in("a lower rate 2 methods; at a rate of 0.05, then 50 %") == ["2", "0.05"]


def test_a_table_of_ten_rows_begins_with_the_aligned_model_and_the_lowest_hs(view):
    lines = headline.table(view).splitlines()
    firsts = [line.split("|")[1].strip() for line in lines[2:]]
    assert firsts[:2] == ["aligned, not fine-tuned", "CWAC closed (ours)"] and firsts[-1] == "SFT" and len(firsts) == 7
    few = headline.table(view, most=4).splitlines()
    assert len(few) == 2 + 4 and any("| CWAC " in line for line in few) and any("| SFT " in line for line in few)


def test_what_held_is_near_the_aligned_model_and_costs_no_accuracy(view, monkeypatch):
    """CWAC and its halves are far above the aligned model's HS, and `cwac_closed` loses 35 points of accuracy."""
    steps = {r["name"]: r["ratio"] for r in json.loads((ROOT / "benchmarks" / "latest.json").read_text())}
    kind, measured = type(view), type(view).mean
    start = {(paper.ALIGNED, "HS"): 20.0}
    monkeypatch.setattr(kind, "mean", lambda *args: start.get(args[1:]) or measured(*args))
    monkeypatch.setattr(pages, "view", lambda name: view)
    monkeypatch.setattr(headline, "MARGIN", 30.0)
    firsts = [
        [c.strip() for c in line.split("|")[1:-1]] for line in pages.held(README).splitlines()[2:] if "|" in line
    ]
    assert [(row[0], row[1][:4], row[4]) for row in firsts] == [
        ("weight-only closed (ours)", "41.6", f"{steps['step of weight_only_closed']:.2f}")
    ]
    start[paper.ALIGNED, "HS"] = 11.5
    assert "weight-only closed" not in pages.held(README)


def test_a_benchmarks_rows_show_their_interval_where_they_have_one(tmp_path, monkeypatch):
    made = {"rival": "step of sft", "bar": 0.75, "met": True}
    rows = [
        made | {"name": "step of mine, k 64", "ratio": 0.641, "spread": [0.63, 0.65]},
        made | {"name": "bytes of mine, k 64", "ratio": 0.5, "spread": [0.5, 0.5], "bar": None},
        made | {"name": "step of other", "ratio": 2.0, "spread": [2.0, 2.0]},
    ]
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "latest.json").write_text(json.dumps(rows))
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    lines = pages.bench(README, "mine,+k").splitlines()
    assert lines[2:4] == [
        "| step of mine, k 64 | step of sft | 0.64 [0.63, 0.65] | 0.75 |",
        "| bytes of mine, k 64 | step of sft | 0.50 | - |",
    ]
    with pytest.raises(UserError, match="latest.json has no row with yours.*run the benchmark"):
        pages.bench(README, "yours")


def test_an_accuracy_of_0_before_fine_tuning_is_explained(view, monkeypatch):
    assert "hence an FA of 0" not in headline.conditions(view)
    monkeypatch.setattr(type(view), "mean", lambda self, method, metric: 0.0)
    assert "hence an FA of 0" in headline.conditions(view)


def test_every_mark_of_a_table_is_explained_beside_it(view):
    shown = headline.table(view)
    assert "‡" not in headline.words(shown.replace("‡", "")) and "‡: the interval" in headline.words(f"{shown} ‡")
    assert "§" not in headline.words(shown.replace("§", "")) and "nothing of other seeds" in headline.words("§ (n=1)")
    assert set("†‡§") & set(pages.held(README)) <= set(headline.words(pages.held(README)))


def test_the_figure_marks_every_method_shown(view):
    plate = headline.plate(view, 5)
    axes = plate.figure.axes
    assert [t.get_text() for t in axes[0].get_yticklabels()][-1] == "SFT" and len(axes[0].get_yticklabels()) == 5
    assert "p = 0.2" in plate.title


def test_one_learning_rate_of_several_is_shown(tmp_path):
    frame = pd.DataFrame({"learning_rate": [1e-4, 1e-4, 1e-3], "method": ["sft", "cwac", "sft"]})
    assert headline.usual_rate(frame) == 1e-4


# --- code blocks --------------------------------------------------------------------------------------


def blocks(kind: str) -> list[str]:
    return re.findall(rf"(?m)^```{kind}\n(.*?)^```", README.read_text(encoding="utf-8"), re.S)


def test_the_readmes_code_defends_a_trainer(tmp_path):
    """Its twelve lines as they stand, in a folder with the rows alone; then the line of *Did it hold?*, and its rows.

    Nothing but the installed package may be imported: `from examples...` worked in the checkout's root only. The rows
    that the README shows are those that are printed, but for the last digits of what was trained.
    """
    (code,) = blocks("python")
    lines = [line for line in code.splitlines() if line]
    assert len(lines) <= 12
    (tmp_path / "examples").mkdir()
    shutil.copy(ROOT / "examples" / "reviews.jsonl", tmp_path / "examples")
    assert not re.search(r"\b(from|import) (examples|experiments|analysis)\b", code)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    trained = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert trained.returncode == 0, trained.stderr
    command = re.search(r"\*\*Did it hold\?\*\* `python ([^`]+)`", README.read_text(encoding="utf-8"))[1]
    done = subprocess.run([sys.executable, *command.split()], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "'train_loss':" in trained.stdout
    shown, printed = (
        [[c.strip() for c in line.split("|")] for line in text.splitlines()]
        for text in (blocks("text")[0], done.stdout)
    )
    head, before, after = shown
    assert head in printed and before in printed, done.stdout
    assert before[1:3] == ["tiny", "toy_harmful"] and after[1:3] == ["runs/mine", "toy_harmful"]
    (found,) = [row for row in printed if row[:3] == after[:3]]
    for ours, theirs in zip(after[3:6], found[3:6], strict=True):
        assert abs(float(ours.split()[0]) - float(theirs.split()[0])) <= 5, (after, found)


@pytest.mark.slow
def test_the_readmes_two_commands_run(tmp_path):
    """`make demo` of two methods and one seed, then `make report`, in a copy of the repository."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    for name in listed:
        if name and not name.startswith(("results/", "tests/")):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    commands = [line.split("#")[0].strip() for line in blocks("bash")[0].splitlines()]
    assert commands == ["make demo", "make report"]
    small = "method=sft,weight_only seed=0 harmful_ratio=0.1"
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    for command, more in zip(commands, (f"ARGS={small}", ""), strict=True):
        words = [*command.split(), f"PY={sys.executable}", *([more] if more else [])]
        done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "results" / "local" / "report.html").stat().st_size > 10_000
    assert Path(tmp_path / "results" / "local" / "demo" / "table.md").read_text().count("| SFT") >= 1


@pytest.mark.parametrize(
    "block",
    [
        "include:gone/table.md:1",
        "picture:gone/a.png",
        "sheet:gone/a.csv",
        "overview:gone",
        "course:gone",
        "beside_paper:gone",
    ],
)
def test_a_block_of_what_is_not_there_is_one_line(block, tmp_path):
    page = tmp_path / "page.md"
    text = f"<!-- made:{block} -->\n<!-- /made:{block} -->\n"
    with pytest.raises(UserError, match="results/gone(/.*)? is missing. Remedy: restore it from git"):
        pages.fill(page, text)
