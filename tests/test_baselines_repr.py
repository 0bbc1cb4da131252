"""LDIFS, circuit breakers and Vaccine: degenerate cases, gradients, layouts, references, bad input."""

import socket
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from torch.nn import functional

from cwac.constraints.anchors import encode_prompts
from cwac.constraints.reference import Reference, mean_over_tokens, model_layers
from cwac.core import config
from cwac.core.errors import UsageError, UserError
from cwac.core.jsonl import read_jsonl
from cwac.core.run_dir import Run
from cwac.data.pools import load_pools
from cwac.data.tokenize import Collator, Rows
from cwac.methods.circuit_breaker import CircuitBreaker, coefficients, displacement, emptied, similarity
from cwac.methods.ldifs import LDIFS, channel_distance, feature_distance, feature_layers
from cwac.methods.vaccine import Vaccine, attentions, perturbation, perturbed_backward
from cwac.models.context import Context
from cwac.models.fit import fit
from cwac.models.hooks import ENTRY, on_outputs, residuals
from cwac.models.loading import add_lora, load
from tests.conftest import make_llama, random_rows, sgd
from tests.helpers.layouts import close
from tests.helpers.training import cell
from train import run_cell

LORA = {"r": 4, "alpha": 8, "target_modules": "all-linear"}
SIZES = {"poison": 8, "anchors": 8, "step": 8, "sae": 8, "benign": 16, "safety": 8, "validation": 8, "align": 8}


def batch_of(rows):
    return Collator(2)(rows)


@pytest.fixture
def context(random_model, tmp_path):
    """A small model of the embedded world with small pools."""
    cfg = OmegaConf.create({"kind": "folder", "name": "folder", "path": str(random_model), "dtype": "float32"})
    loaded = load(cfg, tmp_path)
    pools = load_pools(OmegaConf.create({"name": "toy", "sizes": {**SIZES, "test": 8, "over_refusal": 8}}), None, 0)
    return Context(loaded.tokenizer, pools, loaded, tmp_path, seed=0, max_length=64, steps=10)


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# --- degenerate cases, through train.py


@pytest.fixture(scope="module")
def sft(tmp_path_factory, artifacts):
    cfg = cell("sft", tmp_path_factory.mktemp("sft"), artifacts, "eval.drift=false")
    run_cell(cfg)
    return Run(cfg)


@pytest.mark.parametrize(
    ("method", "override"),
    [("ldifs", "method.lam=0"), ("circuit_breaker", "method.alpha=0"), ("vaccine", "method.steps=0")],
)
def test_without_its_weight_a_method_is_sft_bit_for_bit(method, override, sft, tmp_path, artifacts):
    cfg = cell(method, tmp_path, artifacts, override, "eval.drift=false")
    run_cell(cfg)
    assert Run(cfg).status["weights_sha256"] == sft.status["weights_sha256"]
    assert all(r["penalty"] is None for r in read_jsonl(Run(cfg).dir / "train_log.jsonl"))


@pytest.mark.parametrize("method", ["ldifs", "circuit_breaker", "vaccine"])
def test_they_train_an_adapter_too(method, tmp_path, artifacts):
    cfg = cell(
        method,
        tmp_path,
        artifacts,
        f"model.lora={{r: {LORA['r']}, alpha: {LORA['alpha']}, target_modules: all-linear}}",
        "method.steps=3" if method == "vaccine" else "train.learning_rate=0.01",
    )
    run_cell(cfg)
    log = read_jsonl(Run(cfg).dir / "train_log.jsonl")
    assert len(log) == 6
    if method != "vaccine":
        assert all(r["penalty"] >= 0 for r in log) and log[-1]["penalty"] > 0
    if method == "ldifs":
        assert log[0]["penalty"] == 0
    extra = {r["set"]: r["value"] for r in Run(cfg).rows() if r["metric"] == "extra_data"}
    assert (
        extra
        == {
            "ldifs": {"none": 0},
            "circuit_breaker": {"harmful_prompts": 240, "harmless_rows": 320, "refusals": 160},
            "vaccine": {"refusals": 160, "harmless_rows": 320},
        }[method]
    )


