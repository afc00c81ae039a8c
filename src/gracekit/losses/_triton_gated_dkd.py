"""The rows of :mod:`gracekit.losses._rows` as Triton kernels: each pass reads the logits once, in any row-strided layout.

``partial_kernel`` walks a row (or a share of it) with a running maximum and six running sums for each lane, so that nothing is
exchanged between threads until the end of the row; ``finish_kernel`` joins them into the values and the statistics of the
closed-form gradient; ``gradient_kernel`` is elementwise in these. Traffic is two reads of both logits and one write.
"""

# N rows, V student classes, K compared classes, P parts a row is cut into, L lanes

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gracekit.losses._rows import DKDParameters, Rows, RowStatistics, RowValues

# Below every logit, yet differences from it stay finite, so that an all-masked lane adds 0 and not NaN.
_LOWEST = tl.constexpr(-3.0e38)
_LOG2E = tl.constexpr(math.log2(math.e))
_INF = tl.constexpr(math.inf)

_PARTIAL_FIELDS = 10
_LANES, _PER_LANE = 256, 8
_GRADIENT_BLOCK = 1024


@triton.jit
def _exp(x):
    return tl.exp2(x * _LOG2E)


@triton.jit
def _log1p(u):
    # log(1 + u) * u / ((1 + u) - 1) cancels the rounding of 1 + u.
    w = 1.0 + u
    return tl.where(w == 1.0, u, tl.log(w) * u / tl.where(w == 1.0, 1.0, w - 1.0))


@triton.jit
def _log_sigmoid(x):
    return tl.minimum(x, 0.0) - _log1p(_exp(-tl.abs(x)))


@triton.jit
def _sigmoid(x):
    e = _exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _minus_expm1(x):
    """1 - exp(x) for x <= 0 without cancellation."""
    u = _exp(x)
    exact = (u - 1.0) * x / tl.where((u == 1.0) | (u == 0.0), 1.0, tl.log(u))
    return tl.where(u == 1.0, -x, tl.where(u == 0.0, 1.0, -exact))


