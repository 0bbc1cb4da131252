"""The values that each key of a method, and of CWAC's two constraints, may have: its bounds, and what lies beyond.

A bound that is off by one, or left out, trains with a setting that means nothing; an error that does not name its key
sends the user to another one.
"""

import math

import pytest

from cwac.constraints.settings import Activation, Weight
from cwac.core.errors import UsageError
from cwac.methods.asft import AsFT
from cwac.methods.bea import BEA
from cwac.methods.booster import Booster
from cwac.methods.circuit_breaker import CircuitBreaker
from cwac.methods.constrained_sft import ConstrainedSFT
from cwac.methods.ewc import EWC
from cwac.methods.inflora import InfLoRA
from cwac.methods.l2sp import L2SP
from cwac.methods.ldifs import LDIFS
from cwac.methods.lisa import Lisa
from cwac.methods.nullspace import NullSpace
from cwac.methods.replay import Replay
from cwac.methods.repnoise import RepNoise
from cwac.methods.resta import RESTA
from cwac.methods.safe_delta import SafeDelta
from cwac.methods.safeinstr import SafeInstr
from cwac.methods.safelora import SafeLoRA
from cwac.methods.safety_layers import Localisation
from cwac.methods.salora import SaLoRA
from cwac.methods.sppft import SPPFT
from cwac.methods.vaccine import Vaccine

NUMBERS = {
    (AsFT, "lam"): (0, math.inf),
    (BEA, "safety_per_harmful"): (0, math.inf, None),
    (Booster, "lamb"): (0, math.inf),
    (Booster, "alpha"): (0, math.inf),
    (Booster, "learning_rate"): (0, math.inf),
    (Booster, "weight_decay"): (0, math.inf),
    (CircuitBreaker, "alpha"): (0, math.inf),
    (CircuitBreaker, "empty_instructions"): (0, 1, None),
    (ConstrainedSFT, "beta"): (0, math.inf),
    (ConstrainedSFT, "factor"): (0, math.inf),
    (ConstrainedSFT, "first_factor"): (0, math.inf),
    (EWC, "lam"): (0, math.inf),
    (L2SP, "lam"): (0, math.inf),
    (LDIFS, "lam"): (0, math.inf),
    (Lisa, "rho"): (0, math.inf),
    (Lisa, "prox_after"): (0, 1),
    (Replay, "lam"): (0, math.inf),
    (RepNoise, "alpha"): (0, math.inf),
    (RepNoise, "beta"): (0, math.inf),
    (RepNoise, "learning_rate"): (0, math.inf),
    (RESTA, "gamma"): (0, math.inf),
    (SafeDelta, "scale"): (0, math.inf),
    (SafeInstr, "ratio"): (0, 1),
    (SafeLoRA, "tau"): (-1, 1),
    (Vaccine, "rho"): (0, math.inf),
    (Vaccine, "learning_rate"): (0, math.inf),
    (Vaccine, "weight_decay"): (0, math.inf),
    (Activation, "lam"): (0, math.inf),
}
"""The least and the largest value, both allowed; a third entry: null is allowed too."""

WHOLE = {
    (AsFT, "rank"): (1, None),
    (BEA, "num_safety"): (1,),
    (BEA, "trigger_tokens"): (1,),
    (Booster, "steps"): (0,),
    (Booster, "n_pairs"): (1,),
    (Booster, "batch_size"): (1,),
    (Booster, "harmless_per_refusal"): (1,),
    (CircuitBreaker, "n_prompts"): (1,),
    (CircuitBreaker, "n_retain"): (1,),
    (ConstrainedSFT, "length"): (0,),
    (EWC, "n_prompts"): (1, None),
    (EWC, "response_tokens"): (1,),
    (InfLoRA, "rank"): (1,),
    (InfLoRA, "n_rows"): (1, None),
    (InfLoRA, "n_anchors"): (1, None),
    (InfLoRA, "response_tokens"): (0,),
    (Lisa, "align_steps"): (0,),
    (Lisa, "finetune_steps"): (0,),
    (Lisa, "guide_data_num"): (0,),
    (Lisa, "min_cycles"): (1, None),
    (Localisation, "n_queries"): (2,),
    (Localisation, "n_draws"): (1,),
    (Localisation, "n_over_rejection"): (1,),
    (Localisation, "max_new_tokens"): (1,),
    (NullSpace, "k"): (1, None),
    (NullSpace, "n_rows"): (1,),
    (NullSpace, "n_anchors"): (1, None),
    (NullSpace, "response_tokens"): (0,),
    (RepNoise, "steps"): (0,),
    (RepNoise, "n_pairs"): (1,),
    (RepNoise, "batch_size"): (1,),
    (RepNoise, "response_tokens"): (1,),
    (Replay, "budget"): (1, None),
    (Replay, "n_prompts"): (1,),
    (Replay, "response_tokens"): (1,),
    (SafeDelta, "n_prompts"): (1, None),
    (SafeDelta, "response_tokens"): (1,),
    (SafeLoRA, "number"): (1,),
    (SaLoRA, "safety_rank"): (1,),
    (SaLoRA, "task_rank"): (1, None),
    (SaLoRA, "n_prompts"): (1, None),
    (SaLoRA, "n_task"): (1,),
    (SaLoRA, "response_tokens"): (1,),
    (Vaccine, "steps"): (0,),
    (Vaccine, "batch_size"): (1,),
    (Vaccine, "harmless_per_refusal"): (1,),
    (Weight, "response_tokens"): (0,),
    (Weight, "n_anchors"): (1, None),
    (Weight, "refresh_steps"): (1, None),
    (Weight, "project_every"): (1,),
    (Activation, "n_latents"): (1,),
    (Activation, "n_prompts"): (1,),
}
"""The least value, which is allowed; a second entry: null is allowed too."""

