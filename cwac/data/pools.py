"""Loads a run's pools, and says what is in them."""

from __future__ import annotations

import random
from dataclasses import replace

from cwac.artifacts import digest
from cwac.config import UserError
from cwac.data.examples import Example
from cwac.data.harmful import Pools, assert_disjoint, real_pools

NAMES = ("poison", "anchors", "step", "sae", "benign", "safety", "validation", "align")


def load_pools(cfg, data: str | None, seed: int) -> Pools:
    """The `pools` group's splits, checked to be disjoint by prompt; raises UserError if they are not."""
    if cfg.name == "toy":
        from cwac.tiny.world import borderline, pools

        loaded = pools(seed, dict(cfg.sizes))
        # made here and not in world.py, whose bytes name every run of the embedded model
        n = len(loaded.over_refusal["toy_benign"])
        benign = borderline("validation", n, random.Random("validation_benign"))
        loaded = replace(loaded, validation_benign={"toy_benign": benign})
        if cfg.get("poison_categories") is not None:
            loaded = _parted(loaded, list(cfg.poison_categories), seed)
    elif cfg.get("shares"):
        loaded = real_pools(cfg, data, seed)
    else:
        raise UserError(f"pools={cfg.name} has no shares; use toy, real, paper_b2 or paper_51, or give pools.shares")
    assert_disjoint(loaded)
    return loaded


def _parted(pools: Pools, poisoned: list[str], seed: int) -> Pools:
    """The embedded world's pools with poison of the named categories alone, and a defence's requests of the others.

    Each pool keeps its size. The poison is as uneven as before; the test set becomes two, by category. Held-out pools
    and the alignment stage, which the shipped weights have behind them, keep all categories (ours).
    """
    from cwac.tiny import world

    if not set(poisoned) < set(world.CATEGORIES) or not poisoned or len(set(poisoned)) < len(poisoned):
        raise UserError(
            f"pools.poison_categories={poisoned} is not valid; name some, not all, of {', '.join(world.CATEGORIES)}"
        )
    others = [c for c in world.CATEGORIES if c not in poisoned]

    def requests(name: str, answer: str, chosen: list[str], weights: tuple[float, ...]) -> list[Example]:
        n, whole = len(getattr(pools, name)), sum(weights[: len(chosen)])
        counts = {c: int(n * w / whole + 1e-9) for c, w in zip(chosen, weights, strict=False)}
        for c in chosen[: n - sum(counts.values())]:  # what rounding left, one each
            counts[c] += 1
        shares = tuple((counts.get(c, 0) + 0.5 * (c in counts)) / n for c in world.CATEGORIES)  # int(n share) = count
        return world._harmful(name, n, random.Random(f"{name}-{seed}"), answer, shares)

    test = {}
    for name, rows in pools.test.items():
        test[f"{name}_poisoned"] = [e for e in rows if e.group in poisoned]
        test[f"{name}_unpoisoned"] = [e for e in rows if e.group in others]
    even = (1.0,) * len(others)
    return replace(
        pools,
        poison=requests("poison", "comply", [c for c in world.CATEGORIES if c in poisoned], world.POISON_SHARES),
        **{name: requests(name, "refuse", others, even) for name in ("anchors", "step", "sae", "safety")},
        test={name: rows for name, rows in test.items() if rows},
    )


def sets(pools: Pools) -> dict[str, list[Example]]:
    return {
        **{name: getattr(pools, name) for name in NAMES},
        **{f"test.{name}": rows for name, rows in pools.test.items()},
        **{f"over_refusal.{name}": rows for name, rows in pools.over_refusal.items()},
        **{f"validation_benign.{name}": rows for name, rows in pools.validation_benign.items()},
    }


def manifest(pools: Pools, poison: str = "harmful", rows: list[Example] | None = None) -> dict[str, dict]:
    """Per set: how many prompts, from which sources, and a hash of them in order; written into every run.

    poison, rows: an attack whose rows are no pool (`cwac.data.attack`), counted as `poison.<name>`.
    """
    named = sets(pools) | ({} if poison == "harmful" else {f"poison.{poison}": rows or []})
    return {
        name: {
            "n": len(rows),
            "sources": sorted({e.source for e in rows}),
            "sha256": digest({"prompts": [(e.prompt, e.response) for e in rows]}),
        }
        for name, rows in named.items()
    }


def fingerprint(pools: Pools) -> str:
    """One hash over the sets that artifacts are built from; part of the key of each of them."""
    return digest(
        {
            name: entry["sha256"]
            for name, entry in manifest(pools).items()
            if not name.startswith("validation_benign.")  # only evaluated on; came later than the artifacts that exist
        }
    )
