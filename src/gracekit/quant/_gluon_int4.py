"""y = x W^T for many rows of x and packed 4-bit weights on Hopper, in Gluon: Triton with layouts and waiting written out.

The mathematics is that of ``wide_kernel`` in :mod:`gracekit.quant._triton_int4`: the weight is the left operand of the tensor
cores' product, y^T = W x^T, and is unpacked in registers. What Triton's compiler does not do for such a product is done here. While
the tensor cores multiply one half of a chunk, the next is unpacked; x arrives by the copy engine in a ring of half chunks, across
the end of a tile too; and y leaves by it while the next tile is computed. There is one program to a multiprocessor.

The tiles of a last round that has fewer of them than programs are dealt out: a tile's own program begins it, and the others help
with the chunks at its end, each with as many as it can leave in the workspace by the time that the first is done with its own.
Where the last rows of x fill half a block, some of the programs take these rows in smaller tiles from the beginning.

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
from triton.language.extra.cuda import gdc_wait

from gracekit.quant._int4_layout import CHUNK, TILE, WORDS
from gracekit.quant._triton_int4 import BFLOAT16, CONSTRAINTS, FLOAT16

ROWS = 128
WARPS = 8
HALF = CHUNK // 2
SLOTS = {128: 8, 256: 5}  # of the ring, by the rows of x of a tile: what the shared memory holds, and enough
LEAVING = 2  # chunks that could be multiplied while sums are left for another program, or added
REST_COST = 0.64  # time of a tile of 128 rows of x in that of one of 256

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
def _parts(program, programs, tiles, deal, DEALT: gl.constexpr):
    """How many tiles a program computes, or parts of tiles that are dealt out."""
    if DEALT:
        helpers, each, shares, _head = deal
        dealt = tiles % programs
        theirs = gl.minimum(dealt * shares - program * each, each)
        mine = gl.where(program < helpers + dealt, 1, 0)
        return tiles // programs + gl.where(program < helpers, theirs, mine)
    else:
        return (tiles - 1 - program) // programs + 1


@gluon.jit
def _part(part, parts, program, programs, tiles, chunks, deal, DEALT: gl.constexpr):
    """The tile of one of a program's parts, its first chunk, and the one after its last."""
    part = gl.minimum(part, parts - 1)  # what is asked of those beyond is not used, but must be in range
    tile, first, after = part * programs + program, 0, chunks
    if DEALT:
        helpers, each, shares, head = deal
        rounds = tiles // programs
        if part >= rounds:
            if program < helpers:
                share = program * each + part - rounds
                tile = rounds * programs + share // shares
                first = head + share % shares * (chunks - head) // shares
                after = head + (share % shares + 1) * (chunks - head) // shares
            else:
                tile = rounds * programs + program - helpers
                after = head
    return tile, first, after


@gluon.jit
def _place(tile, start, row_tiles, blocks, M, DEALT: gl.constexpr, BAND: gl.constexpr, TOKENS: gl.constexpr):
    """The first output row of a tile and its first row of x, where the first tile's is ``start``."""
    first = tile // (BAND * row_tiles) * BAND
    size = gl.minimum(blocks - first, BAND)
    inside = tile % (BAND * row_tiles)
    token = start + (first + inside % size) * TOKENS
    if not DEALT:  # sums in shares are rounded otherwise than whole ones: two programs would write different bits
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
    part, token, half, end, parts, program, programs, deal, start, chunks, row_tiles, blocks, M,
    DEALT: gl.constexpr, BAND: gl.constexpr, TOKENS: gl.constexpr,
):  # fmt: skip
    """The half chunk of x that is loaded after one: its part, first row, number, and the one after the part's last."""
    half += 1
    if half == end:
        part += 1
        tile, first, after = _part(part, parts, program, programs, row_tiles * blocks, chunks, deal, DEALT)
        _row, token = _place(tile, start, row_tiles, blocks, M, DEALT, BAND, TOKENS)
        half = 2 * first
        end = 2 * after
    return part, token, half, end


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


