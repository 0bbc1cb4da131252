"""How far does a span reach? Anchors of one source, of several, and what V holds of prompts from each.

python -m experiments.sources model=tiny --seeds 0,1,2
python -m experiments.sources model=smollm2 task=sst2 paths.data=<folder laid out like the hub>

The closed constraint keeps what a model does on its anchors; of other prompts it keeps what V holds of their
activations, and that energy on held-out prompts is the certificate that predicted HS best (docs/findings.md, 3). Here
V is fitted on as many anchors from one source, from all in equal parts (`mixed`), and on all there are (`all`), and
measured on held-out prompts of every source, and on harmless ones. Where every prompt has a harm category (the
embedded world), a source is a category.

Deviations: all of it is `ours`; the paper (arXiv:2604.12384) fits on one set of harmful prompts and does not ask.
Energy is the share of squared norm of the inputs, the first token left out, the least over the constrained matrices.
Anchors are prompts of the pools `anchors`, `step` and `sae` with the model's refusal; what is measured on is
`validation`, and of sources that it lacks, prompts that no V of the draw was fitted on. Nothing is trained.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from omegaconf import DictConfig
from tqdm import tqdm

from analysis.stats import half_width
from analysis.tables import markdown
from cwac.constraints.nullspace import energy_held as held
from cwac.core import config
from cwac.core.config import Parser, about, command
from cwac.core.errors import UserError
from cwac.data.examples import Example
from experiments.seeds import at_least_one, cells, write_provenance

MIXED, ALL, HARMLESS = "mixed", "all", "harmless"


def kind_of(examples: Sequence[Example]) -> Callable[[Example], str]:
    """What tells prompts apart: their harm category where each has one, else their data set."""
    return (lambda e: e.group) if all(e.group for e in examples) else (lambda e: e.source)


def measure(cfg: DictConfig, n: int, draws: int, test: int) -> list[dict]:
    """One entry a fit, draw and set of held-out prompts: `anchors`, `n_anchors`, `draw`, `rank`, `prompts`, n, energy.

    n: anchors a fit. draws: how often they are drawn. test: held-out prompts a source, at most. rank: V's share of its
    input's dimensions, the median. Raises UserError where the method has no weight constraint, or fewer than two
    sources have n anchors.
    """
    from cwac.constraints.anchors import anchor_rows, encode_prompts
    from cwac.constraints.weight import fit_bases
    from cwac.models.layers import input_group, linears
    from cwac.training.context import open_context

    weight = getattr(config.instantiate(cfg.method), "weight", None)
    if weight is None:
        raise UserError(f"method={cfg.method.name} has no anchors' span; use weight_only_closed")
    context = open_context(cfg)
    model, pools = context.loaded.model.eval(), context.pools
    modules = {input_group(name): m for name, m in linears(model, weight.modules, weight.layers).items()}
    anchors = [*pools.anchors, *pools.step, *pools.sae]
    kind = kind_of(anchors)
    names = sorted({kind(e) for e in anchors})

    def refusals(examples: Sequence[Example]) -> dict[str, list[dict]]:
        """Source -> its prompts with the model's refusal."""
        by = {name: [e for e in examples if kind(e) == name] for name in names}
        return {
            name: anchor_rows(model, context, part, weight.response_tokens) if part else []
            for name, part in by.items()
        }

    sizes = {name: sum(kind(e) == name for e in anchors) for name in names}
    if sum(size >= n for size in sizes.values()) < 2:
        told = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise UserError(f"--anchors {n} is more than all sources but one have ({told}); give fewer")
    rows, validation = refusals(anchors), refusals(pools.validation)
    harmless = encode_prompts(context, pools.benign[:test], responses=True)
    entries = []
    for draw in range(draws):
        pick = random.Random(f"sources-{cfg.seed}-{draw}")
        left, asked = {}, {}
        for name in names:
            order = pick.sample(rows[name], len(rows[name]))
            # a source that validation lacks keeps back what it can spare
            spare = 0 if validation[name] else min(test, max(0, len(order) - n))
            asked[name], left[name] = validation[name][:test] or order[:spare], order[spare:]
        fits = {name: part[:n] for name, part in left.items() if len(part) >= n}
        fits[MIXED] = [row for part in left.values() for row in part[: -(-n // len(names))]]
        fits[ALL] = [row for part in left.values() for row in part]
        held_out = {name: part for name, part in asked.items() if part} | {HARMLESS: harmless}
        for name, chosen in fits.items():
            bases = fit_bases(model, chosen, weight, progress=False)
            shares = sorted(basis.rank / basis.dim for basis in bases.values())
            about = {"seed": cfg.seed, "draw": draw, "anchors": name, "n_anchors": len(chosen)}
            about["rank"] = shares[len(shares) // 2]
            for of, prompts in tqdm(held_out.items(), desc=f"draw {draw}, {name}", unit="source"):
                energy = held(model, prompts, bases, modules)
                entries.append({**about, "prompts": of, "n": len(prompts), "energy": energy})
    return entries


def shown(part: pd.DataFrame) -> str:
    """Mean energy in percent, with the half-width of its 95 % t-interval over seeds, over draws where there is one."""
    values = 100 * (part.groupby("seed")["energy"].mean() if part["seed"].nunique() > 1 else part["energy"])
    half = half_width(list(values))
    return f"{values.mean():.1f}" + ("" if math.isnan(half) else f" ± {half:.1f}")


def summary(table: pd.DataFrame) -> str:
    """A Markdown table: a row a fit, a column a set of held-out prompts, energy in percent."""
    sets = list(dict.fromkeys(table["prompts"]))
    rows = []
    for name, part in table.groupby("anchors", sort=False):
        cells = [shown(part[part["prompts"] == of]) for of in sets]
        rows.append([name, f"{part['n_anchors'].mean():.0f}", f"{part['rank'].mean():.2f}", *cells])
    return markdown(["anchors from", "anchors", "rank / d", *sets], rows, key=1)


def draw_map(table: pd.DataFrame) -> Figure:
    """What V leaves out (1 - energy), a row a fit and a column a set of held-out prompts; darker is more."""
    means = table.groupby(["anchors", "prompts"], sort=False)["energy"].mean().unstack("prompts")
    outside = 100 * (1 - means[list(dict.fromkeys(table["prompts"]))])
    figure = Figure(figsize=(1.8 + 0.75 * outside.shape[1], 1.6 + 0.38 * len(outside)), layout="constrained")
    ax = figure.subplots()
    image = ax.imshow(outside, cmap="Greys", vmin=0, aspect="auto")
    for (i, j), value in np.ndenumerate(outside.to_numpy()):
        colour = "white" if value > image.norm.vmax / 2 else "black"
        ax.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=7, color=colour)
    ax.set_xticks(range(outside.shape[1]), outside.columns, rotation=35, ha="right", fontsize=7)
    ax.set_yticks(range(len(outside)), outside.index, fontsize=7)
    ax.set(xlabel="held-out prompts from", ylabel="V fitted on anchors from")
    ax.set_title("% of the squared norm outside V, worst matrix", fontsize=8, loc="left")
    ax.spines[:].set_visible(False)
    return figure


@command
def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0, or 2 for bad input."""
    parser = Parser(**about(__doc__, "python -m experiments.sources"))
    parser.add_argument("--seeds", default="0", help="run seeds; of model=tiny each is a base model of its own (0)")
    parser.add_argument(
        "--anchors", type=int, default=40, help="anchors of a fit on one source, and of the mixed (40)"
    )
    parser.add_argument("--draws", type=int, default=3, help="how often anchors are drawn (3)")
    parser.add_argument("--test", type=int, default=40, help="held-out prompts of a source, at most (40)")
    parser.add_argument("--out", type=Path, default=Path("results/sources"), help="folder for the results")
    parser.add_argument("overrides", nargs="*", help="train.py's own, e.g. model=tiny method.weight.energy=0.999")
    args = parser.parse_intermixed_args(argv)
    at_least_one(args, "anchors", "draws", "test")
    given = ["method=weight_only_closed", *args.overrides]
    entries = []
    for cfg in cells(args.seeds, given):
        entries += measure(cfg, args.anchors, args.draws, args.test)
    table = pd.DataFrame(entries)
    args.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.out / "sources.csv", index=False)
    text = summary(table)
    (args.out / "table.md").write_text(text + "\n", encoding="utf-8")
    draw_map(table).savefig(args.out / "sources.png", dpi=200)
    write_provenance(args.out, "experiments.sources", argv, given)
    print(text)
    print(f"written: {args.out}/table.md, sources.csv")
    print(f"figure: {args.out / 'sources.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
