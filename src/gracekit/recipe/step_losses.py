"""A student's losses against what its teacher said, as parts of an optimiser step of many micro-batches and ranks."""

# T supervised tokens, V vocabulary, d hidden size

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gracekit._distributed import all_sum
from gracekit.losses import linear_gated_dkd
from gracekit.objective import GraceObjective
from gracekit.recipe.distillation import SLAB_ELEMENTS, Output, TeacherSignal


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one micro-batch needs of its optimiser step: its teacher's signal and what its sums are divided by."""

    signal: TeacherSignal | None
    counts: dict[str, Tensor]


def counts_of(signal: TeacherSignal | None, targets: Tensor, objective: GraceObjective) -> Tensor:
    """Return the sum of gates, the supervised tokens and the images that count, of one micro-batch; float64 (3,)."""
    gates = signal.gate_sum(targets, objective) if signal is not None else torch.zeros((), device=targets.device)
    lengths = (signal.lengths if signal is not None else None) or ()
    images = sum(length >= objective.relational.min_tokens for length in lengths)
    return torch.stack([gates.double(), gates.new_full((), len(targets)).double(), gates.new_full((), images).double()])


def global_counts(parts: list[Tensor]) -> dict[str, Tensor]:
    """Return the divisors of an optimiser step: the counts of its micro-batches, summed over all ranks at once."""
    total = all_sum(torch.stack(parts).sum(0)).float()
    return dict(zip(("gate_sum", "token_count", "image_count"), total, strict=True))


class Losses(NamedTuple):
    """``total`` has the gradient; ``parts`` are detached values by name, ``gate_sum`` this call's own."""

    total: Tensor
    parts: dict[str, Tensor]
    gate_sum: Tensor | None


def losses_of(
    kind: str,
    student: Output,
    head: Tensor | None,
    targets: Tensor,
    share: Share,
    objective: GraceObjective,
) -> Losses:
    """Return the losses of a micro-batch.

    Args:
        kind: "ce", "kl", "gdkd", "rcka" or "grace".
        student: its side.
        head: its output head's weight, beside hidden states.
        targets: (T,) classes.
        share: the teacher's side, and divisors; no divisors: the micro-batch is the whole batch.
        objective: weights, gate and controller.
    """
    counts, signal = share.counts, share.signal
    gates = None
    if kind in ("gdkd", "grace"):
        assert signal is not None
        total, parts, gates = _gated(student, head, targets, signal, counts, objective)
    else:
        tokens = counts.get("token_count", len(targets)) or 1
        temperature = objective.distillation.config.temperature
        cross_entropy, divergence = _plain(student, head, targets, signal if kind == "kl" else None, temperature)
        total, parts = cross_entropy / tokens, {"ce": cross_entropy.detach() / tokens}
        if kind == "kl":
            total, parts["kl"] = total + divergence / tokens, divergence.detach() / tokens
    if kind in ("rcka", "grace"):
        assert signal is not None
        assert student.tokens is not None
        if signal.lengths is not None and signal.lengths != student.lengths:
            raise ValueError(
                "student and teacher must have as many visual tokens for each image, got "
                f"{student.lengths} and {signal.lengths}"
            )
        relational = objective.relational(
            student.tokens, signal.tokens, student.lengths, image_count=counts.get("image_count")
        )
        total, parts["rcka"] = total + objective.relational_weight * relational, relational.detach()
    return Losses(total, parts, gates)


def weighted(losses: Losses, weight: Tensor | float) -> Losses:
    """Return losses times a weight; the sum of gates is what it was."""
    parts = {name: value * weight for name, value in losses.parts.items()}
    return Losses(losses.total * weight, parts, losses.gate_sum)


def _plain(
    student: Output, head: Tensor | None, targets: Tensor, signal: TeacherSignal | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy and the divergence to the teacher (0 without one), summed over tokens.

    From hidden states a slab of logits at a time is made, and made again in the backward pass, so that none are kept.
    """

    def of(given: Tensor, weight: Tensor | None, part: slice) -> tuple[Tensor, Tensor]:
        logits = given if weight is None else F.linear(given, weight)
        cross_entropy = F.cross_entropy(logits.float(), targets[part], reduction="sum")
        if signal is None:
            return cross_entropy, torch.zeros_like(cross_entropy)
        return cross_entropy, kl_divergence(logits, signal.logits_of(part), temperature, 1)

    if student.hidden is None:
        assert student.logits is not None
        return of(student.logits, None, slice(None))
    hidden, weight = _one_dtype(student.hidden, head)
    rows = max(1, SLAB_ELEMENTS // len(weight))
    parts = [
        checkpoint(of, hidden[start : start + rows], weight, slice(start, start + rows), use_reentrant=False)
        for start in range(0, max(1, len(targets)), rows)
    ]
    cross_entropies, divergences = zip(*parts, strict=True)
    return torch.stack(cross_entropies).sum(), torch.stack(divergences).sum()


def _gated(
    student: Output,
    head: Tensor | None,
    targets: Tensor,
    signal: TeacherSignal,
    counts: Mapping[str, Tensor],
    objective: GraceObjective,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    divisors: dict[str, Any] = {name: counts[name] for name in ("gate_sum", "token_count") if name in counts}
    if student.hidden is None:
        assert student.logits is not None
        found = objective(student.logits, signal.logits_of(slice(None)), targets, **divisors)
    else:
        assert signal.hidden is not None
        assert signal.head is not None
        hidden, weight = _one_dtype(student.hidden, head)
        parts = linear_gated_dkd(
            hidden,
            weight,
            signal.hidden,
            signal.head,
            targets,
            **asdict(objective.distillation.config),
            **divisors,
            dkd_weight=objective.controller.multiplier,
        )
        found = objective.combine(parts)
    return found.total, {"ce": found.cross_entropy, "gdkd": found.gated_dkd}, found.gate_sum


def _one_dtype(hidden: Tensor | None, head: Tensor | None) -> tuple[Tensor, Tensor]:
    """Under mixed precision the decoder's output is in the lower dtype while the weight is not."""
    assert hidden is not None
    assert head is not None
    return hidden, head.to(hidden.dtype)


def kl_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float, count: Tensor | float) -> Tensor:
    """Return T^2 * KL(teacher, student) at a temperature, summed over tokens over ``count``: no gate, no decoupling."""
    classes = min(student_logits.shape[-1], teacher_logits.shape[-1])
    student = F.log_softmax(student_logits[..., :classes].float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits[..., :classes].float() / temperature, dim=-1)
    return F.kl_div(student, teacher, log_target=True, reduction="sum") / count * temperature**2
