"""Images of different sizes as one padded batch: single, batched, masked or packed."""

# B images, n tokens of an image, N the most of any, d features

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gracekit._checks import check_int, check_rank, check_same_device


class ImageBatch(NamedTuple):
    """Tokens of both sides, padded to the longest image."""

    x_BND: Tensor
    y_BND: Tensor
    mask_BN: Tensor | None  # None: every token counts
    counts_B: Tensor | None


def as_batch(
    student: Tensor, teacher: Tensor, lengths: Sequence[int] | Tensor | None, mask: Tensor | None
) -> ImageBatch:
    """Return the batch that lengths or a mask describe, or raise."""
    check_rank("student_tokens", student, (2, 3), "(n, d_S) or (B, n, d_S)")
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"student_tokens and teacher_tokens must agree but for the last dimension, got {tuple(student.shape)} "
            f"and {tuple(teacher.shape)}"
        )
    if lengths is not None:
        if mask is not None or student.ndim != 2:
            raise ValueError(
                "lengths describe packed tokens of shape (sum of lengths, d) without a mask, got student_tokens "
                f"{tuple(student.shape)} and mask {'given' if mask is not None else None}"
            )
        return _unpack(student, teacher, _checked_lengths(lengths, len(student)))
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask must be a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
        if student.ndim != 3 or mask.shape != student.shape[:2]:
            raise ValueError(f"mask must have shape (B, n), got {tuple(mask.shape)} and tokens {tuple(student.shape)}")
        check_same_device(student_tokens=student, mask=mask)
        return ImageBatch(student, teacher, mask, mask.sum(1))
    if student.ndim == 2:
        student, teacher = student[None], teacher[None]
    return ImageBatch(student, teacher, None, None)


def _checked_lengths(lengths: Sequence[int] | Tensor, tokens: int) -> list[int]:
    if isinstance(lengths, Tensor):
        check_rank("lengths", lengths, (1,), "(B,)")
        lengths = lengths.tolist()
    if not isinstance(lengths, Iterable):
        raise TypeError(f"lengths must be a sequence of integers or a tensor, got {type(lengths).__name__}")
    counts = [check_int(f"lengths[{index}]", length, low=0) for index, length in enumerate(lengths)]
    if sum(counts) != tokens:
        raise ValueError(f"lengths must sum to the number of tokens, got {sum(counts)} and {tokens} tokens")
    return counts


def _unpack(student: Tensor, teacher: Tensor, counts: list[int]) -> ImageBatch:
    """Pad packed images to the longest; a plain reshape where all are as long."""
    longest = max(counts) if counts else 0
    if counts and min(counts) == longest:
        student, teacher = (side.reshape(len(counts), longest, side.shape[-1]) for side in (student, teacher))
        return ImageBatch(student, teacher, None, None)
    counts_B = torch.tensor(counts, dtype=torch.long)
    if student.device.type == "cuda":
        counts_B = counts_B.pin_memory()  # a pageable copy would wait for the device
    counts_B = counts_B.to(student.device, non_blocking=True)
    mask_BN = torch.arange(longest, device=student.device) < counts_B[:, None]
    starts_B = counts_B.cumsum(0) - counts_B
    take_BN = torch.where(mask_BN, starts_B[:, None] + torch.arange(longest, device=student.device), 0)
    if torch.compiler.is_compiling():  # traces indexing, not nested functions of autograd
        return ImageBatch(student[take_BN], teacher[take_BN], mask_BN, counts_B)
    ahead_B = torch.arange(len(counts), device=student.device) * longest - starts_B
    place_n = torch.arange(sum(counts), device=student.device)
    place_n = place_n + torch.repeat_interleave(ahead_B, counts_B, output_size=sum(counts))
    student_BND, teacher_BND = (
        _Pad.apply(side, take_BN, place_n)  # type: ignore[no-untyped-call]
        for side in (student, teacher)
    )
    return ImageBatch(student_BND, teacher_BND, mask_BN, counts_B)


class _Pad(torch.autograd.Function):
    """Rows of packed tokens by index, and back: a gather both ways, where indexing would sort and add up in its backward.

    Rows that pad repeat the first token; whoever uses the batch masks them, so their gradient is zero.
    """

    @staticmethod
    def forward(ctx: Any, tokens_ND: Tensor, take_BN: Tensor, place_N: Tensor) -> Tensor:
        ctx.save_for_backward(take_BN, place_N)
        return tokens_ND[take_BN] if len(tokens_ND) else tokens_ND.new_zeros(*take_BN.shape, tokens_ND.shape[1])

    @staticmethod
    def backward(ctx: Any, grad_BND: Tensor) -> tuple[Tensor | None, ...]:
        take_BN, place_N = ctx.saved_tensors
        return _Unpad.apply(grad_BND, take_BN, place_N), None, None  # type: ignore[no-untyped-call]


class _Unpad(torch.autograd.Function):
    """The reverse of :class:`_Pad`, and its derivative."""

    @staticmethod
    def forward(ctx: Any, padded_BND: Tensor, take_BN: Tensor, place_N: Tensor) -> Tensor:
        ctx.save_for_backward(take_BN, place_N)
        return padded_BND.flatten(0, 1)[place_N]

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        return _Pad.apply(grad_ND, *ctx.saved_tensors), None, None  # type: ignore[no-untyped-call]
