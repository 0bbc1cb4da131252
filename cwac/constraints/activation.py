"""Prepares the activation constraint of CWAC (arXiv:2604.12384, section 4.1): the autoencoder and its ranked latents.

Deviations: see `cwac/constraints/sae/__init__.py` and `cwac/methods/cwac.py`.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from torch import nn

from cwac.constraints.anchors import anchor_rows, encode_prompts
from cwac.constraints.settings import Activation
from cwac.core.cache import load_or_build
from cwac.core.errors import UserError
from cwac.models.context import Context, artifact_key

log = logging.getLogger(__name__)


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

    n_held_out = max(1, len(pools.sae) // 5)  # kept out of the fit for the quality report
    harmful, held_out_harmful = encode(pools.sae[n_held_out:]), encode(pools.sae[:n_held_out])
    n_benign = max(1, len(pools.benign) // 5)
    general = encode(pools.benign[n_benign:], responses=True)
    held_out_general = encode(pools.benign[:n_benign], responses=True)
    device = next(model.parameters()).device
    if config.pretrained is not None:
        found = pretrained.find(config.pretrained, config.layers, model)
        sae = pretrained.load(found).to(device)
        key = {**artifact_key(context), "sae": sae.info}

        def measure(folder):
            (folder / "quality.json").write_text(
                json.dumps(quality(model, sae, held_out_general, held_out_harmful), indent=1)
            )

        folder = load_or_build(context.artifacts, "sae-quality", key, measure)
    else:
        key = {**artifact_key(context), "sae": config.key()}

        def build(folder):
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


def sae_config(activation: Activation) -> Any:
    """The `SAEConfig` of `activation.sae`; raises UserError for an unknown field."""
    from cwac.constraints.sae.fit import SAEConfig

    try:
        return SAEConfig(**{**activation.sae, "seed": 0})
    except TypeError as error:
        raise UserError(
            f"method.activation.sae: {error}; see cwac.constraints.sae.fit.SAEConfig for its fields"
        ) from error


def check_pretrained(model: nn.Module, activation: Activation) -> None:
    """Raises UserError where `activation.sae` names pretrained SAEs that are not there or do not fit the model."""
    config = sae_config(activation)
    if config.pretrained is not None:
        from cwac.constraints.sae import pretrained

        found = pretrained.find(config.pretrained, config.layers, model)
        m = sum(f.m for f in found)
        if activation.n_latents > m:
            raise UserError(
                f"method.activation.n_latents={activation.n_latents}: the pretrained SAE has {m}; give at most that"
            )


def response_tokens(positions: str) -> int:
    """The n of `positions="response:n"`, the number of answer tokens that are read; 0 for every other option."""
    return int(positions.split(":")[1]) if positions.startswith("response:") else 0
