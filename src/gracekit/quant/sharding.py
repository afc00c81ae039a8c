"""Sharding a prepared model with FSDP2: weights in their blocks, scales in groups of their own.

One FSDP2 group holds parameters of one dtype, and a mixed precision policy casts all of them before the forward. Scales in
the group of bfloat16 weights raise an error; scales in a group of float32 weights under a bfloat16 policy arrive rounded, and
what trains is no longer what is deployed. In a group of their own, without a policy, they stay float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from gracekit._checks import check_module
from gracekit._structure import find_decoder
from gracekit.quant.lsq import LSQFakeQuantizer


def fully_shard_qat(
    model: nn.Module,
    *,
    blocks: Iterable[nn.Module] | None = None,
    mesh: DeviceMesh | None = None,
    mp_policy: MixedPrecisionPolicy | None = None,
    **options: Any,
) -> nn.Module:
    """Apply FSDP2's ``fully_shard`` to a prepared model block by block, with the learned scales in float32.

    Each block becomes one group of weights and one group of scales; the rest of the model is the last group. Prepare first, shard
    next, make the optimiser last (of :func:`qat_parameter_groups`). Under a policy with ``param_dtype=torch.bfloat16`` the codes
    that are trained are those of the weights in bfloat16: load the gathered state into a prepared bfloat16 model (its scales
    are float32) and :func:`convert` that.

    Args:
        model: a model after :func:`prepare_qat`, in an initialised process group.
        blocks: the modules to shard one by one, in the order they run. None means ``get_decoder().layers``.
        mesh: as ``fully_shard``'s.
        mp_policy: the precision of everything but the scales, as ``fully_shard``'s.
        **options: further arguments of ``fully_shard``, such as ``reshard_after_forward`` and ``offload_policy``.

    Returns:
        ``model``, sharded in place.

    Raises:
        TypeError: ``model`` is no nn.Module.
        ValueError: the model has no learned scales, or has no decoder and ``blocks`` is None.
    """
    check_module("model", model)
    if not any(isinstance(module, LSQFakeQuantizer) for module in model.modules()):
        raise ValueError(f"model must have learned scales (call prepare_qat first), got none in {type(model).__name__}")
    if blocks is None:
        decoder: Any = find_decoder(model)
        if decoder is None:
            raise ValueError(f"blocks must be given for a model without a decoder, got None and {type(model).__name__}")
        blocks = decoder.layers
    policy = mp_policy or MixedPrecisionPolicy()
    seen: set[int] = set()
    for block in [*blocks, model]:
        scales: list[nn.Module] = [
            module for module in block.modules() if isinstance(module, LSQFakeQuantizer) and id(module) not in seen
        ]
        seen |= {id(module) for module in scales}
        if scales:
            # As a list they are gathered in one message, at the first of them that runs.
            fully_shard(scales, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), **options)
        fully_shard(block, mesh=mesh, mp_policy=policy, **options)
    return model
