"""Random combinations of options on the embedded model: each runs or is refused, and no two share their weights.

`make fuzz` tries 500 of them (CWAC_FUZZ=n: n), one a second; the default tests try a few, always the same.
"""

import json
import logging
import math
import os
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from cwac.core import identity
from tests.conftest import call
from tests.helpers.options import METHODS

EXAMPLES = int(os.environ.get("CWAC_FUZZ", "0"))
SIZES = "{poison: 16, anchors: 16, step: 8, sae: 24, benign: 32, safety: 16, validation: 8}"
SAE = "{tokens: 2048, m: 256, cached_tokens: 2048, batch: 256}"
BASE = [
    "threads=1",
    "train.max_steps=4",  # a penalty is zero at the first; Lisa's proximal term acts after a switch
    "train.warmup_steps=0",  # else the first step, at rate 0, learns nothing
    "train.save_steps=1000",
    "task.n_train=16",
    "task.n_test=4",
    "task.max_new_tokens=2",
    "eval.n_harmful=4",
    "eval.n_benign=4",
    "eval.n_drift=4",
    "eval.max_new_tokens=2",
    "eval.progress=false",
]
COMMON = {
    "task": ["toy_sentiment", "toy_topic", "toy_math"],
    "seed": [0, 1, 2, 3],
    "harmful_ratio": [0, 0.1, 0.125, 0.25, 0.5, 1],
    "mix_mode": ["replace", "additive"],
    "poison": ["harmful", "identity_shift", "style"],
    "poison_choice": ["random", "outside_anchors"],
    "poison_trigger": ["null", "today please", "optimised"],
    "pools.poison_categories": ["null", "[theft,fraud]"],
    "pools.sizes.poison": [4, 24],
    "pools.sizes.anchors": [4, 24],
    "pools.sizes.step": [1, 12],
    "pools.sizes.safety": [2, 24],
    "pools.sizes.benign": [8, 40],
    "task.n_train": [12, 20],
    "train.max_steps": [3, -1],
    "train.num_train_epochs": [1, 2],
    "train.learning_rate": [1e-3, 1e-5],
    "train.per_device_train_batch_size": [2, 4],
    "train.gradient_accumulation_steps": [2, 3],
    "train.weight_decay": [0.1],
    "train.max_grad_norm": [0.1, 0],
    "train.lr_scheduler_type": ["constant", "linear"],
    "train.warmup_steps": [1],
    "train.max_length": [24, 32, 40],
    "train.template": ["alpaca"],
    "+train.optim": ["adamw_torch", "sgd", "adafactor"],
    "+train.bf16": ["true"],
    "+train.gradient_checkpointing": ["true"],
    "+train.dataloader_drop_last": ["true"],
    "+train.label_smoothing_factor": [0.1],
    "+train.neftune_noise_alpha": [5],
    "model.lora": [
        "{r: 2, alpha: 4, target_modules: all-linear}",
        "{r: 4, alpha: 4, target_modules: [q_proj, v_proj]}",
        "{r: 4, alpha: 8, target_modules: [down_proj]}",
    ],
    "model.dtype": ["bfloat16"],
    "eval.at": ["[0]", "[0.5]", "[0,1]"],
    "eval.split": ["validation"],
    "eval.drift": ["false"],
    "eval.prefill": ["Sure"],
    "eval.n_harmful": [1, 8],
    "eval.batch_size": [1, 3],
}
WEIGHT = {
    "method.weight.where": ["update", "gradient"],
    "method.weight.modules": ["[down_proj]", "[q_proj,v_proj]", "all"],
    "method.weight.layers": ["[0]", "[1,2]", "[9]"],
    "method.weight.energy": [0.5, 0.9, 1],
    "method.weight.first_token": ["true", "false"],
    "method.weight.freeze_others": ["true", "false"],
    "method.weight.penalty_weight": [1, 10],
    "method.weight.refresh_steps": [1],
    "method.weight.project_every": [2, 5],
    "method.weight.n_anchors": [2, 8, 100],
    "method.weight.response_tokens": [0, 4],
    "method.weight.prefill": ["Sure"],
    "method.weight.anchor_sources": ["[theft]", "[nowhere]"],
}
ACTIVATION = {
    "method.activation.space": ["sae", "residual", "logits"],
    "method.activation.lam": [0.1, 2],
    "method.activation.n_latents": [4, 1000],
    "method.activation.n_prompts": [1, 2, 12],
    "method.activation.gate": ["tau", "topk", "union", "base", "preact"],
    "method.activation.ranking": ["contrast", "activation", "cosine", "random"],
    "method.activation.positions": ["prompt", "response:4", "template:2"],
    "method.activation.units": ["raw", "relative"],
}
NULLSPACE = {
    "method.k": [1, 8, "null"],
    "method.basis": ["rows", "benign", "gradient", "complement"],
    "method.n_rows": [2, 8],
    "method.fold": ["true"],
    "method.energy": [0.5, 0.9],
    "method.n_anchors": [2, 8, 100],
    "method.layers": ["[0]", "[1,2]"],
}
OWN = {
    "sft": {},
    "weight_only": WEIGHT,
    "weight_only_closed": WEIGHT,
    "activation_only": ACTIVATION,
    "cwac": WEIGHT | ACTIVATION,
    "cwac_closed": WEIGHT | ACTIVATION,
    "cwac_literal": WEIGHT | ACTIVATION,
    "nullspace": NULLSPACE,
    "nullspace_cwac": NULLSPACE | ACTIVATION,
    "asft": {
        "method.lam": [0.1, 10],
        "method.modules": ["all", "[down_proj]"],
        "method.operator": ["spectral", "projector_k"],
        "method.rank": [2, 500],
        "method.energy": [0.5],
    },
    "bea": {
        "method.num_safety": [2, 40],
        "method.safety_per_harmful": [0.5],
        "method.trigger_tokens": [4, 100],
    },
    "bea_no_trigger": {"method.num_safety": [2, 40], "method.trigger_tokens": [4, 100]},
    "circuit_breaker": {
        "method.alpha": [1, 5],
        "method.layers": ["[0]", "[1,3]", "[9]"],
        "method.n_prompts": [1, 12],
        "method.n_retain": [1, 60],
        "method.opening": ["Sure", "xyzzy"],
    },
    "ldifs": {"method.lam": [1, 100], "method.layers": ["[0]", "[1,3]", "[9]"]},
    "l2sp": {"method.lam": [0.01, 10]},
    "ewc": {"method.lam": [1, 1e5], "method.n_prompts": [2, 500], "method.response_tokens": [2]},
    "constrained_sft": {
        "method.beta": [0.02, 1],
        "method.factor": [1, 50],
        "method.first_factor": [1, 20],
        "method.length": [0, 1, 10],
    },
    "inflora": {
        "method.rank": [2, 500],
        "method.modules": ["all", "[down_proj]"],
        "method.energy": [0.5, 1],
        "method.directions": ["random"],
        "method.n_rows": [2, 500],
        "method.n_anchors": [4, 500],
        "method.response_tokens": [0, 2],
    },
    "lisa": {
        "method.rho": [0.1, 10],
        "method.align_steps": [2],
        "method.finetune_steps": [2],
        "method.guide_data_num": [4],
        "method.prox_after": [0.5],
        "method.min_cycles": [1],
    },
    "replay": {
        "method.pools": ["[anchors]", "[step,sae]"],
        "method.budget": [4, 500],
        "method.n_prompts": [1, 2],
        "method.lam": [0.1, 10],
        "method.response_tokens": [2],
    },
    "booster": {
        "method.lamb": [1, 20],
        "method.alpha": [0.5],
        "method.n_pairs": [1],
        "method.steps": [1, 4],
        "method.batch_size": [2],
        "method.weight_decay": [0],
        "method.harmless_per_refusal": [0, 1],
    },
    "repnoise": {
        "method.alpha": [0.1, 3],
        "method.beta": [1],
        "method.n_pairs": [1],
        "method.steps": [1, 4],
        "method.batch_size": [2],
        "method.response_tokens": [2],
    },
    "resta": {"method.gamma": [0.1, 2]},
    "safe_delta": {
        "method.scale": [0, 10, 1000],
        "method.excluded": [0, 0.5],
        "method.n_prompts": [2, "null"],
        "method.response_tokens": [2],
    },
    "safeinstr": {"method.ratio": [0.1, 0.5, 1]},
    "safelora": {
        "method.select": ["threshold", "number"],
        "method.tau": [0.9, 1],
        "method.number": [1, 500],
        "method.modules": ["[down_proj]"],
    },
    "salora": {
        "method.safety_rank": [4, 500],
        "method.task_rank": [4, "null"],
        "method.n_prompts": [4, 100],
        "method.n_task": [4],
        "method.response_tokens": [2],
    },
    "sppft": {
        "method.layers": ["[0,1]", "[1,2]", "[2,9]"],
        "method.freeze_norms": ["true"],
    },
    "vaccine": {
        "method.rho": [0.1, 20],
        "method.steps": [1, 4],
        "method.batch_size": [2],
        "method.learning_rate": [1e-4],
        "method.weight_decay": [0],
        "method.harmless_per_refusal": [0, 1],
    },
}
"""Keys of each method and values for them, some of which some combinations cannot have."""

