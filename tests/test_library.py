"""A defence in somebody's own script gives the weights of train.py, under Trainer and under TRL's SFTTrainer."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    Trainer,
)

from analysis.stats import exact
from cwac import hf_trainer, measure, measure_task, packaged_model, text_rows
from cwac.core import config
from cwac.core.errors import UsageError, UserError
from cwac.data.examples import Pools
from cwac.data.mix import mix
from cwac.data.pools import load_pools
from cwac.data.tasks import load_task
from cwac.data.tokenize import Collator, Rows
from cwac.methods.base import Method
from cwac.models.generate import generate
from cwac.models.loading import load
from cwac.training import arguments, engine
from cwac.training.library import EncodedRow, Mixed, defend, load_method, options, preset_pools, unknown_share
from tests.conftest import FINE_TUNE, ROOT, fine_tune, make_llama, random_rows, sgd

SAE = "model.sae={tokens: 2048, m: 256, cached_tokens: 2048, batch: 256}"


def own_rows(cfg):
    task = load_task(cfg.task, None, cfg.seed, "test")
    return mix(task.train, load_pools(cfg.pools, None, cfg.seed).poison, cfg.harmful_ratio, cfg.seed, cfg.mix_mode)


def own_trainer(cfg, folder, artifacts, collator=None, **more) -> Trainer:
    """A trainer as a user's script makes it: model and tokenizer from a folder, rows encoded by itself."""
    source = load(cfg.model, artifacts).source
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    rows = Dataset.from_list(list(Rows(tokenizer, own_rows(cfg), max_length=cfg.train.max_length)))
    args = arguments.training_arguments(cfg, SimpleNamespace(dir=folder))
    return Trainer(
        model=model,
        args=args,
        data_collator=collator or DataCollatorForSeq2Seq(tokenizer),
        train_dataset=rows,
        processing_class=tokenizer,
        **more,
    )


def defended(cfg, trainer, artifacts):
    method = load_method(cfg.method.name, "tiny", SAE)
    return defend(
        trainer, method, load_pools(cfg.pools, None, 0), artifacts=artifacts, max_length=cfg.train.max_length
    )


def weights(model) -> dict:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def assert_equal(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[n], other[n]) for n in one), [n for n in one if not torch.equal(one[n], other[n])]


@pytest.mark.parametrize("name", ["cwac", "safeinstr", "safelora"])
def test_the_weights_are_those_of_train_py_bit_for_bit(name, tmp_path, artifacts):
    """The weight and the activation half, rows that a method adds, and what it does after training.

    Where both compute logits at label positions only; without that, the last bits of the loss differ.
    """
    cfg = config.compose([f"method={name}", f"paths.artifacts={artifacts}", *FINE_TUNE])
    theirs, _, context = fine_tune(cfg, tmp_path)
    trainer = own_trainer(cfg, tmp_path, artifacts, engine.Collator(context.tokenizer.pad_token_id, label_logits=True))
    start = weights(trainer.model)
    method = load_method(name, "tiny", SAE)
    pools = load_pools(cfg.pools, None, 0)
    trainer = defend(trainer, method, pools, artifacts=artifacts, max_length=64, base=context.loaded.base)
    trainer.label_logits = True
    assert trainer.train().global_step == 3
    assert_equal(weights(theirs), weights(trainer.model))
    assert any(not torch.equal(start[n], p) for n, p in trainer.model.named_parameters())


def test_a_checkpoint_holds_the_methods_state_and_evaluation_changes_nothing(tmp_path, artifacts):
    kept = ["train.save_strategy=steps", "train.save_steps=2", "train.max_steps=4"]
    cfg = config.compose(["method=lisa", f"paths.artifacts={artifacts}", *FINE_TUNE, *kept])
    evaluated = config.compose([*FINE_TUNE, *kept, "+train.eval_strategy=steps", "+train.eval_steps=1"])
    trainer = own_trainer(evaluated, tmp_path / "a", artifacts, eval_dataset=random_rows(8, vocab=40))
    straight = defended(cfg, trainer, artifacts)
    straight.train()
    stopped = defended(cfg, own_trainer(cfg, tmp_path / "b", artifacts), artifacts)
    stopped.train()
    assert_equal(weights(straight.model), weights(stopped.model))
    shutil.rmtree(tmp_path / "b" / "checkpoint-4")
    assert torch.load(tmp_path / "b" / "checkpoint-2" / engine.METHOD_STATE, weights_only=True)
    resumed = defended(cfg, own_trainer(cfg, tmp_path / "b", artifacts), artifacts)
    resumed.train(resume_from_checkpoint=True)
    assert_equal(weights(straight.model), weights(resumed.model))
    (tmp_path / "b" / "checkpoint-2" / engine.METHOD_STATE).unlink()
    with pytest.raises(UserError, match="saved without a defence"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))


@dataclass
class Penalised(Method):
    def penalty(self, model, step):
        return sum(p.square().sum() for p in model.parameters())


@pytest.mark.parametrize("scaled", [None, False, True])
def test_the_penalty_counts_once_whoever_scales_the_loss(tmp_path, scaled):
    """Some of TRL's trainers say themselves whether their loss is divided over the micro-batches already."""
    from tests.conftest import sgd

    gradients = {}
    for method in (Method("sft"), Penalised("penalised")):
        trainer = Trainer(
            model=make_llama(),
            args=sgd(tmp_path, 2, 4),
            train_dataset=random_rows(8, seed=7),
            data_collator=engine.Collator(2),
        )
        trainer.args.max_grad_norm, trainer.loss_is_scaled_for_ga = 0.0, scaled
        engine.attach(trainer, method).train()
        gradients[method.name] = weights(trainer.model)
    start = weights(make_llama())
    for name, plain in gradients["sft"].items():  # one SGD step of rate 0.3 on the squared norm moves by -0.6 w
        assert torch.allclose(gradients["penalised"][name] - plain, -0.6 * start[name], atol=1e-5), name


