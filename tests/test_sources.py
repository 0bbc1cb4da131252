"""experiments/sources.py: the energy of a planted span, and the command on the embedded world."""

import pandas as pd
import pytest
import torch

from cwac.constraints.subspace import Basis, capture
from cwac.models.layers import linears
from experiments import sources
from tests.conftest import random_rows


def test_the_energy_is_the_least_over_the_inputs(llama):
    rows = random_rows(6, seed=3)
    modules = {"0.down_proj": linears(llama, ["down_proj"])["0.mlp.down_proj"]}
    seen = []
    capture(llama, rows, modules, lambda name, x, first: seen.append(x))
    x = torch.cat(seen).double()
    V = torch.linalg.qr(torch.randn(x.shape[1], 5, generator=torch.Generator().manual_seed(0)))[0]
    expected = float((x @ V.double()).square().sum() / x.square().sum())
    bases = {"0.down_proj": Basis(V, 1.0, 9)}
    assert sources.held(llama, rows, bases, modules) == pytest.approx(expected, rel=1e-5)
    modules["1.down_proj"] = linears(llama, ["down_proj"])["1.mlp.down_proj"]
    bases["1.down_proj"] = Basis(torch.zeros_like(V), 1.0, 9)
    assert sources.held(llama, rows, bases, modules) == 0


def test_the_command_measures_every_source_under_every_fit(artifacts, tmp_path, capsys):
    before, *after = ["model=tiny", "method.weight.modules=[down_proj]", f"paths.artifacts={artifacts}"]
    assert sources.main([before, "--draws", "2", "--anchors", "12", "--out", str(tmp_path), *after]) == 0
    table = pd.read_csv(tmp_path / "sources.csv")
    kinds = sorted({*table["prompts"]} - {"harmless"})
    assert len(kinds) >= 8 and {*table["anchors"]} == {*kinds, "mixed", "all"} and {*table["draw"]} == {0, 1}
    assert len(table) == 2 * (len(kinds) + 2) * (len(kinds) + 1)
    means = table.groupby(["anchors", "prompts"])["energy"].mean().unstack()
    assert (means.loc["all", kinds] > means.loc[kinds, kinds].mean()).all()  # more anchors of more kinds hold more
    assert (means.loc["all", kinds] > means.loc["all", "harmless"]).all()  # which is what room to learn is
    assert "anchors from" in capsys.readouterr().out and (tmp_path / "sources.png").stat().st_size > 0


def test_an_interval_is_over_seeds_where_there_are_several():
    part = pd.DataFrame({"seed": [0, 0, 1, 1], "energy": [0.89, 0.91, 0.91, 0.93]})
    assert sources.shown(part) == "91.0 ± 12.7"  # of 90 and 92: t(1) = 12.7, a standard error of 1
    assert sources.shown(part[part["seed"] == 0]) == "90.0 ± 12.7"
    assert sources.shown(part[:1]) == "89.0"


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["method=sft"], "method=sft has no anchors' span"),
        (["--anchors", "1000"], "--anchors 1000 is more than all sources but one have"),
        (["--test", "0"], "--test 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(given, named, artifacts, tmp_path, capsys):
    assert sources.main(["--out", str(tmp_path / "out"), *given, f"paths.artifacts={artifacts}"]) == 2
    assert named in capsys.readouterr().err and not (tmp_path / "out").exists()
