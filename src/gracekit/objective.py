r"""The whole objective of GRACE (arXiv 2601.22709, section 3).

.. math:: \mathcal L = \mathcal L_\mathrm{CE} + \beta\,\mathcal L_\mathrm{GDKD} + \omega\,\mathcal L_\mathrm{RCKA}

Cross-entropy and distillation come from one pass over the logits; beta is the controller's multiplier, which only its
owner steps: ``controller.step(loss.gated_dkd, loss.gate_sum)`` once an optimiser step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from gracekit._checks import check_real
from gracekit._distributed import all_sum
from gracekit.control import LagrangianController
from gracekit.losses._image_batches import check_mask, checked_lengths
from gracekit.losses._inputs import divisor
from gracekit.losses._rows import scaled
from gracekit.losses._token_values import token_gates, token_values
from gracekit.losses.gated_dkd import ConfidenceGatedDKD
from gracekit.losses.linear_gated_dkd import DistillationLoss
from gracekit.losses.relational_cka import RelationalCKA

Part = TypeVar("Part", bound=nn.Module)


class GraceLoss(NamedTuple):
    """The objective and its parts. Only ``total`` has a gradient; the others are detached values.

    Attributes:
        total: cross_entropy + multiplier * gated_dkd + relational_weight * relational.
        cross_entropy: mean over the supervised tokens.
        gated_dkd: gate-weighted mean over the supervised tokens.
        relational: mean of 1 - CKA over the images; 0 without tokens.
        multiplier: beta that this total was made with, a copy.
        gate_sum: sum of the gates of this call: what its ``gated_dkd`` weighs.
    """

    total: Tensor
    cross_entropy: Tensor
    gated_dkd: Tensor
    relational: Tensor
    multiplier: Tensor
    gate_sum: Tensor


class GraceObjective(nn.Module):
    """Cross-entropy + beta * gated distillation + omega * relational alignment.

    Args:
        distillation: a :class:`~gracekit.ConfidenceGatedDKD` with ``reduction="mean"``; None: one with its defaults.
        relational: a :class:`~gracekit.RelationalCKA`; None: one with its defaults.
        controller: a :class:`~gracekit.LagrangianController`, whose multiplier is beta; None: one with its defaults.
        relational_weight: omega, at least 0.

    Raises:
        TypeError: a part of another type.
        ValueError: an option out of range.

    Example:
        >>> objective = GraceObjective(relational_weight=3.0)
        >>> student, teacher = torch.randn(6, 40, requires_grad=True), torch.randn(6, 40)
        >>> visual = {"student_tokens": torch.randn(9, 8), "teacher_tokens": torch.randn(9, 16), "lengths": [4, 5]}
        >>> loss = objective(student, teacher, torch.tensor([1, 2, 3, -100, 5, 6]), **visual)
        >>> loss.total.backward()
        >>> beta = objective.controller.step(loss.gated_dkd, loss.gate_sum)
    """

    def __init__(
        self,
        distillation: ConfidenceGatedDKD | None = None,
        relational: RelationalCKA | None = None,
        controller: LagrangianController | None = None,
        *,
        relational_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.distillation = _part("distillation", distillation, ConfidenceGatedDKD)
        self.relational = _part("relational", relational, RelationalCKA)
        self.controller = _part("controller", controller, LagrangianController)
        self.relational_weight = check_real("relational_weight", relational_weight, low=0.0)
        if self.distillation.reduction != "mean":
            raise ValueError(f"distillation must have reduction='mean', got {self.distillation.reduction!r}")

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        *,
        student_tokens: Tensor | None = None,
        teacher_tokens: Tensor | None = None,
        lengths: Sequence[int] | Tensor | None = None,
        mask: Tensor | None = None,
        gate_sum: Tensor | float | None = None,
        token_count: Tensor | float | None = None,
        image_count: Tensor | float | None = None,
    ) -> GraceLoss:
        """Return the objective of one batch, or this call's part of a larger one.

        Args:
            student_logits: (..., V_S); ``logits[i]`` predicts ``labels[i]`` (:func:`~gracekit.shift_labels`).
            teacher_logits: (..., V_T).
            labels: (...).
            student_tokens: visual tokens, shapes as in :class:`~gracekit.RelationalCKA`; None with ``teacher_tokens``
                None leaves the relational part out.
            teacher_tokens: the teacher's.
            lengths: tokens of each packed image.
            mask: (B, n) bool of a padded batch.
            gate_sum: of the global batch, where this call sees a part of it.
            token_count: supervised tokens of the global batch.
            image_count: images of the global batch.

        Returns:
            A :class:`GraceLoss`; its ``total`` has gradients for the student's logits and tokens.

        Raises:
            TypeError: wrong dtype.
            ValueError: tokens of one side only, lengths or a mask without tokens, or what the parts refuse.
        """
        if (student_tokens is None) != (teacher_tokens is None):
            missing = "student_tokens" if student_tokens is None else "teacher_tokens"
            raise ValueError(f"student_tokens and teacher_tokens must be given together, got {missing}=None")
        if student_tokens is None and (lengths is not None or mask is not None):
            raise ValueError("lengths and mask describe student_tokens and teacher_tokens, got neither of these")
        multiplier = self.controller.multiplier.clone()
        config = self.distillation.config
        values = token_values(
            student_logits, teacher_logits, labels, config, with_cross_entropy=True, backend=self.distillation.backend
        )
        tokens = (labels.long() != config.ignore_index).sum()
        gates = values.gate_N.sum()
        cross_entropy = values.cross_entropy_N.sum() / divisor("token_count", token_count, tokens)
        gated = (values.gate_N * values.dkd_N).sum() / divisor("gate_sum", gate_sum, gates)
        total = cross_entropy + scaled(multiplier, gated)
        distillation = DistillationLoss(total, cross_entropy.detach(), gated.detach(), gates, tokens)
        relational = None
        if student_tokens is not None:
            relational = self.relational(student_tokens, teacher_tokens, lengths, mask, image_count)
        return self._assemble(distillation, relational, multiplier)

    def global_counts(
        self,
        teacher_logits: Tensor,
        labels: Tensor,
        lengths: Sequence[int] | Tensor | None = None,
        *,
        mask: Tensor | None = None,
        reduce: bool = True,
    ) -> dict[str, Tensor]:
        """Return what :meth:`forward` divides by, summed over all ranks with one all-reduce.

        Add the results of the micro-batches of an optimiser step and hand the sum to each call of :meth:`forward`: the
        totals of all micro-batches and ranks then add up to the objective of the whole batch. (DDP and FSDP average
        gradients over ranks: multiply each total by the number of ranks.) An image whose tokens turn out to be collapsed is in
        the count, which is made before the student has seen it; in one big batch it would be left out.

        Args:
            teacher_logits: (..., V_T) of this rank and micro-batch.
            labels: (...).
            lengths: tokens of each image, packed; an empty list where this micro-batch has none.
            mask: (B, n) bool of a padded batch of images, in place of lengths.
            reduce: False: the counts of this rank alone, for one all-reduce of the sum of all its micro-batches.

        Returns:
            ``gate_sum``, ``token_count`` and, where lengths or a mask were given, ``image_count``: 0-d tensors without gradient.

        Raises:
            TypeError: wrong dtype.
            ValueError: shapes that do not fit, or lengths and a mask.

        Example:
            >>> objective = GraceObjective()
            >>> teacher, labels = torch.randn(4, 30), torch.tensor([1, -100, 3, 4])
            >>> counts = objective.global_counts(teacher, labels, lengths=[5, 6])
            >>> counts["token_count"].item(), counts["image_count"].item()
            (3.0, 2.0)
        """
        config = self.distillation.config
        gates = token_gates(teacher_logits, labels, config).sum(dtype=torch.float64)
        tokens = (labels.long() != config.ignore_index).sum().double()
        total = torch.stack((gates, tokens, self._images(lengths, mask, gates)))
        if reduce:
            total = all_sum(total)
        counts = dict(zip(("gate_sum", "token_count", "image_count"), total.float(), strict=True))
        if lengths is None and mask is None:
            del counts["image_count"]  # how many images there are was not said
        return counts

    def _images(self, lengths: Sequence[int] | Tensor | None, mask: Tensor | None, like: Tensor) -> Tensor:
        """Images of at least min_tokens tokens, as a number where and what ``like`` is."""
        if lengths is not None and mask is not None:
            raise ValueError("lengths and mask describe images in two ways, got both")
        least = self.relational.min_tokens
        if mask is not None:
            check_mask(mask)
            return (mask.sum(1) >= least).sum().to(like)
        counts = () if lengths is None else checked_lengths(lengths)
        return torch.full_like(like, sum(count >= least for count in counts))

    def combine(self, distillation: DistillationLoss, relational: Tensor | None = None) -> GraceLoss:
        """Return the objective from losses computed elsewhere.

        Args:
            distillation: from :func:`~gracekit.linear_gated_dkd` with ``dkd_weight=controller.multiplier``.
            relational: a :class:`~gracekit.RelationalCKA` loss, or None.

        Returns:
            A :class:`GraceLoss`.

        Example:
            >>> objective, head = GraceObjective(), LinearGatedDKD()
            >>> parts = head(
            ...     torch.randn(3, 8), torch.randn(20, 8), torch.randn(3, 4), torch.randn(20, 4), torch.tensor([1, 2, 3]),
            ...     dkd_weight=objective.controller.multiplier,
            ... )
            >>> bool(objective.combine(parts).total == parts.total)
            True
        """
        return self._assemble(distillation, relational, self.controller.multiplier.clone())

    def _assemble(self, distillation: DistillationLoss, relational: Tensor | None, multiplier: Tensor) -> GraceLoss:
        total = distillation.total
        if relational is None:
            relational = distillation.cross_entropy.new_zeros(())
        else:
            total = total + self.relational_weight * relational
        return GraceLoss(
            total,
            distillation.cross_entropy,
            distillation.gated_dkd,
            relational.detach(),
            multiplier,
            distillation.gate_sum,
        )

    def extra_repr(self) -> str:
        """Return what the parts do not show."""
        return f"relational_weight={self.relational_weight}"


def _part(name: str, given: Part | None, kind: type[Part]) -> Part:
    if given is None:
        return kind()
    if not isinstance(given, kind):
        raise TypeError(f"{name} must be a {kind.__name__} or None, got {type(given).__name__}")
    return given
