"""accelerate's FSDP on CPU ranks: it offers it for GPUs alone, so a test's rank says that its devices are such."""

import os

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def set_rank(rank, world):
    """Set the environment as torchrun does; the process group stands already."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def offer_fsdp(rank, world):
    """Be a rank that accelerate takes FSDP on."""
    set_rank(rank, world)
    begin = AcceleratorState.__init__

    def begin_as_on_gpus(self, *args, **kwargs):
        if PartialState(cpu=True).distributed_type == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        begin(self, *args, **kwargs)

    AcceleratorState.__init__ = begin_as_on_gpus
