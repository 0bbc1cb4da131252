"""Adapters in somebody's own trainer: which are taken, what a merged one holds, the model as it was handed over."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM

from cwac.constraints.reference import Reference
from cwac.constraints.settings import Weight
from cwac.constraints.subspace import Constraint, fit_subspace
from cwac.constraints.weight import constrained, freeze_others_
from cwac.core import config
from cwac.core.errors import UserError
from cwac.data.pools import load_pools
from cwac.evaluation.drift import merged_weight, weight_leak
from cwac.evaluation.evaluate import Evaluator
from cwac.methods.base import Method
from cwac.methods.cwac import CWAC
from cwac.models.adapters import holds_update, merged, require_plain_lora
from cwac.models.layers import linears, trains
from cwac.models.loading import Loaded, load, require_source, weights_hash
from cwac.training import run
from cwac.training.library import defend, load_method
from tests.conftest import FINE_TUNE, make_llama, random_rows
from tests.test_constraints import step_adamw
from tests.test_library import SAE, own_trainer

ALL = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
LORA = {
    "plain": LoraConfig(r=4, lora_alpha=8, **ALL),
    "rslora": LoraConfig(r=4, lora_alpha=8, use_rslora=True, **ALL),
    "patterns": LoraConfig(r=4, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 3}, lora_dropout=0.1, **ALL),
    "some": LoraConfig(r=4, target_modules=["down_proj", "q_proj"], task_type="CAUSAL_LM"),
}
OTHERS = {
    "DoRA": LoraConfig(r=4, use_dora=True, **ALL),
    "Alora": LoraConfig(r=4, alora_invocation_tokens=[1, 2], **ALL),
    "adalora": AdaLoraConfig(init_r=4, target_r=2, total_step=100, target_modules=["q_proj"]),
    "loha": LoHaConfig(r=4, target_modules=["q_proj"]),
    "lokr": LoKrConfig(r=4, target_modules=["q_proj"]),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "oft": OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj"]),
    "vera": VeraConfig(r=4, target_modules=["q_proj"]),
    "virtual tokens": PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "modules_to_save": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["down_proj"]),
    "lora_bias": LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True),
}


def biased():
    return make_llama(attention_bias=True)


# --- which adapters ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LORA)
def test_a_constrained_lora_leaks_nothing_once_it_is_merged(name):
    anchors, task = random_rows(3, seed=1), random_rows(40, seed=2)
    reference = make_llama()
    model = get_peft_model(copy.deepcopy(reference), LORA[name])
    require_plain_lora(model, "weight_only_closed")
    held, freed = constrained(model, Weight(modules="all", freeze_others=True))
    constraint = Constraint(held, fit_subspace(model, anchors, "all", energy=1.0))
    constraint.project_weights_()
    freeze_others_(model, held, constraint, freed)
    step_adamw(model, task, constraint, lr=1e-2, decay=0.0)
    leaks = weight_leak(merged(model), reference, anchors)
    changed = {n for n, v in leaks.items() if v["change"] > 1e-4}
    assert changed == set(held) and max(v["leak"] for v in leaks.values()) <= 2e-6


@pytest.mark.parametrize("name", OTHERS)
def test_other_adapters_are_refused_by_name(name):
    model = get_peft_model(biased(), OTHERS[name])
    with pytest.raises(UserError, match=f"(?i){name}.*use a plain LoraConfig") as caught:
        require_plain_lora(model, "cwac")
    assert "\n" not in str(caught.value) and "method=cwac" in str(caught.value)


def test_without_an_adapter_there_is_nothing_to_refuse():
    require_plain_lora(make_llama(), "cwac")
    assert not holds_update(make_llama()) and merged(model := make_llama()) is model


@pytest.mark.parametrize("key", ["use_dora: true", "use_rslora: true", "modules_to_save: [lm_head]", "bias: all"])
def test_train_py_refuses_what_it_would_not_apply(key):
    from cwac.core.errors import UsageError
    from cwac.core.validation import validate

    cfg = config.compose([f"model.lora={{r: 4, alpha: 8, target_modules: all-linear, {key}}}"])
    with pytest.raises(UsageError, match=f"model.lora.{key.split(':')[0]} is not read"):
        validate(cfg)


# --- the model as it was handed over ----------------------------------------------------------------------


def trained_adapter(model, **more):
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=4, **ALL, **more))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted


@pytest.mark.parametrize("start", [True, "pissa"])
def test_an_adapter_that_holds_an_update_is_seen(start):
    model = trained_adapter(make_llama(), init_lora_weights=start)
    assert holds_update(model)
    with pytest.raises(UserError, match=r"holds one already \(.*merge_and_unload"):
        require_plain_lora(model, "cwac")
    fresh = get_peft_model(merged(model), LORA["plain"])
    require_plain_lora(fresh, "cwac")
    assert not holds_update(fresh)


def test_an_adapter_that_is_merged_into_its_base_is_seen():
    model = trained_adapter(make_llama())
    model.merge_adapter()
    assert holds_update(model)


def test_an_adapter_that_is_not_active_counts_nowhere():
    model = trained_adapter(make_llama())
    model.add_adapter("fresh", LORA["plain"])
    model.set_adapter("fresh")
    assert not holds_update(model)
    first = next(iter(linears(model, ["q_proj"]).values()))
    assert torch.equal(merged_weight(first), first.base_layer.weight.double())
    before = first.lora_A["default"].weight.clone()
    constraint = Constraint(linears(model, "all"), fit_subspace(model, random_rows(3), "all", energy=0.9))
    assert {layer for _, layer, *_ in constraint.entries} == {
        m.lora_A["fresh"] for m in linears(model, "all").values()
    }
    constraint.project_weights_()
    assert torch.equal(first.lora_A["default"].weight, before)


def test_the_reference_is_the_model_as_it_was_handed_over():
    batch = {"input_ids": torch.arange(3, 33).view(2, 15), "attention_mask": torch.ones(2, 15, dtype=torch.long)}
    for model in (make_llama(), trained_adapter(make_llama()), get_peft_model(make_llama(), LORA["plain"])):
        model.eval()
        reference, layers = Reference(model), [0, 2]
        with torch.no_grad():
            logits = model(**batch).logits
            states = reference.hidden_states(batch, layers)
            assert torch.equal(reference.logits(batch), logits)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.01)
            assert torch.equal(reference.logits(batch), logits)
            assert torch.equal(reference.hidden_states(batch, layers), states)
            assert not torch.equal(model(**batch).logits, logits)


@pytest.mark.parametrize("name", ["weight_only", "cwac", "asft", "safelora", "salora", "vaccine"])
def test_defend_refuses_a_trained_adapter_and_leaves_it_as_it_is(name, tmp_path, artifacts):
    cfg = config.compose(["method=sft", f"paths.artifacts={artifacts}", *FINE_TUNE])
    base = load(cfg.model, artifacts).base
    for adapt, said in ((trained_adapter, "holds one already"), (dora, "DoRA")):
        trainer = own_trainer(cfg, tmp_path, artifacts)
        trainer.model = adapt(trainer.model)
        before = weights_hash(trainer.model)
        method = load_method(name, "tiny", SAE)
        with pytest.raises(UserError, match=said):
            defend(trainer, method, load_pools(cfg.pools, None, 0), artifacts=tmp_path, max_length=64, base=base)
        assert weights_hash(trainer.model) == before


def dora(model):
    return get_peft_model(model, OTHERS["DoRA"])


def test_virtual_tokens_are_refused_by_every_method_and_not_by_plain_training(tmp_path, artifacts):
    cfg = config.compose(["method=sft", f"paths.artifacts={artifacts}", *FINE_TUNE])
    pools = load_pools(cfg.pools, None, 0)
    for name in ("lisa", "replay", "activation_only", "ldifs", "sft"):
        trainer = own_trainer(cfg, tmp_path, artifacts)
        trainer.model = get_peft_model(trainer.model, OTHERS["virtual tokens"])
        if name == "sft":
            defend(trainer, load_method(name, "tiny"), pools, artifacts=tmp_path, max_length=64)
            continue
        with pytest.raises(UserError, match=f"method={name} .*PromptTuningConfig puts virtual tokens"):
            defend(trainer, load_method(name, "tiny", SAE), pools, artifacts=tmp_path, max_length=64)


def test_scaled_layers_scale_what_an_adapter_adds():
    from cwac.methods.safety_layers import scaled

    model = trained_adapter(make_llama())
    before = {name: merged_weight(m) for name, m in linears(model, "all").items()}
    with scaled(model, 1, 2, 1.5):
        for name, module in linears(model, "all").items():
            factor = 1.0 if name.startswith("0.") else 1.5
            assert torch.allclose(merged_weight(module), factor * before[name], atol=1e-6)
    assert all(torch.equal(merged_weight(m), before[name]) for name, m in linears(model, "all").items())


def test_what_a_trained_adapter_says_is_part_of_what_artifacts_are_built_from(tmp_path, artifacts, monkeypatch):
    cfg = config.compose(["method=sft", f"paths.artifacts={artifacts}", *FINE_TUNE])
    keys = []

    class Keys(Method):
        def setup(self, model, context):
            keys.append(context.loaded.key["weights"])

    for seed, adapt in ((0, None), (1, None), (0, trained_adapter)):
        trainer = own_trainer(cfg, tmp_path, artifacts)
        torch.manual_seed(seed)
        trainer.model = get_peft_model(trainer.model, LORA["plain"]) if adapt is None else adapt(trainer.model)
        defend(trainer, Keys("keys"), load_pools(cfg.pools, None, 0), artifacts=tmp_path, max_length=64)
    assert keys[0] == keys[1] != keys[2]  # a fresh adapter's seed changes nothing that the model says


def test_an_sae_of_the_base_is_not_one_of_the_adapted_model():
    from cwac.constraints.sae.autoencoder import middle_block_hash

    base, fresh = middle_block_hash(make_llama()), middle_block_hash(get_peft_model(make_llama(), LORA["plain"]))
    assert base == fresh != middle_block_hash(trained_adapter(make_llama()))


def test_a_model_that_is_not_the_one_in_its_folder_is_no_source(tmp_path):
    make_llama().save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    loaded = Loaded(model, None, {"kind": "library"}, str(tmp_path / "model"))
    require_source(loaded, "safelora")
    require_source(Loaded(get_peft_model(model, LORA["plain"]), None, {"kind": "library"}, loaded.source), "safelora")
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    with pytest.raises(UserError, match="method=safelora reads .* differs from what is saved there"):
        require_source(loaded, "safelora")
    with pytest.raises(UserError, match="cannot be loaded.*save it with save_pretrained"):
        require_source(Loaded(model, None, {"kind": "library"}, ""), "vaccine")
    require_source(Loaded(model, None, {"kind": "tiny"}, ""), "vaccine")  # train.py has loaded it itself


# --- a certificate of something ---------------------------------------------------------------------------

Q_AND_V = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@pytest.mark.parametrize("weight", [Weight(), Weight(freeze_others=True), Weight(modules=["o_proj", "up_proj"])])
def test_a_constraint_on_matrices_that_do_not_train_is_refused(weight):
    model = get_peft_model(make_llama(), Q_AND_V)
    with pytest.raises(UserError, match="constrains no matrix that trains.*what trains is q_proj, v_proj"):
        context = SimpleNamespace(loaded=SimpleNamespace(model=model), pools=None)
        CWAC("weight_only", weight=weight).training_data([], context, None)
    frozen = make_llama().requires_grad_(False)
    with pytest.raises(UserError, match="no matrix of the model's blocks trains"):
        constrained(frozen, weight)


def test_it_is_refused_in_train_py_and_in_defend(tmp_path, artifacts, random_model, capfd):
    from tests.conftest import SMALL, call

    given = ["model.kind=folder", f"+model.path={random_model}", f"paths.runs={tmp_path}", *SMALL]
    lora = "model.lora={r: 4, alpha: 8, target_modules: [q_proj, v_proj]}"
    assert call(*given, f"paths.artifacts={tmp_path / 'a'}", "method=weight_only", lora) != 0
    assert "method.weight.modules=[down_proj] constrains no matrix that trains" in capfd.readouterr().err
    assert not list(tmp_path.glob("*/status.json"))
    cfg = config.compose(["method=sft", f"paths.artifacts={artifacts}", *FINE_TUNE])
    trainer = own_trainer(cfg, tmp_path, artifacts)
    trainer.model = get_peft_model(trainer.model, Q_AND_V)
    with pytest.raises(UserError, match="constrains no matrix that trains"):
        defend(trainer, load_method("weight_only", "tiny"), load_pools(cfg.pools, None, 0), artifacts=artifacts)


def test_a_matrix_that_does_not_train_is_said_and_not_constrained(caplog):
    model = get_peft_model(make_llama(), Q_AND_V)
    with caplog.at_level(logging.WARNING):
        held, _ = constrained(model, Weight(modules=["q_proj", "down_proj"]))
    assert {name.split(".")[-1] for name in held} == {"q_proj"} and all(map(trains, held.values()))
    assert "3 of 6 matrices do not train and are not constrained (down_proj)" in caplog.text


def test_a_closed_constraint_names_the_adapters_it_freezes(caplog):
    model = get_peft_model(make_llama(), LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
    held, freed = constrained(model, Weight(modules="all"))
    with caplog.at_level(logging.WARNING):
        freeze_others_(model, held, Constraint(held, fit_subspace(model, random_rows(3), "all", energy=0.9)), freed)
    assert "2 tensors of the adapter" in caplog.text and "lm_head" in caplog.text
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lm_head" in n)


def guarded(change, tmp_path, closed):
    """The guard's finding for a llama whose parameters `change` has edited, under a constraint on all matrices."""
    reference = make_llama()
    model, rows = copy.deepcopy(reference), [{**row, "prompt": 4} for row in random_rows(3)]
    bases = fit_subspace(reference, rows, "all", energy=0.9)
    method = CWAC("closed", weight=Weight(modules="all", freeze_others=closed))
    method._constraint = Constraint(linears(model, "all"), bases)
    with torch.no_grad():
        if change(model):
            method._constraint.project_weights_()
    found = object.__new__(Evaluator)
    found.model, found.method = model, method
    found.run = SimpleNamespace(dir=tmp_path, add_rows=lambda rows: None)
    return found.drift(reference, rows, rows, 1, 1.0)


