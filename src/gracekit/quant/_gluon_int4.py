"""y = x W^T for many rows of x and packed 4-bit weights on Hopper, in Gluon: Triton with layouts and waiting written out.

The mathematics is that of ``wide_kernel`` in :mod:`gracekit.quant._triton_int4`: the weight is the left operand of the tensor
cores' product, y^T = W x^T, and is unpacked in registers. What Triton's compiler does not do for such a product is done here. While
the tensor cores multiply one half of a chunk, the next is unpacked; x arrives by the copy engine in a ring of half chunks, across
the end of a tile too; and y leaves by it while the next tile is computed. There is one program to a multiprocessor.

Where no tile is dealt out, the last block of rows of x begins so early that it is whole, and computes rows of the block before once
more, to the same bits: rows that are not there are slow to fill with zeros.

No interpreter runs Gluon. The table of :mod:`gracekit.quant._int4_choices` takes a kernel only after comparing its product.
"""

# M rows of x, N out_features, K in_features, G group size, C chunks of 128 inputs, T tiles of 64 output rows (see _int4_layout)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from gracekit.quant._int4_layout import CHUNK, TILE, WORDS
from gracekit.quant._triton_int4 import BFLOAT16, CONSTRAINTS, FLOAT16

ROWS = 128
WARPS = 8
HALF = CHUNK // 2
SLOTS = {128: 8, 256: 5}  # of the ring, by the rows of x of a tile: what the shared memory holds, and enough

_ROWS = gl.constexpr(ROWS)
_WARPS = gl.constexpr(WARPS)
_TILE = gl.constexpr(TILE)
_CHUNK = gl.constexpr(CHUNK)
_HALF = gl.constexpr(HALF)
_WORDS = gl.constexpr(WORDS)
_BFLOAT16 = gl.constexpr(BFLOAT16.value)
_FLOAT16 = gl.constexpr(FLOAT16.value)
_CONSTRAINTS = gl.constexpr(CONSTRAINTS.value)
# Where the words of a chunk (ROWS, 16) lie: a thread has those that it needs as the tensor cores' left operand.
_PACKED = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [8, 0], [0, 8]],
        lane_bases=[[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0], [64, 0]],
        block_bases=[],
        shape=[ROWS, WORDS],
    )
)


@gluon.jit
def _codes(words, dtype: gl.constexpr):
    """Eight planes of codes (ROWS, 16) of a chunk."""
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(_BFLOAT16, _CONSTRAINTS, [words], (gl.bfloat16,) * 8, is_pure=True, pack=2)
    else:
        return gl.inline_asm_elementwise(_FLOAT16, _CONSTRAINTS, [words], (gl.float16,) * 8, is_pure=True, pack=2)


@gluon.jit
def _half(c0, c1, c2, c3, s, t, LAYOUT: gl.constexpr):
    """q * s of four planes, rounded once, as (ROWS, 64); ``s`` is the first two planes' scale, ``t`` the others'."""
    even = gl.join(c0 * s, c2 * t)
    odd = gl.join(c1 * s, c3 * t)
    q = gl.reshape(gl.permute(gl.join(even, odd), (0, 2, 3, 1)), (_ROWS, _HALF))
    return gl.convert_layout(q, LAYOUT, assert_trivial=True)


@gluon.jit
def _part(item, whole, items, chunks, SPLIT: gl.constexpr):
    """The tile of an item, which of its SPLIT shares that is, and its first chunk and the one after its last.

    No share may be empty: SPLIT is at most the number of chunks.
    """
    item = gl.minimum(item, items - 1)  # what is asked of those beyond is not used, but must be in range
    tile, share, begin, end = item, 0, 0, chunks
    if SPLIT > 1:  # noqa: SIM102 (known while compiling)
        if item >= whole:
            share = (item - whole) % SPLIT
            tile = whole + (item - whole) // SPLIT
            begin = share * chunks // SPLIT
            end = (share + 1) * chunks // SPLIT
    return tile, share, begin, end


@gluon.jit
def _place(tile, row_tiles, blocks, M, SPLIT: gl.constexpr, BAND: gl.constexpr, TOKENS: gl.constexpr):
    """The first output row of a tile and its first row of x."""
    first = tile // (BAND * row_tiles) * BAND
    size = gl.minimum(blocks - first, BAND)
    inside = tile % (BAND * row_tiles)
    token = (first + inside % size) * TOKENS
    if SPLIT == 1:  # sums in shares are rounded otherwise than whole ones: two programs would write different bits
        token = gl.minimum(token, gl.maximum(M - TOKENS, 0))
    return inside // size * _ROWS, token


