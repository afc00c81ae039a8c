"""y = x W^T for one or two rows of x and packed 4-bit weights, multiplied in whole numbers, in Gluon.

So few rows are multiplied as fast as the weight is read, if a weight takes few enough instructions. Making two bfloat16 numbers of
two codes takes three; but one mask makes four bytes, 16 times a code each, of the upper halves of a word's bytes, and a shift and a
mask of the lower ones. So it is bytes that the tensor cores multiply here, and x that is taken apart: in a chunk of 128 inputs it
becomes whole numbers i of 22 bits and a power of two, and these digits d of base 256::

    x = 2^e * i,    |i| < 2^21,    i = d0 + 256 * d1 + 65536 * d2,    -128 <= d < 128

Products of codes and digits are summed over a group without rounding, and then take the group's scale and the power of two in
float32. What is lost of an input is at most 2^-21 of the largest of its chunk, and of a bfloat16 number nothing from 2^-13 of that
on. An input that is not finite makes all outputs of its row NaN.

A program turns all of x into digits in shared memory, which its warps then read as the right operand: a column each for the three
digits of a row. The fourth column holds what the sums are to be multiplied by. Each warp takes other chunks of the inputs, and the
sums of all are added at the end, in the same order at every run. Words are loaded some steps ahead: the first of them, like the
launch of the next kernel, while the kernel before this one still runs.

Within a chunk, the inputs are in the order in which the words give their codes away. No interpreter runs Gluon; the table of
:mod:`gracekit.quant._int4_choices` takes a kernel only after comparing its product.
"""

# N out_features, K in_features, G group size, C chunks of 128 inputs, T tiles of 64 output rows (see _int4_layout)

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gracekit.quant._int4_layout import CHUNK, TILE, WORDS

MOST_TOKENS = 2

_TILE = gl.constexpr(TILE)
_CHUNK = gl.constexpr(CHUNK)
_WORDS = gl.constexpr(WORDS)
_COLUMNS = gl.constexpr(8)  # of a product of the tensor cores: three digits and a place for two rows of x
# The whole number that is, as the bits of a float32, 1.5 * 2^23: the bits of 1.5 * 2^23 + n for small n are that many more.
_START = gl.constexpr(0x4B400000)
_NOT_FINITE = gl.constexpr(0x7F800000)
_NAN = gl.constexpr(0x7FC00000)
_LEAST = gl.constexpr(32 << 23)  # a power of two so large that it over 2^24, and 2^20 over it, are float32 numbers


def _unpacking(group_size: int) -> str:
    """PTX that turns four neighbouring words ($8 to $11) into eight times four bytes, 16 * code; a group's follow one another."""
    words = ["$8", "$10", "$9", "$11"]
    lines = ["{", ".reg .b32 t, w0, w1, w2, w3;"]
    if group_size < CHUNK // 2:  # a word has bytes of two groups
        for place, (first, second) in enumerate([words[:2], words[2:]]):
            lines.append(f"prmt.b32 w{2 * place}, {first}, {second}, 0x6420;")
            lines.append(f"prmt.b32 w{2 * place + 1}, {first}, {second}, 0x7531;")
        words = ["w0", "w1", "w2", "w3"]
    for place, word in enumerate(words):
        lines.append(f"lop3.b32 ${2 * place}, {word}, 0xF0F0F0F0, 0x80808080, 0x6A;")
        lines.append(f"shl.b32 t, {word}, 4;")
        lines.append(f"lop3.b32 ${2 * place + 1}, t, 0xF0F0F0F0, 0x80808080, 0x6A;")
    return "\n".join([*lines, "}"])


