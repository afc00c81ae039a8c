"""Images of different sizes as padded batches of images of similar size: single, batched, masked or packed."""

# B images, n tokens of an image, N the most of any in a batch, d features, P places of all batches

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gracekit._checks import check_int, check_rank, check_same_device

# An image shorter than this share of the longest goes into a batch of its own kind: what is padded is computed with.
_SIMILAR = 0.7


class ImageBatch(NamedTuple):
    """Tokens of both sides, padded to the longest image."""

    x_BND: Tensor
    y_BND: Tensor
    mask_BN: Tensor | None  # None: every token counts
    counts_B: Tensor | None

    def without_short_images(self, least: int) -> ImageBatch:
        """Return the batch with none of the tokens of images of fewer than ``least``, which so reach no gradient either."""
        counts_B, mask_BN = self.counts_B, self.mask_BN
        if counts_B is None or mask_BN is None:
            images, tokens = self.x_BND.shape[:2]
            if tokens >= least:
                return self
            counts_B = torch.full((images,), tokens, device=self.x_BND.device)
            mask_BN = torch.ones(images, tokens, dtype=torch.bool, device=self.x_BND.device)
        counted_B = counts_B >= least
        return self._replace(mask_BN=mask_BN & counted_B[:, None], counts_B=torch.where(counted_B, counts_B, 0))


def as_batches(
    student: Tensor, teacher: Tensor, lengths: Sequence[int] | Tensor | None, mask: Tensor | None
) -> list[ImageBatch]:
    """Return the images that lengths or a mask describe, in one or several batches, or raise."""
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
        counts = checked_lengths(lengths)
        if sum(counts) != len(student):
            raise ValueError(f"lengths must sum to the number of tokens, got {sum(counts)} and {len(student)} tokens")
        return _unpack(student, teacher, counts)
    if mask is not None:
        check_mask(mask)
        if student.ndim != 3 or mask.shape != student.shape[:2]:
            raise ValueError(f"mask must have shape (B, n), got {tuple(mask.shape)} and tokens {tuple(student.shape)}")
        check_same_device(student_tokens=student, mask=mask)
        return [ImageBatch(student, teacher, mask, mask.sum(1))]
    if student.ndim == 2:
        student, teacher = student[None], teacher[None]
    return [ImageBatch(student, teacher, None, None)]


def check_mask(mask: object) -> None:
    """Demand a bool tensor (B, n)."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
    check_rank("mask", mask, (2,), "(B, n)")


def checked_lengths(lengths: Sequence[int] | Tensor) -> list[int]:
    """Return the tokens of each packed image as a list, or raise."""
    if isinstance(lengths, Tensor):
        check_rank("lengths", lengths, (1,), "(B,)")
        lengths = lengths.tolist()
    if not isinstance(lengths, Iterable):
        raise TypeError(f"lengths must be a sequence of integers or a tensor, got {type(lengths).__name__}")
    return [check_int(f"lengths[{index}]", length, low=0) for index, length in enumerate(lengths)]


def _unpack(student: Tensor, teacher: Tensor, counts: list[int]) -> list[ImageBatch]:
    """Pad packed images to the longest of their batch; a plain reshape where all are as long."""
    longest = max(counts) if counts else 0
    if counts and min(counts) == longest:
        student, teacher = (side.reshape(len(counts), longest, side.shape[-1]) for side in (student, teacher))
        return [ImageBatch(student, teacher, None, None)]
    groups = [list(range(len(counts)))] if torch.compiler.is_compiling() else _similar(counts)
    ends = list(accumulate(counts))
    lengths = [[counts[index] for index in group] for group in groups]
    takes, masks = zip(
        *(_places(found, [ends[index] for index in group]) for found, group in zip(lengths, groups, strict=True)),
        strict=True,
    )
    take_P = torch.cat([take.flatten() for take in takes])
    if torch.compiler.is_compiling():  # traces indexing, not nested functions of autograd
        x_PD, y_PD = (side[take_P.to(side.device)] for side in (student, teacher))
    else:
        counted_P = torch.cat([mask.flatten() for mask in masks])
        counted_N = torch.nonzero_static(counted_P, size=sum(counts)).squeeze(1)
        place_N = torch.empty_like(counted_N)
        place_N[take_P[counted_N]] = counted_N
        take_P, place_N = _beside(student, take_P), _beside(student, place_N)
        x_PD, y_PD = (_Pad.apply(side, take_P, place_N) for side in (student, teacher))  # type: ignore[no-untyped-call]
    parts = [torch.split(side, [mask.numel() for mask in masks]) for side in (x_PD, y_PD)]
    batches = []
    for x, y, found, mask in zip(*parts, lengths, masks, strict=True):
        x_BND, y_BND = (side.reshape(*mask.shape, side.shape[-1]) for side in (x, y))
        if all(length == mask.shape[1] for length in found):
            batches.append(ImageBatch(x_BND, y_BND, None, None))
        else:
            batches.append(ImageBatch(x_BND, y_BND, _beside(student, mask), _beside(student, _on_host(found))))
    return batches


def _places(lengths: list[int], ends: list[int]) -> tuple[Tensor, Tensor]:
    """Return, on the host, the packed token of every place (B, N) of a batch, and which places count, by where its images end."""
    counts_B1, ends_B1 = (_on_host(numbers)[:, None] for numbers in (lengths, ends))
    place_N = torch.arange(max(lengths) if lengths else 0, device="cpu")
    mask_BN = place_N < counts_B1
    return torch.where(mask_BN, ends_B1 - counts_B1 + place_N, 0), mask_BN


def _on_host(numbers: list[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.long, device="cpu")


def _similar(counts: list[int]) -> list[list[int]]:
    """Return the indices of images in groups of similar length, the longest first."""
    groups: list[list[int]] = [[]]
    for index in sorted(range(len(counts)), key=lambda index: -counts[index]):
        longest = counts[groups[-1][0]] if groups[-1] else counts[index]
        # Images without tokens count nowhere and need no batch.
        if counts[index] < _SIMILAR * longest and counts[index]:
            groups.append([])
        groups[-1].append(index)
    return groups


def _beside(tokens: Tensor, host: Tensor) -> Tensor:
    if tokens.device.type == "cuda":
        host = host.pin_memory()  # a pageable copy would wait for the device
    return host.to(tokens.device, non_blocking=True)


class _Pad(torch.autograd.Function):
    """Rows of packed tokens by index, and back: a gather both ways, where indexing would sort and add up in its backward.

    Rows that pad repeat the first token; whoever uses the batch masks them, so their gradient is zero.
    """

    @staticmethod
    def forward(ctx: Any, tokens_ND: Tensor, take_P: Tensor, place_N: Tensor) -> Tensor:
        ctx.save_for_backward(take_P, place_N)
        return tokens_ND[take_P] if len(tokens_ND) else tokens_ND.new_zeros(len(take_P), tokens_ND.shape[1])

    @staticmethod
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor | None, ...]:
        take_P, place_N = ctx.saved_tensors
        return _Unpad.apply(grad_PD, take_P, place_N), None, None  # type: ignore[no-untyped-call]


class _Unpad(torch.autograd.Function):
    """The reverse of :class:`_Pad`, and its derivative."""

    @staticmethod
    def forward(ctx: Any, padded_PD: Tensor, take_P: Tensor, place_N: Tensor) -> Tensor:
        ctx.save_for_backward(take_P, place_N)
        return padded_PD[place_N]

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        return _Pad.apply(grad_ND, *ctx.saved_tensors), None, None  # type: ignore[no-untyped-call]
