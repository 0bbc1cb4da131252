"""One optimizer step, as the engine takes it."""

import torch

from cwac.data.tokenize import Collator


def step_adamw(model, rows, constraint=None, steps=10, accumulation=1, where="update", lr=1e-3, decay=0.1, start=0):
    """Plain AdamW with weight decay; the constraint is applied where a run would apply it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=decay)
    collate = Collator(2)
    for step in range(start, start + steps):
        for micro in range(accumulation):
            i = (step * accumulation + micro) * 2 % len(rows)
            (model(**collate(rows[i : i + 2])).loss / accumulation).backward()
        if constraint and where == "gradient":
            constraint.project_gradients_()
        optimizer.step()
        if constraint and where == "update":
            constraint.project_weights_()
        optimizer.zero_grad()
    return optimizer