# PTX that turns four inputs ($3 to $6), times a power of two ($7), into words of their first, second and third digits.
DIGITS = """{
.reg .f32 f; .reg .b32 i0, i1, i2, i3, low, high;
fma.rn.f32 f, $3, $7, 0f4B408080; mov.b32 i0, f;
fma.rn.f32 f, $4, $7, 0f4B408080; mov.b32 i1, f;
fma.rn.f32 f, $5, $7, 0f4B408080; mov.b32 i2, f;
fma.rn.f32 f, $6, $7, 0f4B408080; mov.b32 i3, f;
prmt.b32 low, i0, i1, 0x5140;
prmt.b32 high, i2, i3, 0x5140;
prmt.b32 $0, low, high, 0x5410;
xor.b32 $0, $0, 0x80808080;
prmt.b32 $1, low, high, 0x7632;
xor.b32 $1, $1, 0x80808080;
prmt.b32 low, i0, i1, 0x0062;
prmt.b32 high, i2, i3, 0x0062;
prmt.b32 $2, low, high, 0x5410;
add.u32 $2, $2, 0x40404040;
xor.b32 $2, $2, 0x80808080;
}"""
UNPACKING = {group_size: _unpacking(group_size) for group_size in (32, 64, 128)}

_DIGITS = gl.constexpr(DIGITS)
_UNPACKING = gl.constexpr(UNPACKING[128])
_UNPACKING_32 = gl.constexpr(UNPACKING[32])


@gluon.jit
def _codes(words, G: gl.constexpr):
    """Eight planes (PARTS, ROWS, 16) of bytes, 16 * code."""
    return gl.inline_asm_elementwise(
        _UNPACKING_32 if G == 32 else _UNPACKING, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r", [words], (gl.int8,) * 8,
        is_pure=True, pack=4,
    )  # fmt: skip


@gluon.jit
def _bytes(words):
    """Four planes of bytes that are the words themselves."""
    return gl.inline_asm_elementwise("", "=r,=r,=r,=r,0,1,2,3", [words], (gl.int8,) * 4, is_pure=True, pack=4)


@gluon.jit
def _side_by_side(planes, FIRST: gl.constexpr, COUNT: gl.constexpr, PARTS: gl.constexpr, ROWS: gl.constexpr):
    """COUNT planes (PARTS, ROWS, 16) from FIRST on as (PARTS, ROWS, 16 * COUNT), which no thread has to give up a value for."""
    if COUNT == 2:
        q = gl.permute(gl.join(planes[FIRST], planes[FIRST + 1]), (0, 1, 3, 2))
    elif COUNT == 4:
        even, odd = gl.join(planes[FIRST], planes[FIRST + 2]), gl.join(planes[FIRST + 1], planes[FIRST + 3])
        q = gl.permute(gl.join(even, odd), (0, 1, 3, 4, 2))
    else:
        even = gl.join(gl.join(planes[0], planes[4]), gl.join(planes[2], planes[6]))
        odd = gl.join(gl.join(planes[1], planes[5]), gl.join(planes[3], planes[7]))
        q = gl.permute(gl.join(even, odd), (0, 1, 3, 4, 5, 2))
    return gl.reshape(q, (PARTS, ROWS, COUNT * _WORDS))


@gluon.jit
def _ahead(part, step, chunks, PARTS: gl.constexpr, LAST: gl.constexpr):
    """How far on a part's chunk of a step is from its first; in the LAST step, if there is none, how far the last of all is."""
    ahead = step * PARTS
    if LAST:
        ahead += gl.minimum(part, chunks - 1 - step * PARTS) - part
    return ahead


