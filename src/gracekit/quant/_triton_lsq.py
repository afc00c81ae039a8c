"""The fake quantiser of :mod:`gracekit.quant.lsq` as Triton kernels: the weight is read once each way, and nothing else is made.

``values_kernel`` writes W_q; ``gradients_kernel`` reads the gradient and the weight and writes dW and dtheta, one program to a
handful of groups, so that the sum over a group never leaves it. Traffic is two reads and two writes of the weight's size over both
directions, plus the gradient's read; in place, where dW is made of the gradient itself, the second write is of the zeros at clipped
weights alone. The scales are made from their logarithms anew in both, as ``deployed_scale`` makes them: the exponential in
float64, one rounding to float32, one to the scales' dtype.

The codes are those of the plain formula, bit for bit. Adding and taking away 1.5 * 2^23 rounds half to even as torch.round does.
Where weight or scale is float32 the quotient is ``div_rn``, the division of IEEE 754 (Triton's ``/`` need not be). Where both are
halves, the product with the reciprocal does as well, at a fraction of the instructions: weight and scale have significands a
and b of at most 11 bits, so a quotient that is no tie is at least min(1 / 2a, 1 / 2b) > 2^-12 away from one, and up to 2^7 the
product is within 2^-14 of the quotient. Rounding it to a multiple of 2^-13 gives every tie exactly and moves nothing across one.
"""

# O out_features, I in_features, S groups per row, G group size, N = O * S groups

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gracekit.quant._triton_launch import launch
from gracekit.quant.scheme import code_range, scale_range

_TO_WHOLE = tl.constexpr(1.5 * 2**23)
_TO_GRID = tl.constexpr(1.5 * 2**10)
_GRID = tl.constexpr(2.0**-13)
_NAN = tl.constexpr(tl.PropagateNan.ALL)
_TILE = 2048
_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _scale(log_scale, DTYPE: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr):
    """Scales as DTYPE has them, in float32."""
    s = tl.exp(log_scale.to(tl.float64))
    s = tl.where(s < LEAST, LEAST, s)
    s = tl.where(s > MOST, MOST, s).to(tl.float32)
    if tl.bfloat16 == DTYPE:
        # Half to even; in whole numbers, because the interpreter cuts off instead.
        bits = s.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        return tl.where(s == s, bits.to(tl.float32, bitcast=True), s)
    else:
        return s.to(DTYPE).to(tl.float32)


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
    weight, log_scale, values, N,
    G: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    HALVES: tl.constexpr, DTYPE: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """W_q of ROWS groups."""
    group = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    s = _scale(tl.load(log_scale + group, mask=group < N, other=0.0), DTYPE, LEAST, MOST)[:, None]
    for start in range(0, G, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        here = (group[:, None] < N) & (column < G)
        at = group[:, None] * G + column
        ratio = _ratio(tl.load(weight + at, mask=here, other=0.0).to(tl.float32), s, HALVES)
        value = _code(ratio, LOW, HIGH, HALVES) * s
        tl.store(values + at, value.to(values.dtype.element_ty), mask=here)


@triton.jit
def gradients_kernel(
    grad, weight, log_scale, grad_weight, grad_log_scale, N,
    G: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    HALVES: tl.constexpr, DTYPE: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr,
    WITH_WEIGHT: tl.constexpr, WITH_SCALE: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    """The gradients of ROWS groups; the last groups first, whose incoming gradient the cache still holds.

    IN_PLACE: ``grad_weight`` is ``grad``, and only what differs, the zeros, is written.
    """
    group = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    s = _scale(tl.load(log_scale + group, mask=group < N, other=0.0), DTYPE, LEAST, MOST)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, G, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        here = (group[:, None] < N) & (column < G)
        at = group[:, None] * G + column
        ratio = _ratio(tl.load(weight + at, mask=here, other=0.0).to(tl.float32), s[:, None], HALVES)
        g = tl.load(grad + at, mask=here, other=0.0).to(tl.float32)
        inside = _is_inside(ratio, LOW, HIGH, HALVES)
        if WITH_WEIGHT:
            changed = here & ~inside if IN_PLACE else here
            tl.store(grad_weight + at, tl.where(inside, g, 0.0).to(grad_weight.dtype.element_ty), mask=changed)
        if WITH_SCALE:
            slope = _code(ratio, LOW, HIGH, HALVES) - tl.where(inside, ratio, 0.0)
            total += tl.sum(slope * g, 1)
    if WITH_SCALE:
        tl.store(grad_log_scale + group, total * s, mask=group < N)


def forward(weight: Tensor, log_scale: Tensor, bits: int, scale_dtype: torch.dtype) -> Tensor:
    """Return W_q (O, I) of a half or float32 weight (O, I) and the float32 logarithms (O, S) of its scales."""
    weight, log_scale = weight.contiguous(), log_scale.contiguous()
    values = torch.empty_like(weight)
    if weight.numel():
        grid, sizes, options = _settings(weight, log_scale, bits, scale_dtype)
        launch(values_kernel, grid, [weight, log_scale, values], sizes, options)
    return values


def backward(
    grad: Tensor,
    weight: Tensor,
    log_scale: Tensor,
    bits: int,
    scale_dtype: torch.dtype,
    *,
    needs_weight: bool,
    needs_scale: bool,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return dW (O, I) in the weight's dtype and dtheta (O, S) in float32, each empty unless it is needed.

    ``in_place`` makes dW of ``grad`` itself, which then is contiguous and of the weight's dtype.
    """
    assert not in_place or (grad.is_contiguous() and grad.dtype == weight.dtype)
    grad, weight, log_scale = grad.contiguous(), weight.contiguous(), log_scale.contiguous()
    if not needs_weight:
        grad_weight = weight.new_empty(0)
    elif in_place:
        grad_weight = grad
    else:
        grad_weight = torch.empty_like(weight)
    grad_log_scale = torch.empty_like(log_scale) if needs_scale else log_scale.new_empty(0)
    if weight.numel():
        grid, sizes, options = _settings(weight, log_scale, bits, scale_dtype)
        tensors = [grad, weight, log_scale, grad_weight, grad_log_scale]
        options |= {"WITH_WEIGHT": needs_weight, "WITH_SCALE": needs_scale, "IN_PLACE": in_place}
        launch(gradients_kernel, grid, tensors, sizes, options)
    return grad_weight, grad_log_scale


def _settings(
    weight: Tensor, log_scale: Tensor, bits: int, scale_dtype: torch.dtype
) -> tuple[tuple[int], list[int], dict[str, Any]]:
    """Return grid, sizes and options: tiles of whole groups where a tile can hold one, else a group a program in several steps."""
    groups = log_scale.numel()
    group_size = weight.numel() // groups
    low, high = code_range(bits)
    least, most = scale_range(scale_dtype)
    block = min(triton.next_power_of_2(group_size), _TILE)
    rows = _TILE // block
    options = {"G": group_size, "ROWS": rows, "BLOCK": block, "LOW": low, "HIGH": high}
    options |= {"HALVES": torch.float32 not in (weight.dtype, scale_dtype), "DTYPE": _DTYPES[scale_dtype]}
    return (triton.cdiv(groups, rows),), [groups], options | {"LEAST": least, "MOST": most, "num_warps": 2}
