"""The subspace of the anchors' activations, and the constraint that no update may act on it.

CWAC, arXiv:2604.12384, section 4.2, Eqs. 12-15, App. D. For a linear layer W [d_out, d_in] whose inputs on the anchor
prompts are the columns of X [d_in, N], an update dW with dW X = 0 leaves the layer's outputs on the anchors as they
were. The paper eigen-decomposes C = X X^T and keeps the directions U^ of small eigenvalues, Pi = U^ U^^T, dW <- dW Pi.

Deviations:
- V, the eigenvectors of the *large* eigenvalues, is kept instead of U^: Pi = I - V V^T is never formed (ours; the
  same map).
- tau is not given in the paper. Ours: the smallest number of eigenvectors that keeps `energy` of the trace.
- The first token is left out of C and gets its own direction in V (ours): as an attention sink it carries up to
  99.98 % of the trace (SmolLM2), so it would otherwise either decide tau alone or
  go unprotected.
- `where: update` (ours): after each optimizer step W <- W - (W V - W_0 V) V^T, which pins the cumulative drift
  whatever the optimizer does. Projecting the gradient (Algorithm 1) is undone by Adam's element-wise scaling and
  weight decay.
- `penalty_weight` and `refresh_steps` (ours): the same distance as a penalty mu ||(W - W_0) V||_F^2, and V and A = W V
  refitted from the model of the moment. Neither pins the cumulative drift.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from cwac.core.distributed import local, spread, whole
from cwac.core.errors import UserError
from cwac.models.hooks import on_inputs
from cwac.models.layers import base_layer, evaluating, input_group, linears, unread_logits
from cwac.models.packing import together

SINGLE = 0.999
"""The largest energy at which C is decomposed in float32: its eigenvalues are off by 1e-7 of the largest, beside which
the thousandth of the trace that is given up is large."""


@dataclass
class Basis:
    """The protected directions of one input."""

    V: torch.Tensor
    """[d_in, k], orthonormal columns, fp32."""
    energy: float
    """Share of the anchors' squared norm, first token left out, that lies in V."""
    n_tokens: int
    """Anchor tokens C was computed from."""

    @property
    def rank(self) -> int:
        return self.V.shape[1]

    @property
    def dim(self) -> int:
        return self.V.shape[0]


def capture(
    model: nn.Module, rows: Sequence[dict], modules: dict[str, nn.Module], visit, batch_size: int = 16
) -> None:
    """Run `rows` through the model; call visit(name, x, first) with each module's inputs at real tokens.

    x: [tokens, d_in] without the first token of each row; first: [.., d_in], the first tokens'. Padding is dropped. A
    token that n rows of a batch share (`cwac.models.packing`) comes once, multiplied by sqrt(n): sums of squares and
    products are those of all rows.
    """
    first = later = None  # of the batch that runs: `Counted`

    def record(name: str, inputs: torch.Tensor) -> None:
        x = inputs.detach().flatten(0, 1)  # [B T, d_in]
        visit(name, later.of(x), first.of(x))

    target = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    unread = unread_logits(model)
    with torch.no_grad(), evaluating(model), on_inputs(modules, record):
        for start in range(0, len(order), batch_size):
            inputs, places = together(model, [rows[i]["input_ids"] for i in order[start : start + batch_size]])
            first, later = Counted(places[:, :1], target), Counted(places[:, 1:], target)
            model(**{key: value.to(target) for key, value in inputs.items()}, use_cache=False, **unread)


