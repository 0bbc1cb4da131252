"""Every figure from planted rows: what is drawn is what was planted, also where cells, seeds or spread are missing."""

import math

import numpy as np
import pandas as pd
import pytest

from analysis import figures, gallery, paper, paper_figures, records, tables
from analysis.collect import Collection, tidy
from analysis.records import Record
from cwac.core.errors import UserError
from tests.helpers.results import cell_of, row

MANY = [m for m in paper.METHODS if m != paper.ALIGNED][:12] + [f"new{k}" for k in range(8)]


def planted(methods, ratios=(0.0, 0.1), seeds=(0, 1), steps=(0, 30, 60, 90), hs=None, model="tiny", rate=1e-3):
    """Metric rows; HS at the end is hs(method, ratio, seed), growing linearly with the steps, FA 90 - place."""
    hs = hs or (lambda m, p, s: 4.0 * methods.index(m) % 90 + 10 * p + s)
    rows = []
    for method in methods:
        for ratio in ratios:
            for seed in seeds:
                cell = cell_of(method, ratio, seed)
                for step in steps:
                    at = {"epoch": step / 30, "step": step, "final": step == steps[-1]}
                    value = hs(method, ratio, seed) * step / steps[-1]
                    rows.append(row(cell, "HS", value, set="harmful", judge="keyword", **at))
                    rows.append(row(cell, "FA", 90.0 - methods.index(method), **at))
                    rows.append(row(cell, "task_loss", 2.0 - step / 60, set="toy", n=None, **at))
    frame, _ = tidy([{**r, "model": model, "learning_rate": rate} for r in rows])
    return frame


def summary_of(rows):
    return tables.summarise(Collection(rows, runs=sorted(set(rows["run_id"]))))


def panel(figure, title: str):
    (ax,) = [ax for ax in figure.axes if ax.get_title(loc="left") == title]
    return ax


def drawn(ax, label: str) -> tuple[list, list]:
    """x and y of the line with this label."""
    (line,) = [line for line in ax.get_lines() if line.get_label() == label]
    return list(line.get_xdata()), list(line.get_ydata())


def bars(ax, colour: str) -> list[tuple[float, float, float]]:
    """(x, low, high) of the vertical bars of this colour."""
    from matplotlib.colors import to_rgba

    found = []
    for lines in ax.collections:
        if len(lines.get_color()) and tuple(lines.get_color()[0]) == to_rgba(colour):
            found += [(s[0][0], s[0][1], s[1][1]) for s in lines.get_segments() if len(s)]
    return sorted(found)


# --- small multiples: ratio, training, Figures 3 and 4 ------------------------------------------------


def test_twenty_methods_get_a_panel_each_with_their_planted_values():
    rows = planted(MANY)
    (plate,) = figures.against_ratio(summary_of(rows), "tiny", "toy", "harmful")
    assert sum(ax.axison for ax in plate.figure.axes) == len(MANY) == 20
    for method in ("sft", "cwac", "new7"):
        ax = panel(plate.figure, paper.method_label(method))
        ends = [np.mean([4.0 * MANY.index(method) % 90 + 10 * p + s for s in (0, 1)]) for p in (0.0, 0.1)]
        x, y = drawn(ax, "HS")
        assert x == [0, 1] and y == pytest.approx(ends)
        assert drawn(ax, "FA")[1] == pytest.approx([90.0 - MANY.index(method)] * 2)
        low, high = [(low, high) for at, low, high in bars(ax, figures.LOOKS["HS"]["color"]) if at == 1][0]
        half = 12.706 * math.sqrt(0.5) / math.sqrt(2)  # t of one degree of freedom, two seeds one apart
        assert (low, high) == pytest.approx((max(0, ends[1] - half), ends[1] + half), abs=0.01)
    reference = drawn(panel(plate.figure, "CWAC"), "HS of SFT")
    assert reference[1] == drawn(panel(plate.figure, "SFT"), "HS")[1]