@gluon.jit
def _load(x, token, half, slot, ring, full, on, TOKENS: gl.constexpr):
    """Begin to fill a slot of the ring with x (TOKENS, 64)."""
    mbarrier.expect(full.index(slot), TOKENS * _HALF * 2, pred=on)
    tma.async_copy_global_to_shared(x, [token, half * _HALF], full.index(slot), ring.index(slot), pred=on)


@gluon.jit
def _next_slot(slot, phase, SLOTS: gl.constexpr):
    """The slot of the ring after one, and the phase in which it is full."""
    slot += 1
    if slot == SLOTS:
        slot = 0
        phase = phase ^ 1
    return slot, phase


@gluon.jit
def _next_half(
    item, token, half, end, whole, items, chunks, row_tiles, blocks, M,
    SPLIT: gl.constexpr, BAND: gl.constexpr, TOKENS: gl.constexpr,
):  # fmt: skip
    """The half chunk of x that is loaded after one: its item, first row, number, and the one after the item's last."""
    half += 1
    if half == end:
        item += gl.num_programs(0)
        tile, _share, begin, after = _part(item, whole, items, chunks, SPLIT)
        _row, token = _place(tile, row_tiles, blocks, M, SPLIT, BAND, TOKENS)
        half = 2 * begin
        end = 2 * after
    return item, token, half, end


