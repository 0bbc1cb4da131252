"""The subspace, the projection, and what they promise."""

import copy

import pytest
import torch

from cwac.constraints import subspace
from cwac.constraints.subspace import Constraint, fit_subspace, load_bases, project_, rank_for, save_bases
from cwac.core.errors import UserError
from cwac.core.run_dir import GUARD_SLACK
from cwac.evaluation.drift import weight_leak
from cwac.models.layers import linears
from cwac.models.loading import add_lora
from tests.conftest import assert_only_the_anchors_are_held, make_llama, random_rows
from tests.helpers.optimizer import step_adamw


def constrained(model, anchors, kinds, energy=1.0, freeze=False):
    bases = fit_subspace(model, anchors, kinds, energy=energy)
    constraint = Constraint(linears(model, kinds), bases)
    if freeze:
        kept = {id(layer.weight) for _, layer, _, _ in constraint.entries}
        for p in model.parameters():
            p.requires_grad_(id(p) in kept)
    return constraint, bases


@pytest.mark.parametrize("accumulation", [1, 8])
def test_update_constraint_leaks_nothing_under_adamw_with_weight_decay(llama, accumulation):
    anchors, task = random_rows(3, seed=1), random_rows(40, seed=2)
    reference = copy.deepcopy(llama)
    constraint, bases = constrained(llama, anchors, ["down_proj"])
    assert all(0 < b.rank < b.dim for b in bases.values())
    step_adamw(llama, task, constraint, accumulation=accumulation)
    leaks = weight_leak(llama, reference, anchors)
    for name, value in leaks.items():
        assert value["change"] > 1e-3, name  # everything learns ...
        if name.endswith("down_proj"):
            assert value["leak"] <= 1e-6, name  # ... but not on the anchors
        else:
            assert value["leak"] > 1e-2, name


def test_gradient_projection_is_undone_by_adamw_and_update_projection_is_not(llama):
    """Why `update` is the default: Algorithm 1's gradient projection does not survive AdamW."""
    anchors, task = random_rows(3, seed=1), random_rows(40, seed=2)
    worst = {}
    for where in ("none", "gradient", "update"):
        model = copy.deepcopy(llama)
        constraint, _ = constrained(model, anchors, ["down_proj"])
        step_adamw(model, task, constraint if where != "none" else None, where=where)
        leaks = weight_leak(model, llama, anchors)
        worst[where] = max(v["leak"] for n, v in leaks.items() if n.endswith("down_proj"))
    assert worst["update"] <= 1e-6 < 1e-3 < worst["gradient"] < worst["none"]


def test_closed_constraint_preserves_the_outputs_on_the_anchors_exactly(llama):
    """By induction over the blocks: nothing that acts on an anchor token has changed."""
    anchors, task = random_rows(3, seed=1), random_rows(40, seed=2)
    reference = copy.deepcopy(llama)
    constraint, _ = constrained(llama, anchors, "all", freeze=True)
    step_adamw(llama, task, constraint, steps=30, lr=3e-3)
    assert_only_the_anchors_are_held(llama, reference, anchors)


def test_a_partial_constraint_leaves_a_bypass(llama):
    """down_proj holds, and the outputs on the anchors drift all the same through the other matrices."""
    anchors, task = random_rows(3, seed=1), random_rows(40, seed=2)
    reference = copy.deepcopy(llama)
    constraint, _ = constrained(llama, anchors, ["down_proj"])
    step_adamw(llama, task, constraint, steps=30, lr=3e-3)
    ids = torch.tensor([anchors[0]["input_ids"]])
    with torch.no_grad():
        assert (llama(ids).logits - reference(ids).logits).abs().max() > 1e-1


def test_lora_is_constrained_on_its_input_side(llama):
    from omegaconf import OmegaConf

    anchors, task = random_rows(3, seed=1), random_rows(40, seed=2)
    reference = copy.deepcopy(llama)
    model = add_lora(llama, OmegaConf.create({"r": 4, "alpha": 8, "target_modules": "all-linear"}))
    bases = fit_subspace(model, anchors, "all", energy=1.0)
    constraint = Constraint(linears(model, "all"), bases)
    constraint.project_weights_()
    step_adamw(model, task, constraint, lr=1e-2, decay=0.0)
    leaks = weight_leak(model, reference, anchors)
    assert max(v["leak"] for v in leaks.values()) <= 1e-6
    assert min(v["change"] for v in leaks.values()) > 1e-4