SHARES = {
    (AsFT, "energy"): ((1, 1e-3), (0, 1.001)),
    (InfLoRA, "energy"): ((1, 1e-3), (0, 1.001)),
    (NullSpace, "energy"): ((1, 1e-3), (0, 1.001)),
    (Weight, "energy"): ((1, 1e-3), (0, 1.001)),
    (SafeDelta, "excluded"): ((0, 0.999), (-1e-3, 1)),
    (SaLoRA, "scaling"): ((1e-3, None), (0, -1)),
    (Weight, "penalty_weight"): ((1e-3, None), (0, -1, math.inf)),
}
"""Values that are allowed, and values that are not, where an end is open."""

WORDS = {
    (AsFT, "operator"): (("official", "spectral", "projector_k"), ("projector",)),
    (AsFT, "modules"): (("all", ["q_proj"]), ("q_proj", [1])),
    (AsFT, "lora_scaling"): ((True, False), (1, None)),
    (BEA, "trigger_at_inference"): ((True, False), (1, None)),
    (CircuitBreaker, "layers"): ((None, [0, 2]), ("all", 1, [0.5])),
    (CircuitBreaker, "retain_states"): (("official", "blocks"), ("all",)),
    (CircuitBreaker, "first_step"): ((0, 1), (-1, 2)),
    (InfLoRA, "modules"): (("all", ["q_proj"]), ("q_proj", [1])),
    (InfLoRA, "directions"): (("task", "random"), ("rows",)),
    (LDIFS, "layers"): ((None, "official", [0, 2]), ("all", 1, [True])),
    (LDIFS, "unit"): (("channel",), ("feature",)),
    (NullSpace, "basis"): (("rows", "benign", "gradient", "complement"), ("row",)),
    (NullSpace, "fold"): ((True, False, None), (1,)),
    (Replay, "pools"): ((["anchors"], ["safety", "sae", "step"]), ([], "anchors", ["poison"])),
    (SafeLoRA, "select"): (("threshold", "number"), ("tau",)),
    (SafeLoRA, "modules"): (("all", ["q_proj"]), ("q_proj", [1])),
    (SaLoRA, "answers_only"): ((True, False), (1, None)),
    (SaLoRA, "modules"): (("all", ["q_proj"]), ("q_proj", [1])),
    (SPPFT, "layers"): (("auto", [0, 0], [1, 2]), ("all", 1, [2, 1], [-1, 1], [1], [0, 1.5])),
    (SPPFT, "freeze_norms"): ((True, False), (1, None)),
    (Localisation, "alpha"): (("auto", None, 1.15, 0.9), (1, 0, -1, "search")),
    (Weight, "where"): (("update", "gradient"), ("weights",)),
    (Weight, "modules"): (("all", ["q_proj"]), ("q_proj",)),
    (Weight, "layers"): ((None, [0, 2]), ("all", 1, [0.5])),
    (Weight, "unconstrained"): (([], ["up_proj"]), ("up_proj", [1])),
    (Weight, "anchor_sources"): (([], ["advbench"]), ("advbench", [1])),
    (Weight, "prefill"): ((None, "Sure"), ("", " ", 1)),
    (Activation, "gate"): (("tau", "topk", "union", "base", "preact"), ("top",)),
    (Activation, "ranking"): (("contrast+attribution", "contrast", "activation", "cosine", "random"), ("mean",)),
    (Activation, "units"): (("raw", "relative"), ("percent",)),
    (Activation, "refused_only"): ((True, False), (1, None)),
    (Activation, "space"): (("sae", "residual"), ("logit",)),
    (Activation, "positions"): (
        ("last", "prompt", "template:3", "response:16"),
        ("first", "last:1", "template:0", "response", "response:-1", "response:1.5"),
    ),
}
"""Values that are allowed, and values that are not."""

READ = {
    (AsFT, "energy"): {"operator": "projector_k"},
    (SafeLoRA, "number"): {"select": "number"},
}
"""What has to be set so that a key is read."""
OWN = {Weight: "weight.", Activation: "activation.", Localisation: "localisation."}


def build(kind, key, value):
    named = {} if kind in OWN else {"name": "m"}
    return kind(**named, **READ.get((kind, key), {}), **{key: value})


