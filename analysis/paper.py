"""The paper's printed numbers, and display labels and order, once: of methods, metrics and sets.

Numbers: Peng, Zhang, Zeng, Jiang and Gao, *Preventing Safety Drift in Large Language Models via Coupled Weight and
Activation Constraints* (CWAC), arXiv:2604.12384, Tables 1 to 5, in `paper_results.csv`.

Slugs are those of `conf/method/*.yaml`; a method that is not listed here (a newcomer's) is shown under
its slug, after the others, and needs no entry.
"""

import re
from pathlib import Path

import pandas as pd

ALIGNED = "aligned"  # the model before fine-tuning: rows of epoch 0, not a method one can train

# The order is that of tables and legends: the paper's rows, its ablations, then what its tables do not have, marked:
# `(ours)` for our own, `(added)` for other people's.
METHODS = {
    ALIGNED: "aligned, not fine-tuned",
    "sft": "SFT",
    "lisa": "Lisa",
    "safeinstr": "SafeInstr",
    "bea": "BEA",
    "sppft": "SPPFT",
    "asft": "AsFT",
    "weight_only": "weight-only",
    "activation_only": "activation-only",
    "cwac_literal": "CWAC, Alg. 1 literally",
    "cwac": "CWAC",
    "weight_only_closed": "weight-only closed (ours)",
    "cwac_closed": "CWAC closed (ours)",
    "bea_no_trigger": "BEA without trigger (ours)",
    "safelora": "Safe LoRA (added)",
    "salora": "SaLoRA (added)",
    "ldifs": "LDIFS (added)",
    "l2sp": "L2-SP (added)",
    "ewc": "EWC on refusals (added)",
    "constrained_sft": "constrained SFT (added)",
    "inflora": "InfLoRA-style (added)",
    "safe_delta": "Safe Delta (added)",
    "resta": "RESTA (added)",
    "circuit_breaker": "circuit breaker (added)",
    "vaccine": "Vaccine (added)",
    "booster": "Booster (added)",
    "repnoise": "RepNoise (added)",
    "replay": "replay (added)",
    "weight_only_closed_prefill": "closed, prefilled anchors (ours)",
    "nullspace": "null-space adapter (ours)",
    "nullspace_cwac": "null-space adapter, coupled (ours)",
}
SETTING = ", "
"""Between a method's slug and the values by which several settings of it stand side by side: `cwac, energy 0.99`."""
# As the paper's tables name them.
PRINTED = {
    "SFT": "sft",
    "Lisa": "lisa",
    "SafeInstr": "safeinstr",
    "BEA": "bea",
    "SPPFT": "sppft",
    "AsFT": "asft",
    "Weight-only": "weight_only",
    "Activation-only": "activation_only",
    "CWAC": "cwac",
}
BASELINES = ("sft", "lisa", "safeinstr", "bea", "sppft", "asft")
MODELS = {
    "llama2": "Llama-2-7B",
    "llama3": "Llama-3-8B",
    "mistral": "Mistral-7B",
    "gemma2": "Gemma-2-9B",
    "smollm2": "SmolLM2-135M",
    "qwen_coder_05b": "Qwen2.5-Coder-0.5B",
    "tiny": "embedded model",
}
TASKS = {"sst2": "SST-2", "agnews": "AG News", "gsm8k": "GSM8K", "pubmedqa": "PubMedQA", "alpaca": "AlpacaEval"}

# What a method saw beyond the task's rows (cwac.methods.base.EXTRA_DATA), as a count reads it: "150 refusals".
EXTRA = {
    "harmful_prompts": "harmful prompts",
    "refusals": "refusals",
    "harmful_pairs": "harmful pairs",
    "harmless_rows": "harmless rows",
    "base_weights": "matrices of the unaligned base",
    "trigger": "trigger tokens",
}

# Percentages of a number of prompts: an exact binomial interval exists for these.
PROPORTIONS = ("FA", "FA_lenient", "off_format", "HS", "refusal", "other", "OR", "AE", "task_answers")
COUNTED = tuple(metric for metric in PROPORTIONS if metric != "AE")
"""Shares of prompts, each of which counts or does not; AE averages an annotator's preferences, which may divide."""

