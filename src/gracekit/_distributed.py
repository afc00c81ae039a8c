"""Sums over the ranks of the default process group, and its end."""

from __future__ import annotations

import gc

import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Return the number of ranks, 1 where torch.distributed is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_sum(tensor: Tensor) -> Tensor:
    """Return the sum of ``tensor`` over all ranks; itself where there is one."""
    if world_size() == 1:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def leave_group() -> None:
    """Destroy the default process group, if there is one, with all that uses it gone.

    A group that lives on until the interpreter is taken down has threads that then may abort the process, whose work is done;
    and it does live on while DistributedDataParallel's cycles of references keep it.
    """
    if dist.is_available() and dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()
