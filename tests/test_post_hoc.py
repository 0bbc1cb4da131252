"""RESTA and Safe Delta, which act once after training: rules against numbers computed otherwise, limits, errors."""

import copy
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cwac.core import config
from cwac.core.errors import UsageError, UserError
from cwac.core.run_dir import Run
from cwac.methods import safe_delta
from cwac.methods.base import Method
from cwac.methods.resta import RESTA
from cwac.methods.safe_delta import SafeDelta, factor, kept_entries, merge, second_moments
from cwac.models.adapters import plain_parameters
from cwac.models.layers import linears
from cwac.models.loading import Loaded, add_lora
from tests.conftest import make_llama, random_rows
from tests.helpers.training import cell
from train import run_cell

LORA = SimpleNamespace(r=3, alpha=12, target_modules=["q_proj", "v_proj"], get=lambda key, default=None: default)


@pytest.fixture
def pair(tmp_path):
    """A random aligned model, and beside it on the disk a base from which it differs everywhere."""
    aligned, base = make_llama(), make_llama()
    move(base, 1)
    aligned.save_pretrained(tmp_path / "aligned")
    base.save_pretrained(tmp_path / "base")
    return Loaded(aligned, None, {"dtype": "float32"}, str(tmp_path / "aligned"), str(tmp_path / "base"))


def move(model, seed, scale=0.05):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(scale * torch.randn(p.shape, generator=g))


def weights_of(model):
    return {n: p.detach().clone() for n, p in plain_parameters(model).items()}


def finished(method, loaded, rows=None):
    """The weights before and after `finish`, of a model that training has moved; of an adapter, merged."""
    context = SimpleNamespace(loaded=loaded, tokenizer=None, pools=SimpleNamespace(anchors=["request"]))
    method.training_data([], context, random.Random(0))
    if rows is not None:
        method._loaded, method._rows = loaded, rows
    move(loaded.model, 2)
    trained = copy.deepcopy(loaded.model)
    with torch.no_grad():
        method.finish(loaded.model)
    plain = [m.merge_and_unload() if hasattr(m, "peft_config") else m for m in (trained, loaded.model)]
    return tuple(weights_of(m) for m in plain)


@pytest.mark.parametrize("kind", [RESTA, SafeDelta])
def test_they_differ_from_sft_only_after_training(kind):
    for hook in ("batch", "penalty", "after_backward", "before_step", "after_step"):
        assert getattr(kind, hook) is getattr(Method, hook)


# --- RESTA


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("gamma", [1.0, 0.3])
def test_resta_adds_the_safety_vector_to_every_parameter(pair, gamma, lora):
    aligned = weights_of(pair.model)
    base = make_llama()
    move(base, 1)
    if lora:
        pair.model = add_lora(pair.model, LORA)
    method = RESTA("resta", gamma=gamma)
    before, after = finished(method, pair)
    assert set(after) == set(aligned) and method.extra_data() == {"base_weights": len(aligned)}
    total = 0.0
    for name, Wb in base.named_parameters():
        vector = gamma * (aligned[name].double() - Wb.detach().double())
        total += float(vector.square().sum())
        assert torch.allclose(after[name].double() - before[name].double(), vector, atol=1e-6), name
        assert vector.abs().max() > 1e-3
    row = method.report(pair.model)[0]
    assert row["metric"] == "safety_vector_norm" and row["value"] == pytest.approx(total**0.5, rel=1e-5)


def test_resta_by_hand():
    """W = 5, W0 = 3, Wb = 1, gamma = 0.5: 5 + 0.5 (3 - 1) = 6."""
    method = RESTA("resta", gamma=0.5)
    method._loaded = SimpleNamespace()
    models = {k: torch.nn.Linear(1, 1, bias=False) for k in ("tuned", "aligned", "base")}
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        for (_, model), value in zip(models.items(), (5.0, 3.0, 1.0), strict=True):
            model.weight.fill_(value)
        patch.setattr("cwac.methods.resta.load_aligned", lambda loaded: models["aligned"])
        patch.setattr("cwac.methods.resta.load_base", lambda loaded, name: models["base"])
        method.finish(models["tuned"])
    assert models["tuned"].weight.item() == 6


