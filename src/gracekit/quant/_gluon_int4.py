"""y = x W^T for many rows of x and packed 4-bit weights on Hopper, in Gluon: Triton with layouts and waiting written out.

The mathematics is that of ``wide_kernel`` in :mod:`gracekit.quant._triton_int4`: the weight is the left operand of the tensor
cores' product, y^T = W x^T, and is unpacked in registers. What Triton's compiler does not do for such a product is done here. A
program, of which there is one to a multiprocessor, is two groups of four warps, with 64 of a tile's output rows each. A group
unpacks the next half of a chunk while the tensor cores multiply one, and waits for the other group only where that is late by more
than the ring holds: while one group unpacks, the tensor cores have the other's product. x arrives by the copy engine in a ring of
half chunks, across the end of a tile too, of which each group loads every other one; and y leaves by it while the next tile is
computed.

Blocks have 128, 160, 192 or 256 rows of x. Tensors have a power of two of rows, so those of 160 and 192 are multiplied as 128 and
the others: these first, because the tensor cores take only a few products ahead, and a group is free to unpack when its last one is
taken.

The tiles of a last round that has fewer of them than programs are dealt out: a tile's own program begins it, and the others help
with the chunks at its end, each with as many as it can leave in ``partial`` by the time that the first is done with its own.
Where the last rows of x fill no more than three quarters of a block of 256, some of the programs take these rows in smaller tiles
from the beginning.

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
WARPS = 4  # of each of the two groups
HALF = CHUNK // 2
WIDTHS = (128, 160, 192, 256)  # rows of x of the tiles of a whole block
# By the rows of x of a tile: as how many each they are multiplied; slots of the ring, what the shared memory holds, and enough.
BLOCKS = {64: (64, 0), 128: (128, 0), 160: (32, 128), 192: (64, 128), 256: (256, 0)}
SLOTS = {64: 8, 128: 8, 160: 8, 192: 7, 256: 5}
LEAVING = 2  # chunks that could be multiplied while sums are left for another program, or added
REST_COST = {64: 0.48, 128: 0.65, 192: 0.84}  # time of a tile of so many rows of x in that of one of 256
REGISTERS = 248  # of a thread of the second group; the first has what is left

_ROWS = gl.constexpr(ROWS)
_WARPS = gl.constexpr(WARPS)
_TILE = gl.constexpr(TILE)
_CHUNK = gl.constexpr(CHUNK)
_HALF = gl.constexpr(HALF)
_REGISTERS = gl.constexpr(REGISTERS)
_WORDS = gl.constexpr(WORDS)
_BFLOAT16 = gl.constexpr(BFLOAT16.value)
_FLOAT16 = gl.constexpr(FLOAT16.value)
_CONSTRAINTS = gl.constexpr(CONSTRAINTS.value)
# Where the words (64, 16) of a chunk lie: a thread has those that it needs as the tensor cores' left operand.
_PACKED = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [8, 0], [0, 8]],
        lane_bases=[[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[TILE, WORDS],
    )
)


@gluon.jit
def codes(words, dtype: gl.constexpr):
    """Eight planes of codes (64, 16) of a chunk."""
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(_BFLOAT16, _CONSTRAINTS, [words], (gl.bfloat16,) * 8, is_pure=True, pack=2)
    else:
        return gl.inline_asm_elementwise(_FLOAT16, _CONSTRAINTS, [words], (gl.float16,) * 8, is_pure=True, pack=2)


@gluon.jit
def _half(c0, c1, c2, c3, s, t, LAYOUT: gl.constexpr):
    """q * s of four planes, rounded once, as (ROWS, 64); ``s`` is the first two planes' scale, ``t`` the others'."""
    even = gl.join(c0 * s, c2 * t)
    odd = gl.join(c1 * s, c3 * t)
    q = gl.reshape(gl.permute(gl.join(even, odd), (0, 2, 3, 1)), (_TILE, _HALF))
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
def _place(tile, start, row_tiles, blocks, M, DEALT: gl.constexpr, BAND: gl.constexpr, WIDTH: gl.constexpr):
    """The first output row of a tile and its first row of x, where the first tile's is ``start``."""
    first = tile // (BAND * row_tiles) * BAND
    size = gl.minimum(blocks - first, BAND)
    inside = tile % (BAND * row_tiles)
    token = start + (first + inside % size) * WIDTH
    if not DEALT:  # sums in shares are rounded otherwise than whole ones: two programs would write different bits
        token = gl.minimum(token, gl.maximum(M - WIDTH, 0))
    return inside // size * _ROWS, token


