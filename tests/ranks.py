"""Run a function on several gloo ranks on this machine; an assertion that fails on a rank fails the test."""

import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _rank(rank: int, world: int, file: str, function: Callable[[int, int], None]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    try:
        function(rank, world)
    finally:
        dist.destroy_process_group()


def run_ranks(function: Callable[[int, int], None], world: int = 2) -> None:
    """``function(rank, world)`` must be importable: a top-level function of a test module."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (world, f"{folder}/store", function), nprocs=world)