def test_a_partial_lora_leaves_everything_else_frozen(llama):
    """freeze_others only ever takes away: what peft froze stays frozen."""
    from omegaconf import OmegaConf

    from cwac.constraints.weight import freeze_others_

    model = add_lora(llama, OmegaConf.create({"r": 2, "alpha": 4, "target_modules": ["q_proj"]}))
    modules = linears(model, "all")
    freeze_others_(model, modules, Constraint(modules, fit_subspace(model, random_rows(3), "all", energy=0.5)))
    assert {n.split(".")[-3] for n, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_project_matches_the_dense_projector_and_is_idempotent():
    torch.manual_seed(0)
    V = torch.linalg.qr(torch.randn(12, 5))[0]
    W0, dW = torch.randn(7, 12), torch.randn(7, 12)
    W = W0 + dW
    project_(W, V, W0 @ V)
    dense = W0 + dW @ (torch.eye(12) - V @ V.T)
    assert torch.allclose(W, dense, atol=1e-5)
    again = W.clone()
    project_(again, V, W0 @ V)
    assert torch.allclose(again, W, atol=1e-6)


@pytest.mark.parametrize("n", [2, 30])  # fewer and more tokens than dimensions: both ways to the eigenvectors
def test_subspace_is_orthonormal_and_holds_the_energy_it_names(llama, n):
    from cwac.constraints.subspace import capture

    anchors = random_rows(n, seed=3)
    bases = fit_subspace(llama, anchors, ["down_proj", "q_proj"], energy=0.9)
    seen: dict[str, list] = {}
    modules = {"0.down_proj": linears(llama, ["down_proj"])["0.mlp.down_proj"]}
    firsts = []
    capture(llama, anchors, modules, lambda name, x, x0: (seen.setdefault(name, []).append(x), firsts.append(x0)))
    x = torch.cat(seen["0.down_proj"])
    V = bases["0.down_proj"].V
    assert torch.allclose(V.T @ V, torch.eye(V.shape[1]), atol=1e-5)
    sink = torch.cat(firsts)[0]
    assert torch.allclose(V @ (V.T @ sink), sink, atol=1e-4)  # the first token is protected whole
    rest = x - (x @ sink)[:, None] * sink / sink.square().sum()
    inside = (rest @ V).square().sum() / rest.square().sum()
    assert inside >= 0.9 - 1e-6
    fewer = V[:, : V.shape[1] - 2]
    assert (rest @ fewer).square().sum() / rest.square().sum() < inside


def test_without_a_direction_of_its_own_the_first_token_is_a_token_like_the_others(llama):
    """Eq. 12 to the letter: X holds every token, so at full energy V holds the first one too."""
    from cwac.constraints.subspace import capture

    anchors = random_rows(2, seed=3)
    bases = fit_subspace(llama, anchors, ["down_proj"], energy=1.0, first_token=False)
    firsts = []
    modules = {"0.down_proj": linears(llama, ["down_proj"])["0.mlp.down_proj"]}
    capture(llama, anchors, modules, lambda name, x, x0: firsts.append(x0))
    sink, V = torch.cat(firsts)[0], bases["0.down_proj"].V
    assert torch.allclose(V @ (V.T @ sink), sink, atol=1e-4)
    assert bases["0.down_proj"].n_tokens == sum(len(r["input_ids"]) for r in anchors)
    # all rows start alike, so their first tokens add one direction to the others' span
    apart = fit_subspace(llama, anchors, ["down_proj"], energy=1.0, first_token=True)
    assert bases["0.down_proj"].rank == apart["0.down_proj"].rank


def test_what_rows_share_is_captured_once_and_counts_for_all_of_them(llama):
    """Sums over tokens are those of the rows one by one, whether they are packed or padded."""
    from cwac.constraints.subspace import capture

    opening = [3, 4, 5, 6]
    rows = [{"input_ids": opening + row["input_ids"]} for row in random_rows(5, seed=6)]
    shared = len(opening) + 1  # and the first token, with which all random rows begin

    def squares(model, batch_size: int) -> tuple[dict[tuple, torch.Tensor], int]:
        C, tokens, modules = {}, 0, linears(model, ["down_proj", "q_proj"])

        def visit(name, x, first):
            nonlocal tokens
            tokens += len(x) + len(first)
            for part, of in (("first", first.double()), ("later", x.double())):
                C[name, part] = C.get((name, part), 0) + of.T @ of

        capture(model, rows, modules, visit, batch_size)
        return C, tokens // len(modules)

    alone, each = squares(llama, 1)
    packed, once = squares(llama, 5)
    padding = copy.deepcopy(llama)
    padding.config.sliding_window = 6  # shorter than the rows, whose mask would replace it
    padded, all_of_them = squares(padding, 5)
    n = sum(len(row["input_ids"]) for row in rows)
    assert each == all_of_them == n and once == n - 4 * shared
    for key, value in alone.items():
        assert all(torch.allclose(C[key], value, rtol=1e-4, atol=1e-6) for C in (packed, padded)), key


def test_padding_never_enters_the_subspace(llama):
    anchors = random_rows(6, seed=4)
    together = fit_subspace(llama, anchors, ["down_proj"], energy=0.9, batch_size=6)
    alone = fit_subspace(llama, anchors, ["down_proj"], energy=0.9, batch_size=1)
    for name, basis in together.items():
        P, Q = basis.V @ basis.V.T, alone[name].V @ alone[name].V.T
        assert torch.allclose(P, Q, atol=1e-3)


def test_half_of_a_gram_matrix_is_its_lower_triangle():
    x, C = torch.randn(5, 7), torch.ones(7, 7, dtype=torch.float64)
    subspace.add_gram(C, x, block=3)
    whole = 1 + x.double().T @ x.double()
    assert torch.allclose(C.tril(), whole.tril(), rtol=1e-5, atol=1e-5)
    assert (C[:3, 3:] == 1).all()  # what no block on the diagonal covers is not computed


def test_a_moment_is_the_same_however_its_rows_come_and_are_held():
    X = torch.randn(30, 9, dtype=torch.float64)
    for n in (9, 10, 30):
        moment = subspace.Moment(9)
        for part in X[:n].split(4):
            moment.add(part)
        assert (moment.X is None) == (n > 9) and (n > 9 or torch.equal(moment.X, X[:n]))
        assert torch.allclose(moment.C, X[:n].T @ X[:n])
    moment.add(X)  # after the whole was read
    assert torch.allclose(moment.C, 2 * X.T @ X) and torch.equal(moment.C, moment.C.T)


def test_a_constraint_that_is_loaded_again_holds_what_the_saved_one_held(llama):
    """V and A of the last refit, and not those that it was built with."""
    constraint, _ = constrained(llama, random_rows(3, seed=1), ["q_proj", "down_proj"], energy=0.8)
    built = {name: (V, A) for name, _, V, A in constraint.entries}
    with torch.no_grad():
        for module in linears(llama, "all").values():
            module.weight.mul_(1.5)
    constraint.refit_(fit_subspace(llama, random_rows(4, seed=2), "all", energy=0.9))
    again, _ = constrained(make_llama(), random_rows(3, seed=1), ["q_proj", "down_proj"], energy=0.8)
    again.load_state_dict(constraint.state_dict())
    assert [entry[0] for entry in again.entries] == list(built)
    for (name, layer, V, A), (_, trained, V_saved, A_saved) in zip(again.entries, constraint.entries, strict=True):
        assert torch.equal(V, V_saved) and torch.equal(A, A_saved) and layer is not trained
        assert torch.allclose(A, trained.weight @ V, atol=1e-5)
        assert V.shape != built[name][0].shape or not torch.equal(V, built[name][0])


def test_rank_for_counts_what_is_needed_and_not_the_noise():
    values = torch.tensor([6.0, 3.0, 1.0, 1e-18], dtype=torch.float64)
    assert [rank_for(values, e) for e in (0.5, 0.6, 0.61, 0.9, 0.91, 1.0)] == [1, 1, 2, 2, 3, 3]


def test_bases_survive_saving(llama, tmp_path):
    bases = fit_subspace(llama, random_rows(3), ["down_proj"])
    save_bases(bases, tmp_path)
    loaded = load_bases(tmp_path)
    assert all(torch.equal(b.V, loaded[n].V) and b.energy == loaded[n].energy for n, b in bases.items())


def test_unknown_modules_and_layers_are_named(llama):
    with pytest.raises(UserError, match="down_projj.*down_proj"):
        linears(llama, ["down_projj"])
    with pytest.raises(UserError, match="outside the model's blocks 0..2"):
        linears(llama, ["down_proj"], [7])
    with pytest.raises(UserError, match="anchor pool is empty"):
        fit_subspace(llama, [], "all")


def test_a_frozen_model_does_not_move():
    model = make_llama()
    before = copy.deepcopy(model.state_dict())
    constraint, _ = constrained(model, random_rows(3, seed=1), "all", freeze=True)
    step_adamw(model, random_rows(20, seed=2), constraint)
    touched = {id(layer.weight) for _, layer, _, _ in constraint.entries}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (id(parameter) not in touched), name


@pytest.mark.parametrize("n", [2, 40])  # fewer and more tokens than dimensions
def test_a_single_precision_decomposition_spans_what_a_double_one_does(llama, monkeypatch, n):
    anchors = random_rows(n, seed=8)
    single = fit_subspace(llama, anchors, "all", energy=0.99)
    monkeypatch.setattr(subspace, "SINGLE", 0.0)
    for name, basis in fit_subspace(llama, anchors, "all", energy=0.99).items():
        assert single[name].rank == basis.rank and single[name].energy == pytest.approx(basis.energy, abs=1e-5)
        assert (single[name].V.T @ basis.V).square().sum() == pytest.approx(basis.rank, abs=1e-3), name


@pytest.mark.parametrize("n", [2, 40])  # fewer and more tokens than dimensions
@pytest.mark.parametrize("energy", [0.6, 0.99, 0.9999, 1.0])
def test_the_needed_eigenvectors_alone_span_what_all_of_them_do(llama, monkeypatch, n, energy):
    anchors = random_rows(n, seed=8)
    whole = fit_subspace(llama, anchors, "all", energy=energy)
    monkeypatch.setattr(subspace, "LARGE", 2)
    for name, basis in fit_subspace(llama, anchors, "all", energy=energy).items():
        assert whole[name].rank == basis.rank and whole[name].energy == pytest.approx(basis.energy, abs=1e-6)
        assert (whole[name].V.T @ basis.V).square().sum() == pytest.approx(basis.rank, abs=1e-3), name
        assert (basis.V.T @ basis.V - torch.eye(basis.rank)).abs().max() < 1e-5


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("k", [0, 1, 20, 40])
def test_leading_eigenvectors_are_those_of_the_whole_decomposition(monkeypatch, dtype, tolerance, k):
    monkeypatch.setattr(subspace, "LARGE", 2)
    X = torch.randn(90, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    X = X * torch.logspace(0, -3, 60, dtype=torch.float64)
    C = (X.T @ X).to(dtype)
    before = C.clone()
    V, values = subspace.leading_eigenvectors(C, lambda found: k)
    expected, U = torch.linalg.eigh(C.double())
    assert torch.equal(C, before) and V.dtype == values.dtype == dtype and V.shape == (60, k)
    assert torch.allclose(values.double(), expected.flip(0), atol=tolerance * float(expected[-1]))
    assert (C.double() @ V.double() - V.double() * expected.flip(0)[:k]).abs().sum() <= tolerance * k * expected[-1]
    assert (V.T @ V - torch.eye(k, dtype=dtype)).abs().sum() <= 60 * tolerance


def gradients_gram(seed: int) -> torch.Tensor:
    """A Gram matrix [336, 336] as gradients give it, of which MKL's single-precision LAPACK makes nothing.

    Of rank 32; tokens without a label give rows of zeros, and the others span many orders of magnitude.
    """
    draw = torch.Generator().manual_seed(seed)
    left = torch.randn(336, 32, generator=draw) * torch.logspace(1, -18, 32)
    scale = torch.zeros(336)
    scale[torch.randperm(336, generator=draw)[:130]] = 10 ** (-20 * torch.rand(130, generator=draw))
    x = left * scale[:, None] @ torch.linalg.qr(torch.randn(384, 32, generator=draw))[0].T
    return x @ x.T


def test_gradients_whose_single_precision_decomposition_does_not_converge_are_decomposed():
    C = gradients_gram(0)
    V, values = subspace.eigenvectors(C)
    assert V.dtype == values.dtype == torch.float32
    assert torch.allclose(V @ values.diag() @ V.T, C, atol=1e-5 * float(C.max()))
    assert (V.T @ V - torch.eye(336)).abs().max() < 1e-4


def test_a_decomposition_that_does_not_converge_is_made_in_double_once(monkeypatch):
    made, exact = [], torch.linalg.eigh

    def eigh(C):
        made.append(C.dtype)
        if len(made) == 1 or C.dtype == torch.float32:
            raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")
        return exact(C)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    V, values = subspace.eigenvectors(torch.eye(3) * 2)
    assert made == [torch.float32, torch.float64] and V.dtype == torch.float32 and values.tolist() == [2, 2, 2]
    made.clear()
    with pytest.raises(torch.linalg.LinAlgError):
        subspace.eigenvectors(torch.eye(3).double())
    assert made == [torch.float64]


@pytest.mark.parametrize("learnt", [0.0, 1e-3])
def test_rounding_of_the_weights_is_no_leak(llama, learnt):
    """Where V holds every direction, all that is left of an update is what storing a weight rounds."""
    reference = copy.deepcopy(llama)
    torch.manual_seed(0)
    with torch.no_grad():
        for module in linears(llama, "all").values():
            eps = torch.finfo(torch.float32).eps
            module.weight.mul_(1 + eps * torch.randint(-1, 2, module.weight.shape))
            module.weight.add_(learnt * torch.randn_like(module.weight))
    protected = {name: torch.eye(module.in_features) for name, module in linears(llama, "all").items()}
    leaks = weight_leak(llama, reference, random_rows(6, seed=3), protected)
    excess = max(v["leak"] - v["bound"] - v["rounding"] for v in leaks.values())
    assert min(v["leak"] for v in leaks.values()) > 0.05  # of dW itself, whatever its size
    assert (excess > GUARD_SLACK) is (learnt > 0)
