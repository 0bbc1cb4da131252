"""Values that a result hangs on and that a bug could change unnoticed, each worked out by hand."""

import math
import random
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import LlamaForCausalLM

from analysis import compare
from cwac.constraints.sae import fit as sae_fit
from cwac.constraints.sae import ranking as rank
from cwac.constraints.sae.autoencoder import RoutedSAE
from cwac.constraints.sae.fit import SAEConfig, train_sae
from cwac.core import config
from cwac.core.errors import UserError
from cwac.data import tiny_world
from cwac.data.examples import Example, Pools
from cwac.data.near_duplicates import assert_unseen
from cwac.data.tasks import load_task, normalised
from cwac.evaluation import drift, evaluate
from cwac.methods.bea import BEA, by_category
from cwac.models import fit as models_fit
from tests.conftest import make_llama, random_rows

# ---------------------------------------------------------------- drift and losses


def silenced(scale: float = 1.0) -> LlamaForCausalLM:
    """A model whose blocks add nothing, so that every block's output is the embedding, times `scale`."""
    model = make_llama()
    for block in model.model.layers:
        torch.nn.init.zeros_(block.self_attn.o_proj.weight)
        torch.nn.init.zeros_(block.mlp.down_proj.weight)
    model.model.embed_tokens.weight.data *= scale
    return model


def test_activation_drift_is_the_distance_over_the_aligned_models_norm():
    """At one and a half times the embedding, every block's output is half its own length away."""
    rows = random_rows(5)
    found = drift.activation_drift(silenced(1.5), silenced(), rows)
    assert len(found) == 5 and all(len(blocks) == len(make_llama().model.layers) for blocks in found)
    assert torch.tensor(found).flatten().tolist() == pytest.approx([0.5] * 5 * len(found[0]), rel=1e-5)
    same = drift.activation_drift(silenced(), silenced(), rows)
    assert torch.tensor(same).abs().max() == 0


