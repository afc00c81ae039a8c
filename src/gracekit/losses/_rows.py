r"""Cross-entropy, decoupled distillation and gate of a block of rows, in closed form: values and gradients.

With :math:`y` the target, :math:`s = z / T` and "rest" the classes other than :math:`y`, everything follows from two numbers a
row has on each side: :math:`\ell = \log \sum_{j \ne y} e^{s_j}` and the log-odds :math:`a = s_y - \ell` of the target. So
:math:`\log p_y = \log\sigma(a)` and :math:`\log (1 - p_y) = \log\sigma(-a)` keep their relative precision for
probabilities within 1e-30 of 0 or 1, and :math:`\hat p_j = e^{s_j - \ell}` renormalises without a division.

Rows are shifted by the maximum of their *rest*, not of all classes: with a target logit of 1e4 above the others, a shift by
the target would round away what distinguishes the others.
"""

# N rows of a block, V classes of the student's logits, K classes compared (K <= V)

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Logit of a masked class within the formula, the same number in every dtype but float16; what is further below any real logit is
# as masked.
_MASKED = -(2.0**100)
# Devices whose operations on halves take longer than those on float32; on others they read and write half the bytes.
_SLOW_HALVES = ("cpu",)


class DKDParameters(NamedTuple):
    """What the value of a row depends on besides its logits."""

    temperature: float
    alpha: float
    beta: float
    gated: bool
    classes: int  # K


class Rows(NamedTuple):
    """Logits and targets of both sides; the target is a valid class in every row, also in those that are not kept."""

    student_NV: Tensor
    teacher_NV: Tensor
    target_N: Tensor
    keep_N: Tensor

    def part(self, block: slice) -> Rows:
        """Return a block of the rows."""
        return Rows(self.student_NV[block], self.teacher_NV[block], self.target_N[block], self.keep_N[block])


class RowValues(NamedTuple):
    """Per row: cross-entropy, T^2 (alpha TCKD + beta NCKD), gate; zeros where the row is ignored."""

    cross_entropy_N: Tensor
    dkd_N: Tensor
    gate_N: Tensor


class RowStatistics(NamedTuple):
    """What the gradient of a row needs besides its logits; eight numbers a row."""

    student_peak_N: Tensor
    student_lse_N: Tensor
    teacher_peak_N: Tensor
    teacher_lse_N: Tensor
    target_gap_N: Tensor  # p_S^y - p_T^y at temperature T
    ce_peak_N: Tensor  # of all V classes but y, at temperature 1
    ce_lse_N: Tensor
    ce_log_odds_N: Tensor

    def part(self, block: slice) -> RowStatistics:
        """Return those of a block of the rows."""
        return RowStatistics(*(statistic[block] for statistic in self))


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype losses are computed in: at least float32, float64 where any input is."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


class _Rest(NamedTuple):
    """The classes other than the target: logits relative to their peak over T, exponentials, and what these add up to."""

    peak_N1: Tensor
    shifted_NK: Tensor  # about _MASKED / T where masked, and at the target
    weight_NK: Tensor
    total_N1: Tensor
    lse_N1: Tensor  # 0 where all are masked
    offset_N1: Tensor  # the target's logit relative to the peak
    log_odds_N1: Tensor  # of the target; +inf where all others are masked


def _rest(logits_NK: Tensor, target_N1: Tensor, temperature: float, dtype: torch.dtype) -> _Rest:
    if logits_NK.dtype == torch.float16 or logits_NK.device.type in _SLOW_HALVES:  # float16 cannot hold the mask
        logits_NK = logits_NK.to(dtype)
    # A finite number for masked classes: differences and products of them stay numbers, where infinities would make NaN.
    rest_NK = logits_NK.clamp_min(_MASKED).scatter_(1, target_N1, _MASKED)
    peak_N1 = rest_NK.amax(1, keepdim=True).to(dtype)
    no_rest_N1 = peak_N1 == _MASKED
    peak_N1 = torch.where(no_rest_N1, 0.0, peak_N1)
    # The first operation on all logits whose result needs more than their own dtype.
    shifted_NK = rest_NK.sub_(peak_N1) if rest_NK.dtype == dtype else rest_NK - peak_N1
    shifted_NK.mul_(1.0 / temperature)
    weight_NK = shifted_NK.exp()
    total_N1 = weight_NK.sum(1, keepdim=True)
    lse_N1 = torch.where(no_rest_N1, 0.0, total_N1.log())
    offset_N1 = logits_NK.gather(1, target_N1) - peak_N1
    log_odds_N1 = torch.where(no_rest_N1, math.inf, offset_N1 / temperature - lse_N1)
    return _Rest(peak_N1, shifted_NK, weight_NK, total_N1, lse_N1, offset_N1, log_odds_N1)


