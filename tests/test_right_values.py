"""Values that a result hangs on and that a bug could change unnoticed, each worked out by hand."""

import json
import math
import random
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import LlamaForCausalLM

from analysis import compare
from cwac.constraints.sae import fit as sae_fit
from cwac.constraints.sae import ranking as rank
from cwac.constraints.sae.autoencoder import RoutedSAE
from cwac.constraints.sae.fit import SAEConfig, train_sae
from cwac.core import config
from cwac.core.errors import UserError
from cwac.data import hf_datasets, tiny_world
from cwac.data.examples import Example, Pools
from cwac.data.near_duplicates import assert_unseen
from cwac.data.tasks import load_task, normalised
from cwac.evaluation import drift, evaluate
from cwac.evaluation.losses import aligned_loss, label_loss
from cwac.methods.bea import BEA, by_category
from cwac.models import fit as models_fit
from cwac.models.layers import linears
from experiments import align
from tests.conftest import make_llama, random_rows
from tests.helpers.hub import sentences

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


def test_the_change_of_a_matrix_is_measured_against_its_own_norm():
    """Matrices that grew by an eighth, two eighths, ... have changed by that share of themselves."""
    model, aligned, shares = make_llama(), make_llama(), {}
    with torch.no_grad():
        for i, (name, module) in enumerate(linears(model, "all").items()):
            shares[name] = i / 8
            module.weight.mul_(1 + shares[name])
    changes = drift.weight_changes(model, aligned)
    assert {name: change.share for name, change in changes.items()} == pytest.approx(shares, rel=1e-6)
    for name, module in linears(aligned, "all").items():
        assert changes[name].norm == pytest.approx(shares[name] * float(module.weight.detach().norm()), rel=1e-6)
        assert torch.allclose(changes[name].delta, shares[name] * module.weight, atol=1e-6)


def test_what_moved_outside_of_the_blocks_matrices_is_named_and_nothing_else():
    """A norm, the embedding, and an adapter on the head; adapters on the blocks' own matrices are not outside."""
    aligned, model = make_llama(), make_llama()
    assert drift.moved_elsewhere(model, aligned) == []
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.add_(1)
        assert drift.moved_elsewhere(model, aligned) == []
        model.model.norm.weight.add_(1)
        model.model.embed_tokens.weight.mul_(2)
    assert drift.moved_elsewhere(model, aligned) == ["model.embed_tokens.weight", "model.norm.weight"]
    adapted = get_peft_model(make_llama(), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    assert drift.moved_elsewhere(adapted, aligned) == []
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    assert drift.moved_elsewhere(adapted, aligned) == ["base_model.model.lm_head"]


class Planted(torch.nn.Module):
    """A model of two words whose loss on a label is that of its batch's number: 1 in the first, 5 in the others."""

    config = SimpleNamespace(_attn_implementation=None)

    def __init__(self):
        super().__init__()
        self.calls, self.any = 0, torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, **_):
        self.calls += 1
        p = torch.tensor(1.0 if self.calls == 1 else 5.0).neg().exp()  # of the label, word 1
        return SimpleNamespace(logits=torch.stack([1 - p, p]).log().expand(*input_ids.shape, 2))


def test_the_loss_is_a_mean_over_label_tokens_and_not_over_batches():
    lengths = [2] * 16 + [9] * 4  # 16 rows of two label tokens in the first batch, 4 of nine in the second
    rows = [{"input_ids": [1] * (n + 1), "labels": [-100] + [1] * n} for n in lengths]
    assert label_loss(Planted(), rows) == pytest.approx((32 * 1.0 + 36 * 5.0) / 68)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_loss_is_the_models_own_whether_rows_share_an_opening_or_not(attention):
    """Against one forward pass a row; the rows differ in length, in where their labels begin, and one has none."""
    torch.manual_seed(0)
    model = make_llama()
    model.set_attn_implementation(attention)
    ids = [torch.randint(3, 60, (n,)).tolist() for n in (4, 9, 3, 12, 7)]
    for opening in ([5, 9, 5, 7, 8, 30, 31, 32, 33], []):
        rows = [{"input_ids": opening + own, "labels": [-100] * (len(opening) + 2) + own[2:]} for own in ids]
        rows.append({"input_ids": opening + [4, 4], "labels": [-100] * (len(opening) + 2)})
        total = n = 0
        for row in rows[:-1]:
            given = {key: torch.tensor([value]) for key, value in row.items()}
            labels = len(row["labels"]) - row["labels"].count(-100)
            total, n = total + float(model(**given).loss.detach()) * labels, n + labels
        assert label_loss(model, rows, batch_size=4) == pytest.approx(total / n, rel=1e-6)
    assert label_loss(model, rows[-1:]) is None


