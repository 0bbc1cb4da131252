"""What CWAC adds to a training step of SmolLM2's shape: time, memory, and the parts that were made cheap.

python -m benchmarks.steps [--steps 6 --tokens 512 --labels 128] [overrides]

Weights are random at `model.shape`, rows are random tokens and CWAC is rehearsed (experiments/cost.py): a step's cost
depends on shapes alone, and so nothing has to be downloaded, fitted or aligned first.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence

import torch
from omegaconf import DictConfig

from benchmarks import runner
from benchmarks.methods import ratios
from benchmarks.runner import entry, paired
from cwac import config
from cwac.engine import MethodTrainer, build_trainer
from cwac.methods.base import Sizes
from cwac.models import decoder_layers, device
from cwac.sae import RoutedSAE, SAEConfig, SafetyTarget, slots_of
from experiments.cost import Row, build, estimate, rehearsed, shape

BARS = {"cwac": (1.10, 1.05), "cwac_closed": (1.20, None)}
"""Of time and of peak memory, in SFT's: down_proj alone, and every matrix."""

PROMPTS = Sizes(prompt_tokens=42, shared_tokens=24)
"""SmolLM2's requests of the step pool of conf/pools/real.yaml: 42.1 tokens on average (at most 55), of which the first
24 are the template's and its system turn's."""

EVERY = 4
"""`method.weight.every` of the row beside the default's."""


def measure(
    steps: int = 6, tokens: int = 512, labels: int = 128, repeats: int = 7, overrides: Sequence[str] = ()
) -> Iterator[dict]:
    """Rows of the step, its memory, label-only logits, and the forward pass of L_safety.

    steps: optimizer steps of each trainer, the first left out. tokens, labels: of the one row of a batch, and how many
    of them carry a label. repeats: pairs of forward passes.
    """
    row = Row(tokens, labels, PROMPTS)

    def of(method: str, *more: str) -> DictConfig:
        return config.compose(
            [
                "model=smollm2",
                "task=sst2",
                "train.per_device_train_batch_size=1",
                *overrides,
                f"method={method}",
                *more,
            ]
        )

    sft = of("sft")
    plain = estimate(sft, shape(sft), row)
    batch = f"1 x {tokens} tokens, {labels} of them labels"
    for name, (time, memory) in BARS.items():
        with tempfile.TemporaryDirectory() as folder:
            pair = [trainer(of(name), row, steps, folder), trainer(sft, row, steps, folder)]
            yield entry(f"step of {name}, {batch}; 4 harmful prompts", "step of sft", ratios(pair, 1), time)
        counted = estimate(of(name), shape(sft), row)
        flops = counted.flops / plain.flops  # what no implementation of these products can beat at equal speed
        yield entry(f"FLOPs of a step of {name}, counted", "FLOPs of a step of sft, counted", flops)
        memory_ratio = counted.total / plain.total
        yield entry(f"peak memory of {name}, counted", "peak memory of sft, counted", memory_ratio, memory)
    with tempfile.TemporaryDirectory() as folder:
        rarer = of("cwac", f"method.weight.every={EVERY}")
        pair = [trainer(cfg, row, 1 + 2 * EVERY, folder) for cfg in (rarer, sft)]
        name = f"step of cwac, projected every {EVERY} steps, {batch}; 4 harmful prompts"
        yield entry(name, "step of sft", ratios(pair, 1, EVERY))
    with tempfile.TemporaryDirectory() as folder:
        pair = [trainer(sft, row, steps, folder) for _ in range(2)]
        pair[1].label_logits = False
        yield entry(f"step of sft, {batch}: logits where a label is", "logits at every token", ratios(pair, 1))
    yield forward(of("cwac"), repeats)


def trainer(cfg: DictConfig, row: Row, steps: int, folder: str) -> MethodTrainer:
    """The trainer of a rehearsed run, ready to train."""
    args, model, method, rows = rehearsed(cfg, shape(cfg), row, steps, folder)
    return build_trainer(model, method, rows, args, 0)


def forward(cfg: DictConfig, repeats: int) -> dict:
    """L_safety on its harmful prompts against a whole forward pass of them, both with a graph for the backward pass.

    The rival computes logits at the last token alone, so that what is compared is blocks and the shared opening.
    """
    model, activation = build(cfg, shape(cfg), device()), cfg.method.activation
    settings = SAEConfig(**activation.sae)
    d, slots = model.config.hidden_size, slots_of(model, settings.slots)
    sae = RoutedSAE(d, settings.m or 8 * d, settings.latents(d), slots, settings.router).requires_grad_(False)
    for parameter in sae.parameters():
        parameter.fill_(1 / d)
    n, length = activation.n_prompts, PROMPTS.prompt_tokens
    given = (activation.n_latents, n, length, activation.gate, PROMPTS.shared_tokens)
    target = SafetyTarget.stand_in(sae.to(device()), *given)
    ids = torch.ones(n, length, dtype=torch.long, device=device())

    def whole() -> None:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, logits_to_keep=1)

    measured = paired(lambda: target.loss(model, range(n)), whole, repeats)
    layers, read = len(decoder_layers(model)), slots[target.used[-1]]
    name = f"L_safety of {n} harmful prompts of {length} tokens, read after block {read} of {layers}"
    return entry(name, "forward pass of the same prompts", measured, read / layers)


if __name__ == "__main__":
    sys.exit(runner.main(measure))
