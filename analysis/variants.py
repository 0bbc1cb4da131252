"""The strengths of the coupling's variants, chosen on validation prompts: before `experiment=closed_variants` is run.

python -m analysis.variants --runs runs

Reads the runs of `closed_variants_search` and writes which of its three strengths each variant gets to
conf/chosen/closed_variants.yaml, which `closed_variants` reads. The objective is that of every search, HS - FA + OR.
"""

import sys
from pathlib import Path

import pandas as pd

from analysis.collect import cell_from, collect
from analysis.tuning import choose, trials
from cwac.core import config, paths
from cwac.core.config import Parser, about, command

SEARCH = "closed_variants_search"
PICK = "variant.pick"
MIDDLE = {PICK: 1}
"""What conf/variant/ takes where nothing was chosen, and what a tie keeps."""


@command
def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0, 1 if a run is missing (nothing is chosen then), 2 for bad input."""
    parser = Parser(**about(__doc__, "python -m analysis.variants"))
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the run directories (runs)")
    parser.add_argument("--out", type=Path, default=Path("results/closed"), help="folder of the log (results/closed)")
    parser.add_argument("--conf", type=Path, default=paths.CONF, help="configuration folder to write to (conf)")
    parser.add_argument("overrides", nargs="*", help="the search's own overrides, e.g. seed=3,4")
    args = parser.parse_intermixed_args(argv)
    cells = config.expand(SEARCH, args.overrides)
    collection = collect(args.runs, map(cell_from, cells))
    missing = [cell for cell in collection.missing if collection.unfinished.get(cell.run_id) != "failed"]
    for cell in missing:
        print(f"missing: {cell}  ({cell.run_id})")
    if missing:
        print(f"error: {len(missing)} of {len(cells)} runs are missing; nothing is chosen", file=sys.stderr)
        return 1
    logs, picks = [], {}
    for name in dict.fromkeys(cfg.variant.name for cfg in cells):
        cells_of_variant = [cfg for cfg in cells if cfg.variant.name == name]
        strengths = list(cells_of_variant[0].variant.strengths)
        values = [{PICK: i} for i in range(len(strengths))]
        log = trials(cells_of_variant, values, collection)
        means = choose(log, values, MIDDLE)
        best = int(means.loc[means["chosen"], "trial"].iloc[0])
        strength = [strengths[pick] for pick in log[PICK]]
        logs.append(log.assign(variant=name, strength=strength, chosen=log["trial"] == best))
        picks[name] = best - 1
    log = pd.concat(logs, ignore_index=True)
    args.out.mkdir(parents=True, exist_ok=True)
    log.to_csv(path := args.out / "variants_search.csv", index=False)
    shown = ["variant", "strength", "seed", "HS", "FA", "OR", "objective", "status", "chosen"]
    print(log[shown].to_string(index=False))
    target = args.conf / "chosen" / "closed_variants.yaml"
    target.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{name}: {pick}" for name, pick in picks.items()]
    header = "# ours: which of its strengths (conf/variant/) each variant gets, chosen on validation prompts\n"
    target.write_text(f"{header}# log: {path.as_posix()}\n" + "\n".join(lines) + "\n", encoding="utf-8")
    print(f"log: {path}\nchosen: {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