def test_the_papers_values_are_overlaid_where_it_prints_them():
    """Table 3: Llama-2, SST-2, CWAC, p = 0.1."""
    rows = planted(MANY, model="llama2").assign(task="sst2")
    (plate,) = figures.against_ratio(summary_of(rows), "llama2", "sst2", "harmful")
    frame = pd.read_csv(paper.RESULTS)
    where = {"artifact": "table3", "model": "llama2", "method": "CWAC", "harmful_ratio": "0.1"}
    for key, value in where.items():
        frame = frame[frame[key] == value]
    said = frame.set_index("metric")["value"]
    for metric in ("HS", "FA"):
        x, y = drawn(panel(plate.figure, "CWAC"), f"{metric} in the paper")
        assert y[x.index(1)] == said[metric]
    assert "crosses" in plate.caption.lower()
    labels = [line.get_label() for line in panel(plate.figure, "new0").get_lines()]
    assert "HS in the paper" not in labels
    # a few methods share panels, and the crosses are there too
    few = planted(["sft", "cwac"], model="llama2").assign(task="sst2")
    (plate,) = figures.against_ratio(summary_of(few), "llama2", "sst2", "harmful")
    crosses = [y for line in plate.figure.axes[0].get_lines() if line.get_marker() == "x" for y in line.get_ydata()]
    assert said["HS"] in crosses


def test_training_curves_of_many_methods():
    plates = figures.against_training(planted(MANY), "tiny", "toy", "harmful")
    assert [p.name for p in plates] == [
        f"training-p{p}-{along}" for p in ("0", "0.1") for along in ("step", "task_loss")
    ]
    steps, losses = plates[2].figure, plates[3].figure
    end = 4.0 * MANY.index("cwac") + 1.5
    assert drawn(panel(steps, "CWAC"), "HS") == ([0, 30, 60, 90], pytest.approx([0, end / 3, 2 * end / 3, end]))
    x, y = drawn(panel(losses, "CWAC"), "HS")
    assert sorted(zip(x, y, strict=True), reverse=True) == [
        (pytest.approx(loss), pytest.approx(value))
        for loss, value in ((2, 0), (1.5, end / 3), (1, 2 * end / 3), (0.5, end))
    ]
    low, high = panel(losses, "CWAC").get_xlim()
    assert low > high  # the loss falls to the right


def test_figure3_is_over_the_learning_rate_on_a_log_axis():
    rates = (1e-7, 1e-5, 1e-3)
    parts = []
    for k, rate in enumerate(rates):
        part = planted(["sft", "cwac"], hs=lambda m, p, s, k=k: 20.0 * k + s + 5 * (m == "sft"), rate=rate)
        parts.append(part.assign(run_id=part["run_id"] + f"-{k}"))
    plates = paper_figures.figure3(pd.concat(parts), "tiny", "toy", "harmful")
    assert [p.name for p in plates] == ["figure3-p0", "figure3-p0.1"]
    ax = panel(plates[1].figure, "CWAC")
    assert ax.get_xscale() == "log"
    assert drawn(ax, "HS") == (list(rates), pytest.approx([0.5, 20.5, 40.5]))
    assert drawn(ax, "FA")[1] == pytest.approx([89.0] * 3)
    assert paper_figures.figure3(parts[0], "tiny", "toy", "harmful") == []


def test_figure4_is_over_the_epoch():
    plates = paper_figures.figure4(planted(["sft", "cwac"]), "tiny", "toy", "harmful")
    x, y = drawn(panel(plates[1].figure, "SFT"), "HS")
    assert x == [0, 1, 2, 3] and y == pytest.approx([0, 0.5, 1.0, 1.5])
    only_the_end = planted(["sft"], steps=(90,))
    assert paper_figures.figure4(only_the_end, "tiny", "toy", "harmful") == []


def test_missing_cells_leave_gaps_and_the_bar_of_one_seed_is_over_its_prompts():
    rows = planted(MANY[:9], seeds=(0,))
    rows = rows[~((rows["method"] == "sft") & (rows["harmful_ratio"] == 0.0))]
    (plate,) = figures.against_ratio(summary_of(rows), "tiny", "toy", "harmful")
    ax = panel(plate.figure, "SFT")
    assert drawn(ax, "HS")[0] == [1]
    ((_, low, high),) = bars(ax, figures.LOOKS["HS"]["color"])
    (told,) = summary_of(rows).query("method == 'sft' and metric == 'HS' and harmful_ratio > 0").to_dict("records")
    assert (low, high) == (told["low"], told["high"]) and told["over"] == "prompts of one seed"
    alone = ", of one seed over its prompts alone, which says nothing of other seeds."
    assert alone in plate.caption
    (plate,) = figures.against_ratio(summary_of(planted(MANY[:9], seeds=(0, 1))), "tiny", "toy", "harmful")
    assert "95 % intervals." in plate.caption


