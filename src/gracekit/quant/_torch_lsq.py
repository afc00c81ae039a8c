"""The fake quantiser of :mod:`gracekit.quant.lsq` in torch operations, a block of rows at a time.

The float32 quotients and codes of a block stay in the processor's cache and are thrown away; at no time is there a tensor of the
weight's size besides W_q, or dW; and no dW either where it is made of the incoming gradient in place.
"""

# O out_features, I in_features, S groups per row, G group size

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gracekit.quant.scheme import code_range, deployed_scale, float_codes, in_groups, quotients, times_scale

_BLOCK = 1 << 18


def forward(weight: Tensor, log_scale: Tensor, bits: int, scale_dtype: torch.dtype) -> Tensor:
    """Return W_q (O, I) of a weight (O, I) and the logarithms (O, S) of its scales."""
    scale = deployed_scale(log_scale, scale_dtype)
    values = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for rows in _blocks(weight):
        values[rows] = times_scale(float_codes(weight[rows], scale[rows], bits), scale[rows], weight.dtype)
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
    """Return dW (O, I) and dtheta (O, S), in the dtypes of weight and ``log_scale``, each empty unless it is needed.

    ``in_place`` makes dW of ``grad`` itself, which then is contiguous and of the weight's dtype.
    """
    assert not in_place or (grad.is_contiguous() and grad.dtype == weight.dtype)
    scale = deployed_scale(log_scale, scale_dtype)
    low, high = code_range(bits)
    if not needs_weight:
        grad_weight = weight.new_empty(0)
    elif in_place:
        grad_weight = grad
    else:
        grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    slopes = []
    for rows in _blocks(weight):
        ratio = quotients(weight[rows], scale[rows])
        codes = ratio.round()
        inside = (codes >= low) & (codes <= high)
        grads = in_groups(grad[rows], ratio.shape[-1])
        if needs_scale:
            slope = codes.clamp_(low, high).sub_(ratio.masked_fill_(~inside, 0))
            slopes.append(slope.mul_(grads).sum(-1) * scale[rows].to(slope.dtype))
        if needs_weight and in_place:
            grads.masked_fill_(~inside, 0)
        elif needs_weight:
            torch.where(inside, grads, grads.new_zeros(()), out=in_groups(grad_weight[rows], ratio.shape[-1]))
    return grad_weight, torch.cat(slopes).to(log_scale.dtype) if needs_scale else log_scale.new_empty(0)


def _blocks(weight: Tensor) -> Iterator[slice]:
    rows = max(1, _BLOCK // max(1, weight.shape[1]))
    # An empty weight has one block too, of no rows.
    return (slice(start, start + rows) for start in range(0, max(1, weight.shape[0]), rows))
