"""Booster and RepNoise, which harden the model beforehand: gradients, degenerate cases, the harmful pairs, errors."""

import math
import random
from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf
from torch.nn import functional

from cwac.core import config
from cwac.core.errors import UsageError, UserError
from cwac.core.run_dir import Run
from cwac.data.pools import load_pools
from cwac.data.tokenize import IGNORE, Collator, Rows
from cwac.methods.alignment_stage import HarmfulBatches, unused_pairs
from cwac.methods.booster import Booster, boosted_backward
from cwac.methods.repnoise import RepNoise, lens_losses, mmd, noised_loss, own_refusals
from cwac.models.context import Context
from cwac.models.fit import fit
from cwac.models.loading import load
from tests.conftest import make_llama, random_rows
from tests.helpers.training import cell
from train import run_cell

LORA = {"r": 4, "alpha": 8, "target_modules": "all-linear"}
SIZES = {"poison": 8, "anchors": 8, "step": 8, "sae": 8, "benign": 16, "safety": 8, "validation": 8, "align": 8}


def batch_of(seed, n=4):
    return Collator(2)(random_rows(n, seed=seed))


@pytest.fixture
def context(random_model, tmp_path):
    """A small model of the embedded world with small pools."""
    cfg = OmegaConf.create({"kind": "folder", "name": "folder", "path": str(random_model), "dtype": "float32"})
    loaded = load(cfg, tmp_path)
    pools = load_pools(OmegaConf.create({"name": "toy", "sizes": {**SIZES, "test": 8, "over_refusal": 8}}), None, 0)
    return Context(loaded.tokenizer, pools, loaded, tmp_path, seed=0, max_length=64, steps=10)


@pytest.fixture
def refusing(monkeypatch):
    """A random model refuses nothing: its answers are written here."""
    monkeypatch.setattr(
        "cwac.methods.repnoise.own_answers",
        lambda model, context, requests, tokens: ["sorry , i can not help with that ." for _ in requests],
    )


def hardened(kind, context, train=(), **settings):
    """The context's model after `setup`, and the method."""
    method = kind(kind.__name__.lower(), **{"steps": 4, "learning_rate": 1e-2, "batch_size": 5, **settings})
    method.training_data(list(train), context, random.Random(0))
    method.setup(context.loaded.model, context)
    return context.loaded.model, method


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("method", ["booster", "repnoise"])
def test_without_the_stage_it_is_sft_bit_for_bit(method, tmp_path, artifacts):
    hashes = []
    for name, more in (("sft", []), (method, ["method.steps=0"])):
        cfg = cell(name, tmp_path, artifacts, "train.max_steps=2", "eval.drift=false", *more)
        run_cell(cfg)
        hashes.append(Run(cfg).status["weights_sha256"])
    assert hashes[0] == hashes[1]


# --- the harmful pairs


def test_no_pair_of_the_attack_is_hardened_on(context):
    poison = context.pools.poison
    chosen = unused_pairs(poison[:5], context, 100, random.Random(0), "booster")
    assert {e.id for e in chosen} == {e.id for e in poison[5:]} and all(e.response for e in chosen)
    assert len(unused_pairs([], context, 2, random.Random(0), "booster")) == 2
    with pytest.raises(UserError, match="method=booster.*leaves none; lower harmful_ratio.*enlarge pools.poison"):
        unused_pairs(poison, context, 100, random.Random(0), "booster")


def test_a_harmful_batch_depends_on_the_step_alone(context):
    first, second = (HarmfulBatches.of(context, context.pools.poison, 3) for _ in range(2))
    given = [first.next(torch.device("cpu"))["input_ids"] for _ in range(3)]
    assert all(torch.equal(ids, second.next(torch.device("cpu"))["input_ids"]) for ids in given)
    assert len({tuple(ids.flatten().tolist()) for ids in given}) == 3


