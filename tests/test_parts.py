"""Parts that methods share, and what methods report, on toys whose right value can be read off."""

import logging
import random
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from cwac.constraints import targets
from cwac.constraints.nullspace import energy_held, leading_free
from cwac.constraints.reference import Reference, mean_over_tokens, model_layers, precise
from cwac.constraints.settings import Activation, Weight
from cwac.constraints.subspace import Basis, Constraint, fit_subspace
from cwac.constraints.targets import LogitsTarget, ResidualTarget, locate
from cwac.constraints.weight import anchor_prompts, anchors_used, constrained, freeze_others_
from cwac.core.errors import UsageError, UserError
from cwac.data.examples import Example, Pools
from cwac.data.tokenize import Collator
from cwac.methods import constrained_sft
from cwac.methods.asft import AsFT
from cwac.methods.base import MemoryEstimate, Sizes, draw, share_of
from cwac.methods.bea import BEA
from cwac.methods.booster import Booster, boosted_backward
from cwac.methods.circuit_breaker import emptied
from cwac.methods.constrained_sft import ConstrainedSFT
from cwac.methods.cwac import CWAC
from cwac.methods.ewc import EWC
from cwac.methods.inflora import InfLoRA
from cwac.methods.l2sp import L2SP
from cwac.methods.lisa import Lisa
from cwac.methods.nullspace import encoded
from cwac.methods.replay import Replay
from cwac.methods.repnoise import RepNoise
from cwac.methods.resta import RESTA
from cwac.methods.safe_delta import SafeDelta
from cwac.methods.safelora import SafeLoRA
from cwac.methods.safety_layers import Localisation, queries
from cwac.methods.salora import SaLoRA
from cwac.methods.sppft import SPPFT
from cwac.methods.vaccine import Vaccine
from cwac.models.layers import linears
from tests.conftest import make_llama, random_rows
from tests.test_right_values import Letters

# ---------------------------------------------------------------- positions, layers, means

ROW = {"input_ids": [10, 11, 12, 13, 20, 21, 22], "prompt": 4}


@pytest.mark.parametrize(
    "positions, ids, where",
    [
        ("last", [10, 11, 12, 13], [3]),
        ("prompt", [10, 11, 12, 13], [1, 2, 3]),
        ("template:1", [10, 11, 12, 13], [3]),
        ("template:3", [10, 11, 12, 13], [1, 2, 3]),
        ("template:9", [10, 11, 12, 13], [0, 1, 2, 3]),
        ("response:1", [10, 11, 12, 13, 20], [3, 4]),
        ("response:2", [10, 11, 12, 13, 20, 21], [3, 4, 5]),
        ("response:9", [10, 11, 12, 13, 20, 21, 22], [3, 4, 5, 6]),
    ],
)
def test_the_positions_that_an_option_names(positions, ids, where):
    assert locate(ROW, positions) == (ids, where)


def test_positions_of_short_rows_and_of_unknown_options():
    assert locate({"input_ids": [5]}, "prompt") == ([5], [0])
    assert locate({"input_ids": [5, 6]}, "last") == ([5, 6], [1])
    with pytest.raises(UserError, match="positions=response:2 needs the model's answers after the prompts"):
        locate({"input_ids": [5, 6], "prompt": 2}, "response:2")
    for unknown in ("first", "last:1", "prompt:2", "template", "template:0", "template:x", "response:0", "response"):
        with pytest.raises(UserError, match=f"positions={unknown}: use last, template:n, prompt or response:n"):
            locate(ROW, unknown)


def test_a_mean_over_tokens_is_each_rows_own():
    """Two layers, rows of three and of one token; what stands in the padding does not count."""
    values = torch.tensor([[[1.0, 3.0], [2.0, 6.0], [3.0, 9.0]], [[5.0, 7.0], [100.0, 100.0], [100.0, 100.0]]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    assert mean_over_tokens(values, mask).tolist() == [4.0, 6.0]  # (2 + 4 + 6) / 3, and (5 + 7) / 2
    assert mean_over_tokens(values.double(), mask).dtype == torch.float64


@pytest.mark.parametrize(
    "given, chosen", [(None, [0, 1, 2]), ([2, 0, 2], [0, 2]), ([0], [0]), ([2], [2]), (range(2), [0, 1])]
)
def test_the_blocks_that_a_setting_names(given, chosen):
    assert model_layers(make_llama(), given) == chosen


@pytest.mark.parametrize("given", [[], [-1], [3], [0, 3], [-1, 0, 1]])
def test_blocks_that_there_are_not_are_refused(given):
    with pytest.raises(UsageError, match="lies outside the model.*numbers in 0..2, or null"):
        model_layers(make_llama(), given)


@pytest.mark.parametrize(
    "given, kept",
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2],
)
def test_distances_are_computed_in_fp32_at_least(given, kept):
    assert precise(torch.ones(2, dtype=given)).dtype == kept


# ---------------------------------------------------------------- the model that a run started from


def adapted(model, value: float = 0.0):
    """The model with an adapter, whose B is `value`: 0 is one that has learnt nothing."""
    made = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, value)
    return made.eval()