SHORT = {
    "lisa": ["method.align_steps=1", "method.finetune_steps=3", "method.min_cycles=null"],
    "safeinstr": ["method.ratio=0.2"],
    "vaccine": ["method.steps=2"],
    "booster": ["method.steps=2"],
    "repnoise": ["method.steps=2"],
    "sppft": ["method.layers=[1,2]"],
    "salora": ["model.lora={r: 4, alpha: 8, target_modules: all-linear}"],
}
"""Stages before the training made short, and what a method cannot do without; a drawn value comes after these."""


POOLS = {
    "cwac": "anchors step sae benign validation",
    "weight_only": "anchors",
    "activation_only": "step sae benign",
    "circuit_breaker": "step benign",
    "replay": "anchors step sae",
    "safe_delta": "anchors",
    "booster": "poison benign",
    "repnoise": "poison",
    "salora": "anchors",
    "bea": "safety",
    "lisa": "safety",
    "safeinstr": "safety",
    "vaccine": "benign",
}
"""The pools that a method reads, by the start of its name; the others read none."""


def reads(run: dict, pool: str) -> bool:
    own = next((pools for name, pools in POOLS.items() if run["method.name"].startswith(name)), "")
    attack = "poison anchors benign" if run["harmful_ratio"] > 0 else ""
    return pool in f"{own} {attack}".split()


