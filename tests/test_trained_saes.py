"""Autoencoders that SAELens and sparsify have trained on SmolLM2 drive CWAC; ours of SmolLM2 is read by SAELens.

Slow: SmolLM2 comes from its wheel. The run needs real data as well, a folder laid out like the hub: CWAC_DATA=FOLDER.
CWAC_ARTIFACTS=FOLDER, an artifact cache with SmolLM2, saves its conversion.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cwac.constraints.sae.fit import SAEConfig, fit_sae
from cwac.core.cache import load_or_build
from cwac.core.config import compose
from cwac.core.errors import UserError
from cwac.models.loading import load
from experiments import artifacts as artifacts_command
from tests.conftest import HANGS, ROOT, run_train
from tests.helpers.train_saes import chunks, outputs

pytestmark = pytest.mark.slow
LAYER = 15
LIBRARIES = {"saelens": "sae_lens", "sparsify": "sparsify"}
TOKENS = {"saelens": "102400", "sparsify": "25600"}
"""To train on; sparsify runs the model for each of them."""


@pytest.fixture(scope="module")
def cache(artifacts) -> Path:
    return Path(os.environ.get("CWAC_ARTIFACTS", artifacts))


@pytest.fixture(scope="module")
def smollm2(cache):
    """The aligned model, as runs load it."""
    try:
        return load(compose(["model=smollm2"]).model, cache)
    except UserError as error:
        pytest.skip(f"SmolLM2 is not to be had: {error}")


@pytest.fixture(scope="module")
def folder(smollm2, tmp_path_factory) -> Path:
    """The same, saved for the libraries."""
    path = tmp_path_factory.mktemp("smollm2")
    smollm2.model.save_pretrained(path)
    smollm2.tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("library", LIBRARIES)
def test_one_that_a_library_has_trained_drives_cwac(library, cache, folder, tmp_path):
    """From the library's own trainer and file to the rows of a run; the run names the folder."""
    pytest.importorskip(LIBRARIES[library], reason=f"{library} is not installed")
    if (data := os.environ.get("CWAC_DATA")) is None:
        pytest.skip("a real task needs data: CWAC_DATA=<a folder laid out like the hub>")
    train = [sys.executable, "-m", "tests.helpers.train_saes", "--library", library, "--model", str(folder)]
    sizes = ["--layer", str(LAYER), "--text", "4096", "--tokens", TOKENS[library], "--m", "1024", "--k", "32"]
    subprocess.run([*train, *sizes, "--out", str(tmp_path / "sae")], cwd=ROOT, check=True, timeout=HANGS)
    named = tmp_path / "sae" / ("smollm2" if library == "sparsify" else "")
    code, output = run_train(
        *["model=smollm2", "task=sst2", "method=cwac", "scale=two_cores", "hydra/launcher=basic", "harmful_ratio=0.1"],
        f"method.activation.sae.pretrained={named}",
        *["train.max_steps=8", "method.weight.n_anchors=32", "eval.at=[]", "task.n_test=8", "eval.n_harmful=4"],
        *["eval.n_benign=4", "eval.max_new_tokens=8", "eval/judge=keyword"],
        *[f"paths.data={Path(data).resolve()}", f"paths.artifacts={cache}", f"paths.runs={tmp_path / 'runs'}"],
    )
    assert code == 0, output
    (run,) = (path for path in (tmp_path / "runs").iterdir() if path.is_dir() and path.name.startswith("smollm2"))
    assert f"keeps sae features of {named} (FVU " in output
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {row["metric"]: row["value"] for row in rows if row["set"] in ("train", "anchors")}
    assert found["sae_slots"] == 1 and found["sae_fvu"] > 0 and found["feature_drift"] > 0


def test_ours_has_the_same_fvu_in_sae_lens(smollm2, tmp_path, capsys):
    """Fitted on SmolLM2, kept in an artifact cache, exported by the command, read by `SAE.load_from_disk`."""
    sae_lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed")
    ids = chunks(smollm2.tokenizer, 2048)
    rows = [{"input_ids": row.tolist()} for row in ids]
    small = {"layers": [LAYER], "m": 1024, "k": 32, "router": "uniform", "tokens": 8192, "cached_tokens": 2048}
    sae = fit_sae(smollm2.model, rows, None, SAEConfig(**small, batch=256, max_repeats=None))[0]
    there = load_or_build(tmp_path / "artifacts", "sae", {"model": {"kind": "smollm2"}}, sae.save)
    command = ["export-sae", "--format", "saelens", "--artifacts", str(tmp_path / "artifacts")]
    assert artifacts_command.main([*command, "--out", str(tmp_path / "out")]) == 0
    written = tmp_path / "out" / there.name / f"layer_{LAYER}"
    assert str(written) in capsys.readouterr().out
    theirs = sae_lens.SAE.load_from_disk(written)
    x = outputs(smollm2.model, ids, LAYER)
    with torch.no_grad():
        x_hat = theirs.decode(theirs.encode(x))
        u, mean, std = sae.normalize(x[:, None])
        ours = std[:, 0] * sae.decode(*sae.encode(u[:, 0])) + mean[:, 0]

    def fvu(rebuilt):
        return ((x - rebuilt).square().sum() / (x - x.mean(0)).square().sum()).item()

    print(f"FVU {fvu(ours):.6f}, by sae-lens {fvu(x_hat):.6f}")
    assert 0 < fvu(ours) < 1 and fvu(x_hat) == pytest.approx(fvu(ours), abs=1e-4)
