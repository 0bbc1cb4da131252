"""A mistyped key, option or value is refused with the nearest names; nothing silently does nothing."""

import dataclasses
import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from analysis.collect import expected_cells
from cwac.constraints.sae.fit import SAEConfig
from cwac.core import config, keys
from cwac.core.config import command, compose, grid, instantiate
from cwac.core.errors import UsageError, UserError
from cwac.core.keys import OPTIONAL, check_keys, known, options, unread
from cwac.core.paths import CONF
from cwac.core.validation import validate
from cwac.models.loading import load
from cwac.training import library
from cwac.training.library import load_method
from tests.conftest import call
from tests.helpers.options import PRESETS

LORA = "model.lora={{r: 2, alpha: 4, target_modules: all-linear, {}}}"
REFUSED = {
    "an appended root key": (["+harmfull_ratio=0.1"], "harmfull_ratio=0.1 is read by nothing", "harmful_ratio?"),
    "an appended seed": (["+seeed=3"], "seeed=3 is read by nothing", "seed?"),
    "a group's key": (["+eval.n_harmfull=3"], "eval.n_harmfull=3 is read by nothing", "eval.n_harmful?"),
    "a nested key": (["+model.sae.token=3"], "model.sae.token=3 is read by nothing", "model.sae.tokens?"),
    "a pool": (["+pools.sizes.poisson=3"], "pools.sizes.poisson=3 is read by nothing", "pools.sizes.poison?"),
    "a source": (["pools=real", "+pools.shares.advbnch={poison: 1}"], "pools.shares.advbnch.poison", "by nothing"),
    "a source to take": (["pools=real", "+pools.take={advbnch: 9}"], "pools.take.advbnch=9", "by nothing"),
    "a key of nothing": (["+pools.foo=3"], "pools.foo=3 is read by nothing", "conf/README.md"),
    "a path without its kind": (["+model.path=x"], "model.path=x is read with model.kind=folder alone", "tiny"),
    "a base that is not asked": (["+model.base=x"], "model.base=x is read with", "is of kind tiny"),
    "forced, perhaps": (["force=no"], "force=no is neither true nor false", ""),
    "kept, perhaps": (["keep_weights=maybe"], "keep_weights=maybe is neither true nor false", ""),
    "measured, perhaps": (["eval.drift=off"], "eval.drift=off is neither true nor false", ""),
    "a number for a truth value": (["debug=1"], "debug=1 is neither true nor false", ""),
    "a judge as a value": (["eval.judge=gpt4"], "choose one of the options with eval/judge=", "keyword"),
    "a value for a group": (["pools.sizes=3"], "pools.sizes is a group of keys", "poison"),
    "a metric as an objective": (["objective=HS"], "objective is a group of keys", ""),
    "another name of dropout": ([LORA.format("lora_dropout: 0.5")], "model.lora.lora_dropout is not read", "dropout?"),
    "another scaling": ([LORA.format("use_rslora: true")], "model.lora.use_rslora is not read", ""),
    "modules beside": ([LORA.format("modules_to_save: [lm_head]")], "model.lora.modules_to_save is not read", ""),
    "a rank for each": ([LORA.format("rank_pattern: {q_proj: 2}")], "model.lora.rank_pattern is not read", ""),
    "a bias": ([LORA.format("bias: all")], "model.lora.bias is not read", ""),
    "another adapter": ([LORA.format("use_dora: true")], "model.lora.use_dora is not read", ""),
    "no share": ([LORA.format("dropout: 1.5")], "model.lora.dropout=1.5 is not valid", ""),
    "a module as a word": (["model.lora={r: 2, alpha: 4, target_modules: q_proj}"], "target_modules=q_proj", "list"),
    "toy pools' key": (["pools=real", "+pools.poison_categories=[theft]"], "pools.poison_categories is of the", ""),
    "toy pools' sizes": (["pools=real", "+pools.sizes={poison: 3}"], "pools.sizes is of the embedded world's", ""),
    "a label's alias": (["+task.aliases={positiv: {strict: [good]}}"], "task.aliases.positiv=", "other names"),
    "an alias's kind": (["+task.aliases={positive: {stict: [good]}}"], "task.aliases.positive=", "other names"),
    "a choice": (["mix_mode=additiv"], "mix_mode=additiv is unknown", "did you mean additive?"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_key_that_nothing_reads_is_refused(case):
    overrides, says, ends = REFUSED[case]
    with pytest.raises(UsageError) as error:
        validate(compose(overrides))
    assert says in str(error.value) and ends in str(error.value) and "\n" not in str(error.value)


MISTYPED = {
    "harmfull_ratio=0.1": "there is no such key; did you mean harmful_ratio?",
    "metod=sft": "did you mean method?",
    "judge=keyword": "did you mean eval.judge or eval/judge?",
    "train.learning_rat=1": "did you mean train.learning_rate?",
    "train.bf16=true": "append it with +train.bf16=<value>",
    "model.path=x": "append it with +model.path=<value>",
    "method=cwacc": "did you mean method=cwac?",
    "model=lama2": "did you mean model=llama2?",
    "method=weight_onli": "error: Could not find 'method/weight_onli'; did you mean method=weight_only",
    "model=tinny": "error: Could not find 'model/tinny'; did you mean model=tiny? model has gemma2, ",
    "experiment=tune_circuit_braker": "did you mean experiment=tune_circuit_breaker?",
    "eval/judge=gpt4": "has beaver_dam, harmbench_cls, keyword, llama_guard, semantic, semantic2, strongreject",
    "+train.learning_rat=1": "did you mean train.learning_rate?",
    "+train.bf16=yes_please": "train.bf16=yes_please is neither true nor false",
    "+method.lamda=1": "did you mean lam?",
    "+seed=1": "leave out the +: seed=<value>",
    "method.operator=offical": "projector_k; did you mean official?",
    "lr=1e-5": "there is no such key; did you mean train.learning_rate?",
    "train.lr=1e-5": "did you mean train.learning_rate?",
    "+lr=1e-5": "read by nothing (conf/README.md has the keys); did you mean train.learning_rate?",
    "learning_rate=1e-5": "did you mean train.learning_rate?",
    "p=0.1": "did you mean harmful_ratio?",
    "ratio=0.1": "did you mean harmful_ratio?",
    "methods=sft": "did you mean method?",
    "defense=sft": "did you mean method?",
    "epochs=3": "did you mean train.num_train_epochs?",
    "batch_size=4": "did you mean train.per_device_train_batch_size?",
    "model_name=tiny": "did you mean model?",
    "output_dir=x": "did you mean paths.runs?",
    "dataset=sst2": "did you mean task?",
    "seeds=0,1": "seeds=0,1 gives several values, which a sweep takes: add -m; a value that is a list is [a,b] (and",
    "--lr=1e-5": "--lr: settings are written key=value, without dashes; write train.learning_rate=1e-5",
    "--p=0.1": "without dashes; write harmful_ratio=0.1",
    "--experiment=demo": "without dashes; write experiment=demo",
    "--epochs": "without dashes; write train.num_train_epochs=<value>",
    "--method=sft": "without dashes; write method=sft",
    "--learning-rate=1": "without dashes; write train.learning_rate=1",
    "--nothing-like-it": "without dashes; python train.py --help lists the keys",
    "--method.weight.every=4": "without dashes; write method.weight.project_every=4",
    "seed": "seed has no value: settings are written key=value, without a space",
    "+lr": "lr has no value: settings are written key=value, without a space; did you mean train.learning_rate?",
}


@pytest.mark.parametrize("override", MISTYPED)
def test_what_a_command_prints_of_a_mistyped_override(override, tmp_path, capfd, random_model):
    """One line with the nearest names, and never the advice to append what nothing reads."""
    given = ["method=asft", "model.kind=folder", f"+model.path={random_model}", "train.max_steps=1", "task.n_train=8"]
    given = [o for o in given if o.lstrip("+").split("=")[0] != override.lstrip("+").split("=")[0]]
    assert call(*given, f"paths.runs={tmp_path / 'runs'}", f"paths.artifacts={tmp_path / 'a'}", override) == 2
    printed = capfd.readouterr().err
    (line,) = [x for x in printed.splitlines() if x.startswith("error: ")]
    assert MISTYPED[override] in line and "+harmfull" not in printed and "Traceback" not in printed
    assert not list((tmp_path / "runs").glob("[!.]*"))


NO_SEARCH = {
    "experiment=tune_mine": ("did you mean", False),
    "experiment=tune_nullspace_cwac": ("tune_nullspace_cwac'; conf/experiment/tune.yaml has no search space of", True),
    "experiment=tune method=nullspace_cwac": ("error: conf/experiment/tune.yaml has no search space of", True),
    "experiment=tune method=salora": ("error: the search of method=salora has a preset of its own", False),
    "experiment=tune method=sppft model=qwen": ("no blocks of model=qwen for method=sppft", False),
}


@pytest.mark.parametrize("override", NO_SEARCH)
def test_a_search_without_a_line_is_one_error_that_shows_the_line(override, tmp_path, capfd, recwarn):
    says, line = NO_SEARCH[override]
    assert call("-m", *override.split(), f"paths.runs={tmp_path / 'runs'}") == 2
    printed = capfd.readouterr().err
    assert printed.count("\n") == 1 and printed.startswith("error: ") and not recwarn.list
    method = override.rpartition("=")[2].removeprefix("tune_")
    if override == "experiment=tune_mine":  # no name is near, and all the others are none
        assert says not in printed and "experiment=tune method=mine" in printed and "vaccine" not in printed
        return
    assert says in printed and "docs/searches.md" in printed
    shown = f'`{method}: {{<<: *seeds, method.KEY: "choice(0.01,0.03,0.1,0.3,1.0,3.0)"}}`'
    assert (shown in printed) == line and (f"experiment=tune method={method}" in printed) == line


def test_every_synonym_names_a_key_that_there_is_and_is_none_itself():
    there = {*keys.known(), *keys.parents(), "eval/judge"}
    for ours, others in keys.SYNONYMS.items():
        assert ours in there
        assert not there & {*others}


def test_flags_of_hydras_own_and_their_values_are_left_to_it():
    for given in (
        ["--multirun", "seed=0"],
        ["--cfg", "job"],
        ["--multi"],
        ["--info=all"],
        ["-m", "seed=0,1"],
        ["--help"],
    ):
        assert keys.dashed(given) == ""
    assert keys.dashed(["-m", "--lr", "1e-5", "seed=0"]).endswith("write train.learning_rate=1e-5")
    assert keys.dashed(["--lr", "seed=0"]).endswith("write train.learning_rate=<value>")


def test_other_commands_print_one_line_with_the_nearest_names_too(capsys):
    @command
    def main(argv):
        compose(argv)
        return 0

    for override, says in (("method=cwacc", "did you mean method=cwac?"), ("seeed=1", "did you mean seed?")):
        assert main([override]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: Could not") and says in line
    with pytest.raises(UserError, match="did you mean experiment=demo"):
        expected_cells("demoo")


@pytest.fixture
def own_conf(tmp_path, monkeypatch):
    """A copy of conf/ to which a test adds files."""
    folder = Path(shutil.copytree(CONF, tmp_path / "conf"))
    for module in (config, keys, library):
        monkeypatch.setattr(module, "CONF", folder)
    return folder


@pytest.mark.parametrize("group", ["method", "model", "task", "pools", "eval/judge"])
def test_an_options_name_is_its_files(group, own_conf):
    """By hydra's groups; what ships passes, and so does a name that the command line gives."""
    for option in keys.options(group):
        keys.check_names({group: option})
    first = keys.options(group)[0]
    (own_conf / group / "mine.yaml").write_text((own_conf / group / f"{first}.yaml").read_text())
    said = rf"{group}=mine: conf/{group}/mine.yaml has name: {first}, .*; write name: mine there"
    with pytest.raises(UsageError, match=said):
        compose([f"{group}=mine"])
    (own_conf / group / "mine.yaml").write_text(f"defaults:\n  - {first}\n  - _self_\nname: mine\n")
    assert OmegaConf.select(compose([f"{group}=mine"]), f"{group.replace('/', '.')}.name") == "mine"


def test_a_name_on_the_command_line_is_meant(own_conf):
    (own_conf / "method" / "mine.yaml").write_text("defaults:\n  - sft\n  - _self_\n")
    with pytest.raises(UsageError, match="conf/method/mine.yaml has no name of its own.*write name: mine there"):
        load_method("mine", "tiny")
    assert compose(["method=cwac", "method.name=cwac-0.9"]).method.name == "cwac-0.9"


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_sets_no_key_that_nothing_reads(preset):
    check_keys(compose(grid(preset)[0]))


def test_every_option_of_every_group_is_known():
    for group in ("model", "task", "pools", "train", "logger", "attack", "variant", "scale"):
        for option in options(group):
            cfg = compose([f"{group}={option}"])
            assert list(unread(cfg)) == [], (group, option)


def test_documented_keys_that_no_yaml_sets_are_known():
    paths = ["model.kind=folder", "+model.path=x", "+model.base=y", "+model.attention=eager"]
    check_keys(compose([*paths, "+train.bf16=true", "method=sft", "+model.safety_layers=[1,2]"]))
    check_keys(compose(["task=sst2", "+task.aliases={positive: {strict: [good]}}", "eval.vllm.options={a: 1}"]))


def test_a_key_of_ones_own_that_others_are_made_of_is_read():
    check_keys(compose(["+rate=1e-4", "train.learning_rate=${rate}"]))
    with pytest.raises(UsageError, match="rate=0.0001 is read by nothing"):
        check_keys(compose(["+rate=1e-4"]))


def test_the_autoencoders_keys_are_those_of_its_class():
    theirs = {f"model.sae.{f.name}" for f in dataclasses.fields(SAEConfig)}
    ours = {key for key in {*known(), *OPTIONAL} if key.startswith("model.sae.")}
    assert ours == theirs


@pytest.mark.parametrize("half", ["weight", "activation"])
def test_a_word_in_place_of_a_methods_settings_is_refused(half):
    with pytest.raises(UsageError, match=f"method.{half}=foo is not valid; give keys below method.{half}, or null"):
        instantiate(compose(["method=cwac", f"method.{half}=foo"]).method)


@pytest.mark.parametrize("key", ["weight.first_token", "weight.freeze_others"])
def test_truth_values_of_a_method_are_checked(key):
    with pytest.raises(UsageError, match=f"{key}=no is neither true nor false"):
        instantiate(compose(["method=cwac", f"method.{key}=no"]).method)


def test_help_says_what_it_is_for_and_what_people_want_first(capfd):
    assert call("--help") == 0
    printed = capfd.readouterr().out
    assert "safety" in printed.splitlines()[0] + printed.splitlines()[1]
    keys, _, groups = printed.partition("Groups")
    for key in ("harmful_ratio=", "seed=", "method=", "model.lora=", "+model.path=", "paths.data=", "force=true"):
        assert key in keys, key
    assert "weight_only_closed" in groups and len(printed.splitlines()) < 60


@pytest.mark.parametrize("targets", ["[q_proj,v_porj]", "[nope]", "[down_proj,gate]"])
def test_a_misspelt_module_beside_a_valid_one_is_refused(targets, random_model):
    cfg = compose(["model.kind=folder", f"+model.path={random_model}"])
    cfg.model.lora = compose([f"model.lora={{r: 2, alpha: 4, target_modules: {targets}}}"]).model.lora
    with pytest.raises(UsageError, match="the model has no (v_porj|nope|gate); it has .*q_proj"):
        load(cfg.model, random_model.parent)
    cfg.model.lora.target_modules = ["q_proj", "mlp.down_proj"]
    adapted = [n for n, _ in load(cfg.model, random_model.parent).model.named_modules() if n.endswith("lora_A")]
    assert len(adapted) == 4 and {n.split(".")[-2] for n in adapted} == {"q_proj", "down_proj"}