def unpoisoned(a: dict, b: dict) -> bool:
    return a["harmful_ratio"] == b["harmful_ratio"] == 0


def whole_batches(run: dict) -> bool:
    """Whether the training ends before the first short batch."""
    rows = run["train.per_device_train_batch_size"] * run["train.gradient_accumulation_steps"]
    steps = run.get("train.max_steps", -1)
    return run["task.n_train"] % rows == 0 or 0 < steps * rows <= run["task.n_train"]


def selected(a: dict, b: dict, select: str) -> bool:
    return a.get("method.select") == b.get("method.select") == select


def ended(a: dict, b: dict) -> bool:
    return "train.max_steps" in a and a["train.max_steps"] == b.get("train.max_steps")


def as_many_refusals(a: dict, b: dict) -> bool:
    """Whether BEA adds the same number to both: it takes the larger of two."""

    def refusals(run: dict) -> int:
        harmful = round(run["harmful_ratio"] * run["task.n_train"])
        return max(run["method.num_safety"], round((run.get("method.safety_per_harmful") or 0) * harmful))

    return all(run["method.name"].startswith("bea") for run in (a, b)) and refusals(a) == refusals(b)


def as_strong(a: dict, b: dict) -> bool:
    """Whether `constrained_sft` multiplies beta by the same at every token of an answer, in both runs.

    Without poison the tasks' answers, two tokens with their end, are all that is trained on.
    """

    def factors(run: dict) -> list[float]:
        near = [run["method.factor"]] * int(run["method.length"])
        near[:1] = [run["method.first_factor"]] * len(near[:1])
        return [*near, *[1.0] * 40][: 2 if unpoisoned(a, b) else 40]

    return a["method.name"] == b["method.name"] == "constrained_sft" and factors(a) == factors(b)


