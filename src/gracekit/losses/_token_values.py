"""Per-token values of logits as one autograd function over blocks of rows."""

# N tokens, V vocabulary

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gracekit._autograd import differentiable_once
from gracekit._checks import check_floating, check_integral, check_same_device
from gracekit.losses._inputs import (
    DKDConfig,
    check_aligned,
    check_not_masked,
    compared_classes,
    supervised_targets,
    use_triton,
)
from gracekit.losses._rows import (
    DKDParameters,
    Rows,
    RowStatistics,
    RowValues,
    backward_rows,
    compute_dtype,
    entropy_gate_rows,
    forward_rows,
)

# Elements of logits a block holds: its temporaries stay in the cache of a CPU, and fill an accelerator without adding up.
_BLOCK_ELEMENTS = {"cpu": 2**18}
_BLOCK_ELEMENTS_ACCELERATOR = 2**26


def row_blocks(
    count: int, width: int, device: torch.device, *, elements: int | None = None, least: int = 1
) -> Iterator[slice]:
    """Cut rows into blocks of ``elements`` at most but ``least`` rows; one block while compiling, where the compiler fuses."""
    if torch.compiler.is_compiling():
        yield slice(None)
        return
    if elements is None:
        elements = _BLOCK_ELEMENTS.get(device.type, _BLOCK_ELEMENTS_ACCELERATOR)
    step = max(least, elements // max(1, width))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def _size(rows_NV: Tensor) -> tuple[int, int, torch.device]:
    return rows_NV.shape[0], rows_NV.shape[1], rows_NV.device


def flat_rows(logits: Tensor) -> Tensor:
    """Return (..., V) as (N, V); a view wherever strides allow."""
    return logits.reshape(-1, logits.shape[-1])


def token_values(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    config: DKDConfig,
    *,
    with_cross_entropy: bool,
    backend: str = "auto",
) -> RowValues:
    """Return cross-entropy (over all of the student's classes), L and gate of every token, flattened to (N,)."""
    check_floating("student_logits", student_logits)
    check_floating("teacher_logits", teacher_logits)
    check_integral("labels", labels)
    check_same_device(student_logits=student_logits, teacher_logits=teacher_logits, labels=labels)
    classes = compared_classes(
        student_logits=student_logits, teacher_logits=teacher_logits, vocab_size=config.vocab_size
    )
    check_aligned("student_logits", student_logits, labels)
    check_aligned("teacher_logits", teacher_logits, labels)
    keep_N, target_N = supervised_targets(labels, config.ignore_index, classes)
    student_NV, teacher_NV = flat_rows(student_logits), flat_rows(teacher_logits.detach())
    if not torch.compiler.is_compiling() and teacher_NV.is_inference():
        teacher_NV = teacher_NV.clone()  # of inference mode's tensors autograd can keep a copy alone
    check_not_masked("student_logits", student_NV.detach(), target_N, keep_N)
    check_not_masked("teacher_logits", teacher_NV, target_N, keep_N)
    parameters = config.for_classes(classes)
    triton = use_triton(backend, student_NV, teacher_NV)
    values = _TokenValues.apply(  # type: ignore[no-untyped-call]
        student_NV, teacher_NV, target_N, keep_N, parameters, with_cross_entropy, triton
    )
    return RowValues(*values)


@torch.no_grad()
def token_gates(teacher_logits: Tensor, labels: Tensor, config: DKDConfig) -> Tensor:
    """Return the gate of every token in the shape of the labels, 0 where ignored."""
    check_floating("teacher_logits", teacher_logits)
    check_integral("labels", labels)
    check_same_device(teacher_logits=teacher_logits, labels=labels)
    classes = compared_classes(teacher_logits=teacher_logits, vocab_size=config.vocab_size)
    check_aligned("teacher_logits", teacher_logits, labels)
    keep_N, target_N = supervised_targets(labels, config.ignore_index, classes)
    rows_NV = flat_rows(teacher_logits)
    triton = use_triton("auto", rows_NV)
    return gate_rows(rows_NV, target_N, keep_N, config.for_classes(classes), triton=triton).reshape(labels.shape)


class _TokenValues(torch.autograd.Function):
    """Per-token values; keeps the logits that are there anyway and eight numbers a token."""

    @staticmethod
    def forward(
        ctx: Any,
        student_NV: Tensor,
        teacher_NV: Tensor,
        target_N: Tensor,
        keep_N: Tensor,
        parameters: DKDParameters,
        with_cross_entropy: bool,
        triton: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = Rows(student_NV, teacher_NV, target_N, keep_N)
        values, statistics = all_forward(rows, parameters, with_cross_entropy=with_cross_entropy, triton=triton)
        ctx.save_for_backward(*rows, *statistics)
        ctx.parameters, ctx.with_cross_entropy, ctx.triton = parameters, with_cross_entropy, triton
        ctx.mark_non_differentiable(values.gate_N)
        return values.cross_entropy_N, values.dkd_N, values.gate_N

    @staticmethod
    def backward(ctx: Any, ce_grad_N: Tensor, dkd_grad_N: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: checkpointing computes what it asks for anew
        rows, statistics = Rows(*saved[:4]), RowStatistics(*saved[4:])
        with torch.no_grad():
            gradient_NV = all_backward(
                rows,
                statistics,
                ce_grad_N,
                dkd_grad_N,
                ctx.parameters,
                out_NV=torch.empty_like(rows.student_NV, memory_format=torch.contiguous_format),
                with_cross_entropy=ctx.with_cross_entropy,
                triton=ctx.triton,
            )
        return differentiable_once("gated_dkd", gradient_NV, rows.student_NV), None, None, None, None, None, None


def all_forward(
    rows: Rows, parameters: DKDParameters, *, with_cross_entropy: bool, triton: bool
) -> tuple[RowValues, RowStatistics]:
    """Return values and statistics of all rows: the kernels, or the formula a block of rows at a time."""
    if triton:
        from gracekit.losses import _triton_gated_dkd

        return _triton_gated_dkd.forward(rows, parameters, with_cross_entropy=with_cross_entropy)
    return _gather(
        [
            forward_rows(rows.part(block), parameters, with_cross_entropy=with_cross_entropy)
            for block in row_blocks(*_size(rows.student_NV))
        ],
        rows,
    )


def all_backward(
    rows: Rows,
    statistics: RowStatistics,
    ce_grad_N: Tensor,
    dkd_grad_N: Tensor,
    parameters: DKDParameters,
    *,
    out_NV: Tensor,
    with_cross_entropy: bool,
    triton: bool,
) -> Tensor:
    """Write the gradient of all rows to ``out_NV``, which may be the memory of either side's logits, and return it."""
    if triton:
        from gracekit.losses import _triton_gated_dkd

        _triton_gated_dkd.backward(
            rows, statistics, ce_grad_N, dkd_grad_N, parameters, out_NV=out_NV, with_cross_entropy=with_cross_entropy
        )
        return out_NV
    for block in row_blocks(*_size(rows.student_NV)):
        out_NV[block] = backward_rows(
            rows.part(block),
            statistics.part(block),
            ce_grad_N[block],
            dkd_grad_N[block],
            parameters,
            with_cross_entropy=with_cross_entropy,
        )
        out_NV[block].masked_fill_(~rows.keep_N[block, None], 0.0)
    return out_NV


def gate_rows(
    teacher_NV: Tensor, target_N: Tensor, keep_N: Tensor, parameters: DKDParameters, *, triton: bool
) -> Tensor:
    """Return the gate of all rows, 0 where not kept."""
    dtype = compute_dtype(teacher_NV)
    if not parameters.gated:
        return keep_N.to(dtype)
    if triton:
        from gracekit.losses import _triton_gated_dkd

        return _triton_gated_dkd.gate(teacher_NV, target_N, keep_N, parameters)
    classes = parameters.classes
    gates = [entropy_gate_rows(teacher_NV[block, :classes].to(dtype)) for block in row_blocks(*_size(teacher_NV))]
    return torch.where(keep_N, torch.cat(gates), 0.0) if gates else teacher_NV.new_zeros(0, dtype=dtype)


def _gather(blocks: list[tuple[RowValues, RowStatistics]], rows: Rows) -> tuple[RowValues, RowStatistics]:
    """Join the per-row results of all blocks; empty tensors where there is no row."""
    if not blocks:
        empty = torch.zeros(0, dtype=compute_dtype(*rows[:2]), device=rows.student_NV.device)
        return RowValues(*(empty.clone() for _ in RowValues._fields)), RowStatistics(
            *[empty] * len(RowStatistics._fields)
        )
    values, statistics = zip(*blocks, strict=True)
    return (
        RowValues(*map(torch.cat, zip(*values, strict=True))),
        RowStatistics(*map(torch.cat, zip(*statistics, strict=True))),
    )
