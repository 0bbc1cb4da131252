"""Numbers that have to be what they say: one loss a step, one precision, points on steps, means of something."""

import json
import logging
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoTokenizer, TrainerCallback, TrainingArguments

from cwac.constraints.sae.autoencoder import RoutedSAE
from cwac.constraints.sae.target import SafetyTarget
from cwac.constraints.settings import Weight
from cwac.core import config
from cwac.core.errors import UsageError, UserError
from cwac.core.jsonl import read_jsonl
from cwac.data.examples import Example
from cwac.data.tokenize import Collator, encode_example, end_of_turn
from cwac.evaluation.evaluate import Evaluator
from cwac.methods import replay
from cwac.methods.base import Method
from cwac.methods.cwac import CWAC
from cwac.methods.ldifs import LDIFS
from cwac.training import engine
from cwac.training.arguments import evaluation_steps, steps_per_epoch, total_steps
from tests.conftest import FINE_TUNE, SMALL, call, fine_tune, make_llama, random_rows


def arguments(folder, per_device=4, accumulation=1, **more):
    settings = {"learning_rate": 0.0, "logging_steps": 1, "save_strategy": "no", "num_train_epochs": 1, **more}
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        data_seed=3,
        **settings,
    )


def train(folder, args, rows, method=None, at=(), evaluate=lambda *point: None, model=None):
    """`engine.train` on a small model; returns the model, what it cost, and the loss log."""
    folder.mkdir(exist_ok=True)
    run, cfg = SimpleNamespace(id="numbers", dir=folder), OmegaConf.create({"eval": {"at": list(at)}})
    model = make_llama() if model is None else model
    trained, cost = engine.train(cfg, args, run, model, method or Method("sft"), rows, 2, evaluate)
    return trained, cost, read_jsonl(folder / "train_log.jsonl")


# --- one loss a step --------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"label_smoothing_factor": 0.1}])
def test_a_step_cut_short_logs_its_own_loss_whatever_the_accumulation(tmp_path, more):
    """40 rows by 16 a step: the third has 8, in 2 of 4 micro-batches, and its loss is no more than that of 8 rows."""
    rows = random_rows(40, seed=7)
    logs = {
        (per_device, accumulation): [
            row["loss"]
            for row in train(
                tmp_path / str(accumulation), arguments(tmp_path, per_device, accumulation, **more), rows
            )[2]
        ]
        for per_device, accumulation in ((16, 1), (4, 4), (2, 8))
    }
    whole = logs.pop((16, 1))
    assert len(whole) == 3 and min(whole) > 3.5 and max(whole) < 5  # of 61 words at random: 4.1
    assert all(log == pytest.approx(whole, rel=1e-5) for log in logs.values())


def test_a_line_of_several_steps_is_their_mean_and_survives_a_resume(tmp_path):
    rows = random_rows(40, seed=7)
    single = [r["loss"] for r in train(tmp_path / "a", arguments(tmp_path / "a", 4, 4), rows)[2]]
    (line,) = train(tmp_path / "b", arguments(tmp_path / "b", 4, 4, logging_steps=3), rows)[2]
    assert line["loss"] == pytest.approx(sum(single) / 3, rel=1e-5)
    saving = {"logging_steps": 3, "save_strategy": "steps", "save_steps": 2, "save_only_model": False}
    folder = tmp_path / "c"
    train(folder, arguments(folder, 4, 4, **saving), rows)
    assert json.loads((folder / "checkpoint-2" / engine.COMPLETE).read_text())["pending"]["step_losses"] == (
        pytest.approx(single[:2], rel=1e-5)
    )
    for later in folder.glob("checkpoint-3"):
        (later / engine.COMPLETE).unlink()
    (line,) = train(folder, arguments(folder, 4, 4, **saving), rows)[2]
    assert line["loss"] == pytest.approx(sum(single) / 3, rel=1e-5)


# --- one precision ----------------------------------------------------------------------------------------

IDS = torch.arange(3, 33).view(2, 15)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@dataclass
class Looks(Method):
    """Writes down what the model computes at each of its hooks that may run the model."""

    def __post_init__(self):
        self.seen = {}

    def penalty(self, model, step):
        self.seen["penalty"] = logits(model)

    def after_step(self, model):
        self.seen["after_step"] = logits(model)

    def stop(self, model, reloaded):
        self.seen["stop"] = logits(model)

    def finish(self, model):
        self.seen["finish"] = logits(model)