def test_resta_without_gamma_is_sft_bit_for_bit(tmp_path, artifacts):
    hashes = []
    for method, more in (("sft", []), ("resta", ["method.gamma=0"])):
        cfg = cell(method, tmp_path, artifacts, "train.max_steps=2", "eval.drift=false", *more)
        run_cell(cfg)
        hashes.append(Run(cfg).status["weights_sha256"])
    assert hashes[0] == hashes[1]


def test_resta_checks_the_base_first(pair):
    def train():
        RESTA("resta").training_data([], SimpleNamespace(loaded=pair), random.Random(0))

    pair.base = pair.source
    with pytest.raises(UserError, match="safety vector is zero; give the model before its alignment"):
        train()
    pair.base = None
    with pytest.raises(UserError, match=r"method=resta.*model\.base="):
        train()


# --- Safe Delta


def test_what_is_kept_by_hand():
    """Prices 1 and 4 by column, costs 1, 9 and 16, 64, mean price 2.5; the dearest quarter is never kept."""
    D, u = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1.0, 0.5])
    for budget, kept in (
        (0.3, [[0, 0], [0, 0]]),
        (0.4, [[1, 0], [0, 0]]),
        (4.0, [[1, 0], [1, 0]]),
        (10.3, [[1, 0], [1, 0]]),
        (10.4, [[1, 1], [1, 0]]),
        (1e9, [[1, 1], [1, 0]]),
    ):
        assert kept_entries(D, u, budget, 0.25).int().tolist() == kept
    assert kept_entries(D, u, 1e9, 0.0).all()


def reference_merge(W0, W, H, scale, excluded, block, group):
    """The rule in float64 without Cholesky factors: each row of U from the inverse of H over the columns left."""
    m, n = W0.shape
    H = H.copy()
    dead = np.diag(H) == 0
    H[dead, dead] = 1
    H += 0.01 * np.mean(np.diag(H)) * np.eye(n)
    rest = [np.linalg.inv(H[j:, j:]) for j in range(n)]  # U_j,j: = rest_j[0] / sqrt(rest_j[0, 0])
    out = W0.copy()
    for left in range(0, n, block):
        columns = range(left, min(left + block, n))
        price = {(i, j): 1 / rest[j][0, 0] for j in columns for i in range(m)}
        order = sorted(price, key=lambda ij: (price[ij], ij[1], ij[0]))
        order = order[: len(order) - int(excluded * len(order))]
        budget, spent, kept = scale / 2 * m / 4096 * np.mean(list(price.values())), 0.0, set()
        for i, j in order:
            spent += (W[i, j] - out[i, j]) ** 2 * price[i, j]
            if spent <= budget:
                kept.add((i, j))
        for start in range(left, columns[-1] + 1, group):
            members = [j for j in range(start, start + group) if j in columns]
            was = out.copy()
            for j in members:
                for i in range(m):
                    if (i, j) in kept:
                        out[i, j] = W[i, j]
            for j in members:
                for k in range(members[-1] + 1, n):
                    out[:, k] -= (was[:, j] - out[:, j]) * rest[j][0, k - j] / rest[j][0, 0]
    return out


@pytest.mark.parametrize(("block", "group"), [(2048, 4), (6, 4), (5, 2)])
def test_the_rule_is_that_of_the_official_code(block, group, monkeypatch):
    monkeypatch.setattr(safe_delta, "BLOCK", block)
    monkeypatch.setattr(safe_delta, "GROUP", group)
    rng = np.random.default_rng(0)
    m, n = 6, 11
    X = rng.normal(size=(n, 30)) * np.linspace(0.5, 2, n)[:, None]
    X[4] = 0  # an input that is always 0
    H = 2 / 5 * X @ X.T
    W0, W = rng.normal(size=(m, n)), rng.normal(size=(m, n))
    U = factor(torch.tensor(H))
    shares = []
    for scale in (1000.0, 10000.0, 60000.0):
        given, share = merge(torch.tensor(W0).float(), torch.tensor(W).float(), U, scale, 0.15)
        assert np.allclose(given.numpy(), reference_merge(W0, W, H, scale, 0.15, block, group), atol=1e-4)
        shares.append(share)
    assert 0 < shares[0] < shares[1] < shares[2] <= 0.9


