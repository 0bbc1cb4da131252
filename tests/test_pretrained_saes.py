"""Autoencoders that others have trained: SAELens' and sparsify's formats, and ours in SAELens'.

What the libraries made and computed lies in tests/saes (tests/helpers/saes.py), so that the formats are tested without
them; where they are installed, they are asked again.
"""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from cwac.constraints.activation import sae_config
from cwac.constraints.sae import pretrained
from cwac.constraints.sae.autoencoder import RoutedSAE
from cwac.constraints.sae.fit import SAEConfig, fit_sae, quality
from cwac.constraints.sae.pretrained import find, load, save_saelens
from cwac.constraints.sae.ranking import attribution, last_latents, rank_latents
from cwac.constraints.sae.target import GATES, SafetyTarget
from cwac.constraints.settings import Activation
from cwac.core.cache import load_or_build
from cwac.core.config import compose
from cwac.core.errors import UserError
from cwac.core.identity import run_id
from cwac.models.hooks import residuals
from experiments import artifacts as artifacts_command
from tests.conftest import FINE_TUNE, fine_tune, make_llama, random_rows
from tests.helpers import saes

EXPECTED = load_file(saes.FOLDER / "expected.safetensors")
ALL = [*(f"saelens/{name}" for name in saes.SAELENS), *(f"sparsify/{name}" for name in saes.SPARSIFY)]


def latents_and_output(folder):
    """What we make of the inputs: z [5, M], and the reconstruction [5, d] in the units of the residual."""
    sae = load(find(str(folder)))
    x, _, std = sae.normalize(EXPECTED["x"].unsqueeze(-2))
    u, _ = sae.read(x)
    z = sae.dense(u)
    u_hat = sae.decode(*sae.encode(u))
    mean = EXPECTED["x"].mean(-1, keepdim=True) if sae.parts[0].norm == "layer_norm" else 0.0
    return z, std[:, 0] * u_hat + mean


@pytest.mark.parametrize("name", ALL)
def test_latents_and_reconstructions_are_the_librarys(name):
    z, u_hat = latents_and_output(saes.FOLDER / name)
    key = name.replace("/", ".")
    torch.testing.assert_close(z, EXPECTED[f"{key}.z"], rtol=0, atol=1e-5)
    torch.testing.assert_close(u_hat, EXPECTED[f"{key}.u_hat"], rtol=0, atol=1e-5)
    assert (z > 0).any()


@pytest.mark.parametrize("name", ALL)
def test_the_installed_library_says_the_same(name, tmp_path):
    library, kind = name.split("/")
    pytest.importorskip({"saelens": "sae_lens", "sparsify": "sparsify"}[library], reason=f"{library} is not installed")
    expected_z, expected_u = getattr(saes, library)(kind, tmp_path)
    z, u_hat = latents_and_output(tmp_path)
    torch.testing.assert_close(z, expected_z, rtol=0, atol=1e-5)
    torch.testing.assert_close(u_hat, expected_u, rtol=0, atol=1e-5)


def test_a_checkpoints_scaling_factor_is_folded_in(tmp_path):
    """z(x) of the folded one is z(s x) of the one that was not; the reconstruction is divided by s."""
    shutil.copytree(saes.FOLDER / "saelens" / "standard", tmp_path / "sae")
    plain = load(find(str(tmp_path / "sae")))
    config = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    (tmp_path / "sae" / "cfg.json").write_text(
        json.dumps(config | {"normalize_activations": "expected_average_only_in"})
    )
    with pytest.raises(UserError, match="fold_activation_norm_scaling_factor"):
        find(str(tmp_path / "sae"))
    (tmp_path / "sae" / "activation_scaler.json").write_text('{"scaling_factor": 0.25}')
    scaled, x = load(find(str(tmp_path / "sae"))), EXPECTED["x"]
    torch.testing.assert_close(scaled.dense(x), plain.dense(0.25 * x))
    torch.testing.assert_close(4 * plain.decode(*plain.encode(0.25 * x)), scaled.decode(*scaled.encode(x)))


