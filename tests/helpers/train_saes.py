"""Small sparse autoencoders of a model's residual stream, trained and saved by SAELens and by sparsify.

`python -m tests.helpers.train_saes --library saelens|sparsify --model FOLDER --layer 15 --out FOLDER` trains one on
the text of this repository's own pages: enough to be one of that model, not to be good. Needs sae-lens (6.54.12 was
run) or eai-sparsify (1.3.3).
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

PAGES = Path(__file__).parents[2] / "docs"
LENGTH, BATCH = 128, 512
"""Tokens of a chunk of text, and activations of a step (SAELens)."""


def chunks(tokenizer, tokens: int) -> Tensor:
    """Token ids [tokens // LENGTH, LENGTH] of the pages, one after another."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(PAGES.glob("*.md")))
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0, : tokens - tokens % LENGTH]
    return ids.view(-1, LENGTH)


@torch.no_grad()
def outputs(model, ids: Tensor, layer: int) -> Tensor:
    """Outputs [N, d] of decoder block `layer`, counted from 0, as transformers itself gives them.

    The first token of a chunk is left out: its norm is many times that of the others, as everywhere.
    """
    found = [model(input_ids=row[None], output_hidden_states=True).hidden_states[layer + 1][0, 1:] for row in ids]
    return torch.cat(found).float()


def saelens(x: Tensor, layer: int, m: int, k: int, tokens: int, out: Path) -> None:
    """A TopK SAE by `SAETrainer`, on the activations x [N, d], saved in `out`."""
    from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig

    def batches() -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        while True:
            yield x[torch.randint(len(x), (BATCH,), generator=generator)]

    torch.manual_seed(0)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=x.shape[1], d_sae=m, k=k, device="cpu"))
    sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name = "SmolLM2-135M", f"blocks.{layer}.hook_resid_post"
    settings = SAETrainerConfig(
        total_training_samples=tokens,
        train_batch_size_samples=BATCH,
        lr=1e-3,
        lr_end=1e-3,
        logger=LoggingConfig(log_to_wandb=False),
    )
    SAETrainer(cfg=settings, sae=sae, data_provider=batches()).fit().save_inference_model(out)


def sparsify(model, ids: Tensor, layer: int, m: int, k: int, tokens: int, out: Path) -> None:
    """A TopK one by sparsify's `Trainer`, which runs the model itself; saved as `out`/smollm2/layers.N."""
    from datasets import Dataset
    from sparsify import SparseCoderConfig, TrainConfig, Trainer

    rows = list(itertools.islice(itertools.cycle(ids.tolist()), tokens // LENGTH))
    settings = TrainConfig(
        SparseCoderConfig(num_latents=m, k=k),
        batch_size=4,
        layers=[layer],
        log_to_wandb=False,
        save_dir=str(out),
        run_name="smollm2",
    )
    Trainer(settings, Dataset.from_dict({"input_ids": rows}).with_format("torch"), model).fit()


def main() -> None:
    """Train one and save it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", choices=("saelens", "sparsify"), required=True)
    parser.add_argument("--model", required=True, help="folder of the model and its tokenizer")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--m", type=int, default=1024, help="latents")
    parser.add_argument("--k", type=int, default=32, help="active ones")
    parser.add_argument("--text", type=int, default=8192, help="tokens of text")
    parser.add_argument("--tokens", type=int, default=51200, help="activations to train on, repeats included")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    ids = chunks(AutoTokenizer.from_pretrained(args.model), args.text)
    sizes = (args.layer, args.m, args.k, args.tokens, args.out)
    if args.library == "saelens":
        saelens(outputs(model, ids, args.layer), *sizes)
    else:
        sparsify(model, ids, *sizes)


if __name__ == "__main__":
    main()
