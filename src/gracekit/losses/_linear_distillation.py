"""Losses from hidden states as one autograd function over slabs of tokens; see :mod:`gracekit.losses.linear_gated_dkd`."""

# N tokens, V classes of a head, D columns of a head

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gracekit._autograd import differentiable_once, without_autocast
from gracekit.losses._inputs import divisor
from gracekit.losses._rows import DKDParameters, Rows, compute_dtype, scaled
from gracekit.losses._token_values import all_backward, all_forward, gate_rows, row_blocks

# Elements of one side's logits that are alive at a time, and of the student's among them. A slab is large so that the products
# into the gradients are few; the student's logits in it come in blocks because the gradient takes the teacher's place. What no
# single slab holds leaves room for the head's gradient in float32.
_SLAB_ELEMENTS = {"cpu": 2**24}
_ONLY_SLAB_ELEMENTS_ACCELERATOR = 5 * 2**27
_SLAB_ELEMENTS_ACCELERATOR = 3 * 2**27
_BLOCK_ELEMENTS_ACCELERATOR = 2**26
_LEAST_ROWS = 256  # fewer would leave the products bound by reading the heads


class LinearDistillation(torch.autograd.Function):
    """Total, cross-entropy, distillation, sum of gates and tokens; gradients are made beside them, for a total of gradient 1."""

    @staticmethod
    def forward(
        ctx: Any,
        student_ND: Tensor,
        student_VD: Tensor,
        teacher_ND: Tensor,
        teacher_VD: Tensor,
        target_N: Tensor,
        keep_N: Tensor,
        ce_weight: Tensor | float,
        dkd_weight: Tensor | float,
        token_count: Tensor | float | None,
        gate_sum: Tensor | float | None,
        parameters: DKDParameters,
        triton: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        dtype = compute_dtype(student_ND, teacher_ND)
        own_tokens = keep_N.sum().to(dtype)
        sums = own_tokens.new_zeros(3)  # cross-entropy, gated distillation, gates
        hidden_grad_ND = torch.empty_like(student_ND) if wants_hidden else None
        head_grad_VD = None
        with without_autocast(student_ND):
            slabs = list(_slabs(student_ND, student_VD, teacher_VD))
            kept_NV = None
            if gate_sum is None:
                gate_sum = own_tokens.new_zeros(())
                for slab in slabs:
                    kept_NV = F.linear(teacher_ND[slab], teacher_VD)
                    gate_sum += gate_rows(kept_NV, target_N[slab], keep_N[slab], parameters, triton=triton).sum()
            tokens, gates = divisor("token_count", token_count, own_tokens), divisor("gate_sum", gate_sum, own_tokens)
            scale = _gradient_scale(student_ND.dtype, own_tokens, tokens)
            for slab in reversed(slabs):  # the last one's teacher logits are there
                teacher_NV = F.linear(teacher_ND[slab], teacher_VD) if kept_NV is None else kept_NV
                kept_NV = None
                gradient_NV = _slab(
                    student_ND[slab],
                    student_VD,
                    teacher_NV,
                    target_N[slab],
                    keep_N[slab],
                    scale * (ce_weight / tokens),
                    scale * (dkd_weight / gates),
                    sums,
                    parameters,
                    wants_gradient=wants_hidden or wants_head,
                    triton=triton,
                )
                del teacher_NV
                if hidden_grad_ND is not None:
                    hidden_grad_ND[slab] = gradient_NV @ student_VD
                if wants_head:
                    # A NaN in a row that does not count would come through a product with zeros.
                    hidden_ND = student_ND[slab].masked_fill(~keep_N[slab][:, None], 0.0)
                    head_grad_VD = _add_product(head_grad_VD, gradient_NV, hidden_ND, alone=len(slabs) == 1)
                del gradient_NV
        if wants_head and head_grad_VD is None:
            head_grad_VD = torch.zeros_like(student_VD)
        ctx.save_for_backward(student_ND, student_VD, scale, hidden_grad_ND, head_grad_VD)
        cross_entropy, gated = sums[0] / tokens, sums[1] / gates
        own_gates = sums[2].clone()
        ctx.mark_non_differentiable(cross_entropy, gated, own_gates, own_tokens)
        total = scaled(ce_weight, cross_entropy) + scaled(dkd_weight, gated)
        return total, cross_entropy, gated, own_gates, own_tokens

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        student_ND, student_VD, scale, *gradients = ctx.saved_tensors
        scaled = []
        for gradient, source in zip(gradients, (student_ND, student_VD), strict=True):
            if gradient is not None:
                with torch.no_grad():
                    gradient = _times(gradient, grad / scale, source.dtype)
                gradient = differentiable_once("linear_gated_dkd", gradient, source)
            scaled.append(gradient)
        return *scaled, *[None] * 10


def _slabs(hidden_ND: Tensor, student_VD: Tensor, teacher_VD: Tensor) -> Iterator[slice]:
    widest = max(len(student_VD), len(teacher_VD))
    is_one = len(hidden_ND) * widest <= _ONLY_SLAB_ELEMENTS_ACCELERATOR
    accelerator = _ONLY_SLAB_ELEMENTS_ACCELERATOR if is_one else _SLAB_ELEMENTS_ACCELERATOR
    elements = _SLAB_ELEMENTS.get(hidden_ND.device.type, accelerator)
    return row_blocks(len(hidden_ND), widest, hidden_ND.device, elements=elements, least=_LEAST_ROWS)


def _slab(
    student_ND: Tensor,
    student_VD: Tensor,
    teacher_NV: Tensor,
    target_N: Tensor,
    keep_N: Tensor,
    ce_scale: Tensor | float,
    dkd_scale: Tensor | float,
    sums: Tensor,
    parameters: DKDParameters,
    *,
    wants_gradient: bool,
    triton: bool,
) -> Tensor:
    """Add a slab's losses to ``sums`` and return the gradient of the student's logits, in the teacher's place if it fits."""
    width = len(student_VD)
    fits = teacher_NV.dtype == student_ND.dtype and teacher_NV.shape[1] >= width
    if fits or not wants_gradient:
        gradient_NV = teacher_NV[:, :width]
    else:
        gradient_NV = teacher_NV.new_empty(len(teacher_NV), width, dtype=student_ND.dtype)
    for block in row_blocks(
        len(student_ND), width, student_ND.device, elements=_BLOCK_ELEMENTS_ACCELERATOR, least=_LEAST_ROWS
    ):
        rows = Rows(F.linear(student_ND[block], student_VD), teacher_NV[block], target_N[block], keep_N[block])
        values, statistics = all_forward(rows, parameters, with_cross_entropy=True, triton=triton)
        sums += torch.stack((values.cross_entropy_N.sum(), (values.gate_N * values.dkd_N).sum(), values.gate_N.sum()))
        if wants_gradient:
            all_backward(
                rows,
                statistics,
                torch.ones_like(values.gate_N) * ce_scale,
                values.gate_N * dkd_scale,
                parameters,
                out_NV=gradient_NV[block],
                with_cross_entropy=True,
                triton=triton,
            )
    return gradient_NV


def _add_product(total_VD: Tensor | None, gradient_NV: Tensor, hidden_ND: Tensor, *, alone: bool) -> Tensor:
    """Add gradient^T hidden to the head's gradient.

    Of several slabs the sum is kept in float32: added up in bfloat16, what a slab brings below 2^-9 of the sum would be lost. So it
    is for float16, whose range a sum over many tokens leaves.
    """
    if alone and hidden_ND.dtype != torch.float16:
        return gradient_NV.T @ hidden_ND
    dtype = compute_dtype(hidden_ND)
    if total_VD is None:
        total_VD = torch.zeros(gradient_NV.shape[1], hidden_ND.shape[1], dtype=dtype, device=hidden_ND.device)
    if hidden_ND.is_cuda and hidden_ND.dtype != dtype:
        return torch.addmm(total_VD, gradient_NV.T, hidden_ND, out_dtype=dtype, out=total_VD)
    if hidden_ND.dtype == torch.float16:
        gradient_NV, hidden_ND = gradient_NV.to(dtype), hidden_ND.to(dtype)
    total_VD += gradient_NV.T @ hidden_ND
    return total_VD


def _gradient_scale(dtype: torch.dtype, own_tokens: Tensor, tokens: Tensor | float) -> Tensor:
    """What gradients are multiplied by on their way to the backward pass: 1; in float16, where 1 / tokens is small, near tokens.

    A power of two, so that nothing is rounded.
    """
    if dtype != torch.float16:
        return torch.ones_like(own_tokens)
    return torch.exp2(torch.log2((0.0 * own_tokens + tokens).clamp_min(1.0)).floor())


def _times(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return gradient * factor, rounded once: as a 0-d tensor the factor would take the gradient's dtype, and its range, first."""
    if factor.is_meta or torch.compiler.is_compiling():
        return (gradient * factor.reshape(1)).to(dtype)
    product = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
    return torch.mul(gradient, factor.reshape(1), out=product)
