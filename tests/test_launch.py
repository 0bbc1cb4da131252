"""One cell by several processes, and a sweep by a launcher of a cluster."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from safetensors.torch import load_file

from cwac.core import config, errors, failures, identity, paths
from cwac.methods.base import share_of
from cwac.training.arguments import shared_batch
from tests.conftest import SMALL, run_train

SWEEP = [
    *SMALL,
    "+model.path={model}",
    "model=tiny",
    "model.kind=folder",
    "train.max_steps=1",
    "paths.artifacts={artifacts}",
    "pools.sizes={{anchors:4,step:4,sae:8,benign:8,safety:4,validation:4}}",
]


@pytest.mark.slow
def test_a_cell_in_shards_is_the_same_run(tmp_path, artifacts):
    """Weights, metric rows and the run's name; rank 0 evaluates on the way and at the end."""
    common = [
        *SMALL,
        "method=cwac",
        "harmful_ratio=0.2",
        "pools.sizes={poison: 16, anchors: 16, step: 8, sae: 24, benign: 32, safety: 16, validation: 8}",
        "model.sae={tokens: 2048, m: 256, cached_tokens: 2048, batch: 256}",
        "train.max_steps=6",
        "train.save_steps=4",
        "+train.optim=sgd",
        "train.learning_rate=0.01",
        "eval.at=[0,1]",
        "keep_weights=true",
        f"paths.artifacts={artifacts}",
    ]
    found = []
    for ranks, more in ((1, []), (2, ["parallel=fsdp2"])):
        code, output = run_train(*common, *more, f"paths.runs={tmp_path / str(ranks)}", ranks=ranks)
        assert code == 0, output
        (run,) = (path for path in (tmp_path / str(ranks)).iterdir() if path.is_dir())
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        values = {tuple(row[k] for k in ("step", "metric", "set")): row["value"] for row in rows}
        for costs in ("memory", "seconds_per_step"):
            del values[6, costs, "train"]
        found.append((run.name, values, load_file(run / "model" / "model.safetensors")))
    (name, values, weights), (other, others, sharded) = found
    assert name == other and len(values) > 20
    assert others == pytest.approx(values, abs=1e-4)
    assert max((weights[n] - sharded[n]).abs().max().item() for n in weights) < 1e-5


@pytest.mark.parametrize(
    ("overrides", "env", "message"),
    [
        (["-m", "seed=0,1"], {"WORLD_SIZE": "2", "RANK": "0"}, "start the processes of one cell"),
        (["parallel=fsdp2"], {}, "start them with torchrun"),
    ],
)
def test_a_command_that_cannot_be_shared_is_refused(overrides, env, message, tmp_path):
    code, output = run_train(*overrides, "method=sft", f"paths.runs={tmp_path / 'runs'}", env=env)
    assert code == 2 and message in output and "Traceback" not in output
    assert not list(tmp_path.rglob("*.json*"))


def test_ranks_share_micro_batches_first():
    def share(rows, micro, ranks):
        given = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": micro}
        return tuple(shared_batch(given, ranks).values())

    assert [share(8, 1, 1), share(8, 1, 2), share(1, 8, 8), share(2, 4, 8), share(4, 6, 4)] == [
        (8, 1),
        (4, 1),
        (1, 1),
        (1, 1),
        (2, 3),
    ]
    with pytest.raises(errors.UsageError, match="cannot be shared by 2 processes"):
        share(1, 1, 2)


def test_a_rank_without_prompts_makes_the_same_passes_at_no_weight():
    parts = [share_of([5, 7, 9], SimpleNamespace(process_rank=r, world_size=4)) for r in range(4)]
    assert parts == [([5], 4 / 3), ([7], 4 / 3), ([9], 4 / 3), ([5], 0.0)]
    assert sum(share for _, share in parts) / 4 == pytest.approx(1.0)


def test_the_layout_is_no_part_of_a_runs_name():
    assert identity.run_id(config.compose(["method=sft", "parallel=fsdp2"])) == identity.run_id(
        config.compose(["method=sft"])
    )


def test_failures_of_several_machines_are_read_in_the_sweeps_order(tmp_path, monkeypatch):
    monkeypatch.delenv(failures.FOLDER, raising=False)
    started = {"paths": {"runs": str(tmp_path)}, "hydra": {"sweeper": {"_target_": "basic", "params": None}}}
    failures.OnSharedDisk().on_multirun_start(OmegaConf.create(started))
    for host, num in (("b", 0), ("a", 1), ("b", 2)):
        monkeypatch.setattr(failures.socket, "gethostname", lambda host=host: host)
        failures.record({"num": num, "cell": host, "message": "", "code": 1})
    assert [(f["num"], f["cell"]) for f in failures.collect()] == [(0, "b"), (1, "a"), (2, "b")]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("launcher", "plugin", "more"),
    [
        ("local", "joblib", ["hydra.launcher.n_jobs=2"]),
        ("submitit_local", "submitit", []),
        ("ray_cluster", "ray", ["hydra.launcher.ray.init.address=null"]),
    ],
)
def test_a_failed_cell_is_told_whatever_runs_it(launcher, plugin, more, tmp_path, random_model, artifacts):
    """The second cell trains a method that needs refusals, which a random model has none of."""
    pytest.importorskip(f"hydra_plugins.hydra_{plugin}_launcher")
    where = [o.format(model=random_model, artifacts=artifacts) for o in SWEEP]
    runs = tmp_path / "runs"
    code, output = run_train(
        "-m", "method=sft,weight_only", f"hydra/launcher={launcher}", f"paths.runs={runs}", *where, *more
    )
    assert code == 1 and "error: the aligned model refuses none of the anchor prompts" in output, output
    status = [json.loads(p.read_text())["status"] for p in runs.glob("*/status.json")]
    assert status == ["done"], output  # the other was refused before anything was written
    assert not list(Path(runs).glob(".failures-*"))


@pytest.mark.parametrize(("launcher", "plugin"), [("slurm", "submitit"), ("ray_cluster", "ray")])
def test_a_presets_grid_goes_to_a_cluster(launcher, plugin):
    from hydra import compose, initialize_config_dir

    pytest.importorskip(f"hydra_plugins.hydra_{plugin}_launcher")
    with initialize_config_dir(str(paths.CONF), version_base="1.3"):
        cfg = compose("config", ["experiment=demo", f"hydra/launcher={launcher}"], return_hydra_config=True)
    assert plugin in cfg.hydra.launcher._target_
