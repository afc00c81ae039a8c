"""Learned step size quantisation of a weight: the differentiable fake quantiser and its torchao module.

Forward: W_q = clip(round(W / s)) * s with s = exp(theta) rounded to ``scale_dtype``. Backward, the straight-through estimator
of LSQ (Esser et al., ICLR 2020) with g = dL/dW_q and "inside" meaning that round(W / s) needs no clipping:

    dW     = g inside, 0 outside
    ds     = sum over the group of g * (q - W/s inside, q outside)
    dtheta = s * ds                        (straight through the rounding of s as well)

For a compiler both directions are opaque operators. It may drop a pair of casts (float32 to bfloat16 and back), replace a
division by a faster one, or keep a value in a wider dtype: harmless elsewhere, but here it would make codes in training that
are not the codes of deployment. Without one they are called as they are, which spares the host the registry. Only the weight
and its scales are kept for the backward pass; masks and codes follow from them once more. On CUDA each operator is one Triton
kernel (:mod:`gracekit.quant._triton_lsq`) where Triton is installed.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization.qat import FakeQuantizerBase

from gracekit._autograd import differentiable_once, differentiated_twice
from gracekit._checks import check_choice, check_floating, check_int, check_rank, check_same_device
from gracekit._kernels import has_triton
from gracekit.quant import _torch_lsq
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
    quantize: Any = torch.ops.gracekit.lsq_forward if _is_traced(weight) else _FakeQuantize.apply
    fake_quantized: Tensor = quantize(weight, log_scale, bits, scale_dtype)
    return fake_quantized


class LSQFakeQuantizer(FakeQuantizerBase):  # type: ignore[misc]
    """The weight fake quantiser inside a torchao FakeQuantizedLinear: holds ``log_scale``, applies :func:`lsq_fake_quantize`.

    ``enabled = False`` (torchao's disable_linear_fake_quant) lets the weight through as it is.
    """

    def __init__(self, config: LSQConfig, log_scale: Tensor) -> None:
        super().__init__()
        self.config = config
        self.enabled = True
        self.log_scale = nn.Parameter(log_scale)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the fake-quantised ``weight``."""
        if not self.enabled:
            return weight
        config = self.config
        return lsq_fake_quantize(
            weight, self.log_scale, bits=config.bits, group_size=config.group_size, scale_dtype=config.scale_dtype
        )

    def __repr__(self) -> str:
        return f"LSQFakeQuantizer({self.config})"


def _is_traced(weight: Tensor) -> bool:
    """Whether what is called must be an operator: for a compiler, or for tensors without data."""
    return torch.compiler.is_compiling() or weight.is_meta or type(weight) not in (Tensor, nn.Parameter)


def _backend(weight: Tensor) -> ModuleType:
    """Return the Triton kernels where they can compute (they know float32 and halves), else the same in torch operations."""
    if not weight.is_cuda or weight.dtype == torch.float64 or not has_triton():
        return _torch_lsq
    from gracekit.quant import _triton_lsq

    return _triton_lsq


@torch.library.custom_op("gracekit::lsq_forward", mutates_args=())
def _forward(weight: Tensor, log_scale: Tensor, bits: int, scale_dtype: torch.dtype) -> Tensor:
    values: Tensor = _backend(weight).forward(weight, log_scale, bits, scale_dtype)
    return values


@torch.library.custom_op("gracekit::lsq_backward", mutates_args=())
def _backward(
    grad: Tensor,
    weight: Tensor,
    log_scale: Tensor,
    bits: int,
    scale_dtype: torch.dtype,
    needs_weight: bool,
    needs_scale: bool,
) -> tuple[Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor] = _backend(weight).backward(
        grad, weight, log_scale, bits, scale_dtype, needs_weight=needs_weight, needs_scale=needs_scale
    )
    return gradients


@_forward.register_fake
def _(weight: Tensor, log_scale: Tensor, bits: int, scale_dtype: torch.dtype) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


@_backward.register_fake
def _(
    grad: Tensor,
    weight: Tensor,
    log_scale: Tensor,
    bits: int,
    scale_dtype: torch.dtype,
    needs_weight: bool,
    needs_scale: bool,
) -> tuple[Tensor, Tensor]:
    contiguous = torch.contiguous_format
    grad_weight = torch.empty_like(weight, memory_format=contiguous) if needs_weight else weight.new_empty(0)
    grad_scale = torch.empty_like(log_scale, memory_format=contiguous) if needs_scale else log_scale.new_empty(0)
    return grad_weight, grad_scale


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor | None = None) -> None:
    weight, log_scale, ctx.bits, ctx.scale_dtype = inputs
    ctx.save_for_backward(weight, log_scale)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    weight, log_scale = ctx.saved_tensors
    needs_weight, needs_scale = ctx.needs_input_grad[:2]
    grad_weight, grad_scale = torch.ops.gracekit.lsq_backward(
        grad, weight, log_scale, ctx.bits, ctx.scale_dtype, needs_weight, needs_scale
    )
    return grad_weight if needs_weight else None, grad_scale if needs_scale else None, None, None


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise differentiated_twice("lsq_fake_quantize")


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse)


class _FakeQuantize(torch.autograd.Function):
    """The two operators without a registry."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, log_scale: Tensor, bits: int, scale_dtype: torch.dtype) -> Tensor:
        _save(ctx, (weight, log_scale, bits, scale_dtype))
        values: Tensor = _backend(weight).forward(weight, log_scale, bits, scale_dtype)
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        weight, log_scale = ctx.saved_tensors
        needs_weight, needs_scale = ctx.needs_input_grad[:2]
        with torch.no_grad():
            grad_weight, grad_scale = _backend(weight).backward(
                grad, weight, log_scale, ctx.bits, ctx.scale_dtype, needs_weight=needs_weight, needs_scale=needs_scale
            )
        source = weight if needs_weight else log_scale
        return (
            differentiable_once("lsq_fake_quantize", grad_weight, source) if needs_weight else None,
            differentiable_once("lsq_fake_quantize", grad_scale, source) if needs_scale else None,
            None,
            None,
        )