@pytest.mark.parametrize("kind", [Booster, RepNoise])
def test_another_attack_hardens_another_model(kind, context, refusing, random_model):
    _, method = hardened(kind, context, context.pools.poison[:5])
    counts = {"refusals": 8, "harmful_pairs": 3, "harmless_rows": 16}
    if kind is RepNoise:
        counts = {"refusals": 3, "harmful_pairs": 3}
    assert method.extra_data() == counts
    hardened(kind, context, context.pools.poison[:5])
    folder = context.artifacts / kind.__name__.lower()
    assert len([p for p in folder.iterdir() if p.is_dir()]) == 1  # found again
    hardened(kind, context, context.pools.poison[:4])
    assert len([p for p in folder.iterdir() if p.is_dir()]) == 2


@pytest.mark.parametrize("kind", [Booster, RepNoise])
def test_the_hardened_weights_go_below_an_adapter(kind, context, refusing, random_model):
    model, _ = hardened(kind, context)
    cfg = OmegaConf.create(
        {"kind": "folder", "name": "folder", "path": str(random_model), "dtype": "float32", "lora": LORA}
    )
    context.loaded = load(cfg, context.artifacts, 1)
    adapted, _ = hardened(kind, context)
    assert same_weights(adapted.merge_and_unload(), model)


# --- Booster


def test_booster_is_its_formula(llama):
    """grad f(w) + lamb (grad h(w) - grad h(w - alpha grad h / ||grad h||)), by a second model at the shifted point."""
    batch, harmful, lamb, alpha = batch_of(1), batch_of(2), 3.0, 0.4
    start = {n: p.detach().clone() for n, p in llama.named_parameters()}
    loss = boosted_backward(llama, batch, harmful, lamb, alpha)
    assert all(torch.equal(p, start[n]) for n, p in llama.named_parameters())  # put back to the bit

    def gradient(model, rows):
        model.zero_grad()
        value = model(**rows).loss
        value.backward()
        return value.item(), {n: p.grad.double() for n, p in model.named_parameters()}

    value, f = gradient(make_llama(), batch)
    _, h = gradient(make_llama(), harmful)
    norm = math.sqrt(sum(float(g.square().sum()) for g in h.values()))
    shifted = make_llama()
    with torch.no_grad():
        for n, p in shifted.named_parameters():
            p.copy_(p.double() - alpha * h[n] / norm)
    _, there = gradient(shifted, harmful)
    assert loss.item() == pytest.approx(value, rel=1e-6)
    for n, p in llama.named_parameters():
        want = f[n] + lamb * (h[n] - there[n])
        assert torch.allclose(p.grad.double(), want, atol=1e-5 + 1e-3 * float(want.abs().max())), n
    assert sum(float((h[n] - there[n]).norm()) for n in h) > 1e-2  # the term is not nothing


def test_the_harmful_decrease_is_what_booster_lowers():
    """On h(w) = w^4 / 4 in one dimension: h' = w^3, so the term is lamb (w^3 - (w - alpha)^3) for w > 0."""

    class Quartic(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor(2.0))

        def forward(self, power):
            value = self.w**power / power
            return type("Output", (), {"loss": value})

    model = Quartic()
    boosted_backward(model, {"power": 1}, {"power": 4}, lamb=5.0, alpha=0.5)
    assert model.w.grad.item() == pytest.approx(1 + 5 * (2**3 - 1.5**3), rel=1e-5)


@pytest.mark.parametrize("settings", [{"lamb": 0.0}, {"alpha": 0.0}])
def test_without_its_term_booster_is_plain_alignment(settings, context, random_model):
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(random_model)
    rows = Rows(context.tokenizer, [*context.pools.align[:8], *context.pools.benign], max_length=64)
    fit(plain, rows, steps=4, learning_rate=1e-2, batch_size=5, seed=0, pad_token_id=0, weight_decay=0.1, warmup=0.0)
    model, _ = hardened(Booster, context, **settings)
    assert same_weights(model, plain)


# --- RepNoise