def test_zero_variance_draws_the_exact_interval():
    rows = planted(MANY, hs=lambda m, p, s: 0.0)
    (plate,) = figures.against_ratio(summary_of(rows), "tiny", "toy", "harmful")
    found = bars(panel(plate.figure, "CWAC"), figures.LOOKS["HS"]["color"])
    assert found[0] == pytest.approx((0, 0.0, 100 * (1 - 0.025 ** (1 / 200))))


# --- Pareto -------------------------------------------------------------------------------------------


def test_the_front_keeps_what_nothing_beats_and_ties_together():
    points = pd.DataFrame(
        {"FA": [90, 95, 95, 80, 90, 70], "HS": [10, 20, 20, 30, 12, 5]}, index=["a", "tie1", "tie2", "c", "d", "e"]
    )
    assert list(figures.front(points).index) == ["e", "a", "tie1", "tie2"]


def test_pareto_draws_each_method_at_its_means_and_names_the_front():
    places = {"sft": (60.0, 90.0), "cwac": (10.0, 89.0), "lisa": (30.0, 88.0)}
    rows = planted(list(places), ratios=(0.1,), hs=lambda m, p, s: places[m][0])
    (plate,) = figures.pareto(summary_of(rows), "tiny", "toy", "harmful")
    ax = panel(plate.figure, "p = 0.1")
    assert drawn(ax, "CWAC") == ([89.0], [10.0])
    assert drawn(ax, "front") == ([89.0, 90.0], [10.0, 60.0])
    named = {text.get_text() for text in ax.texts}
    assert named == {"SFT", "CWAC", paper.method_label(paper.ALIGNED)}
    assert figures.pareto(summary_of(rows[rows["metric"] != "FA"]), "tiny", "toy", "harmful") == []


def test_labels_are_spread_in_order_and_inside():
    assert figures.spread([0, 0, 0], 6, 0, 100) == [0, 6, 12]
    assert figures.spread([99, 100, 98], 6, 0, 100) == [94, 100, 88]
    crowded = figures.spread([50.0] * 30, 6, 0, 100)
    assert crowded == sorted(crowded) and min(crowded) > -1e-9 and max(crowded) < 100 + 1e-9
    assert figures.spread([], 6, 0, 100) == []


# --- Figure 5 and the decomposition -------------------------------------------------------------------


def test_figure5_shows_the_planted_quantiles_and_survives_zero_variance():
    values = list(np.linspace(0.1, 0.9, 81))
    found = [
        Record("a", "tiny", "sft", "toy", 0.1, 0, drift=values[:40]),
        Record("b", "tiny", "sft", "toy", 0.1, 1, drift=values[40:]),
        Record("c", "tiny", "cwac", "toy", 0.1, 0, drift=[0.2] * 20),
        Record("d", "tiny", "lisa", "toy", 0.1, 0, drift=[0.3]),
        Record("e", "tiny", "bea", "toy", 0.1, 0),
    ]
    (plate,) = paper_figures.figure5(found, "tiny", "toy")
    (ax,) = plate.figure.axes
    assert [t.get_text() for t in ax.get_yticklabels()] == ["SFT", "Lisa", "CWAC"]
    medians = [(line.get_xdata()[0], line.get_ydata()[0]) for line in ax.get_lines()]
    assert medians == [(pytest.approx(0.5), 0), (pytest.approx(0.3), 1), (pytest.approx(0.2), 2)]
    middle = [s for c in ax.collections if hasattr(c, "get_segments") for s in c.get_segments()][1]
    assert (middle[0][0], middle[1][0]) == pytest.approx((0.3, 0.7))
    assert "2 seeds" in plate.caption
    assert paper_figures.figure5(found, "tiny", "other") == []


def test_decomposition_draws_the_three_terms_and_no_zero():
    entry = {"layer": 0, "kind": "down_proj", "W0_dh": 0.3, "dW_h0": 0.0, "dW_dh": 0.01, "dy": 0.3}
    more = {**entry, "layer": 1, "W0_dh": 0.6}
    found = [
        Record("a", "tiny", "sft", "toy", 0.1, 0, decomposition=[entry, more]),
        Record("b", "tiny", "sft", "toy", 0.1, 1, decomposition=[{**entry, "W0_dh": 0.5}, more]),
    ]
    (plate,) = paper_figures.decomposition(found, "tiny", "toy")
    (ax,) = plate.figure.axes
    assert ax.get_title() == "down_proj" and ax.get_yscale() == "log"
    labels = {term: label for term, (label, *_) in paper_figures.TERMS.items()}
    assert drawn(ax, labels["W0_dh"]) == ([0, 1], pytest.approx([0.4, 0.6]))
    assert drawn(ax, labels["dW_dh"])[1] == pytest.approx([0.01, 0.01])
    assert all(math.isnan(y) for y in drawn(ax, labels["dW_h0"])[1])


