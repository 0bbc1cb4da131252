"""Small trainings of a random model, and how to stop and look at them."""

from safetensors.torch import load_file

from cwac.core import config
from cwac.training import engine
from tests.conftest import NEEDS, SMALL

TINY = [
    *SMALL,
    "harmful_ratio=0.2",
    "keep_weights=true",
    "eval.n_drift=8",
    "train.max_steps=6",
    "train.save_steps=2",
    "train.logging_steps=1",
    "model.sae={tokens: 4096, m: 256, cached_tokens: 4096, batch: 512}",
    "threads=1",
]


def cell(method, tmp_path, artifacts, *more):
    paths = [f"paths.runs={tmp_path}", f"paths.artifacts={artifacts}"]
    return config.compose([f"method={method}", *TINY, *paths, *NEEDS.get(method, []), *more])


def stop_at(step):
    """A callback that fails after the given step, as a crash would."""
    original = engine.MethodCallback.on_step_end

    def stop(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        if state.global_step == step:
            raise RuntimeError("planted stop")

    return stop


def trained_weights(run):
    return load_file(run.dir / "model" / "model.safetensors")


def leak(run, which="weight_leak"):
    return next(r["value"] for r in run.rows() if r["metric"] == which and r["set"] == "anchors")


def aligned_folder(run):
    from pathlib import Path

    from cwac.models.loading import load

    return Path(load(run.cfg.model, Path(run.cfg.paths.artifacts)).source)
