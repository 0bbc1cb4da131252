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

from cwac.constraints.subspace import Basis, add_gram, capture
from cwac.data.tokenize import Collator
from cwac.models.layers import base_layer, evaluating, input_group

BASES = ("rows", "complement", "benign", "gradient")
TENSORS, REPORT = "nullspace.safetensors", "nullspace.json"


def orthogonal_complement(V: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns [d, d - r] that span what V [d, r], orthonormal, leaves; in V's dtype."""
    d, r = V.shape
    Q = torch.linalg.qr(V, mode="complete")[0][:, r:]
    return Q.sub_(V @ (V.T @ Q)) if 0 < r < d else Q


def leading_free(V: torch.Tensor, moment: torch.Tensor | None, k: int | None, seed: str = "0") -> torch.Tensor:
    """N [d, k], fp32: k orthonormal directions orthogonal to V [d, r], those with the largest n^T moment n.

    moment: [d, d], symmetric and positive; None draws directions by `seed`. k: at most d - r; None for all of them.
    """
    free = orthogonal_complement(V.float())  # [d, m]
    m = free.shape[1]
    k = m if k is None else min(k, m)
    if k == 0:
        return free[:, :0]
    if moment is not None:
        inside = free.T @ (moment.to(free) @ free)
        turn = torch.linalg.eigh(inside)[1].flip(1)[:, :k]
    elif k < m:
        draw = torch.Generator().manual_seed(random.Random(seed).getrandbits(62))
        turn = torch.linalg.qr(torch.randn(m, k, generator=draw).to(free))[0]
    else:
        return clean(free, V)
    return clean(free @ turn, V)


def clean(N: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
    """N without what rounding left along V: in float64, and then rounded to fp32 once."""
    N, V = N.double(), V.double()
    return (N - V @ (V.T @ N)).float().contiguous()


@torch.no_grad()
def second_moments(
    model: nn.Module, rows: Sequence[dict], modules: Mapping[str, nn.Module]
) -> dict[str, torch.Tensor]:
    """X^T X [d_in, d_in] of each module's inputs on `rows`, first tokens left out, summed in float64."""
    where = next(model.parameters()).device
    dims = {name: base_layer(m).in_features for name, m in modules.items()}
    C = {name: torch.zeros(d, d, dtype=torch.float64, device=where) for name, d in dims.items()}
    capture(model, rows, dict(modules), lambda name, x, _first: add_gram(C[name], x.float()))
    for c in C.values():
        c.tril_()
        c += c.tril(-1).T
    return C


def gradient_moments(
    model: nn.Module, rows: Sequence[dict], modules: Mapping[str, nn.Module], batch_size: int = 4
) -> dict[str, torch.Tensor]:
    """Input name -> sum over batches and over the matrices that read it of G^T G, G [d_out, d_in] a batch's gradient.

    rows: with labels. modules: by their own name. G is dy^T x, so that the weights need no gradient of their own and
    may be held in 4 bits.
    """
    where = next(model.parameters()).device
    moments: dict[str, torch.Tensor] = {}

    def watch(name: str):
        group = input_group(name)

        def forward(_module, inputs, output):
            x = inputs[0].detach().flatten(0, -2).float()  # [tokens, d_in]

            def backward(dy: torch.Tensor) -> None:
                G = dy.detach().flatten(0, -2).float().T @ x
                if group not in moments:
                    moments[group] = torch.zeros(len(x.T), len(x.T), device=where)
                moments[group] += G.T @ G

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


def fit_free(
    bases: Mapping[str, Basis],
    moments: Mapping[str, torch.Tensor] | None,
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
