"""Localises the safety layers of a model for SPPFT and prints them.

    python -m experiments.safety_layers model=smollm2 task=sst2 paths.data=<folder laid out like the hub>

`cwac/methods/safety_layers.py` says how; overrides are those of train.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from cwac.core.config import command, compose, instantiate
from cwac.core.errors import UserError
from cwac.core.validation import validate
from cwac.methods.safety_layers import locate
from cwac.training.context import open_context
from cwac.training.threads import use_threads


@command
def main(overrides: Sequence[str]) -> None:
    """Localise with the settings of `method=sppft` and the given overrides; print curves, range and folder."""
    cfg = compose(["method=sppft", *overrides])
    validate(cfg)
    use_threads(cfg.threads)
    context = open_context(cfg)
    settings = instantiate(cfg.method.localisation)
    localised = locate(context.loaded.model, context, settings)
    print((localised.folder / "curves.csv").read_text())
    result = json.loads((localised.folder / "safety_layers.json").read_text())
    print(f"cosine curves: {result['cosine']}; with over-rejection (alpha {result['alpha']}): {result['layers']}")
    print(f"written to {localised.folder}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
