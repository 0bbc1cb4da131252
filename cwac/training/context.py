"""From a composed configuration to what a method sets itself up with: the same for a run and for every experiment."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from cwac.core.distributed import leader_first, process_rank, world_size
from cwac.core.errors import UserError
from cwac.data.pools import load_pools
from cwac.data.tokenize import encode_opening
from cwac.models.context import Context, make_context
from cwac.models.layers import device
from cwac.models.loading import load


def open_context(cfg: DictConfig) -> Context:
    """Pools, model and tokenizer of a validated configuration; the model is on the device a run would use.

    Raises UserError where a pool or the model cannot be had, the tokenizer has no template to render prompts with, or
    it lacks the words of `eval.prefill`.
    """
    pools = load_pools(cfg.pools, cfg.paths.data, cfg.seed)
    with leader_first():  # transformers saves a model that is built on the way on rank 0 alone
        loaded = load(cfg.model, Path(cfg.paths.artifacts), cfg.seed)
    if cfg.train.template == "chat" and not loaded.tokenizer.chat_template:
        raise UserError(
            f"model={cfg.model.name}: its tokenizer has no chat template, so train.template=chat cannot be rendered; "
            "use train.template=alpaca, or a chat model"
        )
    if cfg.eval.get("prefill"):
        encode_opening(loaded.tokenizer, cfg.eval.prefill)
    loaded.model.to(device())
    rows = {"template": cfg.train.template, "max_length": cfg.train.max_length}
    ranks = {"process_rank": process_rank(), "world_size": world_size()}
    return make_context(loaded, pools, cfg.paths.artifacts, seed=cfg.seed, **rows, **ranks)
