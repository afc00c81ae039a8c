"""The tap under DistributedDataParallel and FSDP2: each rank sees its own batch, gradients are those of one process."""

import functools
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tiny_families import FAMILIES
from tolerances import GRADIENT
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from gracekit.vlm import VisualTokenTap

BATCHES = [["tIIt", "It"], ["tI", "tttI"]]  # one for each rank, with three and two images
BLOCK_OF_VISION = re.compile(r".*vis.*\.(layers?|blocks|resblocks)\.\d+")


def loss_on(model, rank, name):
    """A loss on logits and visual tokens of the rank's own batch."""
    family = FAMILIES[name]
    batch = family.batch(BATCHES[rank])
    with VisualTokenTap(model) as tap:
        out = model(**batch, use_cache=False)
        tokens, lengths = tap.tokens(batch)
    assert lengths == family.lengths(BATCHES[rank])
    return out.logits.square().mean() + tokens.square().mean()


def mean_gradients(world, name):
    """What one process computes: the mean of the ranks' gradients."""
    model = FAMILIES[name].build()
    (sum(loss_on(model, rank, name) for rank in range(world)) / world).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compare(model, prefix, world, name):
    expected = mean_gradients(world, name)
    got = {name.removeprefix(prefix): p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() >= expected.keys()
    for name, wanted in expected.items():
        gradient = got[name].full_tensor() if isinstance(got[name], DTensor) else got[name]
        torch.testing.assert_close(gradient, wanted, **GRADIENT[torch.float32], msg=name)


def ddp_rank(rank, world, name):
    model = torch.nn.parallel.DistributedDataParallel(FAMILIES[name].build(), find_unused_parameters=True)
    loss_on(model, rank, name).backward()
    compare(model, "module.", world, name)


def fsdp_rank(rank, world, name):
    plain = FAMILIES[name].build()
    mesh = dist.init_device_mesh("cpu", (world,))
    vision = [module for key, module in plain.named_modules() if BLOCK_OF_VISION.fullmatch(key)]
    assert len(vision) >= 2
    for block in [*vision, *plain.get_decoder().layers]:
        fully_shard(block, mesh=mesh)
    model = fully_shard(plain, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    loss_on(model, rank, name).backward()
    compare(model, "", world, name)


def every_family(rank, world, folder):
    for name in FAMILIES:
        ddp_rank(rank, world, name)
        fsdp_rank(rank, world, name)
        if rank == 0:
            (folder / name).touch()


@pytest.fixture(scope="module")
def passed(tmp_path_factory):
    """Names of the families up to the first that fails, and its failure: one start of the processes, which takes the most time."""
    folder: Path = tmp_path_factory.mktemp("families")
    failure = None
    try:
        run_ranks(functools.partial(every_family, folder=folder))
    except Exception as error:
        failure = error
    return {path.name for path in folder.iterdir()}, failure


@pytest.mark.support("DDP and FSDP2")
@pytest.mark.parametrize("name", FAMILIES)
def test_tapped_gradients_on_two_ranks_are_the_mean_of_the_ranks_gradients(name, passed):
    families, failure = passed
    assert name in families, failure
