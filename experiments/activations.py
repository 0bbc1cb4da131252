"""Where the drift of a layer's output comes from: the paper's Eq. 4, measured on the weights that a run kept.

Peng, Zhang, Zeng, Jiang, Gao, *Preventing Safety Drift in Large Language Models via Coupled Weight and Activation
Constraints* (CWAC), arXiv:2604.12384, section 3. For a matrix with weights W0 -> W0 + dW and inputs h0 -> h0 + dh, the
change before the activation function is, exactly, `W0 dh + dW h0 + dW dh`. Eq. 4 keeps two terms and drops the third.

python train.py method=cwac harmful_ratio=0.1 keep_weights=true
python -m experiments.activations --run runs/<run id>

Deviations:
- The paper sketches the terms and measures none. Ours: Euclidean norms at the last token of a held-out harmful prompt
  that the aligned model refuses (the prompts and the token of its Figure 5, `cwac/evaluation/drift.py`).
- Eq. 4 multiplies every term by f'(W0 h0); it is left out, so the terms are those of the linear map.
- Given relative to ||W0 h0||, so that matrices and models can share an axis.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from cwac.constraints.anchors import anchor_rows
from cwac.core import renamed
from cwac.core.config import Parser, about, command
from cwac.core.errors import UserError
from cwac.core.files import write_atomic
from cwac.data.tokenize import Collator
from cwac.evaluation.drift import merged_weight
from cwac.models.hooks import device_of, last_tokens, on_inputs
from cwac.models.layers import device, linears
from cwac.models.loading import SAFE, load_aligned
from cwac.training.context import open_context

NAME = "decomposition.json"
TERMS = ("W0_dh", "dW_h0", "dW_dh", "dy")


@torch.no_grad()
def last_inputs(model: nn.Module, rows: Sequence[dict], batch_size: int = 16) -> dict[str, torch.Tensor]:
    """Inputs [prompts, d_in] of every linear layer of the blocks at each prompt's last token, float64, on the CPU.

    rows: encoded prompts. Names as in `cwac.models.layers.linears`.
    """
    modules = linears(model, "all")
    found: dict[str, list[torch.Tensor]] = {name: [] for name in modules}
    mask = torch.empty(0)

    def record(name: str, h: torch.Tensor) -> None:
        found[name].append(last_tokens(h, mask).double().cpu())

    collate, target = Collator(0), device_of(model)
    with on_inputs(modules, record):
        for start in range(0, len(rows), batch_size):
            batch = collate([{"input_ids": row["input_ids"]} for row in rows[start : start + batch_size]])
            ids, mask = batch["input_ids"].to(target), batch["attention_mask"].to(target)
            model(input_ids=ids, attention_mask=mask, use_cache=False)
    return {name: torch.cat(parts) for name, parts in found.items()}


@torch.no_grad()
def decompose(model: nn.Module, reference: nn.Module, rows: Sequence[dict]) -> list[dict]:
    """One entry a matrix: `layer`, `kind`, and the norms of `TERMS` relative to ||W0 h0||, medians over prompts.

    reference: the aligned model. `dy` is the whole change, the norm of the three terms' sum. Both models must be in
    evaluation mode and on one device.
    """
    now, then = linears(model, "all"), linears(reference, "all")
    h, h0 = last_inputs(model, rows), last_inputs(reference, rows)
    entries = []
    for name, module in then.items():
        w0 = module.weight.double().cpu()
        dw = merged_weight(now[name]).cpu() - w0  # [d_out, d_in]
        dh = h[name] - h0[name]  # [prompts, d_in]
        parts = {"W0_dh": dh @ w0.T, "dW_h0": h0[name] @ dw.T, "dW_dh": dh @ dw.T}
        parts["dy"] = parts["W0_dh"] + parts["dW_h0"] + parts["dW_dh"]
        scale = (h0[name] @ w0.T).norm(dim=1)  # [prompts]
        layer, *_, kind = name.split(".")
        medians = {term: float((parts[term].norm(dim=1) / scale).median()) for term in TERMS}
        entries.append({"layer": int(layer), "kind": kind, **medians})
    return entries


def read_config(folder: Path) -> DictConfig:
    """The configuration of a finished run that kept its weights.

    Raises UserError if the folder is no run, or its weights were not kept.
    """
    try:
        cfg = renamed.update(OmegaConf.load(folder / "config.yaml"), say=False)
    except (OSError, ValueError, OmegaConfBaseException) as error:
        raise UserError(f"--run {folder} holds no readable config.yaml; name the folder of a run") from error
    if not (folder / "model").is_dir():
        raise UserError(
            f"--run {folder} kept no weights; train it again with the same overrides and force=true keep_weights=true"
        )
    return cfg


def measure(folder: Path, artifacts: Path | None = None) -> dict:
    """The decomposition of one run: its `run_id`, the number of `prompts`, and `matrices` from `decompose`.

    artifacts: folder of the artifact cache; the run's own where None. Raises UserError as `read_config` does, and
    where the aligned model refuses no held-out prompt.
    """
    from transformers import AutoModelForCausalLM

    cfg = read_config(folder)
    if artifacts is not None:
        cfg.paths.artifacts = str(artifacts)
    context = open_context(cfg)
    reference = load_aligned(context.loaded).to(device())
    rows = anchor_rows(reference, context, context.pools.validation[: cfg.eval.n_drift], 16)
    prompts = [{"input_ids": row["input_ids"][: row["prompt"]]} for row in rows]
    try:
        tuned = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, **SAFE)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}/model does not load ({str(error).splitlines()[0]}); train the run again") from error
    matrices = decompose(tuned.to(device()).eval(), reference, prompts)
    return {"run_id": folder.name, "prompts": len(prompts), "matrices": matrices}


@command
def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0, or 2 for a run that cannot be measured."""
    parser = Parser(**about(__doc__, "python -m experiments.activations"))
    parser.add_argument("--run", type=Path, nargs="+", required=True, help="folders of runs with keep_weights=true")
    parser.add_argument("--artifacts", type=Path, help="folder of the artifact cache (the run's own)")
    args = parser.parse_args(argv)
    for folder in args.run:
        read_config(folder)  # all are refused before the first is measured
    for folder in args.run:
        write_atomic(folder / NAME, json.dumps(measure(folder, args.artifacts)))
        print(folder / NAME)
    return 0


if __name__ == "__main__":
    sys.exit(main())
