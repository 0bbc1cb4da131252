"""Constrained SFT: its weights and gradient against the paper's loss, degenerate cases, layouts, bad input."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from cwac.core.errors import UsageError
from cwac.core.jsonl import read_jsonl
from cwac.core.run_dir import Run
from cwac.data.tokenize import IGNORE, Collator
from cwac.methods.base import Method
from cwac.methods.constrained_sft import ConstrainedSFT
from tests.conftest import make_llama, random_rows
from tests.helpers import layouts
from tests.helpers.layouts import close, final_weights
from tests.helpers.training import cell
from train import run_cell


def batch_of(n=3, answers=(7, 2, 4)):
    """Rows whose answers have different lengths, one of them shorter than the first five tokens."""
    rows = random_rows(n, low=10, high=12)
    for row, length in zip(rows, answers, strict=True):
        ids = row["input_ids"]
        row["labels"] = [IGNORE] * (len(ids) - length) + list(ids[-length:])
    return Collator(2)(rows), rows


def prepared(model, batches, **settings):
    method = ConstrainedSFT("constrained_sft", **settings)
    method.setup(model, SimpleNamespace())
    for i, batch in enumerate(batches):
        method.batch(batch, 0, (i, len(batches)))
    return method


def moved(model, seed=1, size=0.3):
    torch.manual_seed(seed)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.add_(size * torch.randn_like(layer.mlp.down_proj.weight))
    return model


def of_the_paper(model, initial, rows, b=(0.5, 2.0, 2.0, 2.0, 2.0), rest=0.1):
    """Mean over all answers' tokens of -2 / b_t log sigmoid(b_t log (pi / pi_0)), row by row."""
    terms = []
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), row["labels"]
        first = next(i for i, label in enumerate(labels) if label != IGNORE)
        now, then = (m(ids).logits[0].log_softmax(-1) for m in (model, initial))
        for t, i in enumerate(range(first, len(labels))):
            beta = b[t] if t < len(b) else rest
            delta = now[i - 1, labels[i]] - then[i - 1, labels[i]].detach()
            terms.append(-2 / beta * functional.logsigmoid(beta * delta))
    return torch.stack(terms).mean()


def test_the_gradient_is_that_of_the_papers_loss(llama):
    """Cross-entropy and penalty together, at the official values; the paper's loss is written out by hand."""
    batch, rows = batch_of()
    initial = make_llama()
    method = prepared(llama, [batch], beta=0.1)
    moved(llama)
    logits = llama(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    task = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORE
    )
    (task + method.penalty(llama, 0)).backward()
    found = {n: p.grad.clone() for n, p in llama.named_parameters()}
    llama.zero_grad()
    of_the_paper(llama, initial, rows).backward()
    for name, p in llama.named_parameters():
        assert p.grad.any() and torch.allclose(found[name], p.grad, rtol=1e-3, atol=1e-6), name


def test_the_weights_by_hand():
    method = ConstrainedSFT("constrained_sft")
    labels = torch.tensor([[IGNORE, IGNORE, 4, 5, 6, 7, 8, 9, IGNORE]])
    then = torch.zeros(1, 8)
    w = method.weights(torch.ones(1, 8), then, labels)[0, 1:7]
    sigmoid = [1 / (1 + 2.718281828459045**-b) for b in (0.5, 2, 2, 2, 2, 0.1)]
    assert w.tolist() == pytest.approx([2 * (1 - s) for s in sigmoid], rel=1e-5)
    assert torch.allclose(method.weights(then, then, labels), torch.ones(1, 8))
    assert method.weights(torch.full((1, 8), 1e4), then, labels)[0, 1:7].tolist() == pytest.approx([1e-3] * 6)
    assert method.weights(torch.full((1, 8), -1e4), then, labels)[0, 2] == pytest.approx(2)


def test_at_the_start_it_asks_for_nothing(llama):
    method = prepared(llama, [batch_of()[0]])
    penalty = method.penalty(llama, 0)
    penalty.backward()
    assert penalty.item() == 0 and penalty.dtype == torch.float32
    assert all(p.grad is None or not p.grad.any() for p in llama.parameters())
    assert method.extra_data() == {}


def test_with_beta_0_it_is_sft_bit_for_bit(tmp_path, artifacts):
    ends = []
    for name, keys in (("sft", []), ("constrained_sft", ["method.beta=0"])):
        cfg = cell(name, tmp_path / name, artifacts, *keys, "eval.drift=false")
        run_cell(cfg)
        ends.append(Run(cfg).status["weights_sha256"])
        assert all(r["penalty"] is None for r in read_jsonl(Run(cfg).dir / "train_log.jsonl"))
    assert ends[0] == ends[1]


def test_accumulation_changes_nothing_and_the_constraint_something(tmp_path, monkeypatch):
    def build(model):
        method = ConstrainedSFT("constrained_sft")
        method.setup(model, SimpleNamespace())
        return method

    monkeypatch.setattr(layouts, "penalised", build)
    whole, split = final_weights(tmp_path / "a", 8, 1), final_weights(tmp_path / "b", 1, 8)
    assert close(whole, split) < 1e-5
    monkeypatch.setattr(layouts, "penalised", lambda model: Method("sft"))
    assert close(whole, final_weights(tmp_path / "c", 8, 1)) > 1e-4


def test_only_the_micro_batches_of_the_step_count(llama):
    batch, _ = batch_of()
    method = prepared(llama, [batch])
    moved(llama)
    method.batch(batch, 1, (0, 1))
    alone = method.penalty(llama, 1).item()
    method.batch(copy.deepcopy(batch), 2, (0, 1))
    assert alone == method.penalty(llama, 2).item() != 0


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"beta": -0.1}, r"method\.beta=-0\.1"),
        ({"factor": float("nan")}, r"method\.factor=nan"),
        ({"first_factor": -1}, r"method\.first_factor=-1"),
        ({"length": 2.5}, r"method\.length=2\.5"),
    ],
)
def test_a_value_that_cannot_be_is_refused(keys, said):
    with pytest.raises(UsageError, match=said):
        ConstrainedSFT("constrained_sft", **keys)
