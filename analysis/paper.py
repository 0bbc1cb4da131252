"""Display labels and order, once: of methods, metrics and sets.

Slugs are those of `conf/method/*.yaml`; a method that is not listed here (a newcomer's) is shown under
its slug, after the others, and needs no entry.
"""

ALIGNED = "aligned"  # the model before fine-tuning: rows of epoch 0, not a method one can train

# `(ours)`: not in the paper. The order is that of tables and legends.
METHODS = {
    ALIGNED: "aligned, not fine-tuned",
    "sft": "SFT",
    "weight_only": "weight-only",
    "activation_only": "activation-only",
    "cwac_literal": "CWAC, Alg. 1 literally",
    "cwac": "CWAC",
    "weight_only_closed": "weight-only closed (ours)",
    "cwac_closed": "CWAC closed (ours)",
    "lisa": "Lisa",
    "bea": "BEA",
    "asft": "AsFT",
    "safeinstr": "SafeInstr",
    "sppft": "SPPFT",
}

# Percentages of a number of prompts: an exact binomial interval exists for these.
PROPORTIONS = ("FA", "FA_lenient", "off_format", "HS", "refusal", "other", "OR")

METRICS = {
    "FA": "task accuracy (FA, %)",
    "FA_lenient": "task accuracy, the answer anywhere in the response (%)",
    "off_format": "task responses that are not an answer (%)",
    "HS": "harmful compliance (HS, %)",
    "refusal": "refusal of harmful requests (%)",
    "other": "neither refusal nor harm (%)",
    "OR": "over-refusal of benign requests (OR, %)",
    "task_loss": "task loss, nats per token",
}
# What the verdicts are about. They share their sets; FA and OR have sets of their own.
VERDICTS = ("HS", "refusal", "other")


def method_label(slug: str) -> str:
    """The label of a method; its slug where none is listed."""
    return METHODS.get(slug, slug)


def method_order(slug: str) -> tuple[int, str]:
    """A sort key: listed methods in their order, then the others by name."""
    known = list(METHODS)
    return (known.index(slug) if slug in METHODS else len(known), slug)
