"""Renamed keys: the old ones still work and say what they are called now, and no id moves."""

import json
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from cwac.constraints.sae.fit import SAEConfig
from cwac.core import config, renamed
from cwac.core.config import compose, expand
from cwac.core.identity import eval_id, run_id
from cwac.training.library import load_method
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def forget():
    """Each test hears its notes anew."""
    renamed.announce.cache_clear()


PAIRS = {
    "method.weight.every=4": "method.weight.project_every=4",
    "++method.weight.soft=0.1": "++method.weight.penalty_weight=0.1",
    "+method.weight.free=[q_proj]": "+method.weight.unconstrained=[q_proj]",
    "~method.activation.rank": "~method.activation.ranking",
    "method.activation.rank=activation,cosine": "method.activation.ranking=activation,cosine",
    "model.sae.slots=[1,2],auto": "model.sae.layers=[0,1],auto",
    "method.activation.sae.router=fixed:2": "model.sae.router=layer:1",
    "method.weight={every: 4, free: [v_proj]},{soft: 1}": (
        "method.weight={project_every: 4, unconstrained: [v_proj]},{penalty_weight: 1}"
    ),
    "method.activation={rank: cosine, sae: {slots: [2, 3], router: fixed:3}}": (
        "method.activation={ranking: cosine, sae: {layers: [1, 2], router: layer:2}}"
    ),
}


@pytest.mark.parametrize(("old", "new"), PAIRS.items())
def test_an_old_override_is_rewritten_and_said_once(old, new, capsys):
    assert renamed.rewrite([old, old]) == [new, new]
    said = capsys.readouterr().err.splitlines()
    assert said and len(said) == len(set(said)) and all(line.startswith("note: ") for line in said)
    assert renamed.rewrite([new]) == [new] and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "override",
    ["-m", "--cfg", "job", "method=asft", "method.rank=128", "model.lora={r: 8, alpha: 16}", "train.save_steps=4"]
    + ["model.sae.router=hard", "poison_trigger='every free slots: {rank: 1}'", "method.name=closed-0.999-every-4"],
)
def test_what_is_no_old_key_passes_as_it_is(override, capsys):
    assert renamed.rewrite([override]) == [override] and capsys.readouterr().err == ""


# run ids of the commit before the keys were renamed, of these overrides in its own words
BEFORE = {
    ("method=weight_only_closed", "method.weight.every=4"): "tiny-toy_sentiment-p0-weight_only_closed-s0-ecc23d96",
    ("method=weight_only_closed", "method.weight.soft=0.1"): "tiny-toy_sentiment-p0-weight_only_closed-s0-47c318e1",
    (
        "method=cwac_closed",
        "method.weight.free=[q_proj,v_proj]",
        "harmful_ratio=0.1",
    ): "tiny-toy_sentiment-p0.1-cwac_closed-s0-e1b16a27",
    ("method=cwac", "method.activation.rank=activation", "seed=2"): "tiny-toy_sentiment-p0-cwac-s2-f2d7910c",
    ("method=cwac", "model.sae.slots=[1,3]"): "tiny-toy_sentiment-p0-cwac-s0-5e91458e",
    (
        "method=activation_only",
        "model.sae.router=fixed:2",
        "model.sae.slots=[1,2]",
    ): "tiny-toy_sentiment-p0-activation_only-s0-6cbbcb03",
}
NOW = {
    # once [1,2], and normalised by token
    ("method=ldifs", "method.layers=[0,1]", "method.unit=token"): "tiny-toy_sentiment-p0-ldifs-s0-b3042b4c",
    # once [3], and what is now an option
    (
        "method=circuit_breaker",
        "method.layers=[2]",
        "method.first_step=0",
        "method.retain_states=blocks",
        "method.empty_instructions=0",
    ): "tiny-toy_sentiment-p0-circuit_breaker-s0-8200683f",
    ("method=sppft", "method.layers=[0,1]"): "tiny-toy_sentiment-p0-sppft-s0-e42e0440",  # counted from 0 all the time
}