@gluon.jit
def _words(packed, scale, row, chunk, chunks, padded, G: gl.constexpr):
    """The words (ROWS, 16) of a chunk from an output row on, and the scales of its up to four groups."""
    r = gl.minimum(row + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, _PACKED)), padded - 1)
    place = (r // _TILE).to(gl.int64) * (chunks * _TILE) + chunk * _TILE + r % _TILE
    words = gl.load(packed + place[:, None] * _WORDS + gl.arange(0, _WORDS, layout=gl.SliceLayout(0, _PACKED))[None, :])
    at = scale + chunk * (_CHUNK // G) * padded + r
    s0 = gl.load(at)
    s1, s2, s3 = s0, s0, s0
    if G < 128:
        s2 = gl.load(at + (_HALF // G) * padded)
        s3 = s2
    if G < 64:
        s1 = gl.load(at + padded)
        s3 = gl.load(at + 3 * padded)
    elif G < 128:
        s1 = s0
    return words, s0, s1, s2, s3


@gluon.jit(do_not_specialize=["M", "chunks", "whole", "items"])
def persistent_kernel(
    packed, scale, partial, counters, x, y, M, chunks, padded, whole, items,
    G: gl.constexpr, SPLIT: gl.constexpr, TOKENS: gl.constexpr, SLOTS: gl.constexpr, BAND: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """ROWS outputs of TOKENS rows of x, tile after tile; tiles beyond ``whole`` are dealt out among SPLIT items.

    ``x`` and ``y`` are tensor descriptors, with blocks (TOKENS, 64) and (TOKENS, ROWS).
    SLOTS: of the ring, at least four.
    """
    dtype: gl.constexpr = x.dtype
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, TOKENS, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    row_tiles = (padded + _ROWS - 1) // _ROWS
    blocks = (M + TOKENS - 1) // TOKENS
    ring = gl.allocate_shared_memory(dtype, [SLOTS, TOKENS, _HALF], x.layout)
    leaving = gl.allocate_shared_memory(dtype, [TOKENS, _ROWS], y.layout)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
    fence_async_shared()
    gl.thread_barrier()

    item = gl.program_id(0)
    tile, share, begin, end = _part(item, whole, items, chunks, SPLIT)
    row, token = _place(tile, row_tiles, blocks, M, SPLIT, BAND, TOKENS)
    words, s0, s1, s2, s3 = _words(packed, scale, row, begin, chunks, padded, G)
    if EARLY:  # launched while the kernel before it ends: waits for x, and for whoever still has the workspace
        gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], gl.int32, is_pure=False, pack=1)
    # What is loaded runs ahead of what is multiplied: its item, its half chunk, and the one after its last.
    next_item = item
    next_token = token
    next_half = 2 * begin
    next_end = 2 * end
    for slot in gl.static_range(SLOTS - 2):
        _load(x, next_token, next_half, slot, ring, full, next_item < items, TOKENS)
        next_item, next_token, next_half, next_end = _next_half(
            next_item, next_token, next_half, next_end, whole, items, chunks, row_tiles, blocks, M, SPLIT, BAND, TOKENS
        )
    filled = SLOTS - 2
    slot = 0
    phase = 0
    while item < items:
        total = gl.zeros([_ROWS, TOKENS], gl.float32, MMA)
        second = gl.zeros([_ROWS, _HALF], dtype, LEFT)
        for chunk in range(begin, end):
            c0, c1, c2, c3, c4, c5, c6, c7 = _codes(words, dtype)
            first = _half(c0, c1, c2, c3, s0.to(dtype)[:, None], s1.to(dtype)[:, None], LEFT)
            t2, t3 = s2.to(dtype)[:, None], s3.to(dtype)[:, None]
            words, s0, s1, s2, s3 = _words(packed, scale, row, gl.minimum(chunk + 1, end - 1), chunks, padded, G)
            mbarrier.wait(full.index(slot), phase)
            total = warpgroup_mma(first, ring.index(slot).permute((1, 0)), total, is_async=True)
            total, second = warpgroup_mma_wait(1, deps=(total, second))
            slot, phase = _next_slot(slot, phase, SLOTS)
            gl.thread_barrier()  # all warps are done with the chunk before
            for _half_chunk in gl.static_range(2):
                _load(x, next_token, next_half, filled, ring, full, next_item < items, TOKENS)
                filled = gl.where(filled == SLOTS - 1, 0, filled + 1)
                next_item, next_token, next_half, next_end = _next_half(
                    next_item, next_token, next_half, next_end, whole, items, chunks, row_tiles, blocks, M, SPLIT, BAND, TOKENS
                )  # fmt: skip
            second = _half(c4, c5, c6, c7, t2, t3, LEFT)
            mbarrier.wait(full.index(slot), phase)
            total = warpgroup_mma(second, ring.index(slot).permute((1, 0)), total, is_async=True)
            total, first = warpgroup_mma_wait(1, deps=(total, first))
            slot, phase = _next_slot(slot, phase, SLOTS)
        total, second = warpgroup_mma_wait(0, deps=(total, second))

        was_row, was_token, was_tile, was_share = row, token, tile, share
        item += gl.num_programs(0)
        tile, share, begin, end = _part(item, whole, items, chunks, SPLIT)
        row, token = _place(tile, row_tiles, blocks, M, SPLIT, BAND, TOKENS)
        words, s0, s1, s2, s3 = _words(packed, scale, row, begin, chunks, padded, G)
        last = True
        if SPLIT > 1:  # noqa: SIM102
            if was_tile >= whole:
                last = _leave_share(total, was_share, was_tile - whole, partial, counters, SPLIT, TOKENS, MMA)
        if last:
            tma.store_wait(0)
            gl.thread_barrier()
            if SPLIT == 1 or was_tile < whole:
                leaving.permute((1, 0)).store(total.to(dtype))
            else:
                _add_shares(was_tile - whole, partial, counters, leaving, SPLIT, TOKENS)
            fence_async_shared()
            gl.thread_barrier()
            tma.async_copy_shared_to_global(y, [was_token, was_row], leaving)
    tma.store_wait(0)


@gluon.jit
def _leave_share(
    total, share, place, partial, counters, SPLIT: gl.constexpr, TOKENS: gl.constexpr, MMA: gl.constexpr
):  # fmt: skip
    """Leave the sums of one of SPLIT shares in the workspace; whether it is the last to arrive at its place."""
    row = gl.arange(0, _ROWS, layout=gl.SliceLayout(1, MMA))
    token = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, MMA))
    slab = partial + (place * SPLIT + share).to(gl.int64) * (_ROWS * TOKENS)
    gl.store(slab + (token[None, :] * _ROWS + row[:, None]), total)
    gl.thread_barrier()  # all threads have stored before the one that counts publishes it
    return gl.atomic_add(counters + place, 1, sem="acq_rel", scope="gpu") == SPLIT - 1


@gluon.jit
def _add_shares(place, partial, counters, leaving, SPLIT: gl.constexpr, TOKENS: gl.constexpr):
    """Add the shares of a place in their order, and set its counter back."""
    PIECE: gl.constexpr = 64  # rows of x at once, for whose shares there are registers
    ALONG: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [_WARPS, 1], [1, 0])
    row = gl.arange(0, _ROWS, layout=gl.SliceLayout(0, ALONG))
    token = gl.arange(0, PIECE, layout=gl.SliceLayout(1, ALONG))
    slab = partial + (place * SPLIT).to(gl.int64) * (_ROWS * TOKENS)
    for piece in gl.static_range(TOKENS // PIECE):
        cell = (piece * PIECE + token[:, None]) * _ROWS + row[None, :]
        total = gl.zeros([PIECE, _ROWS], gl.float32, ALONG)
        for other in gl.static_range(SPLIT):
            total += gl.load(slab + other * (_ROWS * TOKENS) + cell, cache_modifier=".cg")
        leaving.slice(piece * PIECE, PIECE, dim=0).store(total.to(leaving.dtype))
    gl.store(counters + place, 0)