# --- the reference


def train_adapter_(model) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)


def test_the_adapter_switched_off_is_the_frozen_copy():
    """Taken before the adapter trains; of a model whose adapter has learnt something, see test_adapters.py."""
    model, plain = add_lora(make_llama(), OmegaConf.create(LORA)), make_llama()
    batch = batch_of(random_rows(4))
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    layers = model_layers(plain, None)
    assert layers == [0, 1, 2]
    off, frozen = Reference(model), Reference(plain)
    assert off.frozen is None
    train_adapter_(model)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    then = off.hidden_states(inputs, layers)
    assert torch.equal(then, frozen.hidden_states(inputs, layers)) and not then.requires_grad
    assert not torch.allclose(residuals(model, inputs, layers), then, atol=1e-3)
    assert trainable and trainable == [n for n, p in model.named_parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(1.5)
    assert torch.equal(then, frozen.hidden_states(inputs, layers))  # the copy does not move with the model


# --- LDIFS


def ldifs(model, rank_batches, **settings):
    method = LDIFS("ldifs", **settings)
    method.setup(model, SimpleNamespace())
    for i, batch in enumerate(rank_batches):
        method.batch(batch, 0, (i, len(rank_batches)))
    return method


def test_ldifs_is_zero_at_the_start_and_grows_with_the_distance(llama):
    method = ldifs(llama, [batch_of(random_rows(4))], lam=10.0)
    start = method.penalty(llama, 0)
    assert start.item() == 0 and start.dtype == torch.float32
    start.backward()
    assert all(p.grad is None or not p.grad.any() for p in llama.parameters())
    values = []
    for _ in range(2):
        with torch.no_grad():
            for p in llama.parameters():
                p.add_(0.01 * torch.sign(p))
        method.batch(batch_of(random_rows(4)), 1, (0, 1))
        values.append(method.penalty(llama, 1).item())
    assert 0 < values[0] < values[1] < 40  # lambda times at most 4


def slope_and_difference(loss, weight, step=3e-2):
    """The slope that `weight.grad` claims along itself, and the central difference of loss(); norms run in fp32."""
    direction = weight.grad / weight.grad.norm()
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step * direction
            sides.append(loss())
            weight -= sign * step * direction
    return weight.grad.norm().item(), (sides[0] - sides[1]) / (2 * step)


def test_ldifs_is_the_squared_distance_of_unit_vectors(llama):
    """`unit: token`, against the formula row by row, and its gradient against finite differences."""
    rows = random_rows(3, low=4, high=8)
    batch = batch_of(rows)
    method = ldifs(llama, [], lam=2.0, layers=[0, 1], unit="token")
    initial = make_llama()
    weight = llama.model.layers[0].mlp.down_proj.weight
    with torch.no_grad():
        weight += 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))

    def by_hand():
        total = 0.0
        for row in rows:
            now, then = (
                m(torch.tensor([row["input_ids"]]), output_hidden_states=True).hidden_states for m in (llama, initial)
            )
            for layer in (0, 1):
                cosine = functional.cosine_similarity(now[layer + 1], then[layer + 1], dim=-1)
                total += (2 - 2 * cosine).mean().item() / 2
        return 2.0 * total / len(rows)

    method.batch(batch, 0, (0, 1))
    penalty = method.penalty(llama, 0)
    penalty.backward()
    assert penalty.item() == pytest.approx(by_hand(), rel=1e-5)
    slope, difference = slope_and_difference(by_hand, weight)
    assert slope == pytest.approx(difference, rel=1e-2) and slope > 1e-2


