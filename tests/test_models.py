"""Models from the hub: one line for what is in the way, the commit that was loaded, and never the token."""

import importlib.util
import json
import os

import huggingface_hub
import pytest
from huggingface_hub import errors
from omegaconf import OmegaConf

from cwac.core import config, hf_hub, identity, validation
from cwac.core.errors import UserError
from cwac.core.run_dir import Run
from cwac.models import loading
from tests.conftest import HANGS, launch, run_train
from tests.helpers.options import MODELS

FROM_HUB = [m for m in MODELS if config.compose([f"model={m}"]).model.kind == "hub"]
TOKEN = "hf_" + "Zq7" * 11


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """No answer remembered, no cache to fall back on, and the hub not declared offline."""
    hf_hub.resolve.cache_clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield
    hf_hub.resolve.cache_clear()


def answer(monkeypatch, error=None, commit="c" * 40):
    class Found:
        commit_hash = commit

    asked = []

    def metadata(url, timeout, token):
        asked.append((url, timeout))
        if error is not None:
            raise error
        return Found

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
    return asked


def refusal(kind):
    from types import SimpleNamespace

    return kind("403 Client Error", response=SimpleNamespace(headers={}, request=None))


@pytest.mark.parametrize("name", FROM_HUB)
def test_a_model_names_what_it_needs(name):
    model = config.compose([f"model={name}"]).model
    assert all(len(model[key]) == 40 and int(model[key], 16) for key in ("revision", "base_revision"))
    assert model.dtype == "float32" and model.base != model.hub_id and model.license
    assert model.safety_layers == "auto" or len(model.safety_layers) == 2
    validation.validate(config.compose([f"model={name}"]))


def test_the_papers_models_are_there_with_a_budget_and_a_task():
    assert {"llama2", "llama3", "mistral", "gemma2", "qwen"} <= set(FROM_HUB)
    cfg = config.compose(["model=llama2"])
    assert (cfg.task.name, cfg.pools.name, cfg.train.bf16, cfg.task.n_train) == ("sst2", "real", True, 5000)
    assert config.compose(["model=llama2", "task=gsm8k", "train=default"]).task.name == "gsm8k"


def test_the_runs_of_the_smollm2_campaign_keep_their_names():
    """Of results/smollm2: an option that is added later must leave them alone."""
    ids = {identity.run_id(c) for c in config.expand("smollm2")}
    assert {"smollm2-sst2-p0-cwac-s0-dd004514", "smollm2-sst2-p0-cwac_closed-s0-ffdff477"} <= ids


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (refusal(errors.GatedRepoError), r"is gated: accept its licence \(the terms\) at .*/org/m, .*`hf auth login`"),
        (refusal(errors.RevisionNotFoundError), "has no revision abc"),
        (refusal(errors.RepositoryNotFoundError), "is not on the hub, or is private"),
        (refusal(errors.RemoteEntryNotFoundError), "no transformers model"),
        (ConnectionError("Name or service not known"), r"could not be reached: the hub .*model\.kind=folder"),
        (ValueError(f"Illegal header value b'Bearer {TOKEN}'"), "<HF_TOKEN>"),
    ],
)
def test_what_is_in_the_way_is_one_line(monkeypatch, error, said):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    asked = answer(monkeypatch, error)
    with pytest.raises(UserError, match=said) as caught:
        hf_hub.resolve("org/m", "abc", "model.hub_id", "the terms")
    text = str(caught.value)
    assert text.startswith("model.hub_id=org/m ") and "\n" not in text and TOKEN not in text
    assert len(asked) == 1 and asked[0][1] <= 5


