"""When the engine calls a method's hooks, and with what."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from transformers import TrainingArguments

from cwac.methods.base import Method
from cwac.training import engine
from cwac.training.arguments import total_steps
from tests.conftest import make_llama, random_rows


def arguments(folder, per_device, accumulation, **more):
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        **more,
    )


@dataclass
class Recorder(Method):
    """Adds a large gradient after the backward pass and writes down every call in order."""

    def __post_init__(self):
        self.calls = []
        self.gradients = []

    def batch(self, batch, step, part):
        self.calls.append(("batch", step, *part))
        return batch

    def after_backward(self, model):
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
        self.calls.append(("after_backward",))
        for p in model.parameters():
            p.grad.add_(100.0)

    def before_step(self, model):
        self.calls.append(("before_step", torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()))


def recorded(folder, per_device, accumulation, n_rows):
    method = Recorder("recorder")
    args = arguments(folder, per_device, accumulation, num_train_epochs=1, max_grad_norm=0.5)
    run = SimpleNamespace(id="recorder", dir=folder)
    cfg = OmegaConf.create({"eval": {"at": []}})
    engine.train(cfg, args, run, make_llama(), method, random_rows(n_rows, seed=7), 2, lambda *point: None)
    return method


@pytest.mark.parametrize("accumulation", [1, 4])
def test_after_backward_runs_once_a_step_and_before_clipping(tmp_path, accumulation):
    method = recorded(tmp_path, 8 // accumulation, accumulation, 16)
    expected = []
    for step in range(2):
        expected += [("batch", step, i, accumulation) for i in range(accumulation)]
        expected += [("after_backward",), ("before_step",)]
    assert [c if c[0] == "batch" else c[:1] for c in method.calls] == expected
    norms = [c[1] for c in method.calls if c[0] == "before_step"]
    assert norms == pytest.approx([0.5, 0.5], rel=1e-3)  # clipped, the added gradient included
    whole = recorded(tmp_path, 8, 1, 16).gradients[0]
    for name, gradient in method.gradients[0].items():  # of the whole step, not of its last part
        assert torch.allclose(gradient, whole[name], atol=1e-6), name


def test_a_step_cut_short_by_the_end_of_an_epoch_has_fewer_parts(tmp_path):
    parts = [c[1:] for c in recorded(tmp_path, 2, 4, 11).calls if c[0] == "batch"]
    assert parts == [(0, 0, 4), (0, 1, 4), (0, 2, 4), (0, 3, 4), (1, 0, 2), (1, 1, 2)]


@pytest.mark.parametrize(
    ("n_rows", "per_device", "accumulation", "more"),
    [
        (24, 8, 1, {"num_train_epochs": 3}),
        (25, 2, 4, {"num_train_epochs": 2}),
        (17, 3, 2, {"num_train_epochs": 0.5}),
        (40, 4, 1, {"max_steps": 7}),
    ],
)
def test_the_number_of_steps_is_known_beforehand(tmp_path, n_rows, per_device, accumulation, more):
    args = arguments(tmp_path, per_device, accumulation, **more)
    trainer = engine.build_trainer(make_llama(), Method("sft"), random_rows(n_rows), args, 2)
    counted = trainer.set_initial_training_values(args, trainer.get_train_dataloader())[-1]
    assert total_steps(args, n_rows) == counted


@pytest.mark.parametrize("accumulation", [1, 2])
def test_logits_at_label_positions_alone_give_the_same_gradients(tmp_path, accumulation):
    """The prompt's logits are not computed; the loss never used them."""

    @dataclass
    class Watcher(Recorder):
        def setup(self, model, context=None):
            self.columns = []
            model.lm_head.register_forward_hook(lambda m, i, output: self.columns.append(output.shape[1]))

    def gradients(label_logits):
        model, method = make_llama(), Watcher("watcher")
        method.setup(model)
        args = arguments(tmp_path, 8 // accumulation, accumulation, max_steps=1, max_grad_norm=1e9)
        trainer = engine.build_trainer(model, method, random_rows(8, low=10, seed=3), args, 2)
        trainer.label_logits = label_logits
        trainer.train()
        return method.gradients[0], sum(method.columns)

    some, few = gradients(True)
    all_of_them, many = gradients(False)
    assert few < 0.8 * many
    for name, gradient in some.items():
        assert torch.allclose(gradient, all_of_them[name], atol=1e-6), name
