"""y = x W^T for up to 16 rows of x and packed 4-bit weights, whose inputs many small programs share out among them, in Gluon.

So few rows are to be multiplied while the weight is read, in a few microseconds. What then counts beside the reading is that no
instruction is wasted, that there are always programs enough to unpack, and how long it takes at the end to add what the programs of
a tile have summed.

A program has 64 outputs and two warps, each of which multiplies with the small products of the tensor cores (``mma.sync``): a warp
need not wait for another between unpacking and multiplying. One of the eight planes of a chunk is just the left operand of such a
product. Words, scales and x are copied into a ring in shared memory; the words and scales of the first chunks while the kernel
before this one still runs.

SPLIT neighbouring programs share the inputs of a tile, and in the end the adding too: each adds one part of the tile, and sends
its sums of the rest to the others. A sum is its own signal: the workspace holds zeros, a sum that is zero is sent as minus zero,
whose bits are not all zero, and so what is no longer zero has arrived. It is then set back to zero. No fence is needed and no
counter, and one way through the cache suffices. The shares are added in a fixed order: the result is the same at every run.

Programs that wait for each other must come to run together. They follow one another, and a device begins programs in their order:
of all that have begun, only those of the last tile can lack one, and the others end and make room.

No interpreter runs Gluon; the table of :mod:`gracekit.quant._int4_choices` takes a kernel only after comparing its product.
"""

# M rows of x, N out_features, K in_features, G group size, C chunks of 128 inputs, T tiles of 64 output rows (see _int4_layout)

from __future__ import annotations

import functools
import itertools
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gracekit.quant._gluon_int4 import codes
from gracekit.quant._int4_layout import CHUNK, TILE, WORDS

WIDTHS = (8, 16)  # rows of x in a program
WARPS = 2
THREADS = 32 * WARPS

