"""Several processes train one cell: rank 0 decides, writes and evaluates, the others follow.

`torchrun` and `accelerate launch` start them; a process that neither started is rank 0 of 1. Under DDP every rank
holds whole parameters; under FSDP2 a parameter is a DTensor, and each rank holds some of its rows. torch is imported
where it is needed, because a sweep skips its finished cells without it.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


def process_rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def agree(value: Any) -> Any:
    """Rank 0's value on every rank: what is read from a shared disk may look different to each of them."""
    if world_size() == 1:
        return value
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box, src=0, group=_patient())
    return box[0]


def total(value: float, device) -> float:
    """The sum over ranks; every rank must ask at once. device: where the ranks' tensors are, which they talk over."""
    if world_size() == 1:
        return value
    import torch
    import torch.distributed as dist

    box = torch.tensor(float(value), dtype=torch.float64, device=device)
    dist.all_reduce(box)
    return float(box)


def wait() -> None:
    """Return when every rank has come here."""
    if world_size() > 1:
        import torch.distributed as dist

        dist.barrier(_patient())


@contextlib.contextmanager
def leader_first() -> Iterator[None]:
    """Rank 0 goes through the block before the others do: what it builds there, they find."""
    if process_rank():
        wait()
    try:
        yield
    finally:
        if not process_rank():
            wait()


@functools.cache
def _patient():
    """A group that outwaits rank 0's evaluations and locks; a training's own gives up after train.ddp_timeout."""
    import torch.distributed as dist

    return dist.new_group(backend="gloo", timeout=timedelta(days=30))


def local(tensor: Tensor) -> Tensor:
    """The rows that this rank holds; in-place changes of them are changes of the parameter."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """All rows. Every rank must ask at once."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def reshard(model: Module) -> None:
    """After a forward pass that no backward pass follows: FSDP2 holds the root's parameters whole until there is one.

    Until then `zero_grad` would clear the gradients of those and leave the shards' own.
    """
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor`, equal and whole on all ranks, held as `like` is; no rank sends anything. [m, any], `like` [m, n]."""
    if not hasattr(like, "placements") or hasattr(tensor, "placements"):
        return tensor.to(like.device)
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    everywhere = DTensor.from_local(tensor.to(like.device), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(mesh, like.placements)
