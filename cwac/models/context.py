"""What a method may use when it sets itself up: the loaded model, the pools, and where artifacts are cached."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from cwac.data.examples import Pools
from cwac.data.pools import pools_digest
from cwac.models.loading import Loaded


@dataclass
class Context:
    """What a method may use when it sets itself up."""

    tokenizer: PreTrainedTokenizerBase
    pools: Pools
    loaded: Loaded
    artifacts: Path
    seed: int
    template: str = "chat"
    max_length: int = 512
    pools_key: str = ""
    """Hash of the pools' prompts; part of the key of every artifact built from them."""
    process_rank: int = 0
    world_size: int = 1
    steps: int = 0
    """Optimizer steps of the whole run; known from `setup` on, since `training_data` decides on the rows."""


def make_context(loaded: Loaded, pools: Pools, artifacts: str | Path, **settings) -> Context:
    """The context of a loaded model and its pools, whose hash is taken here.

    artifacts: folder of the cache. settings: further fields of `Context`, `seed` at least.
    """
    own = {"tokenizer": loaded.tokenizer, "artifacts": Path(artifacts), "pools_key": pools_digest(pools)}
    return Context(loaded=loaded, pools=pools, **own, **settings)


def artifact_key(context: Context) -> dict:
    """What every artifact built from the aligned model's activations on the pools depends on."""
    return {
        "model": context.loaded.key,
        "pools": context.pools_key,
        "template": context.template,
        "max_length": context.max_length,
    }