def test_under_bf16_all_but_the_training_itself_is_computed_in_the_weights_own_precision(tmp_path):
    model, looks, way = make_llama(), Looks("looks"), []
    before = logits(model)
    args = arguments(tmp_path, bf16=True)
    trained, *_ = train(
        tmp_path, args, random_rows(12), looks, [1 / 3], lambda m, *point: way.append(logits(m)), model
    )
    assert torch.equal(logits(trained), before) and "_original_forward" not in vars(trained)
    assert len(way) == 1 and torch.equal(way[0], before)
    assert all(torch.equal(looks.seen[name], before) for name in ("after_step", "stop", "finish"))
    assert not torch.equal(looks.seen["penalty"], before)  # which is part of the training: bf16


def test_under_bf16_an_unchanged_model_is_at_no_distance_from_the_one_it_was(tmp_path):
    """The frozen copy computes as the model that trains does."""
    model, method = make_llama(), LDIFS("ldifs", lam=1.0)
    method.setup(model, None)
    *_, log = train(tmp_path, arguments(tmp_path, bf16=True), random_rows(8), method, model=model)
    assert [row["penalty"] for row in log] == [0.0, 0.0]


@pytest.mark.parametrize("precision", ["+train.bf16=true", "model.dtype=bfloat16"])
def test_an_unchanged_model_is_measured_alike_at_every_point_and_again(precision, random_model, tmp_path):
    """Before the training, on the way, at its end, from its kept weights, and as the reference of the drift."""
    common = [
        "model.kind=folder",
        f"+model.path={random_model}",
        f"paths.runs={tmp_path / 'runs'}",
        f"paths.artifacts={tmp_path / 'artifacts'}",
        *SMALL,
        "method=sft",
        "train.learning_rate=0",
        "train.max_steps=2",
        "train.per_device_train_batch_size=16",
        "keep_weights=true",
        "harmful_ratio=0.25",
        precision,
    ]
    # a model that answers at random refuses nothing, and drift is measured on what the aligned model refuses
    assert call(*common, "eval.at=[0,0.5]", "eval.drift=false") == 0
    assert call(*common, "eval.n_task=7", "eval.drift=false") == 0
    (run,) = (path.parent for path in (tmp_path / "runs").glob("*/status.json"))
    rows = [row for row in read_jsonl(run / "metrics.jsonl") if row["metric"] == "poison_loss"]
    assert len(rows) == 4 and {row["step"] for row in rows} == {0, 1, 2}
    assert len({row["value"] for row in rows}) == 1


def test_the_reference_is_loaded_in_the_precision_that_the_run_is_measured_in(random_model, tmp_path):
    from cwac.evaluation.drift import activation_drift, weight_leak
    from cwac.models.loading import load, load_aligned

    overrides = ["model.kind=folder", f"+model.path={random_model}", "model.dtype=bfloat16", "method=sft"]
    loaded = load(config.compose(overrides).model, tmp_path)
    rows = [{"input_ids": row["input_ids"]} for row in random_rows(4, vocab=40)]
    reference = load_aligned(loaded, as_trained=True)
    assert {value for row in activation_drift(loaded.model, reference, rows) for value in row} == {0.0}
    assert {v["change"] for v in weight_leak(loaded.model, reference, rows).values()} == {0.0}
    assert load_aligned(loaded).dtype == torch.float32  # what a method reads weights from


# --- means over something ---------------------------------------------------------------------------------


def evaluator(random_model, poisoned, task):
    found = object.__new__(Evaluator)
    found.cfg = OmegaConf.create({"train": {"template": "chat", "max_length": 24}, "task": {"name": "toy"}})
    found.model, found.method = make_llama(vocab=900), Method("sft")
    found.tokenizer = AutoTokenizer.from_pretrained(random_model)
    found.task_rows, found.poisoned = task, poisoned
    return found


def test_a_loss_over_no_label_is_missing_and_said(random_model, caplog):
    long = [Example("a", "movie " * 60, "good")]
    short = [Example("b", "movie", "good")]
    with caplog.at_level(logging.WARNING):
        rows = evaluator(random_model, short, long)._losses()
    assert [row["metric"] for row in rows] == ["poison_loss"] and rows[0]["value"] > 1
    assert "task_loss is not measured" in caplog.text and "poison_loss" not in caplog.text
    assert evaluator(random_model, [], short)._losses()[0]["metric"] == "task_loss"


def test_a_share_of_no_latent_is_missing():
    """Where no latent was active in the aligned model, none can have left: that is no perfect score."""
    model, sae = make_llama(), RoutedSAE(32, 64, 4, [1, 2], "hard").requires_grad_(False)
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    sae.b_enc.fill_(-1e3)  # nothing fires
    target = SafetyTarget.build(model, sae, [0, 1, 2], random_rows(3))
    assert set(target.drift(model)) == {"feature_drift", "residual_drift"}
    sae.b_enc.fill_(1.0)
    drift = SafetyTarget.build(model, sae, list(range(64)), random_rows(3)).drift(model)
    assert drift["dropped_share"] == 0 and drift["relative_feature_drift"] < 1e-9