def test_the_compensation_brings_the_response_to_the_refusals_back():
    g = torch.Generator().manual_seed(0)
    X = torch.randn(12, 3, generator=g) @ torch.randn(3, 40, generator=g)  # of low rank, so there is room
    W0, W = torch.randn(8, 12, generator=g), torch.randn(8, 12, generator=g)
    U = factor((2 * X @ X.T).double())
    merged, share = merge(W0, W, U, 4000.0, 0.15)
    kept = kept_entries(W - W0, U.diagonal(), 4000 / 2 * 8 / 4096, 0.15)
    assert 0.1 < share < 0.9 and torch.equal(merged[kept], W[kept])
    assert ((merged - W0) @ X).norm() < 0.6 * (((W - W0) * kept) @ X).norm()


def test_second_moments_are_those_of_each_row_alone(pair):
    rows = random_rows(5, seed=1)
    modules = linears(pair.model, ["q_proj", "k_proj", "down_proj"])
    H = second_moments(pair.model, rows, modules)
    assert set(H) == {f"{i}.{group}" for i in range(3) for group in ("qkv", "down_proj")}
    seen = []
    handle = modules["1.mlp.down_proj"].register_forward_pre_hook(lambda _, args: seen.append(args[0][0].double()))
    with torch.no_grad():
        for row in rows:
            pair.model(input_ids=torch.tensor([row["input_ids"]]))
    handle.remove()
    by_hand = sum(x.T @ x for x in seen) * 2 / len(rows)
    assert torch.allclose(H["1.down_proj"], by_hand, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lora", [False, True])
def test_safe_delta_between_its_limits(pair, lora):
    """scale 0: the aligned model to the bit; all the budget and nothing excluded: SFT's linear layers to the bit."""
    aligned, plain = weights_of(pair.model), pair.model
    for scale, excluded in ((0.0, 0.15), (1e12, 0.0), (10.0, 0.15)):
        pair.model = copy.deepcopy(plain)
        if lora:
            torch.manual_seed(0)
            pair.model = add_lora(pair.model, LORA)
        method = SafeDelta("safe_delta", scale=scale, excluded=excluded)
        before, after = finished(method, pair, random_rows(5, seed=1))
        shares = {row["set"]: row["value"] for row in method.report(pair.model)}
        assert len(shares) == 21 and method.extra_data() == {"harmful_prompts": 5}
        for name, weight in after.items():
            linear = name.endswith("_proj.weight")
            want = before[name] if scale == 1e12 and linear else aligned[name]
            if not (scale == 10 and linear):
                assert torch.allclose(weight, want, atol=1e-6) if lora else torch.equal(weight, want), name
        if scale == 10:
            own = [s for n, s in shares.items() if not lora or n.endswith(("q_proj", "v_proj"))]
            assert all(0 < s < 0.86 for s in own)


def test_safe_delta_needs_anchors(pair):
    context = SimpleNamespace(loaded=pair, pools=SimpleNamespace(anchors=[]))
    with pytest.raises(UserError, match="method=safe_delta needs the pool `anchors`.*enlarge pools.anchors"):
        SafeDelta("safe_delta").training_data([], context, random.Random(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RESTA("x", gamma=-1), "method.gamma=-1 .*at least 0"),
        (lambda: SafeDelta("x", scale=float("nan")), "method.scale=nan"),
        (lambda: SafeDelta("x", excluded=1), "method.excluded=1 .*share"),
        (lambda: SafeDelta("x", n_prompts=0), "method.n_prompts=0 .*at least 1"),
        (lambda: SafeDelta("x", response_tokens=2.5), "method.response_tokens=2.5 .*whole number"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_settings_name_the_published_values():
    safe = config.compose(["method=safe_delta"]).method
    assert (safe.scale, safe.excluded, safe.n_prompts) == (0.1, 0.15, 128)