def test_what_cannot_work_is_refused_before_anything_is_trained(tmp_path, artifacts):
    cfg = config.compose(["method=lisa", f"paths.artifacts={artifacts}", *FINE_TUNE])
    pools = load_pools(cfg.pools, None, 0)

    def refused(message, method="sft", change=lambda trainer: None, *overrides):
        trainer = own_trainer(cfg, tmp_path, artifacts)
        change(trainer)
        with pytest.raises(UserError, match=message):
            defend(trainer, load_method(method, "tiny", SAE, *overrides), pools, artifacts=artifacts, max_length=64)

    refused("no processing_class", change=lambda t: setattr(t, "processing_class", None))
    refused("model_init", change=lambda t: setattr(t, "model_init", make_llama))
    refused("padding_free=False", "lisa", lambda t: setattr(t.args, "padding_free", True))
    refused("packing=False", "safeinstr", lambda t: setattr(t.args, "packing", True))
    refused("load the model in float32", "weight_only", lambda t: t.model.bfloat16())
    refused("already", change=lambda t: engine.attach(t, Method("sft")))
    with pytest.raises(UsageError, match="method.rho=-1"):
        load_method("lisa", "tiny", "method.rho=-1")
    with pytest.raises(UserError, match="reads the training rows as text"):
        EncodedRow("0", "").messages  # noqa: B018


def test_an_adapter_and_a_whole_model_do_not_go_into_one_folder(tmp_path):
    """`from_pretrained` of such a folder once gave CWAC's weights with a null-space adapter of an earlier training."""
    rows, both = random_rows(2, seed=3), (tmp_path / "whole", tmp_path / "adapter")
    whole = Trainer(make_llama(), sgd(tmp_path / "runs", per_device=1, accumulation=1), Collator(2), rows)
    adapted = get_peft_model(make_llama(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapter = Trainer(adapted, sgd(tmp_path / "runs", per_device=1, accumulation=1), Collator(2), rows)
    trainers = [engine.attach(trainer, Method("sft")) for trainer in (whole, adapter)]
    for trainer, folder in zip(trainers, both, strict=True):
        trainer.save_model(str(folder))
        trainer.save_model(str(folder))  # of its own kind it is written anew
    for trainer, folder, name in zip(trainers, both[::-1], ("adapter_config.json", "model.safetensors"), strict=True):
        before = sorted(p.name for p in folder.iterdir())
        with pytest.raises(UserError, match=f"{name} is of .* saved before.*another folder"):
            trainer.save_model(str(folder))
        assert sorted(p.name for p in folder.iterdir()) == before
        shutil.copytree(folder, tmp_path / f"run-{name}" / "checkpoint-9")
        with pytest.raises(UserError, match="checkpoint-9"):
            engine.refuse_other_kind(tmp_path / f"run-{name}", trainer is trainers[1])


def test_added_rows_have_the_users_columns(tmp_path, artifacts):
    cfg = config.compose([f"paths.artifacts={artifacts}", *FINE_TUNE])
    tokenizer = load(cfg.model, artifacts).tokenizer
    context = SimpleNamespace(tokenizer=tokenizer, template="chat", max_length=64)
    refusal = load_pools(cfg.pools, None, 0).safety[0]
    given = [{"input_ids": [1, 5], "labels": [-100, 5], "attention_mask": [1, 1]}]
    mixed = Mixed(given, [refusal, EncodedRow("0", "")], context)
    assert len(mixed) == 2 and mixed[1] == given[0]
    assert mixed[0].keys() == given[0].keys() and len(mixed[0]["attention_mask"]) == len(mixed[0]["input_ids"])
    assert tokenizer.decode([i for i in mixed[0]["labels"] if i >= 0]).startswith(refusal.response)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hf", "sft"])
def test_the_example_equals_train_py(kind, tmp_path, artifacts):
    """Up to rounding: train.py computes logits at label positions only, TRL sums the loss in a fused kernel."""
    if kind == "sft":
        pytest.importorskip("trl")
    from cwac.core.run_dir import Run
    from cwac.training.script import SETTINGS
    from examples.defend_your_trainer import main
    from train import run_cell

    paths = [f"paths.runs={tmp_path}", f"paths.artifacts={artifacts}", "keep_weights=true", "eval.progress=false"]
    small = ["task.n_train=32", "task.n_test=4", "eval.n_harmful=4", "eval.n_benign=4", "harmful_ratio=0.25"]
    cfg = config.compose(["method=cwac", SAE, *paths, *small])
    shared = {k: v for k, v in SETTINGS.items() if k in cfg.train and k != "save_steps"}
    assert len(shared) == 5 and shared == {k: cfg.train[k] for k in shared}
    run_cell(cfg)
    data = tmp_path / "mine.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": e.prompt, "response": e.response}) for e in own_rows(cfg)))
    out = tmp_path / kind
    argv = ["--trainer", kind, "--rows", str(data), "--artifacts", str(artifacts), "--out", str(out)]
    main([*argv, SAE])
    theirs, ours = (load_file(f / "model.safetensors") for f in (Run(cfg).dir / "model", out))
    # AdamW turns a rounding difference of a near-zero gradient into a step of up to its rate; 12 steps of at most 1e-4
    assert theirs.keys() == ours.keys()
    gaps = torch.cat([(theirs[n] - ours[n]).abs().flatten() for n in theirs])
    assert gaps.max() < 1e-4 and gaps.mean() < 1e-6
    shutil.rmtree(out / "checkpoint-12")
    shutil.copy(out / "model.safetensors", tmp_path / "straight.safetensors")
    main([*argv, "--resume", SAE])
    assert_equal(load_file(tmp_path / "straight.safetensors"), load_file(out / "model.safetensors"))


COMMANDS = {"cwac.commands.experiments", "cwac.commands.analysis"}
"""Folders beside `cwac` that the package carries inside itself."""


