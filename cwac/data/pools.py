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
    elif cfg.get("shares"):
        loaded = real_pools(cfg, data, seed)
    else:
        raise UserError(f"pools={cfg.name} has no shares; use toy, real, paper_b2 or paper_51, or give pools.shares")
    assert_disjoint(loaded)
    return loaded


def _sets(pools: Pools) -> dict[str, list[Example]]:
    return {
        **{name: getattr(pools, name) for name in NAMES},
        **{f"test.{name}": rows for name, rows in pools.test.items()},
        **{f"over_refusal.{name}": rows for name, rows in pools.over_refusal.items()},
        **{f"validation_benign.{name}": rows for name, rows in pools.validation_benign.items()},
    }


def manifest(pools: Pools) -> dict[str, dict]:
    """Per set: how many prompts, from which sources, and a hash of them in order; written into every run."""
    return {
        name: {
            "n": len(rows),
            "sources": sorted({e.source for e in rows}),
            "sha256": digest({"prompts": [(e.prompt, e.response) for e in rows]}),
        }
        for name, rows in _sets(pools).items()
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
