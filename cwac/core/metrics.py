"""The metrics that tables and sweepers weigh, and how a set of prompts that is asked in another way is named."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

VARIATION = "+"
"""Stands in the name of a set of prompts that is another one asked differently (`toy_harmful+prefill`): reported by
itself, and part of no headline."""

OBJECTIVE = ("FA", "HS", "refusal", "other", "OR")
"""Metrics, in percent, that `objective` may weigh."""


def objective(weights: Mapping[str, float], rows: Iterable[Mapping]) -> float | None:
    """What a sweeper minimises: the sum of weight x mean over sets; percentage points.

    rows: metric rows of one evaluation; those of a `VARIATION` do not count. None where a metric
    that has a weight was not measured.
    """
    rows = [r for r in rows if VARIATION not in r.get("set", "")]
    total = 0.0
    for metric, weight in weights.items():
        values = [r["value"] for r in rows if r["metric"] == metric]
        if not values:
            return None
        total += weight * sum(values) / len(values)
    return total
