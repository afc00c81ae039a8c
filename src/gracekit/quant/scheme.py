"""Symmetric group-wise integers: the one formula from (weight, log_scale) to codes, and where the scales start.

A weight W (out, in) is cut into groups of G along ``in``. Each group has a scale s = round_to(scale_dtype, exp(theta)), theta
being the learned ``log_scale``, and codes

    q = clip(round(W / s), -2^(b-1), 2^(b-1) - 1),    W_q = q * s

without a zero point. The quotient, its rounding (half to even) and the product are computed in float32, whatever the
weight's dtype (float64 for float64 weights), and W_q is rounded once to the weight's dtype. Training, conversion and every
export call the functions below: that is what makes the codes that were trained the codes that run.

Source: SPEC of GRACE (arXiv 2601.22709) on top of LSQ (Esser et al., ICLR 2020, arXiv 1902.08153).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torchao.core.config import AOBaseConfig

from gracekit._checks import check_choice, check_int

# O out_features, I in_features, S groups per row, G group size

SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

# Subnormal float32 and bfloat16 may be flushed to zero by a kernel, and a zero scale makes NaN; half kernels keep theirs,
# and scales of real weights come near float16's smallest normal number.
_SMALLEST_SCALE = {
    torch.bfloat16: 2.0**-126,
    torch.float16: 2.0**-24,
    torch.float32: 2.0**-126,
    torch.float64: 2.0**-1022,
}
_SEARCH_FRACTIONS = (0.3, 1.2, 20)
_SEARCH_ELEMENTS = 1 << 22


@dataclass(frozen=True, kw_only=True)
class LSQConfig(AOBaseConfig):  # type: ignore[misc]
    """How linear layers are quantised: width of the codes, size of the groups, dtype of the scales.

    A torchao configuration: ``torchao.quantization.quantize_(model, LSQConfig(), filter_fn)`` prepares the selected layers
    just as :func:`prepare_qat` does, but sees a layer at a time: it can name none in its errors, and a weight that an embedding
    shares is noticed by :func:`convert` only.

    Args:
        bits: width of a code, 2 to 8. Kernels exist for 4; every width trains and converts to "reference".
        group_size: consecutive inputs that share one scale, at least 1; must divide each layer's in_features.
        scale_dtype: torch.bfloat16, torch.float16 or torch.float32: what the scales are rounded to, in training already.

    Raises:
        TypeError: ``bits`` or ``group_size`` is no integer.
        ValueError: a value is out of its range.

    Example:
        >>> LSQConfig(group_size=64)
        LSQConfig(bits=4, group_size=64, scale_dtype=torch.bfloat16)
    """

    bits: int = 4
    group_size: int = 128
    scale_dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        # Plain numbers, whatever kind of integer was given.
        object.__setattr__(self, "bits", check_int("bits", self.bits, low=2, high=8))
        object.__setattr__(self, "group_size", check_int("group_size", self.group_size, low=1))
        check_choice("scale_dtype", self.scale_dtype, SCALE_DTYPES)


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """What every form of a quantised weight holds: codes int8 (O, I), scale (O, S), and the dtype it is computed with."""

    codes: Tensor
    scale: Tensor
    bits: int
    dtype: torch.dtype

    @property
    def group_size(self) -> int:
        """Inputs per scale."""
        return self.codes.shape[1] // self.scale.shape[1]

    def dequantize(self) -> Tensor:
        """Return q * s (O, I), rounded once to ``dtype``."""
        return times_scale(self.codes.to(computing_dtype(self.dtype)), self.scale, self.dtype)


def code_range(bits: int) -> tuple[int, int]:
    """Return the smallest and the largest code of ``bits`` bits."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def computing_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which quotients and products of a weight of ``dtype`` are computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_groups(tensor_OI: Tensor, group_size: int) -> Tensor:
    """View (O, I) as (O, S, G)."""
    return tensor_OI.reshape(tensor_OI.shape[0], tensor_OI.shape[-1] // group_size, group_size)


def scale_range(scale_dtype: torch.dtype) -> tuple[float, float]:
    """Return the least and the greatest scale of a dtype."""
    return _SMALLEST_SCALE[scale_dtype], torch.finfo(scale_dtype).max


def round_scale(scale: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """Round positive scales to ``scale_dtype``, kept within :func:`scale_range`."""
    return scale.clamp(*scale_range(scale_dtype)).to(scale_dtype)


def deployed_scale(log_scale: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """Return the scale (O, S) that training uses and that is deployed: exp(log_scale), rounded. Carries no gradient."""
    # In float64, because no two machines agree on the last bit of a float32 exp: scales are rounded alike where they are trained
    # and where they are exported.
    scale = torch.exp(log_scale.detach().double())
    return scale.clamp_(*scale_range(scale_dtype)).to(scale_dtype)


def quotients(weight_OI: Tensor, scale_OS: Tensor) -> Tensor:
    """Return W / s as (O, S, G) in the computing dtype."""
    dtype = computing_dtype(weight_OI.dtype)
    group_size = weight_OI.shape[-1] // scale_OS.shape[-1]
    return in_groups(weight_OI.to(dtype), group_size) / scale_OS.to(dtype).unsqueeze(-1)


def float_codes(weight_OI: Tensor, scale_OS: Tensor, bits: int) -> Tensor:
    """Return the codes (O, I), whole numbers held in the computing dtype."""
    return quotients(weight_OI, scale_OS).round_().clamp_(*code_range(bits)).flatten(-2)


def times_scale(codes_OI: Tensor, scale_OS: Tensor, dtype: torch.dtype) -> Tensor:
    """Return q * s (O, I), computed in the codes' dtype and rounded once to ``dtype``."""
    values_OI = torch.empty(codes_OI.shape, dtype=dtype, device=codes_OI.device)
    group_size = codes_OI.shape[-1] // scale_OS.shape[-1]
    # Written in place: a result that is a view (of groups) is one that FSDP2 and in-place operations stumble over.
    torch.mul(
        in_groups(codes_OI, group_size),
        scale_OS.to(codes_OI.dtype).unsqueeze(-1),
        out=in_groups(values_OI, group_size),
    )
    return values_OI


def quantize(weight: Tensor, scale: Tensor, bits: int) -> QuantizedWeight:
    """Return the codes of ``weight`` for scales that are already rounded."""
    codes = float_codes(weight.detach(), scale.detach(), bits).to(torch.int8)
    return QuantizedWeight(codes=codes, scale=scale.detach(), bits=bits, dtype=weight.dtype)


def absmax_scale(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """Return max|W| / (2^(b-1) - 1) per group (O, S), 1 for a group of zeros: round-to-nearest without a search."""
    peak = in_groups(weight.detach().to(computing_dtype(weight.dtype)), group_size).abs().amax(-1)
    return torch.where(peak > 0, peak / code_range(bits)[1], 1.0)


def search_scale(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """Return, per group (O, S), the one of 20 candidates in [0.3, 1.2] * absmax scale with the least squared error.

    The first of equals wins; a group of zeros gets 1.
    """
    rows = max(1, _SEARCH_ELEMENTS // max(weight.shape[1], 1))
    starts = range(0, weight.shape[0], rows)
    return torch.cat([_search_rows(weight.detach()[start : start + rows], bits, group_size) for start in starts])


def _search_rows(weight: Tensor, bits: int, group_size: int) -> Tensor:
    low, high = code_range(bits)
    groups = in_groups(weight.to(computing_dtype(weight.dtype)), group_size)
    peak = groups.abs().amax(-1, keepdim=True)
    # Squared errors of 1e-30 or 1e30 leave the range of float32; a power of two brings each group near 1 and is exact.
    limit = -round(math.log2(torch.finfo(groups.dtype).tiny))
    exponent = torch.frexp(peak).exponent.clamp(-limit, limit - 1)
    groups = torch.ldexp(groups, -exponent)
    unit = torch.where(peak > 0, torch.ldexp(peak, -exponent) / high, 1.0)

    start, stop, count = _SEARCH_FRACTIONS
    fractions = torch.linspace(start, stop, count, dtype=torch.float64).tolist()
    best = torch.full_like(peak, math.inf)
    chosen = torch.full_like(peak, fractions[0])
    for fraction in fractions:
        scale = unit * fraction
        error = (groups / scale).round_().clamp_(low, high).mul_(scale).sub_(groups).square_().sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        chosen = torch.where(better, fraction, chosen)
    return torch.where(peak > 0, chosen * (peak / high), 1.0).squeeze(-1)


def holds_scale(dtype: torch.dtype, scale: Tensor) -> bool:
    """Whether ``dtype`` holds each of the scales exactly."""
    return torch.equal(scale.to(dtype).double(), scale.double())