@gluon.jit
def _locate(part, parts, work, DEALT: gl.constexpr, BAND: gl.constexpr, WIDTH: gl.constexpr):
    """One of a program's parts: its first output row, first row of x, first chunk, and the chunk after its last."""
    program, programs, start, blocks, M, chunks, padded, deal = work
    row_tiles = (padded + _ROWS - 1) // _ROWS
    tile, first, after = _part(part, parts, program, programs, row_tiles * blocks, chunks, deal, DEALT)
    row, token = _place(tile, start, row_tiles, blocks, M, DEALT, BAND, WIDTH)
    return row, token, first, after


@gluon.jit
def _next_slot(slot, phase, STEP: gl.constexpr, SLOTS: gl.constexpr):
    """The slot of the ring STEP after one, and the phase in which it is filled."""
    slot += STEP
    if slot >= SLOTS:
        slot -= SLOTS
        phase = phase ^ 1
    return slot, phase


@gluon.jit
def _load(
    x, ring, ahead, parts, work, GROUP: gl.constexpr, TOKENS: gl.constexpr, MORE: gl.constexpr, SLOTS: gl.constexpr,
    DEALT: gl.constexpr, BAND: gl.constexpr,
):  # fmt: skip
    """Begin to load a group's half of a chunk of x once both groups are done with its slot; returns what it loads next.

    ``ahead``: the part of this chunk, its first row of x, the chunk, the one after the part's last, the slot and its phase.
    """
    slots, full, empty = ring
    part, token, chunk, after, slot, phase = ahead
    on = part < parts
    k = chunk * _CHUNK + GROUP * _HALF
    mbarrier.wait(empty.index(slot), phase, pred=on)
    mbarrier.expect(full.index(slot), (TOKENS + MORE) * _HALF * 2, pred=on)
    tma.async_copy_global_to_shared(x[0], [token, k], full.index(slot), slots[0].index(slot), pred=on)
    if MORE > 0:
        tma.async_copy_global_to_shared(x[1], [token + TOKENS, k], full.index(slot), slots[1].index(slot), pred=on)
    slot, phase = _next_slot(slot, phase, 2, SLOTS)
    chunk += 1
    if chunk == after:
        part += 1
        _row, token, chunk, after = _locate(part, parts, work, DEALT, BAND, TOKENS + MORE)
    return part, token, chunk, after, slot, phase


@gluon.jit
def _words(packed, scale, row, chunk, chunks, padded, G: gl.constexpr):
    """The words (64, 16) of a chunk from an output row on, and the scales of its up to four groups."""
    r = gl.minimum(row + gl.arange(0, _TILE, layout=gl.SliceLayout(1, _PACKED)), padded - 1)
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
    packed, scale, partial, counters, x, y, x_other, y_other, x_third, y_third, M, chunks, padded,
    programs, helpers, each, shares, head, rest_helpers, rest_each, rest_shares, rest_head,
    G: gl.constexpr, TOKENS: gl.constexpr, MORE: gl.constexpr, SLOTS: gl.constexpr,
    REST: gl.constexpr, REST_MORE: gl.constexpr, REST_SLOTS: gl.constexpr, DEALT: gl.constexpr, BAND: gl.constexpr,
):  # fmt: skip
    """ROWS outputs of TOKENS + MORE rows of x, tile after tile, by the first ``programs``; the others take the last rows of x.

    Those are REST + REST_MORE, if any. ``x`` and ``y`` are tensor descriptors, with blocks (TOKENS, 64); the others' blocks have
    MORE, REST and REST_MORE rows, in this order, those that are not 0: two at most.
    ``helpers`` to ``head``, and those of the rest, say how tiles are dealt out: ``_Deal`` of gracekit.quant._int4_launch.
    ``partial`` has two places of (64, rows of x of a tile) for each share, ``counters`` two zeros, which are set back.
    SLOTS, REST_SLOTS: of the ring, at least four.
    """
    WIDTH: gl.constexpr = TOKENS + MORE
    program = gl.program_id(0)
    deal = (helpers, each, shares, head)
    blocks = M // WIDTH if REST > 0 else (M + WIDTH - 1) // WIDTH
    slabs = (padded + _ROWS - 1) // _ROWS * blocks % programs * shares
    xs = (x, x_other) if MORE > 0 else (x,)
    ys = (y, y_other) if MORE > 0 else (y,)
    if REST == 0 or program < programs:
        work = (program, programs, 0, blocks, M, chunks, padded, deal)
        _multiply(packed, scale, partial, counters, xs, ys, work, G, TOKENS, MORE, SLOTS, DEALT, BAND)
    else:
        rest = (rest_helpers, rest_each, rest_shares, rest_head)
        xs_of_rest = (x_other, x_third) if REST_MORE > 0 else (x_other,)
        ys_of_rest = (y_other, y_third) if REST_MORE > 0 else (y_other,)
        work_of_rest = (program - programs, gl.num_programs(0) - programs, blocks * WIDTH, 1, M, chunks, padded, rest)
        _multiply(
            packed, scale, partial + slabs.to(gl.int64) * (_ROWS * WIDTH), counters + 2 * slabs, xs_of_rest, ys_of_rest,
            work_of_rest, G, REST, REST_MORE, REST_SLOTS, DEALT, BAND,
        )  # fmt: skip


