"""Products with packed 4-bit weights on CUDA: what the kernels of :mod:`gracekit.quant._triton_int4` are launched with."""

# M rows of x, N out_features, K in_features, G group size, C chunks of 128 inputs, T tiles of 64 output rows (see _int4_layout)

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import AsyncCompileMode

from gracekit.quant._int4_layout import CHUNK, TILE
from gracekit.quant._triton_int4 import LEAST_TOKENS, narrow_kernel, values_kernel, wide_kernel
from gracekit.quant._triton_launch import early, launch, processors

# The modules of ``persistent_kernel``, ``vector_kernel`` and ``few_kernel``, where this Triton has what they are written in.
gluon: Any = None
vector: Any = None
few: Any = None
with contextlib.suppress(ImportError, AttributeError):  # Gluon is marked as experimental
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from gracekit.quant import _gluon_int4 as gluon
with contextlib.suppress(ImportError, AttributeError):
    from gracekit.quant import _gluon_few as few
    from gracekit.quant import _gluon_vector as vector

_ALIGNMENT = 16  # bytes; what the copy engine asks of the rows of a tensor
_OFFSETS = 1 << 31  # of what ``few_kernel`` reads
_VALUES_ROWS = 32
_BAND = 8
_MOST_SHARES = 3
# Of a thread of a kernel that lets the next be launched: so two programs of four warps have room for two of the next beside them,
# which else would come to lie unevenly, as multiprocessors happen to be done.
_REGISTERS = 128


