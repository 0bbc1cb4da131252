"""The routed TopK sparse autoencoder (SAE) and the activation constraint built on it.

Sources
  CWAC, arXiv:2604.12384: Eqs. 9-10 (the SAE), Eq. 11 (L_safety), Algorithm 1 (prompts sampled per step).
  RouteSAE, arXiv:2503.08200: one dictionary for the residuals of the layers n/4 .. 3n/4, a router
  that picks the layer to read for each token, per-token LayerNorm input, M = 8d, k = 64.
  AuxK and encoder = decoder^T at initialisation: Gao et al., arXiv:2406.04093.

Files: `autoencoder.py` is the model, `fit.py` trains and measures it, `ranking.py` finds the safety-critical latents
and tests them causally, `target.py` is L_safety; `cwac/models/hooks.py` reads the layers.

Deviations:
  - Position 0, BOS, padding, outlier tokens (norm > 10x the median) and the opening that all rows share
    are not SAE data (ours; RouteSAE trains on all of them): the first token alone can carry 99 % of the
    raw energy, and a template's opening is the same vectors in every row.
  - If the hard router collapses onto one layer, the SAE is fitted again with `uniform` (ours, reported).
  - b_pre starts at the data mean, and the encoder at c * decoder with the least-squares c (ours).
  - ReLU after TopK (ours; differs only where fewer than k pre-activations are positive).
  - AuxK for dead latents, decoder rows of unit norm after every step (RouteSAE: no AuxK, every 10).
  - The hard router scales what it trains on by its probability, as RouteSAE does, and reads
    unscaled, as RouteSAE's own hooks do.
  - `variant=sae_routesae` is RouteSAE's recipe to the letter, from swei2001/RouteSAEs at 9a5fd28: general text alone,
    no fallback, its schedule (`rate` and `renormalises` in fit.py), no clipping, no AuxK, b_pre at 0. Three things of
    its code it still lacks: training on padding, BOS and outliers; negative latents where fewer than k are positive;
    the encoder's uniform start, of which it has the norm.
  - General text is the pool `benign`, harmless instructions with answers (ours; the paper's is OpenWebText2), unless
    `model.sae.corpus` names web text. Harmful prompts are those that the model refuses (section 4.1).
  - L_safety: the layer is the baseline's, cached (routing again would let the model lower the loss by
    changing the layer); the default gate `tau` gives a latent that left the TopK a gradient, which
    the literal `topk` does not. Both agree on the unchanged model.
  - The normaliser is inside L_safety, so a purely radial drift of the residual costs nothing.
"""