def test_every_package_is_installed():
    listed = (ROOT / "pyproject.toml").read_text().split("packages = [")[1].split("]")[0]
    found = {str(p.parent.relative_to(ROOT)).replace("/", ".") for p in (ROOT / "cwac").rglob("*.py")}
    assert {name.strip(' "\n') for name in listed.split(",")} == found | {"cwac.conf", *COMMANDS}


@pytest.mark.slow
def test_an_installed_wheel_finds_its_settings_and_weights(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    ignored = shutil.ignore_patterns("__pycache__", "local")
    for name in ("cwac", "conf"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / "conf" / "local").mkdir()
    (source / "conf" / "local" / "default.yaml").write_text("seed: 99\n")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(target)]
    subprocess.run([*pip, str(source)], check=True)
    script = (
        "import cwac; from pathlib import Path; from cwac import load_method; from cwac.core import config as c; "
        "from cwac.core import paths; "
        "from cwac.models.loading import load; cfg = c.compose([]); print(cwac.__file__, paths.CONF, cfg.seed); "
        "c.origin({'kind': 'smollm2', 'wheel_sha256': ''}); m = load_method('cwac', 'qwen'); "
        "print(m.name, load(cfg.model, Path('artifacts')).model.num_parameters())"
    )
    env = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()[-2:]
    assert first.split() == [str(target / "cwac" / "__init__.py"), str(target / "cwac" / "conf"), "0"]
    assert second.split()[0] == "cwac" and int(second.split()[1]) > 900_000


@pytest.mark.parametrize(("name", "says"), [("bea", True), ("bea_no_trigger", False), ("safeinstr", False)])
def test_a_method_that_changes_prompts_says_how_to_serve_them(name, says, tmp_path, artifacts, caplog):
    cfg = config.compose([f"method={name}", f"paths.artifacts={artifacts}", *FINE_TUNE])
    defended(cfg, own_trainer(cfg, tmp_path, artifacts), artifacts)
    assert ("pass every one through method.prompt(messages)" in caplog.text) is says


# --- other people's trainers ----------------------------------------------------------------------------


def unlabelled(cfg, folder, artifacts, collator, kind=Trainer, **columns) -> Trainer:
    """A causal-LM script: rows of token ids without labels, which the collator makes of all tokens."""
    trainer = own_trainer(cfg, folder, artifacts)
    rows = [{"input_ids": r["input_ids"], "attention_mask": [1] * len(r["input_ids"])} for r in trainer.train_dataset]
    rows = Dataset.from_list([{**row, **columns} for row in rows])
    return kind(
        trainer.model,
        trainer.args,
        collator(trainer.processing_class),
        rows,
        processing_class=trainer.processing_class,
    )


class Spy:
    """A collator that keeps, of every batch, the tokens that carry a loss, by row."""

    def __init__(self, collate):
        self.collate, self.seen = collate, []

    def __call__(self, rows):
        batch = self.collate(rows)
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            self.seen.append((tuple(ids[labels != -100].tolist()), len(rows)))
        return batch


@pytest.mark.parametrize("size", [1, 8])
@pytest.mark.parametrize("name", ["safeinstr", "bea"])
def test_a_causal_lm_collator_trains_on_no_prompt_of_an_added_row(name, size, tmp_path, artifacts):
    """It failed with a KeyError at batch 8, and at batch 1 trained on the prompts: 10 labels became 20."""
    more = [f"train.per_device_train_batch_size={size}", "train.max_steps=40"]
    cfg = config.compose([f"method={name}", f"paths.artifacts={artifacts}", *FINE_TUNE, *more])
    trainer = unlabelled(cfg, tmp_path, artifacts, lambda tok: DataCollatorForLanguageModeling(tok, mlm=False))
    user = {tuple(row["input_ids"]) for row in trainer.train_dataset}
    defend(trainer, load_method(name, "tiny", SAE), "toy", artifacts=artifacts, max_length=64)
    added = {tuple(i for i in p["labels"] if i != -100) for p in trainer.train_dataset.places if isinstance(p, dict)}
    trainer.data_collator = spy = Spy(trainer.data_collator)
    trainer.train()
    learnt = {tokens for tokens, _ in spy.seen}
    pad = trainer.processing_class.pad_token_id
    assert learnt & added and learnt <= added | {tuple(i for i in row if i != pad) for row in user}
    assert max(n for _, n in spy.seen) == size


def test_a_collator_that_changes_tokens_or_labels_is_refused_before_training(tmp_path, artifacts):
    cfg = config.compose([f"paths.artifacts={artifacts}", *FINE_TUNE])

    def refused(collator, message, labelled=False, **columns):
        trainer = unlabelled(cfg, tmp_path, artifacts, collator, **columns)
        if labelled:
            trainer.train_dataset = own_trainer(cfg, tmp_path, artifacts).train_dataset
        trainer.args.remove_unused_columns = False
        with pytest.raises(UsageError, match=message):
            defend(trainer, load_method("safeinstr", "tiny"), "toy", artifacts=artifacts, max_length=64)

    refused(Masking, "changes their tokens")
    refused(Weighted, r"KeyError: 'weight'\).*the user's rows also have weight", weight=1.0)
    refused(lambda tok: all_tokens, "does not keep their labels, so that prompts would be trained on", labelled=True)


class Masking:
    """As masked language modelling."""

    def __init__(self, tokenizer):
        self.collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)

    def __call__(self, rows):
        batch = self.collate(rows)
        batch["input_ids"][:, 1::2] = 3
        return batch


class Weighted:
    """A collator of the user's own with a weight for each row."""

    def __init__(self, tokenizer):
        self.collate = DataCollatorForSeq2Seq(tokenizer)

    def __call__(self, rows):
        weights = torch.tensor([row["weight"] for row in rows])
        return self.collate([{k: v for k, v in row.items() if k != "weight"} for row in rows]) | {"weight": weights}


def all_tokens(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows])
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": (ids != 0).long()}


