r"""Cross-entropy and gated distillation from hidden states and output heads, with no logits kept.

.. math:: w_\mathrm{CE}\,\mathcal L_\mathrm{CE} + w_\mathrm{DKD}\,\mathcal L_\mathrm{GDKD},
          \qquad z_S = h_S W_S^\top, \quad z_T = h_T W_T^\top

At V = 150k the logits of one batch outweigh the model. The forward multiplies a slab of tokens, computes the losses and the
gradient of its logits, multiplies that into the gradients of hidden states and head, and drops it: four products in all, the
fewest there are, in memory that does not grow with the number of tokens. The gradient needs the sum of gates first. Where it is
not given, the teacher's logits are multiplied for it alone; those of the last slab are kept, so one slab multiplies nothing twice.
"""

# N tokens, V vocabulary, d hidden size, D columns of a weight

from __future__ import annotations

from dataclasses import asdict
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gracekit._autograd import autocasts
from gracekit._checks import (
    check_floating,
    check_integral,
    check_not_negative,
    check_rank,
    check_real,
    check_same_device,
)
from gracekit.losses._inputs import DKDConfig, compared_classes, supervised_targets, use_triton
from gracekit.losses._linear_distillation import LinearDistillation


class DistillationLoss(NamedTuple):
    """Both losses of one call. Only ``total`` has a gradient; the others are detached values.

    Attributes:
        total: ce_weight * cross_entropy + dkd_weight * gated_dkd, a scalar.
        cross_entropy: mean over the supervised tokens (divided by ``token_count`` where that is given).
        gated_dkd: gate-weighted mean (divided by ``gate_sum`` where that is given).
        gate_sum: sum of the gates of this call.
        token_count: supervised tokens of this call.
    """

    total: Tensor
    cross_entropy: Tensor
    gated_dkd: Tensor
    gate_sum: Tensor
    token_count: Tensor


def _weight(name: str, weight: Tensor | float) -> Tensor | float:
    if not isinstance(weight, Tensor):
        return check_real(name, weight, low=0.0)
    if weight.numel() != 1:
        raise ValueError(f"{name} must be a number or hold one element, got shape {tuple(weight.shape)}")
    weight = weight.detach().reshape(())
    check_not_negative(name, weight)
    return weight


def linear_gated_dkd(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    *,
    temperature: float = 2.0,
    alpha: float = 1.0,
    beta: float = 4.0,
    gate: str | None = "entropy",
    ignore_index: int = -100,
    gate_sum: Tensor | float | None = None,
    vocab_size: int | None = None,
    token_count: Tensor | float | None = None,
    ce_weight: Tensor | float = 1.0,
    dkd_weight: Tensor | float = 1.0,
) -> DistillationLoss:
    """Cross-entropy and :func:`gated_dkd` of ``hidden @ weight.T`` in one set of products, keeping no logits.

    The cross-entropy is over all of the student's classes, as the model's own; ``vocab_size`` restricts the distillation.
    Under autocast the products run in autocast's dtype, as ``nn.Linear`` would run them. (GRACE, arXiv 2601.22709, section 3.1.)

    Args:
        student_hidden: (..., d_S), input of the student's output head.
        student_weight: (V_S, d_S), its weight; a frozen one costs no gradient.
        teacher_hidden: (..., d_T); no gradient reaches the teacher.
        teacher_weight: (V_T, d_T).
        labels: (...), integers in [0, V) or ``ignore_index``, aligned with the hidden states.
        temperature: T of both softmaxes, in [1e-4, 1e3]; the value's rounding error in float32 grows as T^2, the gradient's as T.
        alpha: weight of the target-class part, at least 0.
        beta: weight of the part over the other classes, at least 0.
        gate: ``"entropy"``, or None for plain DKD.
        ignore_index: label of the tokens that are not supervised.
        gate_sum: sum of gates of the whole global batch where this call sees only a part of it.
        vocab_size: compare the first ``vocab_size`` classes only.
        token_count: supervised tokens of the whole global batch; to the cross-entropy what ``gate_sum`` is to the
            distillation.
        ce_weight: weight of the cross-entropy in ``total``, at least 0.
        dkd_weight: weight of the distillation in ``total``, at least 0; may be a controller's 0-d multiplier.

    Returns:
        A :class:`DistillationLoss`; its ``total`` has gradients for ``student_hidden`` and ``student_weight``.

    Raises:
        TypeError: wrong dtype.
        ValueError: shapes that do not fit, a label or an option out of range.
        RuntimeError: when differentiated twice.

    Example:
        >>> hidden, head = torch.randn(6, 16, requires_grad=True), torch.randn(50, 16)
        >>> teacher_hidden, teacher_head = torch.randn(6, 32), torch.randn(50, 32)
        >>> labels = torch.tensor([3, 7, -100, 1, 49, 0])
        >>> loss = linear_gated_dkd(hidden, head, teacher_hidden, teacher_head, labels)
        >>> loss.total.backward()
        >>> loss.token_count.item(), tuple(hidden.grad.shape)
        (5.0, (6, 16))
    """
    config = DKDConfig(
        temperature=temperature, alpha=alpha, beta=beta, gate=gate, ignore_index=ignore_index, vocab_size=vocab_size
    )
    _check_heads(student_hidden, student_weight, teacher_hidden, teacher_weight, labels)
    classes = compared_classes(
        student_weight=student_weight.T, teacher_weight=teacher_weight.T, vocab_size=config.vocab_size
    )
    keep_N, target_N = supervised_targets(labels, config.ignore_index, classes)
    heads = (
        student_hidden.reshape(-1, student_hidden.shape[-1]),
        student_weight,
        teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]),
        teacher_weight.detach(),
    )
    if autocasts(student_hidden):
        dtype = torch.get_autocast_dtype(student_hidden.device.type)
        heads = (heads[0].to(dtype), heads[1].to(dtype), heads[2].to(dtype), heads[3].to(dtype))
    losses = LinearDistillation.apply(  # type: ignore[no-untyped-call]
        *heads,
        target_N,
        keep_N,
        _weight("ce_weight", ce_weight),
        _weight("dkd_weight", dkd_weight),
        token_count,
        gate_sum,
        config.for_classes(classes),
        use_triton("auto", *heads),
    )
    return DistillationLoss(*losses)