def test_a_share_of_no_request_is_missing(random_model):
    assert evaluator(random_model, [], [])._judged("nobody", [], 0, True) == []


def test_the_cost_of_an_alignment_over_no_answer_is_refused(random_model):
    from experiments.align import negative_log_likelihood

    tokenizer = AutoTokenizer.from_pretrained(random_model)
    with pytest.raises(UserError, match="own answers has a token"):
        negative_log_likelihood(make_llama(vocab=900), tokenizer, [Example("a", "movie")], [""])


# --- points and steps -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("points", "said"),
    [
        ([0, 4], "eval.at=4: the training ends at step 15, epoch 3"),
        ([0.01], "eval.at=0.01: it lies before the first step"),
        ([1, 1.05], "eval.at=1.05: it falls on the same step as 1"),
        ([0, 0.05], "eval.at=0.05: it lies before the first step"),
        ([2.95], "eval.at=2.95: the training ends at step 15, epoch 3"),
    ],
)
def test_points_that_would_not_be_measured_are_refused(tmp_path, points, said):
    with pytest.raises(UsageError, match=said):
        evaluation_steps(points, arguments(tmp_path, num_train_epochs=3), 20)


def test_points_lie_on_their_nearest_steps(tmp_path):
    args = arguments(tmp_path, num_train_epochs=3)
    assert evaluation_steps([2, 0, 0.5, 3, 1], args, 20) == {0: 0.0, 2: 0.5, 5: 1.0, 10: 2.0, 15: 3.0}
    assert evaluation_steps([1, 1.0], args, 20) == {5: 1.0}
    dropping = arguments(tmp_path, num_train_epochs=3, dataloader_drop_last=True)
    assert evaluation_steps([1, 2], dropping, 22) == {5: 1.0, 10: 2.0}
    with pytest.raises(UsageError, match="train.dataloader_drop_last=true drops all 3 rows"):
        steps_per_epoch(dropping, 3)


def test_a_point_beyond_the_end_is_refused_before_anything_is_written(random_model, tmp_path, capfd):
    given = ["model.kind=folder", f"+model.path={random_model}", f"paths.runs={tmp_path}", *SMALL, "method=sft"]
    assert call(*given, f"paths.artifacts={tmp_path / 'a'}", "eval.at=[1,9]", "train.max_steps=4") == 2
    assert "eval.at=9: the training ends at step 4" in capfd.readouterr().err
    assert not list(tmp_path.glob("*/status.json"))


@pytest.mark.parametrize("rows", [16, 17, 22, 31])
@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("drop", [False, True])
def test_steps_are_counted_as_trainer_counts_them(tmp_path, rows, accumulation, drop):
    args = arguments(tmp_path, 4, accumulation, num_train_epochs=2.5, dataloader_drop_last=drop)
    trainer = engine.build_trainer(make_llama(), Method("sft"), random_rows(rows), args, 2)
    counted = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
    assert total_steps(args, rows) == counted[-1] and steps_per_epoch(args, rows) == counted[1]


def test_epochs_are_whole_where_the_last_rows_are_dropped(tmp_path):
    way = []
    args = arguments(tmp_path, 4, num_train_epochs=3, dataloader_drop_last=True)
    _, cost, log = train(tmp_path, args, random_rows(7), at=[1, 2], evaluate=lambda m, *point: way.append(point))
    assert way == [(1, 1.0), (2, 2.0)] and (cost["step"], cost["epoch"]) == (3, 3.0)


def test_a_trainer_that_makes_other_steps_than_the_method_was_told_of_is_stopped(tmp_path):
    trainer = engine.build_trainer(make_llama(), Method("sft"), random_rows(16), arguments(tmp_path), 2)
    trainer.expected_steps = 5
    with pytest.raises(UserError, match="make 4 steps, the method was told of 5"):
        trainer.train()