def drawn(run: dict) -> bool:
    """Whether an adapter's directions are drawn from the null space without looking at rows."""
    return run.get("method.directions") == "random" or run.get("method.basis") == "complement"


def both_have_room(a: dict, b: dict) -> bool:
    """Whether Safe Delta takes every entry but the excluded ones: the default budget has room for a few steps."""
    runs = (a, b)
    return all(r["method.name"] == "safe_delta" and r["method.scale"] >= 0.1 and steps_of(r) <= 4 for r in runs)


def whole_pool(run: dict) -> bool:
    """Whether Safe Delta reads every anchor that the pool has."""
    n = run.get("method.n_prompts")
    return run["method.name"] == "safe_delta" and (n is None or n >= run["pools.sizes.anchors"])


def one_pair(run: dict) -> bool:
    """Whether every batch of RepNoise's stage is the one pair and its refusal."""
    return run["method.name"] == "repnoise" and run["method.n_pairs"] == 1


def batches_a_step(run: dict) -> int:
    """How many batches a step takes: accumulation ends with the epoch."""
    batches = math.ceil(run["task.n_train"] / run["train.per_device_train_batch_size"])
    return min(run["train.gradient_accumulation_steps"], batches)


def within_a_cycle(a: dict, b: dict) -> bool:
    """Whether two runs of Lisa end within the first steps on the task that both have."""
    if not ended(a, b) or not a["method.name"] == b["method.name"] == "lisa":
        return False
    return a["train.max_steps"] <= a["method.align_steps"] + min(
        a["method.finetune_steps"], b["method.finetune_steps"]
    )


def steps_of(run: dict) -> float:
    """Optimizer steps on the task's rows: `train.max_steps`, or those of the epochs."""
    most = run.get("train.max_steps", -1)
    rows = run["train.per_device_train_batch_size"] * run["train.gradient_accumulation_steps"]
    return most if most > 0 else run["train.num_train_epochs"] * math.ceil(run["task.n_train"] / rows)


def as_long(a: dict, b: dict) -> bool:
    return steps_of(a) == steps_of(b)


