"""y = x W^T for half activations x and packed 4-bit weights W = codes * scales, as Triton kernels.

``linear_kernel`` computes y^T = W x^T: the weight is the left operand of the tensor cores' product, so that its values go from
the packed words through a few bit operations straight into registers. Per word, ``0x4300 | u`` is the bfloat16 number 128 + u
(``0x6400 | u`` the float16 number 1024 + u); one ``lop3`` makes two of them and one packed subtraction two codes, exactly.
Products of codes are summed per group in float32 and then take the group's scale in float32.

Few output rows fill few processors, so the inputs can be dealt out among SPLIT programs. Their partial sums lie in a workspace;
the last program of a tile to arrive, which a counter tells, adds them in a fixed order: the result is the same at every run. It
also sets the counter back to zero.

``values_kernel`` writes W as training's forward has it: q * s in float32, rounded once.
"""

# M rows of x, N out_features, K in_features, G group size, C chunks of 128 inputs, T tiles of 64 output rows (see _int4_layout)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gracekit.quant._int4_layout import CHUNK, TILE, WORDS

_TILE = tl.constexpr(TILE)
_CHUNK = tl.constexpr(CHUNK)
_WORDS = tl.constexpr(WORDS)
_PLANES = tl.constexpr(CHUNK // WORDS)
_CODES_OF_ZERO = tl.constexpr(-0x77777778)  # eight times u = 8
_VALUES_ROWS = 32


class Schedule(NamedTuple):
    """How ``linear_kernel`` is launched.

    Attributes:
        rows: output rows of a program, 64 or a multiple.
        tokens: rows of x of a program, a power of two from 16 on.
        split: programs among which a tile's inputs are dealt out.
        warps: of a program.
        stages: chunks in flight.
    """

    rows: int
    tokens: int
    split: int
    warps: int
    stages: int


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
_BFLOAT16 = tl.constexpr(
    _assembly(
        "0x43004300", "{{ .reg .b32 a, b; mov.b32 a, 0x3F803F80; mov.b32 b, 0xC308C308; fma.rn.bf16x2 {to}, t, a, b; }}"
    )
)
_FLOAT16 = tl.constexpr(_assembly("0x64006400", "{{ .reg .b32 b; mov.b32 b, 0x64086408; sub.rn.f16x2 {to}, t, b; }}"))
_CONSTRAINTS = tl.constexpr("=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r")


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
                _BFLOAT16, _CONSTRAINTS, [words], dtype=(tl.bfloat16,) * 8, is_pure=True, pack=2
            )
        else:
            return tl.inline_asm_elementwise(
                _FLOAT16, _CONSTRAINTS, [words], dtype=(tl.float16,) * 8, is_pure=True, pack=2
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
def linear_kernel(
    x, packed, scale, y, partial, counters, M, N, K, stride, chunks, padded,
    STEPS: tl.constexpr, G: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
    MASKED: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """ROWS outputs of TOKENS rows of x, over one of SPLIT shares of the inputs; ``padded`` output rows are packed.

    MASKED: the last step of a share may lie beyond the inputs, or the last program beyond the rows packed.
    """
    tile, share, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tile * ROWS + tl.arange(0, ROWS)
    token = block * TOKENS + tl.arange(0, TOKENS)
    element = tl.arange(0, _WORDS)[:, None]
    words = packed + ((row // _TILE).to(tl.int64) * (chunks * _TILE) + row % _TILE)[:, None] * _WORDS
    inputs = x + token.to(tl.int64)[None, :] * stride
    is_token = (token < M)[None, :]
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        chunk = step * SPLIT + share
        left = K - chunk * _CHUNK
        is_packed = (row < padded) & (left > 0)
        codes = _codes(words + chunk * (_TILE * _WORDS), is_packed[:, None], x.dtype.element_ty, MASKED, ASSEMBLY)
        scales = scale + chunk * (_CHUNK // G) * padded + row
        part = tl.zeros([ROWS, TOKENS], tl.float32)
        for plane in tl.static_range(_PLANES):
            k = plane * _WORDS + element
            here = is_token & (k < left) if MASKED else is_token
            v = tl.load(inputs + (chunk * _CHUNK + k), mask=here, other=0.0)
            part = tl.dot(codes[plane], v.to(codes[plane].dtype), part)
            if (plane + 1) * _WORDS % G == 0:
                at = scales + plane * _WORDS // G * padded
                s = tl.load(at, mask=is_packed, other=0.0) if MASKED else tl.load(at)
                total += part * s.to(tl.float32)[:, None]
                part = tl.zeros([ROWS, TOKENS], tl.float32)

    out = y + token.to(tl.int64)[None, :] * N + row[:, None]
    written = is_token & (row < N)[:, None]
    if SPLIT == 1:
        tl.store(out, total.to(y.dtype.element_ty), mask=written)
    else:
        # One slab (TOKENS, ROWS) a share and tile, whole, so that no mask is needed.
        place = (block * tl.num_programs(0) + tile).to(tl.int64)
        slab = partial + place * (SPLIT * ROWS * TOKENS)
        cell = tl.arange(0, TOKENS)[None, :] * ROWS + tl.arange(0, ROWS)[:, None]
        tl.store(slab + share * (ROWS * TOKENS) + cell, total)
        tl.debug_barrier()  # all threads have stored before the one that counts publishes it
        arrived = tl.atomic_add(counters + place, 1, sem="acq_rel", scope="gpu")
        if arrived == SPLIT - 1:
            total = tl.zeros([ROWS, TOKENS], tl.float32)
            for other in tl.static_range(SPLIT):
                total += tl.load(slab + other * (ROWS * TOKENS) + cell, cache_modifier=".cg")
            tl.store(out, total.to(y.dtype.element_ty), mask=written)
            tl.store(counters + place, 0)


@triton.jit
def values_kernel(
    packed, scale, values, N, K, chunks, padded, G: tl.constexpr, ROWS: tl.constexpr, ASSEMBLY: tl.constexpr
):  # fmt: skip
    """ROWS rows of W over one chunk of inputs."""
    chunk = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    element = tl.arange(0, _WORDS)[None, :]
    at = packed + ((row // _TILE).to(tl.int64) * (chunks * _TILE) + chunk * _TILE + row % _TILE)[:, None] * _WORDS
    codes = _codes(at, (row < padded)[:, None], values.dtype.element_ty, False, ASSEMBLY)
    scales = scale + chunk * (_CHUNK // G) * padded + row
    to = values + row.to(tl.int64)[:, None] * K
    for plane in tl.static_range(_PLANES):
        s = tl.load(scales + plane * _WORDS // G * padded).to(tl.float32)[:, None]
        k = chunk * _CHUNK + plane * _WORDS + element
        value = (codes[plane].to(tl.float32) * s).to(values.dtype.element_ty)
        tl.store(to + k, value, mask=(row < N)[:, None] & (k < K))


def linear(x: Tensor, packed: Tensor, scale: Tensor, counters: Tensor, outputs: int, schedule: Schedule) -> Tensor:
    """Return y (M, N) of x (M, K), any stride between its rows, in x's dtype.

    Args:
        x: bfloat16 or float16.
        packed: words (T, C, 64, 16).
        scale: (C * 128 / G, T * 64).
        counters: zeros int32, at least :func:`counters_needed`; zeros again afterwards. Two calls at once must not share them.
        outputs: N.
        schedule: how to launch.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, inputs = x.shape
    tiles, chunks = packed.shape[:2]
    padded, split = tiles * TILE, schedule.split
    grid = (triton.cdiv(padded, schedule.rows), split, triton.cdiv(rows, schedule.tokens))
    y = x.new_empty(rows, outputs)
    slabs = grid[0] * grid[2] * split * schedule.rows * schedule.tokens if split > 1 else 0
    with torch.cuda.device(x.get_device()):
        linear_kernel[grid](
            x, packed, scale, y, x.new_empty(slabs, dtype=torch.float32), counters,
            rows, outputs, inputs, x.stride(0), chunks, padded, STEPS=triton.cdiv(chunks, split),
            G=chunks * CHUNK // scale.shape[0], SPLIT=split, ROWS=schedule.rows, TOKENS=schedule.tokens,
            STAGES=schedule.stages, MASKED=bool(inputs % CHUNK or chunks % split or padded % schedule.rows),
            ASSEMBLY=x.is_cuda, num_warps=schedule.warps,
        )  # fmt: skip
    return y


def counters_needed(padded: int, rows: int, schedule: Schedule) -> int:
    """Return how many counters a product of ``rows`` rows takes."""
    return triton.cdiv(padded, schedule.rows) * triton.cdiv(rows, schedule.tokens) if schedule.split > 1 else 0


def values(packed: Tensor, scale: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return W (N, K) of ``shape`` in the dtype of the scales, bfloat16 or float16."""
    tiles, chunks = packed.shape[:2]
    dense = scale.new_empty(shape)
    grid = (chunks, triton.cdiv(shape[0], _VALUES_ROWS))
    with torch.cuda.device(packed.get_device()):
        values_kernel[grid](
            packed, scale, dense, *shape, chunks, tiles * TILE,
            G=chunks * CHUNK // scale.shape[0], ROWS=_VALUES_ROWS, ASSEMBLY=packed.is_cuda, num_warps=4,
        )  # fmt: skip
    return dense