@gluon.jit
def _multiply(
    packed, scale, partial, counters, x, y, work,
    G: gl.constexpr, TOKENS: gl.constexpr, MORE: gl.constexpr, SLOTS: gl.constexpr, DEALT: gl.constexpr, BAND: gl.constexpr,
):  # fmt: skip
    """What a program computes, by two groups of warps.

    ``work``: which one it is, of how many; the first row of x and the number of blocks of them; M, chunks, padded; and the deal.
    """
    dtype: gl.constexpr = x[0].dtype
    slots = (gl.allocate_shared_memory(dtype, [SLOTS, TOKENS, _HALF], x[0].layout),)
    leaving = (gl.allocate_shared_memory(dtype, [2, TOKENS, _TILE], y[0].layout),)
    if MORE > 0:
        slots = slots + (gl.allocate_shared_memory(dtype, [SLOTS, MORE, _HALF], x[1].layout),)
        leaving = leaving + (gl.allocate_shared_memory(dtype, [2, MORE, _TILE], y[1].layout),)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    fence_async_shared()
    gl.thread_barrier()
    ring = (slots, full, empty)
    gl.warp_specialize(
        [
            (_multiply_rows, (packed, scale, partial, counters, x, y, ring, leaving, work, 0, G, TOKENS, MORE, SLOTS, DEALT, BAND)),
            (_multiply_rows, (packed, scale, partial, counters, x, y, ring, leaving, work, 1, G, TOKENS, MORE, SLOTS, DEALT, BAND)),
        ],
        [_WARPS],
        [_REGISTERS],
    )  # fmt: skip


@gluon.jit
def _multiply_half(total, left, before, ring, slot, phase):
    """Begin to add the product of a half chunk once its x is there, and wait until the left operand of the one before is free."""
    slots, full, _empty = ring
    mbarrier.wait(full.index(slot), phase)
    begun = ()
    for piece in gl.static_range(len(slots)):
        begun = begun + (warpgroup_mma(left, slots[piece].index(slot).permute((1, 0)), total[piece], is_async=True),)
    held = warpgroup_mma_wait(len(slots), deps=begun + (before,))
    return held[: len(slots)], held[len(slots)]