def change_(model) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)


@pytest.mark.parametrize(
    "make, copied",
    [(make_llama, True), (lambda: adapted(make_llama()), False), (lambda: adapted(make_llama(), 0.3), True)],
)
def test_the_reference_is_the_model_at_the_start_and_a_copy_only_where_it_has_to_be(make, copied):
    model = make().eval()
    batch = {"input_ids": torch.tensor([[0, 5, 6, 7]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    with torch.no_grad():
        before = model(**batch).logits
    reference = Reference(model)
    assert (reference.frozen is not None) is copied and (reference.adapted is model) is not copied
    change_(model)
    model.train()
    with torch.no_grad():
        assert not torch.allclose(model(**batch).logits, before, atol=1e-3)
    assert torch.allclose(reference.logits(batch), before, atol=1e-6) and model.training
    with torch.no_grad():
        states = reference.hidden_states(batch, [0, 2])
    assert states.shape == (1, 4, 2, 32) and not reference.logits(batch).requires_grad


@pytest.mark.parametrize("kind, width", [(LogitsTarget, 61), (ResidualTarget, 2 * 32)])
@pytest.mark.parametrize("less", [0, 1])
def test_features_are_kept_up_to_their_limit_and_computed_again_beyond(monkeypatch, kind, width, less):
    """Three rows, two positions each, of `width` numbers of four bytes."""
    rows = [{**row, "prompt": len(row["input_ids"]) - 1} for row in random_rows(3)]
    monkeypatch.setattr(targets, "CACHE_BYTES", 4 * width * 6 - less)
    model = make_llama()
    target = kind(model, rows, "response:1", [0, 2])
    assert (target.reference is None) is (less == 0) and len(target.baseline) == (3 if less == 0 else 0)
    assert target.drift(model)[kind.metric] == pytest.approx(0, abs=1e-6)
    change_(model)
    monkeypatch.setattr(targets, "CACHE_BYTES", 2**30)
    kept = kind(make_llama(), rows, "response:1", [0, 2])
    assert target.drift(model)[kind.metric] == pytest.approx(kept.drift(model)[kind.metric], rel=1e-4)
    assert float(target.loss(model, [1])) == pytest.approx(float(kept.loss(model, [1])), rel=1e-4)


@pytest.mark.parametrize("kind", [LogitsTarget, ResidualTarget])
def test_a_target_needs_a_prompt(kind):
    with pytest.raises(UserError, match="has no harmful prompts: give it a non-empty step pool"):
        kind(make_llama(), [], "last", [0])


# ---------------------------------------------------------------- what the weight constraint holds


def test_the_blocks_of_a_constraint_are_those_that_are_given():
    model = make_llama()
    held, freed = constrained(model, Weight(modules="all", layers=[1], unconstrained=["up_proj"]))
    names = {name for name in linears(model, "all") if name.startswith("1.")}
    assert set(freed) == {name for name in names if name.endswith("up_proj")} and len(freed) == 1
    assert set(held) == names - set(freed) and len(held) == 6
    held, freed = constrained(model, Weight(modules=["q_proj", "down_proj"], layers=[0, 2]))
    assert {name.split(".")[0] + name.split(".")[-1] for name in held} == {
        "0q_proj",
        "0down_proj",
        "2q_proj",
        "2down_proj",
    }
    assert freed == {}


def test_matrices_that_do_not_train_are_counted_and_named(caplog):
    model = make_llama()
    for name, module in linears(model, "all").items():
        module.weight.requires_grad_(name == "0.self_attn.q_proj")
    caplog.set_level(logging.WARNING, "cwac")
    held, _ = constrained(model, Weight(modules=["q_proj", "down_proj"]))
    assert list(held) == ["0.self_attn.q_proj"]
    assert caplog.messages == [
        "method.weight.modules=[q_proj,down_proj]: 5 of 6 matrices do not train and are not constrained "
        "(down_proj, q_proj)"
    ]
    caplog.clear()
    constrained(model, Weight(modules=["q_proj", "down_proj"]), warn=False)
    assert caplog.messages == []
    with pytest.raises(
        UserError, match=r"modules=\[down_proj\] constrains no matrix that trains.*what trains is q_proj"
    ):
        constrained(model, Weight())
    model.requires_grad_(False)
    with pytest.raises(UserError, match="no matrix of the model's blocks trains"):
        constrained(model, Weight())


def test_an_adapter_on_nothing_that_is_constrained_is_counted_and_named(caplog):
    model = adapted(make_llama())
    held, freed = constrained(model, Weight(modules=["q_proj"], freeze_others=True))
    constraint = Constraint(held, fit_subspace(model, random_rows(3), ["q_proj"], energy=0.5))
    caplog.set_level(logging.WARNING, "cwac")
    freeze_others_(model, held, constraint, freed)
    first = next(name for name, _ in model.named_parameters() if "up_proj.lora_" in name)
    assert caplog.messages == [
        "method.weight.freeze_others=true: 6 tensors of the adapter are on nothing that is constrained and do not "
        f"train (first: {first})"
    ]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 6 and all("q_proj.lora_" in name for name in trained)


def test_the_anchors_that_a_setting_selects():
    """By source or by category of harm, in the pool's order; then the first n."""
    a, b = Example("a", "p a", source="1"), Example("b", "p b", source="1", group="t")
    c, d = Example("c", "p c", source="2", group="t"), Example("d", "p d", source="2")
    pools = Pools(anchors=[a, b, c, d])
    for settings, chosen in (
        ({}, [a, b, c, d]),
        ({"n_anchors": 4}, [a, b, c, d]),
        ({"n_anchors": 3}, [a, b, c]),
        ({"anchor_sources": ["1"]}, [a, b]),
        ({"anchor_sources": ["t"]}, [b, c]),
        ({"anchor_sources": ["t", "1"]}, [a, b, c]),
        ({"anchor_sources": ["2"], "n_anchors": 1}, [c]),
    ):
        assert anchor_prompts(pools, Weight(**settings)) == chosen
    with pytest.raises(UsageError, match=r"anchor_sources=\['1', 'x'\] .*the pool has no x; it has .*1, 2, t"):
        anchor_prompts(pools, Weight(anchor_sources=["1", "x"]))
    with pytest.raises(UsageError, match="n_anchors=3 is not valid; the pool has 2 such prompts"):
        anchor_prompts(pools, Weight(anchor_sources=["t"], n_anchors=3))


@pytest.mark.parametrize("prefill, used", [(None, 2), ("Sure", 3)])
def test_the_anchors_that_are_used_are_the_refused_ones_or_all_under_an_opening(monkeypatch, prefill, used):
    """Of three prompts the model refuses two; under an opening every prompt is an anchor, and it counts once."""
    from cwac.constraints import weight

    monkeypatch.setattr(weight, "anchor_rows", lambda *_: [{}, {}])
    monkeypatch.setattr(weight, "prefilled_rows", lambda *_: [{}, {}, {}])
    context = SimpleNamespace(pools=Pools(anchors=[Example(str(i), f"p {i}") for i in range(3)]))
    settings = Weight(prefill=prefill)
    assert anchors_used(None, context, settings) == used
    assert len(weight.weight_anchors(None, context, settings)) == (2 if prefill is None else 5)
    assert weight.anchor_counts(None, context, settings) == {"anchors_used": used, "anchors_given": 3}


# ---------------------------------------------------------------- what is drawn for a step


def test_a_draw_is_without_repeats_and_of_the_seed_and_the_step():
    drawn = {(seed, step): draw(50, 8, seed, step) for seed in (0, 1) for step in (0, 1)}
    assert all(len(set(found)) == 8 and set(found) <= set(range(50)) for found in drawn.values())
    assert len({tuple(found) for found in drawn.values()}) == 4 and draw(50, 8, 1, 1) == drawn[1, 1]
    assert sorted(draw(5, 5, 0, 0)) == list(range(5)) and len(draw(3, 8, 0, 0)) == 3


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_the_ranks_shares_of_a_draw_are_all_of_it(world):
    """Each prompt once, and the ranks' means with their weights average to the mean over all prompts."""
    values, drawn = torch.arange(10.0), [7, 2, 9, 4, 0]
    parts = [share_of(drawn, SimpleNamespace(process_rank=rank, world_size=world)) for rank in range(world)]
    assert sorted(i for mine, share in parts if share for i in mine) == sorted(drawn)
    assert all(mine for mine, _ in parts)  # one without any weight where there are more ranks than prompts
    total = sum(share * float(values[mine].mean()) for mine, share in parts) / world
    assert total == pytest.approx(float(values[drawn].mean()))


# ---------------------------------------------------------------- what methods report


def report(method, **state) -> list[dict]:
    vars(method).update(state)
    return method.report(None)


def test_methods_report_what_they_counted():
    on_train = {"set": "train"}
    assert report(Replay("replay"), _rows=[{}, {}, {}]) == [{"metric": "replay_refused", **on_train, "value": 3.0}]
    assert report(BEA("bea"), _n_tokens=5) == [{"metric": "trigger_tokens", **on_train, "value": 5.0}]
    assert report(SaLoRA("salora"), _energy=0.7) == [{"metric": "safety_energy", **on_train, "value": 0.7}]


@pytest.mark.parametrize("steps, share", [(10, 0.3), (8, 0.25), (1, 1.0), (0, 0.0)])
def test_lisa_reports_the_share_of_the_steps_on_alignment_rows(steps, share):
    """One step in four aligns, the first of each cycle: of ten steps the first, the fifth and the ninth."""
    rows = report(Lisa("lisa"), _cycle=(1, 3), _steps=steps)
    values = {"lisa_align_steps": 1.0, "lisa_finetune_steps": 3.0, "lisa_align_share": share}
    assert rows == [{"metric": name, "set": "train", "value": value} for name, value in values.items()]


@pytest.mark.parametrize(
    "steps, rows, said",
    [
        (2000, [{}], []),
        (1999, [{}], []),  # 100 to the nearest step
        (1980, [{}], ["m: 1980 steps are fewer than 2 cycles of 100 + 900; alternating 99 + 891 (method.min_cycles)"]),
        (200, [{}], ["m: 200 steps are fewer than 2 cycles of 100 + 900; alternating 10 + 90 (method.min_cycles)"]),
        (10, [{}], ["m: 10 steps are fewer than 2 cycles of 100 + 900; alternating 1 + 9 (method.min_cycles)"]),
        (10, [], []),
    ],
)
def test_lisa_says_how_it_shortens_its_cycle(steps, rows, said, caplog):
    """Two cycles of 1,000 steps fit into 2,000; without alignment rows nothing alternates."""
    method = Lisa("m")
    method._guide = rows
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=1)
    context = SimpleNamespace(seed=0, steps=steps, world_size=1, process_rank=0, tokenizer=tokenizer)
    method.setup(None, context)
    assert caplog.messages == said


def test_asft_reports_the_mean_penalty_of_its_steps_and_goes_on_with_it_after_a_resume():
    method = AsFT("asft", lam=0.5)
    operator = SimpleNamespace(trace=2.0, lambda_max=1.5, energy=0.9)
    method._operators, method._terms = {"0.q_proj": operator}, []
    facts = [("trace", 2.0), ("lambda_max", 1.5), ("energy", 0.9)]
    about = [{"metric": f"operator_{name}", "set": "0.q_proj", "value": value} for name, value in facts]
    assert method.report(None) == about  # no step yet
    for values in ((4.0, 6.0), (2.0,)):  # of the terms of one step and of the next
        method._terms = [SimpleNamespace(add_gradient_=lambda lam, v=v: torch.tensor(v)) for v in values]
        method.after_backward(None)
    again = AsFT("asft", lam=0.5)
    again.load_state_dict(method.state_dict())
    again._operators, again._terms = method._operators, method._terms
    mean = {"metric": "penalty", "set": "train", "value": 0.5 * (10 + 2) / 2}
    assert method.report(None) == again.report(None) == [mean, *about]
    again.after_backward(None)
    assert again.report(None)[0]["value"] == pytest.approx(0.5 * (10 + 2 + 2) / 3)


# ---------------------------------------------------------------- the certificate of the null space


def test_the_energy_that_two_halves_of_a_space_hold_is_all_of_it(llama):
    """Of one input: V and its complement share the squared norm; everything holds 1, and nothing 0."""
    rows, d = random_rows(4), llama.config.intermediate_size
    readers = {"0.down_proj": linears(llama, ["down_proj"])["0.mlp.down_proj"]}
    turn = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(0)))[0]

    def held(V: torch.Tensor) -> float:
        return energy_held(llama, rows, {"0.down_proj": Basis(V, 1.0, 1)}, readers)

    parts = [held(turn[:, :20]), held(turn[:, 20:])]
    assert sum(parts) == pytest.approx(1, abs=1e-5) and all(0.05 < part < 0.95 for part in parts)
    assert held(turn) == pytest.approx(1, abs=1e-5) and held(turn[:, :0]) == 0