def test_the_guard_looks_at_what_was_trained(tmp_path, caplog):
    def matrices(model):
        for module in linears(model, "all").values():
            module.weight.add_(torch.randn_like(module.weight), alpha=0.1)
        return True

    def beside(model):
        model.model.norm.weight.add_(0.1)
        return matrices(model)

    assert guarded(matrices, tmp_path, closed=True) is True
    assert guarded(beside, tmp_path, closed=False) is True  # which claims the matrices alone
    with caplog.at_level(logging.WARNING):
        assert guarded(beside, tmp_path, closed=True) is False
        assert "claims to be closed, but model.norm.weight changed" in caplog.text
        assert guarded(lambda model: None, tmp_path, closed=True) is None
        assert "nothing to certify" in caplog.text


# --- merging ----------------------------------------------------------------------------------------------

IDS = torch.arange(3, 33).view(2, 15)


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens", "q_proj"]])
def test_an_adapter_on_one_of_two_tied_matrices_changes_that_one_alone(targets, tmp_path):
    model = make_llama(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    said = logits(adapted)
    plain = merged(adapted)
    assert torch.allclose(logits(plain), said, atol=1e-5)
    plain.save_pretrained(tmp_path)
    kept = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(kept), logits(plain))


def test_tied_matrices_without_an_adapter_stay_tied():
    adapted = get_peft_model(make_llama(tie_word_embeddings=True), LORA["plain"])
    plain = merged(adapted)
    assert plain.config.tie_word_embeddings and plain.lm_head.weight is plain.model.embed_tokens.weight


