"""What a command says while it works: the method it set up, what it builds and why, how far a sweep is."""

import logging
import time

import pytest

from cwac.core import cache, failures
from cwac.methods.base import Method, summary


def test_a_build_says_what_why_and_how_long_the_last_one_took(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="cwac.core.cache"):
        cache.load_or_build(tmp_path, "subspace", {"k": 1}, lambda folder: (folder / "a").write_text("x"))
        first = caplog.text
        assert "Protected directions V" in first and "none is there" in first and "the last one" not in first
        assert "built subspace" in first
        (tmp_path / "subspace" / cache.TOOK).write_text("754.2\n")
        folder = cache.load_or_build(tmp_path, "subspace", {"k": 2}, lambda folder: (folder / "a").write_text("x"))
        assert "the last one here took 13 min" in caplog.text
        caplog.clear()
        (folder / "a").write_text("y")
        cache.load_or_build(tmp_path, "subspace", {"k": 2}, lambda folder: (folder / "a").write_text("x"))
        assert "in place of the damaged one" in caplog.text


@pytest.mark.parametrize("seconds, text", [(0.4, "0 s"), (99, "99 s"), (754, "13 min"), (12600, "3.5 h")])
def test_durations_are_as_precise_as_a_wait_needs(seconds, text):
    assert cache.duration(seconds) == text


def test_a_sweep_counts_its_cells_and_estimates_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 10_000.0)
    monkeypatch.setenv(failures.FOLDER, str(tmp_path / "f"))
    monkeypatch.delenv(failures.CELLS, raising=False)
    assert failures.progress(50.0) == ""  # a single run
    monkeypatch.setenv(failures.CELLS, "5")
    monkeypatch.setenv(failures.BEGAN, "9400")
    assert failures.progress(0.2) == "1 of 5 cells, 0 failed; 10 min so far, none trained yet"
    failures.record({"num": 1, "cell": "seed=1", "message": "no", "code": 1})
    assert failures.progress(590.0) == "2 of 5 cells, 1 failed; 10 min so far, about 30 min left"
    for _ in range(2):
        failures.progress(100.0)
    assert failures.progress(100.0) == "5 of 5 cells, 1 failed; 10 min so far"
    assert [row["num"] for row in failures.collect()] == [1] and not (tmp_path / "f").exists()


def test_a_method_is_told_in_one_line():
    from torch import nn

    class Careful(Method):
        def held(self):
            return "holds 3 matrices"

        def penalty(self, model, step):
            return None

        def extra_data(self):
            return {"harmful_prompts": 12}

    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 1, bias=False))
    model[0].weight.requires_grad_(False)
    assert summary(Careful("careful"), model) == (
        "method=careful: holds 3 matrices; extra data: 12 harmful prompts; 25 % of the parameters train; at each step "
        "it may add a penalty"
    )
    assert "a step costs what SFT's does" in summary(Method("sft"), model)