def test_mmd_by_hand():
    """x = {0}, y = {1}: one squared distance 1, mean over ordered pairs 1; k(0) = 5, k(1) = sum exp(-1 / width)."""
    across = sum(math.exp(-1 / w) for w in (0.25, 0.5, 1, 2, 4))
    x, y = torch.tensor([[0.0]]), torch.tensor([[1.0]])
    assert mmd(x, y).item() == pytest.approx(5 + 5 - 2 * across, rel=1e-6)
    assert mmd(7 * x, 7 * y).item() == pytest.approx(10 - 2 * across, rel=1e-6)  # bandwidths follow the scale
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 3, generator=g).double(), torch.randn(4, 3, generator=g).double() + 1
    points = torch.cat([a, b])
    squared = [[float((p - q).square().sum()) for q in points] for p in points]
    mean = sum(map(sum, squared)) / 56

    def k(i, j):
        return sum(math.exp(-squared[i][j] / (w * mean)) for w in (0.25, 0.5, 1, 2, 4))

    by_hand = sum(k(i, j) + k(i + 4, j + 4) - k(i, j + 4) - k(i + 4, j) for i in range(4) for j in range(4)) / 16
    assert mmd(a, b).item() == pytest.approx(by_hand, rel=1e-6)
    assert mmd(a, a).item() == pytest.approx(0, abs=1e-12)


def noise_of(harmful, d, layers, seed=3):
    g = torch.Generator().manual_seed(seed)
    answered = (harmful["labels"] != IGNORE).unsqueeze(-1)
    return [torch.randn((*harmful["input_ids"].shape, d), generator=g) * answered for _ in range(layers)], answered


def test_repnoise_is_its_formula(llama):
    """Against the terms computed row by row and token by token, without hooks."""
    refusals, harmful, alpha, beta = batch_of(1), batch_of(2), 0.7, 0.3
    harmful["labels"][:, :2] = IGNORE
    loss = noised_loss(llama, refusals, harmful, alpha, beta, torch.Generator().manual_seed(3))
    with torch.no_grad():
        states = llama(
            input_ids=harmful["input_ids"], attention_mask=harmful["attention_mask"], output_hidden_states=True
        )
        entropies = []
        for i, h in enumerate([*states.hidden_states, states.hidden_states[-1]]):
            logits = llama.lm_head(h if i >= 3 else llama.model.norm(h))
            rows, columns = (harmful["labels"][:, 1:] != IGNORE).nonzero(as_tuple=True)
            logs = logits.log_softmax(-1)
            picked = [logs[r, c, harmful["labels"][r, c + 1]] for r, c in zip(rows, columns, strict=True)]
            entropies.append(-torch.stack(picked).mean().item())
        assert len(entropies) == 5  # the embedding, three blocks, and the output once more
        noise, answered = noise_of(harmful, states.hidden_states[0].shape[-1], 3)
        distances = []
        for i, block in enumerate(llama.model.layers):
            outputs = []
            handle = block.mlp.register_forward_hook(lambda _, args, out, seen=outputs: seen.append(out))
            llama(input_ids=harmful["input_ids"], attention_mask=harmful["attention_mask"])
            handle.remove()
            distances.append(mmd((outputs[0] * answered).flatten(1), noise[i].flatten(1)).item())
        plain = llama(**refusals).loss.item()
    want = plain + beta * sum(distances) / 3 - alpha * math.log(sum(entropies) / 4 + 1)
    assert loss.item() == pytest.approx(want, rel=1e-5)
    assert noised_loss(llama, refusals, harmful, 0.0, 0.0, torch.Generator()).item() == pytest.approx(plain)


def test_repnoise_gradient_by_finite_differences(llama):
    refusals, harmful = batch_of(1), batch_of(2)
    weight = llama.model.layers[1].mlp.down_proj.weight

    def value():
        with torch.no_grad():
            return noised_loss(llama, refusals, harmful, 1.0, 5.0, torch.Generator().manual_seed(3)).item()

    noised_loss(llama, refusals, harmful, 1.0, 5.0, torch.Generator().manual_seed(3)).backward()
    direction, slope = weight.grad / weight.grad.norm(), weight.grad.norm().item()
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * 1e-2 * direction
            sides.append(value())
            weight -= sign * 1e-2 * direction
    # the bandwidth is held fixed in the gradient, as in the official code, and not in the difference
    assert slope == pytest.approx((sides[0] - sides[1]) / 2e-2, rel=0.05) and slope > 1e-3


