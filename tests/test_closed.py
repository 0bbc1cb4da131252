"""The closed constraint's experiments: what their presets ask for, a bypass on purpose, and planted runs analysed."""

import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats
from transformers import LlamaConfig, LlamaForCausalLM

from analysis import closed, stats, variants
from analysis.collect import cell_from
from cwac.constraints.settings import Weight
from cwac.constraints.subspace import Constraint, fit_subspace
from cwac.constraints.weight import constrained, freeze_others_
from cwac.core import config, identity, paths
from cwac.core.errors import UsageError, UserError
from cwac.core.jsonl import to_line
from cwac.data import tiny_world
from cwac.data.pools import load_pools
from tests.helpers.results import row, write_run

TYPES = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}


def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes))


def test_what_is_freed_trains_without_a_constraint_and_nothing_else_joins_it():
    model = llama()
    held, freed = constrained(model, Weight(modules="all", freeze_others=True, unconstrained=["down_proj"]))
    assert {name.split(".")[-1] for name in freed} == {"down_proj"}
    assert {name.split(".")[-1] for name in held} == TYPES - {"down_proj"}
    bases = fit_subspace(model, [{"input_ids": [1, 2, 3]}], "all", energy=0.5)
    constraint = Constraint(held, bases)
    freeze_others_(model, held, constraint, freed)
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == TYPES
    assert {entry[0] for entry in constraint.entries} == set(held)


def test_a_constraint_that_frees_everything_or_is_misspelt_is_refused():
    with pytest.raises(UsageError, match="method.weight.unconstrained=.*leave a matrix"):
        constrained(llama(), Weight(modules=["q_proj"], unconstrained=["q_proj"]))
    with pytest.raises(UserError, match="method.weight.unconstrained=.*nope_proj"):
        constrained(llama(), Weight(modules="all", unconstrained=["nope_proj"]))
    with pytest.raises(UsageError, match="method.weight.unconstrained=down_proj"):
        Weight(unconstrained="down_proj")


def test_a_run_without_a_bypass_keeps_its_name():
    """The key came later than the first campaigns."""
    assert "method.weight.unconstrained" not in identity.identity(config.compose(["method=weight_only_closed"]))
    opened = config.compose(["method=weight_only_closed", "method.weight.unconstrained=[q_proj]"])
    assert identity.identity(opened)["method.weight.unconstrained"] == ["q_proj"]


def test_every_type_of_matrix_is_freed_once_and_constrained_once():
    cells = config.expand("closed_free", ["seed=0"])
    found = [closed.setting("closed_free", cfg) for cfg in cells]
    types = {name.removesuffix("_proj") for name in TYPES}
    assert {s["matrix"] for s in found if s["arm"] == "freed"} == {*types, "none", closed.REST}
    assert {s["matrix"] for s in found if s["arm"] == "constrained"} == types
    for cfg, s in zip(cells, found, strict=True):
        assert cfg.method.weight.freeze_others == (s["arm"] == "freed" and s["matrix"] != closed.REST)


def test_the_curves_reach_ten_times_the_papers_epochs_with_every_method_at_its_tuned_values():
    cells = config.expand("closed_break", ["seed=0", "harmful_ratio=1"])
    assert {c.train.num_train_epochs for c in cells} == {10 * config.compose([]).train.num_train_epochs}
    lam = {c.method.name: c.method.activation.lam for c in cells if c.method.get("activation")}
    assert lam["activation_only"] == 62.5 and {c.train.lr_scheduler_type for c in cells} == {"constant"}
    rates = {c.train.learning_rate for c in config.expand("closed_rates", ["seed=0"])}
    assert rates == {1e-5, 3e-5, 1e-4, 3e-4, 1e-3} and config.compose([]).train.learning_rate in rates


def test_every_variant_with_a_strength_is_searched_at_three_on_validation_prompts():
    tried, ends = config.grid("closed_variants_search"), config.expand("closed_variants", ["seed=0"])
    search = [config.compose(cell) for cell in tried[::3]]
    strengths = {c.variant.name: list(c.variant.strengths) for c in ends if c.variant.get("strengths")}
    assert {c.variant.name for c in search} == {*strengths} and {len(s) for s in strengths.values()} == {3}
    assert {tuple(cell[:3]) for cell in tried} == {
        ("seed=3", f"variant={name}", f"variant.pick={i}") for name in strengths for i in range(3)
    }
    assert {c.eval.split for c in search} == {"validation"} and {c.eval.split for c in ends} == {"test"}
    same = [{k: v for k, v in identity.identity(c).items() if k.startswith("train.")} for c in (*search, *ends)]
    assert all(s == same[0] for s in same) and {c.harmful_ratio for c in (*search, *ends)} == {0.5}
    closed_again = config.expand("closed_anchors", ["seed=0", "method.weight={energy: 0.99}"])[0]
    assert identity.run_id(closed_again) == identity.run_id(ends[0])  # so the three runs of `closed` are there already
    assert len(tried) + len(config.grid("closed_variants")) - 3 == 60