@gluon.jit(
    do_not_specialize=[
        *("M", "chunks", "programs", "helpers", "each", "shares", "head"),
        *("rest_helpers", "rest_each", "rest_shares", "rest_head"),
    ]
)
def persistent_kernel(
    packed, scale, partial, counters, x, y, x_rest, y_rest, M, chunks, padded,
    programs, helpers, each, shares, head, rest_helpers, rest_each, rest_shares, rest_head,
    G: gl.constexpr, TOKENS: gl.constexpr, SLOTS: gl.constexpr, REST: gl.constexpr, REST_SLOTS: gl.constexpr,
    DEALT: gl.constexpr, BAND: gl.constexpr,
):  # fmt: skip
    """ROWS outputs of TOKENS rows of x, tile after tile, by the first ``programs``; the others take the last REST rows, if any.

    ``x``, ``y``, ``x_rest`` and ``y_rest`` are tensor descriptors, with blocks (TOKENS or REST, 64 or ROWS).
    ``helpers`` to ``head``, and those of the rest, say how tiles are dealt out: ``_Deal`` of gracekit.quant._int4_launch.
    ``partial`` has a place of (ROWS, TOKENS or REST) for each share, ``counters`` a zero, which is set back.
    SLOTS, REST_SLOTS: of the ring, at least four.
    """
    program = gl.program_id(0)
    deal = (helpers, each, shares, head)
    blocks = M // TOKENS if REST > 0 else (M + TOKENS - 1) // TOKENS
    slabs = (padded + _ROWS - 1) // _ROWS * blocks % programs * shares
    if REST == 0 or program < programs:
        _multiply(
            packed, scale, partial, counters, x, y, program, programs, 0, blocks, M, chunks, padded, deal,
            G, TOKENS, SLOTS, DEALT, BAND,
        )  # fmt: skip
    else:
        _multiply(
            packed, scale, partial + slabs.to(gl.int64) * (_ROWS * TOKENS), counters + slabs, x_rest, y_rest,
            program - programs, gl.num_programs(0) - programs, blocks * TOKENS, 1, M, chunks, padded,
            (rest_helpers, rest_each, rest_shares, rest_head),
            G, REST, REST_SLOTS, DEALT, BAND,
        )  # fmt: skip


