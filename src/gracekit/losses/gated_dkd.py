r"""Confidence-gated decoupled distillation (GRACE, arXiv 2601.22709, section 3; DKD: Zhao et al., CVPR 2022).

With target :math:`y`, temperature :math:`T`, teacher :math:`p_T` and student :math:`p_S`, per supervised token

.. math::
    \mathcal L_i = T^2 \big(\alpha\, \mathrm{KL}([p_T^y, 1 - p_T^y] \,\|\, [p_S^y, 1 - p_S^y])
                 + \beta\, \mathrm{KL}(\hat p_T \,\|\, \hat p_S)\big), \qquad
    \mathcal L = \frac{\sum_i g_i \mathcal L_i}{\sum_i g_i}, \qquad g_i = e^{-H_i / \log V},

where the hats are renormalised without :math:`y` and :math:`H_i` is the entropy of the teacher at temperature 1. The gradient has a
closed form, so nothing of the logits' size is kept beside the logits: forward and backward each go over blocks of rows.
"""

# B batch, N tokens, V vocabulary

from __future__ import annotations

from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gracekit._checks import check_choice, check_int, check_integral
from gracekit.losses._inputs import DKDConfig, check_backend, divisor
from gracekit.losses._token_values import token_gates, token_values

REDUCTIONS = ("mean", "sum", "none")


