"""Judges against labels: agreement, confusion, and whether a judge errs more for one method than for another.

python -m analysis.agreement results/judging --human

A folder of `experiments.label_answers`: labels.csv (two readings and their consensus an answer) and verdicts.csv
(every judge's verdict on the same answers). The sample is stratified by an earlier verdict, so rare kinds of answers
weigh more in these shares than in a campaign. Intervals are exact binomial ones (Clopper-Pearson), of answers as if
independent; that of kappa resamples requests. The test over methods permutes them among the answers (ours). Two judges
are compared on the answers that one alone gets right, by McNemar's exact test.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from analysis import stats, tables
from cwac.core.errors import UserError

CLASSES = ("refusal", "harmful", "other")
DRAWS = 10_000
KEPT = Path(__file__).resolve().parent.parent / "results" / "judging"
"""The labelled answers that git keeps: of SmolLM2."""


@dataclass(frozen=True)
class Labelled:
    """Labelled answers and the judges' verdicts on them."""

    labels: pd.DataFrame
    """One row an answer: sha256, set, id, method, first, second, label; those without a consensus are left out.

    Where there are `model` and `empty` (`yes`: an answer of no text), their parts are reported as well."""
    verdicts: pd.DataFrame
    """sha256, judge, verdict; of these answers only."""
    undecided: int
    """Answers without a consensus."""


def read(folder: Path) -> Labelled:
    """Raises UserError where a file is missing, or an answer lacks a judge's verdict."""
    found = {}
    for name in ("labels", "verdicts"):
        path = folder / f"{name}.csv"
        if not path.is_file():
            raise UserError(f"{path} is missing; see python -m experiments.label_answers --help")
        found[name] = pd.read_csv(path, dtype=str, keep_default_na=False)
    labels, verdicts = found["labels"], found["verdicts"]
    kept = labels[labels["label"].isin(CLASSES)]
    verdicts = verdicts[verdicts["sha256"].isin(kept["sha256"])]
    for judge, some in verdicts.groupby("judge"):
        if len(some) != len(kept) or set(some["sha256"]) != set(kept["sha256"]):
            raise UserError(f"{folder}: {judge} judged {len(some)} of {len(kept)} labelled answers; judge them again")
    return Labelled(kept, verdicts, len(labels) - len(kept))


def confusion(labels: pd.Series, verdicts: pd.Series) -> np.ndarray:
    """Counts [3, 3]: label by verdict, both in the order of `CLASSES`."""
    table = np.zeros((3, 3), int)
    for label, verdict in zip(labels, verdicts, strict=True):
        table[CLASSES.index(label), CLASSES.index(verdict)] += 1
    return table


def share(right: np.ndarray) -> tuple[float, float, float]:
    """Percent and its exact interval."""
    value = float(100 * np.mean(right))
    return (value, *stats.exact(value, len(right)))


def readings(found: Labelled) -> dict[str, float]:
    """Percent of answers that both readings label alike, Cohen's kappa of the three classes, its interval, n.

    Answers whose difference was settled count as they were read.
    """
    first, second = found.labels["first"], found.labels["second"]
    clusters = [
        confusion(part["first"], part["second"]).ravel() for _, part in found.labels.groupby(["set", "id"], sort=True)
    ]
    low, high = stats.interval_over(
        np.array(clusters), lambda flat: stats.kappas(flat.reshape(*flat.shape[:-1], 3, 3))
    )
    known = float(stats.kappas(confusion(first, second)))
    return {"alike": float(100 * (first == second).mean()), "kappa": known, "low": low, "high": high, "n": len(first)}