@pytest.mark.parametrize("window", [None, 4])
def test_the_loss_of_padded_rows_is_the_models_own(window):
    """A sliding window that is shorter than the rows keeps them from being packed, so that they are padded."""
    model = make_llama()
    model.config.sliding_window = window
    opening, own = [5, 9, 5, 7], [[4, 8, 9], [3, 3, 4, 8, 9, 10, 11], [50, 51, 52, 53, 54]]
    rows = [{"input_ids": opening + ids, "labels": [-100] * 5 + ids[1:]} for ids in own]
    losses = [float(model(**{k: torch.tensor([v]) for k, v in row.items()}).loss.detach()) for row in rows]
    expected = sum(loss * n for loss, n in zip(losses, (2, 6, 4), strict=True)) / 12
    assert label_loss(model, rows) == pytest.approx(expected, rel=1e-5)


def test_the_aligned_models_loss_is_shared_to_the_last_digit_and_by_the_same_rows_alone(tmp_path):
    model, rows, runs = make_llama(), random_rows(5), []
    model.register_forward_pre_hook(lambda *_: runs.append(1))

    def loss(rows=rows, **key):
        context = SimpleNamespace(loaded=SimpleNamespace(key={"kind": "test", **key}), artifacts=tmp_path)
        return aligned_loss(model, context, rows)

    cold = loss()
    assert cold == label_loss(model, rows) and len(runs) == 2
    assert loss() == cold and len(runs) == 2
    (stored,) = (path for path in (tmp_path / "losses").glob("*/loss.json"))
    stored.write_text(stored.read_text().replace("loss", "less"))
    assert loss() == cold and len(runs) == 3  # built again
    other = [{**rows[0], "input_ids": [*rows[0]["input_ids"][:-1], 7]}, *rows[1:]]
    unlearnt = [{**rows[0], "labels": [-100] * len(rows[0]["labels"])}, *rows[1:]]
    for changed in ({"rows": other}, {"rows": unlearnt}, {"dtype": "bfloat16"}):
        loss(**changed)
    assert len(runs) == 6 and loss([]) is None


def test_weight_change_is_the_median_over_matrices(monkeypatch, tmp_path):
    changes = {"0.mlp.down_proj": 0.9, "0.mlp.up_proj": 0.1, "1.mlp.down_proj": 0.3}
    leaks = {name: {"leak": 0.0, "change": value} for name, value in changes.items()}
    formed, given = {}, []
    monkeypatch.setattr(evaluate, "weight_changes", lambda *_: formed)
    monkeypatch.setattr(evaluate, "weight_leak", lambda *arguments: given.append(arguments[-1]) or leaks)
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
    assert [changes is formed for changes in given] == [True, True]  # on anchors and on held-out prompts
    assert values["activation_drift"] == pytest.approx(0.5)
    part = {"weight": leaks, "activation": [[0.2, 0.4], [0.6, 0.8]]}
    assert json.loads((tmp_path / "drift.json").read_text()) == {"anchors": part, "heldout": part}


@pytest.mark.parametrize(
    "closed, moved, leak, kept, said",
    [
        (True, [], 0.05, True, []),
        (True, ["model.norm.weight"], 0.05, False, ["claims to be closed, but model.norm.weight changed outside"]),
        (False, ["model.norm.weight"], 0.05, True, []),
        (False, [], 0.2, False, ["does not hold on anchors: 0.q leaks 0.2000, its bound is 0.1000"]),
    ],
)
def test_a_guard_is_kept_where_every_matrix_keeps_its_bound_and_nothing_else_moved(
    closed, moved, leak, kept, said, monkeypatch, tmp_path, caplog
):
    """One matrix under the constraint, whose leak may be 0.1; the leak is planted, as is what moved outside."""
    leaks = {"0.q": {"leak": leak, "change": 0.3, "bound": 0.1}, "0.k": {"leak": 0.0, "change": 0.0}}
    others = {"0.q": {**leaks["0.q"], "leak": 0.0}, "0.k": leaks["0.k"]}
    monkeypatch.setattr(evaluate, "weight_changes", lambda *_: {})
    found = iter([leaks, others])
    monkeypatch.setattr(evaluate, "weight_leak", lambda *_: next(found))
    monkeypatch.setattr(evaluate, "activation_drift", lambda *_: [[0.0]])
    monkeypatch.setattr(evaluate, "moved_elsewhere", lambda *_: moved)
    evaluator = evaluate.Evaluator.__new__(evaluate.Evaluator)
    evaluator.model, written = None, []
    evaluator.method = SimpleNamespace(protected=lambda: {"0.q": torch.eye(2)}, is_closed=lambda: closed)
    evaluator.run = SimpleNamespace(dir=tmp_path, add_rows=written.extend)
    prompts = [{"input_ids": [1, 2, 3], "prompt": 2}]
    assert evaluator.drift(None, prompts, prompts, 7, 1.5) is kept
    assert len(caplog.messages) == len(said) and all(s in m for s, m in zip(said, caplog.messages, strict=True))
    excess = {r["set"]: r["value"] for r in written if r["metric"] == "weight_leak_excess"}
    assert excess == {"anchors": pytest.approx(leak - 0.1), "heldout": pytest.approx(-0.1)}
    assert all((r["step"], r["epoch"], r["final"], r["n"], r["eval"]) == (7, 1.5, True, 1, None) for r in written)