@gluon.jit
def _load_step(
    words_at, words_part, scales_at, scales_part, step, chunks, padded, G: gl.constexpr, PARTS: gl.constexpr, LAST: gl.constexpr
):  # fmt: skip
    """The words (PARTS, ROWS, 16) of a step and the scales (PARTS, ROWS) of its up to four groups."""
    ahead = _ahead(words_part, step, chunks, PARTS, LAST)
    words = gl.load(words_at + ahead * (_TILE * _WORDS), eviction_policy="evict_first")
    at = scales_at + _ahead(scales_part, step, chunks, PARTS, LAST) * (_CHUNK // G) * padded
    scales = (gl.load(at),)
    for group in gl.static_range(1, _CHUNK // G):
        scales = scales + (gl.load(at + group * padded),)
    return words, scales


@gluon.jit
def _first_input(place, G: gl.constexpr):
    """The first of the four inputs of a chunk whose digits are together in one of 32 words."""
    quad, lower, pair, later = place % 16 // 4, place % 2, place // 2 % 2, place // 16
    if G == 32:
        return 4 * quad + 16 * (4 * later + 2 * pair + 1 - lower)
    else:
        return 4 * quad + 2 * pair + 16 * (4 * later + 1 - lower)


@gluon.jit
def _pair(word, dtype: gl.constexpr):
    """The two halves of a word in float32."""
    if dtype == gl.bfloat16:
        return (word << 16).to(gl.float32, bitcast=True), (word & -65536).to(gl.float32, bitcast=True)
    else:
        low = (word & 65535).to(gl.int16).to(gl.float16, bitcast=True)
        return low.to(gl.float32), (word >> 16).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)


@gluon.jit
def _digits(first, second, place, G: gl.constexpr, dtype: gl.constexpr, PARTS: gl.constexpr):
    """Words of digits and what their sums are multiplied by, (PARTS, 2, 4, 16), of x in the order of the codes.

    ``first`` and ``second`` (PARTS, 32) are words of two inputs each; ``place`` is 0 to 31.
    """
    if G == 32:
        x0, x1 = _pair(first, dtype)
        x2, x3 = _pair(second, dtype)
    else:
        x0, x2 = _pair(first, dtype)
        x1, x3 = _pair(second, dtype)
    every: gl.constexpr = tl.PropagateNan.ALL
    larger = gl.maximum(gl.abs(x0), gl.abs(x1), propagate_nan=every)
    larger = gl.maximum(larger, gl.maximum(gl.abs(x2), gl.abs(x3), propagate_nan=every), propagate_nan=every)
    most = gl.max(larger.to(gl.int32, bitcast=True), 1)[:, None]
    power = gl.maximum(most & _NOT_FINITE, _LEAST)
    # 2^20 over the power of two: its exponent, 274 less the other, as a number of 32 bits.
    up, _ = gl.broadcast(((274 << 23) - (1 << 32) - power).to(gl.float32, bitcast=True), x0)
    d0, d1, d2 = gl.inline_asm_elementwise(
        _DIGITS, "=&r,=&r,=&r,f,f,f,f,f", [x0, x1, x2, x3, up], (gl.int32,) * 3, is_pure=True, pack=1
    )
    digit = place % 4
    # The reciprocal of that, over 16 and times 256 for each digit; nothing for the fourth column.
    down = gl.where(digit < 3, power + ((8 * digit - 24) << 23), 0)
    down = gl.where(most >= _NOT_FINITE, _NAN, down)
    columns = gl.join(gl.join(d0, d2), gl.join(d1, down))
    return gl.reshape(gl.permute(gl.reshape(columns, (PARTS, 2, _WORDS, 4)), (0, 1, 3, 2)), (PARTS, 2, 4, _WORDS))


@gluon.jit
def _factors(digits, column: gl.constexpr, PARTS: gl.constexpr, MMA: gl.constexpr):
    """What the sums of each column are multiplied by, (PARTS, 8), as a row's fourth column has it."""
    READ: gl.constexpr = gl.BlockedLayout([1, 1, 1, 2], [1, 1, 8, 4], [PARTS, 1, 1, 1], [3, 2, 1, 0])
    found = digits.slice(0, 1, dim=1).slice(column, 1, dim=2).slice(0, _COLUMNS, dim=3).load(READ)
    found = gl.reshape(found, (PARTS, _COLUMNS)).to(gl.float32, bitcast=True)
    return gl.convert_layout(found, gl.SliceLayout(1, MMA))


@gluon.jit
def _add_step(
    total, words, scales, digits, G: gl.constexpr, ROWS: gl.constexpr, TOKENS: gl.constexpr, PARTS: gl.constexpr, MMA: gl.constexpr
):  # fmt: skip
    """Add PARTS chunks to ``total`` (PARTS, ROWS, 8)."""
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 4)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, MMA, 4)
    codes = _codes(words, G)
    if TOKENS == 1:  # the columns of the row, twice
        TWICE: gl.constexpr = gl.BlockedLayout([1, 2, 1, 1, 4], [1, 1, 2, 4, 4], [PARTS, 1, 1, 1, 1], [4, 3, 2, 1, 0])
        v = digits.load(gl.SliceLayout(2, TWICE))
        v, _ = gl.broadcast(gl.expand_dims(v, 2), gl.zeros([PARTS, 2, 2, 4, _WORDS], gl.int32, TWICE))
        v = gl.reshape(v, (PARTS, 2, _COLUMNS, _WORDS))
    else:
        v = digits.load(gl.BlockedLayout([1, 2, 1, 4], [1, 1, 8, 4], [PARTS, 1, 1, 1], [3, 2, 1, 0]))
    low, high = gl.split(gl.permute(v, (0, 2, 3, 1)))
    p0, p1, p2, p3 = _bytes(low)
    p4, p5, p6, p7 = _bytes(high)
    planes = (p0, p1, p2, p3, p4, p5, p6, p7)
    column = gl.arange(0, _COLUMNS, layout=gl.SliceLayout(0, gl.SliceLayout(1, MMA)))[None, :]
    second = _factors(digits, 7, PARTS, MMA) if TOKENS == 2 else 0.0
    factors = gl.where(column < 4, _factors(digits, 3, PARTS, MMA), second)[:, None, :]
    start = gl.full([PARTS, ROWS, _COLUMNS], _START, gl.int32, MMA)
    COUNT: gl.constexpr = G // _WORDS
    for group in gl.static_range(_CHUNK // G):
        q = gl.convert_layout(_side_by_side(codes, group * COUNT, COUNT, PARTS, ROWS), LEFT)
        d = gl.permute(_side_by_side(planes, group * COUNT, COUNT, PARTS, _COLUMNS), (0, 2, 1))
        sums = mma_v2(q, gl.convert_layout(d, RIGHT), start).to(gl.float32, bitcast=True) - 1.5 * (1 << 23)
        total += sums * (scales[group][:, :, None] * factors)
    return total


@gluon.jit(do_not_specialize=["chunks"])
def vector_kernel(
    x, packed, scale, y, N, K, stride, chunks, padded,
    STEPS: gl.constexpr, G: gl.constexpr, ROWS: gl.constexpr, TOKENS: gl.constexpr, PARTS: gl.constexpr, DEPTH: gl.constexpr,
    MASKED: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """ROWS outputs, at most 64, of the TOKENS rows of x, by a warp for each of PARTS chunks at once.

    DEPTH: steps, of STEPS, whose words are loaded ahead. MASKED: the last step may lie beyond the inputs.
    EARLY: launched while the kernel before it ends; waits for what that has written, and lets the next one be launched likewise.
    The weight must not be what that has written: of ``packed`` and ``scale`` it reads the first steps before.
    """
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [PARTS, 1, 1], [1, 16, 8])
    PACKED: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 8, 4], [PARTS, 1, 1], [2, 1, 0])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    LAST: gl.constexpr = STEPS - 1
    digits = ()
    for step in gl.static_range(STEPS):  # apart, so that none waits for another to be written
        digits = digits + (gl.allocate_shared_memory(gl.int32, [PARTS, 2, 4 * TOKENS, _WORDS], PLAIN),)

    row = gl.program_id(0) * ROWS
    words_part = gl.arange(0, PARTS, layout=gl.SliceLayout(1, gl.SliceLayout(2, PACKED)))[:, None, None]
    r = gl.arange(0, ROWS, layout=gl.SliceLayout(0, gl.SliceLayout(2, PACKED)))[None, :, None]
    word = gl.arange(0, _WORDS, layout=gl.SliceLayout(0, gl.SliceLayout(1, PACKED)))[None, None, :]
    tile = (row // _TILE).to(gl.int64) * (chunks * _TILE) + row % _TILE
    words_at = packed + tile * _WORDS + ((words_part * _TILE + r) * _WORDS + word)
    SCALES: gl.constexpr = gl.SliceLayout(2, MMA)
    scales_part = gl.arange(0, PARTS, layout=gl.SliceLayout(1, SCALES))[:, None]
    r = gl.arange(0, ROWS, layout=gl.SliceLayout(0, SCALES))[None, :]
    scales_at = scale + row + (scales_part * (_CHUNK // G) * padded + r)
    loaded = ()
    for step in gl.static_range(DEPTH):
        loaded = loaded + (
            _load_step(
                words_at, words_part, scales_at, scales_part, step, chunks, padded, G, PARTS, MASKED and step == LAST
            ),
        )  # fmt: skip
    if EARLY:
        gdc_wait()

    READ: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [PARTS, 1], [1, 0])
    chunk = gl.arange(0, PARTS, layout=gl.SliceLayout(1, READ))[:, None]
    place = gl.arange(0, 32, layout=gl.SliceLayout(0, READ))[None, :]
    k = _first_input(place, G)
    NEXT: gl.constexpr = 2 if G == 32 else 32  # inputs on to the second pair
    x_at = x.to(gl.pointer_type(gl.int32)) + (chunk * (_CHUNK // 2) + k // 2)
    inputs = ()
    for step in gl.static_range(STEPS):
        pairs = ()
        for token in gl.static_range(TOKENS):
            at = x_at + (token * (stride // 2) + step * (PARTS * _CHUNK // 2))
            if MASKED and step == LAST:
                left = K - (step * PARTS + chunk) * _CHUNK - k
                pairs = pairs + (
                    gl.load(at, mask=left > 0, other=0),
                    gl.load(at + NEXT // 2, mask=left > NEXT, other=0),
                )
            else:
                pairs = pairs + (gl.load(at), gl.load(at + NEXT // 2))
        inputs = inputs + (pairs,)
    for step in gl.static_range(STEPS):
        found = _digits(inputs[step][0], inputs[step][1], place, G, x.dtype.element_ty, PARTS)
        if TOKENS == 2:
            second = _digits(inputs[step][2], inputs[step][3], place, G, x.dtype.element_ty, PARTS)
            found = gl.reshape(gl.permute(gl.join(found, second), (0, 1, 4, 2, 3)), (PARTS, 2, _COLUMNS, _WORDS))
        digits[step].store(found)
    gl.thread_barrier()
    if EARLY:
        gdc_launch_dependents()

    total = gl.zeros([PARTS, ROWS, _COLUMNS], gl.float32, MMA)
    for step in gl.static_range(STEPS):
        words, scales = loaded[0]
        total = _add_step(total, words, scales, digits[step], G, ROWS, TOKENS, PARTS, MMA)
        loaded = loaded[1:]
        if step + DEPTH < STEPS:
            loaded = loaded + (
                _load_step(
                    words_at, words_part, scales_at, scales_part, step + DEPTH, chunks, padded, G, PARTS,
                    MASKED and step + DEPTH == LAST,
                ),
            )  # fmt: skip

    if TOKENS == 1:  # the second half of the columns is nothing
        sums = gl.sum(gl.sum(total, 2), 0)
        out = row + gl.arange(0, ROWS, layout=sums.type.layout)
        gl.store(y + out, sums.to(y.dtype.element_ty), mask=out < N)
    else:
        sums = gl.sum(gl.sum(gl.reshape(total, (PARTS, ROWS, 2, 4)), 3), 0)
        out = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, sums.type.layout))[:, None]
        token = gl.arange(0, 2, layout=gl.SliceLayout(0, sums.type.layout))[None, :]
        gl.store(y + token * N + out, sums.to(y.dtype.element_ty), mask=out < N)
