"""Merges the refusal adapter that ships with the project into SmolLM2, which its makers did not align.

`experiments/align.py` trains the adapter and says how; its measured refusals stand in
`cwac/assets/smollm2_align/gate.json`.
"""

import hashlib
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cwac.core.errors import UserError
from cwac.core.paths import PACKAGE

ADAPTER = PACKAGE / "assets" / "smollm2_align"

READABLE = 0o644
"""Of the adapter's file, which safetensors leaves to its owner alone."""


def adapter_sha256(adapter: str | Path = ADAPTER) -> str:
    """SHA-256 of the adapter's weights: what an aligned model is, besides its base."""
    return hashlib.sha256(adapter_file(Path(adapter)).read_bytes()).hexdigest()


def apply(base_folder: str | Path, adapter: str | Path | None, out_folder: str | Path) -> Path:
    """Merge the adapter into the base model and save the aligned model (fp32) with its tokenizer in `out_folder`.

    adapter: None is the one that ships with the project.
    Not atomic; the artifact cache gives it a temporary folder. Raises: UserError where the adapter is not there or
    does not fit the base.
    """
    adapter, out_folder = Path(adapter or ADAPTER), Path(out_folder)
    adapter_file(adapter)
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    try:
        model = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the adapter in {adapter} does not fit the model in {base_folder}: {error}") from error
    model.save_pretrained(out_folder)
    AutoTokenizer.from_pretrained(base_folder).save_pretrained(out_folder)
    return out_folder


def adapter_file(adapter: Path) -> Path:
    path = adapter / "adapter_model.safetensors"
    if not path.is_file():
        raise UserError(f"no adapter in {adapter}; rebuild it with `python -m experiments.align --out {adapter}`")
    return path


def write_adapter(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(READABLE)
