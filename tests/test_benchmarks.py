"""The instrument of `make bench`: same batches, a planted cost is found, a failure ends it, the report is complete."""

import json
import time

import pytest
import torch

from benchmarks import methods
from cwac import config
from cwac.config import UserError
from tests.conftest import SMALL
from tests.test_configs import METHODS


@pytest.fixture
def pair(random_model, tmp_path):
    """SafeInstr's trainer and SFT's beside it, 12 steps on the random model."""
    cfg = config.compose(
        [
            "method=safeinstr",
            "model.kind=folder",
            f"+model.path={random_model}",
            f"paths.runs={tmp_path / 'runs'}",
            "harmful_ratio=0.1",
            "train.max_steps=12",
            *SMALL,
        ]
    )
    return methods.trainers(cfg)


def test_every_method_is_found():
    assert methods.methods() == METHODS and set(methods.BARS) <= set(METHODS)


def test_both_train_on_the_same_batches_and_a_planted_cost_is_found(pair):
    fed = ([], [])
    for trainer, seen in zip(pair, fed, strict=True):
        given = trainer.compute_loss

        def compute_loss(model, inputs, *args, given=given, seen=seen, **kwargs):
            seen.append(inputs["input_ids"].clone())
            return given(model, inputs, *args, **kwargs)

        trainer.compute_loss = compute_loss

    def after_step(model):
        until = time.thread_time() + 0.05
        while time.thread_time() < until:
            pass

    pair[0].method.after_step = after_step
    measured = methods.ratios(pair)
    assert len(measured) == 12 - methods.WARM_UP and measured.min() > 1.3
    assert len(fed[0]) == 12 and all(map(torch.equal, *fed))
    states = [t.model.state_dict() for t in pair]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])  # SafeInstr's steps are SFT's


def test_a_failure_of_one_ends_both(pair):
    def before_step(model):
        raise UserError("planted")

    pair[0].method.before_step = before_step
    with pytest.raises(UserError, match="planted"):
        methods.ratios(pair)


def test_the_report_names_rival_spread_and_bar(random_model, tmp_path, capsys):
    out = tmp_path / "latest.json"
    given = ["model.kind=folder", f"+model.path={random_model}", *SMALL]
    assert methods.main(["--methods", "sft,safeinstr", "--steps", "10", "--out", str(out), *given]) in (0, 1)
    sft, safeinstr = json.loads(out.read_text())
    assert set(sft) == set(safeinstr) == {"name", "rival", "ratio", "spread", "bar", "met"}
    assert (sft["bar"], sft["met"], safeinstr["bar"]) == (None, None, 1.05)
    assert safeinstr["met"] == (safeinstr["ratio"] <= 1.05)
    assert all(row["spread"][0] <= row["ratio"] <= row["spread"][1] for row in (sft, safeinstr))
    table = capsys.readouterr().out
    assert "| sft " in table and "| safeinstr " in table
    assert methods.main(["--methods", "nosuch", "--out", str(out)]) == 2
    assert methods.main(["--steps", "5", "--out", str(out)]) == 2
