"""What a user can get wrong: one clear error each, no traceback, exit code 2 for usage and 1 for failure."""

import json
import logging
import re
import shutil
import tempfile
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

from analysis import claims, compare, demo, report
from cwac.core import config, identity, validation
from cwac.core.paths import CONF
from tests.conftest import SMALL, call, launch
from tests.helpers.hub import write

pytestmark = pytest.mark.faults
TINY = ["train.max_steps=1", "method=sft"]


def refused(capfd, *overrides: str, code: int, says: str) -> str:
    """Runs the command and checks how it fails; returns what it printed."""
    began = time.process_time()
    found = call(*overrides)
    spent = time.process_time() - began
    logging.getLogger().handlers.clear()  # Hydra's, on this test's captured stream
    captured = capfd.readouterr()
    output = captured.out + captured.err
    assert found == code, output
    assert len(re.findall("^error: ", output, re.M)) == 1 and says in output and "Traceback" not in output, output
    assert spent < 10
    return output


CONFIGS = {
    "no such method": (["method=cwacc"], 2, "method/cwacc"),
    "no such experiment": (["experiment=nope"], 2, "experiment/nope"),
    "no such values": (["values=best"], 2, "values/best"),
    "no such key": (["train.learning_rat=1"], 2, "train.learning_rat"),
    "no equals sign": (["seed"], 2, "seed"),
    "unclosed list": (["eval.at=[0"], 2, "'[0'"),
    "ratio above 1": (["harmful_ratio=1.5"], 2, "harmful_ratio=1.5 is out of range"),
    "ratio NaN": (["harmful_ratio=nan"], 2, "harmful_ratio=nan is not a number"),
    "ratio a word": (["harmful_ratio=lots"], 2, "harmful_ratio=lots is not a number"),
    "ratio null": (["harmful_ratio=null"], 2, "harmful_ratio=null"),
    "seed null": (["seed=null"], 2, "seed=null"),
    "seed negative": (["seed=-1"], 2, "seed=-1 is out of range"),
    "seed a fraction": (["seed=1.5"], 2, "seed=1.5 is not a whole number"),
    "rate negative": (["train.learning_rate=-1"], 2, "train.learning_rate=-1 is out of range"),
    "rate infinite": (["train.learning_rate=inf"], 2, "train.learning_rate=inf"),
    "rate null": (["train.learning_rate=null"], 2, "train.learning_rate=null"),
    "length 1": (["train.max_length=1"], 2, "train.max_length=1 is out of range"),
    "length null": (["train.max_length=null"], 2, "train.max_length=null"),
    "batch 0": (["train.per_device_train_batch_size=0"], 2, "per_device_train_batch_size=0"),
    "no such template": (["train.template=chatty"], 2, "train.template=chatty is unknown"),
    "no such schedule": (["train.lr_scheduler_type=spiral", *TINY], 2, "spiral"),
    "no such optimizer": (["+train.optim=magic", *TINY], 2, "magic"),
    "no such argument": (["+train.foo=1", *TINY], 2, "train.foo is not a TrainingArguments field"),
    "no such mixing": (["mix_mode=both"], 2, "mix_mode=both is unknown"),
    "no such split": (["eval.split=train"], 2, "eval.split=train is unknown"),
    "points no list": (["eval.at=2"], 2, "eval.at=2 is not a list"),
    "points negative": (["eval.at=[-1]"], 2, "eval.at=[-1] is not a list"),
    "no prompts": (["eval.n_harmful=0"], 2, "eval.n_harmful=0 is out of range"),
    "objective a word": (["objective.HS=much"], 2, "objective.HS=much"),
    "no such dtype": (["model.dtype=fp8"], 2, "model.dtype=fp8 is unknown"),
    "rounding dtype": (["model.dtype=bfloat16"], 2, "needs fp32"),
    "folder without path": (["model.kind=folder"], 2, "model.path=None is not a folder"),
    "no such data": (["paths.data=/nonexistent", "model=smollm2", "task=sst2"], 2, "paths.data=/nonexistent"),
    "task of another world": (["task=sst2"], 2, "task=sst2 needs a pretrained model"),
    "model of another world": (["model=smollm2"], 2, "embedded world's words"),
    "threads 0": (["threads=0"], 2, "threads=0 is out of range"),
    "judge of no class": (["eval.judge._target_=no.such.Judge", *TINY], 2, "no.such.Judge"),
    "judge null": (["eval.judge=null", *TINY], 2, "eval.judge=null"),
    "pool of negative size": (["pools.sizes.poison=-1", *TINY], 2, "pools.sizes.poison=-1"),
    "labels empty": (["task.labels=[]", *TINY], 2, "task.labels=[]"),
    "energy 2": (["method.weight.energy=2"], 2, "method.weight.energy=2 is not valid"),
    "no such gate": (["method.activation.gate=top"], 2, "method.activation.gate=top"),
    "no such method key": (["+method.weight.enrgy=1"], 2, "enrgy"),
    "neither half": (["method.weight=null", "method.activation=null"], 1, "neither weight nor activation"),
    "more anchors than there are": (["method.weight.n_anchors=161"], 2, "method.weight.n_anchors=161"),
    "more prompts than there are": (["method.activation.n_prompts=81"], 2, "method.activation.n_prompts=81"),
    "poison pool too small": (["harmful_ratio=0.9", "task.n_train=4000", *TINY], 1, "harmful pairs, the pool has"),
    "no such module": (["method=weight_only", "method.weight.modules=[nope_proj]"], 1, "nope_proj"),
    "no such layer": (["method=weight_only", "method.weight.layers=[99]"], 1, "layers=[99] lies outside"),
    "lora of rank 0": (["model.lora={r: 0, alpha: 8, target_modules: all-linear}", *TINY], 2, "model.lora"),
    "lora without rank": (["model.lora={alpha: 8, target_modules: all-linear}", *TINY], 2, "model.lora"),
    "lora of no module": (["model.lora={r: 2, alpha: 8, target_modules: [nope]}", *TINY], 2, "model.lora"),
    "no such attention": (["+model.attention=warp", *TINY], 1, "warp"),
    "length below any prompt": (["train.max_length=8", *TINY], 1, "raise it"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_malformed_configuration_is_one_line(case, random_model, tmp_path, capfd):
    overrides, code, says = CONFIGS[case]
    own = [o for o in overrides if o.startswith(("model.kind", "model=", "task=sst2"))]
    model = [] if own else ["model.kind=folder", f"+model.path={random_model}", *SMALL[:1]]
    model = [o for o in model if o.split("=")[0] not in {p.split("=")[0] for p in overrides}]
    paths = [f"paths.runs={tmp_path / 'runs'}", f"paths.artifacts={tmp_path / 'artifacts'}"]
    refused(capfd, *model, *paths, *overrides, code=code, says=says)


# --- data files -----------------------------------------------------------------------------------------
GOOD = [{"sentence": f"a very {w} film number {i}", "label": i % 2} for i, w in enumerate(["nice", "dull"] * 40)]


def sst2(tmp_path: Path, model: Path, *more: str) -> list[str]:
    return [
        "model.kind=folder",
        f"+model.path={model}",
        "task=sst2",
        "pools=toy",
        f"paths.data={tmp_path / 'hub'}",
        f"paths.runs={tmp_path / 'runs'}",
        f"paths.artifacts={tmp_path / 'artifacts'}",
        "task.n_train=16",
        "task.n_test=4",
        "task.n_validation=2",
        "eval.n_harmful=2",
        "eval.n_benign=2",
        "eval.max_new_tokens=2",
        "eval.drift=false",
        *TINY,
        *more,
    ]


def lay_out(hub: Path, name: str, content: bytes) -> None:
    """A file as the training split of SST-2, beside a good validation split."""
    folder = hub / "stanfordnlp" / "sst2"
    write(hub, "stanfordnlp/sst2", "validation", GOOD[:20])
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/"
        f"{name}\n  - split: validation\n    path: data/{name.replace('train', 'validation')}\n---\n"
    )
    (folder / "data" / name).write_bytes(content)
    other = folder / "data" / name.replace("train", "validation")
    if name.endswith(".csv"):
        other.write_text("sentence,label\n" + "".join(f"{r['sentence']},{r['label']}\n" for r in GOOD[:20]))
    elif name.endswith(".json"):
        other.write_text("".join(json.dumps(r) + "\n" for r in GOOD[:20]))
    else:
        (folder / "data" / "validation-00000-of-00001.parquet").rename(other)


def lines(*rows: dict) -> bytes:
    return "".join(json.dumps(r) + "\n" for r in [*GOOD, *rows]).encode()


DATA = {
    "missing column": ("train.json", lines().replace(b"sentence", b"text"), "no column 'sentence'"),
    "missing label": ("train.json", lines().replace(b"label", b"klass"), "no column 'label'"),
    "wrong label": ("train.json", lines({"sentence": "fine", "label": 7}), "has the label 7"),
    "null text": ("train.json", lines({"sentence": None, "label": 1}), "no text in 'sentence'"),
    "text of blanks": ("train.json", lines({"sentence": "  ", "label": 1}), "no text in 'sentence'"),
    "mixed types": ("train.json", lines({"sentence": ["a", "b"], "label": "x"}), "has the label 'x'"),
    "10 MB line": ("train.json", lines({"sentence": "long " * 2_000_000, "label": 1}), "characters in 'sentence'"),
    "empty file": ("train.json", b"", "sst2"),
    "no JSON": ("train.json", b'{"sentence": "a", "label": 1}\n{"sent', "could not be read"),
    "not UTF-8": ("train.csv", b"sentence,label\n" + "sch\u00f6n,1\n".encode("latin-1") * 40, "could not be read"),
    "ragged CSV": ("train.csv", b"sentence,label\na,1\nb,0,9,9\n", "could not be read"),
    "truncated Parquet": ("train.parquet", b"PAR1" + bytes(200), "could not be read"),
}


@pytest.mark.parametrize("case", DATA)
def test_a_malformed_data_file_is_one_line(case, random_model, tmp_path, capfd):
    name, content, says = DATA[case]
    lay_out(tmp_path / "hub", name, content)
    refused(capfd, *sst2(tmp_path, random_model), code=1, says=says)


def test_a_formula_in_a_csv_is_text(random_model, tmp_path, capfd):
    """It is a prompt like any other, and reaches no table: what a spreadsheet would open holds numbers and names."""
    formula = b'"=HYPERLINK(""http://example.org"";""x"")",1\n'
    lay_out(tmp_path / "hub", "train.csv", b"sentence,label\n" + formula + b"fine,1\ndull,0\n" * 20)
    assert call(*sst2(tmp_path, random_model)) == 0, capfd.readouterr()


# --- models ---------------------------------------------------------------------------------------------


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("token*"):
        path.unlink()


def no_chat_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def half_the_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def one_matrix_less(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def other_shapes(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "intermediate_size": 48}))


