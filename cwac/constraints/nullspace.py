"""Directions that no anchor uses: orthonormal bases of the null space of the anchors' activations.

With V [d_in, r] the directions of one input on the anchors (cwac/constraints/subspace.py) and N [d_in, k] orthonormal
with N^T V = 0, every update dW = C N^T leaves W V as it was, whatever C [d_out, k] is. Which k directions of the null
space:

- `rows`: those that carry most of the inputs' squared norm on rows that will be trained on. InfLoRA (Liang, Li,
  CVPR 2024, arXiv:2404.00228) chooses its frozen matrix so, from a new task's inputs without those of old tasks
  (cwac/methods/inflora.py has its very rule).
- `benign`: the same on harmless instructions, which no training row decides on.
- `gradient`: leading right singular vectors of the gradients at the start, without what they have along V; GPM (Saha,
  Garg, Roy, ICLR 2021, arXiv:2103.09762) projects gradients so, at each step.
- `complement`: drawn at random from the null space, as LoRA-FA (arXiv:2308.03303) draws from all of R^d_in.

With k = None they span the same space, which is all of it, each in its own coordinates.

Deviations: all of it is `ours` but for what is cited; from InfLoRA, V comes of anchors and not of earlier tasks.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from cwac.constraints.subspace import Basis, Moment, capture, eigenvectors, from_gram
from cwac.data.tokenize import Collator
from cwac.models.layers import base_layer, evaluating, input_group

FEW = 0.25
"""Share of the null space's dimensions up to which directions are found without a basis of all of it (ours)."""

BASES = ("rows", "complement", "benign", "gradient")
TENSORS, REPORT = "nullspace.safetensors", "nullspace.json"


