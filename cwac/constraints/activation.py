"""Prepares the activation constraint of CWAC (arXiv:2604.12384, section 4.1): the autoencoder and its ranked latents.

Deviations: see `cwac/constraints/sae/__init__.py` and `cwac/methods/cwac.py`.
"""

from __future__ import annotations

import json
from typing import Any

from torch import nn

from cwac.constraints.anchors import anchor_rows, encode_prompts, refused
from cwac.constraints.settings import Activation
from cwac.core.cache import load_or_build
from cwac.core.errors import UserError
from cwac.data.examples import Example
from cwac.models.context import Context, artifact_key


def ranked_latents(model: nn.Module, context: Context, activation: Activation) -> tuple[Any, Any, dict, dict]:
    """The sparse autoencoder (SAE) of the aligned model and its most safety-critical latents, best first.

    Both are computed once and cached as artifacts. Returns the `RoutedSAE` on the model's device, the table of ranked
    latents (see `rank_latents`), the SAE's quality report, and the cache key of the ranking.
    Raises UserError if `activation.sae` has an unknown field.
    """
    import pandas as pd

    from cwac.constraints.sae.autoencoder import RoutedSAE
    from cwac.constraints.sae.fit import SAEConfig, fit_sae, quality
    from cwac.constraints.sae.ranking import rank_latents

    try:
        config = SAEConfig(**{**activation.sae, "seed": 0})
    except TypeError as error:
        raise UserError(
            f"method.activation.sae: {error}; see cwac.constraints.sae.fit.SAEConfig for its fields"
        ) from error
    pools = context.pools

    def encode(examples, responses=False):
        return encode_prompts(context, examples, responses)

    prompts = sae_prompts(model, context, activation)
    n_held_out = max(1, len(prompts) // 5)  # kept out of the fit for the quality report
    harmful, held_out_harmful = encode(prompts[n_held_out:]), encode(prompts[:n_held_out])
    n_benign = max(1, len(pools.benign) // 5)
    general = encode(pools.benign[n_benign:], responses=True)
    held_out_general = encode(pools.benign[:n_benign], responses=True)
    key = {**artifact_key(context), "sae": config.key()}
    if activation.refused_only:
        key["prompts"] = "refused"

    def build(folder):
        sae, fitted = fit_sae(model, general, harmful, config)
        sae.save(folder)
        measured = quality(model, sae, held_out_general, held_out_harmful)
        (folder / "quality.json").write_text(json.dumps({**fitted, **measured}, indent=1))

    folder = load_or_build(context.artifacts, "sae", key, build)
    sae = RoutedSAE.load(folder, model).to(next(model.parameters()).device)
    report = json.loads((folder / "quality.json").read_text())

    def build_ranking(out):
        table = rank_latents(
            model,
            sae,
            anchor_rows(model, context, pools.sae, 0),
            encode(pools.benign),
            n=activation.n_latents,
            method=activation.ranking,
            general_rows=general,
        )
        table.to_csv(out / "latents.csv", index=False)

    ranking_key = {**key, "rank": activation.ranking, "n": activation.n_latents}
    ranking = load_or_build(context.artifacts, "latents", ranking_key, build_ranking)
    return sae, pd.read_csv(ranking / "latents.csv"), report, ranking_key


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


def response_tokens(positions: str) -> int:
    """The n of `positions="response:n"`, the number of answer tokens that are read; 0 for every other option."""
    return int(positions.split(":")[1]) if positions.startswith("response:") else 0