def _binary_kl(teacher_odds: Tensor, student_odds: Tensor) -> Tensor:
    """KL of [p_T, 1 - p_T] from [p_S, 1 - p_S], from log-odds; a side without weight adds nothing."""
    yes, no = teacher_odds.sigmoid(), (-teacher_odds).sigmoid()
    on_yes = yes * (F.logsigmoid(teacher_odds) - F.logsigmoid(student_odds))
    on_no = no * (F.logsigmoid(-teacher_odds) - F.logsigmoid(-student_odds))
    kl = torch.where(yes == 0, 0.0, on_yes) + torch.where(no == 0, 0.0, on_no)
    return kl.clamp_min(0.0)


def _sigmoid_difference(a: Tensor, b: Tensor) -> Tensor:
    """sigmoid(a) - sigmoid(b) without cancellation."""
    high, low = torch.maximum(a, b), torch.minimum(a, b)
    size = -torch.expm1(low - high) * high.sigmoid() * (-low).sigmoid()
    return torch.where(a == b, 0.0, torch.where(a > b, size, -size))


def _rest_kl(teacher: _Rest, student: _Rest, temperature: float) -> Tensor:
    """KL over the classes but the target; +inf where the teacher gives one weight and the student masks it."""
    gap_NK = teacher.shifted_NK - student.shifted_NK
    masked_N1 = gap_NK.amax(1, keepdim=True) > -1e-8 * _MASKED / temperature
    # Taken from every difference, not from their sum: of nearly equal sides little is left.
    gap_NK.sub_(teacher.lse_N1 - student.lse_N1)
    kl_N1 = gap_NK.mul_(teacher.weight_NK).sum(1, keepdim=True) / teacher.total_N1
    kl_N1 = torch.where(teacher.log_odds_N1 == math.inf, 0.0, kl_N1.clamp_min(0.0))
    return torch.where(masked_N1, math.inf, kl_N1)


def entropy_gate_rows(logits_NK: Tensor) -> Tensor:
    """Return g = exp(-H / log K) of each row's softmax at temperature 1, in the logits' dtype, in [1/e, 1]."""
    shifted_NK = logits_NK - logits_NK.amax(1, keepdim=True)
    weight_NK = shifted_NK.exp()
    total_N = weight_NK.sum(1)
    moment_N = shifted_NK.clamp_min_(_MASKED).mul_(weight_NK).sum(1)  # 0 times a finite number is 0
    return _gate(total_N, moment_N, logits_NK.shape[1])


def _rest_gate(rest: _Rest, temperature: float) -> Tensor:
    """Return the gate, which is of all classes at temperature 1, from what there is of the rest at ``temperature``."""
    offset_N1 = rest.offset_N1
    weight_NK = rest.weight_NK * rest.weight_NK if temperature == 2 else (rest.shifted_NK * temperature).exp_()
    total_N1 = weight_NK.sum(1, keepdim=True)
    moment_N1 = temperature * weight_NK.mul_(rest.shifted_NK).sum(1, keepdim=True)
    up_N1 = torch.where(rest.log_odds_N1 == math.inf, offset_N1, offset_N1.clamp_min(0.0))  # the peak of all classes
    down_N1, target_N1 = torch.exp(-up_N1), torch.exp(offset_N1 - up_N1)
    of_target_N1 = torch.where(target_N1 == 0, 0.0, target_N1 * (offset_N1 - up_N1))
    of_rest_N1 = torch.where(total_N1 == 0, 0.0, (moment_N1 - up_N1 * total_N1) * down_N1)
    total_N1 = torch.where(total_N1 == 0, 0.0, total_N1 * down_N1) + target_N1
    return _gate(total_N1, of_rest_N1 + of_target_N1, rest.weight_NK.shape[1])[:, 0]


def _gate(total: Tensor, moment: Tensor, classes: int) -> Tensor:
    """Return g from the sum of exp(d) over the classes and that of d exp(d), d being logits relative to their peak."""
    log_classes = math.log(classes)
    entropy = (total.log() - moment / total).clamp(0.0, log_classes)
    return torch.exp(-entropy / log_classes)


