"""What surrounds the products of feature-space alignment, each pass over the tokens once: see ``_bfloat16_cka``."""

# B images, n tokens of an image, d features

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS = 128, 128


@triton.jit
def _weighted_sum_kernel(
    tokens, weight, partial, n, d, image_stride, row_stride,
    STEPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum of weight times row over one stretch of STEPS * ROWS rows."""
    image = tl.program_id(2).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for step in range(STEPS):
        row = (tl.program_id(1) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        at = tokens + image * image_stride + row[:, None].to(tl.int64) * row_stride + column[None, :]
        value = tl.load(at, mask=(row[:, None] < n) & (column[None, :] < d), other=0.0).to(tl.float32)
        scale = tl.load(weight + image * n + row, mask=row < n, other=0.0)
        total += tl.sum(value * scale[:, None], 0)
    tl.store(partial + (image * tl.num_programs(1) + tl.program_id(1)) * d + column, total, mask=column < d)


@triton.jit
def _centre_kernel(
    tokens, weight, mean, keep, out, n, d, image_stride, row_stride, out_image_stride, out_row_stride,
    COLUMNS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Write weight times token minus mean."""
    row = tl.program_id(0).to(tl.int64)
    image = tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    value = tl.load(tokens + image * image_stride + row * row_stride + column, mask=column < d, other=0.0).to(
        tl.float32
    )
    value = value * tl.load(weight + image * n + row) - tl.load(mean + image * d + column, mask=column < d, other=0.0)
    if MASKED:
        value = tl.where(tl.load(keep + image * n + row) != 0, value, 0.0)
    at = out + image * out_image_stride + row * out_row_stride + column
    tl.store(at, value.to(out.dtype.element_ty), mask=column < d)


@triton.jit
def _tangent_kernel(tokens, weight, grad, slope, n, d, image_stride, row_stride, WIDTH: tl.constexpr):
    """Take from each row of the slope its part along the token, scale it, in place."""
    row = tl.program_id(0).to(tl.int64)
    image = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, WIDTH)
    scale = tl.load(weight + image * n + row)
    unit = (
        tl.load(tokens + image * image_stride + row * row_stride + column, mask=column < d, other=0.0).to(tl.float32)
        * scale
    )
    at = slope + (image * n + row) * d + column
    value = tl.load(at, mask=column < d, other=0.0).to(tl.float32)
    value = (value - unit * tl.sum(unit * value, 0)) * (scale * tl.load(grad + image))
    tl.store(at, value.to(slope.dtype.element_ty), mask=column < d)


def _usable(tokens_BND: Tensor) -> Tensor:
    return tokens_BND if tokens_BND.stride(2) == 1 else tokens_BND.contiguous()


def weighted_sum(tokens_BND: Tensor, weight_BN: Tensor) -> Tensor:
    """Return the sum over n of weight times token, (B, d) in float32."""
    tokens_BND = _usable(tokens_BND)
    images, n, d = tokens_BND.shape
    steps = max(1, min(8, n // (4 * _ROWS)))
    stretches = -(-n // (steps * _ROWS))
    partial = weight_BN.new_empty(images, stretches, d)
    _weighted_sum_kernel[(-(-d // _COLUMNS), stretches, images)](
        tokens_BND, weight_BN.contiguous(), partial, n, d, *tokens_BND.stride()[:2],
        STEPS=steps, ROWS=_ROWS, COLUMNS=_COLUMNS,
    )  # fmt: skip
    return partial.sum(1)


def centre(tokens_BND: Tensor, weight_BN: Tensor, mean_BD: Tensor, mask_BN: Tensor | None, out_BND: Tensor) -> None:
    """Write weight times token minus mean to ``out_BND``, zeros where masked."""
    tokens_BND = _usable(tokens_BND)
    images, n, d = tokens_BND.shape
    keep = weight_BN if mask_BN is None else mask_BN.contiguous()
    _centre_kernel[(n, -(-d // 1024), images)](
        tokens_BND, weight_BN.contiguous(), mean_BD.contiguous(), keep, out_BND, n, d, *tokens_BND.stride()[:2],
        *out_BND.stride()[:2], COLUMNS=1024, MASKED=mask_BN is not None,
    )  # fmt: skip


def to_tangent(tokens_BND: Tensor, weight_BN: Tensor, grad_B: Tensor, slope_BND: Tensor) -> None:
    """Turn the slopes of unit tokens into those of the tokens, in place: (I - u u^T) slope * weight * grad."""
    tokens_BND = _usable(tokens_BND)
    images, n, d = tokens_BND.shape
    assert slope_BND.is_contiguous()
    _tangent_kernel[(n, images)](
        tokens_BND, weight_BN.contiguous(), grad_B.contiguous(), slope_BND, n, d, *tokens_BND.stride()[:2],
        WIDTH=triton.next_power_of_2(d), num_warps=8,
    )  # fmt: skip