def test_the_lens_of_the_last_state_is_the_models_own_loss(llama):
    batch = batch_of(4)
    with torch.no_grad():
        given = llama(**batch, output_hidden_states=True)
        losses = lens_losses(llama, given.hidden_states, batch["labels"])
    assert len(losses) == 4 and losses[-1].item() == pytest.approx(given.loss.item(), rel=1e-5)
    labels = batch["labels"][:, 1:]
    logits = llama.lm_head(llama.model.norm(given.hidden_states[1]))[:, :-1]
    assert losses[1].item() == pytest.approx(
        functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE).item(), rel=1e-5
    )


def test_repnoise_raises_the_harmful_loss(context, refusing, random_model):
    """The term is there to make harmful answers unlikely: compared with the same stage without it."""
    harmful = Collator(0)([*Rows(context.tokenizer, context.pools.poison, max_length=64)])
    ends = []
    for alpha in (0.0, 1.0):
        model, _ = hardened(RepNoise, context, steps=20, alpha=alpha, beta=0.0)
        with torch.no_grad():
            ends.append(model(**harmful).loss.item())
    assert ends[1] > ends[0] + 0.5


def test_a_cut_refusal_has_no_end(context, monkeypatch):
    text = "sorry , i can not help with that ."
    monkeypatch.setattr("cwac.methods.repnoise.own_answers", lambda model, context, requests, tokens: [text, "yes"])
    whole, cut = (own_refusals(None, context, context.pools.poison[:2], n) for n in (64, 4))
    said = context.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(whole) == len(cut) == 1  # `yes` is no refusal
    assert [i for i in cut[0]["labels"] if i != IGNORE] == said[:4]
    learnt = [i for i in whole[0]["labels"] if i != IGNORE]
    assert learnt[:-1] == said and learnt[-1] == context.tokenizer.eos_token_id
    monkeypatch.setattr("cwac.methods.repnoise.own_answers", lambda *a: ["yes", "yes"])
    with pytest.raises(UserError, match="refuses none of the harmful pairs' requests"):
        own_refusals(None, context, context.pools.poison[:2], 4)


# --- bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Booster("x", lamb=-1), "method.lamb=-1 .*at least 0"),
        (lambda: Booster("x", alpha=float("nan")), "method.alpha=nan"),
        (lambda: Booster("x", n_pairs=0), "method.n_pairs=0 .*at least 1"),
        (lambda: Booster("x", steps=1.5), "method.steps=1.5 .*whole number"),
        (lambda: RepNoise("x", beta=-0.1), "method.beta=-0.1 .*at least 0"),
        (lambda: RepNoise("x", batch_size=True), "method.batch_size=True"),
        (lambda: RepNoise("x", response_tokens=0), "method.response_tokens=0 .*at least 1"),
    ],
)
def test_values_are_checked_when_the_method_is_made(make, message):
    with pytest.raises(UsageError, match=message):
        make()


@pytest.mark.parametrize("pool", ["align", "benign"])
def test_an_empty_pool_is_refused_before_training(pool, context):
    context.pools = replace(context.pools, **{pool: []})
    with pytest.raises(UserError, match=f"needs the pool `{pool}`.*enlarge pools.{pool}"):
        Booster("booster").training_data([], context, random.Random(0))


def test_settings_name_the_published_values():
    booster, repnoise = (config.compose([f"method={m}"]).method for m in ("booster", "repnoise"))
    assert (booster.lamb, booster.alpha, booster.batch_size, booster.weight_decay) == (5, 0.1, 10, 0.1)
    assert (repnoise.alpha, repnoise.beta, repnoise.batch_size) == (1, 0.001, 4)
