"""A method that keeps what FSDP2 replaces, or whose penalty moves nothing, is refused; the page's way works."""

import os
import socket
import traceback
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from cwac.core import config
from cwac.core.errors import UserError
from cwac.training.engine import build_trainer, held_tensors, leaves_of
from tests.conftest import FINE_TUNE, fine_tune, make_llama, random_rows, sgd
from tests.forked import FORKS
from tests.remembering import Closes, Elsewhere, Remembers, Stands

FSDP2 = {k: v for k, v in config.compose(["parallel=fsdp2"]).train.items() if k.startswith("fsdp")}
WAYS = ("L2SP", "Remembers", "Closes")


def cell(way: str, artifacts: Path):
    cfg = config.compose(
        ["method=sft", *FINE_TUNE, f"paths.artifacts={artifacts}", "train.learning_rate=0.01", "+train.optim=sgd"]
    )
    OmegaConf.set_struct(cfg, False)
    cfg.method = {"_target_": f"tests.remembering.{way}", "name": way, "lam": 0.5}
    cfg.train.per_device_train_batch_size, cfg.train.max_grad_norm = 8, 0
    return cfg


def weights(model) -> dict | None:
    return None if model is None else {n: p.detach().clone() for n, p in model.named_parameters()}


def two_ranks(rank, folder, cells, port):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    found = {}
    for way, cfg in cells.items():
        try:
            model, _, _ = fine_tune(OmegaConf.merge(cfg, {"train": FSDP2}), Path(folder))
            found[way] = weights(model)
        except UserError as error:
            found[way] = f"UserError: {error}"
        except Exception:
            found[way] = traceback.format_exc()
    if rank == 0:
        torch.save(found, f"{folder}/two.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def in_shards(tmp_path_factory, artifacts):
    """way -> its weights after training on two ranks in shards, or what it said."""
    folder = tmp_path_factory.mktemp("shards")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    cells = {way: cell(way, artifacts) for way in WAYS}
    torch.multiprocessing.start_processes(
        two_ranks, args=(str(folder), cells, port), nprocs=2, start_method=FORKS.get_start_method()
    )
    return torch.load(folder / "two.pt", weights_only=True)


def apart(a: dict, b: dict) -> float:
    return max((a[n] - b[n]).abs().max().item() for n in a)


def test_the_pages_way_is_the_same_in_shards_and_differs_from_sft(tmp_path, artifacts, in_shards):
    whole = weights(fine_tune(cell("L2SP", artifacts), tmp_path)[0])
    plain = weights(fine_tune(config.compose(["method=sft", *overridden(artifacts)]), tmp_path)[0])
    assert isinstance(in_shards["L2SP"], dict), in_shards["L2SP"]
    assert apart(whole, in_shards["L2SP"]) < 1e-5 < 1e-4 < apart(whole, plain)


def overridden(artifacts) -> list[str]:
    more = ["train.learning_rate=0.01", "+train.optim=sgd", "train.max_grad_norm=0"]
    return [*FINE_TUNE, f"paths.artifacts={artifacts}", "train.per_device_train_batch_size=8", *more]


def test_in_one_process_the_penalty_is_the_same_as_the_closed_form(tmp_path, artifacts):
    """What is wrong in shards is right here: the parameters are the ones that train."""
    runs = [weights(fine_tune(cell(way, artifacts), tmp_path)[0]) for way in ("L2SP", "Remembers")]
    assert apart(*runs) < 1e-5


@pytest.mark.parametrize("way", ["Remembers", "Closes"])
def test_a_method_that_remembers_parameters_is_refused_in_shards(way, in_shards):
    said = in_shards[way]
    assert isinstance(said, str) and said.startswith(f"UserError: method={way} remembers the parameter model."), said
    assert "look parameters up in `start`" in said


def train(method, tmp_path, model=None):
    model = model or make_llama()
    method.setup(model, None)
    trainer = build_trainer(model, method, random_rows(8, seed=7), sgd(tmp_path, 4, 1), 2)
    return model, trainer


@pytest.mark.parametrize(
    ("method", "says"),
    [(Stands("x"), "has no gradient at all"), (Elsewhere("x"), "reaches no parameter that trains")],
)
def test_a_penalty_that_moves_nothing_is_refused_at_the_first_step(method, says, tmp_path):
    model, trainer = train(method, tmp_path)
    before = weights(model)
    with pytest.raises(UserError, match=f"its penalty {says}"):
        trainer.train()
    assert apart(before, weights(model)) == 0


@pytest.mark.parametrize("kind", [Remembers, Closes])
def test_parameters_replaced_by_whatever_wraps_the_model_are_found(kind, tmp_path):
    model, trainer = train(kind("x"), tmp_path)
    layer = model.model.layers[0].mlp.down_proj
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    with pytest.raises(UserError, match=r"remembers the parameter model.layers.0.mlp.down_proj.weight from `setup`"):
        trainer.train()


def test_where_a_tensor_is_held_and_where_a_gradient_goes():
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    held = {"a": [1, {"b": (p,)}], "c": lambda: q}
    assert list(held_tensors(held, {id(p): "p", id(q): "q"})) == [("self.a[1].b[0]", "p"), ("self.c:q", "q")]
    assert list(held_tensors({"m": nn.ParameterList([p])}, {id(p): "p"})) == []
    assert {id(x) for x in leaves_of((p * q.detach() + p).sum())} == {id(p)}
    assert leaves_of(q) == [q]