@triton.jit
def partial_kernel(
    student, teacher, target, keep, partial,
    student_stride, teacher_stride, V, K, rate,
    STEPS: tl.constexpr, EXTRA_STEPS: tl.constexpr, FIELDS: tl.constexpr, LANES: tl.constexpr, PER_LANE: tl.constexpr,
    WITH_CE: tl.constexpr, GATED: tl.constexpr, SQUARE: tl.constexpr,
):  # fmt: skip
    """Running maximum and sums of one part of one row; ``rate`` is log2(e) / T."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    if tl.load(keep + row) == 0:
        return
    label = tl.load(target + row)
    student += row * student_stride
    teacher += row * teacher_stride
    lane = tl.arange(0, LANES)[:, None] * PER_LANE + tl.arange(0, PER_LANE)[None, :]
    s_peak = tl.full([LANES], _LOWEST, tl.float32)
    t_peak = tl.full([LANES], _LOWEST, tl.float32)
    s_sum = tl.zeros([LANES], tl.float32)
    t_sum = tl.zeros([LANES], tl.float32)
    s_one = tl.zeros([LANES], tl.float32)  # at temperature 1, for the cross-entropy
    t_one = tl.zeros([LANES], tl.float32)  # at temperature 1, for the gate
    t_moment = tl.zeros([LANES], tl.float32)
    cross = tl.zeros([LANES], tl.float32)  # sum of teacher weight times (shifted teacher - shifted student)
    widest = tl.zeros([LANES], tl.float32)
    BLOCK: tl.constexpr = LANES * PER_LANE
    for step in range(STEPS):
        column = (part * STEPS + step) * BLOCK + lane
        # The target leaves after the load: a mask that differs within a vector would split the load.
        s = tl.load(student + column, mask=column < K, other=-_INF).to(tl.float32)
        t = tl.load(teacher + column, mask=column < K, other=-_INF).to(tl.float32)
        s = tl.where(column == label, -_INF, s)
        t = tl.where(column == label, -_INF, t)

        top = tl.maximum(s_peak, tl.max(s, 1))
        s_move = s_peak - top
        s_peak = top
        s = s - top[:, None]
        weight = tl.exp2(s * rate)
        decay = tl.exp2(s_move * rate)
        s_sum = s_sum * decay + tl.sum(weight, 1)
        if WITH_CE:
            if SQUARE:
                s_one = s_one * decay * decay + tl.sum(weight * weight, 1)
            else:
                s_one = s_one * tl.exp2(s_move * _LOG2E) + tl.sum(tl.exp2(s * _LOG2E), 1)

        top = tl.maximum(t_peak, tl.max(t, 1))
        t_move = t_peak - top
        t_peak = top
        t = t - top[:, None]
        weight = tl.exp2(t * rate)
        decay = tl.exp2(t_move * rate)
        gap = tl.where(t == -_INF, 0.0, t - s)  # +inf where the student alone masks
        widest = tl.maximum(widest, tl.max(gap, 1))
        cross = (cross + t_sum * (t_move - s_move)) * decay + tl.sum(weight * gap, 1)
        t_sum = t_sum * decay + tl.sum(weight, 1)
        if GATED:
            if SQUARE:
                one = weight * weight
                decay = decay * decay
            else:
                one = tl.exp2(t * _LOG2E)
                decay = tl.exp2(t_move * _LOG2E)
            t_moment = (t_moment + t_one * t_move) * decay + tl.sum(tl.where(t == -_INF, 0.0, one * t), 1)
            t_one = t_one * decay + tl.sum(one, 1)

    c_peak = s_peak
    for step in range(EXTRA_STEPS):  # columns that the cross-entropy alone sees
        column = K + (part * EXTRA_STEPS + step) * BLOCK + lane
        s = tl.load(student + column, mask=column < V, other=-_INF).to(tl.float32)
        top = tl.maximum(c_peak, tl.max(s, 1))
        s_one = s_one * tl.exp2((c_peak - top) * _LOG2E) + tl.sum(tl.exp2((s - top[:, None]) * _LOG2E), 1)
        c_peak = top

    s_top = tl.max(s_peak, 0)
    t_top = tl.max(t_peak, 0)
    c_top = tl.max(c_peak, 0)
    s_move = s_peak - s_top
    t_move = t_peak - t_top
    t_decay = tl.exp2(t_move * rate)
    t_decay_one = tl.exp2(t_move * _LOG2E)
    out = partial + (row * tl.num_programs(1) + part) * FIELDS
    tl.store(out, s_top)
    tl.store(out + 1, tl.sum(s_sum * tl.exp2(s_move * rate), 0))
    tl.store(out + 2, t_top)
    tl.store(out + 3, tl.sum(t_sum * t_decay, 0))
    tl.store(out + 4, tl.sum((cross + t_sum * (t_move - s_move)) * t_decay, 0))
    tl.store(out + 5, tl.max(widest, 0))
    tl.store(out + 6, tl.sum(t_one * t_decay_one, 0))
    tl.store(out + 7, tl.sum((t_moment + t_one * t_move) * t_decay_one, 0))
    tl.store(out + 8, c_top)
    tl.store(out + 9, tl.sum(s_one * tl.exp2((c_peak - c_top) * _LOG2E), 0))


@triton.jit
def _log_odds(logit, peak, total, temperature):
    """Log-sum-exp of the rest relative to its peak, 0 where all of it is masked, and log-odds of the target."""
    empty = total == 0.0
    lse = tl.where(empty, 0.0, tl.log(tl.where(empty, 1.0, total)))
    return lse, tl.where(empty, _INF, (logit - peak) / temperature - lse)


@triton.jit
def finish_kernel(
    student, teacher, target, keep, partial, values, statistics,
    student_stride, teacher_stride, N, temperature, alpha, beta, log_classes,
    PARTS: tl.constexpr, FIELDS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Join the parts of a row: three values, eight statistics."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(keep + row) == 0:
        for field in tl.static_range(3):
            tl.store(values + field * N + row, 0.0)
        for field in tl.static_range(8):
            tl.store(statistics + field * N + row, 0.0)
        return
    label = tl.load(target + row)
    s_y = tl.load(student + row * student_stride + label).to(tl.float32)
    t_y = tl.load(teacher + row * teacher_stride + label).to(tl.float32)
    at = partial + (row * PARTS + tl.arange(0, PARTS)) * FIELDS
    rate = _LOG2E / temperature

    s_peaks = tl.load(at)
    s_peak = tl.max(s_peaks, 0)
    s_move = s_peaks - s_peak
    s_sum = tl.sum(tl.load(at + 1) * tl.exp2(s_move * rate), 0)
    t_peaks = tl.load(at + 2)
    t_peak = tl.max(t_peaks, 0)
    t_move = t_peaks - t_peak
    t_decay = tl.exp2(t_move * rate)
    t_sums = tl.load(at + 3)
    t_sum = tl.sum(t_sums * t_decay, 0)
    cross = tl.sum((tl.load(at + 4) + t_sums * (t_move - s_move)) * t_decay, 0)
    widest = tl.max(tl.load(at + 5), 0)
    t_decay_one = tl.exp2(t_move * _LOG2E)
    t_ones = tl.load(at + 6)
    t_one = tl.sum(t_ones * t_decay_one, 0)
    t_moment = tl.sum((tl.load(at + 7) + t_ones * t_move) * t_decay_one, 0)
    c_peaks = tl.load(at + 8)
    c_peak = tl.max(c_peaks, 0)
    c_sum = tl.sum(tl.load(at + 9) * tl.exp2((c_peaks - c_peak) * _LOG2E), 0)

    s_lse, s_odds = _log_odds(s_y, s_peak, s_sum, temperature)
    t_lse, t_odds = _log_odds(t_y, t_peak, t_sum, temperature)
    c_lse, c_odds = _log_odds(s_y, c_peak, c_sum, 1.0)

    yes = _sigmoid(t_odds)
    no = _sigmoid(-t_odds)
    tckd = tl.where(yes == 0.0, 0.0, yes * (_log_sigmoid(t_odds) - _log_sigmoid(s_odds)))
    tckd += tl.where(no == 0.0, 0.0, no * (_log_sigmoid(-t_odds) - _log_sigmoid(-s_odds)))
    weight = tl.where(t_sum == 0.0, 1.0, t_sum)
    nckd = tl.where(t_sum == 0.0, 0.0, cross / weight / temperature - t_lse + s_lse)
    nckd = tl.where(widest == _INF, _INF, tl.where(nckd < 0.0, 0.0, nckd))
    tckd = tl.where(tckd < 0.0, 0.0, tckd)
    value = tl.where(alpha == 0.0, 0.0, alpha * tckd) + tl.where(beta == 0.0, 0.0, beta * nckd)

    high = tl.maximum(s_odds, t_odds)
    low = tl.minimum(s_odds, t_odds)
    size = _minus_expm1(low - high) * _sigmoid(high) * _sigmoid(-low)
    target_gap = tl.where(s_odds == t_odds, 0.0, tl.where(s_odds > t_odds, size, -size))

    gate = 1.0
    if GATED:
        offset = t_y - t_peak
        up = tl.maximum(offset, 0.0)  # the peak of all classes, relative to that of the rest
        down = _exp(-up)
        at_target = _exp(offset - up)
        total = t_one * down + at_target
        moment = (t_moment - up * t_one) * down + tl.where(at_target == 0.0, 0.0, at_target * (offset - up))
        entropy = tl.log(total) - moment / total
        entropy = tl.where(entropy < 0.0, 0.0, tl.where(entropy > log_classes, log_classes, entropy))
        gate = _exp(-entropy / log_classes)

    tl.store(values + row, -_log_sigmoid(c_odds))
    tl.store(values + N + row, temperature * temperature * value)
    tl.store(values + 2 * N + row, gate)
    tl.store(statistics + row, s_peak)
    tl.store(statistics + N + row, s_lse)
    tl.store(statistics + 2 * N + row, t_peak)
    tl.store(statistics + 3 * N + row, tl.where(t_sum == 0.0, _INF, t_lse))  # no rest, no NCKD
    tl.store(statistics + 4 * N + row, target_gap)
    tl.store(statistics + 5 * N + row, c_peak)
    tl.store(statistics + 6 * N + row, c_lse)
    tl.store(statistics + 7 * N + row, c_odds)


@triton.jit
def gradient_kernel(
    student, teacher, target, keep, statistics, ce_grad, dkd_grad, gradient,
    student_stride, teacher_stride, gradient_stride, N, V, K, temperature, alpha, beta,
    BLOCK: tl.constexpr, WITH_CE: tl.constexpr,
):  # fmt: skip
    """The closed-form gradient of a block of columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < V
    out = gradient + row * gradient_stride + column
    if tl.load(keep + row) == 0:
        tl.store(out, tl.zeros([BLOCK], tl.float32).to(gradient.dtype.element_ty), mask=inside)
        return
    label = tl.load(target + row)
    at = statistics + row
    gap = tl.load(at + 4 * N)
    scale = temperature * tl.load(dkd_grad + row)
    beta = tl.where(tl.load(at + 3 * N) == _INF, 0.0, beta)
    rate = _LOG2E / temperature
    s = tl.load(student + row * student_stride + column, mask=inside, other=-_INF).to(tl.float32)
    t = tl.load(teacher + row * teacher_stride + column, mask=column < K, other=-_INF).to(tl.float32)
    s_hat = tl.exp2((s - tl.load(at)) * rate - tl.load(at + N) * _LOG2E)
    t_hat = tl.exp2((t - tl.load(at + 2 * N)) * rate - tl.load(at + 3 * N) * _LOG2E)
    value = (scale * (beta - alpha * gap)) * s_hat - (scale * beta) * t_hat
    value = tl.where(column == label, scale * alpha * gap, tl.where(column < K, value, 0.0))
    if WITH_CE:
        ce = tl.load(ce_grad + row)
        odds = tl.load(at + 7 * N)
        rest = (s - tl.load(at + 5 * N)) - (tl.load(at + 6 * N) - _log_sigmoid(-odds))
        value += ce * tl.where(column == label, -_sigmoid(-odds), _exp(rest))
    tl.store(out, value.to(gradient.dtype.element_ty), mask=inside)