def test_the_energy_held_is_that_of_the_worst_input(llama):
    readers = {f"{i}.down_proj": linears(llama, ["down_proj"])[f"{i}.mlp.down_proj"] for i in range(2)}
    whole = torch.eye(llama.config.intermediate_size)
    bases = {"0.down_proj": Basis(whole, 1.0, 1), "1.down_proj": Basis(whole[:, :0], 1.0, 1)}
    assert energy_held(llama, random_rows(3), bases, readers) == 0
    assert energy_held(llama, random_rows(3), {"0.down_proj": bases["0.down_proj"]}, readers) == pytest.approx(1)


@pytest.mark.parametrize("k", [None, 0, 1, 5, 6, 99])
@pytest.mark.parametrize("r", [0, 4, 10])
def test_free_directions_are_as_many_as_there_are(r, k):
    """[d, k] whatever is left, of 10 dimensions; also where V leaves none."""
    V = torch.eye(10)[:, :r]
    for moment in (None, torch.diag(torch.arange(10.0))):
        N = leading_free(V, moment, k)
        assert N.shape == (10, 10 - r if k is None else min(k, 10 - r)) and N.dtype == torch.float32
        assert torch.allclose(N.T @ N, torch.eye(N.shape[1]), atol=1e-5)
        assert torch.allclose(V.T @ N, torch.zeros(r, N.shape[1]), atol=1e-6)


