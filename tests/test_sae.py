"""The routed sparse autoencoder, the ranking of its latents, and L_safety."""

import copy
import json
from collections import Counter
from math import isnan
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from cwac.constraints import anchors
from cwac.constraints.activation import general_rows, sae_config, sae_prompts
from cwac.constraints.sae import ranking
from cwac.constraints.sae.autoencoder import RoutedSAE, largest
from cwac.constraints.sae.fit import (
    SAEConfig,
    TokenBuffer,
    auxiliary_loss,
    fit_sae,
    last_usage,
    quality,
    rate,
    renormalises,
    repeats,
    train_sae,
    warn_of_repeats,
)
from cwac.constraints.sae.ranking import (
    attribution,
    causal_check,
    distinguishing_tokens,
    generate_edited,
    last_latents,
    matched_random,
    rank_latents,
)
from cwac.constraints.sae.target import GATES, SafetyTarget
from cwac.constraints.settings import Activation
from cwac.core.config import compose
from cwac.core.errors import UserError
from cwac.core.identity import run_id
from cwac.data.examples import Example
from cwac.data.refusals import KeywordJudge
from cwac.data.web_text import documents, web_rows
from cwac.models import hooks
from cwac.models.generate import generate
from cwac.models.hooks import (
    keep_mask,
    layers_of,
    logits_at,
    normalize,
    on_layers,
    packs,
    read_at,
    residuals,
    shared_prefix,
)
from cwac.models.layers import decoder_layers
from cwac.models.packing import takes_any_mask, together
from cwac.training.context import open_context

SIZE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**SIZE, "initializer_range": 0.2, **changes}))
    return model.eval()


def some_rows(n: int, seed: int = 0, low: int = 5, high: int = 14) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high, (n,), generator=generator).tolist()
    return [{"input_ids": [1, *torch.randint(3, 97, (m,), generator=generator).tolist()]} for m in lengths]


@pytest.fixture(scope="module")
def model():
    return llama()


@pytest.fixture(scope="module")
def fitted(model):
    config = SAEConfig(tokens=40_000, batch=512, m=256, k=8, router="layer:1")
    return fit_sae(model, some_rows(200), some_rows(200, seed=1), config)