def missing_shard(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    no_weights(folder)
    model.save_pretrained(folder, max_shard_size="4KB")
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def smaller_vocabulary(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(AutoTokenizer.from_pretrained(folder)) - 8)
    model.save_pretrained(folder)


def another_architecture(folder: Path) -> None:
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=40, **size)).save_pretrained(folder)


def no_language_model(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "vit", "architectures": ["ViTModel"]}))


def broken_settings(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


def unknown_type(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "no-such-type"}))


def only_a_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    no_weights(folder)


def everything(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


MODELS = {
    everything: "does not hold a causal language model",
    no_weights: "does not hold a causal language model",
    only_a_pickle: "does not hold a causal language model in safetensors",
    no_tokenizer: "with its tokenizer",
    no_chat_template: "has no chat template",
    half_the_weights: "does not hold a causal language model",
    one_matrix_less: "lacks 1 of the model's weights, first model.layers.1.mlp.down_proj.weight",
    other_shapes: "does not hold a causal language model",
    missing_shard: "does not hold a causal language model",
    smaller_vocabulary: "tokens, the model's embedding",
    another_architecture: "",
    no_language_model: "does not hold a causal language model",
    broken_settings: "does not hold a causal language model",
    unknown_type: "does not hold a causal language model",
}


@pytest.mark.parametrize("spoil", MODELS, ids=lambda f: f.__name__)
def test_a_malformed_model_is_one_line(spoil, random_model, tmp_path, capfd):
    folder = tmp_path / "model"
    shutil.copytree(random_model, folder)
    spoil(folder)
    output = refused(capfd, *sst2_free(folder, tmp_path), code=1, says=MODELS[spoil])
    assert str(folder) in output or "chat template" in output


def sst2_free(model: Path, tmp_path: Path) -> list[str]:
    paths = [f"paths.runs={tmp_path / 'runs'}", f"paths.artifacts={tmp_path / 'artifacts'}", "eval.drift=false"]
    return ["model.kind=folder", f"+model.path={model}", *paths, *SMALL, *TINY]


# --- command lines --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", [demo, report, claims, compare], ids=lambda m: m.__name__)
def test_a_tool_without_its_folder_says_so(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = {
        demo: ["--runs", "nowhere", "--out", "out"],
        report: ["--runs", "nowhere", "--out", "out.html"],
        claims: ["--results", "nowhere"],
        compare: ["nowhere", "nowhere"],
    }[tool]
    try:
        code = tool.main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    error = capsys.readouterr().err
    assert code == 2 and "nowhere" in error and "Traceback" not in error


def test_a_command_in_a_process_of_its_own_ends_alike():
    """The rest of this file calls main(); the exit code and the single line are the process's too."""
    process = launch("harmful_ratio=2")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2 and output.count("error: ") == 1 and "Traceback" not in output


def test_a_traceback_is_printed_where_it_is_asked_for(tmp_path, capfd):
    code = call("harmful_ratio=2", "debug=true", f"paths.runs={tmp_path}")
    logging.getLogger().handlers.clear()
    captured = capfd.readouterr()
    assert code == 2 and "Traceback" in captured.out + captured.err


def test_an_unknown_flag_is_usage(capfd):
    assert call("--bogus") == 2
    assert "--bogus" in capfd.readouterr().err


# --- any combination of valid options -------------------------------------------------------------------
METHODS = sorted(p.stem for p in (CONF / "method").glob("*.yaml"))
OPTIONS = {
    "method": st.sampled_from(METHODS),
    "task": st.sampled_from(["toy_sentiment", "toy_topic", "toy_math"]),
    "harmful_ratio": st.sampled_from([0, 0.05, 0.2, 1]),
    "mix_mode": st.sampled_from(["replace", "additive"]),
    "seed": st.integers(0, 9),
    "train.template": st.sampled_from(["chat", "alpaca"]),
    "train.gradient_accumulation_steps": st.integers(1, 3),
    "train.per_device_train_batch_size": st.sampled_from([1, 5]),
    "eval.split": st.sampled_from(["test", "validation"]),
    "eval.at": st.sampled_from(["[]", "[0]", "[1]"]),
    "model.lora": st.sampled_from(["null", "{r: 2, alpha: 4, target_modules: all-linear}"]),
    "values": st.sampled_from(["official", "tuned"]),
}


@given(st.fixed_dictionaries(OPTIONS))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_any_combination_of_valid_options_composes_and_names_one_run(options):
    cfg = config.compose([f"{k}={v}" for k, v in options.items()])
    validation.validate(cfg)
    name = identity.run_id(cfg)
    assert name == identity.run_id(config.compose([f"{k}={v}" for k, v in reversed(options.items())]))
    assert cfg.method.name == options["method"] and f"-s{options['seed']}-" in name


@pytest.mark.slow
@given(st.fixed_dictionaries(OPTIONS))
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_any_combination_of_valid_options_runs(artifacts, tmp_path, capfd, options):
    """On `tiny`, for two steps; a method may refuse a combination it cannot serve, by one line."""
    runs = tempfile.mkdtemp(dir=tmp_path)  # one an example: a run that exists refuses other points on the way
    small = [*SMALL, "train.max_steps=2", f"paths.runs={runs}", f"paths.artifacts={artifacts}"]
    small += ["model.sae={tokens: 2048, m: 256, cached_tokens: 2048, batch: 256}", "eval.n_drift=8"]
    code = call(*small, *(f"{k}={v}" for k, v in options.items()))
    logging.getLogger().handlers.clear()
    captured = capfd.readouterr()
    output = captured.out + captured.err
    assert "Traceback" not in output and output.count("error: ") == (code != 0), (options, output)
    # tiny was aligned in its chat template; asked in another, some base models refuse nothing
    unserved = {"model.lora": True, "refuses none of the anchor prompts": options["train.template"] == "alpaca"}
    assert code == 0 or any(may and reason in output for reason, may in unserved.items()), (options, output)
