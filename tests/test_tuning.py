"""Searches at equal budgets on prompts no test pool has; `values=tuned` runs what they choose, and tables say so."""

import json
import math

import pandas as pd
import pytest
import yaml

from analysis import demo, tuning
from cwac.core import config, identity, metrics, paths, validation
from cwac.core.errors import UsageError, UserError
from cwac.data.pools import load_pools
from cwac.data.tasks import load_task
from tests.conftest import SMALL, run_train
from tests.helpers.options import PRESETS

SEARCHES = [name for name in PRESETS if name.startswith("tune_")]


def test_every_rival_and_every_reading_has_a_search():
    rivals = "lisa bea safeinstr replay asft sppft safelora salora ldifs circuit_breaker vaccine l2sp ewc"
    rivals += " constrained_sft inflora"
    rivals += " resta safe_delta booster repnoise"
    readings = "cwac cwac_literal weight_only activation_only cwac_closed weight_only_closed"
    assert {f"tune_{name}" for name in f"{rivals} {readings}".split()} <= set(SEARCHES)


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_has_the_budget_of_every_other(name):
    every = config.grid(name)
    assert len({tuple(cell) for cell in every}) == len(every) == 18
    seeds = {override for cell in every for override in cell if override.startswith("seed=")}
    assert seeds == {"seed=3", "seed=4", "seed=5"}
    cells = config.expand(name, ["seed=3"])
    for cell in cells:
        validation.validate(cell)
        assert cell.method.name == name.removeprefix("tune_")
        assert (cell.eval.split, cell.harmful_ratio, cell["values"]) == ("validation", 0.1, "official")
        assert dict(cell.objective) == {"HS": 1, "FA": -1, "OR": 1}
    assert len({identity.run_id(cell) for cell in cells}) == len(tuning.tried(cells)) == 6
    assert tuning.official(cells[0], tuning.tried(cells)) in tuning.tried(cells)


def test_a_search_is_not_cut_short():
    """Optuna's grid sampler stops at n_trials without a word."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(paths.CONF), version_base="1.3"):
        hydra = compose("config", ["experiment=tune_safeinstr"], return_hydra_config=True).hydra
    assert hydra.sweeper.n_trials == len(config.grid("tune_safeinstr"))
    assert hydra.sweeper._target_.endswith("OptunaSweeper")


def test_a_search_without_a_line_has_no_log_and_shows_the_line(capsys):
    assert tuning.main(["--experiment", "tune", "method=nullspace_cwac"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "conf/experiment/tune.yaml has no search space of method=nullspace_cwac; add a line under search" in line


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("task", ["toy_sentiment", "toy_topic", "toy_math"])
def test_validation_shares_no_prompt_with_test(task, seed):
    cfg = config.compose([f"task={task}", f"seed={seed}"])
    pools = load_pools(cfg.pools, None, seed)
    tuned_on = {e.prompt for e in [*pools.validation, *pools.validation_benign["toy_benign"]]}
    tuned_on |= {e.prompt for e in load_task(cfg.task, None, seed, "validation").test}
    tested_on = {e.prompt for e in [*pools.test["toy_harmful"], *pools.over_refusal["toy_benign"]]}
    tested_on |= {e.prompt for e in load_task(cfg.task, None, seed).test}
    assert len(tuned_on) == 80 + 100 + 100 and len(tested_on) == 160 + 100 + 100
    assert not tuned_on & tested_on


def test_the_objective_is_a_weighted_sum_of_means_over_sets():
    rows = [("HS", "a", 10.0), ("HS", "b", 30.0), ("FA", "t", 90.0), ("OR", "x", 4.0)]
    rows = [dict(zip(("metric", "set", "value"), row, strict=True)) for row in rows]
    assert metrics.objective({"HS": 1}, rows) == 20
    assert metrics.objective({"HS": 1, "FA": -1, "OR": 1}, rows) == 20 - 90 + 4
    assert metrics.objective({"HS": 1, "other": 1}, rows) is None
    with pytest.raises(UsageError, match=r"objective\.loss=1 is not valid; give weights of FA, HS"):
        validation.validate(config.compose(["+objective.loss=1"]))
    assert identity.run_id(config.compose(["+objective.FA=-1"])) == identity.run_id(config.compose([]))


def log_of(*objectives: tuple[float, ...]) -> pd.DataFrame:
    """A search's log: one tuple a value, one number a seed."""
    rows = [(t + 1, s, o) for t, seeds in enumerate(objectives) for s, o in enumerate(seeds)]
    log = pd.DataFrame(rows, columns=["trial", "seed", "objective"])
    return log.assign(**dict.fromkeys(tuning.SHOWN, 1.0))


def test_the_smallest_mean_is_chosen_a_failed_value_never_and_a_tie_keeps_the_official_one():
    values = [{"method.lam": lam} for lam in (0.1, 1.0, 10.0)]

    def chosen(*objectives):
        means = tuning.choose(log_of(*objectives), values, {"method.lam": 1.0})
        return means.loc[means["chosen"], "trial"].tolist()

    assert chosen((5, 1), (4, 4), (9, 0)) == [1]  # means 3, 4, 4.5: one lucky seed does not decide
    assert chosen((0, math.nan), (4, 4), (5, 5)) == [2]
    assert chosen((4, 4), (4, 4), (3, 5)) == [2]
    assert chosen((4, 4), (5, 5), (4, 4)) == [1]
    with pytest.raises(UserError, match="every value failed"):
        chosen((math.nan, 1), (math.nan, 1), (math.nan, 1))