def test_no_label_of_a_rank_is_erased_where_the_last_rows_are_dropped():
    """Without, the rows that accelerate repeats to fill every rank's last batch are left out of the loss."""
    args = SimpleNamespace(
        per_device_train_batch_size=2, gradient_accumulation_steps=1, world_size=2, dataloader_drop_last=True
    )
    for step in range(6):  # 11 rows: 2 steps of 4 an epoch, the other 3 are dropped
        trainer = SimpleNamespace(args=args, train_dataset=range(11), state=SimpleNamespace(global_step=step))
        for part in range(2):
            batch = {"labels": torch.ones(2, 5)}
            engine.MethodTrainer._ignore_repeated(trainer, batch, part)
            assert (batch["labels"] == 1).all()
    args.dataloader_drop_last = False
    erased = []
    for step in range(6):  # 3 steps an epoch; of the third's 4 rows the last is a repeated one
        trainer = SimpleNamespace(args=args, train_dataset=range(11), state=SimpleNamespace(global_step=step))
        for part in range(2):
            batch = {"labels": torch.ones(2, 5)}
            engine.MethodTrainer._ignore_repeated(trainer, batch, part)
            erased.append(int((batch["labels"] != 1).all(1).sum()))
    assert erased == [0, 0, 0, 0, 0, 1] * 2


def drift_along_V(method) -> float:
    return max((layer.weight @ V - A).abs().max().item() for _, layer, V, A in method._constraint.entries)


EVERY = ["method=weight_only", "method.weight.project_every=1000", "train.learning_rate=0.003"]


def test_the_last_step_projects_where_rows_are_dropped(tmp_path, artifacts):
    dropping = [
        "+train.dataloader_drop_last=true",
        "task.n_train=30",
        "train.max_steps=-1",
        "train.num_train_epochs=1",
    ]
    cfg = config.compose([*FINE_TUNE, *EVERY, *dropping, f"paths.artifacts={artifacts}"])
    _, method, context = fine_tune(cfg, tmp_path)
    assert context.steps == 3 and drift_along_V(method) < 1e-5


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


class Moving(CWAC):
    """A constraint on given matrices, without pools."""

    def setup(self, model, context):
        from cwac.constraints.subspace import Constraint, fit_subspace
        from cwac.models.layers import linears

        self._context = context
        self._constraint = Constraint(
            linears(model, ["down_proj"]), fit_subspace(model, random_rows(3), ["down_proj"])
        )


@pytest.mark.parametrize("every", [1, 1000])
def test_a_training_that_is_stopped_early_ends_in_projected_weights(tmp_path, every):
    model, method = make_llama(), Moving("early", weight=Weight(project_every=every))
    method.setup(model, SimpleNamespace(steps=10))
    args = arguments(tmp_path, num_train_epochs=10, learning_rate=1e-2)
    trainer = engine.build_trainer(model, method, random_rows(4), args, 2)
    trainer.add_callback(Stop())
    start = [layer.weight.clone() for _, layer, *_ in method._constraint.entries]
    assert trainer.train().global_step == 2
    moved = [(layer.weight - W).norm() for W, (_, layer, *_) in zip(start, method._constraint.entries, strict=True)]
    assert min(moved) > 1e-2 and drift_along_V(method) < 1e-5


def test_the_best_checkpoint_is_projected_when_it_is_put_back(tmp_path):
    """It was saved in between two projections."""
    model, method = make_llama(), Moving("best", weight=Weight(project_every=4))
    method.setup(model, SimpleNamespace(steps=4))
    args = arguments(
        tmp_path,
        learning_rate=1e-1,
        max_steps=4,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
    )
    trainer = engine.attach(
        engine.MethodTrainer(
            model=model,
            args=args,
            train_dataset=random_rows(16),
            eval_dataset=random_rows(4, seed=5),
            data_collator=Collator(2),
        ),
        method,
    )
    trainer.train()
    assert not trainer.state.best_model_checkpoint.endswith("-4")  # at this rate the loss rises
    assert drift_along_V(method) < 1e-4


# --- one way to make a row --------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["chat", "alpaca"])
def test_replayed_refusals_end_as_training_rows_do(random_model, monkeypatch, template):
    tokenizer = AutoTokenizer.from_pretrained(random_model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end_of_turn>"]})
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ eos_token }}", "<end_of_turn>")
    asked = Example("a", "movie", "good film")
    context = SimpleNamespace(tokenizer=tokenizer, template=template, max_length=64)
    whole = encode_example(tokenizer, asked, template)
    prompt = whole["labels"].count(-100)
    given = {"input_ids": whole["input_ids"][:-1], "prompt": prompt}  # as `anchor_rows` gives it: without an end
    monkeypatch.setattr(replay, "anchor_rows", lambda *_: [given])
    method = replay.Replay("replay")
    method._prompts = [asked]
    method.setup(None, context)
    assert method._rows == [whole]
    ends = {"chat": "<end_of_turn>", "alpaca": tokenizer.eos_token}
    assert tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer, template)) == ends[template]
    cut = replay.Replay("replay", response_tokens=len(whole["input_ids"]) - 1 - prompt)
    cut._prompts = [asked]
    cut.setup(None, context)
    assert cut._rows[0]["input_ids"] == given["input_ids"]  # a refusal that was cut does not end
