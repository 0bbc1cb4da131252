"""Artifacts to a hub repository and back; a folder stands in for the hub."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from cwac.core.cache import load_or_build
from cwac.core.cache_hub import pull
from cwac.core.errors import UserError
from experiments.artifacts import main

KEY = {"model": {"kind": "hub", "hub_id": "some/model", "revision": "abc"}, "pools": "7afb1002dd91", "energy": 0.99}
TOKEN = "hf_" + "x" * 34


def build(folder: Path) -> None:
    save_file({"3.down_proj": torch.eye(4)}, folder / "subspace.safetensors")
    (folder / "subspace.json").write_text(json.dumps({"3.down_proj": {"rank": 4, "energy": 0.995}}))


def never(folder: Path) -> None:
    raise AssertionError("a pulled artifact is built again")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """The repository's folder; what the client would send goes there."""
    remote = tmp_path / "remote"

    class Api:
        def create_repo(self, repo_id, private, exist_ok):
            assert (repo_id, private, exist_ok) == ("me/prepared", True, True)

        def upload_folder(self, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, remote, dirs_exist_ok=True)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, revision, allow_patterns: str(remote))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return remote


def test_what_is_pushed_is_found_where_it_would_have_been_built(hub, tmp_path, capsys):
    folder = load_or_build(tmp_path / "mine", "subspace", KEY, build)
    load_or_build(tmp_path / "mine", "answers", KEY, lambda f: (f / "answers.jsonl").write_text("private"))
    assert main(["push", "--repo", "me/prepared", "--artifacts", str(tmp_path / "mine")]) == 0
    assert not list(hub.rglob("answers*"))
    card = (hub / "subspace" / folder.name / "README.md").read_text()
    assert card == (folder / "README.md").read_text()
    files = json.loads((folder / "artifact.json").read_text())["files"]
    hashes = [entry["sha256"] for entry in files.values()]
    for part in (
        "base_model: some/model",
        "Protected directions",
        "7afb1002dd91",
        '"energy": 0.995',
        "licences",
        *hashes,
    ):
        assert part in card
    assert f"subspace/{folder.name}/README.md" in (hub / "README.md").read_text()
    assert main(["pull", "--repo", "me/prepared", "--artifacts", str(tmp_path / "theirs")]) == 0
    found = load_or_build(tmp_path / "theirs", "subspace", KEY, never)
    assert torch.equal(load_file(found / "subspace.safetensors")["3.down_proj"], torch.eye(4))
    assert pull("me/prepared", tmp_path / "theirs") == []  # it has them
    assert TOKEN not in "".join(capsys.readouterr())


def test_a_changed_or_foreign_artifact_is_not_taken(hub, tmp_path):
    folder = load_or_build(tmp_path / "mine", "subspace", KEY, build)
    main(["push", "--repo", "me/prepared", "--artifacts", str(tmp_path / "mine")])
    remote = hub / "subspace" / folder.name
    renamed = remote.rename(remote.with_name("0" * 12))
    with pytest.raises(UserError, match="not the hash of its key"):
        pull("me/prepared", tmp_path / "theirs")
    remote = renamed.rename(remote)
    with (remote / "subspace.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="missing or changed"):
        pull("me/prepared", tmp_path / "theirs")
    pickled = load_or_build(tmp_path / "mine", "sae", KEY, lambda f: torch.save({}, f / "sae.pt"))
    shutil.copytree(pickled, hub / "sae" / pickled.name)
    with pytest.raises(UserError, match=f"sae/{pickled.name}.*other than"):
        pull("me/prepared", tmp_path / "theirs", ["sae"])
    assert not list((tmp_path / "theirs").rglob("*.safetensors"))


def test_errors_are_one_line_without_the_token(hub, tmp_path, capsys, monkeypatch):
    assert main(["push", "--repo", "me/prepared", "--artifacts", str(tmp_path)]) == 1
    assert "holds no artifact" in capsys.readouterr().err

    def refuse(*args, **kwargs):
        raise OSError(f"401 for Bearer {TOKEN}\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    assert main(["pull", "--repo", "me/prepared", "--artifacts", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "401" in error and TOKEN not in error and error.count("\n") == 1


def test_a_card_shows_reports_and_no_vocabulary(tmp_path):
    def build_model(folder: Path) -> None:
        (folder / "conversion.json").write_text(json.dumps({"kl_nats": 0.25}))
        (folder / "tokenizer.json").write_text(json.dumps({f"word{i}": i for i in range(20_000)}))

    page = (load_or_build(tmp_path, "gguf", KEY, build_model) / "README.md").read_text()
    assert '"kl_nats": 0.25' in page and "word19" not in page and "| tokenizer.json |" in page