UNREAD = {
    "train.num_train_epochs": ("train.max_steps ends the training, or both are as long", as_long),
    "train.max_steps": ("the epochs have as many steps", as_long),
    "train.bf16": (
        "autocast to bf16 changes nothing of a model in bf16",
        lambda a, b: a["model.dtype"] == b["model.dtype"] == "bfloat16",
    ),
    "train.gradient_checkpointing": ("what is computed twice is computed alike", lambda a, b: True),
    "train.dataloader_drop_last": (
        "no batch is short",
        lambda a, b: all(whole_batches(r) for r in (a, b) if r.get("train.dataloader_drop_last")),
    ),
    "train.gradient_accumulation_steps": (
        "both take the whole epoch in a step",
        lambda a, b: batches_a_step(a) == batches_a_step(b),
    ),
    "method.batch_size": ("RepNoise has one pair for its batches", lambda a, b: one_pair(a) and one_pair(b)),
    "method.n_prompts": ("Safe Delta reads the whole pool", lambda a, b: whole_pool(a) and whole_pool(b)),
    "train.max_length": (
        "no row of the embedded world is as long",
        lambda a, b: min(a["train.max_length"], b["train.max_length"]) >= (24 if unpoisoned(a, b) else 32),
    ),
    "mix_mode": ("harmful_ratio=0 mixes nothing", unpoisoned),
    "poison": ("harmful_ratio=0 takes none", unpoisoned),
    "poison_choice": ("harmful_ratio=0 chooses none", unpoisoned),
    "poison_trigger": ("harmful_ratio=0 has no row to put it before", unpoisoned),
    "pools.poison_categories": ("harmful_ratio=0 takes none", unpoisoned),
    "method.number": ("read under select=number alone", lambda a, b: selected(a, b, "threshold")),
    "method.tau": (
        "read under select=threshold alone, and no matrix has a cosine between two that are high",
        lambda a, b: selected(a, b, "number") or min(a["method.tau"], b["method.tau"]) >= 0.9,
    ),
    "method.scale": ("both budgets have room for the whole update", both_have_room),
    "method.activation.gate": (
        "in a few steps no latent leaves its gate",
        lambda a, b: max(steps_of(a), steps_of(b)) <= 4,
    ),
    "method.min_cycles": ("both have as many cycles as the run has room for", lambda a, b: ended(a, b)),
    "method.energy": (
        "of AsFT, read under operator=projector_k alone",
        lambda a, b: "projector_k" not in (a.get("method.operator"), b.get("method.operator")),
    ),
    **{f"method.{key}": ("every token has the same beta", as_strong) for key in ("factor", "first_factor", "length")},
    **{
        f"method.{key}": ("BEA adds as many refusals", as_many_refusals)
        for key in ("num_safety", "safety_per_harmful")
    },
    "method.n_rows": ("directions drawn at random look at no rows", lambda a, b: drawn(a) and drawn(b)),
    "method.finetune_steps": ("the run ends in the first of them", within_a_cycle),
    "method.trigger_at_inference": ("it is served otherwise, not trained otherwise", lambda a, b: True),
    "method.name": (
        "the ablation of the serving has BEA's weights",
        lambda a, b: {a["method.name"], b["method.name"]} == {"bea", "bea_no_trigger"},
    ),
    **{
        f"pools.sizes.{pool}": (
            "neither method reads that pool",
            lambda a, b, pool=pool: not reads(a, pool) and not reads(b, pool),
        )
        for pool in "poison anchors step sae benign safety".split()
    },
}
"""Identity keys in which two runs of the same weights may differ: why, and for which two."""


LATE = (
    "protects every direction of every input",
    "none of the preserved latents fires",
    "refuses none of the harmful pairs' requests",
)
"""Refusals that only the model's own answers or states can tell: they leave a run marked failed, never a done one."""


@st.composite
def configurations(draw) -> list[str]:
    """Overrides of one run: a method and up to six options, each of which its configuration has."""
    method = draw(st.sampled_from(sorted(OWN)))
    keys = COMMON | OWN[method]
    own = draw(st.lists(st.sampled_from(sorted(OWN[method])), max_size=3, unique=True)) if OWN[method] else []
    common = draw(st.lists(st.sampled_from(sorted(COMMON)), max_size=4, unique=True))
    drawn = [f"{key}={draw(st.sampled_from(keys[key]))}" for key in [*common, *own]]
    return [f"method={method}", *SHORT.get(method, []), *drawn]


def unexplained(a: dict, b: dict) -> list[str]:
    """Identity keys that differ between two runs although no entry of UNREAD says why they may."""
    if a["method.name"] == b["method.name"] == "safe_delta" and a["method.scale"] == b["method.scale"] == 0:
        return []  # no budget: both are the aligned model, however it was trained
    differ = [k for k in sorted({*a, *b}) if a.get(k) != b.get(k)]
    return [k for k in differ if not (k in UNREAD and UNREAD[k][1](a, b))]


