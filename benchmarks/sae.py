"""Training the sparse autoencoder, against a plain PyTorch TopK autoencoder and EleutherAI's sparsify.

python -m benchmarks.sae [--d 576 --m 9216 --k 64 --batch 1024 --steps 30 --repeats 3]

In each repeat ours trains `steps` steps and every rival for as many seconds, its initialisation included, on tokens of
one synthetic sparse mixture and at one learning rate. sparsify is the fastest of the three libraries that the
project looked at (dictionary_learning and SAELens ran below plain PyTorch); `pip install -e '.[bench]'`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import runner
from benchmarks.runner import Skipped, clock, entry
from cwac.constraints.sae.autoencoder import RoutedSAE
from cwac.constraints.sae.fit import SAEConfig, train_sae
from cwac.models.hooks import normalize

RATE = 2e-3
"""Adam's for all: what `SAEConfig` takes for so few steps. The rivals' own are made for a hundred times as many."""


def measure(
    d: int = 576, m: int = 9216, k: int = 64, batch: int = 1024, steps: int = 30, repeats: int = 3
) -> Iterator[dict | Skipped]:
    """For every rival, tokens a second (theirs over ours) and FVU on held-out tokens after equal seconds (ours over
    theirs)."""
    rivals: dict[str, Callable[[int, int, int, Tensor], tuple[Callable, Callable]]] = {"plain PyTorch": plain}
    try:
        import sparsify  # noqa: F401

        rivals["sparsify"] = by_sparsify
    except ImportError:
        yield Skipped("SAE against sparsify", "not installed; pip install -e '.[bench]'")
    speed, fvu = {name: [] for name in rivals}, {name: [] for name in rivals}
    for seed in range(repeats):
        draw = mixture(d, m, seed)
        held = draw(4096)
        sae = RoutedSAE(d, m, k, [0], "layer:0")
        seconds, training = ours(sae, draw, SAEConfig(batch=batch, tokens=batch * steps, seed=seed))
        with torch.no_grad():
            error = unexplained(held, sae(held)[0])
        for name, make in rivals.items():
            step, reconstruct = make(d, m, k, draw(max(batch, 8192)))
            done, now = 0, clock()
            began = now()
            while (spent := now() - began) < seconds:
                step(draw(batch))
                done += 1
            speed[name].append((training / steps) / (spent / done))
            with torch.no_grad():
                fvu[name].append(error / unexplained(held, reconstruct(held)))
    size = f"d {d}, M {m}, k {k}, batches of {batch}"
    for name in rivals:
        bar = 1 / 1.6 if name == "sparsify" else None  # the fastest rival's alone
        yield entry(f"seconds a token of SAE training, {size}", name, np.array(speed[name]), bar)
        yield entry(f"FVU after as many seconds, {size}", name, np.array(fvu[name]), 1.0)


def ours(sae: RoutedSAE, draw: Callable[[int], Tensor], cfg: SAEConfig) -> tuple[float, float]:
    """Seconds of the whole training, and of its steps without the initialisation, which draws first."""
    now, drawn = clock(), []

    def recorded(n: int) -> Tensor:
        drawn.append(now())
        return draw(n).unsqueeze(1)

    began = now()
    train_sae(sae, recorded, cfg)
    ended = now()
    return ended - began, ended - drawn[1]


def plain(d: int, m: int, k: int, first: Tensor) -> tuple[Callable[[Tensor], None], Callable[[Tensor], Tensor]]:
    """TopK as RouteSAE's code has it: scatter into [N, M] and a dense decoder; unit rows every 10 steps.

    Kinder than that: b_pre starts at the data mean, the encoder at the decoder.
    """
    encoder, decoder = nn.Linear(d, m), nn.Linear(m, d)
    with torch.no_grad():
        encoder.bias.zero_()
        decoder.bias.copy_(first.mean(0))
        decoder.weight.copy_(nn.functional.normalize(encoder.weight).T)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=RATE)
    steps = 0

    def reconstruct(x: Tensor) -> Tensor:
        top = encoder(x - decoder.bias).topk(k, dim=-1)
        return decoder(torch.zeros(len(x), m).scatter(-1, top.indices, top.values.relu()))

    def step(x: Tensor) -> None:
        nonlocal steps
        loss = ((x - reconstruct(x)).pow(2).sum(-1) / x.pow(2).sum(-1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
        if steps % 10 == 0:
            with torch.no_grad():
                decoder.weight.div_(decoder.weight.norm(dim=0))

    return step, reconstruct


def by_sparsify(d: int, m: int, k: int, first: Tensor) -> tuple[Callable[[Tensor], None], Callable[[Tensor], Tensor]]:
    """The step of sparsify's own trainer, with its Adam."""
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(d, SparseCoderConfig(num_latents=m, k=k))
    coder.b_dec.data.copy_(first.mean(0))
    optimizer = torch.optim.Adam(coder.parameters(), lr=RATE)

    def step(x: Tensor) -> None:
        coder.set_decoder_norm_to_unit_norm()
        coder(x).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()

    return step, lambda x: coder(x).sae_out


def mixture(d: int, m: int, seed: int, active: int = 32) -> Callable[[int], Tensor]:
    """Draws [N, d] of normalised sums of `active` of m random directions, the early ones more often, and a mean."""
    g = torch.Generator().manual_seed(seed)
    directions, mean = torch.randn(m, d, generator=g), 4 * torch.randn(d, generator=g)

    def draw(n: int) -> Tensor:
        chosen = (m * torch.rand(n, active, generator=g) ** 2).long()
        weights = torch.rand(n, active, generator=g)
        x = nn.functional.embedding_bag(chosen, directions, per_sample_weights=weights, mode="sum")
        return normalize(x + mean)[0]

    return draw


def unexplained(x: Tensor, y: Tensor) -> float:
    """Fraction of variance unexplained."""
    return ((x - y).pow(2).sum() / (x - x.mean(0)).pow(2).sum()).item()


if __name__ == "__main__":
    sys.exit(runner.main(measure))
