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


def _without_target(logits_NV: Tensor, target_N1: Tensor) -> Tensor:
    return logits_NV.scatter(1, target_N1, -math.inf)


def _peak(rest_NV: Tensor) -> Tensor:
    peak_N1 = rest_NV.amax(1, keepdim=True)
    return torch.where(peak_N1 == -math.inf, 0.0, peak_N1)


def _log_odds(
    logits_NV: Tensor, rest_NV: Tensor, peak_N1: Tensor, target_N1: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of the rest relative to its peak (0 where all of it is masked) and log-odds of the target."""
    total_N1 = ((rest_NV - peak_N1) / temperature).exp_().sum(1, keepdim=True)
    no_rest_N1 = total_N1 == 0
    lse_N1 = torch.where(no_rest_N1, 0.0, total_N1.log())
    log_odds_N1 = (logits_NV.gather(1, target_N1) - peak_N1) / temperature - lse_N1
    return lse_N1, torch.where(no_rest_N1, math.inf, log_odds_N1)


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


def _rest_kl(teacher_NK: Tensor, student_NK: Tensor) -> Tensor:
    """KL between log-probabilities; +inf for a class that the teacher gives weight and the student masks."""
    terms_NK = teacher_NK.exp() * (teacher_NK - student_NK)
    terms_NK = torch.where(teacher_NK == -math.inf, 0.0, terms_NK)
    masked_NK = (student_NK == -math.inf) & (teacher_NK != -math.inf)
    return torch.where(masked_NK, math.inf, terms_NK).sum(1, keepdim=True).clamp_min(0.0)


def entropy_gate_rows(logits_NK: Tensor) -> Tensor:
    """Return g = exp(-H / log K) of each row's softmax at temperature 1, in the logits' dtype, in [1/e, 1]."""
    shifted_NK = logits_NK - logits_NK.amax(1, keepdim=True)
    weight_NK = shifted_NK.exp()
    total_N = weight_NK.sum(1)
    moment_N = torch.where(weight_NK == 0, 0.0, weight_NK * shifted_NK).sum(1)
    log_classes = math.log(logits_NK.shape[1])
    entropy_N = (total_N.log() - moment_N / total_N).clamp(0.0, log_classes)
    return torch.exp(-entropy_N / log_classes)


def forward_rows(rows: Rows, parameters: DKDParameters, *, with_cross_entropy: bool) -> tuple[RowValues, RowStatistics]:
    """Return the values of a block of rows and what their gradient needs."""
    student_NV, teacher_NV, target_N, keep_N = rows
    dtype = compute_dtype(student_NV, teacher_NV)
    temperature, alpha, beta, gated, classes = parameters
    target_N1 = target_N[:, None]

    full_NV = student_NV.to(dtype)
    rest_NV = _without_target(full_NV, target_N1)
    if with_cross_entropy:
        ce_peak_N1 = _peak(rest_NV)
        ce_lse_N1, ce_odds_N1 = _log_odds(full_NV, rest_NV, ce_peak_N1, target_N1, 1.0)
        cross_entropy_N1 = -F.logsigmoid(ce_odds_N1)
    else:
        cross_entropy_N1 = ce_peak_N1 = ce_lse_N1 = ce_odds_N1 = full_NV.new_zeros(len(full_NV), 1)

    student_NK, rest_student_NK = full_NV[:, :classes], rest_NV[:, :classes]
    student_peak_N1 = _peak(rest_student_NK)
    student_lse_N1, student_odds_N1 = _log_odds(student_NK, rest_student_NK, student_peak_N1, target_N1, temperature)

    teacher_NK = teacher_NV[:, :classes].to(dtype)
    rest_teacher_NK = _without_target(teacher_NK, target_N1)
    teacher_peak_N1 = _peak(rest_teacher_NK)
    teacher_lse_N1, teacher_odds_N1 = _log_odds(teacher_NK, rest_teacher_NK, teacher_peak_N1, target_N1, temperature)

    tckd_N1 = _binary_kl(teacher_odds_N1, student_odds_N1)
    nckd_N1 = _rest_kl(
        (rest_teacher_NK - teacher_peak_N1) / temperature - teacher_lse_N1,
        (rest_student_NK - student_peak_N1) / temperature - student_lse_N1,
    )
    dkd_N1 = temperature**2 * (scaled(alpha, tckd_N1) + scaled(beta, nckd_N1))
    gate_N = entropy_gate_rows(teacher_NK) if gated else torch.ones_like(tckd_N1[:, 0])

    def kept(values_N: Tensor) -> Tensor:
        return torch.where(keep_N, values_N, 0.0)

    values = RowValues(kept(cross_entropy_N1[:, 0]), kept(dkd_N1[:, 0]), kept(gate_N))
    statistics = RowStatistics(
        student_peak_N1[:, 0],
        student_lse_N1[:, 0],
        teacher_peak_N1[:, 0],
        torch.where(teacher_odds_N1 == math.inf, math.inf, teacher_lse_N1)[:, 0],  # no rest, no NCKD
        _sigmoid_difference(student_odds_N1, teacher_odds_N1)[:, 0],
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
    """Return the gradient (N, V) of the student's logits, given those of the values, in the computing dtype."""
    student_NV, teacher_NV, target_N, keep_N = rows
    dtype = compute_dtype(student_NV, teacher_NV)
    temperature, alpha, beta, _, classes = parameters
    target_N1 = target_N[:, None]
    columns = RowStatistics(*(statistic[:, None] for statistic in statistics))
    gap_N1 = columns.target_gap_N
    beta_N1 = torch.where(columns.teacher_lse_N == math.inf, 0.0, beta)

    rest_NV = _without_target(student_NV.to(dtype), target_N1)
    student_hat_NK = (
        (rest_NV[:, :classes] - columns.student_peak_N).div_(temperature).sub_(columns.student_lse_N).exp_()
    )
    rest_teacher_NK = _without_target(teacher_NV[:, :classes].to(dtype), target_N1)
    teacher_hat_NK = (rest_teacher_NK - columns.teacher_peak_N).div_(temperature).sub_(columns.teacher_lse_N).exp_()
    scale_N1 = temperature * dkd_grad_N[:, None]
    dkd_NK = (scale_N1 * (beta_N1 - alpha * gap_N1)) * student_hat_NK - (scale_N1 * beta_N1) * teacher_hat_NK
    dkd_NK = dkd_NK.scatter(1, target_N1, scale_N1 * alpha * gap_N1)
    if with_cross_entropy:
        log_rest_N1 = columns.ce_lse_N - F.logsigmoid(-columns.ce_log_odds_N)
        gradient_NV = ce_grad_N[:, None] * (rest_NV - columns.ce_peak_N).sub_(log_rest_N1).exp_()
        gradient_NV = gradient_NV.scatter(1, target_N1, -ce_grad_N[:, None] * (-columns.ce_log_odds_N).sigmoid())
        gradient_NV[:, :classes] += dkd_NK
    else:
        gradient_NV = F.pad(dkd_NK, (0, student_NV.shape[1] - classes))
    return torch.where(keep_N[:, None], gradient_NV, 0.0)
