"""Words that tests share: the likeness of two prompts by definition, and a complying opening."""

from cwac.data.near_duplicates import normalise_prompt

OPENING = "sure , here is how to"
"""As the embedded model complies."""


def jaccard(a: str, b: str) -> float:
    """Shared words over all words of two prompts, in [0, 1]; what `PromptIndex` is held against."""
    x, y = set(normalise_prompt(a).split()), set(normalise_prompt(b).split())
    return len(x & y) / len(x | y) if x | y else 1.0