def test_ldifs_by_default_is_the_official_loss(llama):
    """`normalize_tensor` along axis 1 of [B, T, d], squared differences averaged over width, tokens and five layers;
    here of three blocks: what enters the first one, and the end of each quarter of the depth."""
    rows = random_rows(3, low=4, high=8)
    method, initial = ldifs(llama, [], lam=2.0), make_llama()
    assert feature_layers(make_llama(layers=12), "official") == [ENTRY, 2, 5, 8, 11]  # every third of twelve
    assert method._layers == [ENTRY, 0, 1, 2]
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)))
    total = 0.0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        now, then = (m.model(ids, output_hidden_states=True, use_cache=False) for m in (llama, initial))
        values = []
        for states, base in zip(now.hidden_states[:3], then.hidden_states[:3], strict=True):
            a, b = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in (states, base))
            values.append((a - b).square().mean(-1).mean(-1).item())
        # hidden_states[3] has passed the final norm: the last block's own output is read by a hook
        a, b = (residuals(m, {"input_ids": ids}, [2])[:, :, 0] for m in (llama, initial))
        a, b = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in (a, b))
        values.append((a - b).square().mean().item())
        total += sum(values) / 4 / len(rows)
    method.batch(batch_of(rows), 0, (0, 1))
    assert method.penalty(llama, 0).item() == pytest.approx(2.0 * total, rel=1e-5) and total > 1e-4


def test_a_token_of_length_1_is_as_many_times_as_strong_as_a_row_has_tokens():
    g = torch.Generator().manual_seed(0)
    then = torch.randn(2, 50, 3, 64, generator=g)
    now = then + 0.1 * torch.randn(2, 50, 3, 64, generator=g)
    mask = torch.ones(2, 50)
    ratio = feature_distance(now, then, mask) / channel_distance(now, then, mask)
    assert ratio.tolist() == pytest.approx([50, 50], rel=0.05)


def test_padding_does_not_count_for_channels_either():
    g = torch.Generator().manual_seed(0)
    now, then = (torch.randn(2, 5, 3, 8, generator=g) for _ in range(2))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    value = channel_distance(now, then, mask)
    assert torch.allclose(channel_distance(now[1:, :2], then[1:, :2], mask[1:, :2]), value[1:])
    assert torch.allclose(channel_distance(now, -now, mask), torch.tensor([4 / 5, 4 / 2]))  # at most 4 / T


def test_padding_and_scale_do_not_count():
    g = torch.Generator().manual_seed(0)
    now, then = (torch.randn(2, 5, 3, 8, generator=g) for _ in range(2))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    value = feature_distance(now, then, mask)
    assert torch.allclose(feature_distance(3 * now, then, mask), value)
    assert torch.allclose(feature_distance(now[1:, :2], then[1:, :2], mask[1:, :2]), value[1:])
    opposite = feature_distance(now, -now, mask)
    assert torch.allclose(opposite, torch.full((2,), 4.0))


# --- circuit breakers


def test_rerouting_is_zero_when_orthogonal_and_pushes_there():
    e = torch.eye(4)
    then = e[0].view(1, 1, 1, 4)
    assert similarity(e[1].view(1, 1, 1, 4), then).item() == 0  # orthogonal
    assert similarity(-then, then).item() == 0  # opposed: ReLU
    assert similarity(7 * then, then).item() == pytest.approx(1)
    now = (e[0] + e[1]).view(1, 1, 1, 4).requires_grad_()
    similarity(now, then).sum().backward()
    # d cos(u, v) / du = (v_hat - cos u_hat) / |u|
    assert torch.allclose(now.grad.flatten(), torch.tensor([0.5, -0.5, 0, 0]) / 2**0.5)
    same = then.clone().requires_grad_()
    displacement(same, then).sum().backward()
    assert torch.equal(same.grad, torch.zeros_like(same))  # and not NaN


def test_the_coefficients_follow_algorithm_1():
    assert coefficients(10, 0, 150) == (10, 0)
    assert coefficients(10, 75, 150) == pytest.approx((7.5, 2.5))
    assert coefficients(10, 150, 150) == pytest.approx((5, 5))


