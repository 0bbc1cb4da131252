#!/usr/bin/env bash
# torch.linalg.eigh on a CPU: can it fail on a finite, symmetric, positive semidefinite float32 matrix of a few hundred rows?
#
# Guess (95 %): no; the symmetric eigenproblem is LAPACK's safest, and a rank-deficient matrix is no special case.
# What happens: on Gram matrices x x^T of rank 32 in 336 rows, of which 206 are zero and the others span many orders of
#   magnitude, it raises LinAlgError ("failed to converge") for every one of 20 seeds; eigvalsh does for about a third.
#   NumPy's and SciPy's float32 eigh take all of them, as torch does in float64, without the zero rows, or with 1e-7 of
#   the largest entry added to the diagonal. The torch wheel brings MKL's LAPACK, NumPy and SciPy bring OpenBLAS's.
# Versions: torch 2.13.0 (MKL 2024.2), numpy 2.4.6, scipy 1.17.1, on x86-64.
# Who meets it: whoever decomposes second moments of gradients in float32 (GaLore, Shampoo, GPM, null-space projections):
#   padded or unlabelled tokens give the zero rows, and small gradients the range. Catch the error and go to float64.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -qq --no-compile torch==2.13.0 numpy==2.4.6 scipy==1.17.1
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
cat > "$dir/check.py" <<'PY'
import numpy as np
import scipy.linalg
import torch


def gram(seed, rows=336, width=384, rank=32, used=130):
    draw = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, rank, generator=draw) * torch.logspace(1, -18, rank)
    scale = torch.zeros(rows)
    scale[torch.randperm(rows, generator=draw)[:used]] = 10 ** (-20 * torch.rand(used, generator=draw))
    right = torch.linalg.qr(torch.randn(width, rank, generator=draw))[0]
    x = left * scale[:, None] @ right.T
    return x @ x.T, scale > 0


def failed(act):
    try:
        act()
    except (torch.linalg.LinAlgError, np.linalg.LinAlgError):
        return 1
    return 0


SEEDS = 20
count = {}
for seed in range(SEEDS):
    c, used = gram(seed)
    assert c.isfinite().all() and torch.equal(c, c.T)
    ridge = 1e-7 * c.max() * torch.eye(len(c))
    ways = {
        "torch eigh, float32": lambda: torch.linalg.eigh(c),
        "torch eigvalsh, float32": lambda: torch.linalg.eigvalsh(c),
        "torch eigh, float64": lambda: torch.linalg.eigh(c.double()),
        "torch eigh, float32, without the zero rows": lambda: torch.linalg.eigh(c[used][:, used]),
        "torch eigh, float32, with a ridge": lambda: torch.linalg.eigh(c + ridge),
        "numpy eigh, float32": lambda: np.linalg.eigh(c.numpy()),
        "scipy eigh, float32": lambda: scipy.linalg.eigh(c.numpy()),
    }
    for name, act in ways.items():
        count[name] = count.get(name, 0) + failed(act)
for name, n in count.items():
    print(f"{name}: {n} of {SEEDS} failed to converge")
assert count.pop("torch eigh, float32") >= SEEDS // 2
assert 0 < count.pop("torch eigvalsh, float32") < SEEDS
assert not any(count.values())
PY
cd "$dir"
if ! venv/bin/python check.py > said.txt 2> errors.txt; then
    cat said.txt errors.txt
    exit 1
fi
cat said.txt
echo "observed as described"