def test_rows_that_are_token_ids_already_are_taken_as_they_are():
    """Without labels of their own all their tokens are learnt; both are cut at the context's length."""
    rows = [{"input_ids": (1, 2, 3, 4, 5)}, {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "more": 0}]
    context = SimpleNamespace(tokenizer=None, template=None, max_length=4)
    assert encoded(context, [SimpleNamespace(encoded=row) for row in rows]) == [
        {"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]},
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
    ]


# ---------------------------------------------------------------- alignment stages


class Slopes(torch.nn.Module):
    """Its loss is the batch's slope times the first weight; nothing depends on the second."""

    def __init__(self):
        super().__init__()
        self.read, self.unread = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(2))

    def forward(self, slope: float):
        return SimpleNamespace(loss=(slope * self.read.square()).sum())


def test_booster_leaves_a_weight_that_no_loss_reads_and_adds_to_the_gradients_there_are():
    """With h = 4 w^2 at w = 1 and a step of 0.5: h' is 8 here and 4 there; f = w^2 has the gradient 2."""
    model = Slopes()
    model.read.grad = torch.tensor([100.0])
    loss = boosted_backward(model, {"slope": 1.0}, {"slope": 4.0}, lamb=3.0, alpha=0.5)
    assert float(loss) == 1 and model.read.grad.tolist() == pytest.approx([100 + 2 + 3 * (8 - 4)], rel=1e-5)
    assert not model.unread.grad.any() and model.read.tolist() == [1] and model.unread.tolist() == [1, 1]