def test_the_first_step_is_t_1_as_in_the_official_code(context):
    """Of ten steps the first has c_s = 10 (1 - 1/20) and c_r = 10/20; L_r is 0, for nothing has moved yet."""
    model = context.loaded.model
    assert rerouting(context, n_prompts=2, n_retain=2).penalty(model, 0).item() == pytest.approx(9.5)
    last = rerouting(context, n_prompts=2, n_retain=2).penalty(model, 9)
    assert last.item() == pytest.approx(5)  # t = T
    assert rerouting(context, n_prompts=2, n_retain=2, first_step=0).penalty(model, 0).item() == pytest.approx(10)


def test_what_stays_is_read_up_to_the_block_above_the_highest_rerouted_one(llama):
    """Against the `hidden_states` of the model that is left when the official code has dropped the blocks above."""
    method = CircuitBreaker("circuit_breaker")
    assert method._retained_states(make_llama(layers=32)) == ([ENTRY, *range(21)], True)  # block 20 of 32
    assert CircuitBreaker("x", layers=[2])._retained_states(llama) == ([ENTRY, 0, 1, 2], True)  # there is none above
    assert CircuitBreaker("x", retain_states="blocks")._retained_states(llama) == ([0, 1, 2], False)
    model = make_llama(layers=6)
    cut = make_llama(layers=6)
    layers, norm = method._retained_states(model)
    assert layers == [ENTRY, 0, 1, 2, 3, 4] and method._rerouted(model) == [1, 3]
    cut.model.layers = cut.model.layers[:5]
    batch = batch_of(random_rows(1, low=6, high=6))
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    expected = torch.stack(cut(**inputs, output_hidden_states=True, use_cache=False).hidden_states, dim=2)
    assert torch.equal(residuals(model, inputs, layers, norm), expected)


def test_instructions_are_left_empty_for_llama_3_alone(context):
    pools = context.pools
    shares = {}
    for name in ("meta-llama/Llama-3.2-1B-Instruct", "mistralai/Mistral-7B-Instruct-v0.2", None):
        context.loaded.hub_id = name
        shares[name] = CircuitBreaker("x")._empty_instructions(context)
    assert list(shares.values()) == [0.5, 0.0, 0.0]
    rows = pools.benign * 20
    found = emptied(rows, 0.5, seed=3)
    empty = [e for e in found if not e.prompt]
    assert 0.4 < len(empty) / len(rows) < 0.6 and found == emptied(rows, 0.5, seed=3)
    assert [e.response for e in found] == [e.response for e in rows] and emptied(rows, 0.0, 3) == rows
    method = rerouting(context, empty_instructions=1.0)
    assert len({tuple(ids) for ids in method._harmful}) == 1  # the opening behind an empty request
    assert len({tuple(ids) for ids in method._retained[-len(pools.safety) :]}) == len(pools.safety)  # refusals stay


def test_rerouted_layers_scale_with_the_depth(llama):
    """Blocks 9 and 19 of 32, the paper's 10 and 20; block counts of the models of this project beside it."""
    method = CircuitBreaker("circuit_breaker")
    found = {n: method._rerouted(make_llama(layers=n)) for n in (32, 4, 30)}
    assert found == {32: [9, 19], 4: [0, 1], 30: [8, 18]}
    method.alpha = 0.0
    assert method.extra_data() == {}  # nothing is drawn then


def rerouting(context, rank=0, world_size=1, **settings):
    context.process_rank, context.world_size = rank, world_size
    method = CircuitBreaker("circuit_breaker", **settings)
    method.training_data([], context, None)
    method.setup(context.loaded.model, context)
    return method