@gluon.jit
def _multiply_rows(
    packed, scale, partial, counters, x, y, ring, leaving, work,
    GROUP: gl.constexpr, G: gl.constexpr, TOKENS: gl.constexpr, MORE: gl.constexpr, SLOTS: gl.constexpr,
    DEALT: gl.constexpr, BAND: gl.constexpr,
):  # fmt: skip
    """The first or second 64 output rows of a program's tiles."""
    dtype: gl.constexpr = x[0].dtype
    WIDTH: gl.constexpr = TOKENS + MORE
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, TOKENS, 16])
    MMA_MORE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, MORE, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    program, programs, _start, blocks, _M, chunks, padded, deal = work
    helpers, each, shares, _head = deal
    _slots, _full, empty = ring
    tiles = (padded + _ROWS - 1) // _ROWS * blocks
    parts = _parts(program, programs, tiles, deal, DEALT)
    row, token, first, after = _locate(0, parts, work, DEALT, BAND, WIDTH)
    words, s0, s1, s2, s3 = _words(packed, scale, row + GROUP * _TILE, first, chunks, padded, G)
    # Launched while the kernel before it ends: waits for x, and for whoever still has ``partial``.
    gdc_wait()
    # What is loaded runs so far ahead that two slots or three are left over: so late the other group may be.
    ahead = (0, token, first, after, GROUP, 1)
    for _chunk in gl.static_range((SLOTS - 2) // 2):
        ahead = _load(x, ring, ahead, parts, work, GROUP, TOKENS, MORE, SLOTS, DEALT, BAND)
    slot = 0
    phase = 0
    done = 0
    for part in range(parts):
        total = (gl.zeros([_TILE, TOKENS], gl.float32, MMA),)
        if MORE > 0:
            total = total + (gl.zeros([_TILE, MORE], gl.float32, MMA_MORE),)
        right = gl.zeros([_TILE, _HALF], dtype, LEFT)
        for chunk in range(first, after):
            c0, c1, c2, c3, c4, c5, c6, c7 = codes(words, dtype)
            left = _half(c0, c1, c2, c3, s0.to(dtype)[:, None], s1.to(dtype)[:, None], LEFT)
            t2, t3 = s2.to(dtype)[:, None], s3.to(dtype)[:, None]
            words, s0, s1, s2, s3 = _words(
                packed, scale, row + GROUP * _TILE, gl.minimum(chunk + 1, after - 1), chunks, padded, G
            )
            total, right = _multiply_half(total, left, right, ring, slot, phase)
            mbarrier.arrive(empty.index(done), count=1, pred=chunk > first)
            if GROUP == 0:
                ahead = _load(x, ring, ahead, parts, work, GROUP, TOKENS, MORE, SLOTS, DEALT, BAND)
            done = slot
            slot, phase = _next_slot(slot, phase, 1, SLOTS)
            right = _half(c4, c5, c6, c7, t2, t3, LEFT)
            total, left = _multiply_half(total, right, left, ring, slot, phase)
            mbarrier.arrive(empty.index(done), count=1)
            if GROUP == 1:
                ahead = _load(x, ring, ahead, parts, work, GROUP, TOKENS, MORE, SLOTS, DEALT, BAND)
            done = slot
            slot, phase = _next_slot(slot, phase, 1, SLOTS)
        held = warpgroup_mma_wait(0, deps=total + (right,))
        total = held[: len(y)]
        mbarrier.arrive(empty.index(done), count=1)

        was_row, was_token, was_first, was_after = row, token, first, after
        row, token, first, after = _locate(part + 1, parts, work, DEALT, BAND, WIDTH)
        words, s0, s1, s2, s3 = _words(packed, scale, row + GROUP * _TILE, first, chunks, padded, G)
        if DEALT and was_first > 0:
            _leave_share(total, 2 * (program * each + part - tiles // programs) + GROUP, partial, counters)
        else:
            if DEALT and was_after < chunks:
                # Not by its tile's number: Triton 3.6 loses what changes in a loop and is asked for by an inner one's bounds alone.
                for share in range((program - helpers) * shares, (program - helpers + 1) * shares):
                    total = _add_share(total, 2 * share + GROUP, partial, counters)
            tma.store_wait(0)
            gl.thread_barrier()
            for piece in gl.static_range(len(y)):
                leaving[piece].index(GROUP).permute((1, 0)).store(total[piece].to(dtype))
            fence_async_shared()
            gl.thread_barrier()
            for piece in gl.static_range(len(y)):
                at = [was_token + piece * TOKENS, was_row + GROUP * _TILE]
                tma.async_copy_shared_to_global(y[piece], at, leaving[piece].index(GROUP))
    tma.store_wait(0)


@gluon.jit
def _cells(partial, place, total, piece: gl.constexpr):
    """Where the sums of a piece of a tile lie in a place of ``partial``: what a warp stores at once lies together."""
    LAYOUT: gl.constexpr = total[piece].type.layout
    WIDTH: gl.constexpr = total[0].shape[1] + (total[1].shape[1] if len(total) == 2 else 0)
    row = gl.arange(0, _TILE, layout=gl.SliceLayout(1, LAYOUT))[:, None]
    token = gl.arange(0, total[piece].shape[1], layout=gl.SliceLayout(0, LAYOUT))[None, :]
    block = row // 16 * (total[piece].shape[1] // 8) + token // 8
    first = place.to(gl.int64) * (_TILE * WIDTH) + piece * (_TILE * total[0].shape[1])
    return partial + first + (block * 128 + row % 16 * 8 + token % 8)


@gluon.jit
def _leave_share(total, place, partial, counters):
    """Leave the sums of a share in ``partial`` and say so."""
    for piece in gl.static_range(len(total)):
        gl.store(_cells(partial, place, total, piece), total[piece])
    gl.thread_barrier()  # all threads have stored before the one that publishes it
    gl.atomic_xchg(counters + place, 1, sem="release", scope="gpu")


@gluon.jit
def _add_share(total, place, partial, counters):
    """Add what a helper leaves of a tile.

    Helpers are programs before this one, so that they have begun: waiting for them always ends.
    """
    while gl.atomic_cas(counters + place, 1, 0, sem="acquire", scope="gpu") == 0:
        pass
    added = ()
    for piece in gl.static_range(len(total)):
        added = added + (total[piece] + gl.load(_cells(partial, place, total, piece), cache_modifier=".cg"),)
    return added
