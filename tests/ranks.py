"""Run a function on several gloo ranks on this machine; an assertion that fails on a rank fails the test."""

import multiprocessing
import os
import sys
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
    # Groups that DDP and FSDP2 keep alive are torn down after the interpreter, and a thread of theirs that still runs then
    # aborts the process now and then. What the rank had to show it has shown by now.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run_ranks(function: Callable[[int, int], None], world: int = 2) -> None:
    """``function(rank, world)`` must be importable: a top-level function of a test module.

    Ranks are forked from a process that has imported what they need, and has done nothing else.
    """
    multiprocessing.set_forkserver_preload(["gracekit.recipe.train"])
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (world, f"{folder}/store", function), nprocs=world, start_method="forkserver")
