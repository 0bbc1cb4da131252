"""The subspace of the anchors' activations, and the constraint that no update may act on it.

CWAC, arXiv:2604.12384, section 4.2, Eqs. 12-15, App. D. For a linear layer W [d_out, d_in] whose inputs on the anchor
prompts are the columns of X [d_in, N], an update dW with dW X = 0 leaves the layer's outputs on the anchors as they
were. The paper eigen-decomposes C = X X^T and keeps the directions U^ of small eigenvalues, Pi = U^ U^^T, dW <- dW Pi.

Deviations:
- V, the eigenvectors of the *large* eigenvalues, is kept instead of U^. Pi = I - V V^T is the same map, and is never
  formed as a matrix (ours).
- The paper does not give the threshold tau. Ours: V has the fewest eigenvectors that keep `energy` of the trace.
- The first token is left out of C and gets its own direction in V (ours). As an attention sink it carries up to
  99.98 % of the trace (SmolLM2), so it would otherwise either decide the threshold alone or stay unprotected.
- `where: update` (ours): after each optimizer step W <- W - (W V - W_0 V) V^T, which pins the cumulative drift
  whatever the optimizer does. Projecting the gradient (Algorithm 1) is undone by Adam's element-wise scaling and
  weight decay.
- `penalty_weight` (ours) replaces the projection by the penalty mu ||(W - W_0) V||_F^2; `refresh_steps` (ours) refits
  V and A = W V from the current model during training. Neither pins the cumulative drift.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from scipy.linalg import eigh_tridiagonal, eigvalsh_tridiagonal, lapack
from torch import nn
from tqdm import tqdm

from cwac.core.distributed import local, spread, whole
from cwac.core.errors import UserError
from cwac.models.adapters import active_adapters
from cwac.models.hooks import on_inputs
from cwac.models.layers import base_layer, evaluating, input_group, linears, unread_logits
from cwac.models.packing import together

SINGLE = 0.999
"""Up to this energy C is decomposed in float32, above it in float64. In float32 the eigenvalues are off by 1e-7 of the
largest one, which is small beside the thousandth of the trace that V gives up at this energy."""


BLOCK = 1024
"""Rows of X that are held back for one product (ours): a small one costs as much to add as to make."""
LARGE = 2048
"""Dimensions from which on only the eigenvectors that are needed are computed (ours); below it saves nothing."""


@dataclass
class Basis:
    """The protected directions of one input; matrices that read the same input, such as q, k and v, share it."""

    V: torch.Tensor
    """[d_in, k], orthonormal columns, fp32."""
    energy: float
    """Share of the squared norm of the anchors' inputs that lies in V, without the first token."""
    n_tokens: int
    """Number of anchor tokens from which C was computed."""

    @property
    def rank(self) -> int:
        return self.V.shape[1]

    @property
    def dim(self) -> int:
        return self.V.shape[0]


def capture(
    model: nn.Module,
    rows: Sequence[dict],
    modules: dict[str, nn.Module],
    visit,
    batch_size: int = 16,
    answers_only: bool = False,
    description: str | None = None,
) -> None:
    """Run `rows` through the model and call visit(name, x, first) with the inputs of each module.

    x: [tokens, d_in], the inputs at all tokens but the first of each row; first: [.., d_in], those at the first
    tokens. Padding is dropped. A token that n rows of a batch share (`cwac.models.packing`) is passed once, multiplied
    by sqrt(n), so that sums of squares and of products are the same as if it were passed for each row.
    answers_only: pass only the tokens after a row's prompt, of which `row["prompt"]` is the length in tokens.
    description: the progress bar's label; None shows no bar.
    """
    first = later = None  # `Counted` tokens of the batch that runs at the moment

    def record(name: str, inputs: torch.Tensor) -> None:
        x = inputs.detach().flatten(0, 1)  # [B T, d_in]
        visit(name, later.of(x), first.of(x))

    target = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    unread = unread_logits(model)
    bar = tqdm(total=len(rows), desc=description, unit="row", disable=description is None)
    with torch.no_grad(), evaluating(model), on_inputs(modules, record), bar:
        for start in range(0, len(order), batch_size):
            chosen = [rows[i] for i in order[start : start + batch_size]]
            inputs, places = together(model, [row["input_ids"] for row in chosen])
            if answers_only:
                lengths = torch.tensor([row["prompt"] for row in chosen]).unsqueeze(1)
                places = places.masked_fill(torch.arange(places.shape[1]) < lengths, -1)
            first, later = Counted(places[:, :1], target), Counted(places[:, 1:], target)
            model(**{key: value.to(target) for key, value in inputs.items()}, use_cache=False, **unread)
            bar.update(len(chosen))