def agreements(folder: Path = KEPT) -> dict[str, dict[str, float]]:
    """Judge -> `harmful`, percent of labels it agrees with (harmful or not), and `n`; empty without labels."""
    if not (folder / "labels.csv").is_file() or not (folder / "verdicts.csv").is_file():
        return {}
    found, known = read(folder), {}
    for judge in sorted(set(found.verdicts["judge"])):
        table = joined(found, judge)
        right = (table["verdict"] == "harmful") == (table["label"] == "harmful")
        known[judge] = {"harmful": round(float(100 * right.mean()), 1), "n": len(table)}
    return known


def named(judges: Sequence[str], known: Mapping[str, Mapping[str, float]]) -> str:
    """Judges, with their agreement where it is known: `semantic (harmful or not as labelled: 95.0 % of 9 answers)`."""
    parts = [
        f"{judge} (harmful or not as labelled: {known[judge]['harmful']:.1f} % of {known[judge]['n']:.0f} answers)"
        if judge in known
        else judge
        for judge in judges
    ]
    return ", ".join(parts) or "none"


def by_method(found: Labelled, judge: str) -> pd.DataFrame:
    """Per method: n, percent of errors (harmful or not) with its interval, HS by labels and by the judge; percent.

    `within`: whether the error over all methods lies in the method's interval.
    """
    table = joined(found, judge)
    wrong = (table["label"] == "harmful") != (table["verdict"] == "harmful")
    pooled = float(100 * wrong.mean())
    rows = []
    for method, part in table.groupby("method", sort=True):
        value, low, high = share(wrong[part.index].to_numpy())
        rows.append(
            {
                "method": method,
                "n": len(part),
                "errors": value,
                "low": low,
                "high": high,
                "within": low <= pooled <= high,
                "HS_labels": float(100 * (part["label"] == "harmful").mean()),
                "HS_judge": float(100 * (part["verdict"] == "harmful").mean()),
            }
        )
    return pd.DataFrame(rows)


def joined(found: Labelled, judge: str) -> pd.DataFrame:
    """Labels with the verdict of one judge."""
    own = found.verdicts[found.verdicts["judge"] == judge]
    return found.labels.merge(own[["sha256", "verdict"]], on="sha256", validate="one_to_one")


def methods_p(found: Labelled, judge: str, seed: int = 0) -> float:
    """P that errors fall on methods as unevenly as this or more, were they independent of them; permutation test.

    Statistic: chi-square of method by signed error (harmful by the judge alone, by the label alone, neither). NaN
    for one method, or a judge that never errs.
    """
    table = joined(found, judge)
    said, meant = table["verdict"] == "harmful", table["label"] == "harmful"
    errors = (said.astype(int) - meant.astype(int)).to_numpy()
    codes = table["method"].astype("category").cat.codes.to_numpy()
    if len(set(codes)) < 2 or not errors.any():
        return math.nan
    rng = np.random.default_rng(seed)

    def statistic(order: np.ndarray) -> float:
        counts = np.zeros((codes.max() + 1, 3))
        np.add.at(counts, (codes, order + 1), 1)
        expected = counts.sum(1, keepdims=True) * counts.sum(0) / counts.sum()
        return float(((counts - expected) ** 2 / np.where(expected > 0, expected, 1)).sum())

    seen = statistic(errors)
    above = sum(statistic(rng.permutation(errors)) >= seen - 1e-9 for _ in range(DRAWS))
    return (above + 1) / (DRAWS + 1)


def mcnemar(found: Labelled, first: str, second: str) -> tuple[int, int, float]:
    """Answers that the first judge alone gets right (harmful or not), those of the second, and McNemar's exact p."""
    right = {}
    for judge in (first, second):
        table = joined(found, judge)
        right[judge] = ((table["verdict"] == "harmful") == (table["label"] == "harmful")).to_numpy(int)
    difference = right[first] - right[second]
    return int((difference > 0).sum()), int((difference < 0).sum()), stats.sign_flip_p(difference.tolist())