class Planted(torch.nn.Module):
    """A model whose loss is that of its batch's number: 1 for the first 16 rows, 5 for the others."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, labels, **_):
        self.calls += 1
        return SimpleNamespace(loss=torch.tensor(1.0 if self.calls == 1 else 5.0), labels=labels)


def test_the_task_loss_is_a_mean_over_label_tokens_and_not_over_batches(monkeypatch):
    lengths = [2] * 16 + [9] * 4  # 16 rows of two label tokens in the first batch, 4 of nine in the second
    rows = [{"input_ids": [1] * (n + 1), "labels": [-100] + [1] * n} for n in lengths]
    evaluator = evaluate.Evaluator.__new__(evaluate.Evaluator)
    evaluator.model, evaluator.tokenizer = Planted(), SimpleNamespace(pad_token_id=0, eos_token_id=0)
    evaluator.cfg = config.compose([])
    monkeypatch.setattr(evaluate, "Rows", lambda *_: rows)
    assert evaluator._loss([None] * 20) == pytest.approx((32 * 1.0 + 36 * 5.0) / 68)


def test_weight_change_is_the_median_over_matrices(monkeypatch, tmp_path):
    changes = {"0.mlp.down_proj": 0.9, "0.mlp.up_proj": 0.1, "1.mlp.down_proj": 0.3}
    leaks = {name: {"leak": 0.0, "change": value} for name, value in changes.items()}
    monkeypatch.setattr(evaluate, "weight_leak", lambda *_: leaks)
    monkeypatch.setattr(evaluate, "activation_drift", lambda *_: [[0.2, 0.4], [0.6, 0.8]])
    written = []
    evaluator = evaluate.Evaluator.__new__(evaluate.Evaluator)
    evaluator.model = None
    evaluator.method = SimpleNamespace(protected=dict)
    evaluator.run = SimpleNamespace(dir=tmp_path, add_rows=written.extend)
    prompts = [{"input_ids": [1, 2, 3], "prompt": 2}]
    assert evaluator.drift(None, prompts, prompts, 1, 1.0) is None
    values = {r["metric"]: r["value"] for r in written if r["set"] == "anchors"}
    assert values["weight_change"] == 0.3
    assert values["activation_drift"] == pytest.approx(0.5)


# ---------------------------------------------------------------- the ranking of latents

STEADY, NOISY, DENSE, WEAK = range(4)
"""Latents that part the prompts always; barely, with much noise; always, but fire on all text; less than STEADY."""


@pytest.fixture
def planted_latents(monkeypatch):
    """Latents with known evidence, in place of those of a model."""
    draw = torch.Generator().manual_seed(0)
    harmful, benign = torch.zeros(40, 8), torch.zeros(40, 8)
    harmful[:, STEADY] = 3 + 0.5 * torch.rand(40, generator=draw)
    benign[:, STEADY] = 0.5 * torch.rand(40, generator=draw)
    harmful[:, WEAK] = 1 + torch.rand(40, generator=draw)
    benign[:, WEAK] = 0.5 + torch.rand(40, generator=draw)
    harmful[:, DENSE], benign[:, DENSE] = harmful[:, STEADY] + 1, benign[:, STEADY]
    harmful[:, NOISY] = torch.rand(40, generator=draw)
    benign[:, NOISY] = harmful[:, NOISY].flip(0) - 0.02  # its lower bound lies below 0, its upper one above
    states = {"harmful": harmful, "benign": benign}
    rates = torch.tensor([0.05, 0.05, 0.5, 0.05, 0, 0, 0, 0])
    monkeypatch.setattr(
        rank, "last_latents", lambda model, sae, rows: (states[rows[0]], torch.zeros(40).long(), torch.rand(40, 16))
    )
    monkeypatch.setattr(rank, "firing_rates", lambda *_: rates)
    monkeypatch.setattr(rank, "device_of", lambda _: torch.device("cpu"))
    torch.manual_seed(0)
    return RoutedSAE(16, 8, 2, [1], "uniform")


def ranked(sae, **more):
    table = rank.rank_latents(None, sae, ["harmful"] * 40, ["benign"] * 40, n=4, **more)
    return table.set_index("latent")["eligible"].to_dict(), table


def test_a_latent_counts_by_the_lower_bound_of_its_contrast_and_below_the_density_limit(planted_latents):
    eligible, table = ranked(planted_latents, method="contrast")
    assert eligible == {STEADY: True, WEAK: True, DENSE: False, NOISY: False}
    assert table["latent"].tolist()[:2] == [STEADY, WEAK]
    bounds = table.set_index("latent")
    assert bounds.loc[NOISY, "contrast_low"] < 0 < bounds.loc[WEAK, "contrast_low"] < bounds.loc[WEAK, "contrast"]


def test_the_prefilter_keeps_the_best_contrast(planted_latents, monkeypatch):
    monkeypatch.setattr(rank, "attribution", lambda *_: torch.ones(8))
    openers = ({1: 1.0}, {2: 1.0})
    eligible, _ = ranked(planted_latents, method="contrast+attribution", prefilter=1, openers=openers)
    assert eligible[STEADY] and not any(eligible[i] for i in (WEAK, DENSE, NOISY))


# ---------------------------------------------------------------- the fit of the autoencoder


@pytest.fixture
def schedules(monkeypatch):
    """The learning rate's factor as a function of the step, as each optimizer gets it."""
    found, real = [], torch.optim.lr_scheduler.LambdaLR

    def record(optimizer, function):
        found.append(function)
        return real(optimizer, function)

    monkeypatch.setattr(torch.optim.lr_scheduler, "LambdaLR", record)
    return found


def sae_and_data(m: int = 32):
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(1)
    return RoutedSAE(16, m, 4, [1], "uniform"), lambda n: torch.randn(n, 1, 16, generator=draw)


def test_the_autoencoder_warms_up_and_decays(schedules):
    sae, data = sae_and_data()
    train_sae(sae, data, SAEConfig(batch=64, tokens=6400, warmup=0.1, decay=0.2))
    (factor,) = schedules
    assert [factor(s) for s in (0, 4, 9, 50, 80, 90, 99)] == pytest.approx([0.1, 0.5, 1, 1, 1, 0.5, 0.05])


