"""The site: links as it needs them, a section for every method, and a strict build."""

import importlib.util
import math
import re
import subprocess
import sys

import pytest
import yaml

from analysis import site
from cwac.core import paths

METHODS = sorted(p.stem for p in (paths.CONF / "method").glob("*.yaml"))


def test_links_out_of_docs_lead_to_the_pages_that_show_the_files():
    text = (
        "[a](../conf/README.md#x) ![b](../results/demo/ratio.png) [c](../train.py) [d](glossary.md) [e](https://x.org)"
    )
    assert site.mapped(text, "start.md") == (
        "[a](configuration.md#x) ![b](results/demo/ratio.png) `c` [d](glossary.md) [e](https://x.org)"
    )
    assert site.mapped("[a](docs/glossary.md)", "index.md") == "[a](glossary.md)"
    assert site.mapped("[a](../glossary.md)", "results/index.md") == "[a](../glossary.md)"
    assert site.mapped("`[a](gone.md)`", "start.md") == "`[a](gone.md)`"


def test_what_a_page_is_made_of_leads_to_the_page_and_no_source_links_to_what_only_the_site_has():
    assert site.mapped("[the methods](methods.yaml#lisa)", "defend.md") == "[the methods](methods.md#lisa)"
    with pytest.raises(site.DeadLink, match="docs/defend.md: methods.md"):
        site.mapped("[the methods](methods.md)", "defend.md")


def test_a_link_to_nothing_fails():
    with pytest.raises(site.DeadLink, match="docs/start.md: gone.md"):
        site.mapped("[a](gone.md)", "start.md")


def test_every_method_has_a_section_with_idea_equation_and_keys():
    page = site.methods_page()
    sections = dict(re.findall(r"(?ms)^## [^\n]*\{ #(\w+) \}\n(.*?)(?=^## |\Z)", page))
    assert sorted(sections) == METHODS
    said = sections["cwac_closed"]
    assert "```text\ndW_m V_m = 0" in said and "| `method.weight.modules` | `all` |" in said
    assert "| `method.weight.energy` | `0.99` | ours: stands for tau, which is not given |" in said
    assert "[CWAC](#cwac)" in said and "**Deviations**" in sections["cwac"]


def test_ideas_are_of_three_sentences_and_belong_to_a_method():
    entries = yaml.safe_load((site.ROOT / "docs" / "methods.yaml").read_text(encoding="utf-8"))
    assert set(entries) <= set(METHODS)
    for name, entry in entries.items():
        assert len(re.findall(r"[.!?](?:\s|$)", entry["idea"])) <= 3, name


def test_a_method_without_an_entry_shows_its_docstring():
    said = site.section("lisa", {})
    assert "Lisa: lazy safety alignment by bi-state optimisation." in said and "```text" not in said
    assert "Algorithm 2: K1 steps on alignment data" in said


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="pip install -e '.[docs]'")
@pytest.mark.slow
def test_the_site_builds_strictly_and_fetches_nothing(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=site.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 30 and (tmp_path / "methods.html").is_file() and (tmp_path / "search").is_dir()
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"<(?:script|link|img)[^>]*(?:src|href)=\"?(?:https?:)?//", text), page.name
        assert "cwac.methods.base.Method" in text or page.name != "reference.html"


def test_the_runs_of_each_table_and_figure_are_its_sweeps_cells():
    """A preset's cells are the product of its sweep's lists; seeds are among them."""
    page = (paths.CONF.parent / "docs" / "reproduce.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|]+\| (\d+) \| `python train.py -m experiment=(\w+)`", page, re.M)
    assert len(rows) == 8
    for runs, name in rows:
        preset = yaml.safe_load((paths.CONF / "experiment" / f"{name}.yaml").read_text(encoding="utf-8"))
        lists = preset["hydra"]["sweeper"]["params"].values()
        assert int(runs) == math.prod(len(str(values).split(",")) for values in lists), name