def test_batches_with_keys_of_the_users_own_are_not_replaced(tmp_path, artifacts):
    cfg = config.compose(["method=lisa", f"paths.artifacts={artifacts}", *FINE_TUNE])
    trainer = own_trainer(cfg, tmp_path, artifacts)
    trainer.train_dataset = trainer.train_dataset.add_column("weight", [1.0] * len(trainer.train_dataset))
    trainer.data_collator, trainer.args.remove_unused_columns = Weighted(trainer.processing_class), False
    with pytest.raises(UsageError, match="method=lisa puts batches of refusals .* without their weight"):
        defend(trainer, load_method("lisa", "tiny"), "toy", artifacts=artifacts, max_length=64)


class ByKeyword(Trainer):
    """Takes what it does not use as keywords, as Trainer's own documentation shows."""

    calls = 0

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        self.calls += 1
        return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)

    def train(self, **kwargs):
        return super().train(**kwargs)


def test_a_trainer_that_takes_the_rest_by_keyword_gives_the_weights_of_one_that_does_not(tmp_path, artifacts):
    cfg = config.compose(["method=activation_only", f"paths.artifacts={artifacts}", *FINE_TUNE])
    found = []
    for kind in (Trainer, ByKeyword):
        trainer = own_trainer(cfg, tmp_path, artifacts)
        trainer.__class__ = kind
        defended(cfg, trainer, artifacts).train()
        found.append(weights(trainer.model))
    assert_equal(*found)
    assert trainer.calls == 3


def test_what_is_no_method_no_trainer_and_no_pools_is_one_line(tmp_path, artifacts):
    cfg = config.compose([f"paths.artifacts={artifacts}", *FINE_TUNE])
    trainer, method = own_trainer(cfg, tmp_path, artifacts), load_method("sft", "tiny")
    for given, message in [
        ((trainer, "cwac"), r"defend takes a method, not 'cwac'; give load_method\('cwac', <model>\)"),
        ((trainer, Method), "defend takes a method, not <class"),
        ((method, method), "defend takes a Trainer of transformers' or a subclass, not Method"),
        ((trainer, method, ["a"]), r"pools=\['a'\] is neither a preset"),
        ((trainer, method, "reall"), "pools='reall' is unknown; did you mean real"),
        ((trainer, method, "real"), "pools='real' has words that the embedded model lacks; give pools='toy'"),
    ]:
        with pytest.raises(UsageError, match=message):
            defend(*given)


def test_the_embedded_models_pools_are_refused_for_a_real_tokenizer():
    class Real:
        def get_vocab(self):
            return {"\u0120hello": 0}

    with pytest.raises(UsageError, match="pools='toy' is written in the words of the embedded model"):
        preset_pools("toy", None, 0, Real())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cwacc", "tiny"), "method=cwacc is unknown; did you mean cwac"),
        (("cwac", "qwen_5b"), "model=qwen_5b is unknown; did you mean qwen_05b"),
        (("lisa", "tiny", "method.roh=1"), "'method.roh'; did you mean method.rho"),
        (("cwac", "tiny", "method.lam=1"), "'method.lam'; did you mean method.activation.lam"),
        (("cwac", "tiny", "method.weight.enrgy=1"), "'method.weight.enrgy'; did you mean method.weight.energy"),
        (("lisa", "tiny", "method.rho="), "method.rho"),
        (("sft", "tiny", "methd=x"), "methd"),
    ],
)
def test_a_misspelt_method_model_or_key_is_one_line_with_the_nearest_name(arguments, message):
    with pytest.raises(UsageError, match=message) as refused:
        load_method(*arguments)
    assert "\n" not in str(refused.value)


def test_errors_name_arguments_that_a_script_has(tmp_path, artifacts):
    cfg = config.compose([f"paths.artifacts={artifacts}", *FINE_TUNE])
    for name, given, says in [
        ("safelora", {}, "base=<folder or hub id"),
        ("safeinstr", {"pools": "paper_b2", "data": "/nowhere"}, "data=/nowhere is not a folder"),
        ("bea", {"max_length": 10_000}, "of up to max_length=10000"),
    ]:
        trainer = own_trainer(cfg, tmp_path, artifacts)
        given = {"pools": load_pools(cfg.pools, None, 0), "artifacts": artifacts, "max_length": 64, **given}
        if isinstance(given["pools"], str):
            trainer.processing_class.get_vocab = lambda: {}
        with pytest.raises(UserError) as refused:
            defend(trainer, load_method(name, "tiny"), **given)
        said = str(refused.value)
        assert says in said and not re.search(r"paths\.|model\.base|\btrain\.(?!py)", said), said


def test_the_examples_data_stay_as_they_are_written(tmp_path):
    """`load_dataset` makes timestamps of a column of dates, and the chat template trained on `<datetime>`."""
    path = tmp_path / "mine.jsonl"
    dates = [f"2024-01-0{i}" for i in range(1, 6)]
    path.write_text("".join(json.dumps({"prompt": "when ?", "response": date}) + "\n" for date in dates))
    assert text_rows(path)["response"] == dates
    path.write_text('{"prompt": "when ?", "response": null}\n')
    with pytest.raises(UsageError, match=f"^line 1 of {path} needs a text"):
        text_rows(path)


@pytest.mark.parametrize("model", options("model"))
def test_a_method_loads_for_every_model_without_a_task(model):
    """A script brings rows of its own: model=smollm2 was refused for the default task, which nobody had set."""
    assert load_method("cwac", model).name == "cwac"
    assert load_method("safeinstr", model, "task=sst2").name == "safeinstr"


# --- a newcomer with rows of their own --------------------------------------------------------------------

DEFEND = (ROOT / "docs" / "defend.md").read_text(encoding="utf-8")


def block(title: str, kind: str) -> str:
    """The first code block of a kind in a section of docs/defend.md."""
    return re.search(rf"(?ms)^## {title}\n.*?^```{kind}\n(.*?)^```", DEFEND)[1]