def test_an_update_does_not_round_away_in_a_base_of_fewer_bits():
    torch.manual_seed(0)
    adapted = get_peft_model(make_llama().bfloat16(), LoraConfig(r=4, init_lora_weights=False, **ALL))
    for _, module in adapted.named_modules():
        if hasattr(module, "lora_B") and "default" in module.lora_B:
            module.lora_A["default"].float()
            module.lora_B["default"].float().weight.data.mul_(1e-4)  # a usual step, far below bf16's resolution
    expected = {name: merged_weight(module) for name, module in linears(adapted, "all").items()}
    plain = merged(adapted)
    for name, module in linears(plain, "all").items():
        assert torch.allclose(module.weight.double(), expected[name], atol=1e-8)


@pytest.mark.parametrize("tied", [False, True])
def test_the_hash_of_the_weights_does_not_depend_on_what_is_kept(tied, tmp_path):
    hashes = []
    for keep in (False, True):
        torch.manual_seed(0)
        model = make_llama(tie_word_embeddings=tied)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False))
        cell = SimpleNamespace(
            model=model,
            cfg=OmegaConf.create({"keep_weights": keep}),
            context=SimpleNamespace(tokenizer=SimpleNamespace(save_pretrained=lambda folder: None)),
            cost={"step": 1, "epoch": 1.0},
            guard=None,
            run=SimpleNamespace(dir=tmp_path, finish=lambda **fields: hashes.append(fields["weights_sha256"])),
        )
        run.record(cell)
    assert hashes[0] == hashes[1]
    assert (tmp_path / "model" / "model.safetensors").is_file()