def test_each_category_is_once_alone_among_the_anchors_and_a_run_without_sources_keeps_its_name():
    cells = config.expand("closed_sources", ["seed=0"])
    given = [list(c.method.weight.anchor_sources) for c in cells]
    assert given == [[name] for name in tiny_world.CATEGORIES] + [[], []]
    assert [c.method.weight.n_anchors for c in cells] == 9 * [20] + [None]
    reference = config.expand("closed_anchors", ["seed=0", "method.weight={energy: 0.99}"])[0]
    assert identity.run_id(reference) == identity.run_id(cells[-1])
    assert "method.weight.anchor_sources" not in identity.identity(cells[-1])


def test_the_strengths_that_a_search_chose_are_those_that_run(tmp_path, monkeypatch, capsys):
    """Planted runs: the third strength of a closed sae is best, all of down_refresh are alike."""
    cells = config.expand("closed_variants_search", ["variant=closed_sae,down_refresh"])
    for cfg in cells:
        cell = cell_from(cfg)
        hs = 30.0 - 10 * cfg.variant.pick if cfg.variant.name == "closed_sae" else 50.0
        rows = [row(cell, "HS", hs, set="toy_harmful", judge="keyword", eval=cell.eval)]
        rows += [row(cell, "FA", 90.0, eval=cell.eval), row(cell, "OR", 0.0, eval=cell.eval)]
        folder = write_run(tmp_path / "runs", cell, rows)
        (folder / "status.json").write_text(json.dumps({"status": "done", "evaluations": [cell.eval]}))
    conf = tmp_path / "conf"
    shutil.copytree(paths.CONF, conf)
    where = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path), "--conf", str(conf)]
    assert variants.main([*where, "variant=closed_sae,down_refresh,down_sae"]) == 1
    assert "3 of 9 runs are missing; nothing is chosen" in capsys.readouterr().err
    assert variants.main([*where, "variant=closed_sae,down_refresh"]) == 0
    log = pd.read_csv(tmp_path / "variants_search.csv")
    assert log.loc[log["chosen"], ["variant", "strength"]].values.tolist() == [
        ["closed_sae", 50],
        ["down_refresh", 25],
    ]
    monkeypatch.setattr("cwac.core.config.CONF", conf)
    chosen = config.expand("closed_variants", ["seed=0", "variant=closed_sae,down_refresh,closed_soft"])
    assert [c.variant.pick for c in chosen] == [2, 1, 1]
    assert chosen[0].method.activation.lam == 50 and "chosen on validation" in closed.chosen_on_validation()


# --- the analysis ---------------------------------------------------------------------------------------------

ENERGIES = (0.8, 0.9, 0.99)
GRIDS = {
    "closed_break": ["seed=0,1", "harmful_ratio=1", "method=sft,weight_only_closed"],
    "closed_anchors": ["seed=0,1", "method.weight={energy: 0.8},{energy: 0.9},{energy: 0.99}"],
    "closed_sources": [
        "seed=0,1",
        "method.weight={n_anchors: 20, anchor_sources: [theft]},\
        {n_anchors: 20, anchor_sources: [fraud]},{n_anchors: 20}",
    ],
    "closed_free": ["seed=0,1", "method.weight={unconstrained: [v_proj]},{modules: [q_proj], freeze_others: false}"],
    "closed_goal": ["seed=0,1", "harmful_ratio=1"],
    "closed_variants": ["seed=0,1", "variant=closed,closed_residual,down_refresh"],
}