def share_outside(x: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
    """||(I - V V^T) X||_F^2 / ||X||_F^2 of x [tokens, d_in] and V [d_in, k]; a scalar in fp32."""
    x = x.float()
    return (x - (x @ V) @ V.T).square().sum() / x.square().sum()


class Counted:
    """The tokens of a forward pass at some places, each once, and how many rows have it."""

    def __init__(self, places: torch.Tensor, device: torch.device):
        self.places, counts = (t.to(device) for t in places[places >= 0].unique(return_counts=True))
        self.factor = counts.sqrt().unsqueeze(1) if bool((counts > 1).any()) else None

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of x [B T, d] times the root of their count, then at least in fp32: in bf16 the product would round."""
        x = x[self.places]
        return x if self.factor is None else x.to(torch.promote_types(x.dtype, torch.float32)) * self.factor


def fit_subspace(
    model: nn.Module,
    rows: Sequence[dict],
    kinds,
    layers=None,
    energy: float = 0.99,
    first_token: bool = True,
    batch_size: int = 16,
    progress: bool = True,
) -> dict[str, Basis]:
    """V for every distinct input of the chosen matrices, from the anchors' activations in the current model.

    first_token: leave it out of C and give its input a direction of its own; otherwise it is a token like the others.
    rows: encoded anchors, `{"input_ids": [...]}`. kinds: `all` or names such as `down_proj`. energy in (0, 1]; at 1 V
    spans every anchor token to machine precision. Covariances are accumulated in float64; below 1, a batch's product
    is formed in float32, and up to `SINGLE` they are decomposed in it, each of which halves the cost.
    Returns input name (`3.down_proj`, `3.qkv`) -> Basis.
    """
    if not rows:
        raise UserError("the anchor pool is empty; enlarge pools.anchors")
    chosen = linears(model, kinds, layers)
    sources = {}  # one representative matrix per distinct input
    for name, module in chosen.items():
        sources.setdefault(input_group(name), module)
    n_tokens = sum(len(r["input_ids"]) - first_token for r in rows)
    decomposed = torch.float32 if energy <= SINGLE else torch.float64
    exact = energy >= 1  # only then do directions below fp32's resolution of a batch's product matter
    dims = {name: base_layer(m).in_features for name, m in sources.items()}
    where = next(model.parameters()).device
    few = {name: n_tokens <= d for name, d in dims.items()}  # fewer tokens than dimensions: keep X, not C
    C = {n: torch.zeros(dims[n], dims[n], dtype=torch.float64, device=where) for n in sources if not few[n]}
    X: dict[str, list] = {n: [] for n in sources if few[n]}
    first: dict[str, list] = {n: [] for n in sources}

    def visit(name: str, x: torch.Tensor, x0: torch.Tensor) -> None:
        if not first_token:  # then it is a token like any other, as Eq. 12 reads
            x = torch.cat([x0, x])
        x = x.double() if exact else x.float()
        if few[name]:
            X[name].append(x.double())
        else:
            add_gram(C[name], x)
        first[name].append(x0.double())

    capture(model, rows, sources, visit, batch_size)
    bases = {}
    for name in tqdm(sources, desc="subspace", unit="input", disable=not progress):
        sink = leading(torch.cat(first[name])) if first_token else None  # [d_in, s]
        if few[name]:
            x = torch.cat(X[name])
            if sink is not None:
                x = x - (x @ sink) @ sink.T
            trace = x.square().sum()
            V, values = from_tokens(x) if exact else from_gram(x.to(decomposed))
        else:
            c = C.pop(name).tril_()
            c += c.tril(-1).T
            if sink is not None:  # look only at what the sink's direction does not already cover
                c = c - sink @ (sink.T @ c)
                c = c - (c @ sink) @ sink.T
            trace = c.diagonal().sum()
            values, V = torch.linalg.eigh(c.to(decomposed))
            values, V = values.flip(0).clamp_min(0), V.flip(1)
        k = rank_for(values, energy)
        values, V = values.double(), V[:, :k].double()
        if sink is not None:
            V = torch.cat([sink, V], 1)
        V = torch.linalg.qr(V)[0]
        energy_kept = float(values[:k].sum() / trace.clamp_min(1e-300))
        bases[name] = Basis(V.float().contiguous(), energy_kept, n_tokens)
    return bases


def add_gram(C: torch.Tensor, x: torch.Tensor, block: int = 256) -> None:
    """C [d, d] += x^T x for x [n, d], on and below the diagonal alone, give or take a block: half of the products."""
    for start in range(0, C.shape[1], block):
        C[start:, start : start + block] += x[:, start:].T @ x[:, start : start + block]


def rank_for(values: torch.Tensor, energy: float) -> int:
    """How many of the descending eigenvalues make up `energy` of their sum; those at rounding level never count."""
    real = int((values > values[0] * len(values) * torch.finfo(values.dtype).eps).sum())
    if energy >= 1:
        return real
    share = values.cumsum(0) / values.sum()
    return min(real, int((share < energy).sum()) + 1)


def from_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvectors [d, n] and eigenvalues of X^T X for x [n, d] with n < d, by its singular values."""
    _, singular, Vh = torch.linalg.svd(x, full_matrices=False)
    return Vh.T, singular.square()


def from_gram(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from X X^T [n, n], several times as fast; singular values below 1e-8 of the largest are noise."""
    values, U = torch.linalg.eigh(x @ x.T)
    values, U = values.flip(0).clamp_min(0), U.flip(1)
    return x.T @ (U / values.sqrt().clamp_min(1e-8 * values[0].sqrt())), values


def leading(x0: torch.Tensor, tolerance: float = 1e-6, limit: int = 8) -> torch.Tensor:
    """Orthonormal directions [d, s] of the first token's inputs; one where every row starts with the same token."""
    _, singular, Vh = torch.linalg.svd(x0.cpu(), full_matrices=False)  # a small one, which a GPU takes longer for
    s = int((singular > tolerance * singular[0]).sum())
    return Vh[: min(s, limit)].T.to(x0.device)


def save_bases(bases: dict[str, Basis], folder: Path) -> None:
    save_file({name: b.V.contiguous() for name, b in bases.items()}, folder / "subspace.safetensors")
    report = {n: {"rank": b.rank, "dim": b.dim, "energy": b.energy, "n_tokens": b.n_tokens} for n, b in bases.items()}
    (folder / "subspace.json").write_text(json.dumps(report, indent=1))


def load_bases(folder: Path) -> dict[str, Basis]:
    tensors = load_file(folder / "subspace.safetensors")
    report = json.loads((folder / "subspace.json").read_text())
    return {n: Basis(V, report[n]["energy"], report[n]["n_tokens"]) for n, V in tensors.items()}


def project_(W: torch.Tensor, V: torch.Tensor, A: torch.Tensor) -> None:
    """W <- W - (W V - A) V^T in place: W [d_out, d_in], V [d_in, k] orthonormal, A = W_0 V [d_out, k].

    Afterwards W V = A up to rounding, so (W - W_0) x = 0 for every x in the span of V. On a GPU the product with
    V^T rounds its factors to TF32: the correction is small beside W, so as much drift is left as in fp32, in 0.59 of
    the time (H100, benchmarks/README.md). W V itself would not bear it.
    """
    drift = torch.addmm(A, W, V, beta=-1)
    with tf32(W.device):
        W.addmm_(drift, V.T, alpha=-1)


@contextmanager
def tf32(where: torch.device) -> Iterator[None]:
    """While open, products of fp32 matrices on a GPU round their factors to 10 bits of mantissa; a CPU's do not."""
    before = torch.get_float32_matmul_precision()
    if where.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Constraint:
    """Keeps the update of each chosen matrix off its input's V; full-parameter or LoRA. Needs fp32 weights.

    With LoRA, dW = s B A, so the projector acts on A's input side: A <- A - (A V) V^T, from the first step on.
    """

    def __init__(self, modules: dict[str, nn.Module], bases: dict[str, Basis]):
        self.entries: list[tuple[str, nn.Linear, torch.Tensor, torch.Tensor]] = []
        moved: dict[str, torch.Tensor] = {}
        for name, module in modules.items():
            group = input_group(name)
            lora = getattr(module, "lora_A", None)
            for layer in [base_layer(module)] if lora is None else lora.values():
                weight = layer.weight
                if weight.dtype not in (torch.float32, torch.float64):
                    raise UserError(
                        f"{name} is stored in {str(weight.dtype).removeprefix('torch.')}, where a projected update of "
                        "usual size rounds away; load the model in float32 and compute in bf16 by autocast (bf16=True)"
                    )
                if group not in moved:
                    moved[group] = bases[group].V.to(weight.device)
                V = moved[group]
                # with LoRA the pinned value is 0: no part of A may read a protected direction
                pinned = read_through(weight, V)
                A = pinned if lora is None else torch.zeros_like(pinned)
                self.entries.append((name, layer, V, A))

    def keep_own_rows(self) -> None:
        """Under FSDP2, when parameters have become shards: W V of some rows of W is the same rows of A."""
        self.entries = [(name, layer, V, local(spread(A, layer.weight))) for name, layer, V, A in self.entries]

    @torch.no_grad()
    def refit_(self, bases: dict[str, Basis]) -> None:
        """Full-parameter training only: V of `bases` from here on, and A = W V of the weights as they are now.

        What had changed along V stays, and what the old V protected and the new one does not may change from now on.
        Under FSDP2 each rank computes its own rows of A.
        """
        moved = {group: basis.V.to(self.entries[0][2].device) for group, basis in bases.items()}
        self.entries = [
            (name, layer, moved[input_group(name)], read_through(local(layer.weight), moved[input_group(name)]))
            for name, layer, *_ in self.entries
        ]

    def state_dict(self) -> dict[str, dict[str, torch.Tensor]]:
        """`V` by input and `A` by matrix, whole and on the CPU. Every rank must ask at once."""
        V = {input_group(name): V.cpu() for name, _, V, _ in self.entries}
        return {"V": V, "A": {name: gathered(A, layer.weight).cpu() for name, layer, _, A in self.entries}}

    def load_state_dict(self, state: dict[str, dict[str, torch.Tensor]]) -> None:
        """What `state_dict` gave; before `keep_own_rows`."""
        device = self.entries[0][2].device
        V = {group: value.to(device) for group, value in state["V"].items()}
        self.entries = [
            (name, layer, V[input_group(name)], state["A"][name].to(device)) for name, layer, *_ in self.entries
        ]

    @torch.no_grad()
    def project_weights_(self) -> None:
        for _, layer, V, A in self.entries:
            project_(local(layer.weight), V, A)

    @torch.no_grad()
    def project_gradients_(self) -> None:
        """Algorithm 1 to the letter: grad <- grad (I - V V^T)."""
        for _, layer, V, _ in self.entries:
            if layer.weight.grad is not None:
                grad = local(layer.weight.grad)
                grad.addmm_(grad @ V, V.T, alpha=-1)

    @torch.no_grad()
    def add_penalty_gradients_(self, mu: float) -> None:
        """grad <- grad + 2 mu (W V - A) V^T, the gradient of mu ||(W - W_0) V||_F^2 (ours).

        With LoRA W is the adapter's A [r, d_in], whose pinned value is 0: mu ||A V||_F^2.
        """
        for _, layer, V, A in self.entries:
            if layer.weight.grad is not None:
                drift = torch.addmm(A, local(layer.weight), V, beta=-1)  # W V - A, [d_out, k]
                local(layer.weight.grad).addmm_(drift, V.T, alpha=2 * mu)


def read_through(weight: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
    """W V [d_out, k], in float64: an error in it would stay in the weights for as long as it is pinned."""
    return (weight.detach().double() @ V.double()).float()


def gathered(A: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """All rows of A, of which this rank holds those that it holds of `weight`. Every rank must ask at once."""
    if not hasattr(weight, "placements"):
        return A
    from torch.distributed.tensor import DTensor

    shape = torch.Size((weight.shape[0], A.shape[1]))
    shard = DTensor.from_local(A, weight.device_mesh, weight.placements, shape=shape, stride=(A.shape[1], 1))
    return whole(shard)