def allowed(kind, key, value) -> None:
    kept = getattr(build(kind, key, value), key)
    assert (list(kept) if isinstance(value, list) else kept) == value


def refused(kind, key, value) -> None:
    with pytest.raises(UsageError) as caught:
        build(kind, key, value)
    said, _, remedy = str(caught.value).partition("; ")
    assert said.startswith(f"method.{OWN.get(kind, '')}{key}={value} is ") and remedy.startswith(("give ", "use "))


def cases(table) -> list:
    return [pytest.param(*at, *entry, id=f"{at[0].__name__}.{at[1]}") for at, entry in table.items()]


@pytest.mark.parametrize("kind, key, bounds", [(*at, entry) for at, entry in NUMBERS.items()])
def test_a_number_is_allowed_up_to_its_bounds_and_no_further(kind, key, bounds):
    low, high, *null = bounds
    allowed(kind, key, low)
    refused(kind, key, low - 1e-6)
    if high < math.inf:
        allowed(kind, key, high)
        refused(kind, key, high + 1e-6)
    else:
        allowed(kind, key, 12345.5)
    for value in (math.inf, math.nan, "1", True):
        refused(kind, key, value)
    (allowed if null else refused)(kind, key, None)


@pytest.mark.parametrize("kind, key, bounds", [(*at, entry) for at, entry in WHOLE.items()])
def test_a_whole_number_is_allowed_from_its_least_value_on(kind, key, bounds):
    low, *null = bounds
    for value in (low, low + 1, 12345):
        allowed(kind, key, value)
    for value in (low - 1, low + 0.5, low + 1.0, "2", True):
        refused(kind, key, value)
    (allowed if null else refused)(kind, key, None)


@pytest.mark.parametrize("kind, key, good, bad", cases(SHARES | WORDS))
def test_other_values_are_the_ones_that_are_listed(kind, key, good, bad):
    for value in good:
        allowed(kind, key, value)
    for value in bad:
        refused(kind, key, value)


UNREAD = [
    (AsFT, "energy", 0.5, {"operator": "official"}, {"operator": "projector_k"}),
    (AsFT, "energy", 0.5, {"operator": "spectral"}, {"operator": "projector_k"}),
    (Lisa, "guide_data_num", 7, {"align_steps": 0}, {"align_steps": 1}),
    (Lisa, "prox_after", 0.3, {"rho": 0}, {"rho": 0.1}),
    (Localisation, "max_alpha", 2.0, {"alpha": 1.2}, {"alpha": "auto"}),
    (Localisation, "max_alpha", 2.0, {"alpha": None}, {"alpha": "auto"}),
    (Localisation, "n_over_rejection", 7, {"alpha": None}, {"alpha": 1.2}),
    (Localisation, "max_new_tokens", 7, {"alpha": None}, {"alpha": "auto"}),
    (NullSpace, "n_rows", 7, {"basis": "complement"}, {"basis": "benign"}),
    (SafeLoRA, "number", 7, {"select": "threshold"}, {"select": "number"}),
    (SafeLoRA, "tau", 0.3, {"select": "number"}, {"select": "threshold"}),
    (SaLoRA, "n_task", 7, {"task_rank": None}, {"task_rank": 1}),
    (SaLoRA, "task_inputs", "aligned", {"task_rank": None}, {"task_rank": 1}),
    (Weight, "project_every", 2, {"where": "gradient"}, {"where": "update"}),
    (Weight, "project_every", 2, {"penalty_weight": 0.1}, {"penalty_weight": None}),
    (Weight, "project_every", 4, {"refresh_steps": 2}, {"refresh_steps": 3}),
    (Weight, "project_every", 2, {"refresh_steps": 1}, {"refresh_steps": 4}),
    (Weight, "where", "gradient", {"penalty_weight": 0.1}, {"penalty_weight": None}),
    (Activation, "n_latents", 7, {"space": "residual"}, {"space": "sae"}),
    (Activation, "gate", "topk", {"space": "residual"}, {"space": "sae"}),
    (Activation, "ranking", "cosine", {"space": "residual"}, {"space": "sae"}),
    (Activation, "units", "relative", {"space": "residual"}, {"space": "sae"}),
    (Activation, "space", "logits", {"positions": "last"}, {"positions": "response:4"}),
]
"""A key's value that nothing reads under the first settings, and that is read under the second."""


@pytest.mark.parametrize("kind, key, value, without, read", UNREAD)
def test_a_value_that_nothing_would_read_is_refused_and_one_that_is_read_is_not(kind, key, value, without, read):
    named = {} if kind in OWN else {"name": "m"}
    at_its_usual_value = kind(**named, **without)
    with pytest.raises(UsageError) as caught:
        kind(**named, **without, **{key: value})
    # of two keys that exclude each other either may be named
    keys = [f"method.{OWN.get(kind, '')}{name}={given} " for name, given in {**without, key: value}.items()]
    assert str(caught.value).startswith(tuple(keys)) and getattr(at_its_usual_value, key) != value
    assert getattr(kind(**named, **read, **{key: value}), key) == value