@gluon.jit
def _multiply(
    packed, scale, partial, counters, x, y, program, programs, start, blocks, M, chunks, padded, deal,
    G: gl.constexpr, TOKENS: gl.constexpr, SLOTS: gl.constexpr, DEALT: gl.constexpr, BAND: gl.constexpr,
):  # fmt: skip
    """What one of ``programs`` computes of ``blocks`` blocks of rows of x from ``start`` on."""
    dtype: gl.constexpr = x.dtype
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, TOKENS, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    row_tiles = (padded + _ROWS - 1) // _ROWS
    tiles = row_tiles * blocks
    ring = gl.allocate_shared_memory(dtype, [SLOTS, TOKENS, _HALF], x.layout)
    leaving = gl.allocate_shared_memory(dtype, [TOKENS, _ROWS], y.layout)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
    fence_async_shared()
    gl.thread_barrier()

    parts = _parts(program, programs, tiles, deal, DEALT)
    tile, first, after = _part(0, parts, program, programs, tiles, chunks, deal, DEALT)
    row, token = _place(tile, start, row_tiles, blocks, M, DEALT, BAND, TOKENS)
    words, s0, s1, s2, s3 = _words(packed, scale, row, first, chunks, padded, G)
    # Launched while the kernel before it ends: waits for x, and for whoever still has the workspace.
    gdc_wait()
    # What is loaded runs ahead of what is multiplied: its part, its half chunk, and the one after its last.
    next_part = 0
    next_token = token
    next_half = 2 * first
    next_end = 2 * after
    for slot in gl.static_range(SLOTS - 2):
        _load(x, next_token, next_half, slot, ring, full, next_part < parts, TOKENS)
        next_part, next_token, next_half, next_end = _next_half(
            next_part, next_token, next_half, next_end, parts, program, programs, deal, start, chunks, row_tiles, blocks, M,
            DEALT, BAND, TOKENS,
        )  # fmt: skip
    filled = SLOTS - 2
    slot = 0
    phase = 0
    for part in range(parts):
        total = gl.zeros([_ROWS, TOKENS], gl.float32, MMA)
        right = gl.zeros([_ROWS, _HALF], dtype, LEFT)
        for chunk in range(first, after):
            c0, c1, c2, c3, c4, c5, c6, c7 = _codes(words, dtype)
            left = _half(c0, c1, c2, c3, s0.to(dtype)[:, None], s1.to(dtype)[:, None], LEFT)
            t2, t3 = s2.to(dtype)[:, None], s3.to(dtype)[:, None]
            words, s0, s1, s2, s3 = _words(packed, scale, row, gl.minimum(chunk + 1, after - 1), chunks, padded, G)
            mbarrier.wait(full.index(slot), phase)
            total = warpgroup_mma(left, ring.index(slot).permute((1, 0)), total, is_async=True)
            total, right = warpgroup_mma_wait(1, deps=(total, right))
            slot, phase = _next_slot(slot, phase, SLOTS)
            gl.thread_barrier()  # all warps are done with the chunk before
            for _half_chunk in gl.static_range(2):
                _load(x, next_token, next_half, filled, ring, full, next_part < parts, TOKENS)
                filled = gl.where(filled == SLOTS - 1, 0, filled + 1)
                next_part, next_token, next_half, next_end = _next_half(
                    next_part, next_token, next_half, next_end, parts, program, programs, deal, start, chunks, row_tiles, blocks, M,
                    DEALT, BAND, TOKENS,
                )  # fmt: skip
            right = _half(c4, c5, c6, c7, t2, t3, LEFT)
            mbarrier.wait(full.index(slot), phase)
            total = warpgroup_mma(right, ring.index(slot).permute((1, 0)), total, is_async=True)
            total, left = warpgroup_mma_wait(1, deps=(total, left))
            slot, phase = _next_slot(slot, phase, SLOTS)
        total, right = warpgroup_mma_wait(0, deps=(total, right))

        was_row, was_token, was_tile, was_first, was_after = row, token, tile, first, after
        tile, first, after = _part(part + 1, parts, program, programs, tiles, chunks, deal, DEALT)
        row, token = _place(tile, start, row_tiles, blocks, M, DEALT, BAND, TOKENS)
        words, s0, s1, s2, s3 = _words(packed, scale, row, first, chunks, padded, G)
        if DEALT and was_first > 0:
            share = program * deal[1] + part - tiles // programs
            _leave_share(total, share, partial, counters, TOKENS, MMA)
        else:
            if DEALT and was_after < chunks:
                total = _add_shares(
                    total, was_tile - tiles // programs * programs, deal[2], partial, counters, TOKENS, MMA
                )
            tma.store_wait(0)
            gl.thread_barrier()
            leaving.permute((1, 0)).store(total.to(dtype))
            fence_async_shared()
            gl.thread_barrier()
            tma.async_copy_shared_to_global(y, [was_token, was_row], leaving)
    tma.store_wait(0)


@gluon.jit
def _cells(share, TOKENS: gl.constexpr, MMA: gl.constexpr):
    """Where the sums of a share lie in the workspace: what a warp stores at once lies together."""
    row = gl.arange(0, _ROWS, layout=gl.SliceLayout(1, MMA))[:, None]
    token = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, MMA))[None, :]
    block = row // 16 * (TOKENS // 8) + token // 8
    return share.to(gl.int64) * (_ROWS * TOKENS) + (block * 128 + row % 16 * 8 + token % 8)


@gluon.jit
def _leave_share(total, share, partial, counters, TOKENS: gl.constexpr, MMA: gl.constexpr):
    """Leave the sums of a share in the workspace and say so."""
    gl.store(partial + _cells(share, TOKENS, MMA), total)
    gl.thread_barrier()  # all threads have stored before the one that publishes it
    gl.atomic_xchg(counters + share, 1, sem="release", scope="gpu")


@gluon.jit
def _add_shares(total, dealt, shares, partial, counters, TOKENS: gl.constexpr, MMA: gl.constexpr):
    """Add what helpers leave of the tile of that number among those dealt out, in the order of the chunks.

    Helpers are programs before this one, so that they have begun: waiting for them always ends.
    """
    for share in range(dealt * shares, (dealt + 1) * shares):
        while gl.atomic_cas(counters + share, 1, 0, sem="acquire", scope="gpu") == 0:
            pass
        total += gl.load(partial + _cells(share, TOKENS, MMA), cache_modifier=".cg")
    return total
