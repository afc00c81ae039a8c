"""Launching the same Triton kernel again and again with little work for the host.

Triton's own launch looks at every argument to find what it has compiled for the like of them, which takes the host longer than a
small kernel takes the device. Here the sizes, the options, and the dtype and alignment of each tensor are the key of a table that
leads to the compiled kernel; what remains is to hand over the pointers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from triton import JITFunction

_ALIGNMENT = 16  # bytes; Triton compiles for tensors that begin at a multiple of it, or for others
_MOST = 1 << 12

_launches: dict[Hashable, Callable[..., None]] = {}


def launch(kernel: Any, grid: tuple[int, ...], tensors: list[Any], sizes: list[Any], options: dict[str, Any]) -> None:
    """Do what ``kernel[grid](*tensors, *sizes, **options)`` does, on the device of the first tensor.

    ``tensors`` (some may be Gluon's descriptors of tensors) and ``sizes``, plain numbers, are the kernel's first parameters, in its
    order; ``options`` are those compiled in, and Triton's own.
    """
    device = tensors[0].get_device()
    if not isinstance(kernel, JITFunction):
        kernel[grid](*tensors, *sizes, **options)  # the interpreter
        return
    with torch.cuda.device(device):
        kinds = [_kind(tensor) for tensor in tensors]
        key = (id(kernel), device, grid, *kinds, *sizes, *options.values())
        run = _launches.get(key)
        if run is None:
            if len(_launches) >= _MOST:
                _launches.clear()
            run = _launches[key] = _prepared(kernel, grid, tensors, sizes, options)
        run(*tensors)


def _kind(tensor: Any) -> Hashable:
    """Return what Triton compiles for: a tensor's dtype and whether it is aligned, or a descriptor's dtype and block."""
    if isinstance(tensor, Tensor):
        return tensor.dtype, tensor.data_ptr() % _ALIGNMENT == 0
    return tensor.base.dtype, *tensor.block_shape


def _prepared(
    kernel: Any, grid: tuple[int, ...], tensors: list[Any], sizes: list[Any], options: dict[str, Any]
) -> Callable[..., None]:
    compiled = kernel.warmup(*tensors, *sizes, grid=grid, **options)
    if hasattr(compiled, "result"):  # compiled ahead, by a thread
        compiled = compiled.result()
    start = compiled[(*grid, 1, 1)[:3]]
    constants = [options[name] for name in kernel.arg_names[len(tensors) + len(sizes) :]]
    return lambda *pointers: start(*pointers, *sizes, *constants)


@functools.cache
def early(device: torch.device) -> dict[str, bool]:
    """Return the options of a kernel that waits, where EARLY, for the one in front, and is launched before that has ended.

    From Hopper on (programmatic dependent launch).
    """
    can = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"EARLY": True, "launch_pdl": True} if can else {"EARLY": False}


@functools.cache
def processors(device: torch.device) -> int:
    """Return the number of multiprocessors of a CUDA device; 8 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