# --- all of a campaign, and what is exported with it ----------------------------------------------------


def test_the_gallery_draws_each_learning_rate_by_itself_and_names_are_unique():
    parts = []
    for k, rate in enumerate((1e-4, 1e-3)):
        part = planted(["sft", "cwac"], rate=rate)
        parts.append(part.assign(run_id=part["run_id"] + f"-{k}"))
    rows = pd.concat(parts, ignore_index=True)
    ids = sorted(set(rows["run_id"]))
    drift = [Record(name, "tiny", "sft", "toy", 0.1, 0, drift=[0.1, 0.2]) for name in ids if "-sft-" in name]
    plates = gallery.draw(Collection(rows, runs=ids), drift)
    names = [p.name for p in plates]
    assert len(set(names)) == len(names)
    for stem in ("figure3-p0.1", "ratio-lr0.0001", "ratio-lr0.001", "figure5-p0.1-lr0.001", "pareto-lr0.0001"):
        assert f"{stem}-tiny-toy" in names, (stem, names)


def test_every_figure_is_written_as_png_and_pdf(tmp_path):
    (plate,) = figures.pareto(summary_of(planted(["sft"])), "tiny", "toy", "harmful")
    paths = figures.save(plate.figure, tmp_path / "pareto-p0.1-x")
    assert [p.name for p in paths] == ["pareto-p0.1-x.png", "pareto-p0.1-x.pdf"]
    assert paths[0].read_bytes().startswith(b"\x89PNG") and paths[1].read_bytes().startswith(b"%PDF")


def test_records_are_exported_without_answers_and_read_again(tmp_path):
    answer = records.Answer("harmful", "1", "how", "no", "refusal")
    full = Record("a", "tiny", "sft", "toy", 0.1, 0, pools={"sae": "abc"}, drift=[0.123456], answers=[answer])
    path = tmp_path / records.NAME
    records.export({"a": full}, path)
    assert "refusal" not in path.read_text()
    (back,) = records.read_exported(path).values()
    assert (back.drift, back.pools, back.answers, back.seed) == ([0.1235], {"sae": "abc"}, [], 0)
    assert records.read_exported(tmp_path / "nowhere") == {}
    path.write_text("{\n")
    with pytest.raises(UserError, match="line 1"):
        records.read_exported(path)


# --- looks, legends and ratios ------------------------------------------------------------------------


def test_no_two_methods_share_a_look_and_a_newcomer_takes_nobodys():
    listed = [m for m in paper.METHODS if m != paper.ALIGNED]
    assert set(listed) == set(figures.PLACES) and len(listed) >= 26
    new = [f"mine{k}" for k in range(20)] + [f"cwac, energy {e}" for e in (0.9, 0.99, 0.999)]
    looks = {m: figures.style(m, [*listed, *new]) for m in [*listed, *new]}
    pairs = {(look["color"], look["marker"]) for look in looks.values()}
    assert len(pairs) == len(looks)
    assert not {looks[m]["color"] for m in new} & {looks[m]["color"] for m in listed}
    # the paper's methods and those they are compared with first differ in colour alone
    first = ("sft", "lisa", "safeinstr", "bea", "sppft", "asft", "cwac", "activation_only")
    assert len({looks[m]["color"] for m in first}) == 8
    assert len({figures.style(m, new[:8])["color"] for m in new[:8]}) == 8
    # one look in every figure, whoever else is there
    assert figures.style("cwac") == figures.style("cwac", new) and figures.style("mine3") == figures.style("mine3", [])


