"""The weights that a training ends with under a layout of its batches, and when two are the same."""

import torch

from tests.conftest import make_llama, random_rows, sgd


def penalised(model):
    """A method with a penalty that shares its prompts among ranks, as CWAC's does."""
    from dataclasses import dataclass

    from cwac.data.tokenize import Collator
    from cwac.methods.base import Method, draw

    prompts = random_rows(12, seed=5)
    collate = Collator(2)

    @dataclass
    class Penalised(Method):
        rank: int = 0
        world_size: int = 1

        def penalty(self, model, step):
            chosen = draw(len(prompts), 4, 0, step)
            mine = chosen[self.rank :: self.world_size]
            batch = collate([{"input_ids": prompts[i]["input_ids"]} for i in mine])
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            share = len(mine) * self.world_size / len(chosen)
            mask = batch["attention_mask"].bool()
            per_prompt = torch.stack([row[m].square().mean() for row, m in zip(logits, mask, strict=True)])
            return 3.0 * share * per_prompt.mean()

    return Penalised("penalised")


def final_weights(folder, per_device, accumulation, rank=0, world_size=1):
    """Three optimizer steps over 24 rows under one layout."""
    from cwac.training.engine import build_trainer

    class Data(torch.utils.data.Dataset):
        rows = random_rows(24, seed=7)

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, i):
            return self.rows[i]

    model = make_llama()
    method = penalised(model)
    method.rank, method.world_size = rank, world_size
    args = sgd(folder, per_device, accumulation)
    trainer = build_trainer(model, method, Data(), args, 2)
    trainer.train()
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def close(a, b):
    return max((a[n] - b[n]).abs().max().item() for n in a)