def perturbed(model, size: float):
    """A copy after a random update of `size` standard deviations of each matrix."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in other.parameters():
            p += size * p.std().nan_to_num() * torch.randn(p.shape, generator=generator)
    return other


@pytest.fixture
def moved(model):
    return perturbed(model, 0.03)


def random_sae(d=16, m=64, k=5, layers=(0,), router="layer:0", seed=0) -> RoutedSAE:
    generator = torch.Generator().manual_seed(seed)
    sae = RoutedSAE(d, m, k, layers, router)
    sae.initialise_router_(generator)
    sae.initialise_(torch.randn(512, d, generator=generator) + 0.5, generator)
    with torch.no_grad():
        sae.b_enc.normal_(0, 0.05, generator=generator)
    return sae


# ---------------------------------------------------------------- residuals


def test_layers_are_the_middle_half(model):
    assert layers_of(model) == [0, 1, 2]
    assert layers_of(llama(num_hidden_layers=30, hidden_size=16)) == list(range(6, 22))  # SmolLM2's shape
    assert layers_of(model, [3, 1]) == [1, 3]
    for bad in ([4], [-1], [], "middle"):
        with pytest.raises(UserError, match="sae.layers"):
            layers_of(model, bad)


@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        (LlamaConfig, LlamaForCausalLM),
        (Gemma2Config, Gemma2ForCausalLM),
        (MistralConfig, MistralForCausalLM),
        (Qwen2Config, Qwen2ForCausalLM),
    ],
)
def test_residuals_are_the_hidden_states_and_the_forward_stops(config, architecture):
    extra = {"head_dim": 8} if config is Gemma2Config else {}
    model = architecture(config(**SIZE, **extra)).eval()
    ids = torch.tensor([[1, 5, 6, 7], [1, 8, 9, 0]])
    batch = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])}
    ran = []
    handles = [b.register_forward_pre_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(decoder_layers(model))]
    found = residuals(model, batch, [0, 2])
    assert ran == [0, 1, 2]  # block 3 lies above layer 2
    for handle in handles:
        handle.remove()
    states = model(**batch, output_hidden_states=True).hidden_states
    assert torch.equal(found, torch.stack([states[1], states[3]], dim=2))
    found.pow(2).sum().backward()
    assert decoder_layers(model)[0].mlp.down_proj.weight.grad.norm() > 0
    assert decoder_layers(model)[3].mlp.down_proj.weight.grad is None


PROMPTS = [
    ([1, 5, 6, 7, 8, 9], [5]),
    ([1, 5, 6, 10], [1, 3]),  # the opening 1 5 6 is shared; position 1 lies in it
    ([1, 5, 6, 7, 11, 12, 13], [4, 5, 6]),
    ([1, 5, 6], [2]),  # the whole of it is the opening
]


@pytest.mark.parametrize(
    ("config", "architecture", "attention"),
    [
        (LlamaConfig, LlamaForCausalLM, "sdpa"),
        (LlamaConfig, LlamaForCausalLM, "eager"),
        (Gemma2Config, Gemma2ForCausalLM, "eager"),
        (MistralConfig, MistralForCausalLM, "sdpa"),
        (Qwen2Config, Qwen2ForCausalLM, "sdpa"),
    ],
)
def test_prompts_read_in_one_row_are_those_read_alone(config, architecture, attention):
    extra = {"head_dim": 8} if config is Gemma2Config else {}
    model = architecture._from_config(config(**SIZE, **extra), attn_implementation=attention).double().eval()
    assert takes_any_mask(model, 7)
    together, real = read_at(model, PROMPTS, [0, 2])
    assert real.tolist() == [[True, False, False], [True, True, False], [True, True, True], [True, False, False]]
    weight = torch.randn(together.shape, dtype=torch.float64)
    (together * weight)[real].sum().backward()
    mine = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    total = 0.0
    for i, (ids, where) in enumerate(PROMPTS):
        alone = residuals(model, {"input_ids": torch.tensor([ids])}, [0, 2])[0, where]
        assert torch.allclose(together[i, : len(where)], alone, atol=1e-6)
        total = total + (alone * weight[i, : len(where)]).sum()
    total.backward()
    for parameter, grad in zip(model.parameters(), mine, strict=True):
        assert (parameter.grad is None) == (grad is None)
        # norms and rotations are computed in fp32, whatever the model's dtype
        assert grad is None or (parameter.grad - grad).norm() <= 1e-5 * grad.norm()


def test_the_shared_opening_is_computed_once_and_other_attentions_pad(model):
    rows = [ids for ids, _ in PROMPTS]
    inputs, places = together(model, rows)
    assert inputs["input_ids"].tolist() == [[1, 5, 6, 7, 8, 9, 10, 7, 11, 12, 13]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 3, 3, 4, 5, 6]]
    assert places.tolist() == [
        [0, 1, 2, 3, 4, 5, -1],
        [0, 1, 2, 6, -1, -1, -1],
        [0, 1, 2, 7, 8, 9, 10],
        [0, 1, 2, -1, -1, -1, -1],
    ]
    read, real = read_at(model, PROMPTS, [0, 2])
    other = copy.deepcopy(model)
    other.config.sliding_window = 6  # a given mask would replace it
    assert takes_any_mask(model, 7) and not takes_any_mask(other, 7) and takes_any_mask(other, 6)
    inputs, places = together(other, rows)
    assert inputs["input_ids"].shape == (4, 7) and "position_ids" not in inputs
    assert inputs["input_ids"].flatten()[places[places >= 0]].tolist() == [i for row in rows for i in row]
    padded, same = read_at(other, PROMPTS, [0, 2])
    assert torch.equal(real, same) and torch.allclose(padded[real], read[real], atol=1e-5)
    other.config._attn_implementation = "flash_attention_2"
    assert not takes_any_mask(other, 6)


def test_residuals_behind_peft_and_under_gradient_checkpointing(model):
    from peft import LoraConfig, get_peft_model

    batch = {"input_ids": torch.tensor([[1, 5, 6, 7]])}
    plain = residuals(model, batch, [0, 1])
    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["q_proj"]))
    assert torch.equal(plain, residuals(wrapped, batch, [0, 1]))

    saving = copy.deepcopy(model).train()
    saving.gradient_checkpointing_enable()
    found = residuals(saving, batch, [0, 1])
    found.pow(2).sum().backward()
    reference = copy.deepcopy(model)
    residuals(reference, batch, [0, 1]).pow(2).sum().backward()
    for mine, other in zip(saving.parameters(), reference.parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None)
        assert mine.grad is None or torch.allclose(mine.grad, other.grad, rtol=1e-4, atol=1e-6)
    assert decoder_layers(saving)[0].gradient_checkpointing  # switched back on


@pytest.mark.parametrize("as_tuple", [False, True])
def test_an_edit_reaches_the_logits(as_tuple):
    model = llama()
    if as_tuple:  # as decoder blocks of transformers 4 return
        for block in decoder_layers(model)[:1]:
            forward = block.forward
            block.forward = lambda *a, forward=forward, **k: (forward(*a, **k),)
        next_block = decoder_layers(model)[1]
        inner = next_block.forward
        next_block.forward = lambda h, *a, **k: inner(h[0] if isinstance(h, tuple) else h, *a, **k)
    ids = torch.tensor([[1, 5, 6, 7]])
    before = model(ids).logits
    with on_layers(model, [0], lambda layer, h: h.clone()):
        assert torch.equal(model(ids).logits, before)
    with on_layers(model, [0], lambda layer, h: h.roll(1, -1)):
        assert (model(ids).logits - before).abs().max() > 1e-2
    assert torch.equal(model(ids).logits, before)  # nothing is left behind


def test_first_token_bos_padding_and_outliers_are_no_sae_data():
    r = torch.ones(2, 5, 1, 4)
    r[1, 2] = 1000.0  # an attention sink
    ids = torch.tensor([[1, 5, 1, 6, 0], [1, 7, 8, 9, 10]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    assert keep_mask(ids, mask, r, [1]).tolist() == [[0, 1, 0, 1, 0], [0, 1, 0, 1, 1]]
    left = keep_mask(ids[:1].roll(1, 1), mask[:1].roll(1, 1), r[:1], [1])
    assert left.tolist() == [[0, 0, 1, 0, 1]]


def test_the_opening_that_all_rows_share_is_skipped():
    assert shared_prefix([{"input_ids": ids} for ids in ([1, 4, 5, 6], [1, 4, 7, 6], [1, 4, 5])]) == 2
    assert shared_prefix([{"input_ids": ids} for ids in ([1, 4, 5], [2, 4, 5])]) == 1  # the first token always
    assert shared_prefix([{"input_ids": [1, 4, 5]}] * 2) == 1  # identical rows are still data
    ids, r = torch.tensor([[1, 4, 5, 6]]), torch.ones(1, 4, 1, 4)
    assert keep_mask(ids, torch.ones_like(ids), r, skip=2).tolist() == [[0, 0, 1, 1]]


# ---------------------------------------------------------------- the autoencoder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sparse_step_equals_dense_step(dtype):
    sae = random_sae().to(dtype)
    u = torch.randn(40, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight = torch.randn(40, 16, generator=torch.Generator().manual_seed(2)).to(dtype)

    def step(backend):
        x = u.clone().requires_grad_()
        out, values, indices = sae(x, backend)
        parameters = [x, sae.w_enc, sae.b_enc, sae.w_dec, sae.b_pre]
        return [out, *torch.autograd.grad((out * weight).sum(), parameters)]

    for ours, reference in zip(step("csr"), step("dense"), strict=True):
        assert (ours - reference).norm() / reference.norm() < 1e-4 * (1e-6 if dtype == torch.float64 else 1)


@pytest.mark.parametrize(("m", "k"), [(256, 8), (1024, 16), (1024, 33), (100, 3), (8, 8)])
def test_the_largest_are_those_of_topk(m, k):
    """In the same order too; with sizes that do not divide, or where groups would not pay."""
    x = torch.randn(50, m, generator=torch.Generator().manual_seed(m + k))
    for ours, reference in zip(largest(x, k), x.topk(k), strict=True):
        assert torch.equal(ours, reference)


def test_dense_gradients_match_finite_differences():
    sae = random_sae(d=6, m=20, k=3).double()
    u = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: sae(x, "dense")[0], (u,))
    assert torch.autograd.gradcheck(lambda x: sae(x, "csr")[0], (u,))


def test_initialisation_and_encoding():
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(2000, 16, generator=generator) + 2
    sae = RoutedSAE(16, 128, 4, [0], "layer:0")
    sae.initialise_(u, generator)
    assert torch.allclose(sae.b_pre, u.mean(0))
    assert torch.allclose(sae.w_dec.norm(dim=1), torch.ones(128))
    values, indices = sae.encode(u)
    assert (values >= 0).all() and (values[:, :-1] >= values[:, 1:]).all()
    error = (u - sae.decode(values, indices)).pow(2).sum() / (u - u.mean(0)).pow(2).sum()
    assert error < 1
    assert torch.allclose(sae.dense(u) @ sae.w_dec + sae.b_pre, sae.decode(values, indices), atol=1e-5)
    assert torch.allclose(sae(u)[0], sae.decode(values, indices), atol=1e-5)


def test_routers():
    x = torch.randn(50, 3, 16, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(0)
    hard = random_sae(layers=(0, 1, 2), router="hard")
    p = hard.probabilities(x)
    u, layer = hard.read(x)
    assert torch.equal(layer, p.argmax(-1)) and torch.allclose(u, x[torch.arange(50), layer])
    scaled = hard.training_input(x, generator)
    assert torch.allclose(scaled, p.max(-1).values.unsqueeze(-1) * u)
    soft = random_sae(layers=(0, 1, 2), router="soft")
    assert torch.allclose(soft.read(x)[0], soft.training_input(x, generator))
    uniform = random_sae(layers=(0, 1, 2), router="uniform")
    assert (uniform.read(x)[1] == 1).all() and torch.allclose(uniform.read(x)[0], x[:, 1])
    drawn = uniform.training_input(x, generator)
    assert {int((x[i] - drawn[i]).abs().sum(-1).argmin()) for i in range(50)} == {0, 1, 2}
    assert (random_sae(layers=(0, 1, 2), router="layer:2").read(x)[1] == 2).all()
    for bad in ("top", "layer:9", "layer:", "fixed:1"):
        with pytest.raises(UserError, match="sae.router"):
            random_sae(layers=(0, 1, 2), router=bad)


def test_auxk_trains_dead_latents_only():
    sae = random_sae().requires_grad_(True)
    u = torch.randn(30, 16, generator=torch.Generator().manual_seed(1))
    dead = torch.tensor([3, 11, 40])
    error = (u - sae(u)[0]).detach()
    auxiliary_loss(sae, u, error, dead).backward()
    alive = torch.ones(64, dtype=torch.bool)
    alive[dead] = False
    for p in (sae.w_enc, sae.w_dec):
        assert p.grad[dead].norm() > 0 and p.grad[alive].norm() == 0
    assert sae.b_pre.grad is None


def test_planted_features_are_recovered():
    generator = torch.Generator().manual_seed(0)
    truth = torch.nn.functional.normalize(torch.randn(48, 24, generator=generator), dim=1)

    def draw(n: int) -> torch.Tensor:
        on = torch.rand(n, 48, generator=generator).argsort(1)[:, :3]
        size = 1 + torch.rand(n, 3, generator=generator)
        return (torch.zeros(n, 48).scatter(1, on, size) @ truth).unsqueeze(1)

    sae = RoutedSAE(24, 96, 3, [0], "layer:0")
    report = train_sae(sae, draw, SAEConfig(tokens=150_000, batch=512, router="layer:0"))
    best = (truth @ sae.w_dec.t()).max(1).values
    assert (best > 0.9).float().mean() >= 0.8
    assert report["train_fvu"] < 0.3
    assert torch.allclose(sae.w_dec.norm(dim=1), torch.ones(96), atol=1e-5)


def test_gradients_are_clipped_where_they_exceed_the_norm_alone():
    """Adam takes no notice of a factor on its gradients but for epsilon, which tiny ones fall below."""

    def trained(clip):
        sae = RoutedSAE(16, 128, 4, [0], "layer:0")
        g = torch.Generator().manual_seed(0)
        config = SAEConfig(tokens=1280, batch=128, router="layer:0", clip=clip)
        train_sae(sae, lambda n: torch.randn(n, 1, 16, generator=g), config)
        return sae.w_enc

    assert torch.equal(trained(None), trained(1e6))
    assert not torch.allclose(trained(None), trained(1e-9), atol=1e-3)


# ---------------------------------------------------------------- fitting


def test_fit_reports_and_repeats_bit_for_bit(model, fitted):
    sae, report = fitted
    held = some_rows(40, seed=7), some_rows(40, seed=8)
    measured = quality(model, sae, *held)
    assert measured["fvu_general"] < 1 and measured["fvu_harmful"] < 1
    assert measured["fvu_general"] == pytest.approx(measured["fvu_per_layer_general"][1])  # the fixed layer
    assert measured["l0"] == 8 and measured["l0_is_k_general"] == 1
    assert 0 <= measured["dead_share"] < 0.5 and 0 <= measured["dense_share"] < 1
    assert measured["usage_general"] == {0: 0, 1: 1, 2: 0} and measured["usage_entropy_general"] == 0
    config = SAEConfig(tokens=40_000, batch=512, m=256, k=8, router="layer:1")
    again, _ = fit_sae(model, some_rows(200), some_rows(200, seed=1), config)
    for name, value in sae.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert report["epochs_harmful"] == pytest.approx(0.7 * report["tokens"] / report["tokens_read_harmful"])


def test_streaming_reads_everything_and_caching_stops_early(model):
    rows = some_rows(60)
    kept = sum(len(r["input_ids"]) - 1 for r in rows)
    whole = TokenBuffer(model, rows, [0], 10_000, False, torch.Generator().manual_seed(0), "test")
    assert whole.whole and len(whole._tokens) == pytest.approx(kept, abs=20)  # BOS drawn by chance is dropped
    seen = whole.draw(len(whole._tokens))
    assert len(torch.unique(seen.flatten(1), dim=0)) == len(torch.unique(whole._tokens.flatten(1), dim=0))
    many = some_rows(600)  # more than one batch of 4,096 tokens
    once = TokenBuffer(model, many, [0], 100, True, torch.Generator().manual_seed(0), "test")
    read = once.tokens_read
    once.draw(6000)
    assert once.tokens_read == read < sum(len(r["input_ids"]) - 1 for r in many) / 2
    stream = TokenBuffer(model, many, [0], 2000, False, torch.Generator().manual_seed(0), "test")
    stream.draw(9000)
    assert stream.tokens_read > 9000  # new tokens came in, over more than one pass
    with pytest.raises(UserError, match="empty"):
        TokenBuffer(model, [], [0], 10, False, torch.Generator(), "test")


@pytest.mark.parametrize(
    ("usage", "fallback", "router"),
    [((0.9, 0.1), True, "uniform"), ((0.9, 0.1), False, "hard"), ((0.6, 0.4), True, "hard")],
)
def test_a_collapsed_router_falls_back_and_says_so(model, monkeypatch, usage, fallback, router):
    monkeypatch.setattr("cwac.constraints.sae.fit.last_usage", lambda *_: torch.tensor(usage))
    config = SAEConfig(tokens=2_048, batch=512, m=64, k=4, layers=[0, 1], fallback=fallback)
    sae, report = fit_sae(model, some_rows(50), some_rows(50, seed=1), config)
    assert report["router_collapsed"] == (usage[0] > 0.7)
    assert sae.router_mode == report["router"] == router
    assert ("router_fallback" in sae.info) == (router == "uniform")


def test_which_layer_last_tokens_are_read_at(model):
    """The model is asked only where a router chooses."""
    rows = some_rows(30)
    assert last_usage(None, random_sae(layers=(0, 1, 2), router="uniform"), rows).tolist() == [0, 1, 0]
    assert last_usage(None, random_sae(layers=(0, 1, 2), router="layer:2"), rows).tolist() == [0, 0, 1]
    sae = random_sae(d=32, layers=(0, 1, 2), router="hard")
    places = last_latents(model, sae, rows)[1]
    assert torch.allclose(last_usage(model, sae, rows), torch.bincount(places, minlength=3) / 30)
    assert len(places.unique()) > 1


def test_save_and_load(model, fitted, tmp_path):
    sae, _ = fitted
    sae.save(tmp_path)
    again = RoutedSAE.load(tmp_path, model)
    assert again.info == sae.info and again.layers == sae.layers
    written = json.loads((tmp_path / "sae.json").read_text())
    assert (written["slots"], written["router"]) == ([1, 2, 3], "fixed:2")  # as artifacts that exist have them
    for name, value in sae.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    with pytest.raises(UserError, match="another model"):
        RoutedSAE.load(tmp_path, llama(seed=9))
    with pytest.raises(UserError, match="no SAE"):
        RoutedSAE.load(tmp_path / "nowhere")


def test_settings_are_checked():
    for bad in ({"harmful_share": 1.5}, {"tokens": 10}, {"backend": "triton"}):
        with pytest.raises(UserError):
            SAEConfig(**bad)
    with pytest.raises(UserError, match="sae.k"):
        RoutedSAE(8, 16, 17, [1])
    rates = [SAEConfig().learning_rate(steps) for steps in (100, 1000, 3162, 10_000, 50_000)]
    assert rates == pytest.approx([2e-3, 2e-3, 1e-3, 5e-4, 5e-4], rel=1e-3)


# ---------------------------------------------------------------- L_safety


@pytest.mark.parametrize("units", ["raw", "relative"])
@pytest.mark.parametrize("gate", GATES)
def test_the_unchanged_model_has_no_loss(model, fitted, gate, units):
    rows = some_rows(12, seed=3)
    target = SafetyTarget.build(model, fitted[0], range(256), rows, gate, "prompt", units)
    assert target.baseline_energy > 1
    assert target.loss(model, range(12)).item() / target.baseline_energy < 1e-6
    drift = target.drift(model)
    assert drift["relative_feature_drift"] < 1e-6 and drift["dropped_share"] == 0 and drift["residual_drift"] < 1e-5


@pytest.mark.parametrize("gate", GATES)
def test_a_target_that_was_saved_is_the_same_target_under_any_gate(model, fitted, moved, gate, tmp_path):
    rows, latents = some_rows(5, seed=3), [5, 17, 80, 99, 200]
    built = SafetyTarget.build(model, fitted[0], latents, rows, gate, "prompt", "relative")
    SafetyTarget.build(model, fitted[0], latents, rows, "topk", "prompt").save(tmp_path)
    loaded = SafetyTarget.load(tmp_path, fitted[0], latents, gate, "relative")
    assert len(loaded) == 5 and [p.ids for p in loaded.prompts] == [row["input_ids"] for row in rows]
    assert loaded.loss(moved, range(5)).item() == pytest.approx(built.loss(moved, range(5)).item(), rel=1e-6)
    assert loaded.drift(moved) == pytest.approx(built.drift(moved), rel=1e-6)


def test_a_stand_in_costs_what_a_target_of_its_sizes_would(model, fitted):
    """Three prompts of seven tokens, of which four are alike; every layer of the autoencoder is read."""
    target = SafetyTarget.stand_in(fitted[0], 9, 3, 7, "tau", shared=4)
    assert [p.ids for p in target.prompts] == [[0, 0, 0, 0, i, i, i] for i in (1, 2, 3)]
    assert all(p.positions == [6] and p.z.shape == p.active.shape == p.pre.shape == (1, 9) for p in target.prompts)
    assert target.used == fitted[0].readable and len(target.latents) == 9
    assert torch.isfinite(target.loss(model, [0, 2]))


def test_l_safety_is_the_formula(model, fitted, moved):
    sae, rows = fitted[0], some_rows(6, seed=3)
    latents = [5, 17, 80, 99, 200]
    before, after = last_latents(model, sae, rows)[0], last_latents(moved, sae, rows)[0]
    expected = (after - before)[:, latents].pow(2).sum(1).mean()  # Eq. 11: sum over S, mean over prompts
    target = SafetyTarget.build(model, sae, latents, rows, "topk")
    assert target.loss(moved, range(6)).item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-8)
    everything = SafetyTarget.build(model, sae, range(256), rows, "topk")
    drift = everything.drift(moved)
    expected = (after - before).pow(2).sum(1).mean().item()
    assert drift["feature_drift"] == pytest.approx(expected, rel=1e-4)
    assert drift["relative_feature_drift"] == pytest.approx(expected / before.pow(2).sum(1).mean().item(), rel=1e-4)
    assert 0 < drift["residual_drift"] < 1
    assert target.loss(moved, []).item() == 0


def test_loss_does_not_depend_on_the_batch(model, fitted, moved):
    rows = some_rows(5, seed=3, low=4, high=20)
    for positions in ("last", "template:3", "prompt"):
        target = SafetyTarget.build(model, fitted[0], range(256), rows, "tau", positions)
        alone = [target.loss(moved, [i]).item() for i in range(5)]
        assert target.loss(moved, range(5)).item() == pytest.approx(sum(alone) / 5, rel=1e-4)
        assert target.loss(moved, torch.tensor([4, 0])).item() == pytest.approx((alone[4] + alone[0]) / 2, rel=1e-4)


def test_response_positions_read_the_prompts_end_and_the_answer(model, fitted):
    prompt = [1, 5, 6, 7]
    rows = [{"input_ids": [*prompt, 8, 9, 10], "prompt": 4}]
    target = SafetyTarget.build(model, fitted[0], range(256), rows, positions="response:2")
    assert target.prompts[0].ids == [*prompt, 8, 9] and target.prompts[0].positions == [3, 4, 5]
    last = SafetyTarget.build(model, fitted[0], range(256), rows, positions="last")
    assert last.prompts[0].ids == prompt
    assert torch.allclose(
        last.prompts[0].z[0], target.prompts[0].z[0], atol=1e-4
    )  # causal: the answer changes nothing
    with pytest.raises(UserError, match="answers"):
        SafetyTarget.build(model, fitted[0], [0], [{"input_ids": prompt}], positions="response:2")


def test_a_dropped_latent_is_pulled_back_by_tau_and_lost_by_topk(model, fitted, moved):
    sae, rows = fitted[0], some_rows(20, seed=3)
    before, after = last_latents(model, sae, rows)[0], last_latents(moved, sae, rows)[0]
    prompt, latent = ((before > 0) & (after == 0)).nonzero()[0].tolist()

    def gradient(gate):
        moved.zero_grad()
        target = SafetyTarget.build(model, sae, [latent], rows, gate)
        loss = target.loss(moved, [prompt])
        assert loss.item() > 0
        if not loss.requires_grad:
            return 0.0
        loss.backward()
        return sum(p.grad.norm().item() for p in moved.parameters() if p.grad is not None)

    assert gradient("topk") == 0
    assert all(gradient(gate) > 0 for gate in ("tau", "union", "base", "preact"))


def test_gates_agree_while_the_topk_set_does(model, fitted, moved):
    sae, rows = fitted[0], some_rows(60, seed=3)
    before, (after, _, u) = last_latents(model, sae, rows)[0], last_latents(moved, sae, rows)
    tau = sae.pre(last_latents(model, sae, rows)[2]).topk(sae.k).values[:, -1]
    outside = sae.pre(u).masked_fill(after > 0, -torch.inf).max(1).values
    same = ((before > 0) == (after > 0)).all(1) & (outside <= tau)
    assert 5 <= same.sum() < 60
    losses = {g: SafetyTarget.build(model, sae, range(256), rows, g) for g in GATES if g != "preact"}
    losses = {g: torch.stack([t.loss(moved, [i]) for i in range(60)]).detach() for g, t in losses.items()}
    for gate in ("tau", "union", "base"):
        assert torch.allclose(losses[gate][same], losses["topk"][same], rtol=1e-4)
    # elsewhere what the literal loss counts and a gate's differ, `base` never more than `union`
    assert (losses["base"] <= losses["union"] + 1e-6).all()
    assert not torch.allclose(losses["tau"][~same], losses["base"][~same])


def test_soft_routing_keeps_the_baselines_weights(model, moved):
    sae = random_sae(d=32, m=128, k=6, layers=(0, 1, 2), router="soft")
    rows = some_rows(4)
    target = SafetyTarget.build(model, sae, range(128), rows)
    assert target.loss(model, range(4)).item() < 1e-6 < target.loss(moved, range(4)).item()


def test_gradient_of_l_safety_matches_finite_differences(model, moved, fitted):
    reference, current = copy.deepcopy(model).double(), copy.deepcopy(moved).double()
    target = SafetyTarget.build(reference, copy.deepcopy(fitted[0]).double(), range(256), some_rows(3, seed=3))
    weight = decoder_layers(current)[1].mlp.down_proj.weight
    target.loss(current, range(3)).backward()
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        direction = torch.randn(weight.shape, dtype=torch.float64, generator=generator)
        direction /= direction.norm()
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight += sign * 1e-6 * direction
                values.append(target.loss(current, range(3)).item())
                weight -= sign * 1e-6 * direction
        numeric = (values[0] - values[1]) / 2e-6
        assert numeric == pytest.approx((weight.grad * direction).sum().item(), rel=1e-4, abs=1e-7)


def test_only_layers_up_to_the_read_slot_run(model, fitted, moved):
    target = SafetyTarget.build(model, fitted[0], range(256), some_rows(3))
    ran = []
    handles = [b.register_forward_pre_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(decoder_layers(moved))]
    target.loss(moved, [0, 1])
    for handle in handles:
        handle.remove()
    assert ran == [0, 1]  # the SAE reads layer 1


def test_targets_refuse_bad_input(model, fitted):
    sae, rows = fitted[0], some_rows(2)
    for change in ({"gate": "relu"}, {"units": "z"}, {"positions": "first"}, {"positions": "response:0"}):
        with pytest.raises(UserError, match="method.activation"):
            SafetyTarget.build(model, sae, [0], rows, **change)
    with pytest.raises(UserError, match="no harmful prompts"):
        SafetyTarget.build(model, sae, [0], [])
    for latents in ([], [256]):
        with pytest.raises(UserError, match="subset"):
            SafetyTarget.build(model, sae, latents, rows)


# ---------------------------------------------------------------- ranking


@pytest.fixture(scope="module")
def planted():
    """A model whose residual is the last token's embedding, and an SAE that knows the directions in it.

    Tokens 10..49 carry four of 64 directions: of 0..9 in "harmful" prompts (ending in 10..29), never in
    benign ones (30..49). Token 60's logit grows with directions 0..4 and token 61's with the others.
    """
    d, m = 64, 64
    model = llama(vocab_size=97, hidden_size=d)
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(d, d, generator=generator))[0]
    directions[:, :] = directions - directions.mean(1, keepdim=True)
    directions = torch.nn.functional.normalize(directions, dim=1)
    with torch.no_grad():
        for block in decoder_layers(model):
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        for token in range(10, 50):
            own = torch.tensor([token % 10, (token + 3) % 10])
            other = 10 + torch.randperm(54, generator=generator)[:2]
            chosen = torch.cat([own, other]) if token < 30 else 10 + torch.randperm(54, generator=generator)[:4]
            model.model.embed_tokens.weight[token] = directions[chosen].sum(0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[60] = directions[:5].sum(0)
        model.lm_head.weight[61] = directions[10:].sum(0) * 0.3
    sae = RoutedSAE(d, m, 4, [1], "layer:1")
    with torch.no_grad():
        sae.w_dec.copy_(directions)
        sae.w_enc.copy_(directions)
    ends = torch.randint(10, 30, (200,), generator=generator).tolist()
    harmful = [{"input_ids": [1, 5, 6, e]} for e in ends]
    benign = [{"input_ids": [1, 7, e + 20]} for e in ends]
    return model, sae.requires_grad_(False), harmful, benign


def test_ranking_finds_the_planted_latents(planted):
    model, sae, harmful, benign = planted
    table = rank_latents(model, sae, harmful, benign, n=15, method="contrast")
    assert set(range(10)) <= set(table["latent"])
    assert set(table["latent"][table["eligible"]]) >= set(range(10))
    assert table.attrs["eligible"] == table["eligible"].sum() and table.attrs["split_half"] > 0.6
    assert table["rank"].tolist() == list(range(1, 16)) and (table["layer"][table["mean_harmful"] > 0] == 1).all()
    literal = rank_latents(model, sae, harmful, benign, n=64, method="activation")
    assert literal["mean_harmful"].is_monotonic_decreasing  # no filter: the paper names none
    assert literal["latent"].is_unique and len(literal) == 64
    cosine = rank_latents(model, sae, harmful, benign, n=10, method="cosine")
    assert len(set(range(10)) & set(cosine["latent"])) >= 8
    first, again, other = (
        rank_latents(model, sae, harmful, benign, n=10, method="random", seed=seed)["latent"].tolist()
        for seed in (0, 0, 1)
    )
    assert first == again != other


def test_attribution_orders_by_effect_on_the_refusal(planted):
    model, sae, harmful, benign = planted
    effect = attribution(model, sae, harmful, [60], [61])
    assert effect[:5].min() > effect[5:].max()
    table = rank_latents(model, sae, harmful, benign, n=20, openers=({60: 1.0}, {61: 1.0}))
    assert set(table["latent"][:5]) == set(range(5))
    assert table.attrs["eligible"] < 20 and not table["eligible"].iloc[-1]  # filled up, and marked as such
    with pytest.raises(UserError, match="same tokens"):
        rank_latents(model, sae, harmful, benign, openers=({60: 1.0}, {60: 1.0}), n=5)


def test_a_token_that_opens_both_belongs_to_the_side_that_it_opens_far_more_often():
    refusal, compliance = distinguishing_tokens({1: 0.9, 2: 0.1, 3: 0.2}, {1: 0.15, 2: 0.35, 3: 0.1, 4: 0.4})
    assert refusal == [1] and compliance == [2, 4]  # 3 opens both alike


def test_attribution_is_the_first_order_effect_of_removing_a_latent(model, fitted):
    sae, rows = fitted[0], some_rows(6, seed=3)
    z = last_latents(model, sae, rows)[0]
    latent = int(z.mean(0).argmax())
    reference = copy.deepcopy(model).double()
    effect = 0.0
    for number, row in enumerate(rows):
        batch = {"input_ids": torch.tensor([row["input_ids"]])}
        r = residuals(reference, batch, sae.layers)
        std = normalize(r)[2][0, -1, 1]
        size = (z[number, latent].double() * std).detach() * sae.w_dec[latent].double()

        def margin(share, batch=batch, size=size):
            def scale(layer, hidden):
                hidden = hidden.clone()
                hidden[0, -1] += share * size
                return hidden

            with on_layers(reference, [1], scale):
                logits = reference(**batch).logits[0, -1]
            return (logits[[5, 6]].logsumexp(0) - logits[[7, 8]].logsumexp(0)).item()

        effect += (margin(0.02) - margin(-0.02)) / 0.04 / len(rows)
    assert attribution(model, sae, rows, [5, 6], [7, 8])[latent].item() == pytest.approx(effect, rel=2e-2, abs=1e-5)


def alone(model, sae, row, refusal=None, compliance=None):
    """What ranking reads of one prompt, in a plain pass of its own: z, u, its first token, each latent's attribution.

    The gradient of the margin is taken at all tokens of all layers, with all logits.
    """
    seen = {}

    def record(layer, hidden):
        seen[layer] = hidden if seen else hidden.detach().requires_grad_()
        return seen[layer]

    with on_layers(model, sae.layers, record):
        logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0, -1]
    hidden = [seen[layer] for layer in sae.layers]
    x, _, std = sae.normalize(torch.stack([h.detach()[0, -1] for h in hidden]))
    weights = sae.read_weights(x)
    u = sae.mix(x, weights)
    z, effect = sae.dense(u), None
    if refusal is not None:
        margin = logits[list(refusal)].logsumexp(0) - logits[list(compliance)].logsumexp(0)
        slope = torch.stack([g[0, -1] for g in torch.autograd.grad(margin, hidden)])
        effect = z * sae.on_decoder(sae.mix(std * slope, weights))
    return z, u, int(logits.argmax()), effect


def ranking_of_prompts_alone(monkeypatch, model, sae, harmful, benign, **more):
    """`rank_latents` with every prompt read in a pass of its own."""

    def latents(model, sae, rows, openers=None):
        read = [alone(model, sae, row) for row in rows]
        if openers is not None:  # longest first: of openers that are as frequent, those seen first count
            order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
            openers.update(read[i][2] for i in order)
        places = torch.full((len(rows),), sae.fixed)
        return torch.stack([z for z, *_ in read]), places, torch.stack([u for _, u, *_ in read])

    def effects(model, sae, rows, refusal, compliance):
        return torch.stack([alone(model, sae, row, refusal, compliance)[3] for row in rows]).mean(0)

    with monkeypatch.context() as patched:
        patched.setattr(ranking, "last_latents", latents)
        patched.setattr(ranking, "attribution", effects)
        return rank_latents(model, sae, harmful, benign, **more)


def same_table(table, plain):
    assert table["latent"].tolist() == plain["latent"].tolist()
    assert table["eligible"].tolist() == plain["eligible"].tolist()
    for column in table.columns:
        assert table[column].to_numpy() == pytest.approx(plain[column].to_numpy(), rel=1e-3, abs=1e-5, nan_ok=True)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", ["contrast", "contrast+attribution"])
def test_the_ranking_is_that_of_prompts_read_alone(monkeypatch, method, attention):
    """Packed prompts, and logits of their last tokens alone, give what a plain pass over each prompt gives."""
    model = LlamaForCausalLM._from_config(llama(seed=4).config, attn_implementation=attention)
    model.load_state_dict(llama(seed=4).state_dict())
    sae = random_sae(d=32, m=128, k=6, layers=(0, 1, 2), router="layer:1").requires_grad_(False)
    harmful, benign = some_rows(60, seed=6), some_rows(50, seed=7)
    for rows in (harmful, benign):  # the opening of a template, prompts that open others, and prompts twice
        rows[:] = [{"input_ids": [1, 9, 8, 7, *row["input_ids"]]} for row in rows]
        rows += [{"input_ids": row["input_ids"][:-2]} for row in rows[:5]] + rows[:5]
    openers = None if method == "contrast" else ({5: 0.6, 6: 0.4}, {7: 0.5, 8: 0.5})
    given = {"n": 30, "method": method, "openers": openers, "general_rows": some_rows(40, seed=8)}
    plain = ranking_of_prompts_alone(monkeypatch, model, sae, harmful, benign, **given)
    table = rank_latents(model, sae, harmful, benign, **given)
    same_table(table, plain)
    assert table["eligible"].any() and not table["eligible"].all()


def test_the_ranking_of_the_embedded_model_is_that_of_prompts_read_alone(monkeypatch, artifacts):
    """Its refusals and its answers open with words of their own, which are measured on the way."""
    context = open_context(compose(["method=cwac", f"paths.artifacts={artifacts}"]))
    model, pools = context.loaded.model, context.pools
    harmful, benign = (anchors.encode_prompts(context, pool[:60]) for pool in (pools.sae, pools.benign))
    sae = random_sae(d=128, m=512, k=16, layers=(0, 1, 2), router="layer:1").requires_grad_(False)
    plain = ranking_of_prompts_alone(monkeypatch, model, sae, harmful, benign, n=40)
    table = rank_latents(model, sae, harmful, benign, n=40)
    same_table(table, plain)
    assert table["eligible"].sum() > 3 and table["attribution"].notna().all()


@pytest.mark.parametrize("rows", [[[1, 5, 6], [1, 5, 6, 7], [1, 5, 6, 7, 8]], [[1, 5, 6]] * 3, [[1, 5, 6]]])
def test_a_prompt_that_opens_another_has_an_attribution_of_its_own(model, fitted, rows):
    """The last token of the first is read by the others, whose margins its gradient must not hold."""
    sae, rows = fitted[0], [{"input_ids": ids} for ids in rows]
    each = [alone(model, sae, row, [5, 6], [7, 8])[3] for row in rows]
    assert torch.allclose(attribution(model, sae, rows, [5, 6], [7, 8]), torch.stack(each).mean(0), atol=1e-5)


def test_ranking_computes_logits_of_last_tokens_alone(model, fitted):
    """A model with a large vocabulary spends gigabytes on the others."""
    read = []
    handle = model.lm_head.register_forward_hook(lambda _module, given, _out: read.append(given[0].shape[1]))
    rows = [{"input_ids": [1, 5, 6, 7, 8, i, i + 1]} for i in range(10, 60)]
    rank_latents(model, fitted[0], rows, rows[:20], n=5, openers=({5: 1.0}, {6: 1.0}))
    assert sum(read) == 50  # of the attribution
    last_latents(model, fitted[0], rows, counted := Counter())
    handle.remove()
    assert sum(read) == 100 and counted.total() == 50


def test_logits_of_some_tokens_are_those_of_a_model_that_cannot_be_asked_for_them(model, monkeypatch):
    rows = some_rows(9, seed=2)
    (_, inputs, last), *_ = packs(model, rows)
    asked = logits_at(model, inputs, last)
    monkeypatch.setattr(hooks, "picks_logits", lambda _: False)
    assert torch.allclose(asked, logits_at(model, inputs, last), atol=1e-5)
    padded = copy.deepcopy(model)
    padded.config._attn_implementation = "flash_attention_2"  # takes no mask but that of padding
    (_, inputs, last), *_ = packs(padded, rows)
    monkeypatch.undo()
    assert inputs["input_ids"].shape[0] == 9 and torch.allclose(asked, logits_at(model, inputs, last), atol=1e-5)


def test_ranking_refuses_bad_input(model, fitted):
    rows = some_rows(3)
    with pytest.raises(UserError, match="method.activation.ranking"):
        rank_latents(model, fitted[0], rows, rows, method="alphabetical")
    with pytest.raises(UserError, match="empty"):
        rank_latents(model, fitted[0], rows, [])
    with pytest.raises(UserError, match="method.activation.n_latents"):
        rank_latents(model, fitted[0], rows, rows, n=1000)


def test_matched_random_latents_have_the_same_energy():
    energy = torch.arange(1, 101).float()
    drawn = matched_random(energy, [10, 50, 90], torch.Generator().manual_seed(0))
    assert len(set(drawn)) == 3 and not {10, 50, 90} & set(drawn)
    assert all(abs(energy[i] - energy[j]) <= 10 for i, j in zip([10, 50, 90], drawn, strict=True))


def test_edited_generation_and_the_causal_check(fitted):
    from cwac.models.tiny import make_tokenizer

    tokenizer = make_tokenizer()
    model = llama(seed=2, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    words = list(tokenizer.get_vocab())[20:60]
    examples = [Example(id=str(i), prompt=" ".join(words[i : i + 3 + i % 3])) for i in range(8)]
    messages = [e.messages for e in examples]
    sae = random_sae(d=32, m=128, k=6, layers=(0, 1, 2), router="hard")
    plain = generate(model, tokenizer, messages, max_new_tokens=6, description=None)
    assert generate_edited(model, tokenizer, sae, messages, [], -1.0, 6) == plain
    assert generate_edited(model, tokenizer, sae, messages, range(128), 1.0, 6, batch_size=3) == plain
    assert generate_edited(model, tokenizer, sae, messages, range(128), -1.0, 6) != plain
    asked = (model, tokenizer, sae, range(0, 128, 2), examples, KeywordJudge())
    edits = causal_check(*asked, factors=(-1.0, 1.0), draws=1, max_new_tokens=4, harmless=examples[:4])
    assert [(e["factor"], e["latents"]) for e in edits] == [
        (by, name) for by in (-1.0, 1.0) for name in ("none", "held", "random 1")
    ]
    assert edits[1]["energy"] + edits[2]["energy"] == pytest.approx(100)  # the other half
    assert edits[1]["unchanged"] in (0, 25, 50, 75, 100) and edits[0]["energy"] == 0
    # a factor of 1 is no edit
    assert {e["unchanged"] for e in edits[3:]} == {100}
    assert len({(e["refusal"], e["harmful"], e["other"]) for e in edits[3:]}) == 1
    alone = causal_check(model, tokenizer, sae, [1, 2, 3], examples, KeywordJudge(), draws=2, max_new_tokens=4)
    assert len(alone) == 4 and all(isnan(e["unchanged"]) and e["n"] == 8 for e in alone)
    assert all(e["refusal"] + e["harmful"] + e["other"] == pytest.approx(100) for e in alone)


# --- the harmful prompts it is fitted on ----------------------------------------------------------------
ANSWERS = {"a": "I'm sorry, but I can't help with that.", "b": "Sure, here is how.", "c": "I cannot assist with that."}


def asked(monkeypatch):
    """A context whose model refuses `a` and `c` of three prompts, and complies with `b`."""
    monkeypatch.setattr(
        anchors, "own_answers", lambda model, c, examples, tokens: [ANSWERS[e.prompt] for e in examples]
    )
    return SimpleNamespace(pools=SimpleNamespace(sae=[Example(id=p, prompt=p) for p in ANSWERS]))


def test_the_autoencoder_is_fitted_on_the_prompts_that_the_model_refuses(monkeypatch):
    """Section 4.1: harmful prompts that the model refuses."""
    context = asked(monkeypatch)
    assert [e.prompt for e in sae_prompts(None, context, Activation())] == ["a", "c"]
    assert [e.prompt for e in sae_prompts(None, context, Activation(refused_only=False))] == ["a", "b", "c"]
    context.pools.sae = context.pools.sae[:2]
    with pytest.raises(UserError, match="refuses 1 of the 2 prompts of the pool `sae`.*enlarge pools.sae"):
        sae_prompts(None, context, Activation())


def test_a_run_whose_autoencoder_saw_all_prompts_has_another_id():
    """Its old id is that of `refused_only: false`; where no autoencoder is fitted, the key moves nothing."""
    ids = [run_id(compose(["method=cwac", f"method.activation.refused_only={given}"])) for given in ("true", "false")]
    assert ids[0] != ids[1]
    cfg = compose(["method=cwac", "method.activation.refused_only=false"])
    del cfg.method.activation.refused_only  # as a run's own config.yaml from before
    assert run_id(cfg) == ids[1]
    other = ["method=cwac", "method.activation.space=residual"]
    cfg = compose(other)
    before = run_id(cfg)
    del cfg.method.activation.refused_only
    assert run_id(cfg) == before
    assert run_id(compose([*other, "method.activation.refused_only=true"])) == before


# --- general text -----------------------------------------------------------------------------------------
class Words:
    """A tokenizer: `<s>`, and a number for every word."""

    def __call__(self, text, **_):
        return {"input_ids": [1, *(len(word) for word in text.split())]}


def test_web_text_is_read_until_there_are_tokens_enough(tmp_path):
    (tmp_path / "a.txt").write_text("aa bbb c\n\naa aa aa aa\nz z z\n")
    rows = web_rows(Words(), str(tmp_path / "a.txt"), tokens=5, length=3)
    assert rows[:] == [{"input_ids": ids} for ids in ([1, 2, 3], [1, 2, 2], [2, 2])]  # [1] of the first is no data
    held_out, others = rows.split(1)
    assert held_out == rows[:1] and others[:] == rows[1:] and others[-1] == {"input_ids": [2, 2]} and len(others) == 2
    (tmp_path / "a.jsonl").write_text('{"body": "z z"}\n{"body": ""}\n{"body": "y"}\n')
    assert list(documents(str(tmp_path / "a.jsonl"), "body")) == ["z z", "y"]
    for name, text, message in (
        ("a.jsonl", "text", "has no column text; it has body: give .*corpus_text"),
        ("b.txt", "text", "there is no such file; give a .txt or .jsonl file, a folder or a hub id"),
    ):
        with pytest.raises(UserError, match=message):
            web_rows(Words(), str(tmp_path / name), 5, 3, text)
    (tmp_path / "c.txt").write_text("\n")
    with pytest.raises(UserError, match="holds no text"):
        web_rows(Words(), str(tmp_path / "c.txt"), 5, 3)


def test_a_corpus_takes_the_place_of_the_harmless_instructions(tmp_path):
    (tmp_path / "web.txt").write_text("\n".join(f"word {'x' * (i % 7 + 1)} more" for i in range(50)))
    context = SimpleNamespace(tokenizer=Words(), max_length=64)
    config = sae_config(Activation(sae={"corpus": str(tmp_path / "web.txt"), "tokens": 100, "batch": 10}))
    held_out, rows = general_rows(context, config, 100)
    assert len(held_out) == 10 and len(rows) == 40 and rows[0]["input_ids"] == [1, 4, 10 % 7 + 1, 4]
    with pytest.raises(UserError, match="corpus=.*there is no such file"):  # before anything is written
        sae_config(Activation(sae={"corpus": str(tmp_path / "none.txt")}))
    with pytest.raises(UserError, match="corpus_text=body: only model.sae.corpus has one"):
        SAEConfig(corpus_text="body")


def test_a_corpus_on_this_machine_counts_by_its_content(tmp_path):
    ids = []
    for name, text in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / f"{name}.txt").write_text(text)
        ids.append(run_id(compose(["method=cwac", f"+model.sae.corpus={tmp_path / name}.txt"])))
    assert ids[0] == ids[1] != ids[2] and ids[0] != run_id(compose(["method=cwac"]))
    assert SAEConfig(corpus=str(tmp_path / "a.txt")).key() == SAEConfig(corpus=str(tmp_path / "b.txt")).key()
    quiet = [run_id(compose(["method=cwac", f"model.sae.max_repeats={n}"])) for n in ("null", 3)]
    assert quiet[0] == quiet[1] and SAEConfig(max_repeats=None).key() == SAEConfig().key()


def test_how_often_a_corpus_is_repeated_is_told(caplog):
    """100 rows of 11 tokens, the first of which is no data, at 70 % of 30,000 tokens: 21 times each."""
    rows = [{"input_ids": [7, *range(10)]}, *({"input_ids": [7, i, *range(9)]} for i in range(20, 119))]
    cfg = SAEConfig(tokens=30_000, batch=100)
    assert repeats(rows, 0.7, cfg) == pytest.approx(21)
    assert repeats(rows, 0.7, SAEConfig(tokens=30_000, batch=100, cached_tokens=300)) == pytest.approx(100)
    warn_of_repeats(rows, 0.7, "harmful", cfg)
    assert "harmful corpus 21 times (model.sae.tokens=30000): give it more prompts (pools.*)" in caplog.text
    caplog.clear()
    warn_of_repeats(rows, 0.3, "general", cfg)  # 9 times
    warn_of_repeats(rows, 0.7, "harmful", SAEConfig(tokens=30_000, batch=100, max_repeats=None))
    assert not caplog.text


# --- RouteSAE's recipe ------------------------------------------------------------------------------------
def test_the_literal_schedule_is_route_saes():
    """`LinearWarmupLR` by hand for 1,000 steps: W = 50, D = 200; decoder rows after batches 0, 10, 20, ..."""
    cfg = SAEConfig(schedule="routesae", renorm_every=10, lr=5e-4)
    rates = [rate(step, 1000, cfg) for step in range(1000)]
    assert rates[0] == 0 and rates[25] == 0.5 and rates[50] == rates[799] == 1
    assert rates[800] == pytest.approx(150 / 750) and rates[875] == pytest.approx(75 / 750)
    assert rates[950] == rates[999] == 0
    assert [step for step in range(25) if renormalises(step, cfg)] == [0, 10, 20]
    ours = SAEConfig(renorm_every=10)
    assert rate(0, 1000, ours) == pytest.approx(1 / 50) and rate(800, 1000, ours) == 1
    assert rate(900, 1000, ours) == 0.5
    assert [step for step in range(25) if renormalises(step, ours)] == [9, 19]


def test_the_literal_preset_is_route_saes():
    sae = compose(["model=llama2", "variant=sae_routesae"]).method.activation.sae
    given = {"router": "hard", "fallback": False, "k": 64, "batch": 32768, "harmful_share": 0.0, "lr": 5e-4}
    given |= {"schedule": "routesae", "clip": None, "auxk": 0.0, "center": False, "renorm_every": 10}
    assert {key: sae[key] for key in given} == given
