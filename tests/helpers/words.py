"""The definition that `PromptIndex` is held against."""

from cwac.data.near_duplicates import normalise_prompt


def jaccard(a: str, b: str) -> float:
    """Shared words over all words of two prompts, in [0, 1]."""
    x, y = set(normalise_prompt(a).split()), set(normalise_prompt(b).split())
    return len(x & y) / len(x | y) if x | y else 1.0