@pytest.mark.parametrize(("overrides", "name"), [*BEFORE.items(), *NOW.items()])
def test_ids_are_those_of_before(overrides, name):
    assert run_id(compose([*overrides])) == run_id(compose(renamed.rewrite([*overrides]))) == name
    (cell,) = expand(None, [*overrides])
    assert f"{run_id(cell)} {eval_id(cell)}" == f"{name} {eval_id(compose())}"


def test_an_old_configuration_is_brought_up_to_date(capsys):
    """As `config.yaml` of a run from before: its id is the one that its folder has."""
    now = compose(["method=cwac", "method.weight.every=4", "model.sae.slots=[1,3]", "model.sae.router=fixed:3"])
    old = OmegaConf.to_container(now, resolve=True)
    for weight in (old["method"]["weight"],):
        weight["every"], weight["soft"] = weight.pop("project_every"), weight.pop("penalty_weight")
        weight["free"] = weight.pop("unconstrained")
    old["method"]["activation"]["rank"] = old["method"]["activation"].pop("ranking")
    for sae in (old["model"]["sae"], old["method"]["activation"]["sae"]):
        del sae["layers"]
        sae.update(slots=[1, 3], router="fixed:3")
    again = renamed.update(OmegaConf.create(json.loads(json.dumps(old))))
    assert again == OmegaConf.create(OmegaConf.to_container(now, resolve=True)) and run_id(again) == run_id(now)
    assert again.model.sae.layers == [0, 2] and again.method.weight.project_every == 4
    assert "method.weight.every is now method.weight.project_every" in capsys.readouterr().err


def test_an_old_yaml_wins_over_the_new_keys_default():
    """A preset, or values that a search chose, may still be written with the old key."""
    cfg = OmegaConf.create({"method": {"weight": {"every": 4, "project_every": 1}}})
    assert OmegaConf.to_container(renamed.update(cfg)) == {"method": {"weight": {"project_every": 4}}}


def test_an_autoencoders_key_is_that_of_before():
    key = SAEConfig(layers=[0, 2], router="layer:1").key()
    assert key["slots"] == [1, 3] and key["router"] == "fixed:2" and "layers" not in key
    later = {"pretrained", "schedule", "corpus", "corpus_text", "corpus_config", "max_repeats"}
    assert not later & key.keys()  # at their defaults: an older artifact is still found
    fields = vars(SAEConfig(layers=[0, 2], router="layer:1"))
    assert renamed.current_group("model.sae", key) == {k: v for k, v in fields.items() if k not in later}
    assert SAEConfig().key()["slots"] == "auto"


def test_a_method_of_another_script_takes_old_keys(capsys):
    method = load_method("weight_only", "tiny", "method.weight.every=3")
    assert method.weight.project_every == 3
    assert "method.weight.every is now method.weight.project_every" in capsys.readouterr().err


def test_the_command_line_takes_old_keys(tmp_path):
    given = ["method=weight_only", "method.weight.every=3", "--cfg", "job"]
    done = subprocess.run([sys.executable, "train.py", *given], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "project_every: 3" in done.stdout and "\n    every:" not in done.stdout
    note = "note: method.weight.every is now method.weight.project_every; the old name still works"
    assert done.stderr.splitlines() == [note]
    # a preset's own sweep reaches Hydra as it is written
    assert renamed.hint("Could not override 'method.weight.every'.") == (
        "method.weight.every is now method.weight.project_every"
    )
    assert renamed.hint("Could not override 'method.weight.energies'.") == ""


def test_every_new_key_is_in_the_configuration_and_no_old_one():
    cfg = config.compose(["method=cwac"])
    for old, new in renamed.RENAMED.items():
        group, _, name = old.rpartition(".")
        assert OmegaConf.select(cfg, new, default="absent") != "absent" and name not in OmegaConf.select(cfg, group)