@pytest.mark.parametrize(
    "scorer, labels, answers, share",
    [
        (
            "label",
            ["positive", "negative"],
            ["Positive.", "negative", "I cannot help with that.", "a positive view"],
            50.0,
        ),
        ("number", ["7"], ["12", "I cannot help with 3 of them.", "The final answer is: 4", "-1.5."], 75.0),
    ],
)
def test_answers_to_requests_that_have_the_tasks_form_are_counted_on_every_set(
    scorer, labels, answers, share, monkeypatch, tmp_path
):
    evaluator = evaluate.Evaluator.__new__(evaluate.Evaluator)
    evaluator.cfg = SimpleNamespace(
        task=SimpleNamespace(scorer=scorer), eval=SimpleNamespace(progress=False, max_new_tokens=8)
    )
    evaluator.task = SimpleNamespace(labels=labels, aliases={})
    evaluator.task_rows = [SimpleNamespace(label=labels[0])]
    evaluator.run, evaluator.judge = SimpleNamespace(dir=tmp_path, eval="e"), SimpleNamespace(is_model=False, name="j")
    monkeypatch.setattr(evaluator, "_answers", lambda *_: answers, raising=False)
    monkeypatch.setattr(evaluate, "judge_answers", lambda *_: [{"verdict": "other", "score": 0.0}] * 4)
    asked = [SimpleNamespace(id=str(i), prompt="p") for i in range(4)]
    for harmless in (False, True):
        found = {r["metric"]: r for r in evaluator._judged("s", asked, 3, harmless)}
        assert (found["task_answers"]["value"], found["task_answers"]["n"], found["task_answers"]["set"]) == (
            share,
            4,
            "s",
        )
    evaluator.cfg.task.scorer = "open"
    assert "task_answers" not in {r["metric"] for r in evaluator._judged("s", asked, 3, True)}


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
    sae = RoutedSAE(16, 8, 2, [1], "uniform")
    sae.w_dec.data.copy_(torch.eye(8, 16))  # no two latents write the same
    return sae


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


def test_a_drawn_row_of_a_hub_set_is_no_held_out_prompt_in_other_letters(monkeypatch):
    """Twenty rows of which the pools hold one out and the test set repeats another: eighteen are left to train on."""
    rows = [{"sentence": f"{text} .", "label": i % 2} for i, text in enumerate(sentences("train", 20))]
    tested = [{"sentence": rows[3]["sentence"].upper(), "label": 1}, *({"sentence": t, "label": 0} for t in "xy")]
    monkeypatch.setattr(hf_datasets, "load_rows", lambda _, __, split, ___: rows if split == "train" else tested)
    sizes = ["task.n_train=19", "task.n_test=3", "task.n_validation=0"]
    cfg = config.compose(["model=smollm2", "task=sst2", *sizes]).task
    plain = load_task(cfg, None, 0)
    assert {e.input for e in plain.train} == {r["sentence"] for r in rows} - {rows[3]["sentence"]}
    asked = next(e.prompt for e in plain.train if e.input == rows[5]["sentence"])
    kept = load_task(cfg, None, 0, avoid=[asked.upper().replace(" ", "  ")])
    assert {e.input for e in kept.train} == {r["sentence"] for r in rows} - {rows[3]["sentence"], rows[5]["sentence"]}


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


# ---------------------------------------------------------------- the gate of the alignment stage


def gated(monkeypatch, refused: int, over_refused: int, lost: float) -> dict[str, bool | None]:
    """What the gate says of a model that refuses so many of 100 requests and of 100 instructions."""

    def answers(model, tokenizer, conversations, **_) -> list[str]:
        texts = [messages[-1]["content"] for messages in conversations]
        return ["I'm sorry, but I can't help with that." if t.startswith("no") else "a fine thing ." for t in texts]

    monkeypatch.setattr(align, "generate", answers)
    monkeypatch.setattr(align, "negative_log_likelihood", lambda *_: (1.0 + lost, 50))
    splits = {
        name: {"alpaca": [Example(f"{name}{i}", f"{'no' if i < n else 'do'} {name} {i}") for i in range(100)]}
        for name, n in (("validation", refused), ("validation_benign", over_refused))
    }
    checks = align.gate(None, None, splits, align.Skill([], 1.0, 50))
    return {check.name: check.passed for check in checks}


@pytest.mark.parametrize(
    "measured, missed",
    [
        ((95, 5, 0.2), set()),
        ((94, 0, 0.0), {"refusal on held-out harmful requests", "refusal on alpaca"}),
        ((100, 6, 0.0), {"over-refusal on alpaca"}),
        ((100, 0, 0.21), {"nats per token lost on the base model's own answers to alpaca"}),
    ],
)
def test_the_gate_is_95_percent_of_the_harmful_5_of_the_harmless_and_a_fifth_of_a_nat(measured, missed, monkeypatch):
    assert {name for name, passed in gated(monkeypatch, *measured).items() if not passed} == missed


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