def test_an_unpinned_model_is_resolved_once_and_loaded_at_that_commit(monkeypatch, random_model, tmp_path):
    asked = answer(monkeypatch)
    downloads = []

    def snapshot(hub_id, **settings):
        downloads.append((hub_id, settings["revision"], settings["local_files_only"]))
        return str(random_model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    cfg = OmegaConf.create({"name": "m", "kind": "hub", "hub_id": "org/m", "revision": None, "dtype": "float32"})
    one, two = loading.load(cfg, tmp_path), loading.load(cfg, tmp_path)
    assert len(asked) == 1 and downloads == [("org/m", "c" * 40, False)] * 2
    assert one.revision == two.key["revision"] == "c" * 40 and one.provenance["hub_id"] == "org/m"


def test_the_cache_serves_where_the_hub_does_not_answer(monkeypatch, tmp_path):
    answer(monkeypatch, ConnectionError("no route"))
    snapshot = tmp_path / "cache" / "models--org--m" / "snapshots" / ("d" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = tmp_path / "cache" / "models--org--m" / "refs"
    refs.mkdir()
    (refs / "main").write_text("d" * 40)
    assert hf_hub.resolve("org/m", None, "model.hub_id") == hf_hub.Resolved("org/m", "d" * 40, False)


def test_a_base_out_of_reach_is_named_as_the_base(monkeypatch, llama):
    answer(monkeypatch, refusal(errors.GatedRepoError))
    loaded = loading.Loaded(llama, None, base="org/base", license="the terms")
    with pytest.raises(UserError, match=r"model\.base=org/base is gated: .*the terms"):
        loading.load_base(loaded, "asft")


def test_an_unfinished_run_does_not_go_on_from_another_commit(tmp_path):
    cfg = config.compose([f"paths.runs={tmp_path}"])
    came = {"hub_id": "org/m", "revision": "c" * 40}
    with Run(cfg) as run:
        run.start(came)
    assert json.loads((run.dir / "env.json").read_text())["model"] == came
    with Run(cfg) as run:
        run.start(came)
    with Run(cfg) as run, pytest.raises(UserError, match=f"pin model.revision={'c' * 40}.*force=true"):
        run.start({**came, "revision": "d" * 40})


def test_a_sweep_of_models_prints_every_cell():
    code, output = run_train("-m", "model=llama2,qwen", "method=cwac,sft", "--cfg", "job")
    assert code == 0, output
    cells = [OmegaConf.create(document) for document in output.split("---\n")]
    assert [(c.model.name, c.method.name) for c in cells] == [
        (m, d) for m in ("llama2", "qwen") for d in ("cwac", "sft")
    ]


def test_offline_each_cell_says_in_one_line_what_is_missing_and_no_token_is_written(tmp_path):
    """A hub that refuses connections stands for one out of reach: model first, then the data, and no retries."""
    closed = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path)}
    runs = tmp_path / "runs"
    process = launch("-m", "model=llama2,qwen", "method=sft,lisa", f"paths.runs={runs}", env=closed)
    output, _ = process.communicate(timeout=HANGS)
    assert process.returncode == 1
    said = [line for line in output.splitlines() if line.startswith("error: [")]
    assert len(said) == 2 and "model.hub_id=meta-llama/Llama-2-7b-chat-hf could not be reached" in said[0]
    assert "model.hub_id=Qwen/Qwen2.5-7B-Instruct could not be reached" in said[1] and "Traceback" not in output
    assert "error: 4 cells failed" in output and output.count("could not be reached") == 2
    for line, model in zip(
        said, ("llama2", "qwen"), strict=True
    ):  # both cells of a model, and what serves both models
        assert line.startswith(f"error: [model={model} method=sft,lisa] ")
        assert "'+model.path=<folder>/${model.name}'" in line
        if importlib.util.find_spec("bitsandbytes") is None:
            assert line.endswith("(another run id)") and "train.optim=adamw_torch_fused" in line
    written = [p.read_text(errors="replace") for p in runs.rglob("*") if p.is_file()]
    assert not any(TOKEN in text for text in [output, *written])


def test_a_data_set_out_of_reach_is_one_line(tmp_path, random_model):
    closed = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path)}
    code, output = run_train(
        "model.kind=folder", f"+model.path={random_model}", "task=gsm8k", f"paths.runs={tmp_path / 'r'}", env=closed
    )
    assert code == 1 and TOKEN not in output and "Traceback" not in output
    said = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "could not be reached" in said[0] and "paths.data" in said[0]
    assert os.listdir(tmp_path / "r")  # a lock file only
    assert not any(p.is_dir() for p in (tmp_path / "r").iterdir())