def test_rerouting_is_the_mean_of_both_terms(context):
    model = context.loaded.model
    ours = {"first_step": 0, "retain_states": "blocks"}
    method = rerouting(context, layers=[0], n_prompts=3, n_retain=5, **ours)
    assert method.penalty(model, 0).item() == pytest.approx(10)  # cosine 1 everywhere, c_r 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))

    def mean(rows, n, layers, measure):
        from cwac.methods.base import draw

        values = []
        for i in draw(len(rows), n, 0, 4):
            inputs = {"input_ids": torch.tensor([rows[i]]), "attention_mask": torch.ones(1, len(rows[i])).long()}
            then = method._reference.hidden_states(inputs, layers)
            values.append(measure(residuals(model, inputs, layers), then).mean())
        return torch.stack(values).mean().item()

    by_hand = 8 * mean(method._harmful, 3, [0], similarity) + 2 * mean(method._retained, 5, [0, 1], displacement)
    assert method.penalty(model, 4).item() == pytest.approx(by_hand, rel=1e-5)


def test_rank_shares_average_to_the_whole(context):
    """Uneven on purpose: 3 and 5 rows over 2 and 4 ranks."""
    model = context.loaded.model
    whole = rerouting(context, n_prompts=3, n_retain=5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    value = whole.penalty(model, 5).item()
    for ranks in (2, 4):
        shares = []
        for rank in range(ranks):
            context.process_rank, context.world_size = rank, ranks
            shares.append(whole.penalty(model, 5).item())
        assert sum(shares) / ranks == pytest.approx(value, rel=1e-5)


def test_harmful_rows_are_requests_with_the_same_opening(context):
    method = rerouting(context)
    pools = context.pools
    opening = context.tokenizer("sure , here is", add_special_tokens=False)["input_ids"]
    assert context.tokenizer.unk_token_id not in opening
    requests = encode_prompts(context, [*pools.anchors, *pools.step])
    assert method._harmful == [r["input_ids"] + opening for r in requests]
    poison = {e.prompt for e in pools.poison} | {e.prompt for rows in pools.test.values() for e in rows}
    assert not poison & {e.prompt for e in [*pools.anchors, *pools.step]}
    assert len(method._retained) == len(pools.benign) + len(pools.safety)


# --- Vaccine


def test_the_perturbation_has_norm_rho_and_raises_the_loss_by_rho_times_the_gradient(llama):
    batch = batch_of(random_rows(4))
    embeddings = []
    with on_outputs(attentions(llama), lambda _, e: embeddings.append(e)):
        loss = llama(**batch).loss
    steepest = torch.stack([g.norm() for g in torch.autograd.grad(loss, embeddings)]).norm().item()
    for rho in (2.0, 1e-2):
        shifts = perturbation(llama, batch, rho)
        assert len(shifts) == 3 and torch.stack([s.norm() for s in shifts]).norm().item() == pytest.approx(
            rho, rel=1e-4
        )
        assert not any(s.requires_grad for s in shifts)
    assert all(p.grad is None for p in llama.parameters())
    raised = perturbed_backward(llama, batch, 1e-2).item() - loss.item()
    assert raised == pytest.approx(1e-2 * steepest, rel=2e-2)


def test_the_second_pass_is_the_gradient_with_the_perturbation_held_fixed(llama):
    batch = batch_of(random_rows(4))
    shifts = perturbation(llama, batch, 2.0)
    loss = perturbed_backward(llama, batch, 2.0)

    def shifted():
        with on_outputs(attentions(llama), lambda i, e: e + shifts[i]):
            return llama(**batch).loss.item()

    assert loss.item() == shifted() > llama(**batch).loss.item()
    slope, difference = slope_and_difference(shifted, llama.model.layers[0].mlp.down_proj.weight)
    assert slope == pytest.approx(difference, rel=1e-2) and slope > 1e-3


def immunised(context, **settings):
    """The context's model after `setup`, and the method."""
    method = Vaccine("vaccine", **{"steps": 4, "learning_rate": 1e-2, **settings})
    method.training_data([], context, None)
    method.setup(context.loaded.model, context)
    return context.loaded.model, method


def test_without_rho_it_is_plain_alignment(context, random_model):
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(random_model)
    rows = Rows(context.tokenizer, [*context.pools.align[:8], *context.pools.benign], max_length=64)
    fit(plain, rows, steps=4, learning_rate=1e-2, batch_size=5, seed=0, pad_token_id=0, weight_decay=0.1, warmup=0.1)
    model, method = immunised(context, rho=0.0)
    assert same_weights(model, plain)
    assert method.extra_data() == {"refusals": 8, "harmless_rows": 16}
    other, _ = immunised(context, rho=2.0)
    assert not same_weights(other, plain)


def test_the_immunised_model_is_built_once_and_put_below_an_adapter(context, random_model, monkeypatch):
    model, _ = immunised(context)
    assert [p.name for p in (context.artifacts / "vaccine").iterdir() if p.is_dir()]
    monkeypatch.setattr("cwac.methods.alignment_stage.fit", lambda *a, **k: pytest.fail("built again"))
    cfg = OmegaConf.create(
        {"kind": "folder", "name": "folder", "path": str(random_model), "dtype": "float32", "lora": LORA}
    )
    context.seed = 1
    context.loaded = load(cfg, context.artifacts, 1)
    adapted, _ = immunised(context)
    assert same_weights(adapted.merge_and_unload(), model)


# --- layouts: 1 x 8 == 8 x 1 == 2 ranks x 4


def final_weights(folder, name, per_device, accumulation, rank=0, world_size=1):
    """Three optimizer steps over 24 rows under one layout; for circuit breakers the rows of another 12."""
    from cwac.training.engine import build_trainer

    model = make_llama()
    if name == "ldifs":
        method = LDIFS(name, lam=3.0)
        method.setup(model, SimpleNamespace())
    else:
        method = CircuitBreaker(name, alpha=3.0, n_prompts=3, n_retain=5)
        method._context = SimpleNamespace(seed=0, steps=3, process_rank=rank, world_size=world_size)
        method._reference = Reference(model)
        method._harmful = [r["input_ids"] for r in random_rows(6, seed=5)]
        method._retained = [r["input_ids"] for r in random_rows(6, seed=6)]
    args = sgd(folder, per_device, accumulation)
    trainer = build_trainer(model, method, random_rows(24, seed=7), args, 2)
    trainer.train()
    assert len(trainer.penalties) == 3
    return {n: p.detach().clone() for n, p in model.named_parameters()}, [float(p) for p in trainer.penalties]


def two_ranks(rank, folder, port):
    import os

    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    weights = {name: final_weights(folder, name, 4, 1, rank, 2)[0] for name in ("ldifs", "circuit_breaker")}
    if rank == 0:
        torch.save(weights, f"{folder}/two.pt")
    torch.distributed.barrier()  # a process group that is torn down while its peer still works may abort
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return {name: final_weights(folder, name, 8, 1) for name in ("ldifs", "circuit_breaker")}


@pytest.mark.parametrize("name", ["ldifs", "circuit_breaker"])
def test_accumulation_changes_nothing(name, whole, tmp_path):
    split, penalties = final_weights(tmp_path, name, 1, 8)
    assert close(whole[name][0], split) < 1e-5
    assert penalties == pytest.approx(whole[name][1], abs=1e-5) and max(penalties) > 1e-2
    assert close(whole[name][0], dict(make_llama().named_parameters())) > 1e-2  # it trained


@pytest.mark.slow  # test_invariance.py has every method on two ranks, slow too
def test_two_ranks_change_nothing(whole, tmp_path):
    with socket.socket() as probe:  # a port that is free now
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(two_ranks, args=(str(tmp_path), port), nprocs=2)
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    for name in ("ldifs", "circuit_breaker"):
        assert close(whole[name][0], two[name]) < 1e-5, name


def test_only_the_micro_batches_of_the_step_count(llama):
    """A step that was cut short, as before a resume, leaves nothing behind."""
    first, second = (batch_of(random_rows(2, seed=s)) for s in (1, 2))
    method = ldifs(llama, [first], lam=1.0)
    with torch.no_grad():
        llama.model.layers[0].mlp.down_proj.weight.mul_(3)
    method.batch(second, 1, (0, 1))
    value = method.penalty(llama, 1)
    method.batch(second, 2, (0, 1))
    assert value.item() == method.penalty(llama, 2).item() > 0
    assert mean_over_tokens(torch.ones(1, 2, 3), torch.ones(1, 2)).item() == 1


# --- bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LDIFS("x", lam=-1), "method.lam=-1 .*at least 0"),
        (lambda: LDIFS("x", lam=float("nan")), "method.lam=nan"),
        (lambda: LDIFS("x", layers="all"), "method.layers=all .*list"),
        (lambda: CircuitBreaker("x", alpha=-0.1), "method.alpha=-0.1 .*at least 0"),
        (lambda: LDIFS("x", unit="row"), "method.unit=row .*channel, token"),
        (lambda: CircuitBreaker("x", retain_states="all"), "method.retain_states=all .*official, blocks"),
        (lambda: CircuitBreaker("x", first_step=2), "method.first_step=2 .*0 or 1"),
        (lambda: CircuitBreaker("x", empty_instructions=1.5), "method.empty_instructions=1.5 .*at most 1"),
        (lambda: CircuitBreaker("x", n_prompts=0), "method.n_prompts=0 .*at least 1"),
        (lambda: CircuitBreaker("x", n_retain=1.5), "method.n_retain=1.5 .*whole number"),
        (lambda: Vaccine("x", rho=-2), "method.rho=-2 .*at least 0"),
        (lambda: Vaccine("x", steps=-1), "method.steps=-1 .*whole number at least 0"),
        (lambda: Vaccine("x", batch_size=True), "method.batch_size=True .*whole number at least 1"),
    ],
)
def test_values_are_checked_when_the_method_is_made(make, message):
    with pytest.raises(UsageError, match=message):
        make()