def test_a_search_that_varies_more_than_its_method_is_refused():
    with pytest.raises(UserError, match="this search varies train.learning_rate"):
        tuning.tried(config.expand("tune_safeinstr", ["seed=3", "train.learning_rate=1e-4,1e-3"]))
    with pytest.raises(UserError, match="one value only"):
        tuning.tried(config.expand("tune_safeinstr", ["method.ratio=0.1"]))


def test_a_search_of_sft_tries_learning_rates_since_it_has_no_key():
    values = tuning.tried(config.expand("tune_sft", ["seed=3"]))
    assert [v["train.learning_rate"] for v in values] == [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 4e-4]


@pytest.mark.slow
def test_a_search_ends_in_a_log_and_in_values_that_tuned_runs_use(random_model, tmp_path, capsys):
    """Through the commands of conf/README.md: search, choose, run with what was chosen, tabulate."""
    common = [
        "model.kind=folder",
        f"+model.path={random_model}",
        f"paths.runs={tmp_path / 'runs'}",
        f"paths.artifacts={tmp_path / 'artifacts'}",
        "train.max_steps=2",
        *SMALL,
    ]
    here = ["hydra.launcher.n_jobs=1", "hydra.sweeper.n_jobs=1"]  # one process; its start is most of such a run
    narrow = ["seed=choice(3,4)", "method.ratio=choice(0.03,0.12)"]
    too_far = ["seed=choice(3,4)", "method.ratio=choice(0.03,0.12,99.0)"]

    code, output = run_train("-m", "experiment=tune_safeinstr", *common, *here, *too_far)
    assert code == 2 and "error: 2 cells failed" in output and "method.ratio=99.0 is out of range" in output, output
    # a seed is no choice: a value counts by its mean, and the next command takes it
    assert "Best" not in output and not (tmp_path / "runs" / "optimization_results.yaml").exists()
    assert f"python -m analysis.tuning --experiment tune_safeinstr --runs {tmp_path / 'runs'} " in output
    arguments = ["--experiment", "tune_safeinstr", "--runs", str(tmp_path / "runs")]
    arguments += ["--out", str(tmp_path / "log"), "--conf", str(tmp_path / "conf")]
    assert tuning.main([*arguments, *common, *too_far]) == 1
    assert "2 of 6 runs are missing; nothing is chosen" in capsys.readouterr().err
    assert not (tmp_path / "conf").exists()

    assert tuning.main([*arguments, *common, *narrow]) == 0
    log = pd.read_csv(tmp_path / "log" / "tiny" / "safeinstr.csv")
    assert log["trial"].tolist() == [1, 2, 1, 2] and sorted(set(log["seed"])) == [3, 4]
    assert set(log["split"]) == {"validation"} and set(log["status"]) == {"done"}
    assert (log["objective"] == log["HS"] - log["FA"] + log["OR"]).all()
    option = yaml.safe_load((tmp_path / "conf/chosen/tuned/tiny_safeinstr.yaml").read_text())
    assert option["values"] == "tuned"
    assert option["method"]["ratio"] == log.loc[log["chosen"], "method.ratio"].unique().item()
    # under a model option of its own, since tiny's file is there already
    (tmp_path / "conf/chosen/tuned/own_safeinstr.yaml").write_text(
        "# @package _global_\nvalues: tuned\nmethod: {ratio: 0.12}\n"  # not the official one, so that it shows
    )
    (tmp_path / "conf/model").mkdir()
    (tmp_path / "conf/model/own.yaml").write_text("defaults: [tiny]\n")

    tuned = ["model=own", "values=tuned", f"hydra.searchpath=[file://{tmp_path / 'conf'}]", "seed=0"]
    code, output = run_train("-m", "method=sft,safeinstr", *tuned, *common, f"paths.runs={tmp_path / 'final'}")
    assert code == 0, output
    assert output.count("nothing was chosen for model=tiny method=sft") == 1
    rows = [json.loads(line) for path in (tmp_path / "final").glob("*/metrics.jsonl") for line in path.open()]
    assert {(r["method"], r["values"]) for r in rows} == {("sft", "official"), ("safeinstr", "tuned")}
    configs = [yaml.safe_load(path.read_text()) for path in (tmp_path / "final").glob("*/config.yaml")]
    assert [c["method"]["ratio"] for c in configs if c["method"]["name"] == "safeinstr"] == [0.12]
    assert demo.main(["--runs", str(tmp_path / "final"), "--out", str(tmp_path / "table")]) == 0
    said = "Values: tuned on validation prompts (results/tuning) for SafeInstr; official for the others."
    assert said in (tmp_path / "table" / "table.md").read_text()


def test_what_a_search_chose_lays_only_values_of_its_method_over_a_preset():
    """A learning rate here would move SFT, the control, in every preset with `values=tuned`."""
    files = sorted((paths.CONF / "chosen" / "tuned").glob("*.yaml"))
    assert files and {key for f in files for key in yaml.safe_load(f.read_text())} == {"values", "method"}
