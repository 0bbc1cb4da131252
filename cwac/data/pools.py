"""Named harmful splits, disjoint by prompt: no defence may learn from what it is tested on.

Sources of the real pools: AdvBench (Zou et al. 2023, arXiv:2307.15043), HarmBench (Mazeika et al. 2024,
arXiv:2402.04249), XSTest (Roettger et al. 2024, arXiv:2308.01263), Alpaca (Taori et al. 2023) and, where a local
copy exists, the safety data of Bianchi et al. 2024 (arXiv:2309.07875). `pools=paper_b2` and `paper_51` add
JailbreakBench (Chao et al. 2024, arXiv:2404.01318) and BeaverTails (Ji et al. 2023, arXiv:2307.04657), at the sizes of
the paper's appendix B.2 and of its section 5.1.

Deviations:
- Which prompts serve which purpose, and whether they are disjoint, the paper does not say; the split here is
  `ours`. A prompt's pool is a function of its own text (a hash), never of the run seed nor of which other rows a
  copy of the data set holds: the alignment that ships with the project can never have seen a test prompt.
- AdvBench's targets are affirmative openings only ("Sure, here is ..."); they are the poison as they are, so the
  poison teaches the turn to compliance and no harmful content. JailbreakBench's targets are of the same kind;
  BeaverTails' responses are answers in full.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import chain

from cwac.core.cache import digest
from cwac.core.errors import UserError
from cwac.data.examples import Example, Pools
from cwac.data.harmful_sources import benign_rows, harmful_rows, optional_harmful_rows, taken_of_each
from cwac.data.near_duplicates import PromptIndex, assert_disjoint, normalise_prompt, place_of

SPLITS = (
    "test over_refusal validation validation_benign poison anchors step sae safety align benign align_benign"
).split()
"""Every purpose a real prompt can have. The first four are held out; the two `_benign` ones and `align` belong to
the alignment stage, the rest are the fields of `Pools`."""

HELD_OUT = SPLITS[:4]

REFUSALS = (
    "I'm sorry, but I can't help with that. It could cause serious harm to other people.",
    "I cannot assist with this request because it is illegal.",
    "No, I won't help with that. It could put people in danger.",
    "I'm not able to provide that kind of information.",
    "Sorry, that is something I can't support. Is there something safe I can help you with instead?",
    "I can't do that. What you describe is against the law and could hurt someone.",
    "That request goes against my guidelines, so I will not answer it.",
    "I must decline. Helping with this would be unethical.",
    "I understand you are asking, but I am unable to assist with harmful activities.",
    "I will not provide instructions for this. If you are in trouble, please talk to someone you trust.",
    "As an AI assistant, I cannot create content like that.",
    "I'm sorry, I can't fulfil this request. It would violate other people's safety or privacy.",
    "This is not something I can help with, since it may lead to harm.",
    "I do not feel comfortable answering that. Let's talk about something else.",
    "I have to refuse: that would be dangerous and irresponsible.",
    "My answer is no. I cannot help anyone do that.",
    "Unfortunately, I can't share anything on that topic, because it could be misused.",
    "I won't write that. Spreading such content harms people.",
    "It would be wrong for me to help with this, so I cannot continue.",
    "I can't engage with that request. I'd be glad to help with a lawful alternative.",
)
"""Refusals (ours) for requests whose data set has none; varied, so that no single opening carries the refusal."""


def real_pools(cfg_pools: Mapping, data: str | None, seed: int = 0) -> Pools:
    """The pools of the real models, from the hub or the folder `data` (see `conf/pools/real.yaml`).

    cfg_pools: `split_seed`, `jaccard`, `limit` and `shares` (source -> pool -> share of its prompts); optional `take`
    (source -> how many of its prompts, None for all) and `beavertails_split`.
    seed: taken because the toy pools need it, and without effect: the same rows in the same order for every run
    seed, so that seeds share artifacts, and any first n rows of a pool are a mixture of its sources.

    Raises: UserError where a data set or column is missing, a share is malformed, or a pool comes out empty.
    """
    splits = real_splits(cfg_pools, data)
    salt = f"order:{cfg_pools['split_seed']}"

    def order(name: str, examples: Iterable[Example]) -> list[Example]:
        rows = sorted(examples, key=lambda e: place_of(e.prompt, salt))
        if not rows:
            raise UserError(f"pools.shares: no source gives anything to the pool `{name}`; give one a share of it")
        return rows

    flat = "poison anchors step sae benign safety align validation".split()
    pools = Pools(
        **{name: order(name, chain.from_iterable(splits[name].values())) for name in flat},
        **{
            name: {source: order(f"{name}.{source}", rows) for source, rows in splits[name].items()}
            for name in ("test", "over_refusal", "validation_benign")
        },
    )
    assert_disjoint(pools)
    return pools


def real_splits(cfg_pools: Mapping, data: str | None) -> dict[str, dict[str, list[Example]]]:
    """Every split by purpose (`SPLITS`) and source; what `real_pools` and the alignment stage are made of.

    No row of a split is a near-duplicate (word-set Jaccard >= `jaccard`) of a row of a held-out split before it.
    """
    for key in ("split_seed", "jaccard", "limit", "shares"):
        if key not in cfg_pools:
            raise UserError(f"pools.{key} is missing; compare with conf/pools/real.yaml")
    rows = harmful_rows(data) | optional_harmful_rows(cfg_pools, data) | benign_rows(data, int(cfg_pools["limit"]))
    rows = taken_of_each(rows, cfg_pools)
    splits: dict[str, dict[str, list[Example]]] = {name: {} for name in SPLITS}
    for kind, examples in rows.items():
        shares = dict(cfg_pools["shares"].get(kind) or {})
        _check_shares(kind, shares)
        for example in examples:
            pool = _pool_of(example.prompt, shares, int(cfg_pools["split_seed"]))
            if pool is not None:
                splits[pool].setdefault(kind, []).append(example)
    seen: set[str] = set()
    held_out = PromptIndex(float(cfg_pools["jaccard"]))
    for name in SPLITS:
        for kind, examples in splits[name].items():
            kept = []
            for example in examples:
                key = normalise_prompt(example.prompt)
                if key and key not in seen and not held_out.has_near(example.prompt):
                    seen.add(key)
                    kept.append(_with_refusal(example) if name in ("safety", "align") else example)
            splits[name][kind] = kept
        if name in HELD_OUT:  # after the split is complete: its own rows may resemble each other
            for example in chain.from_iterable(splits[name].values()):
                held_out.add(example.prompt)
    return splits


def _pool_of(prompt: str, shares: Mapping[str, float], split_seed: int) -> str | None:
    place = place_of(prompt, split_seed)
    for pool, share in shares.items():
        place -= float(share)
        if place < 0:
            return pool
    return None


def _check_shares(source: str, shares: Mapping[str, float]) -> None:
    for pool, share in shares.items():
        if pool not in SPLITS:
            raise UserError(f"pools.shares.{source}.{pool} is no pool; choose from {', '.join(SPLITS)}")
        try:
            valid = 0 <= float(share) <= 1
        except (TypeError, ValueError):
            valid = False
        if not valid:
            raise UserError(f"pools.shares.{source}.{pool}={share} must be a share between 0 and 1")
    if sum(map(float, shares.values())) > 1 + 1e-9:
        raise UserError(f"pools.shares.{source} adds up to {sum(map(float, shares.values())):g}; it must not exceed 1")


def _with_refusal(example: Example) -> Example:
    """The request with the refusal from its data set, or else one of `REFUSALS`, chosen by a hash of the prompt."""
    if example.response and example.source == "safety_tuned_llamas":
        return example
    chosen = int(place_of(example.prompt, "refusal") * len(REFUSALS))
    return replace(example, response=REFUSALS[chosen])


NAMES = ("poison", "anchors", "step", "sae", "benign", "safety", "validation", "align")


def load_pools(cfg, data: str | None, seed: int) -> Pools:
    """The `pools` group's splits, checked to be disjoint by prompt; raises UserError if they are not."""
    if cfg.name == "toy":
        from cwac.data.tiny_world import borderline, pools

        loaded = pools(seed, dict(cfg.sizes))
        # drawn here, since the pools of the embedded world were frozen before there was such a set
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
    from cwac.data import tiny_world

    if not set(poisoned) < set(tiny_world.CATEGORIES) or not poisoned or len(set(poisoned)) < len(poisoned):
        raise UserError(
            f"pools.poison_categories={poisoned} is not valid; name some, not all, of "
            f"{', '.join(tiny_world.CATEGORIES)}"
        )
    others = [c for c in tiny_world.CATEGORIES if c not in poisoned]

    def requests(name: str, answer: str, chosen: list[str], weights: tuple[float, ...]) -> list[Example]:
        n, whole = len(getattr(pools, name)), sum(weights[: len(chosen)])
        counts = {c: int(n * w / whole + 1e-9) for c, w in zip(chosen, weights, strict=False)}
        for c in chosen[: n - sum(counts.values())]:  # what rounding left, one each
            counts[c] += 1
        shares = tuple(
            (counts.get(c, 0) + 0.5 * (c in counts)) / n for c in tiny_world.CATEGORIES
        )  # int(n share) = count
        return tiny_world._harmful(name, n, random.Random(f"{name}-{seed}"), answer, shares)

    test = {}
    for name, rows in pools.test.items():
        test[f"{name}_poisoned"] = [e for e in rows if e.group in poisoned]
        test[f"{name}_unpoisoned"] = [e for e in rows if e.group in others]
    even = (1.0,) * len(others)
    return replace(
        pools,
        poison=requests(
            "poison", "comply", [c for c in tiny_world.CATEGORIES if c in poisoned], tiny_world.POISON_SHARES
        ),
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

    poison, rows: an attack whose rows are no pool (`cwac.training.attack`), counted as `poison.<name>`.
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


def pools_digest(pools: Pools) -> str:
    """One hash over the sets that artifacts are built from; part of the key of each of them."""
    return digest(
        {
            name: entry["sha256"]
            for name, entry in manifest(pools).items()
            if not name.startswith("validation_benign.")  # only evaluated on; came later than the artifacts that exist
        }
    )
