"""A plain language-model fit for the stages before a run: pretraining `tiny`, the alignment stage.

Runs themselves go through HF `Trainer` (`cwac/training/engine.py`), which brings resume, logging and many
GPUs; the stages here are minutes long, built once, and cached as artifacts.
"""

import math
from collections.abc import Callable, Iterable

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from cwac.data.tokenize import Collator, Rows


def fit(
    model: PreTrainedModel,
    rows: Rows,
    *,
    steps: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    pad_token_id: int,
    parameters: Iterable[torch.nn.Parameter] | None = None,
    weight_decay: float = 0.0,
    warmup: float = 0.05,
    max_grad_norm: float = 1.0,
    backward: Callable[[PreTrainedModel, dict[str, torch.Tensor]], torch.Tensor] | None = None,
    description: str = "fitting",
) -> float:
    """Train on `rows` with AdamW, linear warm-up and cosine decay; returns the mean loss of the last tenth.

    Epochs are reshuffled from `seed`, so the result is a function of the arguments alone.
    parameters: what to train; all parameters that require a gradient where None.
    backward: adds one batch's gradients to `grad` and returns its loss; the plain loss's gradients where None.
    """
    trained = [p for p in (model.parameters() if parameters is None else parameters) if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=weight_decay, fused=True)
    warm = max(1, int(warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min((s + 1) / warm, 0.5 * (1 + math.cos(math.pi * max(0, s - warm) / max(1, steps - warm)))),
    )
    generator = torch.Generator().manual_seed(seed)
    collate = Collator(pad_token_id)
    order: list[int] = []
    tail: list[float] = []
    model.train()
    with tqdm(range(steps), desc=description, unit="step") as bar:
        for step in bar:
            if len(order) < batch_size:
                order += torch.randperm(len(rows), generator=generator).tolist()
            chosen, order = order[:batch_size], order[batch_size:]
            batch = {k: v.to(model.device) for k, v in collate([rows[i] for i in chosen]).items()}
            loss = (backward or plain_backward)(model, batch)
            torch.nn.utils.clip_grad_norm_(trained, max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            if step >= steps - max(1, steps // 10):
                tail.append(loss.item())
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()
    return sum(tail) / len(tail)


def plain_backward(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    loss = model(**batch).loss
    loss.backward()
    return loss
