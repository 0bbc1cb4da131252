"""Small sparse autoencoders in the formats of SAELens and sparsify, made by the libraries themselves.

`python -m tests.helpers.saes` writes `tests/saes` anew: it needs sae-lens (6.54.12 made what is there) and
eai-sparsify (1.3.3). `expected.safetensors` holds inputs x [5, 8] and, for each autoencoder, what its own library
encodes and decodes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

FOLDER = Path(__file__).parent.parent / "saes"
D, M, K, BLOCK = 8, 24, 4, 1

SAELENS = {
    "standard": {},
    "topk": {"k": K, "rescale_acts_by_decoder_norm": True},
    "topk_plain": {"k": K, "apply_b_dec_to_input": False},
    "jumprelu": {"apply_b_dec_to_input": False},
    "gated": {"normalize_activations": "layer_norm"},
    "rescaled": {"normalize_activations": "constant_norm_rescale"},
}
"""Name -> settings of SAELens' configuration class; `topk_plain` and `rescaled` are a TopK and a standard one."""
SPARSIFY = {"topk": {}, "groupmax": {"activation": "groupmax"}}


def inputs() -> Tensor:
    return 3 * torch.randn(5, D, generator=torch.Generator().manual_seed(1)) + 0.5


def random_(module: torch.nn.Module) -> None:
    """Weights that hide no mistake: no bias is zero, decoder rows have different norms."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(module.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
        if hasattr(module, "threshold"):
            module.threshold.abs_()


def saelens(name: str, folder: Path) -> tuple[Tensor, Tensor]:
    """One of `SAELENS` by the library, saved in `folder`; returns its latents and reconstructions of `inputs()`."""
    import sae_lens

    kind = {"topk_plain": "TopK", "topk": "TopK", "jumprelu": "JumpReLU", "gated": "Gated"}.get(name, "Standard")
    config = getattr(sae_lens, f"{kind}SAEConfig")(d_in=D, d_sae=M, **SAELENS[name])
    config.metadata.model_name, config.metadata.hook_name = "small", f"blocks.{BLOCK}.hook_resid_post"
    sae = getattr(sae_lens, f"{kind}SAE")(config)
    random_(sae)
    sae.save_model(folder)
    sae = sae_lens.SAE.load_from_disk(folder)
    with torch.no_grad():
        z = sae.encode(inputs())
        return z, sae.decode(z)


def sparsify(name: str, folder: Path) -> tuple[Tensor, Tensor]:
    """One of `SPARSIFY` by the library, saved in `folder`/layers.1; returns dense latents and reconstructions."""
    from sparsify import SparseCoder, SparseCoderConfig

    sae = SparseCoder(D, SparseCoderConfig(expansion_factor=M // D, k=K, **SPARSIFY[name]))
    random_(sae)
    sae.save_to_disk(folder / f"layers.{BLOCK}")
    sae = SparseCoder.load_from_disk(folder / f"layers.{BLOCK}")
    with torch.no_grad():
        acts, indices, _ = sae.encode(inputs())
        z = torch.zeros(len(acts), M).scatter(1, indices, acts)
        return z, sae.decode(acts, indices)


def main() -> None:
    """Write all of them, and what their libraries make of the inputs."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    expected = {"x": inputs()}
    for library, names, make in (("saelens", SAELENS, saelens), ("sparsify", SPARSIFY, sparsify)):
        for name in names:
            z, u_hat = make(name, FOLDER / library / name)
            expected |= {f"{library}.{name}.z": z.contiguous(), f"{library}.{name}.u_hat": u_hat.contiguous()}
    for path in FOLDER.rglob("cfg.json"):
        path.write_text(json.dumps(json.loads(path.read_text()), indent=1) + "\n")
    save_file(expected, FOLDER / "expected.safetensors")


if __name__ == "__main__":
    main()