def orthogonal_complement(V: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns [d, d - r] that span what V [d, r], orthonormal, leaves; in V's dtype."""
    d, r = V.shape
    Q = torch.linalg.qr(V, mode="complete")[0][:, r:]
    return Q.sub_(V @ (V.T @ Q)) if 0 < r < d else Q


def leading_free(
    V: torch.Tensor, moment: torch.Tensor | Moment | None, k: int | None, seed: str = "0"
) -> torch.Tensor:
    """N [d, k], fp32: k orthonormal directions orthogonal to V [d, r], those with the largest n^T moment n.

    moment: [d, d], symmetric and positive; None draws directions by `seed`. k: at most d - r; None for all of them.
    Few directions (`FEW`) are found without a basis of the others.
    """
    V = V.float()
    m = V.shape[0] - V.shape[1]
    k = m if k is None else min(k, m)
    if k == 0:
        return V.new_zeros(len(V), 0)
    if moment is None and k < m:
        return clean(drawn_free(V, k, seed), V)
    X = moment.X if isinstance(moment, Moment) else None
    if X is not None and len(X) < m and k <= FEW * m:
        N = leading_outside(V, X, k)
        missing = k - N.shape[1]
        if missing:  # the moment has fewer directions outside V
            N = torch.cat([N, drawn_free(torch.linalg.qr(torch.cat([V, N], 1))[0], missing, seed)], 1)
        return clean(N, V)
    free = orthogonal_complement(V)  # [d, m]
    if moment is None:
        return clean(free, V)
    C = moment.C if isinstance(moment, Moment) else moment
    inside = free.T @ (C.to(free) @ free)
    return clean(free @ eigenvectors(inside)[0][:, :k], V)


def drawn_free(V: torch.Tensor, k: int, seed: str) -> torch.Tensor:
    """k orthonormal directions [d, k], drawn uniformly by `seed` from what V [d, r] leaves.

    They are `orthogonal_complement(V) @ turn`, turn [d - r, k], with the reflections of V's QR decomposition applied
    to k columns and not to all d - r.
    """
    d, r = V.shape
    draw = torch.Generator().manual_seed(random.Random(seed).getrandbits(62))
    turn = torch.linalg.qr(torch.randn(d - r, k, generator=draw).to(V))[0]
    if r == 0:
        return turn
    reflections, scales = torch.geqrf(V)
    return torch.ormqr(reflections, scales, torch.cat([V.new_zeros(r, k), turn]))


def leading_outside(V: torch.Tensor, X: torch.Tensor, k: int) -> torch.Tensor:
    """The k orthonormal directions [d, k] outside V [d, r] that rows X [n, d] use most, or as many as they have."""
    Y = X.to(V)
    N, _ = from_gram(Y - (Y @ V) @ V.T, lambda _: min(k, len(Y)))
    return orthonormal_outside(N, V)


def orthonormal_outside(N: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
    """Columns [d, at most k] of N [d, k], orthonormal up to rounding, made so, and orthogonal to V [d, r].

    It ends before the first column that is rounding error: one of V's span, or one of the columns before it.
    """
    N, R = torch.linalg.qr(N - V @ (V.T @ N))
    own = R.diagonal().abs() > 0.5  # 1, or rounding error
    return N[:, : int(own.cumprod(0).sum())]


def clean(N: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
    """N without what rounding left along V: in float64, and then rounded to fp32 once."""
    N, V = N.double(), V.double()
    return (N - V @ (V.T @ N)).float().contiguous()


@torch.no_grad()
def second_moments(model: nn.Module, rows: Sequence[dict], modules: Mapping[str, nn.Module]) -> dict[str, Moment]:
    """X^T X of each module's inputs X [tokens, d_in] on `rows`, first tokens left out."""
    found = {name: Moment(base_layer(m).in_features) for name, m in modules.items()}
    capture(model, rows, dict(modules), lambda name, x, _first: found[name].add(x.float()))
    return found


def gradient_moments(
    model: nn.Module, rows: Sequence[dict], modules: Mapping[str, nn.Module], batch_size: int = 4
) -> dict[str, Moment]:
    """Input name -> sum over batches and over the matrices that read it of G^T G, G [d_out, d_in] a batch's gradient.

    rows: with labels. modules: by their own name. G is dy^T x, so that the weights need no gradient of their own and
    may be held in 4 bits. With fewer tokens than d_out it is summed as that of (dy dy^T)^(1/2) x [tokens, d_in].
    """
    where = next(model.parameters()).device
    moments: dict[str, Moment] = {}

    def watch(name: str):
        group = input_group(name)

        def forward(_module, inputs, output):
            x = inputs[0].detach().flatten(0, -2).float()  # [tokens, d_in]

            def backward(dy: torch.Tensor) -> None:
                dy = dy.detach().flatten(0, -2).float()
                moments.setdefault(group, Moment(x.shape[1])).add((root(dy) if len(dy) < dy.shape[1] else dy.T) @ x)

            output.register_hook(backward)

        return forward

    handles = [module.register_forward_hook(watch(name)) for name, module in modules.items()]
    handles.append(model.get_input_embeddings().register_forward_hook(lambda *a: a[2].requires_grad_()))
    trained = [p for p in model.parameters() if p.requires_grad]
    collate = Collator(0)
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with evaluating(model), torch.enable_grad():
            for start in range(0, len(rows), batch_size):
                batch = collate([{k: r[k] for k in ("input_ids", "labels")} for r in rows[start : start + batch_size]])
                model(**{k: t.to(where) for k, t in batch.items()}, use_cache=False).loss.backward()
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
    return moments


def root(dy: torch.Tensor) -> torch.Tensor:
    """(dy dy^T)^(1/2) [n, n] of dy [n, d_out]."""
    values, U = torch.linalg.eigh(dy.double() @ dy.double().T)
    return ((U * values.clamp_min(0).sqrt()) @ U.T).to(dy)


def fit_free(
    bases: Mapping[str, Basis],
    moments: Mapping[str, torch.Tensor | Moment] | None,
    k: int | None,
    seed: str = "0",
    progress: bool = True,
) -> dict[str, torch.Tensor]:
    """Input name -> N [d_in, at most k]; inputs that V fills are left out. See `leading_free`."""
    found = {}
    for name, basis in tqdm(bases.items(), desc="null space", unit="input", disable=not progress):
        if basis.rank < basis.dim:
            moment = None if moments is None else moments[name]
            V = basis.V if moment is None else basis.V.to(moment.device)
            found[name] = leading_free(V, moment, k, f"{seed}-{name}").cpu()
    return found


@torch.no_grad()
def energy_held(
    model: nn.Module, rows: Sequence[dict], bases: Mapping[str, Basis], modules: Mapping[str, nn.Module]
) -> float:
    """Share of the squared norm of `rows`' inputs that V holds, first tokens left out; the least over the inputs.

    rows: encoded prompts. modules: input name, as in `bases`, -> a matrix that reads it.
    """
    where = next(model.parameters()).device
    V = {name: basis.V.to(where) for name, basis in bases.items()}
    inside, total = dict.fromkeys(bases, 0.0), dict.fromkeys(bases, 0.0)

    def visit(name: str, x: torch.Tensor, _first: torch.Tensor) -> None:
        inside[name] += float((x.float() @ V[name]).double().square().sum())
        total[name] += float(x.double().square().sum())

    capture(model, rows, {name: modules[name] for name in bases}, visit)
    return min(inside[name] / total[name] for name in bases)


def save_free(found: Mapping[str, torch.Tensor], certificate: Mapping[str, float], folder: Path) -> None:
    save_file({name: N.contiguous() for name, N in found.items()}, folder / TENSORS)
    ranks = {name: N.shape[1] for name, N in found.items()}
    (folder / REPORT).write_text(json.dumps({"certificate": dict(certificate), "rank": ranks}, indent=1))


def load_free(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """N by input name, and the certificate."""
    return load_file(folder / TENSORS), json.loads((folder / REPORT).read_text())["certificate"]