@pytest.mark.parametrize(
    ("rate", "shown"),
    [(2e-4, "2e-4"), (6e-06, "6e-6"), (1.5e-4, "1.5e-4"), (1e-3, "1e-3"), (0.01, "0.01"), (0.5, "0.5"), (0.0, "0")],
)
def test_a_learning_rate_has_one_form_wherever_it_is_shown(rate, shown):
    assert paper.rate_label(rate) == shown and float(shown) == rate
    assert paper.method_label(f"sft, rate {rate}") == paper.method_label(f"sft, rate {rate:g}") == f"SFT, rate {shown}"
    setting = paper.setting_label(f"energy 0.9999, k 16, rate {rate:g}, batch 2 (chosen)")
    assert setting == f"energy 0.9999, k 16, rate {shown}, batch 2 (chosen)"


def test_a_legend_stays_within_its_figure():
    figure, grid = figures.panels(1, 1, (9, 3))
    for rate in (1e-5, 3e-5, 1e-4, 3e-4, 1e-3):
        grid[0, 0].plot([0, 1], [0, rate], label=paper.method_label(f"weight_only_closed, rate {rate}"))
    figures.legend_below(figure, [grid[0, 0]])
    figure.canvas.draw()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1, (box, figure.bbox)


def test_legends_and_rows_are_in_the_order_of_values():
    """As strings, 1e-05 comes after 1e-04 and 10 before 9."""
    names = [
        "sft, rate 3e-05",
        "sft, rate 0.001",
        "new10",
        "new9",
        "sft, rate 1e-05",
        "cwac",
        "sft, rate 0.0001",
        "sft",
    ]
    assert sorted(names, key=paper.method_order) == [
        *("sft", "sft, rate 1e-05", "sft, rate 3e-05", "sft, rate 0.0001", "sft, rate 0.001"),
        *("cwac", "new9", "new10"),
    ]
    assert paper.method_label("weight_only_closed, energy 0.99") == "weight-only closed (ours), energy 0.99"
    rows = planted([n for n in names if n != "new10"])
    (plate,) = figures.against_ratio(summary_of(rows), "tiny", "toy", "harmful")
    (legend,) = plate.figure.legends
    shown = [text.get_text() for text in legend.get_texts()]
    assert shown == [
        "aligned, not fine-tuned",
        *(paper.method_label(m) for m in sorted(names, key=paper.method_order) if m != "new10"),
    ]


@pytest.mark.parametrize("methods", [MANY[:2], MANY])
def test_at_one_ratio_methods_are_rows_and_values_stand_where_they_are(methods):
    rows = planted(methods, ratios=(0.2,))
    (plate,) = figures.against_ratio(summary_of(rows), "tiny", "toy", "harmful")
    ax = plate.figure.axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == [paper.method_label(m) for m in figures.ordered(methods)]
    points = {line.get_ydata()[0]: line.get_xdata()[0] for line in ax.get_lines() if line.get_linestyle() == "None"}
    for k, method in enumerate(figures.ordered(methods)):
        assert points[k] == pytest.approx(4.0 * methods.index(method) % 90 + 2.0 + 0.5)
    assert "p = 0.2" in plate.figure.get_suptitle()


def test_of_several_ratios_no_point_leaves_its_band():
    methods = MANY[: figures.OVERLAY]
    (plate,) = figures.against_ratio(summary_of(planted(methods, ratios=(0.0, 0.1, 0.5))), "tiny", "toy", "harmful")
    ax = plate.figure.axes[0]
    assert ax.get_xlim() == (-0.5, 2.5)
    assert [t.get_text() for t in plate.figure.axes[-1].get_xticklabels()] == ["p = 0", "p = 0.1", "p = 0.5"]
    for method in methods:
        x, _ = drawn(ax, paper.method_label(method))
        assert [round(v) for v in x] == [0, 1, 2] and all(abs(v - round(v)) < 0.4 for v in x)


@pytest.mark.parametrize("count, ratios", [(3, (0.1,)), (3, (0.0, 0.1)), (12, (0.0, 0.1))])
def test_the_aligned_model_is_a_line_in_every_ratio_figure(count, ratios):
    rows = planted(MANY[:count], ratios=ratios, hs=lambda m, p, s: 40.0)
    start = (rows["metric"] == "HS") & (rows["step"] == 0)
    rows.loc[start, "value"] = 7.0
    (plate,) = figures.against_ratio(summary_of(rows), "tiny", "toy", "harmful")
    (line,) = [x for x in plate.figure.axes[0].get_lines() if x.get_label() == "aligned, not fine-tuned"]
    assert 7.0 in {*line.get_xdata(), *line.get_ydata()} and 40.0 not in {*line.get_xdata(), *line.get_ydata()}