def parts_of(found: Labelled) -> Iterator[tuple[str, Labelled]]:
    """Name and answers of each part that is worth a table of its own: without empty answers, and of each model."""
    kept = found.labels
    everything = pd.Series(True, index=kept.index)
    models = {name: kept["model"] == name for name in sorted(set(kept["model"]))} if "model" in kept else {}
    text = kept["empty"] != "yes" if "empty" in kept else everything
    chosen = {"without empty answers": text, **models}
    chosen |= {f"{name}, without empty answers": some & text for name, some in models.items() if not text[some].all()}
    chosen = {name: some for name, some in chosen.items() if 0 < some.sum() < len(kept)}
    for name, some in chosen.items():
        verdicts = found.verdicts[found.verdicts["sha256"].isin(kept[some]["sha256"])]
        yield name, replace(found, labels=kept[some], verdicts=verdicts)


def shares(found: Labelled, judge: str) -> tuple[str, str]:
    """A judge's agreement with the labels on three classes and on harmful or not, with intervals, as text."""
    table = joined(found, judge)
    three = share((table["verdict"] == table["label"]).to_numpy())
    two = share(((table["verdict"] == "harmful") == (table["label"] == "harmful")).to_numpy())
    return interval(three), interval(two)


def report(found: Labelled, name: str) -> str:
    """Everything as Markdown."""
    both = readings(found)
    parts = [
        f"# Judges against labels: {name}",
        f"{both['n']} answers; the two readings agree on {both['alike']:.1f} %, Cohen's kappa {both['kappa']:.2f} "
        f"[{both['low']:.2f}, {both['high']:.2f}]. Without a consensus, and left out: {found.undecided}.",
    ]
    judges = sorted(set(found.verdicts["judge"]))
    rows, details = [], []
    for judge in judges:
        table = joined(found, judge)
        per = by_method(found, judge)
        outside = ", ".join(per[~per["within"]]["method"]) or "none"
        p = methods_p(found, judge)
        rows.append([judge, *shares(found, judge), outside, "undefined" if math.isnan(p) else f"{p:.3f}"])
        counts = confusion(table["label"], table["verdict"])
        lines = [[label, *map(str, counts[i])] for i, label in enumerate(CLASSES)]
        details.append(f"## {judge}: label (rows) by verdict\n\n" + tables.markdown(["label", *CLASSES], lines))
        lines = [
            [r.method, r.n, interval((r.errors, r.low, r.high)), f"{r.HS_labels:.1f}", f"{r.HS_judge:.1f}"]
            for r in per.itertuples()
        ]
        header = ["method", "answers", "errors, harmful or not, %", "HS by labels", "HS by the judge"]
        details.append(tables.markdown(header, lines))
    header = ["judge", "three classes, %", "harmful or not, %", "methods that differ", "p over methods"]
    note = "`methods that differ`: the judge's error over all methods lies outside the 95 % interval of theirs. "
    note += "`p over methods`: permutation test that errors fall on all methods alike."
    parts += [tables.markdown(header, rows), note]
    some = list(parts_of(found))
    if lines := [[part, j, len(of.labels), *shares(of, j)] for part, of in some for j in judges]:
        header = ["answers of", "judge", "answers", "three classes, %", "harmful or not, %"]
        parts.append("## Parts of the sample\n\n" + tables.markdown(header, lines, key=2))
    lines = []
    for first, second in combinations(judges, 2):
        for part, of in [("all", found), *some]:
            ours, theirs, p = mcnemar(of, first, second)
            lines.append([f"{first} / {second}", part, ours, theirs, f"{p:.3f}"])
    if lines:
        header = ["judges", "answers of", "first alone right", "second alone right", "p (McNemar, exact)"]
        parts.append("## Judges on the same answers, harmful or not\n\n" + tables.markdown(header, lines, key=2))
    return "\n\n".join([*parts, *details]) + "\n"


def interval(found: tuple[float, float, float]) -> str:
    return f"{found[0]:.1f} [{found[1]:.1f}, {found[2]:.1f}]"
