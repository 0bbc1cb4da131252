"""What CWAC adds to a training step of SmolLM2's shape: time, memory, and the parts that were made cheap.

python -m benchmarks.steps [--steps 6 --tokens 512 --labels 128] [overrides]

Weights are random at `model.shape`, rows are random tokens and CWAC is set up with stand-ins (experiments/cost.py): a
step's cost depends on shapes alone, and so nothing has to be downloaded, fitted or aligned first.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence

import torch
from omegaconf import DictConfig
from transformers import PretrainedConfig, Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from benchmarks import runner
from benchmarks.methods import ratios
from benchmarks.runner import entry, paired
from cwac.constraints.sae.autoencoder import RoutedSAE
from cwac.constraints.sae.fit import SAEConfig
from cwac.constraints.sae.target import SafetyTarget
from cwac.core import config
from cwac.data.tokenize import Collator
from cwac.methods.base import Sizes
from cwac.models.hooks import layers_of
from cwac.models.layers import decoder_layers, device
from cwac.training.engine import MethodTrainer, build_trainer
from experiments.cost import Row, build, estimate, random_run, shape

BARS = {"cwac": (1.10, 1.05), "cwac_closed": (1.20, None)}
"""Of time and of peak memory, in SFT's: down_proj alone, and every matrix."""

STOCK = "of sft by transformers' Trainer"
"""The rival that the field uses: logits at every token. Ours computes those that are trained on, for every method."""

PROMPTS = Sizes(prompt_tokens=42, shared_tokens=24)
"""SmolLM2's requests of the step pool of conf/pools/real.yaml: 42.1 tokens on average (at most 55), of which the first
24 are the template's and its system turn's."""

EVERY = 4
"""`method.weight.project_every` of the row beside the default's."""


def measure(
    steps: int = 6, tokens: int = 512, labels: int = 128, repeats: int = 7, overrides: Sequence[str] = ()
) -> Iterator[dict]:
    """Rows of the step and its memory against both ways to do SFT, label-only logits, and L_safety's forward pass.

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
    stocks = estimate(sft, shape(sft), Row(tokens, tokens, PROMPTS))
    batch = f"1 x {tokens} tokens, {labels} of them labels"
    for name, (time, memory) in BARS.items():
        for rival, make in (("step of sft", trainer), (f"step {STOCK}", stock)):
            with tempfile.TemporaryDirectory() as folder:
                pair = [trainer(of(name), row, steps, folder), make(sft, row, steps, folder)]
                yield entry(f"step of {name}, {batch}; 4 harmful prompts", rival, ratios(pair, 1), time)
        counted = estimate(of(name), shape(sft), row)
        flops = counted.flops / plain.flops  # what no implementation of these products can beat at equal speed
        yield entry(f"FLOPs of a step of {name}, counted", "FLOPs of a step of sft, counted", flops)
        for rival, theirs in (("of sft", plain), (STOCK, stocks)):
            share = counted.total / theirs.total
            yield entry(f"peak memory of {name}, counted", f"peak memory {rival}, counted", share, memory)
    with tempfile.TemporaryDirectory() as folder:
        rarer = of("cwac", f"method.weight.project_every={EVERY}")
        pair = [trainer(cfg, row, 1 + 2 * EVERY, folder) for cfg in (rarer, sft)]
        name = f"step of cwac, projected every {EVERY} steps, {batch}; 4 harmful prompts"
        yield entry(name, "step of sft", ratios(pair, 1, EVERY))
    with tempfile.TemporaryDirectory() as folder:
        pair = [trainer(sft, row, steps, folder), stock(sft, row, steps, folder)]
        yield entry(f"step of sft, {batch}: logits where a label is", f"step {STOCK}", ratios(pair, 1))
    yield forward(of("cwac"), repeats)


def trainer(cfg: DictConfig, row: Row, steps: int, folder: str) -> MethodTrainer:
    """The trainer of a random run, ready to train."""
    args, model, method, rows = random_run(cfg, shape(cfg), row, steps, folder)
    return build_trainer(model, method, rows, args, 0)


def stock(cfg: DictConfig, row: Row, steps: int, folder: str, architecture: PretrainedConfig | None = None) -> Trainer:
    """transformers' own Trainer on the same kind of model, rows and arguments; architecture: another than `cfg`'s."""
    args, model, _, rows = random_run(cfg, architecture or shape(cfg), row, steps, folder)
    trainer = Trainer(model=model, args=args, train_dataset=rows, data_collator=Collator(0))
    trainer.remove_callback(PrinterCallback)  # what it prints would be part of its time
    trainer.remove_callback(ProgressCallback)
    return trainer


def forward(cfg: DictConfig, repeats: int) -> dict:
    """L_safety on its harmful prompts against a whole forward pass of them, both with a graph for the backward pass.

    The rival computes logits at the last token alone, so that what is compared is blocks and the shared opening.
    """
    model, activation = build(cfg, shape(cfg), device()), cfg.method.activation
    settings = SAEConfig(**activation.sae)
    d, readable = model.config.hidden_size, layers_of(model, settings.layers)
    sae = RoutedSAE(d, settings.m or 8 * d, settings.latents(d), readable, settings.router).requires_grad_(False)
    for parameter in sae.parameters():
        parameter.fill_(1 / d)
    n, length = activation.n_prompts, PROMPTS.prompt_tokens
    given = (activation.n_latents, n, length, activation.gate, PROMPTS.shared_tokens)
    target = SafetyTarget.stand_in(sae.to(device()), *given)
    ids = torch.ones(n, length, dtype=torch.long, device=device())

    def whole() -> None:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, logits_to_keep=1)

    measured = paired(lambda: target.loss(model, range(n)), whole, repeats)
    layers, read = len(decoder_layers(model)), readable[target.used[-1]] + 1
    name = f"L_safety of {n} harmful prompts of {length} tokens, read after block {read} of {layers}"
    return entry(name, "forward pass of the same prompts", measured, read / layers)


if __name__ == "__main__":
    sys.exit(runner.main(measure))