@pytest.mark.parametrize(
    ("hook", "layer"),
    {
        "blocks.3.hook_resid_post": 3,
        "blocks.3.hook_resid_pre": 2,
        "model.layers.3": 3,
        "blocks.0.hook_resid_pre": None,
        "blocks.3.hook_mlp_out": None,
        "blocks.3.attn.hook_z": None,
    }.items(),
)
def test_which_block_a_hook_reads(hook, layer):
    assert pretrained.hooked_layer(hook) == layer


# --- several layers, on a model ---------------------------------------------------------------------------
@pytest.fixture(scope="module")
def model():
    return make_llama(layers=3, hidden=8, initializer_range=0.3).eval()


@pytest.fixture
def two_layers(tmp_path):
    """JumpReLU at block 0 and TopK of sparsify at block 1, of different sizes of k, beside what is no autoencoder."""
    shutil.copytree(saes.FOLDER / "saelens" / "jumprelu", tmp_path / "both" / "lower")
    config = json.loads((tmp_path / "both" / "lower" / "cfg.json").read_text())
    config["metadata"]["hook_name"] = "blocks.0.hook_resid_post"
    (tmp_path / "both" / "lower" / "cfg.json").write_text(json.dumps(config))
    shutil.copytree(saes.FOLDER / "sparsify" / "topk" / "layers.1", tmp_path / "both" / "layers.1")
    (tmp_path / "both" / "config.json").write_text("{}")
    return tmp_path / "both"


def test_several_layers_are_one_dictionary(model, two_layers):
    """Latents, what the decoder gives back, and the gradient's share are those of each layer by itself."""
    both = load(find(str(two_layers), "auto", model))
    one, other = load(find(str(two_layers), [0])), load(find(str(two_layers), [1]))
    assert (both.layers, one.layers, other.layers) == ([0, 1], [0], [1]) and both.m == 2 * saes.M
    r = residuals(model, {"input_ids": torch.tensor([[0, 5, 9, 7]])}, [0, 1])[0]  # [T, 2, d]
    u, _ = both.read(both.normalize(r)[0])
    z = torch.cat([one.dense(r[:, 0]), other.dense(r[:, 1])], -1)
    torch.testing.assert_close(both.dense(u), z)
    u_hat = torch.cat([one.decode(*one.encode(r[:, 0])), other.decode(*other.encode(r[:, 1]))], -1)
    torch.testing.assert_close(both.decode(*both.encode(u)), u_hat)
    chosen = torch.tensor([30, 2, 47])
    torch.testing.assert_close(both.pre(u, chosen), both.pre(u)[:, chosen])
    added = both.contribution(z[:, chosen], chosen, torch.ones(len(r), 2))
    torch.testing.assert_close(added[:, 0], z[:, [2]] @ one.w_dec[[2]])
    torch.testing.assert_close(added[:, 1], z[:, [30, 47]] @ other.w_dec[[6, 23]])
    torch.testing.assert_close(both.on_decoder(u)[:, 30], r[:, 1] @ other.w_dec[6])


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", ["saelens/jumprelu", "saelens/gated", "saelens/topk", "sparsify/groupmax", "both"])
def test_l_safety_by_hand(model, two_layers, name, gate):
    """L_safety is 0 on the unchanged model, and on a changed one the sum of squares that its gate says."""
    sae = load(find(str(two_layers if name == "both" else saes.FOLDER / name), "auto", model))
    rows = random_rows(4, seed=3)
    latents = list(range(0, sae.m, 3))
    target = SafetyTarget.build(model, sae, latents, rows, gate)
    assert target.loss(model, range(4)).item() < 1e-8
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    loss = target.loss(changed, range(4))
    loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in changed.parameters()) or not loss
    expected = []
    for row in rows:
        pre, z, tau = {}, {}, {}
        for when, of in (("base", model), ("now", changed)):
            with torch.no_grad():
                r = residuals(of, {"input_ids": torch.tensor([row["input_ids"]])}, sae.layers)[0, -1]
                pre[when] = sae.pre(sae.read(sae.normalize(r)[0])[0])
            z[when], tau[when] = sae.gate(pre[when])
        base, active = z["base"], z["base"] > 0
        now = {
            "preact": pre["now"],
            "topk": z["now"],
            "union": torch.where(active, pre["now"], z["now"]),
            "base": torch.where(active, pre["now"], 0.0),
            "tau": torch.where(active | (pre["now"] > tau["base"] * (1 + 1e-5)), pre["now"], 0.0),
        }[gate]
        then = pre["base"] if gate == "preact" else base
        expected.append((now - then)[latents].square().sum())
    torch.testing.assert_close(loss.detach(), torch.stack(expected).mean(), rtol=1e-4, atol=1e-5)


