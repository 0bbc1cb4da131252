"""Sparse autoencoders that others have trained, read from the formats of SAELens and sparsify; ours, for SAELens.

Formats, read in the source of sae-lens 6.54.12 and eai-sparsify 1.3.3 (PyPI) and compared with both libraries:

SAELens: a folder with `cfg.json` and `sae_weights.safetensors`. W_enc [d, M], W_dec [M, d], b_enc [M], b_dec [d]; a
gated one has b_gate, b_mag and r_mag instead of b_enc, a JumpReLU one `threshold` [M] besides. With
`apply_b_dec_to_input`, b_dec is subtracted from the input. `normalize_activations` is applied to the residual before
all that, and undone behind the decoder: `layer_norm` (eps 1e-5, standard deviation with d - 1),
`constant_norm_rescale` (to the norm sqrt(d)). `expected_average_only_in` scales by one factor, sqrt(d) over the mean
norm of the residuals; SAELens folds it into the weights when training ends, and keeps it beside a checkpoint that has
not ended (`activation_scaler.json`). `blocks.N.hook_resid_post` is the output of decoder block N, counted from 0;
`blocks.N.hook_resid_pre` that of N - 1.

sparsify: one folder a layer, named `layers.N`, with `cfg.json` and `sae.safetensors`: encoder.weight [M, d],
encoder.bias [M], W_dec [M, d], b_dec [d], which is always subtracted from the input. ReLU, then the k largest, or with
`activation: groupmax` the largest of each of k groups of neighbours.

Deviations:
  - A gated encoder shares its directions between gate and magnitude, so it is a JumpReLU one whose threshold on the
    magnitude is b_mag - b_gate exp(r_mag) (arXiv:2404.16014, section 3.2); it is read as that.
  - Decoder rows whose norm rescales the activations (`rescale_acts_by_decoder_norm`) are divided by it, as SAELens'
    `fold_W_dec_norm` does; activations and reconstructions stay as they are.
  - Several layers are one dictionary: the latents of all of them, each read at its own layer, without a router (ours).
  - SAELens reads a sparsify folder with `normalize_decoder` without subtracting b_dec; sparsify itself subtracts it.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cwac.constraints.sae.autoencoder import RoutedSAE
from cwac.core import hf_hub
from cwac.core.errors import UserError
from cwac.core.identity import autoencoder_content
from cwac.models.hooks import normalize
from cwac.models.layers import decoder_layers, not_finite

KEY = "model.sae.pretrained"
CONFIG, SAELENS, SPARSIFY = "cfg.json", "sae_weights.safetensors", "sae.safetensors"
SCALER = "activation_scaler.json"
ARCHITECTURES = ("standard", "topk", "jumprelu", "gated")
"""Of SAELens; its batch-TopK and Matryoshka ones are saved as `jumprelu`."""
NORMS = ("none", "layer_norm", "constant_norm_rescale")


@dataclass(frozen=True)
class Found:
    """One layer's autoencoder in a folder: what its configuration says, before its weights are read."""

    folder: Path
    format: str
    """`saelens` or `sparsify`."""
    layer: int
    """The decoder block whose output is read, counted from 0."""
    d: int
    m: int
    k: int | None
    """Latents that are active at most; None for those above a threshold."""
    config: dict
    of: str
    """The model that it was trained on, as it says; empty where it does not."""


