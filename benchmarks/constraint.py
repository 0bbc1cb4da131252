"""The weight constraint at Llama-2-7B's down_proj: W -= (W V - A) V^T and finding V, against Eqs. 13-15 as written.

python -m benchmarks.constraint [--rank 1024 --repeats 3]        the projection: W is 4096 x 11008, fp32
python -m benchmarks.constraint --d 2752 --tokens 2000           the subspace at another size
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import runner
from benchmarks.runner import entry, paired
from cwac.constraints.subspace import capture, fit_subspace, project_, rank_for
from cwac.models.layers import linears

D_IN = 11008
"""Of Llama-2-7B's down_proj's input; its output has 4096."""


def measure(
    d_in: int = D_IN,
    d_out: int = 4096,
    rank: int = 1024,
    repeats: int = 3,
    d: int = D_IN // 8,
    tokens: int = 1000,
    layers: int = 30,
    anchor_tokens: int = 17280,
) -> Iterator[dict]:
    """Rows of the projection (W [d_out, d_in], V [d_in, rank]), of one layer's V, and of all of SmolLM2's.

    d, tokens: of the subspace against the full SVD, whose bar is for 11008 and 8,000. layers, anchor_tokens: of
    SmolLM2 and its anchor pool.
    """
    yield from projection(d_in, d_out, rank, repeats)
    yield from subspace(d, tokens, repeats)
    yield all_layers(layers, anchor_tokens)


def projection(d_in: int, d_out: int, rank: int, repeats: int) -> Iterator[dict]:
    """The rival forms Pi = I - V V^T once, outside the measured time, and multiplies each update by it (Eq. 15)."""
    V = torch.linalg.qr(torch.randn(d_in, rank))[0]
    W = torch.randn(d_out, d_in)
    A, Pi = W @ V, torch.eye(d_in).addmm_(V, V.T, alpha=-1)
    update, projected = torch.randn(d_out, d_in), torch.empty(d_out, d_in)
    sizes = f"W {d_out} x {d_in}, rank {rank}"
    measured = paired(lambda: project_(W, V, A), lambda: torch.mm(update, Pi, out=projected), repeats)
    yield entry(f"constraint of one matrix, {sizes}", "dense product with Pi", measured, 1 / 5)
    yield entry(f"memory of V and A, {sizes}", "memory of Pi", (V.nbytes + A.nbytes) / Pi.nbytes, 0.15)


def subspace(d: int, tokens: int, repeats: int) -> Iterator[dict]:
    """V of one layer's input, from the forward pass on: `fit_subspace`, the rival in fp32 throughout.

    Then what no implementation by LAPACK's eigenvectors goes below: those of X X^T in fp32 alone.
    """
    model, rows = block(1, 64, d), random_rows(tokens, 100)
    module = linears(model, ["down_proj"])

    def full_svd() -> None:
        C = torch.zeros(d, d)
        capture(model, rows, module, lambda _name, x, _first: C.addmm_(x.T, x))
        U, values, _ = torch.linalg.svd(C)
        U[:, rank_for(values, 0.99) :].contiguous()

    rival, sizes = "full SVD of C in fp32", f"d {d}, {tokens} tokens"
    measured = paired(lambda: fit_subspace(model, rows, ["down_proj"]), full_svd, repeats)
    yield entry(f"subspace of one layer, {sizes}", rival, measured, 1 / 10)
    X = torch.randn(tokens, d)
    gram = X @ X.T
    measured = paired(lambda: torch.linalg.eigh(gram), full_svd, repeats)
    yield entry(f"eigenvectors of X X^T alone, {sizes}", rival, measured)


def all_layers(layers: int, tokens: int, seconds: float = 30.0) -> dict:
    """V of every down_proj of a model of SmolLM2's shape with random weights, in shares of the time allowed.

    The bar is of a machine, not of a thread: wall-clock, on all cores. 24 tokens of a row are the template's, as in
    SmolLM2's anchors.
    """
    model, rows = block(layers, 576, 1536), random_rows(tokens, 60, shared=24)
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    began = time.perf_counter()
    fit_subspace(model, rows, ["down_proj"])
    took = time.perf_counter() - began
    torch.set_num_threads(threads)
    return entry(f"subspaces of {layers} layers, d 1536, {tokens} tokens", f"{seconds:g} s", took / seconds, 1.0)


def block(layers: int, hidden: int, width: int) -> LlamaForCausalLM:
    """A random Llama whose down_proj reads `width` dimensions, with a vocabulary that costs nothing."""
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config)


def random_rows(tokens: int, length: int, shared: int = 0, words: int = 1000) -> list[dict]:
    """Rows of `length` random tokens below `words`, the first `shared` of which are the same in all."""
    opening = torch.randint(words, (shared,)).tolist()
    later = [torch.randint(words, (length - shared,)).tolist() for _ in range(tokens // length)]
    return [{"input_ids": opening + row} for row in later]


if __name__ == "__main__":
    sys.exit(runner.main(measure))