METRICS = {
    "FA": "task accuracy (FA, %)",
    "FA_lenient": "task accuracy, the answer anywhere in the response (%)",
    "off_format": "task responses that are not an answer (%)",
    "HS": "harmful compliance (HS, %)",
    "refusal": "refusal of harmful requests (%)",
    "other": "neither refusal nor harm (%)",
    "OR": "over-refusal of benign requests (OR, %)",
    "AE": "AlpacaEval win rate (AE, %)",
    "task_answers": "answers to other requests in the form of the task's (%)",
    "task_loss": "task loss, nats per token",
    "poison_loss": "loss on the poison, nats per token",
}
# What the verdicts are about. They share their sets; FA and OR have sets of their own.
VERDICTS = ("HS", "refusal", "other")


NUMBER = re.compile(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)")
RATE = re.compile(rf"(\brate ){NUMBER.pattern}")

LOWER_IS_BETTER = ("HS", "OR")

RESULTS = Path(__file__).with_name("paper_results.csv")


def printed(path: Path = RESULTS) -> pd.DataFrame:
    """The numbers of the paper's Tables 1 to 5, as printed.

    Columns: artifact, model, method (our slug), task, harmful_ratio (NaN in an average over p), metric, value,
    text (the digits as printed), average (bool; over tasks where task is `average`, else over p).
    """
    frame = pd.read_csv(path, dtype=str)
    frame["average"] = (frame["task"] == "average") | (frame["harmful_ratio"] == "average")
    frame["method"] = frame["method"].map(lambda name: PRINTED.get(name, name))
    frame["harmful_ratio"] = pd.to_numeric(frame["harmful_ratio"], errors="coerce")
    frame["text"], frame["value"] = frame["value"], pd.to_numeric(frame["value"])
    return frame


def method_label(slug: str) -> str:
    """The label of a method; its slug where none is listed. Settings follow the label as they follow the slug."""
    name, comma, setting = slug.partition(SETTING)
    return METHODS.get(name, name) + comma + setting_label(setting)


def rate_label(rate: float) -> str:
    """A learning rate as every table, figure and sentence has it: `2e-4`, `6e-6`; `0.05` from 0.01 on.

    Slugs and exported csv files keep it as Python writes it, `0.0002` and `6e-06`.
    """
    if not 0 < rate < 0.01:
        return f"{rate:g}"
    digits, _, power = f"{rate:.5e}".partition("e")
    return f"{float(digits):g}e{int(power)}"


def setting_label(setting: str) -> str:
    """A setting, such as `energy 0.99, rate 0.0002`, with each learning rate as `rate_label` has it."""
    return RATE.sub(lambda found: found[1] + rate_label(float(found[2])), setting)


def extra_label(counts: dict[str, float], most: dict[str, float] | None = None) -> str:
    """`160 harmful prompts, 150 refusals` in the order of EXTRA; `none` if that was recorded, empty without counts.

    most: the largest counts, where `counts` are the smallest of several runs': `151 to 160 harmful prompts`.
    """
    most = counts if most is None else most
    if counts.get("none") is not None:
        counts = {kind: n for kind, n in counts.items() if kind != "none"}
        if not counts:
            return "none"
    known = list(EXTRA)
    kinds = sorted(counts, key=lambda k: known.index(k) if k in EXTRA else len(known))
    ranges = {k: f"{counts[k]:g}" if counts[k] == most[k] else f"{counts[k]:g} to {most[k]:g}" for k in kinds}
    return ", ".join(f"{ranges[k]} {EXTRA.get(k, k.replace('_', ' '))}" for k in kinds)


def method_order(slug: str) -> tuple:
    """A sort key: listed methods in their order, then the others by name; numbers in a name by their value.

    A method's settings stand in its place: `cwac, energy 0.99` after `cwac`, before `cwac, energy 0.999`.
    """
    known = list(METHODS)
    name, _, setting = slug.partition(SETTING)
    place = known.index(name) if name in METHODS else len(known)
    return (place, *by_value(name), *by_value(setting))


def by_value(text: str) -> tuple:
    """A sort key of a text in which numbers count by their value: 1e-05 before 3e-05 before 1e-04, 9 before 10."""
    parts = NUMBER.split(text.casefold())
    return tuple((1, float(part), "") if k % 2 else (0, 0.0, part) for k, part in enumerate(parts))
