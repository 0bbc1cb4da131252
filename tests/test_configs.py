"""Every option of every group composes and instantiates; every preset expands; a slug is one string everywhere."""

import re
import subprocess
from pathlib import Path

import hydra
import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra

from analysis import paper
from cwac.core import config, identity, paths, validation
from cwac.core.errors import UsageError, UserError
from tests.helpers.options import METHODS, MODELS, PRESETS, TASKS, options

OTHERS = [(g, o) for g in ("eval", "eval/judge", "logger", "train", "pools", "scale") for o in options(g)]


def test_the_groups_are_found():
    assert {
        "sft",
        "cwac",
        "cwac_literal",
        "weight_only",
        "activation_only",
        "cwac_closed",
        "weight_only_closed",
    } <= set(METHODS)
    assert {"tiny", "smollm2"} <= set(MODELS)
    assert {"toy_sentiment", "toy_topic", "toy_math", "sst2"} <= set(TASKS)
    assert {"demo", "demo_full", "smollm2"} <= set(PRESETS)


@pytest.mark.parametrize("name", METHODS)
def test_methods_instantiate_under_their_own_name(name):
    cfg = config.compose([f"method={name}"])
    method = hydra.utils.instantiate(cfg.method, _convert_="all")
    assert method.name == name == cfg.method.name


@pytest.mark.parametrize(("group", "name"), [("model", m) for m in MODELS] + [("task", t) for t in TASKS])
def test_models_and_tasks_compose_under_their_own_name(group, name):
    cfg = config.compose([f"{group}={name}"])
    assert cfg[group].name == name
    assert identity.run_id(cfg)


@pytest.mark.parametrize(("group", "name"), OTHERS)
def test_other_groups_compose(group, name):
    assert config.compose([f"{group}={name}"])


def test_a_model_brings_its_training_and_a_task_its_pools_unless_told_otherwise():
    cfg = config.compose(["model=smollm2", "task=sst2"])
    assert cfg.pools.name == "real"
    tiny, small = config.compose([]).train, cfg.train
    assert tiny != small
    assert config.compose(["model=smollm2", "task=sst2", "train=default"]).train.learning_rate == 2e-5


PAPER = [name for name in PRESETS if re.fullmatch(r"(table|figure)\d", name)]
SMALL = ["model=tiny", "task=toy_sentiment", "method=sft,cwac", "seed=0"]


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_grids_expand_on_a_small_model(name):
    """The same preset on what fits any machine: only model, task and method change."""
    cells = config.expand(name, SMALL)
    for cell in cells:
        validation.validate(cell)
    assert {c.model.name for c in cells} == {"tiny"} and {c.method.name for c in cells} == {"sft", "cwac"}
    assert len({identity.run_id(c) for c in cells}) == len(cells) >= 2


def axes(name: str) -> dict[str, list[str]]:
    """The values of each axis of a preset's grid, as its file spells them."""
    content = yaml.safe_load((paths.CONF / "experiment" / f"{name}.yaml").read_text())
    return {key: str(values).split(",") for key, values in content["hydra"]["sweeper"]["params"].items()}


@pytest.mark.parametrize("name", [name for name in PAPER if name.startswith("table")])
def test_a_tables_grid_is_the_papers(name):
    """Models, tasks, methods and ratios of the preset are exactly those the table prints."""
    printed = paper.printed().query("artifact == @name and not average")
    grid = axes(name)
    for axis in ("model", "task", "method"):
        assert set(grid[axis]) == set(printed[axis]), axis
    assert {float(p) for p in grid["harmful_ratio"]} == set(printed["harmful_ratio"])
    assert len(grid["seed"]) >= 3


def test_every_option_that_a_papers_grid_names_exists():
    for name in PAPER:
        for group, known in (("model", MODELS), ("task", TASKS), ("method", METHODS)):
            assert set(axes(name)[group]) <= set(known), (name, group)


def test_figure_grids_are_the_papers():
    rates = [float(r) for r in axes("figure3")["train.learning_rate"]]
    assert (min(rates), max(rates)) == (1e-7, 1e-3)
    assert config.expand("figure3", [*SMALL, "train.learning_rate=1e-5"])[0].train.num_train_epochs == 5
    assert set(axes("figure4")["model"]) == {"llama2", "llama3", "mistral", "gemma2"}
    assert {"cwac", "weight_only", "activation_only", *paper.BASELINES} == set(axes("figure4")["method"])
    assert set(axes("figure5")["model"]) == {"llama2", "gemma2"}


