"""The terms of Eq. 4 on random models whose change is planted, and the command on a run that kept its weights."""

import copy
import json

import pytest
import torch

from cwac.models.layers import linears
from experiments import activations
from tests.conftest import SMALL, make_llama, random_rows, run_train


def change(model, name: str, size: float = 0.05) -> None:
    weight = linears(model, "all")[name].weight
    with torch.no_grad():
        weight += size * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))


def entry(found: list[dict], layer: int, kind: str) -> dict:
    (one,) = [e for e in found if (e["layer"], e["kind"]) == (layer, kind)]
    return one


def test_terms_where_one_matrix_moved():
    """Before it nothing moves, at it only dW h0, after it only W0 dh."""
    reference = make_llama().eval()
    model = copy.deepcopy(reference)
    change(model, "1.mlp.down_proj")
    found = activations.decompose(model, reference, random_rows(6))
    assert len(found) == 3 * 7
    for kind in ("q_proj", "down_proj"):
        assert [entry(found, 0, kind)[t] for t in activations.TERMS] == [0.0] * 4
    moved = entry(found, 1, "down_proj")
    assert moved["dW_h0"] > 0.01 and moved["W0_dh"] == moved["dW_dh"] == 0.0
    assert moved["dy"] == pytest.approx(moved["dW_h0"])
    after = entry(found, 2, "q_proj")
    assert after["W0_dh"] > 0.01 and after["dW_h0"] == after["dW_dh"] == 0.0


def test_the_three_terms_add_up_to_the_change_of_the_output():
    reference = make_llama().eval()
    model = copy.deepcopy(reference)
    for name in linears(model, "all"):
        change(model, name)
    rows = random_rows(5)
    (got,) = [e for e in activations.decompose(model, reference, rows) if (e["layer"], e["kind"]) == (2, "up_proj")]
    outputs = {}
    for key, m in (("now", model), ("then", reference)):
        parts = []
        handle = linears(m, "all")["2.mlp.up_proj"].register_forward_hook(
            lambda _m, _i, y, p=parts: p.append(y[0, -1])
        )
        with torch.no_grad():
            for row in rows:
                m(input_ids=torch.tensor([row["input_ids"]]))
        handle.remove()
        outputs[key] = torch.stack(parts)
    expected = (outputs["now"] - outputs["then"]).norm(dim=1) / outputs["then"].norm(dim=1)
    assert got["dy"] == pytest.approx(float(expected.median()), rel=1e-4)
    assert got["dW_dh"] > 0


def test_a_run_without_weights_is_one_clear_error(tmp_path, capsys):
    assert activations.main(["--run", str(tmp_path / "nowhere")]) == 2
    assert "no readable config.yaml" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    assert activations.main(["--run", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "keep_weights=true" in error and error.count("\n") == 1


@pytest.mark.slow
def test_the_command_measures_a_run_that_kept_its_weights(tmp_path, artifacts, capsys):
    """Also: with every matrix held on the anchors, dW h0 is small on held-out prompts of the same grammar."""
    paths = [f"paths.runs={tmp_path / 'runs'}", f"paths.artifacts={artifacts}"]
    common = ["model=tiny", "task=toy_sentiment", "harmful_ratio=0.1", "keep_weights=true", "train.max_steps=6"]
    code, output = run_train("-m", "method=sft,weight_only_closed", *common, *paths, *SMALL, "eval.n_drift=16")
    assert code == 0, output
    folders = sorted(p.parent for p in (tmp_path / "runs").glob("*/config.yaml"))
    assert activations.main(["--run", *map(str, folders)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(f / activations.NAME) for f in folders]
    leak = {}
    for folder in folders:
        written = json.loads((folder / activations.NAME).read_text())
        assert written["run_id"] == folder.name and written["prompts"] > 0
        values = [m["dW_h0"] for m in written["matrices"] if m["kind"] == "down_proj"]
        leak[folder.name.split("-")[3]] = sum(values)
    assert 0 < leak["weight_only_closed"] < 0.2 * leak["sft"]