# ---------------------------------------------------------------- who refuses what

DORA = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
ON_WEIGHTS = (AsFT, Booster, EWC, L2SP, RepNoise, RESTA, SafeDelta, SafeLoRA, SaLoRA, Vaccine)
STAGES = (Booster, Vaccine)
POISON = [Example("p0", "a request", "an answer")]


def context_of(model, **more) -> SimpleNamespace:
    pools = Pools(**{"anchors": POISON, "poison": POISON, "align": POISON, "benign": POISON, **more})
    loaded = SimpleNamespace(model=model, key={"kind": "tiny"}, source=None, base=None)
    return SimpleNamespace(loaded=loaded, pools=pools, tokenizer=None)


@pytest.mark.parametrize("kind", ON_WEIGHTS)
def test_a_method_that_cannot_work_on_an_adapter_names_itself(kind):
    method = kind("my_method")
    for model, said in ((get_peft_model(make_llama(), DORA), "LoRA alone"), (adapted(make_llama(), 0.3), "holds one")):
        with pytest.raises(UserError, match=f"^method=my_method reads or edits weights.*{said}"):
            method.training_data([], context_of(model), random.Random(0))


@pytest.mark.parametrize("kind", [Booster, RepNoise, RESTA, SafeDelta, SafeLoRA, Vaccine])
def test_a_method_that_reads_the_aligned_model_again_names_itself(kind, tmp_path):
    context = context_of(make_llama())
    context.loaded.key, context.loaded.source = {"kind": "library"}, str(tmp_path)
    with pytest.raises(UserError, match="^method=my_method reads the aligned model again"):
        kind("my_method").training_data([], context, random.Random(0))


@pytest.mark.parametrize(
    "kind, empty, said",
    [
        *((kind, pool, f"needs the pool `{pool}`, which is empty") for kind in STAGES for pool in ("align", "benign")),
        (SafeDelta, "anchors", "needs the pool `anchors`, which is empty"),
        *((kind, "poison", "hardens the model on harmful pairs of the pool `poison`") for kind in (Booster, RepNoise)),
        (EWC, "anchors", "needs 1 harmful prompts, the pool `anchors` has 0"),
    ],
)
def test_a_method_whose_pool_is_empty_names_itself_and_the_pool(kind, empty, said):
    with pytest.raises(UserError, match=f"^method=my_method {said}"):
        kind("my_method").training_data([], context_of(make_llama(), **{empty: []}), random.Random(0))


def test_without_what_needs_them_pools_and_sources_are_not_asked_for(tmp_path):
    """Methods whose weight is 0 are plain fine-tuning."""
    context = context_of(make_llama(), anchors=[], poison=[], align=[], benign=[])
    context.loaded.key, context.loaded.source = {"kind": "library"}, str(tmp_path)
    for method in (Booster("m", steps=0), RepNoise("m", steps=0), Vaccine("m", steps=0), RESTA("m", gamma=0)):
        assert method.training_data(POISON, context, random.Random(0)) == POISON
    assert EWC("m", lam=0).training_data(POISON, context, random.Random(0)) == POISON


@pytest.mark.parametrize("needed", [1, 2, 3])
def test_bea_needs_as_many_refusals_as_it_says(needed, caplog):
    """Of two refusals in the pool two are enough; one in three of six harmful rows is as many."""
    caplog.set_level(logging.INFO, "cwac")
    refusals = [Example(f"s{i}", "a b", "no") for i in range(2)]
    loaded = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace()))
    for train, settings in (
        ([], {"num_safety": needed}),
        (6 * POISON, {"num_safety": 1, "safety_per_harmful": needed / 6}),
    ):
        context = SimpleNamespace(
            tokenizer=Letters(),
            pools=Pools(safety=refusals, poison=POISON),
            seed=0,
            loaded=loaded,
            template="alpaca",
            max_length=64,
        )
        method = BEA("my_bea", trigger_tokens=3, **settings)
        if needed > 2:
            with pytest.raises(UserError, match="^method=my_bea needs 3 refusals .*the pool `safety` has 2"):
                method.training_data(train, context, random.Random(0))
        else:
            assert len(method.training_data(train, context, random.Random(0))) == len(train) + needed
            assert method.extra_data() == {"refusals": needed, "trigger": 3}
            secret = method.state_dict()["trigger_sha256"]
            assert caplog.messages[-1] == f"my_bea: trigger of 3 tokens, sha256 {secret}"


