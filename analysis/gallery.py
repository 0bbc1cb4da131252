"""Which figures a campaign allows: each is drawn once a model and task, and left out where its rows are missing."""

from collections.abc import Iterable
from dataclasses import replace

import pandas as pd

from analysis import figures, paper, paper_figures, tables
from analysis.collect import Collection, one_judge, pooled
from analysis.figures import Plate
from analysis.records import Record


def draw(found: Collection, records: Iterable[Record], judge: str | None = None) -> list[Plate]:
    """Every figure of a campaign, in the order of the report; names are unique.

    Several sets of harmful prompts are pooled as the paper does. Runs of a sweep over the learning rate share the
    figure against it; the other figures show each rate by itself.
    """
    rows = pooled(one_judge(found.rows, judge))
    done = [r for r in records if r.run_id in set(found.runs)]
    plates = []
    for model, task, of in grids(rows):
        suffix = f"{model}-{task}"
        here = paper_figures.figure3(rows, model, task, of)
        for rate, campaign in tables.by_rate(Collection(rows[(rows["model"] == model) & (rows["task"] == task)])):
            part, ids = campaign.rows, set(campaign.rows["run_id"])
            chosen = [r for r in done if r.run_id in ids]
            summary = tables.summarise(campaign)
            several = [
                *figures.pareto(poisoned(summary), model, task, of),
                *figures.against_ratio(summary, model, task, of),
                *figures.against_training(part, model, task, of),
                *paper_figures.figure4(part, model, task, of),
                *paper_figures.figure5(chosen, model, task),
                *paper_figures.decomposition(chosen, model, task),
            ]
            here += [named(plate, rate) for plate in several] if rate else several
        plates += [replace(plate, name=f"{plate.name}-{suffix}") for plate in here]
    return plates


def named(plate: Plate, rate: str) -> Plate:
    """The figure of one learning rate of several."""
    return replace(
        plate, name=f"{plate.name}-lr{rate}", title=paper.setting_label(f"{plate.title}; learning rate {rate}")
    )


def poisoned(summary: pd.DataFrame) -> pd.DataFrame:
    """Without p = 0, where nearly every method lies on one point; all of a campaign that has no other ratio."""
    kept = summary[summary["harmful_ratio"] != 0]
    return kept if kept["harmful_ratio"].notna().any() else summary


def grids(rows: pd.DataFrame) -> list[tuple[str, str, str]]:
    """The (model, task, set of harmful prompts) that have HS at the end of training."""
    ends = rows[rows["final"] & (rows["metric"] == "HS")]
    return sorted({*zip(ends["model"], ends["task"], ends["set"], strict=True)})