class LinearGatedDKD(nn.Module):
    """:func:`linear_gated_dkd` as a module, with its options stored.

    Args:
        temperature: T of both softmaxes, in [1e-4, 1e3]; the value's rounding error in float32 grows as T^2, the gradient's as T.
        alpha: weight of the target-class part, at least 0.
        beta: weight of the part over the other classes, at least 0.
        gate: ``"entropy"``, or None for plain DKD.
        ignore_index: label of the tokens that are not supervised.
        vocab_size: compare the first ``vocab_size`` classes only.

    Raises:
        TypeError: an option of the wrong type.
        ValueError: an option out of range.

    Example:
        >>> criterion = LinearGatedDKD(vocab_size=40)
        >>> loss = criterion(torch.randn(2, 8), torch.randn(40, 8), torch.randn(2, 4), torch.randn(48, 4), torch.tensor([3, 39]))
        >>> bool(loss.total > 0)
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
        vocab_size: int | None = None,
    ) -> None:
        super().__init__()
        self.config = DKDConfig(
            temperature=temperature, alpha=alpha, beta=beta, gate=gate, ignore_index=ignore_index, vocab_size=vocab_size
        )

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        labels: Tensor,
        *,
        gate_sum: Tensor | float | None = None,
        token_count: Tensor | float | None = None,
        ce_weight: Tensor | float = 1.0,
        dkd_weight: Tensor | float = 1.0,
    ) -> DistillationLoss:
        """Return the losses; arguments and errors as in :func:`linear_gated_dkd`."""
        return linear_gated_dkd(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            labels,
            **asdict(self.config),
            gate_sum=gate_sum,
            token_count=token_count,
            ce_weight=ce_weight,
            dkd_weight=dkd_weight,
        )

    def extra_repr(self) -> str:
        """Return the constructor's arguments."""
        return self.config.describe()


def _check_heads(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor
) -> None:
    check_integral("labels", labels)
    sides = {"student": (student_hidden, student_weight), "teacher": (teacher_hidden, teacher_weight)}
    for side, (hidden, weight) in sides.items():
        check_floating(f"{side}_hidden", hidden)
        check_floating(f"{side}_weight", weight)
        check_rank(f"{side}_weight", weight, (2,), "(V, d)")
        if hidden.shape[:-1] != labels.shape or hidden.ndim == 0:
            raise ValueError(
                f"{side}_hidden must have shape (*labels.shape, d), got {tuple(hidden.shape)} "
                f"and labels {tuple(labels.shape)}"
            )
        if hidden.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"{side}_weight must have as many columns as {side}_hidden, got {tuple(weight.shape)} "
                f"and {tuple(hidden.shape)}"
            )
        if hidden.dtype != weight.dtype and not autocasts(hidden):
            raise TypeError(
                f"{side}_weight must have the dtype of {side}_hidden outside autocast, got {weight.dtype} and {hidden.dtype}"
            )
    check_same_device(
        student_hidden=student_hidden,
        student_weight=student_weight,
        teacher_hidden=teacher_hidden,
        teacher_weight=teacher_weight,
        labels=labels,
    )