def forward_rows(rows: Rows, parameters: DKDParameters, *, with_cross_entropy: bool) -> tuple[RowValues, RowStatistics]:
    """Return the values of a block of rows and what their gradient needs."""
    student_NV, teacher_NV, target_N, keep_N = rows
    dtype = compute_dtype(student_NV, teacher_NV)
    temperature, alpha, beta, gated, classes = parameters
    target_N1 = target_N[:, None]

    student = _rest(student_NV[:, :classes], target_N1, temperature, dtype)
    teacher = _rest(teacher_NV[:, :classes], target_N1, temperature, dtype)
    tckd_N1 = _binary_kl(teacher.log_odds_N1, student.log_odds_N1)
    nckd_N1 = _rest_kl(teacher, student, temperature)
    dkd_N1 = temperature**2 * (scaled(alpha, tckd_N1) + scaled(beta, nckd_N1))
    gate_N = _rest_gate(teacher, temperature) if gated else torch.ones_like(tckd_N1[:, 0])
    zeros_N1 = torch.zeros_like(tckd_N1)
    ce_peak_N1, ce_lse_N1, ce_odds_N1 = zeros_N1, zeros_N1, zeros_N1
    if with_cross_entropy:
        ce = _rest(student_NV, target_N1, 1.0, dtype)
        ce_peak_N1, ce_lse_N1, ce_odds_N1 = ce.peak_N1, ce.lse_N1, ce.log_odds_N1
    cross_entropy_N1 = -F.logsigmoid(ce_odds_N1) if with_cross_entropy else zeros_N1

    def kept(values_N: Tensor) -> Tensor:
        return torch.where(keep_N, values_N, 0.0)

    values = RowValues(kept(cross_entropy_N1[:, 0]), kept(dkd_N1[:, 0]), kept(gate_N))
    statistics = RowStatistics(
        student.peak_N1[:, 0],
        student.lse_N1[:, 0],
        teacher.peak_N1[:, 0],
        torch.where(teacher.log_odds_N1 == math.inf, math.inf, teacher.lse_N1)[:, 0],  # no rest, no NCKD
        _sigmoid_difference(student.log_odds_N1, teacher.log_odds_N1)[:, 0],
        ce_peak_N1[:, 0],
        ce_lse_N1[:, 0],
        ce_odds_N1[:, 0],
    )
    return values, statistics


def scaled(weight: Tensor | float, term: Tensor) -> Tensor:
    """weight * term, with 0 * inf = 0: a part that is switched off never spoils the other."""
    if isinstance(weight, Tensor):
        return torch.where(weight == 0, 0.0, weight * term)
    return weight * term if weight else torch.zeros_like(term)


def backward_rows(
    rows: Rows,
    statistics: RowStatistics,
    ce_grad_N: Tensor,
    dkd_grad_N: Tensor,
    parameters: DKDParameters,
    *,
    with_cross_entropy: bool,
) -> Tensor:
    """Return the gradient (N, V) of the student's logits, given those of the values, in the computing dtype.

    Rows that are not kept hold anything.
    """
    student_NV, teacher_NV, target_N, _ = rows
    temperature, alpha, beta, _, classes = parameters
    target_N1 = target_N[:, None]
    columns = RowStatistics(*(statistic[:, None] for statistic in statistics))
    gap_N1 = columns.target_gap_N
    beta_N1 = torch.where(columns.teacher_lse_N == math.inf, 0.0, beta)

    # What these hold at the target is overwritten at the end.
    hat_NK = _hat(student_NV[:, :classes], columns.student_peak_N, columns.student_lse_N, temperature)
    teacher_hat_NK = _hat(teacher_NV[:, :classes], columns.teacher_peak_N, columns.teacher_lse_N, temperature)
    scale_N1 = temperature * dkd_grad_N[:, None]
    dkd_NK = hat_NK.mul_(scale_N1 * (beta_N1 - alpha * gap_N1)).addcmul_(teacher_hat_NK, -scale_N1 * beta_N1)
    dkd_NK.scatter_(1, target_N1, scale_N1 * alpha * gap_N1)
    if with_cross_entropy:
        log_rest_N1 = columns.ce_lse_N - F.logsigmoid(-columns.ce_log_odds_N)
        gradient_NV = _hat(student_NV, columns.ce_peak_N, log_rest_N1, 1.0).mul_(ce_grad_N[:, None])
        gradient_NV.scatter_(1, target_N1, -ce_grad_N[:, None] * (-columns.ce_log_odds_N).sigmoid())
        gradient_NV[:, :classes] += dkd_NK
    elif classes < student_NV.shape[1]:
        gradient_NV = F.pad(dkd_NK, (0, student_NV.shape[1] - classes))
    else:
        gradient_NV = dkd_NK
    return gradient_NV


def _hat(logits_NK: Tensor, peak_N1: Tensor, lse_N1: Tensor, temperature: float) -> Tensor:
    """exp((logits - peak) / T - lse), a new tensor in the dtype of ``peak_N1``, which is that of the computation."""
    shifted_NK = logits_NK - peak_N1
    return torch.addcmul(-lse_N1, shifted_NK, torch.full_like(lse_N1, 1.0 / temperature)).exp_()
