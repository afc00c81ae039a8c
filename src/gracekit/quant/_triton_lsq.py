"""The fake quantiser of :mod:`gracekit.quant.lsq` as Triton kernels: the weight is read once each way, and nothing else is made.

``values_kernel`` writes W_q; ``gradients_kernel`` reads the gradient and the weight and writes dW and dtheta, one program to a
handful of groups, so that the sum over a group never leaves it. Traffic is two reads and two writes of the weight's size over both
directions, plus the gradient's read.

The codes are those of the plain formula, bit for bit. Adding and taking away 1.5 * 2^23 rounds half to even as torch.round does.
Where weight or scale is float32 the quotient is ``div_rn``, the division of IEEE 754 (Triton's ``/`` need not be). Where both are
halves, the product with the reciprocal does as well, at a fraction of the instructions: weight and scale have significands a
and b of at most 11 bits, so a quotient that is no tie is at least min(1 / 2a, 1 / 2b) > 2^-12 away from one, and up to 2^7 the
product is within 2^-14 of the quotient. Rounding it to a multiple of 2^-13 gives every tie exactly and moves nothing across one.
"""

# O out_features, I in_features, S groups per row, G group size, N = O * S groups

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gracekit.quant.scheme import code_range

_TO_WHOLE = tl.constexpr(1.5 * 2**23)
_TO_GRID = tl.constexpr(1.5 * 2**10)
_GRID = tl.constexpr(2.0**-13)
_NAN = tl.constexpr(tl.PropagateNan.ALL)
_TILE = 4096


@triton.jit
def _ratio(w, s, HALVES: tl.constexpr):
    if HALVES:
        return w * tl.div_rn(1.0, s)
    else:
        return tl.div_rn(w, s)


@triton.jit
def _code(ratio, LOW: tl.constexpr, HIGH: tl.constexpr, HALVES: tl.constexpr):
    """clip(round(ratio)), in the other order: both bounds are whole, so it is the same, and the sums below need small numbers."""
    ratio = tl.minimum(tl.maximum(ratio, LOW, _NAN), HIGH, _NAN)
    size = tl.abs(ratio)
    if HALVES:
        size = (size + _TO_GRID) - _TO_GRID
    size = (size + _TO_WHOLE) - _TO_WHOLE
    sign = ratio.to(tl.int32, bitcast=True) & -0x80000000
    return (size.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def _is_inside(ratio, LOW: tl.constexpr, HIGH: tl.constexpr, HALVES: tl.constexpr):
    # The tie below the lowest code rounds up to it, an even number; the tie above the highest, an odd one, rounds away.
    SLACK: tl.constexpr = _GRID if HALVES else 0.0
    return (ratio >= LOW - 0.5 - SLACK) & (ratio < HIGH + 0.5 - SLACK)


@triton.jit
def values_kernel(
    weight, scale, values, N,
    G: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    HALVES: tl.constexpr,
):  # fmt: skip
    """W_q of ROWS groups."""
    group = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    s = tl.load(scale + group, mask=group < N, other=1.0).to(tl.float32)[:, None]
    for start in range(0, G, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        here = (group[:, None] < N) & (column < G)
        at = group[:, None] * G + column
        ratio = _ratio(tl.load(weight + at, mask=here, other=0.0).to(tl.float32), s, HALVES)
        value = _code(ratio, LOW, HIGH, HALVES) * s
        tl.store(values + at, value.to(values.dtype.element_ty), mask=here)


@triton.jit
def gradients_kernel(
    grad, weight, scale, grad_weight, grad_log_scale, N,
    G: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    HALVES: tl.constexpr, WITH_WEIGHT: tl.constexpr, WITH_SCALE: tl.constexpr,
):  # fmt: skip
    """The gradients of ROWS groups."""
    group = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    s = tl.load(scale + group, mask=group < N, other=1.0).to(tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, G, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        here = (group[:, None] < N) & (column < G)
        at = group[:, None] * G + column
        ratio = _ratio(tl.load(weight + at, mask=here, other=0.0).to(tl.float32), s[:, None], HALVES)
        g = tl.load(grad + at, mask=here, other=0.0).to(tl.float32)
        inside = _is_inside(ratio, LOW, HIGH, HALVES)
        if WITH_WEIGHT:
            tl.store(grad_weight + at, tl.where(inside, g, 0.0).to(grad_weight.dtype.element_ty), mask=here)
        if WITH_SCALE:
            slope = _code(ratio, LOW, HIGH, HALVES) - tl.where(inside, ratio, 0.0)
            total += tl.sum(slope * g, 1)
    if WITH_SCALE:
        tl.store(grad_log_scale + group, total * s, mask=group < N)


def forward(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return W_q (O, I) of a half or float32 weight (O, I) and its rounded scales (O, S)."""
    weight, scale = weight.contiguous(), scale.contiguous()
    values = torch.empty_like(weight)
    if weight.numel():
        grid, options = _launch(weight, scale, bits)
        with torch.cuda.device(weight.get_device()):
            values_kernel[grid](weight, scale, values, scale.numel(), **options)
    return values


def backward(
    grad: Tensor, weight: Tensor, scale: Tensor, bits: int, *, needs_weight: bool, needs_scale: bool
) -> tuple[Tensor, Tensor]:
    """Return dW (O, I) in the weight's dtype and dtheta (O, S) in float32, each empty unless it is needed."""
    grad, weight, scale = grad.contiguous(), weight.contiguous(), scale.contiguous()
    grad_weight = torch.empty_like(weight) if needs_weight else weight.new_empty(0)
    grad_log_scale = scale.new_empty(scale.shape if needs_scale else 0, dtype=torch.float32)
    if weight.numel():
        grid, options = _launch(weight, scale, bits)
        with torch.cuda.device(weight.get_device()):
            gradients_kernel[grid](
                grad, weight, scale, grad_weight, grad_log_scale, scale.numel(),
                WITH_WEIGHT=needs_weight, WITH_SCALE=needs_scale, **options,
            )  # fmt: skip
    return grad_weight, grad_log_scale


def _launch(weight: Tensor, scale: Tensor, bits: int) -> tuple[tuple[int], dict[str, int]]:
    """Tiles of whole groups where a tile can hold one, else a group a program in several steps."""
    group_size = weight.numel() // scale.numel()
    low, high = code_range(bits)
    block = min(triton.next_power_of_2(group_size), _TILE)
    rows = _TILE // block
    halves = torch.float32 not in (weight.dtype, scale.dtype)
    sizes = {"G": group_size, "ROWS": rows, "BLOCK": block}
    options = sizes | {"LOW": low, "HIGH": high, "HALVES": halves, "num_warps": 4}
    return (triton.cdiv(scale.numel(), rows),), options