def share_outside(x: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
    """The share of the squared norm of x [tokens, d_in] that lies outside the span of V [d_in, k]; a scalar in fp32.

    With X = x^T it is ||(I - V V^T) X||_F^2 / ||X||_F^2.
    """
    x = x.float()
    return (x - (x @ V) @ V.T).square().sum() / x.square().sum()


class Counted:
    """Some tokens of a forward pass: each is held once, with the number of rows that share it."""

    def __init__(self, places: torch.Tensor, device: torch.device):
        self.places, counts = (t.to(device) for t in places[places >= 0].unique(return_counts=True))
        self.factor = counts.sqrt().unsqueeze(1) if bool((counts > 1).any()) else None

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of x [B T, d] at these tokens, each multiplied by the square root of its count.

        Where a count is above 1, rows are first converted to fp32 at least, because in bf16 the product would round.
        """
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

    rows: encoded anchors, `{"input_ids": [...]}`. kinds: `all`, or names of linear layers such as `down_proj`. layers:
    decoder blocks, counted from 0; None for all.
    energy: share of the squared norm to keep, in (0, 1]; at 1, V spans every anchor token to machine precision.
    first_token: leave the first token out of C and give its input a direction of its own in V; otherwise it is
    treated like every other token.
    Covariances are accumulated in float64. At an energy below 1 the product of each batch is formed in float32, and up
    to `SINGLE` the covariances are also decomposed in float32; either halves the cost.
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
    moments = {name: Moment(base_layer(m).in_features) for name, m in sources.items()}
    first: dict[str, list] = {n: [] for n in sources}

    def visit(name: str, x: torch.Tensor, x0: torch.Tensor) -> None:
        if not first_token:  # then it is a token like any other, as Eq. 12 reads
            x = torch.cat([x0, x])
        moments[name].add(x.double() if exact else x.float())
        first[name].append(x0.double())

    capture(model, rows, sources, visit, batch_size, description="anchors" if progress else None)
    wanted = partial(rank_for, energy=energy)
    bases = {}
    for name in tqdm(sources, desc="subspace", unit="input", disable=not progress):
        sink = leading(torch.cat(first[name])) if first_token else None  # [d_in, s]
        moment = moments.pop(name)
        if moment.X is not None:
            x = moment.X.double()
            if sink is not None:
                x = x - (x @ sink) @ sink.T
            trace = x.square().sum()
            V, values = from_tokens(x) if exact else from_gram(x.to(decomposed), wanted)
        else:
            c = moment.C
            if sink is not None:  # look only at what the sink's direction does not already cover
                c = c - sink @ (sink.T @ c)
                c = c - (c @ sink) @ sink.T
            trace = c.diagonal().sum()
            V, values = leading_eigenvectors(c.to(decomposed), wanted)
        k = wanted(values)
        values, V = values.double(), V[:, :k].double()
        if sink is not None:
            V = torch.cat([sink, V], 1)
        V = torch.linalg.qr(V)[0]
        energy_kept = float(values[:k].sum() / trace.clamp_min(1e-300))
        bases[name] = Basis(V.float().contiguous(), energy_kept, n_tokens)
    return bases


class Moment:
    """X^T X of rows x [n, d] that come in parts: X itself as long as it has no more rows than columns, X^T X after.

    A token that several rows of a batch share comes once, so there may be fewer rows than tokens. X^T X is summed in
    float64, of products of `BLOCK` rows.
    """

    def __init__(self, d: int):
        self.d = d
        self._parts: list[torch.Tensor] = []
        self._C: torch.Tensor | None = None

    def add(self, x: torch.Tensor) -> None:
        """x: [n, d], in fp32, or in float64 if products that fp32 would round shall count."""
        self._parts.append(x)
        if sum(map(len, self._parts)) > (self.d if self._C is None else min(self.d, BLOCK)):
            self._fold()

    def _fold(self) -> None:
        if self._C is None:
            self._C = torch.zeros(self.d, self.d, dtype=torch.float64, device=self._parts[0].device)
        if self._parts:
            add_gram(self._C, torch.cat(self._parts))
        self._parts = []

    @property
    def device(self) -> torch.device:
        return (self._parts[0] if self._C is None else self._C).device

    @property
    def X(self) -> torch.Tensor | None:
        """[n, d], n <= d, in the dtype in which it was given; None if there were more rows."""
        return torch.cat(self._parts) if self._C is None else None

    @property
    def C(self) -> torch.Tensor:
        """X^T X [d, d], in float64."""
        if self._C is None:
            x = self.X.double()
            return x.T @ x
        self._fold()
        self._C.tril_()
        self._C += self._C.tril(-1).T  # a later part goes to the lower triangle, and the next call reads that
        return self._C


def leading_eigenvectors(C: torch.Tensor, wanted: Callable[[torch.Tensor], int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The leading k eigenvectors [n, k] of C [n, n], symmetric and positive, and all eigenvalues [n], largest first.

    wanted: k, given the eigenvalues. On a CPU and from `LARGE` on the others are not computed, unless they are the
    fewer: LAPACK's tridiagonal form gives all eigenvalues, and eigenvectors one by one.
    """
    n = len(C)
    if C.device.type == "cpu" and n >= LARGE:
        sytrd, work = lapack.get_lapack_funcs(("sytrd", "sytrd_lwork"), dtype=C.numpy().dtype)
        form, diagonal, beside, scales, _ = sytrd(C.numpy().T, lower=1, lwork=int(work(n, lower=1)[0]))
        values = torch.from_numpy(eigvalsh_tridiagonal(diagonal, beside)[::-1].copy()).clamp_min(0)
        k = wanted(values)
        if 0 < k <= n // 2:
            T = diagonal.astype("float64"), beside.astype("float64")
            found = eigh_tridiagonal(*T, select="i", select_range=(n - k, n - 1))[1][:, ::-1]
            V = torch.from_numpy(found.copy()).to(C)
            V[1:] = torch.ormqr(torch.from_numpy(form[1:, : n - 1].copy()), torch.from_numpy(scales), V[1:])
            return V, values
    V, values = eigenvectors(C)
    return V[:, : wanted(values)], values


def eigenvectors(C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvectors [n, n] and eigenvalues of C [n, n], symmetric and positive, the largest first.

    In fp32 LAPACK may not converge where most eigenvalues are rounding errors; float64 has then been enough.
    """
    try:
        values, V = torch.linalg.eigh(C)
    except torch.linalg.LinAlgError:
        if C.dtype == torch.float64:
            raise
        values, V = (found.to(C.dtype) for found in torch.linalg.eigh(C.double()))
    return V.flip(1), values.flip(0).clamp_min(0)


def add_gram(C: torch.Tensor, x: torch.Tensor, block: int = 256) -> None:
    """C [d, d] += x^T x for x [n, d], on and below the diagonal only, which halves the cost.

    The sum is formed in blocks of columns, so some entries above the diagonal are written too; do not read them.
    """
    for start in range(0, C.shape[1], block):
        C[start:, start : start + block] += x[:, start:].T @ x[:, start : start + block]


def rank_for(values: torch.Tensor, energy: float) -> int:
    """How many of the eigenvalues, sorted descending, are needed to reach the share `energy` of their sum.

    Eigenvalues that are no larger than rounding errors are never counted.
    """
    real = int((values > values[0] * len(values) * torch.finfo(values.dtype).eps).sum())
    if energy >= 1:
        return real
    share = values.cumsum(0) / values.sum()
    return min(real, int((share < energy).sum()) + 1)


def from_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvectors [d, n] and eigenvalues of x^T x for x [n, d] with n < d, from the singular values of x."""
    _, singular, Vh = torch.linalg.svd(x, full_matrices=False)
    return Vh.T, singular.square()


def from_gram(x: torch.Tensor, wanted: Callable[[torch.Tensor], int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as `from_tokens`, but several times faster, from the leading eigenvectors of x x^T [n, n].

    wanted: how many, as in `leading_eigenvectors`. Less precise: singular values below 1e-8 of the largest are noise.
    """
    U, values = leading_eigenvectors(x @ x.T, wanted)
    return x.T @ (U / values[: U.shape[1]].sqrt().clamp_min(1e-8 * values[0].sqrt())), values


def leading(x0: torch.Tensor, tolerance: float = 1e-6, limit: int = 8) -> torch.Tensor:
    """Orthonormal directions [d, s] that span the inputs x0 [rows, d] of the first tokens, `limit` at most.

    There is one direction (s = 1) if every row starts with the same token.
    """
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
    V^T rounds its factors to TF32. Because the correction is small beside W, no more drift is left than in fp32, and
    it takes 0.59 of the time (H100, benchmarks/README.md). The product W V itself would lose too much by TF32.
    """
    drift = torch.addmm(A, W, V, beta=-1)
    with tf32(W.device):
        W.addmm_(drift, V.T, alpha=-1)


@contextmanager
def tf32(where: torch.device) -> Iterator[None]:
    """Context in which a GPU may use TF32: products of fp32 matrices round their factors to 10 bits of mantissa.

    On a CPU it changes nothing.
    """
    before = torch.get_float32_matmul_precision()
    if where.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Constraint:
    """Keeps the update dW of each chosen matrix from acting on the protected directions V of its input: dW V = 0.

    It works for full-parameter training and for LoRA, and needs fp32 weights. With LoRA, dW = s B A, so it is the
    matrix A that is projected: A <- A - (A V) V^T, from the first step on.
    """

    def __init__(self, modules: dict[str, nn.Module], bases: dict[str, Basis]):
        self.entries: list[tuple[str, nn.Linear, torch.Tensor, torch.Tensor]] = []
        moved: dict[str, torch.Tensor] = {}
        for name, module in modules.items():
            group = input_group(name)
            lora = getattr(module, "lora_A", None)
            for layer in [base_layer(module)] if lora is None else [A for A, _, _ in active_adapters(module)]:
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
        """Reduce each A to the rows of W that this rank holds; for FSDP2, once parameters have been sharded.

        W V of some rows of W is the same rows of A = W_0 V, so a rank needs no others.
        """
        self.entries = [(name, layer, V, local(spread(A, layer.weight))) for name, layer, V, A in self.entries]

    @torch.no_grad()
    def refit_(self, bases: dict[str, Basis]) -> None:
        """Protect the directions V of `bases` from now on, at the value A = W V of the current weights.

        What has changed along V so far stays changed, and directions that only the old V protected may change from
        now on. For full-parameter training only. Under FSDP2 each rank computes its own rows of A.
        """
        moved = {group: basis.V.to(self.entries[0][2].device) for group, basis in bases.items()}
        self.entries = [
            (name, layer, moved[input_group(name)], read_through(local(layer.weight), moved[input_group(name)]))
            for name, layer, *_ in self.entries
        ]

    def state_dict(self) -> dict[str, dict[str, torch.Tensor]]:
        """`V` by input and `A` by matrix, unsharded and on the CPU.

        All ranks must call it together, since the shards are gathered.
        """
        V = {input_group(name): V.cpu() for name, _, V, _ in self.entries}
        return {"V": V, "A": {name: gathered(A, layer.weight).cpu() for name, layer, _, A in self.entries}}

    def load_state_dict(self, state: dict[str, dict[str, torch.Tensor]]) -> None:
        """Restore what `state_dict` returned. Call it before `keep_own_rows`, since the stored A is unsharded."""
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
        """grad <- grad + 2 mu (W V - A) V^T, the gradient of the penalty mu ||(W - W_0) V||_F^2 (ours).

        With LoRA, W is the adapter's matrix A [r, d_in], whose pinned value is 0: the penalty is mu ||A V||_F^2.
        """
        for _, layer, V, A in self.entries:
            if layer.weight.grad is not None:
                drift = torch.addmm(A, local(layer.weight), V, beta=-1)  # W V - A, [d_out, k]
                local(layer.weight.grad).addmm_(drift, V.T, alpha=2 * mu)


def read_through(weight: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
    """W V [d_out, k], computed in float64: the weights are pinned to this value, so its error would stay in them."""
    return (weight.detach().double() @ V.double()).float()


def gathered(A: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """All rows of A, gathered from the ranks, each of which holds the rows of A that it holds of `weight`.

    All ranks must call it together.
    """
    if not hasattr(weight, "placements"):
        return A
    from torch.distributed.tensor import DTensor

    shape = torch.Size((weight.shape[0], A.shape[1]))
    shard = DTensor.from_local(A, weight.device_mesh, weight.placements, shape=shape, stride=(A.shape[1], 1))
    return whole(shard)