def shift_labels(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Align the labels of a causal language model with its logits, without copying the logits.

    ``logits[..., t, :]`` predicts the token at ``t + 1``: every label moves one to the left, the last position is ignored.

    Args:
        labels: integers (..., S).
        ignore_index: what fills the last position.

    Returns:
        A new tensor (..., S) of the same dtype.

    Raises:
        TypeError: ``labels`` is no integer tensor.
        ValueError: ``labels`` has no dimension, or its dtype cannot hold ``ignore_index``.

    Example:
        >>> shift_labels(torch.tensor([[5, 6, 7]]))
        tensor([[   6,    7, -100]])
    """
    check_integral("labels", labels)
    numbers = torch.iinfo(labels.dtype)
    check_int("ignore_index", ignore_index, low=numbers.min, high=numbers.max)
    if labels.ndim == 0:
        raise ValueError("labels must have shape (..., S), got ()")
    return F.pad(labels[..., 1:], (0, 1 if labels.shape[-1] else 0), value=ignore_index)


def entropy_gate(
    teacher_logits: Tensor, labels: Tensor, *, ignore_index: int = -100, vocab_size: int | None = None
) -> Tensor:
    """Return the confidence gate g = exp(-H / log V) of every token, 0 where ignored.

    H is the entropy of the teacher's softmax at temperature 1 (GRACE, section 3.1). Sum it over the micro-batches and
    ranks of one optimiser step to get the ``gate_sum`` of :func:`gated_dkd`.

    Args:
        teacher_logits: (..., V), any floating dtype.
        labels: (...), aligned with the logits.
        ignore_index: label of the tokens that are not supervised.
        vocab_size: compare the first ``vocab_size`` classes only.

    Returns:
        (...), at least float32, in [1/e, 1] or 0; without gradient.

    Raises:
        TypeError: wrong dtype.
        ValueError: shapes that do not fit, fewer than two classes, a label out of range.

    Example:
        >>> entropy_gate(torch.zeros(2, 8), torch.tensor([3, -100])).numpy().round(4)
        array([0.3679, 0.    ], dtype=float32)
    """
    return token_gates(teacher_logits, labels, DKDConfig(ignore_index=ignore_index, vocab_size=vocab_size))


def gated_dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 2.0,
    alpha: float = 1.0,
    beta: float = 4.0,
    gate: str | None = "entropy",
    ignore_index: int = -100,
    reduction: str = "mean",
    gate_sum: Tensor | float | None = None,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Confidence-gated decoupled distillation loss.

    .. math:: \sum_i g_i T^2 (\alpha\,\mathrm{TCKD}_i + \beta\,\mathrm{NCKD}_i) \,/\, \sum_i g_i

    (GRACE, arXiv 2601.22709, section 3.1). ``logits[i]`` predicts ``labels[i]``: see :func:`shift_labels`.

    Args:
        student_logits: (..., V), any floating dtype; the gradient has this dtype.
        teacher_logits: (..., V); no gradient reaches it.
        labels: (...), integers in [0, V) or ``ignore_index``.
        temperature: T of both softmaxes, in [1e-4, 1e3]; the value's rounding error in float32 grows as T^2, the gradient's as T.
        alpha: weight of the target-class part, at least 0.
        beta: weight of the part over the other classes, at least 0.
        gate: ``"entropy"``, or None for plain DKD (every gate is 1).
        ignore_index: label of the tokens that are not supervised.
        reduction: ``"mean"`` (sum g L / sum g), ``"sum"`` (sum g L) or ``"none"`` (L per token, 0 where ignored).
        gate_sum: with ``"mean"``, the sum of gates of the whole global batch where this call sees only a part of it; the
            results of the parts then add up to the loss.
        vocab_size: compare the first ``vocab_size`` classes only (padded vocabularies of one tokenizer).
        backend: ``"torch"``: the formula, a block of rows at a time; ``"triton"``: kernels that read the logits once each way,
            for CUDA tensors below float64; ``"auto"``: the kernels where they can be had, outside torch.compile.

    Returns:
        A scalar, or (...) with ``reduction="none"``; at least float32. 0, attached to the graph, if no token is
        supervised. +inf where the student masks (-inf, or 1e22 below its greatest logit) a class that the teacher gives
        weight; a class that both mask drops out.

    Raises:
        TypeError: wrong dtype.
        ValueError: shapes that do not fit, V that differs without ``vocab_size``, a label out of range or masked (on CUDA
            an asynchronous assertion), an option out of range.
        RuntimeError: when differentiated twice.

    Example:
        >>> student = torch.zeros(3, 10, requires_grad=True)
        >>> teacher = torch.eye(3, 10) * 5
        >>> loss = gated_dkd(student, teacher, torch.tensor([0, 1, -100]))
        >>> loss.backward()
        >>> round(loss.item(), 4), student.grad[2].abs().sum().item()
        (2.7488, 0.0)
    """
    config = DKDConfig(
        temperature=temperature, alpha=alpha, beta=beta, gate=gate, ignore_index=ignore_index, vocab_size=vocab_size
    )
    check_backend(backend)
    check_choice("reduction", reduction, REDUCTIONS)
    if gate_sum is not None and reduction != "mean":
        raise ValueError(f"gate_sum divides a mean and needs reduction='mean', got reduction={reduction!r}")
    values = token_values(student_logits, teacher_logits, labels, config, with_cross_entropy=False, backend=backend)
    if reduction == "none":
        return values.dkd_N.reshape(labels.shape)
    weighted = (values.gate_N * values.dkd_N).sum()
    if reduction == "sum":
        return weighted
    return weighted / divisor("gate_sum", gate_sum, values.gate_N.sum())


class ConfidenceGatedDKD(nn.Module):
    """Confidence-gated decoupled distillation as a module: :func:`gated_dkd` with its options stored.

    Args:
        temperature: T of both softmaxes, in [1e-4, 1e3]; the value's rounding error in float32 grows as T^2, the gradient's as T.
        alpha: weight of the target-class part, at least 0.
        beta: weight of the part over the other classes, at least 0.
        gate: ``"entropy"``, or None for plain DKD.
        ignore_index: label of the tokens that are not supervised.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        vocab_size: compare the first ``vocab_size`` classes only.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Raises:
        TypeError: an option of the wrong type.
        ValueError: an option out of range.

    Example:
        >>> criterion = ConfidenceGatedDKD(temperature=1.0)
        >>> logits = torch.randn(4, 10)
        >>> criterion(logits, logits + 3.0, torch.tensor([1, 2, 3, -100])).item() < 1e-5
        True
    """

    def __init__(
        self,
        temperature: float = 2.0,
        alpha: float = 1.0,
        beta: float = 4.0,
        *,
        gate: str | None = "entropy",
        ignore_index: int = -100,
        reduction: str = "mean",
        vocab_size: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.config = DKDConfig(
            temperature=temperature, alpha=alpha, beta=beta, gate=gate, ignore_index=ignore_index, vocab_size=vocab_size
        )
        check_backend(backend)
        self.backend = backend
        check_choice("reduction", reduction, REDUCTIONS)
        self.reduction = reduction

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, gate_sum: Tensor | float | None = None
    ) -> Tensor:
        """Return the loss; shapes, ``gate_sum`` and errors as in :func:`gated_dkd`."""
        return gated_dkd(
            student_logits,
            teacher_logits,
            labels,
            **asdict(self.config),
            reduction=self.reduction,
            backend=self.backend,
            gate_sum=gate_sum,
        )

    def extra_repr(self) -> str:
        """Return the constructor's arguments."""
        return f"{self.config.describe()}, reduction={self.reduction!r}, backend={self.backend!r}"
