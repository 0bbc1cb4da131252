"""1 x 8 == 8 x 1 == 2 ranks x 4, whole or in shards: a result does not depend on how a batch is laid out."""

import shutil
import socket
import traceback
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from cwac.core import config, distributed
from cwac.models.loading import load
from tests.conftest import FINE_TUNE, NEEDS, fine_tune, make_llama, random_rows
from tests.forked import FORKS
from tests.helpers.layouts import close, final_weights
from tests.helpers.options import METHODS

QUICK = ("sft", "cwac", "cwac_closed", "lisa", "bea", "vaccine", "lora", "ragged", "soft", "refresh")
"""One method for each way to act on a step: on the weights after it, the activations in it, the rows, the embeddings.
The others are in the slow tier: they act in the same ways, and a start of FSDP2 costs each a second and a half."""
TESTED = [*METHODS, "ragged", "lora", "soft", "refresh"]
LAYOUTS = [pytest.param(m, marks=() if m in QUICK else pytest.mark.slow) for m in TESTED]


@pytest.fixture(scope="module")
def cells(request, artifacts):
    """method -> three optimizer steps of the embedded model on 8 rows each; of the methods this session tests."""
    tested = {
        item.callspec.params["method"]
        for item in request.session.items
        if item.module is request.module and "method" in getattr(getattr(item, "callspec", None), "params", {})
    }
    overrides = [
        *FINE_TUNE,
        f"paths.artifacts={artifacts}",
        "train.learning_rate=0.01",
        "train.max_grad_norm=0",  # clipping would hide a gradient of the wrong scale
        "+train.optim=sgd",  # linear in the gradient, so a wrong scale shows in proportion
        "+train.ddp_timeout=120",
    ]
    cells = {
        name: config.compose([f"method={name}", *overrides, *NEEDS.get(name, [])])
        for name in METHODS
        if name in tested
    }
    cells["ragged"] = config.compose(["method=sft", *overrides, "task.n_train=19"])  # steps of 8, 8 and 3 rows
    cells["lora"] = config.compose(["method=cwac", *overrides, *NEEDS["salora"]])
    soft = ["method.weight.penalty_weight=1", "method.activation={space: residual, lam: 10}"]
    cells["soft"] = config.compose(["method=cwac_closed", *overrides, *soft])
    refresh = ["method.weight.refresh_steps=1", "method.activation={space: logits, positions: 'response:4'}"]
    cells["refresh"] = config.compose(["method=cwac", *overrides, *refresh])
    for cell in cells.values():
        OmegaConf.set_struct(cell, False)  # a layout adds keys
    return cells


FSDP2 = {k: v for k, v in config.compose(["parallel=fsdp2"]).train.items() if k.startswith("fsdp")}


def trained_by(cfg, folder, per_device, accumulation, **more):
    """The weights that a cell ends with under one layout; None on ranks that do not hold them."""
    layout = {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulation, **more}
    model, _, _ = fine_tune(OmegaConf.merge(cfg, {"train": layout}), folder)
    return None if model is None else {n: p.detach().clone() for n, p in model.named_parameters()}


def resumed(cfg, folder):
    """Weights of an uninterrupted run in shards, and of one that lost what came after its checkpoint of step 2."""
    found = []
    for _ in range(2):
        keys = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", **FSDP2}
        found.append(trained_by(cfg, folder, 8, 1, **keys))
        if distributed.process_rank() == 0:
            shutil.rmtree(folder / "checkpoint-3")
        distributed.wait()
    return found


def two_ranks(rank, folder, cells, port):
    import os

    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    found = {"penalised": final_weights(folder, 4, 1, rank, 2)}
    for name, cfg in cells.items():  # one start of two processes for all of them
        try:
            found[name] = trained_by(cfg, Path(folder), 8, 1)
            found[name, "fsdp2"] = trained_by(cfg, Path(folder), 8, 1, **FSDP2)
            if name in ("cwac", "lisa", "refresh"):
                found[name, "resumed"] = resumed(cfg, Path(folder) / name)
        except Exception:
            found[name, "error"] = traceback.format_exc()
    if rank == 0:
        torch.save(found, f"{folder}/two.pt")
    torch.distributed.barrier()  # a process group that is torn down while its peer still works may abort
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory, cells):
    """method -> its weights after training on two ranks, or the traceback of what went wrong there."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:  # a port that is free now
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.start_processes(
        two_ranks,
        args=(str(folder), cells, port),
        nprocs=2,
        start_method=FORKS.get_start_method(),  # torch is loaded in the server
    )
    return torch.load(folder / "two.pt", weights_only=True)


def test_accumulation_changes_nothing(tmp_path):
    whole = final_weights(tmp_path / "a", 8, 1)
    split = final_weights(tmp_path / "b", 1, 8)
    start = dict(make_llama().named_parameters())
    assert close(whole, start) > 1e-2  # it trained
    assert close(whole, split) < 1e-5


def test_two_ranks_change_nothing(tmp_path, on_two_ranks):
    assert close(final_weights(tmp_path, 8, 1), on_two_ranks["penalised"]) < 1e-5


@pytest.mark.parametrize("method", LAYOUTS)
def test_no_method_depends_on_the_layout(method, tmp_path, cells, on_two_ranks):
    assert (method, "error") not in on_two_ranks, on_two_ranks[method, "error"]
    cfg = cells[method]
    whole = trained_by(cfg, tmp_path, 8, 1)
    start = dict(load(cfg.model, Path(cfg.paths.artifacts)).model.named_parameters())
    assert close(whole, start) > 1e-3  # it trained
    assert close(whole, trained_by(cfg, tmp_path, 1, 8)) < 1e-5
    assert close(whole, on_two_ranks[method]) < 1e-5
    assert close(whole, on_two_ranks[method, "fsdp2"]) < 1e-5


@pytest.mark.parametrize("method", ["cwac", "lisa", "refresh"])
def test_shards_resume_bit_for_bit(method, on_two_ranks):
    whole, resumed = on_two_ranks[method, "resumed"]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_penalty_counts_once_per_optimizer_step(tmp_path, accumulation):
    """Its gradient at the first step equals the penalty's own, whatever the accumulation."""
    from cwac.methods.base import Method

    class OnlyPenalty(Method):
        def penalty(self, model, step):
            return sum(p.square().sum() for p in model.parameters() if p.requires_grad)

        def before_step(self, model):
            seen.append({n: p.grad.clone() for n, p in model.named_parameters()})

    class Plain(Method):
        def before_step(self, model):
            plain.append({n: p.grad.clone() for n, p in model.named_parameters()})

    seen, plain = [], []
    from transformers import TrainingArguments

    from cwac.training.engine import MethodCallback, build_trainer

    for method in (OnlyPenalty("penalty"), Plain("plain")):
        args = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            max_grad_norm=0.0,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        model = make_llama()
        trainer = build_trainer(model, method, random_rows(16, seed=7), args, 2)

        class Hooks(MethodCallback):
            def __init__(self, trainer):
                self.trainer, self.seconds, self.began = trainer, [], 0.0

            on_train_begin = on_train_end = on_step_begin = on_step_end = on_save = lambda *a, **k: None

        trainer.add_callback(Hooks(trainer))
        trainer.train()
    start = dict(make_llama().named_parameters())
    for name, gradient in seen[0].items():
        assert torch.allclose(gradient - plain[0][name], 2 * start[name], atol=1e-4), name