class Schedule(NamedTuple):
    """How a product is launched.

    Attributes:
        rows: output rows of a program, a power of two from 16 on; for ``narrow_kernel`` and ``vector_kernel`` 64 at most, for
            ``few_kernel`` 64.
        tokens: rows of x of a program, a power of two from 8 on; 1 or 2, and then all of x, for ``vector_kernel``; for
            ``persistent_kernel`` and ``few_kernel`` one of their ``WIDTHS``.
        parts: chunks of inputs that a program of ``narrow_kernel`` or ``vector_kernel`` takes at once; 0 for the others.
        split: programs among which the inputs of each of the last tiles are dealt out, see ``whole``; for ``persistent_kernel``
            1 or 2: whether they are dealt out, as ``_Deal`` says; for ``few_kernel`` those among which each tile's are.
        warps: of a program; for ``persistent_kernel`` of each of its two groups.
        stages: steps in flight; for ``vector_kernel`` those whose words are loaded ahead.
        scaled: whether ``wide_kernel`` multiplies rounded weights; else codes.
        persistent: whether it is ``persistent_kernel`` that is launched; ``stages`` are then the slots of its ring.
        launches: whether ``narrow_kernel`` or ``wide_kernel`` lets the next kernel be launched while its own programs still run,
            where the device can.
        exchanges: whether it is ``few_kernel`` that is launched, whose programs exchange their sums.
    """

    rows: int
    tokens: int
    parts: int
    split: int
    warps: int
    stages: int
    scaled: bool
    persistent: bool = False
    launches: bool = False
    exchanges: bool = False

    @property
    def is_vector(self) -> bool:
        """Whether it is ``vector_kernel`` that is launched."""
        return self.tokens < LEAST_TOKENS

    def tiles(self, padded: int, count: int) -> int:
        """Return how many tiles of y (count, padded) there are; for ``narrow_kernel`` in a block of rows of x."""
        return -(-padded // self.rows) * (1 if self.parts else -(-count // self.tokens))

    def whole(self, padded: int, count: int, processors: int) -> int:
        """Return how many tiles have one program each: full rounds of multiprocessors."""
        tiles = self.tiles(padded, count)
        return tiles // processors * processors if self.split > 1 else tiles

    def places(self, padded: int, count: int, processors: int) -> int:
        """Return how many sums are left in shares: those of the tiles that are dealt out."""
        dealt_out = self.tiles(padded, count) - self.whole(padded, count, processors)
        return dealt_out * (-(-count // self.tokens) if self.parts else 1)

    def words(self, padded: int, count: int, processors: int) -> int:
        """Return how many zeros suffice for every product of ``count`` rows or fewer."""
        if self.split == 1:
            return 0
        if self.exchanges:
            return self.tiles(padded, count) * int(few.slab_words(self.split, self.tokens))
        if self.persistent:
            return 2 * processors
        return self.places(padded, count, processors) if self.parts else min(self.tiles(padded, count), processors - 1)


class Zeros(NamedTuple):
    """What kernels count and hand each other sums in, zeros int32 before and after a product.

    Attributes:
        counters: of one weight.
        exchange: of all weights of a model, for ``few_kernel``.
    """

    counters: Tensor
    exchange: Tensor

    def of(self, schedule: Schedule) -> Tensor:
        """Return those that a schedule takes."""
        return self.exchange if schedule.exchanges else self.counters


def linear(x: Tensor, packed: Tensor, scale: Tensor, zeros: Tensor, outputs: int, schedule: Schedule) -> Tensor:
    """Return y (M, N) of x (M, K), any stride between its rows, in x's dtype.

    Args:
        x: bfloat16 or float16.
        packed: words (T, C, 64, 16).
        scale: (C * 128 / G, T * 64) float32.
        zeros: int32, as many as the schedule takes; zeros again afterwards. Two calls at once must not share them.
        outputs: N.
        schedule: how to launch.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    if schedule.persistent:
        x = _aligned(x)
    elif schedule.exchanges:
        x = _aligned(x if len(x) * x.stride(0) < _OFFSETS else x.contiguous(), 2 * _ALIGNMENT)
    elif schedule.is_vector:
        x = _paired(x)
    y = x.new_empty(len(x), outputs)
    launch(*_product(x, packed, scale, y, zeros, schedule))
    return y


def compile_ahead(
    x: Tensor, packed: Tensor, scale: Tensor, zeros: Tensor, outputs: int, schedules: Iterable[Schedule]
) -> None:
    """Compile what :func:`linear` launches for the schedules, several at a time; one that cannot be compiled is passed over."""
    y = x.new_empty(len(x), outputs)
    with (
        torch.cuda.device(x.get_device()),
        ThreadPoolExecutor(os.cpu_count()) as threads,
        AsyncCompileMode(threads, ignore_errors=True),
    ):
        for schedule in schedules:
            kernel, grid, tensors, sizes, options = _product(x, packed, scale, y, zeros, schedule)
            kernel.warmup(*tensors, *sizes, grid=grid, **options)


def _product(
    x: Tensor, packed: Tensor, scale: Tensor, y: Tensor, zeros: Tensor, schedule: Schedule
) -> tuple[Any, tuple[int, ...], list[Any], list[int], dict[str, Any]]:
    """Return what is launched: the kernel, the grid, tensors, sizes, and what is compiled in."""
    if schedule.persistent:
        return _persistent(x, packed, scale, y, zeros, schedule)
    if schedule.is_vector:
        return _vector(x, packed, scale, y, schedule)
    if schedule.exchanges:
        return _few(x, packed, scale, y, zeros, schedule)
    tiles, chunks = packed.shape[:2]
    rows, tokens, parts, split, warps, stages, scaled = schedule[:7]
    padded, shares = tiles * TILE, parts or 1
    whole = schedule.whole(padded, len(x), processors(x.device))
    programs = whole + (schedule.tiles(padded, len(x)) - whole) * split
    slabs = schedule.places(padded, len(x), processors(x.device)) * split
    tensors = [x, packed, scale, y, x.new_empty(slabs * rows * tokens, dtype=torch.float32), zeros]
    sizes = [len(x), y.shape[1], x.shape[1], x.stride(0), chunks, padded, whole]
    options = {
        "STEPS": triton.cdiv(chunks, shares),
        "G": chunks * CHUNK // scale.shape[0],
        "SPLIT": split,
        "ROWS": rows,
        "TOKENS": tokens,
        "STAGES": stages,
        "MASKED": bool(x.shape[1] % CHUNK or chunks % shares or padded % rows),
        "ASSEMBLY": x.is_cuda,
        "LAUNCHES": schedule.launches,
        "num_warps": warps,
        **early(x.device),
    }
    if schedule.launches and options["EARLY"]:
        options["maxnreg"] = _REGISTERS
    if parts:
        blocks = triton.cdiv(len(x), tokens)
        return narrow_kernel, (programs, blocks), tensors, sizes, options | {"PARTS": parts}
    return wide_kernel, (programs,), tensors, sizes, options | {"SCALED": scaled, "BAND": _BAND}


def _vector(
    x: Tensor, packed: Tensor, scale: Tensor, y: Tensor, schedule: Schedule
) -> tuple[Any, tuple[int, ...], list[Any], list[int], dict[str, Any]]:
    """Return what is launched for ``vector_kernel``."""
    (tiles, chunks), parts = packed.shape[:2], schedule.parts
    steps = triton.cdiv(chunks, parts)
    options = {
        "STEPS": steps,
        "G": chunks * CHUNK // scale.shape[0],
        "ROWS": schedule.rows,
        "TOKENS": len(x),
        "PARTS": parts,
        "DEPTH": min(schedule.stages, steps),
        "MASKED": bool(x.shape[1] % (CHUNK * parts)),
        "num_warps": parts,
        **early(x.device),
    }
    sizes = [y.shape[1], x.shape[1], x.stride(0), chunks, tiles * TILE]
    return vector.vector_kernel, (tiles * TILE // schedule.rows,), [x, packed, scale, y], sizes, options


def has_vector(x: Tensor) -> bool:
    """Whether ``vector_kernel`` can compute products with x."""
    return vector is not None and _is_since_ampere(x) and len(x) <= vector.MOST_TOKENS


def _few(
    x: Tensor, packed: Tensor, scale: Tensor, y: Tensor, zeros: Tensor, schedule: Schedule
) -> tuple[Any, tuple[int, ...], list[Any], list[int], dict[str, Any]]:
    """Return what is launched for ``few_kernel``."""
    (tiles, chunks), split, tokens = packed.shape[:2], schedule.split, schedule.tokens
    options = {
        "STEPS": chunks,
        "G": chunks * CHUNK // scale.shape[0],
        "SPLIT": split,
        "TOKENS": tokens,
        "STAGES": schedule.stages,
        "MASKED": bool(x.shape[1] % CHUNK),
        **few.exchange(split, tokens, "bf16" if x.dtype == torch.bfloat16 else "f16"),
        "num_warps": few.WARPS,
        **early(x.device),
    }
    sizes = [len(x), y.shape[1], x.shape[1], x.stride(0), chunks, tiles * TILE]
    return few.few_kernel, (tiles * split,), [x, packed, scale, y, zeros], sizes, options


def has_few(x: Tensor, packed: Tensor) -> bool:
    """Whether ``few_kernel`` can compute the product of x with a weight, and is meant for it."""
    return few is not None and _is_since_ampere(x) and len(x) <= max(few.WIDTHS) and packed.numel() < _OFFSETS


def _is_since_ampere(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 0)


def _paired(x: Tensor) -> Tensor:
    """Return x, or a copy of it whose rows can be read as words of two inputs each."""
    return x if x.data_ptr() % 4 == 0 and x.stride(0) % 2 == 0 else x.clone(memory_format=torch.contiguous_format)


def has_persistent(x: Tensor, outputs: int) -> bool:
    """Whether ``persistent_kernel`` can compute the product of x with a weight of that many outputs."""
    if gluon is None or not x.is_cuda or torch.cuda.get_device_capability(x.device) != (9, 0):
        return False
    return outputs * x.element_size() % _ALIGNMENT == 0


def _aligned(x: Tensor, multiple: int = _ALIGNMENT) -> Tensor:
    """Return x, or a copy, from which 16 bytes can be copied at once, with rows a multiple of so many bytes apart.

    Of a stride, Triton distinguishes whether it is a multiple of 16 elements.
    """
    size = x.element_size()
    if x.data_ptr() % _ALIGNMENT == 0 and x.stride(0) * size % multiple == 0:
        return x
    rows, inputs = x.shape
    return x.new_empty(rows, triton.cdiv(inputs * size, multiple) * multiple // size)[:, :inputs].copy_(x)


def _persistent(
    x: Tensor, packed: Tensor, scale: Tensor, y: Tensor, zeros: Tensor, schedule: Schedule
) -> tuple[Any, tuple[int, ...], list[Any], list[int], dict[str, Any]]:
    """Return what is launched for ``persistent_kernel``."""
    chunks, padded, count = packed.shape[1], len(packed) * TILE, len(x)
    tokens, dealt = schedule.tokens, schedule.split > 1
    rest = _rest(count, tokens) if dealt else 0
    row_tiles, blocks = -(-padded // gluon.ROWS), count // tokens if rest else -(-count // tokens)
    deals = _deals(row_tiles * blocks, row_tiles, chunks, processors(x.device), dealt, rest)
    sums = sum(deal.slabs * width for deal, width in zip(deals, (tokens, rest), strict=True))
    partial = x.new_empty(sums * gluon.ROWS, dtype=torch.float32)
    (first, more), (rest_first, rest_more) = gluon.BLOCKS[tokens], gluon.BLOCKS.get(rest, (0, 0))
    widths = [first, *(width for width in (more, rest_first, rest_more) if width)]
    described = [end for width in (*widths, first, first)[:3] for end in _described(x, y, width)]
    options = {
        "G": chunks * CHUNK // scale.shape[0],
        "TOKENS": first,
        "MORE": more,
        "SLOTS": schedule.stages,
        "REST": rest_first,
        "REST_MORE": rest_more,
        "REST_SLOTS": gluon.SLOTS[rest or tokens],
        "DEALT": dealt,
        "BAND": _BAND,
        "num_warps": schedule.warps,
        "launch_pdl": True,
    }
    sizes = [count, chunks, padded, deals[0].programs, *deals[0][1:5], *deals[1][1:5]]
    grid = (deals[0].programs + deals[1].programs,)
    return gluon.persistent_kernel, grid, [packed, scale, partial, zeros, *described], sizes, options


def _rest(count: int, tokens: int) -> int:
    """Return in how many rows of x some of the programs take those behind full blocks of ``tokens``; 0 if all take them alike."""
    if count < tokens or tokens != max(gluon.WIDTHS):
        return 0
    return next((width for width in gluon.REST_COST if 0 < count % tokens <= width), 0)


def _described(x: Tensor, y: Tensor, block: int) -> list[Any]:
    """Return what the copy engine is told of x and y, for blocks of so many rows of x."""
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return [
        TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [block, width], layout)
        for tensor, width in ((x, gluon.HALF), (y, TILE))
    ]


class _Deal(NamedTuple):
    """How tiles go to programs: in rounds of one each; those of a last, incomplete round are dealt out.

    Attributes:
        programs: in all.
        helpers: programs that compute shares of the tiles that are dealt out.
        each: shares that a helper computes; more than one only of different tiles.
        shares: of such a tile that helpers compute; more than one only where each helper has one.
        head: chunks of such a tile that its own program computes before it adds the shares.
        slabs: sums that helpers leave.
        time: until the last is done, in chunks.
    """

    programs: int
    helpers: int = 0
    each: int = 1
    shares: int = 0
    head: int = 0
    slabs: int = 0
    time: int = 0


def _deal(tiles: int, programs: int, chunks: int, dealt_out: bool) -> _Deal:
    """Deal tiles out so that all programs are done at about the same time."""
    rounds, left = divmod(tiles, programs)
    whole = _Deal(min(programs, tiles), head=chunks, time=-(-tiles // programs) * chunks)
    spare = programs - left
    if not dealt_out or not left:
        return whole
    shares, each = min(max(spare // left, 1), _MOST_SHARES), -(-left // spare)
    # A tile's program has its chunks done when the last of its shares is left for it.
    head = round(each * (chunks + gluon.LEAVING * shares) / (each + shares))
    time = rounds * chunks + head + gluon.LEAVING * shares
    if chunks - head < shares or time >= whole.time:
        return whole
    helpers = -(-left * shares // each)
    return _Deal(programs if rounds else helpers + left, helpers, each, shares, head, left * shares, time)


@functools.cache
def _deals(tiles: int, row_tiles: int, chunks: int, programs: int, dealt_out: bool, rest: int) -> tuple[_Deal, _Deal]:
    """Deal tiles out, and the ``row_tiles`` smaller ones with ``rest`` rows of x, if any, each to a part of the programs."""
    if not rest:
        return _deal(tiles, programs, chunks, dealt_out), _Deal(0)
    both = (
        (_deal(tiles, own, chunks, True), _deal(row_tiles, programs - own, chunks, True)) for own in range(1, programs)
    )
    return min(both, key=lambda deals: max(deals[0].time, gluon.REST_COST[rest] * deals[1].time))


def values(packed: Tensor, scale: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return W (N, K) of ``shape`` in ``dtype``, bfloat16 or float16."""
    tiles, chunks = packed.shape[:2]
    dense = scale.new_empty(shape, dtype=dtype)
    options = {"G": chunks * CHUNK // scale.shape[0], "ROWS": _VALUES_ROWS, "ASSEMBLY": packed.is_cuda, "num_warps": 4}
    grid = (chunks, triton.cdiv(shape[0], _VALUES_ROWS))
    launch(values_kernel, grid, [packed, scale, dense], [*shape, chunks, tiles * TILE], options)
    return dense