class Dictionary(nn.Module):
    """The autoencoder of one layer: a = W_enc (u - b_in) + b_enc, z = a where it is active, u_hat = z W_dec + b_dec.

    Parameters: w_enc, w_dec [M, d]; b_enc, threshold [M]; b_in, b_dec [d]. `threshold` is at least 0.
    k: the k largest are active, of k groups of neighbours if `groups`; None: those above their threshold.
    norm: what is done to a residual before it is read, one of `NORMS`.
    """

    def __init__(self, weights: dict[str, Tensor], k: int | None, groups: bool, norm: str):
        super().__init__()
        for name, value in weights.items():
            self.register_parameter(name, nn.Parameter(value.float().contiguous(), requires_grad=False))
        self.m, self.d = self.w_enc.shape
        self.k, self.groups, self.norm = k, groups, norm

    def normalize(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., d] of residuals r [..., d], and the std [..., 1] of r = std x + mean; at least fp32."""
        r = r if r.dtype == torch.float64 else r.float()
        if self.norm == "layer_norm":
            x, _, std = normalize(r, eps=1e-5)
            return x, std
        if self.norm == "constant_norm_rescale":
            std = r.norm(dim=-1, keepdim=True) / self.d**0.5
            return r / std, std
        return r, torch.ones_like(r[..., :1])

    def pre(self, x: Tensor, latents: Tensor | None = None) -> Tensor:
        """Pre-activations a [..., M] of x [..., d], or only those of `latents`."""
        w, b = (self.w_enc, self.b_enc) if latents is None else (self.w_enc[latents], self.b_enc[latents])
        return nn.functional.linear(x - self.b_in, w, b)

    def gate(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        """Latents z [..., M] of all pre-activations [..., M], and what each had to exceed, tau >= 0, [..., M]."""
        if self.k is None:
            return torch.where(pre > self.threshold, pre, 0.0), self.threshold.expand_as(pre)
        if self.groups:
            grouped = pre.unflatten(-1, (self.k, -1))
            best, at = grouped.max(-1, keepdim=True)
            z = torch.zeros_like(grouped).scatter(-1, at, best.relu())
            return z.flatten(-2), best.clamp_min(0).expand_as(grouped).flatten(-2)
        top = pre.topk(self.k, dim=-1)
        z = torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())
        return z, top.values[..., -1:].clamp_min(0).expand_as(pre)

    def decode(self, z: Tensor) -> Tensor:
        """u_hat [..., d] of latents z [..., M]."""
        return z @ self.w_dec + self.b_dec


class PretrainedSAE(nn.Module):
    """The autoencoders of one or several layers, with the interface of `RoutedSAE`.

    Its M latents are those of all layers, one after another; `u` holds the normalised residuals of all L_r layers,
    [..., L_r d]. layers: decoder blocks, counted from 0, rising.
    """

    router = None

    def __init__(self, layers: Sequence[int], parts: Sequence[Dictionary], info: dict | None = None):
        super().__init__()
        self.layers, self.parts, self.info = list(layers), nn.ModuleList(parts), dict(info or {})
        self.d = self.parts[0].d
        self.width = len(self.layers) * self.d
        sizes = [part.m for part in self.parts]
        self.m = sum(sizes)
        self.starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self.place = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        """Per latent, its layer's place in `layers`, [M], on the CPU."""

    @property
    def w_enc(self) -> Tensor:
        """Of the first layer; what it is asked for is its device and dtype."""
        return self.parts[0].w_enc

    @property
    def w_dec(self) -> Tensor:
        """All decoder rows, [M, d]."""
        return torch.cat([part.w_dec for part in self.parts])

    def normalize(self, r: Tensor, places: Sequence[int] | None = None) -> tuple[Tensor, None, Tensor]:
        """(x, None, std) of residuals r [..., L, d] at `places` of the layers, all of them where None."""
        parts = self.parts if places is None else [self.parts[i] for i in places]
        both = [part.normalize(r[..., i, :]) for i, part in enumerate(parts)]
        return torch.stack([x for x, _ in both], -2), None, torch.stack([std for _, std in both], -2)

    def read_weights(self, x: Tensor, latents: Tensor | None = None) -> Tensor:
        """[..., L_r] 1 for each layer that is read, of x [..., L_r, d]: all, or those with one of `latents`."""
        weights = torch.ones(x.shape[:-1], dtype=x.dtype, device=x.device)
        if latents is not None:
            read = torch.zeros(len(self.layers), dtype=x.dtype, device=x.device)
            read[self.place[latents.cpu()].to(x.device)] = 1
            weights = weights * read
        return weights

    def mix(self, x: Tensor, weights: Tensor, places: Sequence[int] | None = None) -> Tensor:
        """u [..., L_r d] of x [..., L, d] at `places`, zero at the other layers and where the weight is 0."""
        x = weights.unsqueeze(-1) * x
        if places is not None:
            whole = x.new_zeros(*x.shape[:-2], len(self.layers), x.shape[-1])
            x = whole.index_copy(-2, torch.as_tensor(places, device=x.device), x)
        return x.flatten(-2)

    def read(self, x: Tensor) -> tuple[Tensor, None]:
        """u [..., L_r d] of x [..., L_r, d]; nothing is routed."""
        return x.flatten(-2), None

    def _blocks(self, u: Tensor) -> list[Tensor]:
        return list(u.unflatten(-1, (len(self.layers), self.d)).unbind(-2))

    def pre(self, u: Tensor, latents: Tensor | None = None) -> Tensor:
        """Pre-activations [..., M], or only those of `latents`, in their order."""
        blocks = self._blocks(u)
        if latents is None:
            return torch.cat([part.pre(x) for part, x in zip(self.parts, blocks, strict=True)], -1)
        out = u.new_zeros(*u.shape[:-1], len(latents))
        place = self.place[latents.cpu()].to(u.device)
        for i, (part, x) in enumerate(zip(self.parts, blocks, strict=True)):
            mine = (place == i).nonzero().flatten()
            if len(mine):
                out = out.index_copy(-1, mine, part.pre(x, latents[mine] - self.starts[i]))
        return out

    def gate(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        """(z, tau), both [..., M], of all pre-activations."""
        pieces = pre.split([part.m for part in self.parts], -1)
        both = [part.gate(piece) for part, piece in zip(self.parts, pieces, strict=True)]
        return torch.cat([z for z, _ in both], -1), torch.cat([tau for _, tau in both], -1)

    def dense(self, u: Tensor) -> Tensor:
        """All latents z [..., M]."""
        return self.gate(self.pre(u))[0]

    def encode(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Values [..., K] >= 0, falling, and indices of the latents of u [..., L_r d]; K as many as fire at most."""
        z = self.dense(u)
        return z.topk(max(1, int((z > 0).sum(-1).max())), dim=-1)

    def decode(self, values: Tensor, indices: Tensor) -> Tensor:
        """u_hat [N, L_r d] of what `encode` returns."""
        z = torch.zeros(*values.shape[:-1], self.m, dtype=values.dtype, device=values.device)
        pieces = z.scatter(-1, indices, values).split([part.m for part in self.parts], -1)
        return torch.cat([part.decode(piece) for part, piece in zip(self.parts, pieces, strict=True)], -1)

    def at_layer(self, x: Tensor, place: int) -> tuple[Tensor, Tensor]:
        """u and u_hat [N, d] of x [N, L_r, d] at one layer, by its place in `layers`."""
        part, u = self.parts[place], x[:, place]
        return u, part.decode(part.gate(part.pre(u))[0])

    def on_decoder(self, v: Tensor) -> Tensor:
        """<v, W_dec,i> [..., M] of v [..., L_r d], each latent with its own layer's piece."""
        return torch.cat([x @ part.w_dec.t() for part, x in zip(self.parts, self._blocks(v), strict=True)], -1)

    def cosines(self, difference: Tensor) -> Tensor:
        """Cosine [M] of each decoder row with its layer's piece of a difference [L_r d] of inputs; on the CPU."""
        pieces = nn.functional.normalize(torch.stack(self._blocks(difference.cpu())), dim=-1)
        rows = [nn.functional.normalize(part.w_dec.float().cpu(), dim=1) for part in self.parts]
        return torch.cat([row @ piece for row, piece in zip(rows, pieces, strict=True)])

    def contribution(self, z: Tensor, latents: Tensor, weights: Tensor) -> Tensor:
        """What latents z [..., S] add to the normalised residual of each layer, [..., L_r, d]; weights as `mix`'s."""
        place = self.place[latents.cpu()].to(z.device)
        added = []
        for i, part in enumerate(self.parts):
            mine = (place == i).nonzero().flatten()
            added.append(z[..., mine] @ part.w_dec[latents[mine] - self.starts[i]])
        return weights.unsqueeze(-1) * torch.stack(added, -2)

    @property
    def readable(self) -> list[int]:
        """Places of the layers that may be read: all."""
        return list(range(len(self.layers)))


# --- finding and reading ---------------------------------------------------------------------------------
def find(
    spec: str | Sequence[str], layers: str | Sequence[int] = "auto", model: nn.Module | None = None
) -> list[Found]:
    """The autoencoders that `model.sae.pretrained` names, one a layer, by rising layer.

    spec: a folder with a `cfg.json`, or with one such folder a layer; a hub id, or `<hub id>/<folder>`, with
    `@<revision>` behind it where the hub's is to be pinned; `<release>/<id>` of sae-lens' directory; or a list of
    these. layers: `auto` for all that are there, or a list of decoder blocks. model: refuse what does not fit it.
    Raises UserError, before any weights are read.
    """
    specs = [spec] if isinstance(spec, str) else list(spec)
    found = [describe(folder) for one in specs for folder in _folders(one, layers)]
    if not isinstance(layers, str):
        there = sorted({f.layer for f in found})
        if missing := sorted(set(layers) - set(there)):
            raise UserError(
                f"{KEY}={_said(spec)} has no autoencoder of block {missing[0]}; it has blocks "
                f"{', '.join(map(str, there))}: give model.sae.layers=[...] of these, or auto for all"
            )
        found = [f for f in found if f.layer in layers]
    found.sort(key=lambda f: f.layer)
    for one, other in zip(found, found[1:], strict=False):
        if one.layer == other.layer:
            raise UserError(
                f"{KEY}={_said(spec)} has two autoencoders of block {one.layer} ({one.folder.name}, "
                f"{other.folder.name}); name the folder of one of them"
            )
        if one.d != other.d:
            raise UserError(f"{KEY}={_said(spec)}: widths {one.d} and {other.d} are of two models; name those of one")
    if model is not None:
        _fits(found, model)
    return found


def load(found: Sequence[Found]) -> PretrainedSAE:
    """The autoencoders that `find` has found, in fp32 on the CPU, as one dictionary."""
    info = {
        "pretrained": [{"layer": f.layer, "format": f.format, "content": autoencoder_content(f.folder)} for f in found]
    }
    return PretrainedSAE([f.layer for f in found], [_read(f) for f in found], info)


def describe(folder: Path) -> Found:
    """What a folder's `cfg.json` says; raises UserError unless it is of an autoencoder that can be read.

    Of the weights names and shapes are compared with it, which the head of their file tells.
    """
    where = f"{KEY}: {folder}"
    try:
        config = json.loads((folder / CONFIG).read_text())
        d = int(config["d_in"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where} has no {CONFIG} with d_in ({hf_hub.first_line(error)}); give a saved SAE") from error
    if not (folder / SAELENS).is_file() and not (folder / SPARSIFY).is_file():
        raise UserError(f"{where} has neither {SAELENS} (SAELens) nor {SPARSIFY} (sparsify); pickles are not read")
    by = _describe_saelens if (folder / SAELENS).is_file() else _describe_sparsify
    try:
        found = by(folder, config, d)
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:  # a value of another type, or none
        raise UserError(
            f"{where} has a configuration that no SAE is saved with ({hf_hub.first_line(error)}); save it again"
        ) from error
    if found.k is not None and not 1 <= found.k <= found.m:
        raise UserError(f"{where} says k={found.k} active ones of {found.m} latents; give a saved SAE")
    _check_weights(found)
    return found


def _describe_saelens(folder: Path, config: dict, d: int) -> Found:
    where, metadata = f"{KEY}: {folder}", {**config, **(config.get("metadata") or {})}
    config = {"architecture": "standard", **config}
    activation = config.get("activation_fn_str", config.get("activation_fn"))  # before SAELens 6
    if activation == "topk":
        config = {"k": (config.get("activation_fn_kwargs") or {}).get("k"), **config, "architecture": "topk"}
    architecture = config["architecture"]
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{where} is a {architecture} of SAELens; those that can be read are {', '.join(ARCHITECTURES)}"
        )
    if config["architecture"] != "topk" and (activation or "relu") != "relu":
        raise UserError(f"{where} has the activation {activation}; those that can be read are relu and topk")
    norm = config.get("normalize_activations") or "none"
    norm = {False: "none", True: "expected_average_only_in"}.get(norm, norm)
    if norm == "expected_average_only_in" and not (folder / SCALER).is_file():
        raise UserError(
            f"{where} expects residuals that are scaled by a factor which is neither in its weights nor in {SCALER}; "
            "fold it with sae.fold_activation_norm_scaling_factor(factor) and save it again with sae.save_model"
        )
    if norm not in (*NORMS, "expected_average_only_in"):
        raise UserError(
            f"{where} has normalize_activations={norm}, and {', '.join(NORMS)} can be read: fold it into the weights "
            "(sae.fold_activation_whitening) and save it again"
        )
    hook = str(metadata.get("hook_name") or metadata.get("hook_point") or "")
    layer = hooked_layer(hook)
    if layer is None:
        raise UserError(
            f"{where} reads {hook or 'an unnamed hook'}; the constraint reads the residual stream behind a block: "
            "give one of blocks.N.hook_resid_post"
        )
    if norm == "expected_average_only_in":
        _factor(folder)
    config = {**config, "normalize_activations": norm}
    k = int(config["k"]) if architecture == "topk" else None
    return Found(folder, "saelens", layer, d, int(config["d_sae"]), k, config, str(metadata.get("model_name") or ""))


def _factor(folder: Path) -> float:
    """By what a checkpoint of SAELens scales residuals; raises ValueError or TypeError for no such factor."""
    factor = float(json.loads((folder / SCALER).read_text()).get("scaling_factor") or 1.0)
    if not 0 < factor < math.inf:
        raise ValueError(f"scaling_factor={factor}")
    return factor


def _describe_sparsify(folder: Path, config: dict, d: int) -> Found:
    where = f"{KEY}: {folder}"
    named = re.fullmatch(r"(?:model\.|transformer\.)?(?:layers|h)[._](\d+)", folder.name)
    if named is None:
        raise UserError(
            f"{where}: sparsify names the folder of a block's residual stream layers.N, which is all that the "
            "constraint reads; give such a folder, or the one that holds them"
        )
    if config.get("transcode") or config.get("skip_connection"):
        raise UserError(f"{where} is a transcoder, which does not reconstruct its input; give a sparse autoencoder")
    if config.get("signed"):
        raise UserError(f"{where} has latents of both signs (signed); give one with ReLU")
    if config.get("activation", "topk") not in ("topk", "groupmax"):
        raise UserError(f"{where} has activation={config['activation']}; those that can be read are topk and groupmax")
    m = int(config.get("num_latents") or d * int(config.get("expansion_factor", 32)))
    k = int(config.get("k", 32))
    if config.get("activation") == "groupmax" and k > 0 and m % k:
        raise UserError(f"{where} says groupmax with k={k}, and {m} latents are no {k} equal groups; save it again")
    whole = folder.parent / "config.json"
    of = json.loads(whole.read_text()).get("model", "") if whole.is_file() else ""
    return Found(folder, "sparsify", int(named[1]), d, m, k, config, str(of))


def hooked_layer(hook: str) -> int | None:
    """The decoder block whose output a hook of TransformerLens or transformers sees; None for any other hook."""
    if post := re.fullmatch(r"blocks\.(\d+)\.hook_resid_post|(?:model\.)?layers\.(\d+)", hook):
        return int(post[1] or post[2])
    before = re.fullmatch(r"blocks\.([1-9]\d*)\.hook_resid_pre", hook)
    return int(before[1]) - 1 if before else None


def _weights(found: Found) -> Path:
    """The file with the weights."""
    return found.folder / (SAELENS if found.format == "saelens" else SPARSIFY)


def _check_weights(found: Found) -> None:
    """Raises UserError unless the file of the weights is whole and has the shapes that the configuration says."""
    d, m, where = found.d, found.m, f"{KEY}: {found.folder}"
    if found.format == "sparsify":
        expected = {"encoder.weight": [m, d], "W_dec": [m, d], "encoder.bias": [m], "b_dec": [d]}
    else:
        own = {"gated": ("b_gate", "b_mag", "r_mag"), "jumprelu": ("b_enc", "threshold")}
        names = own.get(found.config["architecture"], ("b_enc",))
        expected = {"W_enc": [d, m], "W_dec": [m, d], "b_dec": [d], **{name: [m] for name in names}}
    try:
        with safe_open(_weights(found), "pt") as stored:
            shapes = {name: list(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{where} cannot be read ({hf_hub.first_line(error)}); save it again") from error
    if missing := [name for name in expected if name not in shapes]:
        raise UserError(f"{where} lacks the weights {', '.join(missing)}; give a saved SAE")
    if odd := [f"{name} {shapes[name]}" for name, shape in expected.items() if shapes[name] != shape]:
        raise UserError(
            f"{where} says {m} latents of width {d}, and its weights are {' and '.join(odd)}; save it again"
        )


def _read(found: Found) -> Dictionary:
    weights = {name: value.float() for name, value in load_file(_weights(found)).items()}
    if found.format == "saelens":
        read = _saelens(found, weights)
    else:
        tensors = {"w_enc": weights["encoder.weight"], "w_dec": weights["W_dec"], "b_enc": weights["encoder.bias"]}
        tensors |= {"b_in": weights["b_dec"], "b_dec": weights["b_dec"], "threshold": torch.zeros(found.m)}
        read = Dictionary(tensors, found.k, found.config.get("activation") == "groupmax", "none")
    if odd := not_finite(read):
        raise UserError(f"{KEY}: {found.folder} has weights that are not finite ({', '.join(odd)}); give another SAE")
    return read


def _saelens(found: Found, weights: dict[str, Tensor]) -> Dictionary:
    config, kind = found.config, found.config["architecture"]
    w_enc, w_dec, b_dec = weights["W_enc"].T, weights["W_dec"], weights["b_dec"]
    norm, threshold = config["normalize_activations"], torch.zeros(found.m)
    if kind == "gated":
        scale = weights["r_mag"].exp()
        w_enc, b_enc = w_enc * scale.unsqueeze(1), weights["b_mag"]
        threshold = (b_enc - weights["b_gate"] * scale).clamp_min(0)
    else:
        b_enc = weights["b_enc"]
        if kind == "jumprelu":
            threshold = weights["threshold"].clamp_min(0)
    if kind == "topk" and config.get("rescale_acts_by_decoder_norm"):
        rows = w_dec.norm(dim=1, keepdim=True).clamp_min(1e-8)
        w_enc, b_enc, w_dec = w_enc * rows, b_enc * rows.squeeze(1), w_dec / rows
    if norm == "expected_average_only_in":
        factor = _factor(found.folder)
        w_enc, w_dec, b_dec, norm = w_enc * factor, w_dec / factor, b_dec / factor, "none"
    b_in = b_dec if config.get("apply_b_dec_to_input", True) else torch.zeros_like(b_dec)
    tensors = {"w_enc": w_enc, "w_dec": w_dec, "b_enc": b_enc, "b_in": b_in, "b_dec": b_dec, "threshold": threshold}
    return Dictionary(tensors, found.k, False, norm)


def _fits(found: Sequence[Found], model: nn.Module) -> None:
    d, n = model.get_input_embeddings().embedding_dim, len(decoder_layers(model))
    for f in found:
        of = f" (it names {f.of})" if f.of else ""
        if f.d != d:
            raise UserError(
                f"{KEY}: {f.folder} has an encoder [{f.m}, {f.d}], and this model's residuals are [..., {d}]{of}; "
                "give one of this model"
            )
        if f.layer >= n:
            raise UserError(
                f"{KEY}: {f.folder} reads block {f.layer}, and this model has blocks 0 to {n - 1}{of}; give one of "
                "this model"
            )


# --- from the hub ----------------------------------------------------------------------------------------
def _said(spec: str | Sequence[str]) -> str:
    return spec if isinstance(spec, str) else f"[{', '.join(spec)}]"


def _folders(spec: str, layers: str | Sequence[int]) -> list[Path]:
    """The folders with a `cfg.json` that one entry of `model.sae.pretrained` names."""
    folder = Path(spec).expanduser()
    if not folder.is_dir():
        folder = _download(spec)
    if (folder / CONFIG).is_file():
        return [folder]
    there = sorted(p.parent for p in folder.glob(f"*/{CONFIG}"))
    mine = [p for p in there if (p / SAELENS).is_file() or re.search(r"(?:layers|h)[._]\d+$", p.name)]
    if not mine:
        raise UserError(
            f"{KEY}={spec} holds no {CONFIG}, nor does a folder in it; give the folder of an SAE that SAELens or "
            "sparsify has saved, or one that holds such folders"
        )
    if not isinstance(layers, str):  # of layers that nobody asks for, what is odd does not matter
        chosen = [p for p in mine if describe(p).layer in layers]
        return chosen or mine
    return mine


def _download(spec: str) -> Path:
    """The folder of `<hub id>[/<folder>][@<revision>]` or of sae-lens' `<release>/<id>`, downloaded if missing."""
    name, _, revision = spec.partition("@")
    release, _, entry = name.partition("/")
    if release in (releases := _releases()):
        return _from_release(release, entry, releases[release])
    parts = name.split("/")
    if len(parts) < 2 or name.startswith((".", "/", "~")):
        raise UserError(
            f"{KEY}={spec} is no folder, no hub id and no <release>/<id> of sae-lens"
            + ("" if releases else " (which is not installed: pip install -e '.[saes]')")
            + "; mend the path"
        )
    hub_id, inside = "/".join(parts[:2]), "/".join(parts[2:])
    import huggingface_hub as hub

    wanted = [f"{inside}/*" if inside else "*"]
    try:
        local = hub.snapshot_download(
            hub_id,
            revision=revision or None,
            allow_patterns=[f"{w.removesuffix('*')}{e}" for w in wanted for e in ("*.json", "*.safetensors")],
            token=hub.get_token(),
        )
    except Exception as error:
        raise UserError(
            f"{KEY}={spec} could not be downloaded ({hf_hub.first_line(error)}); check the id, log in with `hf auth "
            "login` where it is gated, or give a folder with a copy"
        ) from error
    return Path(local) / inside


def _releases() -> dict[str, Any]:
    """The releases that an installed sae-lens knows, by name; none without it."""
    try:
        from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
    except ImportError:
        return {}
    return get_pretrained_saes_directory()


def _from_release(release: str, entry: str, known: Any) -> Path:
    """A release's autoencoder as sae-lens loads and scales it, saved once in its format beside the hub's cache."""
    from huggingface_hub import constants
    from sae_lens import SAE

    if entry not in known.saes_map:
        some = ", ".join(sorted(known.saes_map)[:5])
        raise UserError(f"{KEY}: the release {release} of sae-lens has no {entry}; it has {some}, ...")
    folder = Path(constants.HF_HUB_CACHE).parent / "cwac-saes" / release / entry
    if not (folder / CONFIG).is_file():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
                SAE.from_pretrained(release, entry, device="cpu").save_model(Path(unfinished) / "sae")
                (Path(unfinished) / "sae").rename(folder)
        except Exception as error:
            raise UserError(
                f"{KEY}={release}/{entry} could not be downloaded by sae-lens ({hf_hub.first_line(error)}); connect, "
                "or give a folder that sae.save_model has written"
            ) from error
    return folder


# --- writing ---------------------------------------------------------------------------------------------
def save_saelens(sae: RoutedSAE, folder: str | Path, model_name: str = "") -> list[Path]:
    """Write our autoencoder in SAELens' format, one folder `layer_N` for each layer it may read; returns them.

    SAELens knows no router: each folder reads every token at its own layer. Our LayerNorm is SAELens' `layer_norm`, up
    to its eps (1e-5, ours 1e-6). Raises UserError for a soft router, whose input is no layer's residual.
    """
    if sae.router_mode == "soft":
        raise UserError("router=soft reads a mixture of layers, which SAELens has no name for; fit another router")
    places = sae.readable
    folders = []
    for place in places:
        layer = sae.layers[place]
        out = Path(folder) / f"layer_{layer}"
        out.mkdir(parents=True, exist_ok=True)
        tensors = {"W_enc": sae.w_enc.T, "W_dec": sae.w_dec, "b_enc": sae.b_enc, "b_dec": sae.b_pre}
        save_file({k: v.detach().float().cpu().contiguous().clone() for k, v in tensors.items()}, out / SAELENS)
        config = {
            "architecture": "topk",
            "d_in": sae.d,
            "d_sae": sae.m,
            "k": sae.k,
            "rescale_acts_by_decoder_norm": False,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": True,
            "normalize_activations": "layer_norm",
            "reshape_activations": "none",
            "metadata": {
                "sae_lens_version": "6.54.12",
                "sae_lens_training_version": None,
                "model_name": model_name,
                "hook_name": f"blocks.{layer}.hook_resid_post",
                "hf_hook_name": f"model.layers.{layer}",
                "hook_head_index": None,
                "prepend_bos": False,
                "exclude_special_tokens": True,
                "trained_by": "cwac (RouteSAE, arXiv:2503.08200)",
                "router": sae.router_mode,
                "reads_layers": sae.layers,
            },
        }
        (out / CONFIG).write_text(json.dumps(config, indent=1))
        folders.append(out)
    return folders