def test_a_saved_target_is_the_one_that_was_built(model, two_layers, tmp_path):
    sae = load(find(str(two_layers), "auto", model))
    built = SafetyTarget.build(model, sae, [1, 40], random_rows(3))
    built.save(tmp_path)
    again = SafetyTarget.load(tmp_path, sae, [1, 40], "tau", "raw")
    for one, other in zip(built.prompts, again.prompts, strict=True):
        assert torch.equal(one.tau, other.tau) and torch.equal(one.raw, other.raw) and one.tau.shape == (1, 2)
    assert again.drift(model)["feature_drift"] < 1e-8 and again.used == [0, 1]


def test_only_layers_with_a_chosen_latent_are_read(model, two_layers):
    sae = load(find(str(two_layers), "auto", model))
    assert SafetyTarget.build(model, sae, [0, 5], random_rows(2)).used == [0]
    assert SafetyTarget.build(model, sae, [saes.M], random_rows(2)).used == [1]


def test_ranking_and_quality(model, two_layers):
    sae = load(find(str(two_layers), "auto", model))
    harmful, benign = random_rows(20, seed=1), random_rows(20, seed=2)
    table = rank_latents(model, sae, harmful, benign, n=10, method="contrast")
    assert len(set(table["latent"])) == 10
    z = last_latents(model, sae, harmful)[0]
    for row in table.itertuples():  # a latent's layer is its own
        fires = bool((z[:, row.latent] > 0).any())
        assert row.layer == (-1 if not fires else 0 if row.latent < saes.M else 1)
    measured = quality(model, sae, benign, harmful)
    assert measured["usage_general"] == {0: 0.5, 1: 0.5} and "l0_is_k_general" not in measured
    alone = quality(model, load(find(str(two_layers), [1])), benign, harmful)
    assert measured["fvu_per_layer_general"][1] == pytest.approx(alone["fvu_general"], rel=1e-5)
    assert alone["l0_general"] <= saes.K < measured["l0_general"]


def test_attribution_is_the_slope_along_each_latents_direction(model, two_layers):
    """Taking z_i W_dec,i out of its layer's residual moves the margin by -attribution_i to first order."""
    sae = load(find(str(two_layers), "auto", model))
    row = {"input_ids": [0, 7, 11, 30]}
    effect = attribution(model, sae, [row], [5, 6], [8])
    z = last_latents(model, sae, [row])[0][0]
    chosen = [int(z[: saes.M].argmax()), saes.M + int(z[saes.M :].argmax())]
    for latent in chosen:
        place = int(latent >= saes.M)

        def margin(step, latent=latent, place=place):
            def shift(_module, _inputs, hidden):
                moved = hidden.clone()
                moved[0, -1] += step * z[latent] * sae.w_dec[latent]
                return moved

            handle = model.model.layers[place].register_forward_hook(shift)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, -1]
            handle.remove()
            return (logits[[5, 6]].logsumexp(0) - logits[8]).item()

        # the latents are those of the unchanged residual, so only their direct effect is a slope
        assert (margin(1e-3) - margin(-1e-3)) / 2e-3 == pytest.approx(effect[latent].item(), rel=2e-2, abs=2e-3)