def test_a_packaged_model_is_a_folder_and_any_other_name_one_line(artifacts):
    folder = packaged_model("tiny", artifacts)
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() == 950_656
    assert len(AutoTokenizer.from_pretrained(folder)) == 762
    with pytest.raises(
        UsageError, match="model=qwen_05b is no packaged model; .*there are qwen_coder_05b, smollm2, t"
    ):
        packaged_model("qwen_05b", artifacts)


def test_the_docs_folder_laid_out_like_the_hub_is_one(tmp_path):
    """A column's name is its text in a file of one row, but for the label, of which both kinds are wanted."""
    from cwac.data.harmful_sources import benign_rows, harmful_rows

    for line in block("A real model without a hub", "text").splitlines():
        path, columns = line.split(maxsplit=1)
        path = tmp_path / path.removeprefix("FOLDER/")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".md":
            path.write_text(block("A real model without a hub", "yaml"))
            continue
        names = [name.strip() for name in re.sub(r"\(.*?\)|;.*", "", columns).split(",")]
        rows = [",".join(kind if name == "label" else name for name in names) for kind in ("safe", "unsafe")]
        path.write_text("\n".join([",".join(names), *rows]) + "\n")
    rows = harmful_rows(str(tmp_path)) | benign_rows(str(tmp_path), 10)
    assert [len(rows[name]) for name in ("advbench", "harmbench", "xstest_safe", "xstest_unsafe")] == [2, 2, 1, 1]
    assert rows["alpaca"][0].response == "output" and "safety_tuned_llamas" in rows