class Fuzz:
    """Runs configurations, one after the other, into one folder, and keeps what is wrong with each."""

    def __init__(self, folder: Path, artifacts: Path):
        self.runs, self.artifacts = folder / "runs", artifacts
        self.seen: dict[str, tuple[dict, list[str]]] = {}
        self.faults: list[str] = []
        self.outcomes = {"ran": 0, "refused": 0}

    def statuses(self) -> dict[str, str]:
        return {p.parent.name: json.loads(p.read_text())["status"] for p in self.runs.glob("*/status.json")}

    def __call__(self, overrides: list[str], capfd) -> None:
        before, folders = self.statuses(), set(self.runs.glob("*/*"))
        fixed = [*BASE, f"pools.sizes={SIZES}", f"model.sae={SAE}"]
        code = call(*fixed, *overrides, f"paths.runs={self.runs}", f"paths.artifacts={self.artifacts}")
        logging.getLogger().handlers.clear()  # Hydra's, on the captured stream of this run
        printed = "".join(capfd.readouterr())
        errors = re.findall("^error: .*", printed, re.M)
        new = {name: status for name, status in self.statuses().items() if before.get(name) != status}

        def wrong(what: str, evidence: bool = True) -> None:
            self.faults.append(f"{what}: {' '.join(overrides)}\n    {errors or printed[-400:] if evidence else ''}")

        if "Traceback" in printed:
            wrong("a traceback")
        elif code == 0:
            self.outcomes["ran"] += 1
            if errors or [s for s in new.values() if s != "done"]:
                wrong(f"exit code 0 and {new}")
            for name in new:
                self.compare(name, overrides, wrong)
        else:
            self.outcomes["refused"] += 1
            if code not in (1, 2) or len(errors) != 1:
                wrong(f"exit code {code} and {len(errors)} error lines")
            elif any(said in errors[0] for said in LATE):
                if set(new.values()) - {"failed"}:
                    wrong(f"refused, and marked {new}")
            elif new or set(self.runs.glob("*/*")) - folders:
                wrong(f"refused after something was written ({new})")

    def compare(self, name: str, overrides: list[str], wrong) -> None:
        status = json.loads((self.runs / name / "status.json").read_text())
        mine = identity.identity(OmegaConf.load(self.runs / name / "config.yaml"))
        other = self.seen.setdefault(status["weights_sha256"], (mine, overrides))
        if keys := unexplained(mine, other[0]):
            wrong(f"same weights as [{' '.join(other[1])}] although {keys} differ", evidence=False)


@pytest.mark.faults
@pytest.mark.parametrize(
    "overrides",
    [
        ["method=cwac", "method.weight.prefill=Sure"],
        ["method=cwac", "method.weight.layers=[9]"],
        ["method=cwac_closed", "method.weight.refresh_steps=1", f"model.lora={COMMON['model.lora'][0]}"],
        ["method=cwac", "method.activation.n_latents=257"],
        ["method=nullspace_cwac", "method.activation.n_latents=1000"],
        ["method=activation_only", "+model.sae.layers=[4]"],
        ["method=activation_only", "+model.sae.k=257"],
        ["method=activation_only", "+model.sae.router=layer:3", "+model.sae.layers=[1,2]"],
        ["method=activation_only", "model.sae.m=0"],
        ["method=activation_only", "+model.sae.lr=-1"],
        ["method=activation_only", "+model.sae.renorm_every=0"],
    ],
)
def test_a_constraint_that_cannot_be_had_is_refused_before_a_folder_is_made(overrides, tmp_path, artifacts, capfd):
    """Once the SAE was built first, and a run marked failed was left behind."""
    fuzz = Fuzz(tmp_path, artifacts)
    fuzz(overrides, capfd)
    assert fuzz.outcomes["refused"] == 1 and not fuzz.faults, fuzz.faults


def test_every_method_is_fuzzed():
    assert set(OWN) == set(METHODS)


@pytest.mark.faults
def test_random_options_run_or_are_refused_and_share_no_weights(tmp_path, artifacts, capfd):
    fuzz = Fuzz(tmp_path, artifacts)

    @settings(
        max_examples=EXAMPLES or 12,
        derandomize=not EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(configurations())
    def one(overrides):
        fuzz(overrides, capfd)

    one()
    with capfd.disabled():
        if EXAMPLES:
            print(f"\n{fuzz.outcomes}, {len(fuzz.faults)} faults", *fuzz.faults, sep="\n")
    assert fuzz.outcomes["ran"] >= (EXAMPLES or 12) // 4, fuzz.outcomes
    assert not fuzz.faults, "\n".join(fuzz.faults)