@pytest.mark.parametrize("kind", [LDIFS, CircuitBreaker])
@pytest.mark.parametrize("layers", [[-1], [2], []])
def test_layers_outside_the_model_are_refused_before_training(kind, layers, context):
    with pytest.raises(UsageError, match=r"method.layers=.*lies outside the model.*0\.\.1"):
        kind("x", layers=layers).training_data([], context, None)


@pytest.mark.parametrize(
    ("kind", "pool"),
    [*((CircuitBreaker, p) for p in ("anchors", "step", "benign", "safety")), (Vaccine, "align"), (Vaccine, "benign")],
)
def test_an_empty_pool_is_refused_before_training(kind, pool, context):
    context.pools = replace(context.pools, **{pool: []})
    with pytest.raises(UserError, match=f"needs the pool `{pool}`.*enlarge pools.{pool}"):
        kind("x").training_data([], context, None)


@pytest.mark.parametrize("opening", ["", "Bien sûr"])
def test_an_opening_the_tokenizer_cannot_write_is_refused(opening, context):
    with pytest.raises(UsageError, match="method.opening=.*first words of a compliant answer"):
        CircuitBreaker("x", opening=opening).training_data([], context, None)


def test_the_number_of_steps_is_known_before_setup(tmp_path, artifacts, monkeypatch):
    """Counted as Trainer counts: 32 rows in steps of 3 x 2 are 6 an epoch; train.max_steps wins."""
    seen = []
    monkeypatch.setattr(LDIFS, "setup", lambda self, model, context: seen.append(context.steps) or 1 / 0)
    layout = ["train.per_device_train_batch_size=3", "train.gradient_accumulation_steps=2", "train.num_train_epochs=2"]
    for more in (["train.max_steps=-1"], []):
        with pytest.raises(ZeroDivisionError):
            run_cell(cell("ldifs", tmp_path / str(len(more)), artifacts, *layout, *more))
    assert seen == [12, 6]


def test_settings_name_the_published_values():
    assert config.compose(["method=ldifs"]).method.lam == 10
    assert config.compose(["method=ldifs"]).method.unit == "channel"
    assert config.compose(["method=circuit_breaker"]).method.alpha == 10
    assert config.compose(["method=vaccine"]).method.rho == 2
