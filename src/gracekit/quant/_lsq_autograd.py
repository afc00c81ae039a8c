"""The derivatives of :mod:`gracekit.quant.lsq`: of the fake quantiser alone, and of a linear layer with it.

For a compiler both directions of the fake quantiser are opaque operators. It may drop a pair of casts (float32 to bfloat16 and
back), replace a division by a faster one, or keep a value in a wider dtype: harmless elsewhere, but here it would make codes in
training that are not the codes of deployment. Without one they are called as they are, which spares the host the registry. Only
the weight and its scales are kept for the backward pass; masks and codes follow from them once more. On CUDA each is one Triton
kernel (:mod:`gracekit.quant._triton_lsq`) where Triton is installed.

The layer y = x W_q^T + b is one function where nothing has to see its parts. Its backward pass makes dW_q = g^T x itself, and dW
is dW_q but for zeros at the clipped weights: they are written into dW_q, and there is no second tensor of the weight's size.
"""

# N rows of x, O out_features, I in_features, S groups per row

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from gracekit._autograd import autocasts, differentiable_once, differentiated_twice
from gracekit._kernels import has_triton
from gracekit.quant import _torch_lsq


def fake_quantize(weight: Tensor, log_scale: Tensor, bits: int, scale_dtype: torch.dtype) -> Tensor:
    """Return W_q (O, I) of a weight (O, I) and the logarithms (O, S) of its scales, differentiable in both."""
    quantize: Any = torch.ops.gracekit.lsq_forward if _is_traced(weight) else _FakeQuantize.apply
    fake_quantized: Tensor = quantize(weight, log_scale, bits, scale_dtype)
    return fake_quantized


def quantized_linear(
    x: Tensor, weight: Tensor, log_scale: Tensor, bias: Tensor | None, bits: int, scale_dtype: torch.dtype
) -> Tensor:
    """Return x W_q^T + b, shape (..., O), of x (..., I), weight (O, I), logarithms (O, S) of its scales and bias (O,) or None.

    Differentiable in all four as ``F.linear(x, fake_quantize(weight, ...), bias)``, bit for bit, and that itself where the two
    are not to be one function.
    """
    if not _is_one_function(x, weight, log_scale, bias):
        return F.linear(x, fake_quantize(weight, log_scale, bits, scale_dtype), bias)
    # As F.linear does, outside of the function: the result is then a view that may be modified in place.
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    product: Tensor = _QuantizedLinear.apply(rows, weight, log_scale, bias, bits, scale_dtype)  # type: ignore[no-untyped-call]
    return product if x.ndim == 2 else product.view(*x.shape[:-1], weight.shape[0])


def _is_one_function(x: Tensor, weight: Tensor, log_scale: Tensor, bias: Tensor | None) -> bool:
    """Whether product and fake quantiser may be one function: no compiler, no cast, and nothing that F.linear would refuse."""
    parts = [x, weight, log_scale] if bias is None else [x, weight, log_scale, bias]
    return (
        not any(map(_is_traced, parts))
        and x.dtype == weight.dtype
        and not autocasts(x)
        and x.layout == torch.strided
        and not x.is_nested
        and x.ndim > 0
        and x.shape[-1] == weight.shape[1]
        # Of other strides F.linear makes other products, depending on what requires a gradient.
        and x.is_contiguous()
        and not any(map(_has_tangent, parts))
    )


def _has_tangent(tensor: Tensor) -> bool:
    """Whether a tensor carries a forward-mode derivative."""
    return unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def _is_traced(tensor: Tensor) -> bool:
    """Whether what is called must be an operator: for a compiler, or for tensors without data."""
    return torch.compiler.is_compiling() or type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta


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
        needs = ctx.needs_input_grad[:2]
        return *_straight_through(grad, weight, log_scale, ctx.bits, ctx.scale_dtype, needs), None, None


class _QuantizedLinear(torch.autograd.Function):
    """x W_q^T + b of a matrix x (N, I)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        log_scale: Tensor,
        bias: Tensor | None,
        bits: int,
        scale_dtype: torch.dtype,
    ) -> Tensor:
        values = _backend(weight).forward(weight, log_scale, bits, scale_dtype)
        needs_x, needs_weight, needs_scale = ctx.needs_input_grad[:3]
        ctx.bits, ctx.scale_dtype = bits, scale_dtype
        ctx.save_for_backward(
            x if needs_weight or needs_scale else None, weight, log_scale, values if needs_x else None
        )
        return F.linear(x, values, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, log_scale, values = ctx.saved_tensors
        needs_x, needs_weight, needs_scale, needs_bias = ctx.needs_input_grad[:4]
        grad_x = grad_weight = grad_log_scale = grad_bias = None
        if needs_x:
            if torch.is_grad_enabled():  # create_graph=True: the kept values have no history, these have
                values = fake_quantize(weight, log_scale, ctx.bits, ctx.scale_dtype)
            grad_x = grad @ values
        if needs_weight or needs_scale:
            with torch.no_grad():
                # In another dtype only where autocast is on during the backward pass.
                grad_values = (grad.t() @ x).to(weight.dtype)
            needs = (needs_weight, needs_scale)
            grad_weight, grad_log_scale = _straight_through(
                grad_values, weight, log_scale, ctx.bits, ctx.scale_dtype, needs, in_place=True
            )
        if needs_bias:
            grad_bias = grad.sum(0)
        return grad_x, grad_weight, grad_log_scale, grad_bias, None, None


def _straight_through(
    grad: Tensor,
    weight: Tensor,
    log_scale: Tensor,
    bits: int,
    scale_dtype: torch.dtype,
    needs: tuple[bool, bool],
    *,
    in_place: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Return dW and dtheta of dW_q, each None unless it is needed; ``in_place`` makes dW of dW_q itself."""
    needs_weight, needs_scale = needs
    with torch.no_grad():
        grad_weight, grad_scale = _backend(weight).backward(
            grad,
            weight,
            log_scale,
            bits,
            scale_dtype,
            needs_weight=needs_weight,
            needs_scale=needs_scale,
            in_place=in_place,
        )
    source = weight if needs_weight else log_scale
    return (
        differentiable_once("lsq_fake_quantize", grad_weight, source) if needs_weight else None,
        differentiable_once("lsq_fake_quantize", grad_scale, source) if needs_scale else None,
    )