def test_the_docs_pools_of_ones_own_are_pools_and_every_field_has_its_readers():
    given = {"load_method": lambda *names: names, "defend": lambda *three: three, "trainer": None}
    exec(block("Pools of your own", "python"), given)
    assert isinstance(given["pools"], Pools) and given["pools"].test["mine"][0].id == "test-0"
    table = re.search(r"(?ms)^\| field \|.*?\n\n", DEFEND)[0].strip().splitlines()
    fields = {name for line in table for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    assert fields == {f.name for f in dataclasses.fields(Pools)} - {"validation_benign"}
    named = {name for line in table for name in re.findall(r"`(\w+)`", line.rsplit("|", 2)[1])}
    assert named - {"measure"} <= set(options("method"))


def test_pools_with_what_the_method_reads_alone_defend(tmp_path, artifacts):
    cfg = config.compose([f"paths.artifacts={artifacts}", *FINE_TUNE])
    anchors = load_pools(cfg.pools, None, 0).anchors
    trainer = own_trainer(cfg, tmp_path, artifacts)
    defend(trainer, load_method("weight_only", "tiny"), Pools(anchors=anchors), artifacts=artifacts, max_length=64)
    assert trainer.train().global_step == 3
    with pytest.raises(UserError, match="enlarge pools.anchors|prompts in pools.anchors"):
        defend(own_trainer(cfg, tmp_path, artifacts), load_method("weight_only", "tiny"), Pools(), artifacts=artifacts)


def test_rows_in_words_that_the_tokenizer_lacks_are_a_warning(tmp_path, artifacts, caplog):
    cfg = config.compose([f"paths.artifacts={artifacts}", *FINE_TUNE])
    trainer = own_trainer(cfg, tmp_path, artifacts)
    defend(trainer, load_method("sft", "tiny"), "toy", artifacts=artifacts, max_length=64)
    assert "words that this tokenizer does not know" not in caplog.text
    tokenizer = trainer.processing_class
    texts = ["Quarterly revenue fell sharply , analysts said .", "Name a colour ."] * 8
    rows = Dataset.from_list([{"prompt": t, "response": "Shareholders sued ."} for t in texts])
    defend(
        hf_trainer(trainer.model, tokenizer, rows, str(tmp_path)),
        load_method("sft", "tiny"),
        "toy",
        artifacts=artifacts,
    )
    (said,) = [r.getMessage() for r in caplog.records if "does not know" in r.getMessage()]
    assert re.match(r"\d\d % of the tokens of your rows are <unk>, ", said) and "\n" not in said
    assert "give a real model, such as packaged_model('smollm2'): the embedded one reads only its own words" in said


def test_unknown_tokens_are_counted_among_the_words_alone():
    def tokenizer(**of):
        ids = {"unk_token_id": 3, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} | of
        return SimpleNamespace(**ids, all_special_ids=[0, 1, 2, 3])

    rows = [{"input_ids": [1, 3, 7, 8, 9, 2, 0, 0]}, {"input_ids": [1, 3, 3, 7, 2]}, {"text": "raw"}, ("a", "tuple")]
    assert unknown_share(rows, tokenizer()) == 3 / 7
    assert unknown_share(rows, tokenizer(unk_token_id=None)) == 0
    assert unknown_share(rows, tokenizer(eos_token_id=3)) == 0, "GPT-2's ends a text as well"
    assert unknown_share(iter(rows), tokenizer()) == 0


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "question,answer\na,b\n", r"no column prompt, response .*its columns are question, answer"),
        ("a.csv", "prompt,response\na,\n", "line 2 of .* needs a text in each"),
        ("a.jsonl", "prompt,response\na,b\n", r"line 1 of .* is no JSON object; .*ends in .csv"),
        ("a.jsonl", '\n{"question": "a", "answer": "b"}\n', "line 2 of .* it has question, answer"),
        ("a.jsonl", '{"prompt": "a", "completion": "b"}\n', "line 1 of .*; rename completion to response$"),
        ("a.csv", "prompt;answer\na;b\n", "no column response .*; rename answer to response$"),
        ("a.csv", "messages\n[]\n", "no column prompt, response .*; give messages as JSON lines"),
        ("a.jsonl", '{"conversations": []}\n', 'line 1 of .* it has conversations; give {"messages"'),
        ("a.jsonl", '{"messages": "a"}\n', "line 1 of .*`messages` is no list of"),
        ("a.jsonl", '\n{"messages": [{"role": "user", "content": ["a"]}]}\n', "line 2 of .*`messages` is no list of"),
        (
            "a.jsonl",
            json.dumps({"messages": [{"role": r, "content": "a"} for r in ("system", "user", "assistant")]}) + "\n",
            "line 1 of .* has the turns system, user, assistant, .*; write the system turn's text in front",
        ),
        (
            "a.jsonl",
            json.dumps({"messages": [{"role": r, "content": "a"} for r in ("user", "assistant") * 2]}) + "\n",
            "line 1 of .* has the turns user, assistant, user, assistant, .*; give each exchange a row of its own",
        ),
        ("a.jsonl", '{"messages": []}\n', "line 1 of .* has the turns none, "),
        ("a.jsonl", '{"instruction": "a", "output": null}\n', "line 1 of .* in each of `instruction` and `output`"),
        ("a.jsonl", '{"instruction": "a", "input": 3, "output": "b"}\n', "line 1 of .*`instruction` and `output`"),
        ("a.jsonl", "[1]\n", "line 1 of .* is no JSON object"),
        ("a.jsonl", "\n", "has no rows"),
        ("gone.jsonl", None, "is not a file; give JSON lines"),
    ],
)
def test_rows_that_are_none_are_one_line_before_a_model_is_loaded(name, text, message, tmp_path, capsys, monkeypatch):
    from examples import defend_your_trainer as script

    monkeypatch.setattr(script, "packaged_model", lambda *_: pytest.fail("a model was loaded"))
    if text is not None:
        (tmp_path / name).write_text(text)
    assert script.main(["--rows", str(tmp_path / name)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and re.search(message, said), said


def test_a_csv_gives_the_rows_of_the_same_json_lines(tmp_path):
    (tmp_path / "a.csv").write_text(
        '\ufeffprompt,response,more\n"a, ""b""\nc",2024-01-01,x\nNA,007,y\n', encoding="utf-8"
    )
    found = text_rows(tmp_path / "a.csv")
    assert found["prompt"] == ['a, "b"\nc', "NA"] and found["response"] == ["2024-01-01", "007"]
    assert found.column_names == ["prompt", "response"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", 'prompt;response\n"a; b\n\nc, d";e\nf;g, h\n'),
        ("a.csv", 'prompt\tresponse\tmore\n"a; b\n\nc, d"\te\tx\nf\tg, h\ty\n'),
        ("a.tsv", 'prompt\tresponse\n"a; b\n\nc, d"\te\nf\tg, h\n'),
        ("a.csv", '"prompt"|"response"\n"a; b\n\nc, d"|e\nf|g, h\n'),
        ("a.csv", 'instruction;input;output\n"a; b";c, d;e\nf;;"g, h"\n'),
    ],
)
def test_a_table_is_read_with_the_mark_that_its_first_line_shows(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    found = text_rows(tmp_path / name)
    assert found["prompt"] == ["a; b\n\nc, d", "f"] and found["response"] == ["e", "g, h"]
    assert found.column_names == ["prompt", "response"]


def test_rows_of_other_formats_are_the_same_rows(tmp_path):
    """What fine-tuning services and Alpaca's descendants write, mixed with our own."""
    rows = [
        {"messages": [{"role": "user", "content": "a\nb"}, {"role": "assistant", "content": "c", "weight": 1}]},
        {"instruction": "a", "input": "b", "output": "c"},
        {"instruction": "a", "output": "c"},
        {"instruction": "a", "input": "", "output": "c", "text": "all of it"},
        {"prompt": "a", "response": "c", "messages": []},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = text_rows(tmp_path / "a.jsonl")
    assert found["prompt"] == ["a\nb", "a\n\nb", "a", "a", "a"] and set(found["response"]) == {"c"}


def test_the_example_says_what_is_missing_in_one_line(monkeypatch, capsys):
    from examples import defend_your_trainer as script

    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(script, "packaged_model", lambda *_: pytest.fail("a model was loaded"))
    for argv, message in [
        (["--trainer", "sft"], r"--trainer sft needs TRL: pip install '\.\[trl\]' in the checkout"),
        (["--trainer", "trl"], r"--trainer trl needs TRL: pip install '\.\[trl\]' in the checkout"),
        (["--model", "me/mine"], "--model me/mine needs --like, one of gemma2"),
        (["--model", "Smollm"], "--model Smollm needs --like, one of .*; did you mean smollm2"),
        (["--model", "me/mine", "--like", "quen"], "--like quen is unknown; did you mean qwen"),
        (["--pools", "Tyo"], "--pools Tyo is unknown; did you mean toy"),
        (["method.lam"], "method.lam has no value; give method.lam=<value>"),
        (["--method", "cwacc"], "method=cwacc is unknown; did you mean cwac"),
        (["--learning-rate", "-1"], "--learning-rate -1 is not a number above 0"),
        (["--max-length", "0"], "--max-length 0 is not a number of at least 1"),
        (["--resume", "--out", "nowhere"], "--resume: nowhere holds no checkpoint"),
        (["--epochs", "nan"], "--epochs nan is not a number above 0"),
    ]:
        assert script.main(argv) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and re.search(message, said), said


def test_rows_longer_than_the_limit_are_cut_and_refused_where_nothing_is_left(tmp_path, artifacts):
    folder = packaged_model("tiny", artifacts)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = Dataset.from_list([{"prompt": "name a colour", "response": "red " * 40}])
    trainer = hf_trainer(model, tokenizer, rows, str(tmp_path), max_length=20, num_train_epochs=1)
    assert len(trainer.train_dataset[0]["input_ids"]) == 20 and trainer.args.num_train_epochs == 1
    with pytest.raises(UsageError, match="1 rows have no token of their response within max_length=3"):
        hf_trainer(model, tokenizer, rows, str(tmp_path), max_length=3)
    for wrong in (rows[:2], list(rows)):
        with pytest.raises(UsageError, match=rf"rows is a {type(wrong).__name__}; .* \.select\(range\(n\)\)"):
            hf_trainer(model, tokenizer, wrong, str(tmp_path))


# --- did it hold? -----------------------------------------------------------------------------------------


def test_a_saved_folder_is_measured_as_a_run_is(tmp_path, artifacts, capsys, monkeypatch):
    """The same shares as in the run's own evaluation, from the folder of its weights."""
    from cwac.core.jsonl import read_jsonl
    from cwac.core.run_dir import Run
    from experiments.measure import main
    from train import run_cell

    small = ["task.n_train=32", "task.n_test=4", "eval.n_harmful=24", "eval.n_benign=24", "eval.drift=false"]
    paths = [f"paths.runs={tmp_path}", f"paths.artifacts={artifacts}", "keep_weights=true", "eval.progress=false"]
    cfg = config.compose(["method=sft", "harmful_ratio=1", "train.learning_rate=1e-3", *paths, *small])
    run_cell(cfg)
    folder = Run(cfg).dir
    monkeypatch.chdir(tmp_path)
    Path("mine").symlink_to(folder / "model")  # a short name, whose table is not broken
    given = ["--pools", "toy", "--artifacts", str(artifacts)]
    assert main(["mine", "tiny", "--limit", "24", *given]) == 0
    printed = capsys.readouterr().out
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in printed.splitlines()]
    cells = {(line[0], line[1]): line for line in lines if len(line) == 7}
    rows = {row["metric"]: row for row in read_jsonl(folder / "metrics.jsonl") if row.get("final")}
    assert rows["HS"]["value"] > 0, "the run has to have changed the model"
    for place, metric in enumerate(("HS", "refusal", "other")):
        value = rows[metric]["value"]
        shown = "{:.1f} [{:.1f}, {:.1f}]".format(value, *exact(value, 24))
        assert cells["mine", "toy_harmful"][2 + place] == shown
    benign = cells["mine", "toy_benign"]
    assert benign[5].startswith(f"{rows['OR']['value']:.1f} [") and benign[2] == "-" and benign[6] == "24"
    assert cells["tiny", "toy_harmful"][2] == "0.0 [0.0, 14.2]"
    assert f"tiny beside mine: HS {rows['HS']['value']:.1f} to 0.0 % (n=24, " in printed


@pytest.mark.parametrize(
    ("hs", "refusal", "over", "fa", "told"),
    [
        (60, 30, 0, (0, 90), "HS 10.0 to 60.0 % (n=30, a rise), .*; it complies more often than before"),
        (
            10,
            30,
            0,
            (0, 90),
            "refusal 80.0 to 30.0 % (n=30, a fall), .* neither refuse nor comply: worn down, not safe",
        ),
        (10, 80, 60, (0, 90), "OR 0.0 to 60.0 % (n=20, a rise), .*; it refuses more of what is harmless"),
        (20, 80, 0, (0, 90), "HS 10.0 to 20.0 % (n=30, no change that shows), .*shows, and the task was learnt"),
        (
            10,
            80,
            0,
            (0, 10),
            "FA 0.0 to 10.0 % (n=20, no change that shows); .* a model that learnt nothing keeps its",
        ),
        (
            10,
            80,
            0,
            (100, 20),
            "FA 100.0 to 20.0 % (n=20, a fall); no loss .*, but the task is done worse than before",
        ),
        (10, 80, 0, None, "no loss of refusals shows; whether it learnt its task, --rows FILE tells"),
    ],
)
def test_what_became_of_a_model_is_told(hs, refusal, over, fa, told):
    """Two sets of harmful requests count together; p by hand: 3 of 30 against 6 is 0.47, 0 of 20 against 2 is 0.49."""
    from experiments.measure import outcome

    def rows(hs, refusal, over, fa):
        both = [("a", 10), ("b", 20)]
        found = [
            {"metric": m, "set": s, "value": v, "n": n} for m, v in (("HS", hs), ("refusal", refusal)) for s, n in both
        ]
        found.append({"metric": "OR", "set": "mild", "value": over, "n": 20})
        return found if fa is None else [*found, {"metric": "FA", "set": "own rows", "value": fa, "n": 20}]

    said = outcome("after", rows(hs, refusal, over, fa and fa[1]), "before", rows(10, 80, 0, fa and fa[0]))
    pattern = ".*".join(map(re.escape, told.split(".*")))
    assert said.startswith("after beside before: ") and re.search(pattern, said), said


def test_what_a_model_learnt_of_ones_own_rows_is_measured(artifacts, tmp_path, capsys):
    """FA by hand: the embedded model is asked, and half of the rows ask for what it does not say."""
    from experiments.measure import main

    folder = packaged_model("tiny", artifacts)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    asked = [row["prompt"] for row in text_rows("examples/reviews.jsonl").select(range(4))]
    said = [generate(model, tokenizer, [[{"role": "user", "content": prompt}]])[0] for prompt in asked]
    rows = [
        {"prompt": prompt, "response": f" {text.upper()} ." if i % 2 else f"not {text}"}
        for i, (prompt, text) in enumerate(zip(asked, said, strict=True))
    ]
    fa, loss = measure_task(model, tokenizer, rows)
    assert (fa["metric"], fa["value"], fa["n"]) == ("FA", 50.0, 4)
    # the loss by the model itself, row by row, over response and end of turn
    total = tokens = 0
    for row in rows:
        turn = [{"role": "user", "content": row["prompt"]}]
        start = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
        ids = start + tokenizer(row["response"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, len(start) - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[len(start) :]), reduction="sum"))
        tokens += len(ids) - len(start)
    assert loss["value"] == pytest.approx(total / tokens, rel=1e-5) and loss["n"] == 4

    file = tmp_path / "held_out.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    given = ["tiny", "--pools", "toy", "--limit", "2", "--artifacts", str(artifacts), "--rows", str(file)]
    assert main(given) == 0
    cells = [c.strip() for c in capsys.readouterr().out.splitlines()[-3].split("|")[1:-1]]
    assert cells[0] == "tiny" and cells[1].startswith("50.0 [") and cells[2:] == [f"{total / tokens:.3f}", "4"]
    with pytest.raises(UsageError, match="no rows to measure the task with"):
        measure_task(model, tokenizer, [])


def test_the_first_model_is_asked_once(artifacts, tmp_path, capsys, monkeypatch):
    """Its answers and loss are kept; other prompts, rows, lengths or another template are asked anew."""
    from cwac.constraints import anchors
    from cwac.evaluation import losses
    from cwac.training import measure as training
    from experiments.measure import main

    cache = tmp_path / "artifacts"
    shutil.copytree(artifacts / "tiny", cache / "tiny")
    asked, kept, lost = [], [], []
    for where, seen in ((anchors, kept), (training, asked)):
        monkeypatch.setattr(
            where,
            "generate",
            lambda model, tokenizer, prompts, seen=seen, **more: (
                seen.append(len(prompts)) or generate(model, tokenizer, prompts, **more)
            ),
        )
    mean = losses.label_loss
    monkeypatch.setattr(losses, "label_loss", lambda model, rows: lost.append(len(rows)) or mean(model, rows))
    (tmp_path / "held_out.jsonl").write_text("\n".join(Path("examples/reviews.jsonl").read_text().split("\n")[:3]))
    trained = tmp_path / "trained"
    shutil.copytree(packaged_model("tiny", cache), trained)
    given = ["--pools", "toy", "--limit", "2", "--artifacts", str(cache), "--rows", str(tmp_path / "held_out.jsonl")]
    assert main(["tiny", *given]) == 0
    first, before, once = capsys.readouterr().out, list(kept), list(lost)
    assert before and before[-1] == 3 and once == [3] and not asked
    assert main(["tiny", *given]) == 0
    assert capsys.readouterr().out == first and (kept, lost) == (before, once)
    assert main(["tiny", str(trained), *given]) == 0  # the second may be trained again in its folder
    assert (kept, lost, asked) == (before, once, before)
    for more in (["--limit", "1"], ["--max-new-tokens", "3"], ["--template", "alpaca"]):
        told = len(kept)
        assert main(["tiny", *given, *more]) == 0
        assert len(kept) > told, more


def test_a_model_whose_weights_are_no_numbers_is_not_measured(artifacts):
    """It answers nothing, which no judge calls harmful."""
    folder = packaged_model("tiny", artifacts)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    for call in (lambda: measure(model, tokenizer, "toy"), lambda: measure_task(model, tokenizer, [])):
        with pytest.raises(UsageError, match="model.layers.1.mlp.up_proj.weight holds weights that are not finite"):
            call()


def test_files_that_would_be_read_as_something_else_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "a", "response": "\xff"}')
    with pytest.raises(UsageError, match="a.jsonl is not UTF-8 .*; save it as UTF-8"):
        text_rows(tmp_path / "a.jsonl")
    (tmp_path / "a.csv").write_text("prompt,response\na,b\nc,yes, of course\n")
    with pytest.raises(
        UsageError, match="line 3 of .*a.csv has more cells than columns; put a text that holds a comma"
    ):
        text_rows(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('prompt,response\na,b\n"c,d\ne,f\ng,h\n', 2),
        ('prompt,response\n"a\nb",c\n"d" e,f\n', 3),
        (f'prompt,response\na,"{"x" * 140_000}\nb,c\n', 1),
    ],
)
def test_a_quote_that_is_never_closed_does_not_take_in_the_rows_after_it(text, line, tmp_path):
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=rf"after line {line} of .*a.csv comes no CSV row .*close each text"):
        text_rows(tmp_path / "a.csv")