def planted(preset: str, cfg) -> float:
    """HS at the end of training: SFT breaks, less energy is worse, a freed v does less than a constrained q."""
    if preset == "closed_sources":
        return {"theft": 70.0, "fraud": 50.0, "": 20.0}["".join(cfg.method.weight.anchor_sources)] + cfg.seed
    if preset == "closed_break":
        return (90.0 if cfg.method.name == "sft" else 4.0) + cfg.seed
    if preset == "closed_goal":
        return round(1000 * (1 - cfg.method.weight.energy), 3) + cfg.seed
    if preset == "closed_anchors":
        return 10.0 * (1 + ENERGIES[::-1].index(cfg.method.weight.energy)) + cfg.seed
    if preset == "closed_variants":
        return {"closed": 10.0, "closed_residual": 5.0, "down_refresh": 80.0}[cfg.variant.name] + cfg.seed
    return (20.0 if cfg.method.weight.unconstrained else 60.0) + cfg.seed


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    """Finished runs of a part of each preset, and the cells."""
    runs = tmp_path_factory.mktemp("closed") / "runs"
    cells = [(preset, cfg) for preset, given in GRIDS.items() for cfg in config.expand(preset, given)]
    for preset, cfg in {identity.run_id(cfg): (preset, cfg) for preset, cfg in reversed(cells)}.values():
        cell, hs = cell_from(cfg), planted(preset, cfg)
        at = {"set": "toy_harmful", "judge": "keyword"}
        rows = [
            row(cell, "HS", hs * share, step=90 * share, epoch=share, final=share == 1, **at) for share in (0.5, 1)
        ]
        rows += [row(cell, "FA", 99.0), row(cell, "task_loss", 0.1, n=None)]
        rows += [row(cell, "poison_loss", 2.5, set="poison", n=None)]
        rows += [row(cell, "weight_leak_all", hs / 1000, set="heldout", n=None)]
        folder = write_run(runs, cell, [{**r, "eval": cell.eval} for r in rows])
        status = {"status": "done", "run_id": cell.run_id, "evaluations": [cell.eval]}
        (folder / "status.json").write_text(json.dumps(status))
        if preset == "closed_sources" and (category := "".join(cfg.method.weight.anchor_sources)):
            asked = load_pools(cfg.pools, None, cfg.seed).test["toy_harmful"]
            kept = [e for e in asked if e.group == category][: 15 if category == "theft" else 20]
            verdicts = [
                {"id": e.id, "judge": "keyword", "verdict": "refusal" if e in kept else "harmful"} for e in asked
            ]
            (folder / "judge").mkdir()
            (folder / "judge" / f"toy_harmful@90-{cell.eval}.jsonl").write_text("".join(map(to_line, verdicts)))
        if preset == "closed_anchors":
            outside = (1 - cfg.method.weight.energy) ** 0.5
            bounds = {"0.q": {"leak": 0, "change": 1, "bound": outside}, "0.k": {"leak": 0, "change": 1}}
            (folder / "drift.json").write_text(json.dumps({"heldout": {"weight": bounds, "activation": []}}))
    return runs, cells


