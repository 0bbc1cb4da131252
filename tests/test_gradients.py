"""experiments/gradients.py: the gradients, their shares inside a span, and the command on the embedded world."""

import pandas as pd
import pytest
import torch

from cwac.data.tokenize import Collator
from cwac.models.layers import linears
from experiments import gradients
from tests.conftest import random_rows


def labelled(n, seed):
    return [{**row, "labels": [-100, *row["input_ids"][1:]]} for row in random_rows(n, seed=seed)]


def test_the_mean_gradient_is_of_the_loss_a_label_token_however_it_is_batched(llama):
    rows = labelled(7, 3)
    batch = Collator(2)([dict(row) for row in rows])
    llama.zero_grad()
    llama(**batch).loss.backward()
    whole = {name: module.weight.grad.double().clone() for name, module in linears(llama, "all").items()}
    found = gradients.mean_gradients(llama, rows, 2, batch_size=3)
    assert found.keys() == whole.keys()
    for name in whole:
        assert torch.allclose(found[name], whole[name], atol=1e-7)
    assert all(p.grad is None for p in llama.parameters())


def test_shares_and_cosines_are_those_of_a_planted_span():
    V = torch.eye(6)[:, :2]
    task, poison = torch.zeros(4, 6).double(), torch.zeros(4, 6).double()
    task[0, 0], task[0, 5] = 1.0, 3.0  # a tenth inside
    poison[0, 0], poison[0, 5] = -3.0, 1.0  # nine tenths inside, opposed there, in line outside
    found = gradients.compare(task, poison, V)
    expected = {"task_inside": 0.1, "poison_inside": 0.9, "random_inside": 1 / 3}
    assert found == pytest.approx({**expected, "cosine_inside": -1, "cosine_outside": 1})


def test_the_command_measures_every_matrix_of_every_seed(artifacts, tmp_path, capsys):
    given = [f"paths.artifacts={artifacts}", "task.n_train=40", "harmful_ratio=0.5"]
    assert gradients.main(["--seeds", "0", "--out", str(tmp_path), *given]) == 0
    table = pd.read_csv(tmp_path / "gradients.csv")
    assert set(table["kind"]) == set(gradients.KINDS) and table["layer"].nunique() * 7 == len(table)
    shares = table[["task_inside", "poison_inside"]]
    assert ((shares >= 0) & (shares <= 1)).all(axis=None)
    assert (tmp_path / "gradients.png").stat().st_size > 0 and "down_proj" in capsys.readouterr().out


@pytest.mark.parametrize(
    "given, named",
    [
        (["method=sft"], "method=sft has no anchors' span"),
        (["harmful_ratio=0"], "harmful_ratio=0"),
        (["--seeds", "x"], "--seeds x"),
    ],
)
def test_what_cannot_be_measured_is_refused(given, named, artifacts, tmp_path, capsys):
    assert gradients.main(["--out", str(tmp_path / "out"), *given, f"paths.artifacts={artifacts}"]) == 2
    assert named in capsys.readouterr().err and not (tmp_path / "out").exists()
