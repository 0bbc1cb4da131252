"""Why the closed constraint holds, in gradients: how much of the task's and of the poison's lies in the anchors' span.

python -m experiments.gradients model=tiny harmful_ratio=0.2 --seeds 0,1,2 --out results/gradients

For every matrix of the aligned model, G [d_out, d_in] is the mean gradient of the loss on the benign rows of a run, or
on its harmful ones, and G V V^T the part that `cwac_closed` takes away (`cwac/constraints/subspace.py`):

- the share of a gradient's squared norm that lies inside, ||G V||^2 / ||G||^2, beside the share that a random
  direction would have, rank / d_in;
- the cosine between the two gradients inside and outside: outside, what they have in common is learnt with the task.

Deviations: all of it is `ours`; the paper (arXiv:2604.12384) measures no gradient. It is one point, the start of
training, and plain gradients: AdamW's steps differ from them, and later gradients from the first.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch import nn
from tqdm import tqdm

from analysis.paper_figures import KINDS
from cwac.core import config
from cwac.core.config import Parser, about, command
from cwac.core.errors import UserError
from cwac.data.tokenize import Collator, Rows, pad_token_id
from cwac.models.layers import linears
from experiments.seeds import cells, write_provenance


def mean_gradients(
    model: nn.Module, rows: Sequence[dict], pad: int, batch_size: int = 16, description: str | None = None
) -> dict[str, torch.Tensor]:
    """Gradient of the mean loss a label token over `rows`, of every linear layer of the blocks: name -> [d_out, d_in].

    rows: encoded, with `labels`. float64, on the model's device; the model's gradients are cleared.
    """
    modules, collate = linears(model, "all"), Collator(pad)
    where = next(model.parameters()).device
    total, tokens = {name: torch.zeros_like(m.weight, dtype=torch.float64) for name, m in modules.items()}, 0
    starts = range(0, len(rows), batch_size)
    for start in tqdm(starts, desc=description, disable=description is None, unit="batch"):
        batch = {k: v.to(where) for k, v in collate(list(rows[start : start + batch_size])).items()}
        n = int((batch["labels"][:, 1:] != -100).sum())
        model.zero_grad(set_to_none=True)
        model(**batch, use_cache=False).loss.backward()
        for name, module in modules.items():
            total[name] += n * module.weight.grad.double()
        tokens += n
    model.zero_grad(set_to_none=True)
    return {name: gradient / tokens for name, gradient in total.items()}


def compare(task: torch.Tensor, poison: torch.Tensor, V: torch.Tensor) -> dict[str, float]:
    """Shares inside the span of V [d_in, k], and cosines inside and outside it, of two gradients [d_out, d_in]."""
    V = V.to(task)  # as they are loaded, bases are fp32 and on the CPU
    inside = {"task": task @ V, "poison": poison @ V}
    outside = {"task": task - inside["task"] @ V.T, "poison": poison - inside["poison"] @ V.T}

    def cosine(part: dict[str, torch.Tensor]) -> float:
        a, b = part["task"].flatten(), part["poison"].flatten()
        return float(a @ b / (a.norm() * b.norm()).clamp_min(1e-300))

    return {
        "task_inside": float(inside["task"].square().sum() / task.square().sum()),
        "poison_inside": float(inside["poison"].square().sum() / poison.square().sum()),
        "random_inside": V.shape[1] / V.shape[0],
        "cosine_inside": cosine(inside),
        "cosine_outside": cosine(outside),
    }


def measure(cfg: DictConfig) -> list[dict]:
    """One entry a matrix of one composed run: `seed`, `layer`, `kind`, and `compare`'s numbers.

    Raises UserError where the method has no weight constraint, or the run no harmful row.
    """
    from cwac.constraints.weight import anchor_bases
    from cwac.data.tasks import load_task
    from cwac.models.layers import input_group
    from cwac.training.attack import poisoned_mix
    from cwac.training.context import open_context

    weight = getattr(config.instantiate(cfg.method), "weight", None)
    if weight is None:
        raise UserError(f"method={cfg.method.name} has no anchors' span; use weight_only_closed")
    context = open_context(cfg)
    model = context.loaded.model.eval()
    bases = anchor_bases(model, context, weight)
    mixed, harmful = poisoned_mix(cfg, load_task(cfg.task, cfg.paths.data, cfg.seed).train, context)
    ids = {e.id for e in harmful}
    parts = {"task": [e for e in mixed if e.id not in ids], "poison": [e for e in mixed if e.id in ids]}
    for key, examples in parts.items():
        if not examples:
            raise UserError(
                f"harmful_ratio={cfg.harmful_ratio} leaves no row of the {key}; give 0 < harmful_ratio < 1"
            )
    pad = pad_token_id(context.tokenizer)
    encoded = {
        key: Rows(context.tokenizer, examples, cfg.train.template, cfg.train.max_length).rows
        for key, examples in parts.items()
    }
    task, poison = (mean_gradients(model, rows, pad, description=f"gradient, {key}") for key, rows in encoded.items())
    entries = []
    for name in task:
        if input_group(name) in bases:
            layer, *_, kind = name.split(".")
            numbers = compare(task[name], poison[name], bases[input_group(name)].V)
            entries.append({"seed": cfg.seed, "layer": int(layer), "kind": kind, **numbers})
    return entries


def draw(table: pd.DataFrame) -> Figure:
    """Shares inside the span by matrix type, cosines inside and outside it; a small dot is one matrix of one seed."""
    kinds = [k for k in KINDS if k in set(table["kind"])]
    figure = Figure(figsize=(7.2, 3.0), layout="constrained")
    shares, cosines = figure.subplots(1, 2)
    looks = {
        "poison_inside": ("#D55E00", "o", "poison"),
        "task_inside": ("#0072B2", "s", "task"),
        "random_inside": ("#8C8C8C", "_", "a random direction"),
        "cosine_inside": ("#000000", "v", "inside the span"),
        "cosine_outside": ("#009E73", "^", "outside: what is left to learn in"),
    }
    for axes, columns in ((shares, list(looks)[:3]), (cosines, list(looks)[3:])):
        for column, shift in zip(columns, (-0.2, 0.0, 0.2), strict=False):
            colour, marker, label = looks[column]
            for i, kind in enumerate(kinds):
                values = table.loc[table["kind"] == kind, column]
                axes.plot([i + shift] * len(values), values, ".", color=colour, alpha=0.25, markersize=3)
                shown = {"color": colour, "marker": marker, "markersize": 6, "linestyle": "none"}
                axes.plot([i + shift], [values.median()], **shown, label=label if i == 0 else None)
        axes.set_xticks(range(len(kinds)), [k.removesuffix("_proj") for k in kinds])
        axes.legend(fontsize=7, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    shares.set(ylim=(0, 1.02), title="share of the squared gradient inside the span")
    cosines.axhline(0, color="#8C8C8C", linewidth=0.6)
    cosines.set(ylim=(-1.02, 1.02), title="cosine of the task's and the poison's gradient")
    for axes in (shares, cosines):
        axes.title.set_fontsize(8)
        axes.tick_params(labelsize=7)
    return figure


@command
def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0, or 2 for bad input."""
    parser = Parser(**about(__doc__, "python -m experiments.gradients"))
    parser.add_argument("--seeds", default="0,1,2", help="run seeds, each a model and a mix of rows (0,1,2)")
    parser.add_argument("--out", type=Path, default=Path("results/gradients"), help="folder for the results")
    parser.add_argument("overrides", nargs="*", help="train.py's own, e.g. model=tiny harmful_ratio=0.2")
    args = parser.parse_intermixed_args(argv)
    given = ["method=weight_only_closed", "harmful_ratio=0.2", *args.overrides]
    entries = []
    for cfg in cells(args.seeds, given):
        entries += measure(cfg)
    table = pd.DataFrame(entries)
    args.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.out / "gradients.csv", index=False)
    draw(table).savefig(args.out / "gradients.png", dpi=200)
    medians = table.drop(columns=["seed", "layer"]).groupby("kind").median().reindex(list(KINDS))
    print(medians.dropna().round(3).to_string())
    write_provenance(args.out, "experiments.gradients", argv, given, seeds=args.seeds, matrices=len(table))
    print(f"written: {args.out}/gradients.csv")
    print(f"figure: {args.out / 'gradients.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