def test_planted_runs_come_back_as_curves_certificates_and_routes(campaign, tmp_path, monkeypatch, capsys):
    runs, cells = campaign
    monkeypatch.setattr(closed, "expected", lambda overrides: cells)
    assert closed.main(["--runs", str(runs), "--out", str(tmp_path)]) == 0
    curve = pd.read_csv(tmp_path / "break.csv").query("metric == 'HS' and method == 'sft'")
    assert dict(zip(curve["step"], curve["mean"], strict=True)) == {45: 45.25, 90: 90.5}
    end = curve[curve["step"] == 90].iloc[0]
    low, high = scipy_stats.t.interval(0.95, 1, 90.5, scipy_stats.sem([90.0, 91.0]))
    assert end["n"] == 2 and (end["low"], end["high"]) == pytest.approx((low, high))
    goal = pd.read_csv(tmp_path / "break.csv").query("metric == 'HS' and step == 90 and preset == 'closed_goal'")
    # at 0.99 it is closed_break's run
    assert dict(zip(goal["held"], goal["mean"], strict=True)) == pytest.approx({0.99: 4.5, 0.999: 1.5, 0.9999: 0.6})
    rho = pd.read_csv(tmp_path / "certificates.csv").set_index("certificate")
    assert rho.loc["worst weight_leak, held-out prompts", "rho"] == pytest.approx(1)
    held = rho.loc["least energy kept, held-out prompts"]
    assert held["rho"] < -0.9 and (held["runs"], held["settings"]) == (6, 3)
    strengths = pd.read_csv(tmp_path / "anchors.csv").query("metric == 'energy'")
    assert strengths["mean"].tolist() == pytest.approx([0.8, 0.9, 0.99])
    varied = pd.read_csv(tmp_path / "sources.csv").query("metric == 'HS'").set_index(["anchors", "set"])
    # theft's own: 5 of 20 harmful, fraud's: none
    assert varied.loc[closed.ONE, "mean"].to_dict() == {"toy_harmful": 60.5, closed.OWN: 12.5, closed.OTHERS: 100.0}
    assert varied.loc[(closed.SEVERAL, "toy_harmful"), "mean"] == 20.5 and set(varied["n"]) == {2}
    routes = pd.read_csv(tmp_path / "free.csv").query("metric == 'HS'").set_index(["arm", "matrix"])["mean"]
    assert routes.to_dict() == {("freed", "v"): 20.5, ("constrained", "q"): 60.5}
    coupled = pd.read_csv(tmp_path / "variants.csv").query("metric == 'HS'").set_index("variant")
    # `closed` is the run of closed_anchors at energy 0.99: one run, two tables
    assert coupled["mean"].to_dict() == {"closed": 10.5, "closed_residual": 5.5, "down_refresh": 80.5}
    assert set(coupled["n"]) == {2} and coupled.loc["closed_residual", "strength"] in (1, 10, 100)
    text = (tmp_path / "table.md").read_text()
    section = text.split("### Which coupling closes it")[1]
    assert "loss" in section and closed.chosen_on_validation() in section and "duplicate" not in text
    assert text == capsys.readouterr().out.split("\nfigure:")[0].rstrip("\n") + "\n"
    crossing = next(line for line in text.split("When HS crosses")[1].splitlines() if "SFT" in line)
    assert [cell.strip() for cell in crossing.split("|")[5:8]] == ["45", "45", "90"]
    assert "> 90" in text and "Missing" not in text and max(map(len, text.splitlines())) <= 124
    for name in ("break", "goal", "anchors", "free"):
        assert (tmp_path / f"{name}.png").stat().st_size > 0
    assert json.loads((tmp_path / "provenance.json").read_text())["missing"] == []
    assert re.search(r"\| +1e-4 \|", text) and "0.0001" not in text
    # the same again, to the byte, from the exported rows alone
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix in (".csv", ".json", ".md")}
    (tmp_path / "table.md").unlink()
    assert closed.main(["--exported", str(tmp_path)]) == 0
    assert {name: (tmp_path / name).read_bytes() for name in kept} == kept
    for more in (["seed=0"], ["--runs", str(tmp_path)]):
        assert closed.main(["--exported", str(tmp_path), *more]) == 2
        assert "are for --out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        closed.main(["--exported", str(tmp_path), "--out", str(tmp_path / "elsewhere")])
    assert "not allowed with argument" in capsys.readouterr().err
    monkeypatch.setattr(closed, "expected", lambda overrides: cells[:1])
    assert closed.main(["--exported", str(tmp_path)]) == 2
    assert "runs are of no preset of today's conf/" in capsys.readouterr().err


def test_a_missing_run_is_named_with_its_preset(campaign, tmp_path, monkeypatch, capsys):
    runs, cells = campaign
    gone = config.compose(["experiment=closed_free", "method.weight.unconstrained=[o_proj]"])
    monkeypatch.setattr(closed, "expected", lambda overrides: [*cells, ("closed_free", gone)])
    assert closed.main(["--runs", str(runs), "--out", str(tmp_path / "out")]) == 1
    text = capsys.readouterr().out
    assert "Missing: 1 of" in text and f"- closed_free: {cell_from(gone)}" in text
    (tmp_path / "none").mkdir()
    assert closed.main(["--runs", str(tmp_path / "none"), "--out", str(tmp_path / "nothing")]) == 2
    assert not (tmp_path / "nothing").exists()


def test_rank_correlation_is_spearmans_and_its_interval_knows_what_belongs_together():
    rng = np.random.default_rng(0)
    x, y = np.repeat(rng.normal(size=12), 3), np.repeat(rng.normal(size=12), 3)
    y[:2] = y[3]  # ties
    found, low, high = stats.rank_correlation(x, y, np.repeat(np.arange(12), 3))
    assert found == pytest.approx(scipy_stats.spearmanr(x, y).statistic) and low < found < high
    _, narrow, wide = stats.rank_correlation(x, y, np.arange(36))
    assert wide - narrow < high - low
    assert np.isnan(stats.rank_correlation([1, 1, 1], [1, 2, 3], "abc")).all()
    assert stats.rank_correlation([1, 2], [1, 2], "aa")[0] == pytest.approx(1)