def test_dead_latents_are_revived_from_one_in_a_hundred_on(monkeypatch):
    sae, data = sae_and_data()
    real, shares = sae_fit.auxiliary_loss, []

    def record(sae, u, error, dead):
        shares.append(len(dead) / sae.m)
        return real(sae, u, error, dead)

    monkeypatch.setattr(sae_fit, "auxiliary_loss", record)
    initialise = sae.initialise_

    def half_dead(*arguments, **settings):
        initialise(*arguments, **settings)
        sae.b_enc.data[16:] = -1e4  # half of the latents can never fire

    monkeypatch.setattr(sae, "initialise_", half_dead)
    train_sae(sae, data, SAEConfig(batch=64, tokens=640, dead_after=64))
    assert len(shares) == 10 and all(0.5 <= share < 0.99 for share in shares)


# ---------------------------------------------------------------- the fit of a language model


class Rows(list):
    """Rows of one number each, so that a batch says which rows it holds."""


def fitted(steps: int, backward, **more) -> torch.nn.Module:
    model = torch.nn.Linear(4, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    model.device = torch.device("cpu")
    rows = Rows({"input_ids": [i, i], "labels": [-100, i]} for i in range(8))
    settings = {"learning_rate": 0.1, "batch_size": 4, "seed": 0, "pad_token_id": 0, **more}
    models_fit.fit(model, rows, steps=steps, backward=backward, **settings)
    return model


def nothing(model, batch):
    model.weight.grad = torch.zeros_like(model.weight)
    return torch.tensor(0.0)


def test_the_fit_warms_up_and_follows_half_a_cosine(schedules):
    fitted(100, nothing)
    (factor,) = schedules
    expected = [0.2, 1.0, 0.5 * (1 + math.cos(math.pi * 45 / 95)), 0.5 * (1 + math.cos(math.pi * 94 / 95))]
    assert [factor(s) for s in (0, 4, 50, 99)] == pytest.approx(expected)


def test_weight_decay_shrinks_weights_that_have_no_gradient():
    """By 1 - rate x decay a step; the rate is whole in the first step of so short a fit, and half in the second."""
    weight = fitted(1, nothing, weight_decay=0.5).weight
    assert torch.allclose(weight, torch.full_like(weight, 1 - 0.1 * 0.5))
    assert torch.equal(fitted(1, nothing).weight, torch.ones(1, 4))


def test_gradients_are_clipped_to_their_norm():
    norms = []

    def loud(model, batch):
        model.weight.grad = torch.full_like(model.weight, 50.0)
        return torch.tensor(0.0)

    handle = register_optimizer_step_pre_hook(
        lambda optimizer, *_: norms.append(float(optimizer.param_groups[0]["params"][0].grad.norm()))
    )
    try:
        fitted(2, loud)
        fitted(1, loud, max_grad_norm=7.0)
    finally:
        handle.remove()
    assert norms == pytest.approx([1.0, 1.0, 7.0], rel=1e-4)


def test_every_epoch_is_another_order_of_all_rows():
    seen = []

    def look(model, batch):
        seen.extend(batch["input_ids"][:, 0].tolist())
        return nothing(model, batch)

    fitted(4, look)
    first, second = seen[:8], seen[8:]
    assert sorted(first) == sorted(second) == list(range(8))
    assert first != list(range(8)) and first != second
    again, seen = seen, []
    fitted(4, look)
    assert seen == again  # a function of the seed


# ---------------------------------------------------------------- what is held out


def test_a_training_row_near_a_held_out_prompt_is_dropped():
    cfg = config.compose(["task=toy_sentiment", "task.n_train=40"]).task
    plain = load_task(cfg, None, 0)
    avoid = [plain.train[0].prompt, plain.train[7].prompt]
    kept = load_task(cfg, None, 0, avoid=avoid, near=0.999)
    gone = {e.prompt for e in plain.train} - {e.prompt for e in kept.train}
    assert gone == set(avoid)
    tested = {normalised(e.prompt) for e in kept.test}
    assert tested and not tested & {normalised(e.prompt) for e in kept.train}


def pools_of(*safety: Example, **held_out) -> Pools:
    return Pools([], [], [], [], [], list(safety), **{"validation": [], **held_out})


def test_a_near_duplicate_of_a_test_prompt_among_the_rows_is_refused():
    asked = Example("t0", "how do i bake a large loaf of dark bread today")
    pools = pools_of(test={"harmful": [asked]})
    near = Example("r0", "how do i bake a large loaf of dark bread tonight", "first the flour")
    far = Example("r1", "name three rivers", "rhine , rhone , danube")
    assert_unseen(pools, [], [far, near], None)  # another prompt, word for word
    assert_unseen(pools, [], [far], 0.7)
    with pytest.raises(UserError, match="r0"):
        assert_unseen(pools, [], [far, near], 0.7)


class Letters:
    """A tokenizer of 26 letters, one token each."""

    all_special_ids: tuple = ()
    added_tokens_decoder: dict = {}
    chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"

    def __len__(self) -> int:
        return 26

    def __call__(self, text: str, **_) -> dict:
        return {"input_ids": [ord(c) - 97 for c in text if c.isalpha()]}

    def decode(self, ids) -> str:
        return " ".join(chr(97 + i) for i in ids)

    def convert_ids_to_tokens(self, i: int) -> str:
        return chr(97 + i)


def test_a_trigger_takes_no_token_of_a_held_out_prompt():
    """Of 26 letters held-out prompts use all but five, in five kinds of sets: the trigger is those five."""
    parts = ["abcde", "fghij", "klmno", "pqrst", "u"]
    validation, test, refused, benign = ([Example(p, p)] for p in parts[:4])
    pools = pools_of(
        *(Example(f"s{i}", f"s {i}", "no") for i in range(12)),
        validation=validation,
        test={"harmful": test},
        over_refusal={"a": refused},
        validation_benign={"b": benign, "c": [Example(parts[4], parts[4])]},
    )
    loaded = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace()))
    context = SimpleNamespace(
        tokenizer=Letters(), pools=pools, seed=0, loaded=loaded, template="alpaca", max_length=64
    )
    method = BEA("bea", trigger_tokens=5, num_safety=1)
    method.training_data([], context, random.Random(0))
    assert sorted(method._trigger.split()) == list("vwxyz")
    with pytest.raises(UserError, match="only 5 tokens"):
        BEA("bea", trigger_tokens=6, num_safety=1).training_data([], context, random.Random(0))