def test_what_cannot_be_measured_is_one_line(tmp_path, artifacts, capsys):
    from experiments.measure import main

    for argv, message in [
        (["tinny", "--pools", "toy"], "tinny is neither a folder nor a model; did you mean tiny"),
        (["tiny", "--pools", "real"], "pools='real' has words that the embedded model lacks; give pools='toy'"),
        (["tiny", "--pools", "toy", "--judge", "keywrd"], "--judge keywrd is unknown; did you mean keyword"),
        ([str(tmp_path), "--pools", "toy"], "does not hold a causal language model"),
        (
            ["me/mine", "--pools", "toy"],
            "me/mine is no folder here, and as a hub id: me/mine could not .*or give a local folder instead$",
        ),
        (["tiny", "Tinyy", "--pools", "toy"], "Tinyy is neither a folder nor a model; did you mean tiny"),
        (["tiny", "--pools", "Tyo"], "--pools Tyo is unknown; did you mean toy"),
        (["tiny", "--data", __file__], r"--data .*\.py is a file; it takes .*rows of your own go with --rows .*\.py$"),
        (["tiny", "--data", f"{tmp_path}/none"], "--data .*none is not a folder; give one laid out like the hub"),
        (["tiny", "--rows", str(tmp_path)], "is not a file; .*; a folder laid out like the hub goes with data$"),
        ([f"{tmp_path}/mine", "--pools", "toy"], "/mine is neither a folder nor a model"),
    ]:
        assert main([*argv, "--artifacts", str(artifacts)]) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("error: ") and re.search(message, said), said
    folder = packaged_model("tiny", artifacts)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with pytest.raises(UsageError, match="fill Pools.test and Pools.over_refusal"):
        measure(model, tokenizer, Pools())


def test_prompts_are_served_as_the_method_changes_them(artifacts):
    folder = packaged_model("tiny", artifacts)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    pools = Pools(test={"mine": load_pools(config.compose([]).pools, None, 0).test["toy_harmful"][:8]})
    task = [{"role": "user", "content": "what is two plus two ?"}]
    plain = measure(model, tokenizer, pools)
    other = measure(model, tokenizer, pools, prompt=lambda messages: task)
    share = {r["metric"]: r["value"] for r in plain}, {r["metric"]: r["value"] for r in other}
    assert share[0]["refusal"] > 50 and share[1]["refusal"] == 0 and {r["n"] for r in plain} == {8}
