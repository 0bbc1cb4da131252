"""The routed TopK autoencoder (RouteSAE, arXiv:2503.08200; CWAC Eq. 9); deviations: see the package."""

import hashlib
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from cwac.core import renamed
from cwac.core.errors import UserError
from cwac.models.adapters import holds_update
from cwac.models.hooks import normalize
from cwac.models.layers import decoder_layers

with warnings.catch_warnings():
    # torch announces once a process that CSR is beta; the tests compare every product with its dense twin
    warnings.simplefilter("ignore")
    torch.eye(1).to_sparse_csr()


def largest(x: Tensor, k: int, groups_of: int = 8) -> tuple[Tensor, Tensor]:
    """Values, falling, and indices [N, k] of the k largest of each row of x [N, M]: `x.topk(k)`, sooner on a CPU.

    The k largest lie in the k groups with the largest maxima, so `topk` need only look at M / 8 maxima and 8 k
    candidates. Where several entries tie for the last places, it may choose others of them.
    """
    n, m = x.shape
    if m % groups_of or 4 * k * groups_of > m:
        return x.topk(k)
    grouped = x.view(n, groups_of, m // groups_of)
    group = grouped.amax(1).topk(k, sorted=False).indices  # [N, k]
    candidates = grouped.gather(2, group.unsqueeze(1).expand(-1, groups_of, -1)).flatten(1)
    values, at = candidates.topk(k)
    return values, at // k * (m // groups_of) + group.gather(1, at % k)


class _SparseAutoencoder(torch.autograd.Function):
    """u_hat = TopK(W_enc (u - b_pre) + b_enc) W_dec + b_pre with sparse decode and sparse weight gradients.

    The k active latents of each of N tokens are a sparse matrix [N, M]. Its transpose, one argsort away,
    turns both weight gradients into sums over bags of tokens; nothing of size N*k*d or N*M is kept.
    """

    @staticmethod
    def forward(ctx, u, w_enc, b_enc, w_dec, b_pre, k):
        pre = torch.addmm(b_enc, u - b_pre, w_enc.t())
        values, indices = largest(pre, k)
        values = values.relu()
        columns = indices.to(torch.int32)
        ctx.save_for_backward(u, w_enc, w_dec, b_pre, values, columns)
        ctx.mark_non_differentiable(values, indices)
        return embedding_bag(columns, w_dec, per_sample_weights=values, mode="sum") + b_pre, values, indices

    @staticmethod
    def backward(ctx, grad, _values, _indices):
        u, w_enc, w_dec, b_pre, values, columns = ctx.saved_tensors
        n, k = values.shape
        m, grad, flat = len(w_dec), grad.contiguous(), columns.flatten()
        rows = torch.arange(0, n * k + 1, k, dtype=torch.int32)
        pattern = torch.sparse_csr_tensor(
            rows, flat, torch.zeros(n * k, dtype=grad.dtype), (n, m), check_invariants=False
        )
        d_values = torch.sparse.sampled_addmm(pattern, grad, w_dec.t(), beta=0.0).values()
        d_values = d_values.view(n, k) * (values > 0)
        order = flat.argsort()
        tokens = (order // k).to(torch.int32)
        starts = torch.zeros(m, dtype=torch.int32)
        starts[1:] = torch.bincount(flat, minlength=m).cumsum(0)[:-1]

        def transposed(entries: Tensor, x: Tensor) -> Tensor:
            """Sums [M, d] of the rows of x [N, d] weighted by the entries [N, k] of the sparse matrix."""
            return embedding_bag(tokens, x, starts, per_sample_weights=entries.flatten()[order], mode="sum")

        d_bias = torch.zeros(m, dtype=grad.dtype).index_add_(0, flat, d_values.flatten())
        d_u = None
        if ctx.needs_input_grad[0]:
            d_u = embedding_bag(columns, w_enc, per_sample_weights=d_values, mode="sum")
        # sum over tokens of d_values W_enc is one vector-matrix product, so b_pre costs nothing extra
        d_pre = grad.sum(0) - d_bias @ w_enc
        return d_u, transposed(d_values, u - b_pre), d_bias, transposed(values, grad), d_pre, None


class RoutedSAE(nn.Module):
    """One TopK dictionary for several layers, with a router that chooses the layer to read per token.

    Parameters, fp32: w_enc [M, d], b_enc [M], w_dec [M, d] with unit rows, b_pre [d], router [L_r, d].
    layers: decoder blocks whose output may be read, counted from 0; L_r of them.
    router: `hard` (RouteSAE), `soft`, `uniform` (any layer in training, the middle one when read), `layer:l`.
    Latents z are in the units of the normalised residual, whose squared norm is d - 1.
    info: provenance that travels with the weights.
    """

    def __init__(self, d: int, m: int, k: int, layers: Sequence[int], router: str = "hard", info: dict | None = None):
        super().__init__()
        self.d, self.m, self.k, self.layers, self.router_mode = d, m, k, list(layers), router
        self.info = dict(info or {})
        fixed = router.removeprefix("layer:") if router.startswith("layer:") else ""
        if router not in ("hard", "soft", "uniform") and not (fixed.isdigit() and int(fixed) in self.layers):
            raise UserError(
                f"model.sae.router={router!r}: use hard, soft, uniform or layer:l with l one of {self.layers}"
            )
        if not 1 <= k <= m:
            raise UserError(f"model.sae.k={k}: must lie between 1 and the {m} latents of model.sae.m")
        # which of the layers `uniform` and `layer:l` read, by its place in `layers`
        self.fixed = self.layers.index(int(fixed)) if fixed else len(self.layers) // 2
        self.w_enc, self.b_enc = nn.Parameter(torch.empty(m, d)), nn.Parameter(torch.zeros(m))
        self.w_dec, self.b_pre = nn.Parameter(torch.empty(m, d)), nn.Parameter(torch.zeros(d))
        learnt = router in ("hard", "soft")
        self.router = nn.Parameter(torch.empty(len(self.layers), d)) if learnt else None

    def initialise_(self, u: Tensor, generator: torch.Generator, *, center: bool = True, scale: float | None = None):
        """Random unit decoder rows, encoder = scale * decoder; u [N, d]: training rows.

        center: b_pre = mean of u, else 0. scale: None takes the least-squares one on u.
        """
        with torch.no_grad():
            self.w_dec.copy_(torch.randn(self.m, self.d, generator=generator))
            self.unit_rows_()
            self.b_pre.copy_(u.mean(0)) if center else self.b_pre.zero_()
            self.b_enc.zero_()
            self.w_enc.copy_(self.w_dec)
            if scale is None:
                target = u - self.b_pre
                y = self(u)[0] - self.b_pre
                scale = float((target * y).sum() / (y * y).sum())
            self.w_enc.mul_(scale)

    def initialise_router_(self, generator: torch.Generator) -> None:
        """torch's default init of a bias-free Linear, as in RouteSAE, from an explicit generator."""
        if self.router is not None:
            with torch.no_grad():
                bound = 1 / math.sqrt(self.d)
                self.router.copy_((torch.rand(self.router.shape, generator=generator) * 2 - 1) * bound)

    @torch.no_grad()
    def unit_rows_(self) -> None:
        self.w_dec.div_(self.w_dec.norm(dim=1, keepdim=True).clamp_min(1e-12))

    def probabilities(self, x: Tensor) -> Tensor:
        """Router distribution over layers, [..., L_r], of x [..., L_r, d]; the layers are summed first (RouteSAE)."""
        return (x.sum(-2) @ self.router.t()).softmax(-1)

    def training_input(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """What the dictionary is trained on, [N, d], from x [N, L_r, d]; `hard` is scaled by its probability."""
        if self.router_mode == "soft":
            return (self.probabilities(x).unsqueeze(-1) * x).sum(1)
        rows = torch.arange(len(x), device=x.device)
        if self.router_mode == "hard":
            p, layer = self.probabilities(x).max(-1)
            return p.unsqueeze(-1) * x[rows, layer]
        if self.router_mode == "uniform":
            return x[rows, torch.randint(x.shape[1], (len(x),), generator=generator).to(x.device)]
        return x[:, self.fixed]

    @property
    def width(self) -> int:
        """Dimension of what is read, u: the model's d."""
        return self.d

    @property
    def readable(self) -> list[int]:
        """Places in `layers` of those that may be read."""
        return list(range(len(self.layers))) if self.router is not None else [self.fixed]

    def normalize(self, r: Tensor, places: Sequence[int] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(x, mean, std) of residuals r [..., L, d] of any of the layers; see `cwac.models.hooks.normalize`."""
        return normalize(r)

    def read_weights(self, x: Tensor, latents: Tensor | None = None) -> Tensor:
        """Weights over layers [..., L_r] used when reading x [..., L_r, d]; one-hot except for `soft`.

        latents: they are all read at one layer, so that which of them are wanted changes nothing.
        """
        if self.router_mode == "soft":
            return self.probabilities(x)
        if self.router_mode == "hard":
            layer = self.probabilities(x).argmax(-1)
        else:
            layer = torch.full(x.shape[:-2], self.fixed, device=x.device)
        return nn.functional.one_hot(layer, x.shape[-2]).to(x.dtype)

    def mix(self, x: Tensor, weights: Tensor, places: Sequence[int] | None = None) -> Tensor:
        """The mixture [..., d] of x [..., L, d] at some of the layers by their weights [..., L]."""
        return (weights.unsqueeze(-1) * x).sum(-2)

    def read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(u [..., d], place in `layers` [...]) of normalised residuals x [..., L_r, d], unscaled."""
        weights = self.read_weights(x)
        return self.mix(x, weights), weights.argmax(-1)

    def pre(self, u: Tensor, latents: Tensor | None = None) -> Tensor:
        """Pre-activations a = W_enc (u - b_pre) + b_enc, [..., M], or only those of `latents`."""
        w, b = (self.w_enc, self.b_enc) if latents is None else (self.w_enc[latents], self.b_enc[latents])
        return nn.functional.linear(u - self.b_pre, w, b)

    def gate(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        """Latents z [..., M] of all pre-activations, and the k-th largest of these, at least 0, tau [...]."""
        top = pre.topk(self.k, dim=-1)
        z = torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())
        return z, top.values[..., -1].clamp_min(0)

    def encode(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Values [..., k] >= 0, sorted falling, and indices [..., k] of the k largest pre-activations (Eq. 9)."""
        values, indices = self.pre(u).topk(self.k, dim=-1)
        return values.relu(), indices

    def dense(self, u: Tensor) -> Tensor:
        """All latents z [..., M], zero outside the TopK."""
        values, indices = self.encode(u)
        return torch.zeros(*u.shape[:-1], self.m, dtype=u.dtype, device=u.device).scatter(-1, indices, values)

    def decode(self, values: Tensor, indices: Tensor) -> Tensor:
        """u_hat = W_dec z + b_pre, [N, d] (Eq. 9); the second factor of the reconstruction, by embedding bags."""
        return embedding_bag(indices, self.w_dec, per_sample_weights=values, mode="sum") + self.b_pre

    def at_layer(self, x: Tensor, place: int) -> tuple[Tensor, Tensor]:
        """u and u_hat [N, d] of x [N, L_r, d], all read at one layer, by its place in `layers`."""
        u = x[:, place]
        return u, self.decode(*self.encode(u))

    def on_decoder(self, v: Tensor) -> Tensor:
        """<v, W_dec,i> [..., M] of v [..., d]."""
        return v @ self.w_dec.t()

    def cosines(self, difference: Tensor) -> Tensor:
        """Cosine [M] of each decoder row with a difference [d] of inputs; on the CPU."""
        rows = nn.functional.normalize(self.w_dec.detach().float().cpu(), dim=1)
        return rows @ nn.functional.normalize(difference, dim=0)

    def contribution(self, z: Tensor, latents: Tensor, weights: Tensor) -> Tensor:
        """What latents z [..., S] add to the normalised residual of each layer, [..., L_r, d]; weights as `mix`'s."""
        return weights.unsqueeze(-1) * (z @ self.w_dec[latents]).unsqueeze(-2)

    def forward(self, u: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
        """(u_hat [N, d], values [N, k], indices [N, k]) of u [N, d].

        backend: `csr` (sparse gradients, CPU with MKL), `dense` (the reference), `auto` the faster one here.
        """
        if backend == "auto":
            backend = "csr" if u.device.type == "cpu" and torch.backends.mkl.is_available() else "dense"
        if backend == "csr":
            return _SparseAutoencoder.apply(u, self.w_enc, self.b_enc, self.w_dec, self.b_pre, self.k)
        values, indices = self.encode(u)
        z = torch.zeros(len(u), self.m, dtype=u.dtype, device=u.device).scatter(1, indices, values)
        return z @ self.w_dec + self.b_pre, values, indices

    def save(self, folder: str | Path) -> None:
        """Write `sae.safetensors` and `sae.json`, whose format is older than the name `layers` (core/renamed.py)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}, folder / "sae.safetensors")
        shape = {"d": self.d, "m": self.m, "k": self.k, "layers": self.layers, "router": self.router_mode}
        shape = renamed.hashed_group("model.sae", shape)
        (folder / "sae.json").write_text(json.dumps({**shape, "info": self.info}, indent=1))

    @classmethod
    def load(cls, folder: str | Path, model: nn.Module | None = None) -> "RoutedSAE":
        """Read what `save` wrote, frozen; with `model`, refuse an SAE that was fitted on another one."""
        folder = Path(folder)
        if not (folder / "sae.json").is_file():
            raise UserError(f"no SAE in {folder}: delete the folder and run again to fit one")
        config = json.loads((folder / "sae.json").read_text())
        if model is not None and config["info"].get("model_fingerprint") != middle_block_hash(model):
            raise UserError(f"the SAE in {folder} was fitted on another model: delete the folder to fit a new one")
        sae = cls(**renamed.current_group("model.sae", config))
        sae.load_state_dict(load_file(folder / "sae.safetensors"))
        return sae.requires_grad_(False)


def tokens_at_once(sae: nn.Module, most: int = 4096) -> int:
    """How many tokens to encode in one batch, so that latents [N, M] stay below half a GiB; at most `most`."""
    return max(1, min(most, 2**27 // sae.m))


def middle_block_hash(model: nn.Module) -> str:
    """Tells models apart that share a name: a hash of pieces of the middle block's weights.

    An adapter counts once it has learnt something.
    """
    layers, adapter = decoder_layers(model), holds_update(model)
    digest = hashlib.sha256(f"{len(layers)}".encode())
    for name, parameter in layers[len(layers) // 2].named_parameters():
        if adapter or "lora_" not in name:
            digest.update(parameter.detach().flatten()[:4096].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