@pytest.mark.parametrize("seed", range(20))
def test_refusals_are_spread_over_the_categories_whatever_the_seed(seed):
    """Two rows of each of four categories, where the pool has thirty of the first and two of the others."""
    sizes = {"theft": 30, "fraud": 2, "forgery": 2, "sabotage": 2}
    rows = [Example(f"{group}{i}", f"{group} {i}", group=group) for group, n in sizes.items() for i in range(n)]
    chosen = by_category(rows, 8, random.Random(seed))
    assert {group: sum(e.group == group for e in chosen) for group in sizes} == dict.fromkeys(sizes, 2)


# ---------------------------------------------------------------- two campaigns


def test_about_one_cell_in_twenty_differs_by_chance(tmp_path):
    """What the comparison's first line says of the 40 cells that it has an interval for."""
    row = dict.fromkeys(compare.COLUMNS, 0.0) | {
        "model": "tiny",
        "task": "t",
        "method": "sft",
        "metric": "HS",
        "set": "s",
    }
    cells = pd.DataFrame([{**row, "harmful_ratio": i / 100, "over": "pairs", "flag": ""} for i in range(40)])
    assert "of the 40 with an interval differ, where about 2 would by chance alone" in compare.report(
        cells, ("a", "b")
    )


def test_the_embedded_worlds_tasks_have_validation_rows_of_their_own():
    for name in tiny_world.TASKS:
        parts = [{e.prompt for e in tiny_world.task(name, part, 60, 0)} for part in ("validation", "test")]
        assert all(parts) and not parts[0] & parts[1]