_TILE = gl.constexpr(TILE)
_CHUNK = gl.constexpr(CHUNK)
_WORDS = gl.constexpr(WORDS)
_PLANES = gl.constexpr(CHUNK // WORDS)
_WARPS = gl.constexpr(WARPS)
_THREADS = gl.constexpr(THREADS)
_NAP = 20  # nanoseconds between two looks at what has not arrived


def _pairs(split: int, tokens: int) -> int:
    """Return how many pairs of each thread's sums a program adds, at most."""
    return -(-TILE * tokens // THREADS // 2 // split)


def slab_words(split: int, tokens: int) -> int:
    """Return the words of the workspace that a tile takes: to each of its programs, from each of the others."""
    return split * (split - 1) * _pairs(split, tokens) * 2 * THREADS


@functools.cache
def exchange(split: int, tokens: int, half: str) -> dict[str, Any]:
    """Return the options of the kernel that say how SPLIT programs exchange their sums, rounded to ``half``: bf16 or f16."""
    if split == 1:
        return {"SLAB": 0, "EXCHANGE": "", "OPERANDS": ""}
    return {
        "SLAB": slab_words(split, tokens),
        "EXCHANGE": _assembly(split, tokens, half),
        "OPERANDS": _operands(tokens),
    }


def _assembly(split: int, tokens: int, half: str) -> str:
    """PTX that sends a thread's sums of a tile to the programs that add them, and adds and writes those of its own.

    Operands, as many of each as the thread has sums: nothing ($0 and after, what an elementwise function has to return), the sums,
    the addresses of the outputs (zero: not to be written), and the slab's address and the program's share, the same for all.
    """
    values, pairs = TILE * tokens // THREADS, _pairs(split, tokens)
    returned, sums, outputs, (slab, *_), (share, *_) = (
        [f"${place}" for place in range(first, first + values)] for first in range(0, 5 * values, values)
    )
    parts = [range(first, min(first + pairs, values // 2)) for first in range(0, split * pairs, pairs)]
    return "\n".join(
        [
            "{",
            ".reg .pred p, other;",
            f".reg .b32 t, low, high, w<{2 * (split - 1) * pairs}>;",
            ".reg .b64 mine, to;",
            ".reg .f32 sum, addend;",
            ".reg .b16 rounded;",
            "mov.u32 t, %tid.x;",
            "mul.wide.u32 mine, t, 8;",
            f"add.s64 mine, mine, {slab};",
            *itertools.chain(*(_sending(receiver, parts, split, share, sums) for receiver in range(split))),
            *itertools.chain(
                *(_adding(receiver, parts, split, share, sums, outputs, half) for receiver in range(split))
            ),
            *(f"mov.b32 {nothing}, 0;" for nothing in returned),
            "}",
        ]
    )


def _offset(receiver: int, sender: int, place: int, parts: list[range], split: int) -> int:
    """Return where in a slab, in bytes, a receiver finds one pair of its part from one of the other programs."""
    return ((receiver * (split - 1) + sender) * len(parts[0]) + place) * 8 * THREADS


def _sending(receiver: int, parts: list[range], split: int, share: str, sums: list[str]) -> list[str]:
    """PTX that sends one receiver its part, unless that is the program itself."""
    first = receiver * (split - 1)
    lines = [
        f"setp.ne.s32 other, {share}, {receiver};",
        f"setp.gt.s32 p, {share}, {receiver};",  # a receiver has no place for itself
        f"selp.s32 t, {first - 1}, {first}, p;",
        f"add.s32 t, t, {share};",
        f"mad.wide.s32 to, t, {_offset(0, 1, 0, parts, split)}, mine;",
    ]
    for place, pair in enumerate(parts[receiver]):
        for word, value in zip(("low", "high"), sums[2 * pair : 2 * pair + 2], strict=True):
            lines += [f"setp.eq.f32 p, {value}, 0f00000000;", f"selp.b32 {word}, 0x80000000, {value}, p;"]
        lines.append(f"@other st.relaxed.gpu.global.v2.b32 [to + {_offset(0, 0, place, parts, split)}], {{low, high}};")
    return lines


def _adding(
    receiver: int, parts: list[range], split: int, share: str, sums: list[str], outputs: list[str], half: str
) -> list[str]:
    """PTX for the program that is the receiver: waits for its part from the others, adds, writes, and leaves zeros."""
    part, senders = parts[receiver], range(split - 1)
    if not part:
        return []
    words = iter(range(2 * len(part) * len(senders)))
    came = {(sender, place): (f"w{next(words)}", f"w{next(words)}") for sender in senders for place in range(len(part))}
    at = {key: f"[mine + {_offset(receiver, *key, parts, split)}]" for key in came}
    lines = [
        f"setp.ne.s32 other, {share}, {receiver};",
        f"@other bra DONE{receiver};",
        f"bra LOOK{receiver};",
        f"WAIT{receiver}:",
        f"nanosleep.u32 {_NAP};",
        f"LOOK{receiver}:",
        *(f"ld.relaxed.gpu.global.v2.b32 {{{low}, {high}}}, {at[key]};" for key, (low, high) in came.items()),
        "setp.ne.s32 p, t, t;",
        *(f"setp.eq.or.b32 p, {word}, 0, p;" for word in itertools.chain(*came.values())),
        f"@p bra WAIT{receiver};",
    ]
    for place, side in itertools.product(range(len(part)), range(2)):
        value = 2 * part[place] + side
        addends = [came[sender, place][side] for sender in senders]
        addends.insert(receiver, sums[value])
        lines.append("mov.f32 sum, 0f00000000;")
        for addend in addends:
            lines += [f"mov.b32 addend, {addend};", "add.f32 sum, sum, addend;"]
        lines += [f"cvt.rn.{half}.f32 rounded, sum;", f"setp.ne.s64 p, {outputs[value]}, 0;"]
        lines.append(f"@p st.global.b16 [{outputs[value]}], rounded;")
    lines.append("mov.b32 t, 0;")
    lines += [f"st.relaxed.gpu.global.v2.b32 {place}, {{t, t}};" for place in at.values()]
    return [*lines, f"DONE{receiver}:"]


def _operands(tokens: int) -> str:
    """Return the constraints of the operands of :func:`_assembly`."""
    values = TILE * tokens // THREADS
    return ",".join(["=&r"] * values + ["f"] * values + ["l"] * (2 * values) + ["r"] * values)


@gluon.jit
def _copy_weights(words_at, scales_at, ring, slot, padded, GROUPS: gl.constexpr):
    async_copy.async_copy_global_to_shared(ring[0].index(slot), words_at)
    for group in gl.static_range(GROUPS):
        async_copy.async_copy_global_to_shared(ring[1].index(slot * GROUPS + group), scales_at + group * padded)


@gluon.jit
def _copy_inputs(inputs_at, ring, slot, k, left, MASKED: gl.constexpr):
    """MASKED: the chunk may end behind the inputs, of which so many are ``left``; those that are not there count as zeros."""
    if MASKED:
        async_copy.async_copy_global_to_shared(ring[2].index(slot), inputs_at, k[None, :] < left)
    else:
        async_copy.async_copy_global_to_shared(ring[2].index(slot), inputs_at)


@gluon.jit(do_not_specialize=["M", "chunks"])
def few_kernel(
    x, packed, scale, y, workspace, M, N, K, stride, chunks, padded,
    STEPS: gl.constexpr, G: gl.constexpr, SPLIT: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr,
    EARLY: gl.constexpr, SLAB: gl.constexpr, EXCHANGE: gl.constexpr, OPERANDS: gl.constexpr,
):  # fmt: skip
    """64 outputs of all rows of x, at most TOKENS, from one of SPLIT shares of the STEPS chunks.

    Rows of x begin at multiples of 16 bytes; no tensor has an offset of more than 31 bits. MASKED: the last chunk ends behind the
    inputs.
    SLAB, EXCHANGE, OPERANDS: of :func:`exchange`.
    EARLY: launched while the kernel before it ends; waits for what that has written, and lets the next one be launched likewise.
    The weight must not be what that has written: of ``packed`` and ``scale`` it reads the first chunks before.
    """
    dtype: gl.constexpr = x.dtype.element_ty
    GROUPS: gl.constexpr = _CHUNK // G
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [_WARPS, 1], [16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    # 16 bytes a thread; swizzled so that reading the operands meets each bank once.
    WORDS_COPY: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [_WARPS, 1], [1, 0])
    INPUTS_COPY: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [_WARPS, 1], [1, 0])
    SCALES_COPY: gl.constexpr = gl.BlockedLayout([1], [32], [_WARPS], [0])
    ring = (
        gl.allocate_shared_memory(gl.int32, [STAGES, _TILE, _WORDS], gl.SwizzledSharedLayout(8, 2, 2, [1, 0])),
        gl.allocate_shared_memory(gl.float32, [STAGES * GROUPS, _TILE], gl.SwizzledSharedLayout(1, 1, 1, [0])),
        gl.allocate_shared_memory(dtype, [STAGES, TOKENS, _CHUNK], gl.SwizzledSharedLayout(8, 1, 8, [1, 0])),
    )
    tile, share = gl.program_id(0) // SPLIT, gl.program_id(0) % SPLIT
    SHARE: gl.constexpr = (STEPS + SPLIT - 1) // SPLIT
    SURE: gl.constexpr = STEPS - (SPLIT - 1) * SHARE  # chunks that the last share, too, has
    begin, end = share * SHARE, gl.minimum((share + 1) * SHARE, STEPS)

    row = gl.arange(0, _TILE, layout=gl.SliceLayout(1, WORDS_COPY))[:, None]
    word = gl.arange(0, _WORDS, layout=gl.SliceLayout(0, WORDS_COPY))[None, :]
    words_at = packed + ((tile * chunks + begin) * (_TILE * _WORDS) + (row * _WORDS + word))
    scales_at = scale + (begin * GROUPS * padded + tile * _TILE + gl.arange(0, _TILE, layout=SCALES_COPY))
    # Rows beyond the last are computed from the first ones and not written.
    token = gl.arange(0, TOKENS, layout=gl.SliceLayout(1, INPUTS_COPY)) % M
    k = gl.arange(0, _CHUNK, layout=gl.SliceLayout(0, INPUTS_COPY))
    inputs_at = x + (begin * _CHUNK + token[:, None] * stride + k[None, :])
    for ahead in gl.static_range(STAGES - 1):
        is_there = True if ahead < SURE else begin + ahead < end
        if is_there:
            _copy_weights(
                words_at + ahead * (_TILE * _WORDS), scales_at + ahead * GROUPS * padded, ring, ahead, padded, GROUPS
            )
        async_copy.commit_group()
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    for ahead in gl.static_range(STAGES - 1):
        is_there = True if ahead < SURE else begin + ahead < end
        if is_there:
            _copy_inputs(inputs_at + ahead * _CHUNK, ring, ahead, k, K - (begin + ahead) * _CHUNK, MASKED)
        async_copy.commit_group()

    total = gl.zeros([_TILE, TOKENS], gl.float32, MMA)
    slot, last = 0, STAGES - 1
    for chunk in range(begin, end):
        async_copy.wait_group(STAGES - 2)
        gl.thread_barrier()  # the chunk has come, and the slot of the one before it is free
        words_ahead = words_at + (STAGES - 1) * (_TILE * _WORDS)
        if chunk + STAGES - 1 < end:
            _copy_weights(words_ahead, scales_at + (STAGES - 1) * GROUPS * padded, ring, last, padded, GROUPS)
            left = K - (chunk + STAGES - 1) * _CHUNK
            _copy_inputs(inputs_at + (STAGES - 1) * _CHUNK, ring, last, k, left, MASKED)
        async_copy.commit_group()
        words_at += _TILE * _WORDS
        scales_at += GROUPS * padded
        inputs_at += _CHUNK
        planes = codes(ring[0].index(slot).load(LEFT), dtype)
        for group in gl.static_range(GROUPS):
            sums = gl.zeros([_TILE, TOKENS], gl.float32, MMA)
            for plane in gl.static_range(group * _PLANES // GROUPS, (group + 1) * _PLANES // GROUPS):
                inputs = ring[2].index(slot).slice(plane * _WORDS, _WORDS, 1).permute((1, 0)).load(RIGHT)
                sums = mma_v2(planes[plane], inputs, sums)
            total += sums * ring[1].index(slot * GROUPS + group).load(gl.SliceLayout(1, MMA))[:, None]
        last = slot
        slot = gl.where(slot == STAGES - 1, 0, slot + 1)

    row = tile * _TILE + gl.arange(0, _TILE, layout=gl.SliceLayout(1, MMA))[:, None]
    token = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, MMA))[None, :]
    out = y + (token * N + row)
    written = (token < M) & (row < N)
    if SPLIT == 1:
        gl.store(out, total.to(dtype), mask=written)
    else:
        same = gl.zeros([_TILE, TOKENS], gl.int64, MMA)
        slab = same + (workspace + tile * SLAB).to(gl.int64)
        to = gl.where(written, out.to(gl.int64), 0)
        operands = [total, to, slab, same.to(gl.int32) + share]
        PACK: gl.constexpr = _TILE * TOKENS // _THREADS
        gl.inline_asm_elementwise(EXCHANGE, OPERANDS, operands, dtype=gl.int32, is_pure=False, pack=PACK)
