"""Products with packed 4-bit weights on CUDA: what the kernels of :mod:`gracekit.quant._triton_int4` are launched with."""

# M rows of x, N out_features, K in_features, G group size, C chunks of 128 inputs, T tiles of 64 output rows (see _int4_layout)

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import AsyncCompileMode

from gracekit.quant._int4_layout import CHUNK, TILE
from gracekit.quant._triton_int4 import narrow_kernel, values_kernel, wide_kernel
from gracekit.quant._triton_launch import launch, launches_early, processors

_VALUES_ROWS = 32
_BAND = 8


class Schedule(NamedTuple):
    """How a product is launched.

    Attributes:
        rows: output rows of a program, a power of two from 16 on; for ``narrow_kernel`` 64 at most.
        tokens: rows of x of a program, a power of two from 8 on.
        parts: chunks of inputs that a program of ``narrow_kernel`` takes at once; 0 for ``wide_kernel``.
        split: programs among which a tile's inputs are dealt out; for ``narrow_kernel`` those of the last tiles, see ``whole``.
        warps: of a program.
        stages: steps in flight.
        scaled: whether ``wide_kernel`` multiplies rounded weights; else codes.
    """

    rows: int
    tokens: int
    parts: int
    split: int
    warps: int
    stages: int
    scaled: bool

    def programs(self, padded: int, count: int) -> int:
        """Return how many tiles of y (count, padded) there are."""
        return -(-padded // self.rows) * -(-count // self.tokens)

    def whole(self, padded: int, processors: int) -> int:
        """Return how many tiles of outputs have one program of ``narrow_kernel`` each: full rounds of multiprocessors."""
        tiles = padded // self.rows
        return tiles // processors * processors if self.split > 1 else tiles

    def counters(self, padded: int, count: int) -> int:
        """Return how many counters a product of ``count`` rows takes."""
        return self.programs(padded, count) if self.split > 1 else 0


def linear(x: Tensor, packed: Tensor, scale: Tensor, counters: Tensor, outputs: int, schedule: Schedule) -> Tensor:
    """Return y (M, N) of x (M, K), any stride between its rows, in x's dtype.

    Args:
        x: bfloat16 or float16.
        packed: words (T, C, 64, 16).
        scale: (C * 128 / G, T * 64) float32.
        counters: zeros int32, as many as the schedule takes; zeros again afterwards. Two calls at once must not share them.
        outputs: N.
        schedule: how to launch.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    y = x.new_empty(len(x), outputs)
    launch(*_product(x, packed, scale, y, counters, schedule))
    return y


def compile_ahead(
    x: Tensor, packed: Tensor, scale: Tensor, counters: Tensor, outputs: int, schedules: Iterable[Schedule]
) -> None:
    """Compile what :func:`linear` launches for the schedules, several at a time; one that cannot be compiled is passed over."""
    y = x.new_empty(len(x), outputs)
    with (
        torch.cuda.device(x.get_device()),
        ThreadPoolExecutor(os.cpu_count()) as threads,
        AsyncCompileMode(threads, ignore_errors=True),
    ):
        for schedule in schedules:
            kernel, grid, tensors, sizes, options = _product(x, packed, scale, y, counters, schedule)
            kernel.warmup(*tensors, *sizes, grid=grid, **options)


def _product(
    x: Tensor, packed: Tensor, scale: Tensor, y: Tensor, counters: Tensor, schedule: Schedule
) -> tuple[Any, tuple[int, ...], list[Tensor], list[int], dict[str, Any]]:
    """Return what is launched: the kernel, the grid, tensors, sizes, and what is compiled in."""
    tiles, chunks = packed.shape[:2]
    rows, tokens, parts, split, warps, stages, scaled = schedule
    padded, shares = tiles * TILE, parts or split
    early = launches_early(x.device)
    sizes = [len(x), y.shape[1], x.shape[1], x.stride(0), chunks, padded]
    options = {
        "STEPS": triton.cdiv(chunks, shares),
        "G": chunks * CHUNK // scale.shape[0],
        "SPLIT": split,
        "ROWS": rows,
        "TOKENS": tokens,
        "STAGES": stages,
        "MASKED": bool(x.shape[1] % CHUNK or chunks % shares or padded % rows),
        "ASSEMBLY": x.is_cuda,
        "EARLY": early,
        "num_warps": warps,
    }
    if early:
        options["launch_pdl"] = True
    if parts:
        blocks, whole = triton.cdiv(len(x), tokens), schedule.whole(padded, processors(x.device))
        programs = whole + (padded // rows - whole) * split
        slabs = (programs - whole) * blocks * rows * tokens if split > 1 else 0
        tensors = [x, packed, scale, y, x.new_empty(slabs, dtype=torch.float32), counters]
        return narrow_kernel, (programs, blocks), tensors, [*sizes, whole], options | {"PARTS": parts}
    programs = schedule.programs(padded, len(x))
    slabs = programs * split * rows * tokens if split > 1 else 0
    tensors = [x, packed, scale, y, x.new_empty(slabs, dtype=torch.float32), counters]
    return wide_kernel, (programs, split), tensors, sizes, options | {"SCALED": scaled, "BAND": _BAND}


def values(packed: Tensor, scale: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return W (N, K) of ``shape`` in ``dtype``, bfloat16 or float16."""
    tiles, chunks = packed.shape[:2]
    dense = scale.new_empty(shape, dtype=dtype)
    options = {"G": chunks * CHUNK // scale.shape[0], "ROWS": _VALUES_ROWS, "ASSEMBLY": packed.is_cuda, "num_warps": 4}
    grid = (chunks, triton.cdiv(shape[0], _VALUES_ROWS))
    launch(values_kernel, grid, [packed, scale, dense], [*shape, chunks, tiles * TILE], options)
    return dense
