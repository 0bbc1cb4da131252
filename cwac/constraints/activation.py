"""Prepares the activation constraint of CWAC (arXiv:2604.12384, section 4.1): the autoencoder and its ranked latents.

Deviations: see `cwac/constraints/sae/__init__.py` and `cwac/methods/cwac.py`.
"""

from __future__ import annotations

import json
from typing import Any

from torch import nn

from cwac.constraints.anchors import anchor_rows, encode_prompts
from cwac.constraints.settings import Activation
from cwac.core.cache import load_or_build
from cwac.core.errors import UserError
from cwac.models.context import Context, artifact_key


def ranked_latents(model: nn.Module, context: Context, activation: Activation) -> tuple[Any, Any, dict, dict]:
    """The SAE of the aligned model and its latents by rank, fitted once and cached.

    Returns the `RoutedSAE` on the model's device, the ranking's table (see `rank_latents`), the SAE's quality report,
    and what identifies the ranking as an artifact.
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

    n_held_out = max(1, len(pools.sae) // 5)  # kept out of the fit for the quality report
    harmful, held_out_harmful = encode(pools.sae[n_held_out:]), encode(pools.sae[:n_held_out])
    n_benign = max(1, len(pools.benign) // 5)
    general = encode(pools.benign[n_benign:], responses=True)
    held_out_general = encode(pools.benign[:n_benign], responses=True)
    key = {**artifact_key(context), "sae": config.key()}

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


def response_tokens(positions: str) -> int:
    return int(positions.split(":")[1]) if positions.startswith("response:") else 0
