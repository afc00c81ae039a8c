"""y = x W^T for half activations x and packed 4-bit weights W = codes * scales, as Triton kernels.

Both kernels compute y^T = W x^T: the weight is the left operand of the tensor cores' product, so that its values go from the
packed words through a few bit operations straight into registers. Per word, ``0x4300 | u`` is the bfloat16 number 128 + u
(``0x6400 | u`` the float16 number 1024 + u); one ``lop3`` makes two of them and one packed subtraction two codes, exactly.

``narrow_kernel`` is for few rows of x, where all that counts is how soon the weight has been read. The parts of a program, a
warp or a few each, take different chunks of the inputs of the same outputs, and are added at its end. Products of codes are
summed per group in float32 and then take the group's scale in float32. All programs run at once, so the device waits for the
multiprocessor with the most of them: tiles beyond the last full round of multiprocessors are dealt out among SPLIT programs.

``wide_kernel`` is for more, and deals tiles out likewise. The more rows of x a tile has, the fewer programs unpack the same weight.
For very many rows the weights that it multiplies are q * s rounded once, as training's forward has them, which leaves the tensor
cores one sum to keep. ``values_kernel`` writes those, for a dense product. On Hopper there is a third kernel for them, in
:mod:`gracekit.quant._gluon_int4`.

Partial sums of a SPLIT lie in ``partial``; the last program of a tile to arrive, which a counter tells, adds them in a fixed order:
the result is the same at every run. It also sets the counter back to zero.
"""

# M rows of x, N out_features, K in_features, G group size, C chunks of 128 inputs, T tiles of 64 output rows (see _int4_layout)

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gracekit.quant._int4_layout import CHUNK, TILE, WORDS

LEAST_TOKENS = 8  # rows of x in a program

_TILE = tl.constexpr(TILE)
_CHUNK = tl.constexpr(CHUNK)
_WORDS = tl.constexpr(WORDS)
_CODES_OF_ZERO = tl.constexpr(-0x77777778)  # eight times u = 8


def _assembly(number: str, take_away: str) -> str:
    """PTX that turns two neighbouring words ($8, $9) into the code pairs of the eight planes ($0 to $7)."""
    lines = ["{", ".reg .b32 t;"]
    for plane in range(8):
        word, shift = 8 + plane // 4, 4 * (plane % 4)
        source = f"${word}"
        if shift:
            lines.append(f"shr.u32 t, {source}, {shift};")
            source = "t"
        lines.append(f"lop3.b32 t, {source}, 0x000F000F, {number}, 0xEA;")
        lines.append(take_away.format(to=f"${plane}"))
    return "\n".join([*lines, "}"])


# bfloat16 has no packed subtraction before Hopper; times one, minus 136 is one fused operation everywhere.
BFLOAT16 = tl.constexpr(
    _assembly(
        "0x43004300", "{{ .reg .b32 a, b; mov.b32 a, 0x3F803F80; mov.b32 b, 0xC308C308; fma.rn.bf16x2 {to}, t, a, b; }}"
    )
)
FLOAT16 = tl.constexpr(_assembly("0x64006400", "{{ .reg .b32 b; mov.b32 b, 0x64086408; sub.rn.f16x2 {to}, t, b; }}"))
CONSTRAINTS = tl.constexpr("=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r")


@triton.jit
def _plane(low, high, element, plane: tl.constexpr):
    """The codes of one plane, from the words of both halves of it: what the assembly does, in any machine's operations."""
    word = low if plane < 4 else high
    return (((word >> (16 * (element & 1) + 4 * (plane % 4))) & 15) - 8).to(tl.float32)