def _usable(rows_NV: Tensor) -> Tensor:
    return rows_NV if rows_NV.stride(1) == 1 else rows_NV.contiguous()


def _parts(rows: int, device: torch.device) -> int:
    """Cut rows so that a few of them still fill the device."""
    if device.type != "cuda":
        return 1
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = max(1, 4 * processors // max(1, rows))
    return min(8, 1 << (wanted.bit_length() - 1))


def forward(
    rows: Rows, parameters: DKDParameters, *, with_cross_entropy: bool, parts: int | None = None
) -> tuple[RowValues, RowStatistics]:
    """Return what :func:`gracekit.losses._rows.forward_rows` does, of all rows at once, in float32."""
    student_NV, teacher_NV, target_N, keep_N = rows
    temperature, alpha, beta, gated, classes = parameters
    student_NV, teacher_NV = _usable(student_NV), _usable(teacher_NV)
    count, width = student_NV.shape
    parts = parts or _parts(count, student_NV.device)
    values = torch.empty(3, count, dtype=torch.float32, device=student_NV.device)
    statistics = values.new_empty(8, count)
    if count:

        def steps(columns: int) -> int:
            return -(-columns // (parts * _LANES * _PER_LANE))

        partial = values.new_empty(count, parts, _PARTIAL_FIELDS)
        tensors = (student_NV, teacher_NV, target_N, keep_N, partial)
        strides = (student_NV.stride(0), teacher_NV.stride(0))
        partial_kernel[(count, parts)](
            *tensors, *strides, width, classes, math.log2(math.e) / temperature,
            STEPS=steps(classes), EXTRA_STEPS=steps(width - classes) if with_cross_entropy else 0, FIELDS=_PARTIAL_FIELDS,
            LANES=_LANES, PER_LANE=_PER_LANE, WITH_CE=with_cross_entropy, GATED=gated, SQUARE=temperature == 2.0,
            num_warps=_LANES // 64,
        )  # fmt: skip
        finish_kernel[(count,)](
            *tensors, values, statistics, *strides, count, temperature, alpha, beta, math.log(classes),
            PARTS=parts, FIELDS=_PARTIAL_FIELDS, GATED=gated, num_warps=1,
        )  # fmt: skip
    return RowValues(*values), RowStatistics(*statistics)


def gate(teacher_NV: Tensor, target_N: Tensor, keep_N: Tensor, parameters: DKDParameters) -> Tensor:
    """Return the gate of all rows; the teacher takes both places, so its second read comes from the cache."""
    return forward(Rows(teacher_NV, teacher_NV, target_N, keep_N), parameters, with_cross_entropy=False)[0].gate_N


def backward(
    rows: Rows,
    statistics: RowStatistics,
    ce_grad_N: Tensor,
    dkd_grad_N: Tensor,
    parameters: DKDParameters,
    *,
    out_NV: Tensor,
    with_cross_entropy: bool,
) -> None:
    """Write what :func:`gracekit.losses._rows.backward_rows` returns, of all rows at once, to ``out_NV``.

    Every element is read before it is written, so ``out_NV`` may be the memory of either side's logits.
    """
    student_NV, teacher_NV, target_N, keep_N = rows
    temperature, alpha, beta, _, classes = parameters
    student_NV, teacher_NV = _usable(student_NV), _usable(teacher_NV)
    count, width = student_NV.shape
    assert out_NV.stride(1) == 1
    if count:
        gradient_kernel[(count, triton.cdiv(width, _GRADIENT_BLOCK))](
            student_NV, teacher_NV, target_N, keep_N, torch.stack(statistics), ce_grad_N.contiguous(),
            dkd_grad_N.contiguous(), out_NV, student_NV.stride(0), teacher_NV.stride(0), out_NV.stride(0), count, width,
            classes, temperature, alpha, beta, BLOCK=_GRADIENT_BLOCK, WITH_CE=with_cross_entropy, num_warps=4,
        )  # fmt: skip
