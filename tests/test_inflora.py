"""InfLoRA: the official rule on a toy, what it protects, its run, and what it refuses."""

import math
import random
from types import SimpleNamespace

import pytest
import torch

from cwac.core.errors import UsageError, UserError
from cwac.core.run_dir import Run
from cwac.methods.inflora import InfLoRA, directions
from cwac.models.loading import load
from tests.conftest import make_llama
from tests.helpers.training import cell
from train import run_cell


def toy(d=8, r=3, n=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    M = torch.linalg.qr(torch.randn(d, r, generator=g, dtype=torch.float64))[0]
    X = torch.randn(n, d, generator=g, dtype=torch.float64) * torch.linspace(3, 0.3, d, dtype=torch.float64)
    return M, X.T @ X / n


def test_the_rule_is_that_of_the_official_code():
    """U of svd(C - M M^T C), up to sign: what `lora_A` is filled with."""
    M, C = toy()
    U = torch.linalg.svd(C - M @ M.T @ C)[0][:, :2]
    N = directions(M, C, 2).double()
    assert torch.allclose((U.T @ N).abs(), torch.eye(2, dtype=torch.float64), atol=1e-5)
    assert (M.T @ N).abs().max() < 1e-6 and torch.allclose(N.T @ N, torch.eye(2, dtype=torch.float64), atol=1e-5)
    within = torch.linalg.eigh(C - M @ M.T @ C - C @ M @ M.T + M @ M.T @ C @ M @ M.T)[1][:, -2:]
    assert not torch.allclose((within.T @ N).abs().diag().sort()[0], torch.ones(2, dtype=torch.float64), atol=1e-3)


def test_without_an_earlier_task_they_are_the_leading_directions_of_the_new_one():
    _, C = toy()
    N = directions(torch.zeros(8, 0, dtype=torch.float64), C, 3).double()
    lead = torch.linalg.eigh(C)[1].flip(1)[:, :3]
    assert torch.allclose((lead.T @ N).abs(), torch.eye(3, dtype=torch.float64), atol=1e-5)


def test_drawn_directions_know_nothing_of_the_task():
    M, _ = toy()
    N = directions(M.float(), None, 4, "a")
    assert (M.float().T @ N).abs().max() < 1e-6 and N.shape == (8, 4)
    assert torch.equal(N, directions(M.float(), None, 4, "a"))
    assert not torch.allclose(N, directions(M.float(), None, 4, "b"))
    assert directions(M.float(), None, 99).shape == (8, 5)  # no more than there are


@pytest.mark.parametrize("which", ["task", "random"])
def test_a_run_trains_k_and_v_alone_and_reads_nothing_of_the_anchors(which, tmp_path, artifacts):
    cfg = cell(
        "inflora", tmp_path, artifacts, f"method.directions={which}", "method.rank=4", "train.learning_rate=0.01"
    )
    run_cell(cfg)
    run = Run(cfg)
    rows = {(r["metric"], r["set"]): r["value"] for r in run.rows() if r["final"]}
    d = load(cfg.model, artifacts).model.config
    head = d.hidden_size // d.num_attention_heads
    wide = getattr(d, "num_key_value_heads", d.num_attention_heads) * head
    assert rows["trained_parameters", "train"] == 2 * 4 * wide * d.num_hidden_layers
    assert rows["weight_change", "anchors"] == 0  # of down_proj, which has no adapter
    assert 0 < rows["weight_leak_all", "anchors"] < 0.1  # M holds 0.95 of the energy
    assert run.status["guard"] is True
    assert rows["extra_data", "harmful_prompts"] > 0


def test_the_adapter_is_official(artifacts, tmp_path):
    """A has orthonormal rows over sqrt(3) and stays; B starts at zero."""
    from cwac.core import config
    from tests.conftest import FINE_TUNE, fine_tune

    cfg = config.compose(["method=inflora", f"paths.artifacts={artifacts}", *FINE_TUNE, "method.rank=4"])
    model, _, _ = fine_tune(cfg, tmp_path)
    seen = 0
    for module in model.modules():
        if hasattr(module, "lora_A"):
            A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
            assert torch.allclose(A @ A.T, torch.eye(4) / 3, atol=1e-5) and not A.requires_grad
            assert module.scaling["default"] == 1 and B.any()
            seen += 1
    assert seen == 2 * model.config.num_hidden_layers
    assert math.isclose(float(A.norm()), math.sqrt(4 / 3), rel_tol=1e-4)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"rank": 0}, r"method\.rank=0"),
        ({"energy": 1.5}, r"method\.energy=1\.5"),
        ({"directions": "rows"}, r"method\.directions=rows"),
        ({"n_rows": 0}, r"method\.n_rows=0"),
        ({"response_tokens": -1}, r"method\.response_tokens=-1"),
    ],
)
def test_a_value_that_cannot_be_is_refused(keys, said):
    with pytest.raises(UsageError, match=said):
        InfLoRA("inflora", **keys)


def test_what_the_model_or_the_pool_cannot_serve_is_refused():
    model = make_llama()
    context = SimpleNamespace(loaded=SimpleNamespace(model=model), pools=SimpleNamespace(anchors=[]))
    with pytest.raises(UserError, match=r"method\.n_anchors=3 is more than the 0 prompts"):
        InfLoRA("inflora", n_anchors=3).training_data([], context, random.Random(0))
    with pytest.raises(UserError, match=r"method\.modules"):
        InfLoRA("inflora", modules=["no_such"]).training_data([], context, random.Random(0))