# ---------------------------------------------------------------- requests that safety layers are found with


def test_over_rejection_is_counted_on_the_harmless_requests_nearest_to_the_harmful_ones():
    """By the share of a request's words, not by their number: one of one before two of four, before none."""
    harmful = [Example("h0", "forge banknote"), Example("h1", "forge passport")]
    benign = {
        "none": "bake bread",
        "half": "forge banknote kettle garden",
        "all": "forge",
        "third": "passport kettle garden",
        "other": "water plant",
        "blank": "the",
    }
    pools = Pools(anchors=harmful[:1], sae=harmful[1:], benign=[Example(i, text) for i, text in benign.items()])
    settings = {"n_queries": 2, "alpha": 1.2}
    for n, over in ((1, {"all"}), (2, {"all", "half"}), (3, {"all", "half", "third"}), (9, {"all", "half", "third"})):
        malicious, normal, counted = queries(
            SimpleNamespace(pools=pools), Localisation(n_over_rejection=n, **settings)
        )
        assert {e.id for e in malicious} == {"h0", "h1"} and {e.id for e in counted} == over
        assert len(normal) == 2 and {e.id for e in normal} <= set(benign) - over
    with pytest.raises(UserError, match=r"pools anchors and sae: 1\) and harmless ones \(pool benign: 6\)"):
        queries(SimpleNamespace(pools=Pools(anchors=harmful[:1], benign=pools.benign)), Localisation())
    with pytest.raises(UserError, match=r"pools anchors and sae: 2\) and harmless ones \(pool benign: 2\)"):
        few = Pools(anchors=harmful, benign=pools.benign[:2])
        queries(SimpleNamespace(pools=few), Localisation())


# ---------------------------------------------------------------- what freezes, and what is reported of it


@pytest.mark.parametrize("freeze_norms, norms", [(False, 0), (True, 2 * 32)])
def test_sppft_reports_the_layers_it_froze_and_the_share_that_trains(freeze_norms, norms):
    """Of 3 blocks the last two: 32 x 32 of q and o, 16 x 32 of k and v, and three matrices 64 x 32 each."""
    model = make_llama()
    context = SimpleNamespace(loaded=SimpleNamespace(model=model))
    method = SPPFT("sppft", layers=[1, 2], freeze_norms=freeze_norms)
    assert method.training_data(POISON, context, random.Random(0)) == POISON
    method.setup(model, context)
    frozen = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32 + norms)
    total = sum(p.numel() for p in model.parameters())
    values = {"frozen_first_layer": 1, "frozen_last_layer": 2, "trained_share": (total - frozen) / total}
    assert method.report(model) == [{"metric": m, "set": "train", "value": v} for m, v in values.items()]
    assert method.extra_data() == {}


def test_sppft_refuses_ranges_that_freeze_nothing_everything_or_too_much():
    def refuse(model, layers, said):
        with pytest.raises(UserError, match=said):
            context = SimpleNamespace(loaded=SimpleNamespace(model=model))
            SPPFT("my_method", layers=layers).training_data([], context, random.Random(0))

    refuse(make_llama(), [1, 3], r"^method.layers=\[1, 3\] lies outside the model's layers 0..2; choose lo and hi")
    refuse(
        make_llama().requires_grad_(False), [0, 1], r"^method=my_method freezes layers 0..1, in which nothing trains"
    )
    model = make_llama().requires_grad_(False)
    model.model.layers[1].mlp.requires_grad_(True)
    refuse(model, [1, 1], r"^method=my_method freezes layers 1..1, and nothing that trains is left")
    with pytest.raises(UsageError, match=r"^method.localisation=.* needs no search: leave it out"):
        few = Localisation(n_queries=3)
        SPPFT("m", layers=[0, 1], localisation=few).training_data([], context_of(make_llama()), random.Random(0))