GRIDS = [name for name in PRESETS if not name.startswith("tune_")]


@pytest.mark.parametrize("name", GRIDS)
def test_a_presets_cells_differ_and_a_sample_of_them_is_valid(name):
    cells = config.grid(name)
    assert len({tuple(cell) for cell in cells}) == len(cells) > 1
    sample = [config.compose(cell) for cell in cells[:: max(1, len(cells) // 5)]]
    for cell in sample:
        validation.validate(cell)
    assert len({identity.run_id(c) for c in sample}) == len(sample)


@pytest.mark.slow  # hundreds of cells of 0.1 s each
@pytest.mark.parametrize("name", GRIDS)
def test_presets_expand_to_distinct_valid_cells(name):
    cells = config.expand(name)
    for cell in cells:
        validation.validate(cell)
    assert len(cells) > 1
    assert len({identity.run_id(c) for c in cells}) == len(cells)


def test_a_cell_that_hydra_launched_composes_others_and_is_left_as_it_was():
    """What asks for the plain rate of a null-space run's model composes while `train.py` is Hydra's own program."""
    with hydra.initialize_config_dir(str(paths.CONF), version_base="1.3"):
        outer = GlobalHydra.instance().hydra
        assert config.compose(["model=smollm2"]).train.learning_rate == 2e-5
        assert len(config.grid(None, ["seed=0,1"])) == len(config.expand(None, ["seed=0,1"])) == 2
        with pytest.raises(hydra.errors.HydraException):
            config.compose(["model=nobodys"])
        assert GlobalHydra.instance().hydra is outer
        assert hydra.compose("config", overrides=["seed=3"]).seed == 3


def test_overrides_win_over_a_preset():
    cells = config.expand("demo", ["method=sft", "seed=0,1"])
    assert {c.method.name for c in cells} == {"sft"} and {c.seed for c in cells} == {0, 1}


def test_the_papers_presets_at_the_scale_of_two_cores_share_the_cells_of_smollm2():
    """So that `table3 model=smollm2 scale=two_cores` goes on from `make smollm2`, and trains as little.

    CWAC's autoencoder there was fitted on all prompts of its pool.
    """
    small = ["model=smollm2", "scale=two_cores"]
    mine = {identity.run_id(cfg) for name in ("smollm2", "smollm2_rivals") for cfg in config.expand(name)}
    table3 = config.expand("table3", [*small, "harmful_ratio=0.1", "model.refused_only=false"])
    assert len(table3) == 21 and {identity.run_id(cfg) for cfg in table3} <= mine
    figure3 = config.expand("figure3", [*small, "seed=0"])
    assert {(cfg.task.n_train, cfg.train.num_train_epochs, cfg.eval.n_harmful) for cfg in figure3} == {(64, 5, 30)}
    assert sorted({cfg.train.learning_rate for cfg in figure3}) == [1e-7, 1e-6, 1e-5, 1e-4, 1e-3]


@pytest.mark.parametrize("model", MODELS)
def test_two_cores_carry_what_their_scale_asks_for(model):
    """`train: large`, which models from the hub bring, is bf16, a paged optimizer and up to 100 M tokens of an SAE."""
    cfg = config.compose([f"model={model}", "scale=two_cores", "method=cwac"])
    assert not cfg.train.get("bf16") and cfg.train.optim == "adamw_torch_fused"
    assert cfg.method.activation.sae.tokens == 150_000 and cfg.method.activation.sae.batch == 1024
    assert (cfg.task.n_train, cfg.train.per_device_train_batch_size, cfg.train.num_train_epochs) == (64, 2, 1)


def test_extras_are_named_as_they_can_be_installed():
    """The package is on no index, so an extra is one of the checkout's."""
    files = subprocess.run(["git", "ls-files"], cwd=paths.CONF.parent, capture_output=True, text=True).stdout.split()
    for name in files:
        path = paths.CONF.parent / name
        if path.suffix in (".py", ".md", ".yaml", ".toml") and "results/" not in name and path.is_file():
            assert not re.search(r"install\b[^\n]*['\" ]cwac\[", path.read_text(encoding="utf-8")), name
    with (paths.CONF.parent / "pyproject.toml").open() as file:
        extras = re.findall(r"^(\w+) = \[.*\]", file.read().partition("[project.optional-dependencies]")[2], re.M)
    read = [n for n in files if n.endswith((".py", ".md", ".yaml")) and (paths.CONF.parent / n).is_file()]
    text = "".join((paths.CONF.parent / name).read_text(encoding="utf-8") for name in read)
    assert {"alpaca", "gpu"} <= set(extras) and set(re.findall(r"install -e '\.\[(\w+)\]'", text)) <= {*extras, "dev"}


def test_no_test_reads_a_clock():
    """What takes long on a busy machine is not wrong: tests assert what happened, and in which order."""
    reads = re.compile(r"\btime\.(time|monotonic|perf_counter|process_time|thread_time)(_ns)?\(|datetime\.now\(")
    for path in (paths.CONF.parent / "tests").rglob("*.py"):
        assert not reads.search(path.read_text(encoding="utf-8")), path


def test_presets_open_with_their_launch_command():
    for path in (paths.CONF / "experiment").glob("*.yaml"):
        name, text = path.stem, path.read_text()
        assert f"experiment={name}" in "\n".join(text.splitlines()[:4]), name


def test_the_two_literal_and_sound_readings_differ_where_the_paper_does():
    literal, sound = config.compose(["method=cwac_literal"]).method, config.compose(["method=cwac"]).method
    assert (literal.weight.where, sound.weight.where) == ("gradient", "update")
    assert (literal.activation.gate, sound.activation.gate) == ("topk", "tau")
    assert list(literal.weight.modules) == list(sound.weight.modules) == ["down_proj"]
    assert literal.activation.lam == sound.activation.lam == 0.5 and sound.activation.n_latents == 100
    closed = config.compose(["method=cwac_closed"]).method.weight
    assert closed.modules == "all" and closed.freeze_others
    assert config.compose(["method=weight_only"]).method.activation is None
    assert config.compose(["method=activation_only"]).method.weight is None


def test_paper_defaults():
    """Section 5.1: AdamW, lr 2e-5, 3 epochs, batch 1, max length 512; 5,000 rows, unless a model brings its own."""
    cfg = config.compose(["train=default", "task=sst2", "model=smollm2"])
    assert (cfg.train.learning_rate, cfg.train.num_train_epochs) == (2e-5, 3)
    assert (cfg.train.per_device_train_batch_size, cfg.train.max_length) == (1, 512)
    own = config.compose(["train=default", "task=sst2", "model=smollm2", "~model.n_train"])
    assert (own.task.n_train, cfg.task.n_train) == (5000, 400)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("harmful_ratio=-0.1", "out of range"),
        ("harmful_ratio=nan", "not a number"),
        ("seed=1.5", "not a whole number"),
        ("seed=true", "not a whole number"),
        ("train.per_device_train_batch_size=0", "out of range"),
        ("task.n_train=0", "out of range"),
        ("mix_mode=both", "use one of replace, additive"),
        ("eval.split=train", "use one of test, validation"),
        ("model.dtype=fp32", "use one of float32"),
        ("model.dtype=bfloat16", "needs fp32"),
        ("model.kind=folder", "None"),
        ("eval.n_harmful=0", "out of range"),
        ("eval.at=2", "not a list of epochs"),
        ("objective.HS=much", "give weights of FA, HS"),
    ],
)
def test_validate_names_the_key_and_the_remedy(override, message):
    key = override.split("=")[0].replace("model.kind", "model.path")
    with pytest.raises(UsageError, match=f"{re.escape(key)}=.*{message}") as caught:
        validation.validate(config.compose([override]))
    assert isinstance(caught.value, UserError) and "\n" not in str(caught.value)


def test_conf_readme_names_every_option():
    text = Path(paths.CONF / "README.md").read_text()
    for name in [*METHODS, *MODELS, *TASKS, *PRESETS]:
        # a search is named by its method
        name = "tune_<method>" if name.startswith("tune_") and name.removeprefix("tune_") in METHODS else name
        assert f"`{name}`" in text, name
