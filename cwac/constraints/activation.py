"""Prepares the activation constraint of CWAC (arXiv:2604.12384, section 4.1): the autoencoder and its ranked latents.

Deviations: see `cwac/constraints/sae/__init__.py` and `cwac/methods/cwac.py`.
"""

from __future__ import annotations

import json
import logging
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from cwac.constraints.anchors import anchor_rows, encode_prompts, refused
from cwac.constraints.settings import Activation
from cwac.core.cache import load_or_build
from cwac.core.errors import UserError
from cwac.core.identity import text_content
from cwac.data.examples import Example
from cwac.data.web_text import documents, web_rows
from cwac.models.context import Context, artifact_key

log = logging.getLogger(__name__)

HELD_OUT = 10_000
"""Tokens of a corpus that measure the autoencoder, at most a fifth of its rows (ours)."""
RANKED = 500_000
"""Tokens that a corpus is read for where latents are ranked: enough for firing rates (ours)."""


def ranked_latents(model: nn.Module, context: Context, activation: Activation) -> tuple[Any, Any, dict, dict]:
    """The sparse autoencoder (SAE) of the aligned model and its most safety-critical latents, best first.

    Both are computed once and cached as artifacts; of a pretrained SAE only its quality is. Returns the `RoutedSAE` or
    `PretrainedSAE` on the model's device, the table of ranked latents (see `rank_latents`), the SAE's quality report,
    and the cache key of the ranking.
    Raises UserError if `activation.sae` has an unknown field, or names a pretrained SAE that does not fit the model.
    """
    import pandas as pd

    from cwac.constraints.sae import pretrained
    from cwac.constraints.sae.autoencoder import RoutedSAE
    from cwac.constraints.sae.fit import fit_sae, quality
    from cwac.constraints.sae.ranking import rank_latents

    config = sae_config(activation)
    pools = context.pools

    def encode(examples, responses=False):
        return encode_prompts(context, examples, responses)

    prompts = sae_prompts(model, context, activation)
    n_held_out = max(1, len(prompts) // 5)  # kept out of the fit for the quality report
    harmful, held_out_harmful = encode(prompts[n_held_out:]), encode(prompts[:n_held_out])
    refused_only = {"prompts": "refused"} if activation.refused_only else {}
    device = next(model.parameters()).device
    if config.pretrained is not None:
        found = pretrained.find(config.pretrained, config.layers, model)
        sae = pretrained.load(found).to(device)
        text = {} if config.corpus is None else {"corpus": text_content(config.corpus)}
        key = {**artifact_key(context), "sae": sae.info, **text, **refused_only}

        def measure(folder):
            held_out_general, _ = general_rows(context, config, RANKED)
            measured = quality(model, sae, held_out_general, held_out_harmful)
            (folder / "quality.json").write_text(json.dumps(measured, indent=1))

        folder = load_or_build(context.artifacts, "sae-quality", key, measure)
    else:
        key = {**artifact_key(context), "sae": config.key(), **refused_only}

        def build(folder):
            held_out_general, general = general_rows(context, config, config.tokens)
            sae, fitted = fit_sae(model, general, harmful, config)
            sae.save(folder)
            measured = quality(model, sae, held_out_general, held_out_harmful)
            (folder / "quality.json").write_text(json.dumps({**fitted, **measured}, indent=1))

        folder = load_or_build(context.artifacts, "sae", key, build)
        sae = RoutedSAE.load(folder, model).to(device)
    report = json.loads((folder / "quality.json").read_text())
    if config.pretrained is not None and report["fvu_general"] >= 1:
        log.warning(
            "model.sae.pretrained=%s explains nothing of this model's residuals (FVU %.2f on held-out text, where 1 "
            "is their mean): was it trained on another model, layer or scale?",
            *(config.pretrained, report["fvu_general"]),
        )

    def build_ranking(out):
        general = general_rows(context, config, RANKED)[1]
        table = rank_latents(
            model,
            sae,
            anchor_rows(model, context, pools.sae, 0),
            encode(pools.benign),
            n=activation.n_latents,
            method=activation.ranking,
            general_rows=general[:],
        )
        table.to_csv(out / "latents.csv", index=False)

    ranking_key = {**key, "rank": activation.ranking, "n": activation.n_latents}
    ranking = load_or_build(context.artifacts, "latents", ranking_key, build_ranking)
    return sae, pd.read_csv(ranking / "latents.csv"), report, ranking_key


def sae_config(activation: Activation) -> Any:
    """The `SAEConfig` of `activation.sae`. Raises UserError for an unknown field, a wrong value or no such corpus."""
    from cwac.constraints.sae.fit import SAEConfig

    if not isinstance(activation.sae, Mapping):
        raise UserError(f"method.activation.sae={activation.sae}: give fields of an autoencoder, such as {{k: 64}}")
    if (seed := activation.sae.get("seed", 0)) != 0:
        raise UserError(f"model.sae.seed={seed}: autoencoders are shared by runs of all seeds; leave it out")
    try:
        config = SAEConfig(**{**activation.sae, "seed": 0})
    except TypeError as error:
        raise UserError(
            f"method.activation.sae: {error}; see cwac.constraints.sae.fit.SAEConfig for its fields"
        ) from error
    if config.corpus is not None:
        next(documents(config.corpus, config.corpus_text, config.corpus_config), None)
    return config


def check_sae(model: nn.Module, activation: Activation) -> None:
    """Refuse an SAE that cannot be had, before anything is built.

    Raises UserError as `sae_config` does; where layers or pretrained SAEs are not there or do not fit the model; and
    where more latents are to be kept than the SAE has.
    """
    config = sae_config(activation)
    if config.pretrained is not None:
        from cwac.constraints.sae import pretrained

        m, whose = sum(f.m for f in pretrained.find(config.pretrained, config.layers, model)), "the pretrained SAE"
    else:
        from cwac.constraints.sae.autoencoder import RoutedSAE
        from cwac.models.hooks import layers_of

        d, layers = model.get_input_embeddings().embedding_dim, layers_of(model, config.layers)
        with torch.device("meta"):  # which refuses what does not fit together
            m = RoutedSAE(d, config.width(d), config.latents(d), layers, config.router).m
        whose = "the SAE (model.sae.m)"
    if activation.n_latents > m:
        raise UserError(f"method.activation.n_latents={activation.n_latents}: {whose} has {m}; give at most that")


def sae_prompts(model: nn.Module, context: Context, activation: Activation) -> list[Example]:
    """The harmful prompts that the autoencoder is fitted on: those of the pool `sae` that the aligned model refuses.

    With `refused_only: false` all of the pool. Raises UserError if the model refuses none or if one is left alone.
    """
    prompts = context.pools.sae
    if activation.refused_only:
        prompts = [example for example, _ in refused(model, context, prompts)]
        if len(prompts) < 2:
            raise UserError(
                f"the aligned model refuses {len(prompts)} of the {len(context.pools.sae)} prompts of the pool `sae`, "
                "and the autoencoder needs two, one to fit and one to measure it; enlarge pools.sae, or use "
                "method.activation.refused_only=false"
            )
    return prompts


def general_rows(context: Context, config: Any, tokens: int) -> tuple[Sequence[dict], Sequence[dict]]:
    """The autoencoder's general text as encoded rows: those held out for its measurement, and those it is fitted on.

    Without `config.corpus`, the pool `benign`: harmless instructions with their answers (ours; the paper, section 4.1,
    has OpenWebText2). Of a corpus, enough for an autoencoder that is trained on so many `tokens`, less its harmful
    share and what it does not cache. config: an `SAEConfig`.
    """
    if config.corpus is None:
        rows = encode_prompts(context, context.pools.benign, responses=True)
        n = max(1, len(rows) // 5)
        return rows[:n], rows[n:]
    wanted = tokens if config.cached_tokens is None else min(tokens, config.cached_tokens)
    wanted = HELD_OUT + int((1 - config.harmful_share) * wanted)
    settings = (config.corpus, wanted, context.max_length, config.corpus_text, config.corpus_config)
    rows = web_rows(context.tokenizer, *settings)
    ends = bisect_left(rows.ends, HELD_OUT)
    return rows.split(max(1, min(ends, len(rows) // 5)))


def response_tokens(positions: str) -> int:
    """The n of `positions="response:n"`, the number of answer tokens that are read; 0 for every other option."""
    return int(positions.split(":")[1]) if positions.startswith("response:") else 0