@triton.jit
def _load_words(at, inside, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(at, mask=inside, other=_CODES_OF_ZERO, eviction_policy="evict_first")
    else:
        return tl.load(at, eviction_policy="evict_first")


@triton.jit
def _codes(at, inside, dtype: tl.constexpr, MASKED: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Eight planes of codes (rows, 16) of a chunk, in ``dtype``, or in float32 where there is no assembly: in the interpreter."""
    element = tl.arange(0, _WORDS)[None, :]
    if ASSEMBLY:
        words = _load_words(at + element, inside, MASKED)
        if dtype == tl.bfloat16:
            return tl.inline_asm_elementwise(
                BFLOAT16, CONSTRAINTS, [words], dtype=(tl.bfloat16,) * 8, is_pure=True, pack=2
            )
        else:
            return tl.inline_asm_elementwise(
                FLOAT16, CONSTRAINTS, [words], dtype=(tl.float16,) * 8, is_pure=True, pack=2
            )
    else:
        low = _load_words(at + (element & ~1), inside, MASKED)
        high = _load_words(at + (element | 1), inside, MASKED)
        return (
            _plane(low, high, element, 0), _plane(low, high, element, 1),
            _plane(low, high, element, 2), _plane(low, high, element, 3),
            _plane(low, high, element, 4), _plane(low, high, element, 5),
            _plane(low, high, element, 6), _plane(low, high, element, 7),
        )  # fmt: skip


@triton.jit
def _side_by_side(codes, FIRST: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr):
    """COUNT planes (ROWS, 16) from FIRST on as (ROWS, 16 * COUNT), which no thread has to give up a value for."""
    if COUNT == 2:
        planes = tl.join(codes[FIRST], codes[FIRST + 1])  # row, element, plane
        return tl.reshape(tl.permute(planes, (0, 2, 1)), (ROWS, COUNT * _WORDS))
    elif COUNT == 4:
        even, odd = tl.join(codes[FIRST], codes[FIRST + 2]), tl.join(codes[FIRST + 1], codes[FIRST + 3])
        return tl.reshape(tl.permute(tl.join(even, odd), (0, 2, 3, 1)), (ROWS, COUNT * _WORDS))
    else:
        even = tl.join(tl.join(codes[0], codes[4]), tl.join(codes[2], codes[6]))
        odd = tl.join(tl.join(codes[1], codes[5]), tl.join(codes[3], codes[7]))
        return tl.reshape(tl.permute(tl.join(even, odd), (0, 2, 3, 4, 1)), (ROWS, COUNT * _WORDS))


@triton.jit
def _weights(codes, scales, dtype: tl.constexpr):
    """The values q * s, rounded once to ``dtype``."""
    return (codes * scales.to(codes.dtype)[:, None]).to(dtype)


@triton.jit
def _finished(total, ASSEMBLY: tl.constexpr):
    """``total``, once its products are done: Hopper's are still reading their operands when the next step overwrites them.

    Triton 3.6 lets products run into the next step of a loop without keeping a left operand in registers alive for so long.
    """
    if ASSEMBLY:
        return tl.inline_asm_elementwise("", "=f,0", [total], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return total


@triton.jit
def _add_step(
    total, step, inputs, words, scales, is_token, lane, left, chunks, padded,
    G: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, MASKED: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Add PARTS chunks to ``total`` (PARTS, ROWS, TOKENS). MASKED: they may lie beyond the inputs."""
    first = step * PARTS
    k = tl.arange(0, PARTS)[:, None, None] * _CHUNK + tl.arange(0, G)[None, :, None]
    is_packed = first + lane // ROWS < chunks
    codes = _codes(words + first * (_TILE * _WORDS), is_packed[:, None], inputs.dtype.element_ty, MASKED, ASSEMBLY)
    for group in tl.static_range(_CHUNK // G):
        s_at = scales + (first * (_CHUNK // G) + group) * padded
        s = tl.load(s_at, mask=is_packed, other=0.0) if MASKED else tl.load(s_at)
        here = is_token & (k < left - first * _CHUNK - group * G) if MASKED else is_token
        v = tl.load(inputs + (first * _CHUNK + group * G), mask=here, other=0.0)
        q = tl.reshape(_side_by_side(codes, group * (G // _WORDS), G // _WORDS, PARTS * ROWS), (PARTS, ROWS, G))
        total += tl.dot(q, v.to(q.dtype)) * tl.reshape(s, (PARTS, ROWS))[:, :, None]
    return total


@triton.jit
def _part(program, whole, STEPS: tl.constexpr, SPLIT: tl.constexpr):
    """The tile of a program, which of its SPLIT shares that is, and its first step and the one after its last."""
    SHARE: tl.constexpr = (STEPS + SPLIT - 1) // SPLIT
    tile, share, begin, end = program, 0, 0, STEPS
    if SPLIT > 1:
        beyond = program - whole
        share = tl.where(beyond < 0, 0, beyond % SPLIT)
        tile = tl.where(beyond < 0, program, whole + beyond // SPLIT)
        begin = share * SHARE
        end = tl.where(beyond < 0, STEPS, tl.minimum(begin + SHARE, STEPS))
    return tile, share, begin, end


@triton.jit(do_not_specialize=["M", "chunks", "whole"])
def narrow_kernel(
    x, packed, scale, y, partial, counters, M, N, K, stride, chunks, padded, whole,
    STEPS: tl.constexpr, G: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, PARTS: tl.constexpr,
    STAGES: tl.constexpr, MASKED: tl.constexpr, ASSEMBLY: tl.constexpr, EARLY: tl.constexpr, LAUNCHES: tl.constexpr,
):  # fmt: skip
    """ROWS outputs of TOKENS rows of x; ``padded`` output rows are packed, a multiple of ROWS.

    The first ``whole`` tiles of outputs have a program each. The inputs of the others are dealt out among SPLIT programs.
    MASKED: the last step may lie beyond the inputs.
    EARLY: launched while the kernel before it ends; waits for what that has written.
    LAUNCHES: and the next kernel may be launched likewise as soon as all of this one's programs have begun.
    """
    tile, share, begin, end = _part(tl.program_id(0), whole, STEPS, SPLIT)
    lane = tl.arange(0, PARTS * ROWS)  # an output row of a part
    row = tile * ROWS + lane % ROWS
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    at = ((row // _TILE).to(tl.int64) * (chunks * _TILE) + lane // ROWS * _TILE + row % _TILE)[:, None] * _WORDS
    k = tl.arange(0, PARTS)[:, None, None] * _CHUNK + tl.arange(0, G)[None, :, None]
    inputs = x + token.to(tl.int64)[None, None, :] * stride + k
    scales = scale + lane // ROWS * (_CHUNK // G) * padded + row
    is_token = (token < M)[None, None, :]
    total = tl.zeros([PARTS, ROWS, TOKENS], tl.float32)
    if EARLY:
        gdc_wait()  # for x, and for whoever still has ``partial``
        if LAUNCHES:
            gdc_launch_dependents()
    # A mask costs a fifth of the instructions, so the last step alone has it.
    UNMASKED: tl.constexpr = STEPS - 1 if MASKED else STEPS
    for step in tl.range(begin, tl.minimum(end, UNMASKED) if SPLIT > 1 else UNMASKED, num_stages=STAGES):
        total = _add_step(
            total, step, inputs, packed + at, scales, is_token, lane, K, chunks, padded, G, ROWS, PARTS, False, ASSEMBLY
        )
    if MASKED and (begin < end) & (end == STEPS):
        total = _add_step(
            total, UNMASKED, inputs, packed + at, scales, is_token, lane, K, chunks, padded, G, ROWS, PARTS, True, ASSEMBLY
        )  # fmt: skip

    sums = tl.sum(total, 0)
    out_row = tile * ROWS + tl.arange(0, ROWS)
    out = y + token.to(tl.int64)[None, :] * N + out_row[:, None]
    written = (token < M)[None, :] & (out_row < N)[:, None]
    if SPLIT == 1 or tile < whole:
        tl.store(out, sums.to(y.dtype.element_ty), mask=written)
    else:
        place = (tile - whole) * tl.num_programs(1) + tl.program_id(1)
        _add_shares(sums, share, place, partial, counters, out, written, SPLIT, ROWS, TOKENS)


@triton.jit
def _add_shares(
    sums, share, place, partial, counters, out, written, SPLIT: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr
):  # fmt: skip
    """Leave the sums (ROWS, TOKENS) of one of SPLIT shares in ``partial``; the last to arrive at a place adds all of them."""
    # One slab (TOKENS, ROWS) a share, whole, so that no mask is needed.
    slab = partial + place.to(tl.int64) * (SPLIT * ROWS * TOKENS)
    cell = tl.arange(0, TOKENS)[None, :] * ROWS + tl.arange(0, ROWS)[:, None]
    tl.store(slab + share * (ROWS * TOKENS) + cell, sums)
    tl.debug_barrier()  # all threads have stored before the one that counts publishes it
    arrived = tl.atomic_add(counters + place, 1, sem="acq_rel", scope="gpu")
    if arrived == SPLIT - 1:
        total = tl.zeros([ROWS, TOKENS], tl.float32)
        for other in tl.static_range(SPLIT):
            total += tl.load(slab + other * (ROWS * TOKENS) + cell, cache_modifier=".cg")
        tl.store(out, total.to(out.dtype.element_ty), mask=written)
        tl.store(counters + place, 0)


@triton.jit(do_not_specialize=["M", "chunks", "whole"])
def wide_kernel(
    x, packed, scale, y, partial, counters, M, N, K, stride, chunks, padded, whole,
    STEPS: tl.constexpr, G: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
    SCALED: tl.constexpr, MASKED: tl.constexpr, ASSEMBLY: tl.constexpr, EARLY: tl.constexpr, LAUNCHES: tl.constexpr,
    BAND: tl.constexpr,
):  # fmt: skip
    """ROWS outputs of TOKENS rows of x; tiles beyond ``whole`` and the rest as in ``narrow_kernel``.

    SCALED: what is multiplied is q * s in x's dtype; else q, and the sum over a group times s.
    BAND: blocks of rows of x that go through all tiles together, so that the cache holds them.
    """
    place, share, begin, end = _part(tl.program_id(0), whole, STEPS, SPLIT)
    tiles = tl.cdiv(padded, ROWS)
    first = place // (BAND * tiles) * BAND
    size = min(tl.cdiv(M, TOKENS) - first, BAND)
    inside = place % (BAND * tiles)
    tile, block = inside // size, first + inside % size
    row = tile * ROWS + tl.arange(0, ROWS)
    token = block * TOKENS + tl.arange(0, TOKENS)
    k = tl.arange(0, G)[:, None]
    words = packed + ((row // _TILE).to(tl.int64) * (chunks * _TILE) + row % _TILE)[:, None] * _WORDS
    # Rows beyond the last are computed from the first ones and not written: a mask of loads costs instructions at every step, and
    # one row for all of them would be asked for by all programs at one place of the cache.
    inputs = x + (token % M).to(tl.int64)[None, :] * stride + k
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    if EARLY:
        gdc_wait()  # for x, and for whoever still has ``partial``
        if LAUNCHES:
            gdc_launch_dependents()
    for chunk in tl.range(begin, end, num_stages=STAGES):
        left = K - chunk * _CHUNK
        is_packed = (row < padded) & (left > 0)
        codes = _codes(words + chunk * (_TILE * _WORDS), is_packed[:, None], x.dtype.element_ty, MASKED, ASSEMBLY)
        for group in tl.static_range(_CHUNK // G):
            at = scale + (chunk * (_CHUNK // G) + group) * padded + row
            s = tl.load(at, mask=is_packed, other=0.0) if MASKED else tl.load(at)
            v_at = inputs + (chunk * _CHUNK + group * G)
            v = tl.load(v_at, mask=k < left - group * G, other=0.0) if MASKED else tl.load(v_at)
            q = _side_by_side(codes, group * (G // _WORDS), G // _WORDS, ROWS)
            if SCALED:
                total = _finished(
                    tl.dot(_weights(q, s, x.dtype.element_ty).to(q.dtype), v.to(q.dtype), total), ASSEMBLY
                )
            else:
                total += tl.dot(q, v.to(q.dtype)) * s[:, None]

    out = y + token.to(tl.int64)[None, :] * N + row[:, None]
    written = (token < M)[None, :] & (row < N)[:, None]
    if SPLIT == 1 or place < whole:
        tl.store(out, total.to(y.dtype.element_ty), mask=written)
    else:
        _add_shares(total, share, place - whole, partial, counters, out, written, SPLIT, ROWS, TOKENS)


@triton.jit
def values_kernel(
    packed, scale, values, N, K, chunks, padded, G: tl.constexpr, ROWS: tl.constexpr, ASSEMBLY: tl.constexpr
):  # fmt: skip
    """ROWS rows of W over one chunk of inputs."""
    chunk = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    at = packed + ((row // _TILE).to(tl.int64) * (chunks * _TILE) + chunk * _TILE + row % _TILE)[:, None] * _WORDS
    codes = _codes(at, (row < padded)[:, None], values.dtype.element_ty, False, ASSEMBLY)
    k = chunk * _CHUNK + tl.arange(0, G)[None, :]
    to = values + row.to(tl.int64)[:, None] * K + k
    for group in tl.static_range(_CHUNK // G):
        s = tl.load(scale + (chunk * (_CHUNK // G) + group) * padded + row)
        q = _side_by_side(codes, group * (G // _WORDS), G // _WORDS, ROWS)
        here = (row < N)[:, None] & (k < K - group * G)
        tl.store(to + group * G, _weights(q, s, values.dtype.element_ty), mask=here)