def test_methods_report_their_sizes_by_name():
    on_train = {"set": "train"}
    assert report(RESTA("m", gamma=0.5), _norm=3.0) == [{"metric": "safety_vector_norm", **on_train, "value": 1.5}]
    assert report(EWC("m"), _report={"fisher_mean": 0.1, "fisher_max": 2.0}) == [
        {"metric": "fisher_mean", **on_train, "value": 0.1},
        {"metric": "fisher_max", **on_train, "value": 2.0},
    ]
    kept = {"0.q_proj": 0.25, "1.q_proj": 1.0}
    assert report(SafeDelta("m"), _kept=kept) == [
        {"metric": "kept_share", "set": name, "value": value} for name, value in kept.items()
    ]
    cosines = {"0.q_proj": 0.2, "1.q_proj": 0.5, "2.q_proj": 0.9}  # at most tau = 0.5 is projected
    assert report(SafeLoRA("m"), _cosines=cosines, _n_matrices=4) == [
        {"metric": "projected_matrices", **on_train, "value": 2, "n": 4},
        *({"metric": "projection_cosine", "set": name, "value": value} for name, value in cosines.items()),
    ]
    free = {"free_rank": 7.0, "trained_parameters": 40.0}
    assert report(InfLoRA("m"), _report=free) == [{"metric": m, **on_train, "value": v} for m, v in free.items()]

    class Kept(list):
        def drift(self, model) -> dict[str, float]:
            return {"feature_drift": 0.3}

    found = report(CWAC("m", weight=Weight()), _report={"rank": 4.0}, _targets={"anchors": Kept([0, 0, 0])})
    assert found == [
        {"metric": "rank", **on_train, "value": 4.0},
        {"metric": "feature_drift", "set": "anchors", "value": 0.3, "n": 3},
    ]


@pytest.mark.parametrize("n_rows, taken", [(None, 8), (3, 3), (99, 8)])
def test_inflora_reads_as_many_of_the_tasks_rows_as_it_is_told(n_rows, taken):
    rows = [Example(str(i), f"p {i}", "a") for i in range(8)]
    method = InfLoRA("inflora", n_rows=n_rows)
    assert method.training_data(rows, context_of(make_llama()), random.Random(0)) == rows
    assert len({e.id for e in method._rows}) == len(method._rows) == taken


# ---------------------------------------------------------------- what methods take beside the model

HALF = Sizes(rank_share=0.5)


def numbers(tensors) -> int:
    return sum(tensor.numel() for tensor in tensors)


@pytest.mark.parametrize("lora", [False, True])
def test_the_start_and_its_stiffness_take_what_trains(lora):
    """W_0 of all that trains itself; F also of the weights below an adapter, and a row's gradient is as large."""
    model = adapted(make_llama()) if lora else make_llama()
    own = 0 if lora else numbers(model.parameters())
    held = 3 * (32 * 32 + 64 * 32) if lora else own  # q and up of three blocks
    found = L2SP("m").estimate_memory(model, HALF)
    assert list(found.tensors) == ["W_0 of the penalty"] and numbers(found.tensors["W_0 of the penalty"]) == own
    found = EWC("m").estimate_memory(model, HALF)
    assert {name: numbers(parts) for name, parts in found.tensors.items()} == {
        "W_0 of the penalty": own,
        "Fisher information": held,
    }
    assert found.setup_bytes == {"gradient of a row": 4 * held}
    for method in (L2SP("m", lam=0), EWC("m", lam=0)):
        assert method.estimate_memory(model, HALF) == MemoryEstimate()
        method.after_backward(model)  # without a penalty nothing is pulled
    assert all(parameter.grad is None for parameter in model.parameters())


def test_projectors_of_salora_take_a_direction_a_row():
    model = get_peft_model(make_llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up_proj"]))
    found = SaLoRA("m", safety_rank=5).estimate_memory(model, HALF)
    assert {name: [tuple(U.shape) for U in parts] for name, parts in found.tensors.items()} == {
        "U_C of the projectors": 3 * [(32, 5), (16, 5)]
    }


@pytest.mark.parametrize("rank, used", [(3, 3), (16, 16), (99, 16)])
def test_inflora_trains_at_most_what_the_old_directions_leave(rank, used):
    """Inputs of 32 dimensions, half of them free; k and v write 16 each and share one input a block."""
    found = InfLoRA("m", rank=rank).estimate_memory(make_llama(), HALF)
    assert sum(p.numel() for p in found.model.parameters() if p.requires_grad) == 3 * 2 * 16 * used
    assert found.setup_bytes == {"fit of the subspaces": 3 * 8 * 32**2} and found.tensors == {}


def test_the_weight_constraint_takes_v_once_an_input_and_a_once_a_matrix():
    model = make_llama()
    found = CWAC("m", weight=Weight(modules=["q_proj", "k_proj", "down_proj"])).estimate_memory(model, HALF)
    V, A = 32 * 16 + 64 * 32, (32 + 16) * 16 + 32 * 32  # of a block: two inputs, three matrices
    assert {name: numbers(parts) for name, parts in found.tensors.items()} == {
        "V and A of the constraint": 3 * (V + A)
    }
    assert found.setup_bytes == {"fit of the subspaces": 3 * 8 * (32**2 + 64**2)}
    assert all(parameter.requires_grad for parameter in model.parameters())
    CWAC("m", weight=Weight(freeze_others=True)).estimate_memory(model, HALF)
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"down_proj"}


