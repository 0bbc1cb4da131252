"""experiments/causal.py: the verdicts of planted rates, and the command on the embedded world."""

import json

import pandas as pd
import pytest

from experiments import causal

SMALL = ["model.sae={tokens: 4096, m: 256, cached_tokens: 4096, batch: 512}", "eval.max_new_tokens=4"]


@pytest.mark.parametrize(
    ("held", "random", "energy", "said"),
    [
        (70, (90, 90), 20, "yes yes"),
        (70.5, (90, 89), 20, "no no"),
        (0, (100, 0), 20, "yes no"),
        (0, (100, 100), 19.9, "yes no match"),
    ],
)
def test_a_verdict_is_a_fall_of_30_points_and_of_at_most_10_at_random(held, random, energy, said):
    rates = {"none": 100.0, "held": held, **{f"random {k}": r for k, r in enumerate(random, 1)}}
    rows = [
        {"seed": 0, "factor": -1.0, "n": 200, "latents": name, "refusal": r, "harmful": 0.0, "other": 100 - r}
        | {"energy": {"none": 0, "held": 40}.get(name, energy), "unchanged": 25.0 if name == "held" else 75.0}
        for name, r in rates.items()
    ]
    lines = [line.split("|")[1:-1] for line in causal.verdicts(pd.DataFrame(rows)).splitlines() if line]
    cells = [
        pair for head, values in zip(lines[::3], lines[2::3], strict=True) for pair in zip(head, values, strict=True)
    ]
    row = {name.strip(): value.strip() for name, value in cells}
    assert f"{row['causal']} {row['specific']}" == said
    assert row["energy, held / random"] == f"40.0 / {energy:.1f}" and row["harmless unchanged"] == "25.0 / 75.0"


def test_the_command_edits_the_held_latents_and_as_many_others(artifacts, tmp_path, capsys):
    before, *after = [*SMALL, f"paths.artifacts={artifacts}"]  # overrides may stand on both sides of options
    given = [before, "--draws", "2", "--prompts", "8", "--out", str(tmp_path), *after]
    assert causal.main(given) == 0
    table = pd.read_csv(tmp_path / "causal.csv")
    assert table["latents"].tolist() == ["none", "held", "random 1", "random 2"] * 2
    assert table["factor"].tolist() == [-1.0] * 4 + [0.0] * 4 and table["n"].nunique() == 1
    assert (table["refusal"] + table["harmful"] + table["other"] - 100).abs().max() < 1e-9
    untouched = table[table["latents"] == "none"]
    assert untouched["refusal"].tolist() == [100, 100]  # only what the model refuses is asked
    assert untouched["unchanged"].tolist() == [100, 100] and table["unchanged"].between(0, 100).all()
    assert table.loc[table["latents"] != "none", "energy"].between(0, 100, inclusive="right").all()
    assert json.loads((tmp_path / "provenance.json").read_text())["overrides"][0] == "method=cwac"
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["method=weight_only"], "method=weight_only holds no latents of an SAE"),
        (["method.activation={space: logits, positions: 'response:16'}"], "method=cwac holds no latents of an SAE"),
        (["--draws", "0"], "--draws 0"),
        (["--seeds", "x"], "--seeds x"),
    ],
)
def test_what_cannot_be_asked_is_refused(given, named, artifacts, tmp_path, capsys):
    assert causal.main(["--out", str(tmp_path / "out"), *given, f"paths.artifacts={artifacts}"]) == 2
    assert named in capsys.readouterr().err and not (tmp_path / "out").exists()