# --- what does not fit ------------------------------------------------------------------------------------
def edited(tmp_path, changes: dict, name: str = "saelens/standard"):
    folder = tmp_path / name.rpartition("/")[2]
    shutil.copytree(saes.FOLDER / name, folder)
    path = next(folder.rglob("cfg.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path.parent


@pytest.mark.parametrize(
    ("changes", "name", "said"),
    [
        ({"architecture": "transcoder"}, "saelens/standard", "standard, topk, jumprelu, gated"),
        ({"normalize_activations": "covariance_whitening"}, "saelens/standard", "fold_activation_whitening"),
        ({"metadata": {"hook_name": "blocks.1.hook_mlp_out"}}, "saelens/standard", "blocks.N.hook_resid_post"),
        ({"d_sae": 12}, "saelens/standard", "says 12 latents of width 8"),
        ({"transcode": True}, "sparsify/topk", "transcoder"),
        ({"activation": "softmax"}, "sparsify/topk", "topk and groupmax"),
        ({"activation_fn_str": "tanh-relu"}, "saelens/standard", "the activation tanh-relu; .* relu and topk"),
        ({"d_sae": None}, "saelens/standard", "no SAE is saved with .*NoneType"),
        ({"d_sae": "many"}, "saelens/standard", "no SAE is saved with .*'many'"),
        ({"metadata": "blocks.1"}, "saelens/standard", "no SAE is saved with .*not a mapping"),
        ({"normalize_activations": ["layer_norm"]}, "saelens/standard", "no SAE is saved with .*unhashable"),
        ({"k": "x"}, "saelens/topk", "no SAE is saved with .*'x'"),
        ({"k": None}, "saelens/topk", "no SAE is saved with .*NoneType"),
        ({"k": 0}, "saelens/topk", "k=0 active ones of 24 latents"),
        ({"k": 25}, "sparsify/topk", "k=25 active ones of 24 latents"),
        ({"k": 5}, "sparsify/groupmax", "groupmax with k=5, and 24 latents"),
        ({"num_latents": "x"}, "sparsify/topk", "no SAE is saved with .*'x'"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, changes, name, said):
    """Before the weights are read, hence before a run has a folder."""
    with pytest.raises(UserError, match=f"model.sae.pretrained.*{said}"):
        find(str(edited(tmp_path, changes, name)))


@pytest.mark.parametrize("activation", ["relu", "topk"])
def test_an_older_configuration_names_its_activation(tmp_path, activation):
    """SAELens up to 5: a TopK autoencoder has the architecture `standard`."""
    name = {"relu": "standard", "topk": "topk_plain"}[activation]
    kwargs = {"activation_fn_str": activation, "activation_fn_kwargs": {"k": 4} if activation == "topk" else {}}
    folder = edited(tmp_path, kwargs | {"architecture": "standard"}, f"saelens/{name}")
    z = load(find(str(folder))).dense(EXPECTED["x"])
    torch.testing.assert_close(z, EXPECTED[f"saelens.{name}.z"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "file", "changes", "said"),
    [
        ("saelens/standard", "sae_weights", {"b_enc": torch.zeros(5)}, r"weights are b_enc \[5\]"),
        ("saelens/standard", "sae_weights", {"b_dec": torch.zeros(1, 8)}, r"weights are b_dec \[1, 8\]"),
        ("saelens/standard", "sae_weights", {"b_enc": None}, "lacks the weights b_enc"),
        ("saelens/jumprelu", "sae_weights", {"threshold": torch.zeros(1)}, r"weights are threshold \[1\]"),
        ("saelens/gated", "sae_weights", {"r_mag": None, "b_mag": None}, "lacks the weights b_mag, r_mag"),
        ("sparsify/topk", "sae", {"encoder.bias": torch.zeros(3)}, r"weights are encoder.bias \[3\]"),
        ("sparsify/topk", "sae", {"W_dec": None}, "lacks the weights W_dec"),
    ],
)
def test_weights_other_than_the_configuration_says_are_refused(tmp_path, name, file, changes, said):
    path = edited(tmp_path, {}, name) / f"{file}.safetensors"
    weights = {key: value for key, value in (load_file(path) | changes).items() if value is not None}
    save_file(weights, path)
    with pytest.raises(UserError, match=f"model.sae.pretrained.*{said}.*saved? "):
        find(str(path.parent))


@pytest.mark.parametrize("name", ["saelens/topk", "sparsify/topk"])
def test_a_damaged_file_of_weights_is_refused(tmp_path, name):
    path = next(edited(tmp_path, {}, name).glob("*.safetensors"))
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"x" * 100, b""):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="cannot be read .*; save it again"):
            find(str(path.parent))
    path.write_bytes(whole)
    weights = load_file(path)
    save_file(weights | {"b_dec": weights["b_dec"].fill_(float("nan"))}, path)
    with pytest.raises(UserError, match=r"weights that are not finite \(b_in, b_dec\)"):
        load(find(str(path.parent)))


@pytest.mark.parametrize(
    "text", ["[", '{"scaling_factor": "x"}', '{"scaling_factor": -1}', '{"scaling_factor": [2]}', "3"]
)
def test_a_checkpoints_scaling_factor_is_a_number(tmp_path, text):
    folder = edited(tmp_path, {"normalize_activations": "expected_average_only_in"})
    (folder / "activation_scaler.json").write_text(text)
    with pytest.raises(UserError, match="no SAE is saved with"):
        find(str(folder))


def test_an_autoencoder_of_another_model_is_refused(model, tmp_path):
    wide = make_llama(layers=3, hidden=16)
    with pytest.raises(
        UserError, match=r"encoder \[24, 8\], and this model's residuals are \[\.\.\., 16\] \(it names small\)"
    ):
        find(str(saes.FOLDER / "saelens" / "topk"), "auto", wide)
    deep = edited(tmp_path, {"metadata": {"hook_name": "blocks.7.hook_resid_post"}})
    with pytest.raises(UserError, match="reads block 7, and this model has blocks 0 to 2"):
        find(str(deep), "auto", model)
    with pytest.raises(UserError, match="has no autoencoder of block 2; it has blocks 1"):
        find(str(saes.FOLDER / "saelens" / "topk"), [2], model)
    with pytest.raises(UserError, match="two autoencoders of block 1"):
        find([str(saes.FOLDER / "saelens" / "topk"), str(saes.FOLDER / "saelens" / "gated")], "auto", model)


def test_what_is_nothing_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "_releases", dict)
    with pytest.raises(
        UserError, match=r"no folder, no hub id and no <release>/<id> of sae-lens \(which is not installed"
    ):
        find(str(tmp_path / "gone"))
    with pytest.raises(UserError, match="could not be downloaded"):
        find("some-body/no-such-sae/layers.1")
    with pytest.raises(UserError, match="holds no cfg.json"):
        find(str(tmp_path))
    (tmp_path / "cfg.json").write_text('{"d_in": 8}')
    (tmp_path / "sae.pt").write_bytes(b"")
    with pytest.raises(UserError, match="pickles are not read"):
        find(str(tmp_path))
    for wrong in ("[]", "3", "[1]", "0", "false", "{}", '""', '[""]'):
        with pytest.raises(UserError, match="model.sae.pretrained="):
            SAEConfig(pretrained=json.loads(wrong))


@pytest.mark.parametrize(
    "settings",
    [{key: value} for key in ("fallback", "center") for value in ("no", 1, None)]
    + [{"layers": value} for value in ("middle", 1, None, [], [-1], ["1"], [1.5], [True])]
    + [{key: value} for key in ("router", "corpus", "corpus_text") for value in (3, ["hard"])]
    + [{"schedule": "routesae", "warmup": 0.5, "decay": 0.5}]
    + [{"clip": value} for value in (True, "x", -1, float("nan"))]
    + [{key: value} for key in ("m", "k", "tokens", "lr") for value in ("many", True, float("inf"))],
)
def test_settings_of_another_type_are_refused(settings):
    with pytest.raises(UserError, match=f"model.sae.{[*settings][-1]}=.*give "):
        SAEConfig(**settings)


@pytest.mark.parametrize("given", [None, 3, "auto"])
def test_an_sae_without_fields_is_refused(given):
    with pytest.raises(UserError, match=f"method.activation.sae={given}: give fields"):
        sae_config(Activation(sae=given))


def test_a_seed_of_its_own_is_refused():
    """Before: it was overwritten by 0, and the run had another id."""
    with pytest.raises(UserError, match="model.sae.seed=3: .* leave it out"):
        sae_config(Activation(sae={"seed": 3}))
    assert sae_config(Activation(sae={"seed": 0})).seed == 0


def test_layers_that_are_no_numbers_have_an_id_too():
    """Ids count layers from 1, and are asked for before anything is checked."""
    assert run_id(compose(["method=cwac", "model.sae.layers=[x]"])) != run_id(compose(["method=cwac"]))


def test_a_whole_number_with_a_point_is_one():
    given, plain = SAEConfig(m=256.0, k=8.0, tokens=2048.0, batch=256.0), SAEConfig(m=256, k=8, tokens=2048, batch=256)
    assert given.key() == plain.key() and type(given.m) is type(given.k) is int and range(given.tokens // given.batch)


def test_a_release_is_what_sae_lens_loads(tmp_path, monkeypatch):
    """`<release>/<id>` goes to sae-lens, whose SAE is saved once and read from its folder."""
    sae_lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed")
    asked = []

    def from_pretrained(release, entry, device):
        asked.append((release, entry))
        return sae_lens.SAE.load_from_disk(saes.FOLDER / "saelens" / "jumprelu")

    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", from_pretrained)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    release = "gemma-scope-2b-pt-res-canonical"
    for _ in range(2):
        sae = load(find(f"{release}/layer_20/width_16k/canonical"))
        torch.testing.assert_close(sae.dense(EXPECTED["x"]), EXPECTED["saelens.jumprelu.z"], rtol=0, atol=1e-5)
    assert asked == [(release, "layer_20/width_16k/canonical")]
    with pytest.raises(UserError, match="has no layer_99"):
        find(f"{release}/layer_99")


# --- identity ---------------------------------------------------------------------------------------------
def test_a_folder_is_known_by_its_content(tmp_path):
    def id_of(spec):
        return run_id(compose(["method=cwac", f"method.activation.sae.pretrained={spec}"]))

    plain = run_id(compose(["method=cwac"]))
    assert id_of("null") == plain
    here, there = edited(tmp_path / "a", {}), edited(tmp_path / "b", {})
    assert id_of(here) == id_of(there) != plain
    assert id_of(f"[{here}]") == id_of(f"[{there}]")
    weights = load_file(there / "sae_weights.safetensors")
    save_file(weights | {"b_enc": weights["b_enc"] + 1}, there / "sae_weights.safetensors")
    assert id_of(here) != id_of(there)
    assert len({plain, id_of("me/one"), id_of("me/two"), id_of(here)}) == 4
    assert run_id(compose(["method=sft", f"model.sae.pretrained={here}"])) == run_id(compose(["method=sft"]))


# --- ours in SAELens' format ------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def ours():
    """Our own SAE of a random model, which reads any of two layers, and residuals [N, 2, d] of that model."""
    model = make_llama(layers=3, hidden=32).eval()
    rows = random_rows(60)
    config = SAEConfig(layers=[1, 2], tokens=2048, batch=256, cached_tokens=2048, m=96, k=6, router="uniform")
    sae = fit_sae(model, rows, None, config)[0]
    with torch.no_grad():
        r = torch.cat(
            [residuals(model, {"input_ids": torch.tensor([row["input_ids"]])}, [1, 2])[0, 1:] for row in rows]
        )
    return sae, r


def fvu(x, x_hat):
    return ((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()).item()


def test_ours_is_read_back(ours, tmp_path):
    """By ourselves: the middle layer alone is what `uniform` reads; latents differ by LayerNorm's eps alone."""
    sae, r = ours
    assert [p.name for p in save_saelens(sae, tmp_path, "random")] == ["layer_2"]
    again = load(find(str(tmp_path)))
    u = sae.normalize(r)[0][:, 1]
    x = again.normalize(r[:, [1]])[0]
    z = again.dense(again.read(x)[0])
    assert fvu(u, sae.decode(*sae.encode(u))) == pytest.approx(
        fvu(x[:, 0], again.decode(*again.encode(again.read(x)[0]))), abs=1e-4
    )
    torch.testing.assert_close(z, sae.dense(u), rtol=1e-3, atol=1e-3)
    sae = copy.copy(sae)
    sae.router_mode = "soft"
    with pytest.raises(UserError, match="router=soft"):
        save_saelens(sae, tmp_path)


def test_cwac_trains_on_an_sae_from_a_folder(tmp_path):
    """From the command's configuration to the rows of its report; nothing is fitted, and the quality is measured."""
    sae = RoutedSAE(128, 256, 8, [1, 2], "hard")  # `hard` may read both of its layers: two folders
    sae.initialise_router_(torch.Generator().manual_seed(0))
    sae.initialise_(
        torch.randn(512, 128, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(0)
    )
    assert len(save_saelens(sae, tmp_path / "saes", "tiny")) == 2
    ranking = "method.activation.ranking=contrast"
    given = ["method=activation_only", *FINE_TUNE, ranking, f"paths.artifacts={tmp_path / 'artifacts'}"]
    moved = {}
    for layers, strength in (("[1]", 1), ("auto", 1), ("auto", 0)):
        cfg = compose(
            [*given, f"method.activation.sae.pretrained={tmp_path / 'saes'}", f"model.sae.layers={layers}"]
            + [f"method.activation.lam={100 * strength}"]
        )
        model, method, context = fine_tune(cfg, tmp_path)
        rows = {row["metric"]: row["value"] for row in method.report(model) if row["set"] in ("train", "anchors")}
        assert rows["sae_slots"] == (1 if layers == "[1]" else 2) and rows["sae_fvu"] > 0
        assert method.extra_data()["harmful_prompts"] == len(context.pools.step) + len(context.pools.sae)
        moved[layers, strength] = rows["feature_drift"]
    assert moved["auto", 1] < 0.9 * moved["auto", 0]  # the penalty is what holds them
    assert not (tmp_path / "artifacts" / "sae").exists()
    assert len([*(tmp_path / "artifacts" / "sae-quality").glob("*/quality.json")]) == 2
    cfg = compose([*given, f"model.sae.pretrained={saes.FOLDER / 'saelens' / 'topk'}"])
    with pytest.raises(UserError, match=r"encoder \[24, 8\], and this model's residuals are \[\.\.\., 128\]"):
        fine_tune(cfg, tmp_path)


def test_the_command_exports_what_a_run_has_fitted(ours, tmp_path, capsys):
    def build(folder):
        ours[0].save(folder)

    there = load_or_build(tmp_path / "artifacts", "sae", {"model": {"kind": "tiny"}}, build)
    command = ["export-sae", "--artifacts", str(tmp_path / "artifacts"), "--out", str(tmp_path / "out")]
    assert artifacts_command.main(command) == 0
    (written,) = capsys.readouterr().out.splitlines()[1:]
    assert written == str(tmp_path / "out" / there.name / "layer_2")
    assert load(find(written)).m == ours[0].m and find(written)[0].of == "tiny"
    assert artifacts_command.main([*command, "--sae", "0123456789ab"]) == 1
    assert f"holds no SAE 0123456789ab; those there are {there.name}" in capsys.readouterr().err


def test_sae_lens_reads_ours(ours, tmp_path):
    sae_lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed")
    sae, r = ours
    (folder,) = save_saelens(sae, tmp_path, "random")
    theirs, raw = sae_lens.SAE.load_from_disk(folder), r[:, 1]
    with torch.no_grad():
        z = theirs.encode(raw)
        x_hat = theirs.decode(z)
    u = sae.normalize(r)[0][:, 1]
    mean, std = raw.mean(-1, keepdim=True), raw.std(-1, keepdim=True)
    assert fvu(u, (x_hat - mean) / std) == pytest.approx(fvu(u, sae.decode(*sae.encode(u))), abs=1e-4)
    torch.testing.assert_close(z, sae.dense(u), rtol=1e-3, atol=1e-3)
    assert (theirs.cfg.k, theirs.cfg.metadata.hook_name) == (6, "blocks.2.hook_resid_post")
    assert theirs.cfg.architecture() == "topk"