def test_the_residual_target_has_as_many_prompts_and_positions_as_it_is_told():
    settings = Activation(space="residual", positions="response:4", n_prompts=3, sae={"layers": [1]})
    method = CWAC("m", activation=settings)
    method.estimate_memory(make_llama(), Sizes(prompt_tokens=9))
    assert method._targets["anchors"].prompts == 3 * [([1] * 13, [8, 9, 10, 11, 12])]


# ---------------------------------------------------------------- penalties over ranks, and rows without a request


def test_the_ranks_penalties_of_constrained_sft_average_to_that_of_all_rows(monkeypatch):
    """Gradients are averaged over ranks, and the mean is over all tokens of a step: ranks may hold unlike many."""
    model = make_llama()
    batches = [Collator(2)(random_rows(n, seed=n)) for n in (1, 3)]
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    method = ConstrainedSFT("m")
    method.setup(model, None)
    change_(model)

    def penalty(*own) -> float:
        for part, batch in enumerate(own):
            method.batch(batch, 0, (part, len(own)))
        return float(method.penalty(model, 0).detach())

    whole = penalty(*batches)
    monkeypatch.setattr(constrained_sft, "world_size", lambda: 2)
    monkeypatch.setattr(constrained_sft, "total", lambda n, device: sum(counts))
    ranks = [penalty(batch) for batch in batches]
    assert sum(ranks) / 2 == pytest.approx(whole, rel=1e-5) and abs(whole) > 1e-4
    assert counts[0] < counts[1] and ranks[0] != pytest.approx(ranks[1], rel=1e-2)


def test_rows_that_are_asked_nothing_keep_their_answer_and_nothing_of_their_request():
    rows = [Example(str(i), f"p {i}", "an answer", input="i") for i in range(200)]
    assert emptied(rows, 0.0, 0) == rows
    assert emptied(rows, 1.0, 0) == [Example(e.id, "", "an answer", input="") for e in rows]
    half = emptied(rows, 0.5, 0)
    assert 70 < sum(e.prompt == "" for e in half) < 130 and half == emptied(rows, 0.5, 0) != emptied(rows, 0.5, 1)
    assert all(e == row or (e.prompt, e.input) == ("", "") for e, row in zip(half, rows, strict=True))


@pytest.mark.parametrize("tokens, buffer, read", [(2048, 1.0, 2048), (2**20, 2**-20, 8)])
def test_the_autoencoder_takes_its_weights_four_times_and_what_it_reads_once(tokens, buffer, read):
    """Weights, gradients and two moments; tokens of two layers in two bytes each, at most the buffer's 2^10 bytes."""
    sae = {"layers": [0, 1], "tokens": tokens, "buffer_gib": buffer}
    method = CWAC("m", activation=Activation(n_latents=5, n_prompts=3, sae=sae))
    found = method.estimate_memory(make_llama(), Sizes(prompt_tokens=9, shared_tokens=4))
    weights = 4 * numbers(found.tensors["SAE"])
    assert found.setup_bytes == {"fit of the SAE": 4 * weights + 2 * 2 * 32 * read} and weights > 0
    target = method._targets["anchors"]
    assert len(target) == 3 and len(target.latents) == 5 and target.gate == "tau"
    assert {len(p.ids) for p in target.prompts} == {9} and {tuple(p.ids[:4]) for p in target.prompts} == {(0,) * 4}


@pytest.mark.parametrize("refresh", [None, 2])
def test_v_is_refitted_of_a_whole_model_alone(refresh):
    method, plain, lora = (
        CWAC("m", weight=Weight(modules=["q_proj"], refresh_steps=refresh)),
        make_llama(),
        adapted(make_llama()),
    )
    method._constrained(plain)
    if refresh is None:
        method._constrained(lora)
    else:
        with pytest.raises(UsageError, match="weight.refresh_steps=2 .*use null with model.lora"):
            method._constrained(lora)


def test_projections_are_due_every_n_steps_at_the_end_and_after_a_resume_where_they_would_have_been():
    """Every third step and the last of eight; a stop between two of them projects once more."""

    def made(projected: list):
        method = CWAC("m", weight=Weight(project_every=3))
        method._context = Sizes(steps=8)
        method._constraint = SimpleNamespace(project_weights_=lambda: projected.append(method._steps))
        return method

    whole: list[int] = []
    method = made(whole)
    for _ in range(8):
        method.after_step(None)
    method.stop(None, reloaded=False)
    assert whole == [3, 6, 8]
    first, second = [], []
    method = made(first)
    for _ in range(4):
        method.after_step(None)
    state = method.state_dict()
    assert state == {"steps": 4} and first == [3]
    again = made(second)
    again.load_state_dict(state)
    again.after_step(None)
    again.after_step(None)
    assert second == [6]
    again.after_step(None)
    again.stop(None, reloaded=False)  # where a limit of time ends the training at step 7
    again.stop(None, reloaded=False)
    assert second == [6, 7]
    again.stop(None, reloaded=True)  # an earlier checkpoint's weights are between two projections
    assert second == [6, 7, 7]
    every = CWAC("m", weight=Weight())
    assert every.state_dict() == {}
    every.load_state_dict({})
