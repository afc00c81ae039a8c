"""Learned step size quantisation of a weight: the differentiable fake quantiser and its torchao module.

Forward: W_q = clip(round(W / s)) * s with s = exp(theta) rounded to ``scale_dtype``. Backward, the straight-through estimator
of LSQ (Esser et al., ICLR 2020) with g = dL/dW_q and "inside" meaning that round(W / s) needs no clipping:

    dW     = g inside, 0 outside
    ds     = sum over the group of g * (q - W/s inside, q outside)
    dtheta = s * ds                        (straight through the rounding of s as well)

How autograd gets there, alone and inside a linear layer, is in :mod:`gracekit.quant._lsq_autograd`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization.qat import FakeQuantizerBase

from gracekit._checks import check_choice, check_floating, check_int, check_rank, check_same_device
from gracekit.quant._lsq_autograd import fake_quantize, quantized_linear
from gracekit.quant.scheme import SCALE_DTYPES, LSQConfig

# O out_features, I in_features, S groups per row, G group size


def lsq_fake_quantize(
    weight: Tensor,
    log_scale: Tensor,
    *,
    bits: int = 4,
    group_size: int = 128,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Round a weight to the values its integer codes stand for, differentiably in weight and scale.

    W_q = clip(round(W / s), -2^(b-1), 2^(b-1) - 1) * s per group, s = exp(log_scale) rounded to ``scale_dtype``; gradients by the
    straight-through estimator of LSQ (Esser et al., ICLR 2020). Computed in float32 (float64 for float64 weights).

    Args:
        weight: (out, in), bfloat16, float16, float32 or float64.
        log_scale: (out, in // group_size), natural logarithm of the scales, float32 (float64 beside a float64 weight). Scales
            beyond the range of ``scale_dtype`` are held at its ends.
        bits: width of a code, 2 to 8.
        group_size: inputs that share a scale; divides ``in``.
        scale_dtype: torch.bfloat16, torch.float16 or torch.float32 (torch.float64 beside a float64 weight).

    Returns:
        W_q, shape and dtype of ``weight``. The gradient of ``weight`` has its dtype, that of ``log_scale`` its own. It can be
        differentiated once.

    Raises:
        TypeError: ``log_scale`` or ``weight`` has another dtype, for instance after ``model.to(torch.bfloat16)`` or under a
            mixed precision policy of FSDP2 that casts the scales.
        ValueError: shapes, devices or numbers do not fit.

    Example:
        >>> weight = torch.tensor([[0.9, -0.26, 0.1, 4.0]])
        >>> lsq_fake_quantize(weight, torch.zeros(1, 2), group_size=2)
        tensor([[1., -0., 0., 4.]])
    """
    _check(weight, log_scale, bits, group_size, scale_dtype)
    return fake_quantize(weight, log_scale, bits, scale_dtype)


class LSQFakeQuantizer(FakeQuantizerBase):  # type: ignore[misc]
    """The weight fake quantiser inside a torchao FakeQuantizedLinear: holds ``log_scale``, applies :func:`lsq_fake_quantize`.

    ``enabled = False`` (torchao's disable_linear_fake_quant) lets the weight through as it is.
    """

    def __init__(self, config: LSQConfig, log_scale: Tensor) -> None:
        super().__init__()
        self.config = config
        self.enabled = True
        self.log_scale = nn.Parameter(log_scale)

    def forward(self, weight: Tensor, x: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Return the fake-quantised ``weight`` (out, in); given ``x``, the layer's output ``F.linear(x, that, bias)``.

        The product has the same bits and gradients either way; made here, its backward pass makes one tensor of the weight's size
        less.

        Args:
            weight: (out, in), as :func:`lsq_fake_quantize` takes it.
            x: (..., in), the layer's input, or None.
            bias: (out,) or None; without ``x`` it is not used.

        Returns:
            (out, in), or (..., out) with ``x``.

        Raises:
            TypeError, ValueError: as :func:`lsq_fake_quantize`.
            RuntimeError: ``x`` or ``bias`` does not fit, as ``F.linear`` says it.
        """
        if self.enabled:
            config, log_scale = self.config, self.log_scale
            _check(weight, log_scale, config.bits, config.group_size, config.scale_dtype)
            if x is not None:
                return quantized_linear(x, weight, log_scale, bias, config.bits, config.scale_dtype)
            weight = fake_quantize(weight, log_scale, config.bits, config.scale_dtype)
        return weight if x is None else F.linear(x, weight, bias)

    def __repr__(self) -> str:
        return f"LSQFakeQuantizer({self.config})"


def _check(weight: Tensor, log_scale: Tensor, bits: int, group_size: int, scale_dtype: torch.dtype) -> None:
    """Raise unless the arguments of :func:`lsq_fake_quantize` fit."""
    check_floating("weight", weight)
    check_floating("log_scale", log_scale)
    check_rank("weight", weight, (2,), "(out, in)")
    check_int("bits", bits, low=2, high=8)
    check_int("group_size", group_size, low=1)
    wide = weight.dtype == torch.float64
    check_choice("scale_dtype", scale_dtype, (*SCALE_DTYPES, torch.float64) if wide else SCALE_DTYPES)
    if log_scale.dtype != torch.float32 and not (wide and log_scale.dtype == torch.float64):
        raise TypeError(
            f"log_scale must be float32 (keep it out of model.to(dtype) and of mixed precision policies), got {log_scale.dtype}"
        )
    outputs, inputs = weight.shape
    if not inputs:
        raise ValueError(f"weight must have inputs, got shape {tuple(weight.shape)}")
    if inputs % group_size:
        raise ValueError(f"group_size must divide in_features, got group_size={group_size} and in_features={inputs}")
    if tuple(log_scale.shape) != (outputs, inputs // group_size):
        raise ValueError(
            f"log_scale must have shape (out, in // group_size) = {(outputs, inputs // group_size)}, got {tuple(log_scale.shape)}"
        )
    check_same_device(weight=weight, log_scale=log_scale)
