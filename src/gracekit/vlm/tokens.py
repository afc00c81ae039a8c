"""Gathering the rows of hidden states that belong to visual tokens, packed image after image.

The relational loss compares images one by one, so besides the rows it needs to know how many belong to each image. The
placeholder ids say where visual tokens are, but not where one image ends: two adjacent images look like one run. The
lengths therefore come from the model's own image features wherever those were seen, and the runs are a fallback.
"""

# B batch, S sequence length, d hidden, n visual tokens of one image

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from gracekit import _checks


def visual_tokens(
    hidden: Tensor, input_ids: Tensor, image_token_id: int, *, lengths: Sequence[int] | None = None
) -> tuple[Tensor, list[int]]:
    """Gather the hidden states at visual positions, packed, with the number of tokens of each image.

    Images are ordered as the model fills them in: sample by sample, left to right within each. Text and padding are left
    out, so the side of the padding does not matter. Gradients reach ``hidden`` at the gathered rows and are 0 elsewhere.

    With ``lengths`` there is no device-to-host synchronisation; without them the ids are read on the host, and each
    contiguous run of placeholders within a sample counts as one image. That is wrong for images that are adjacent (their
    runs merge) and for models that put row breaks inside an image (its run falls apart).

    Args:
        hidden: hidden states (B, S, d), floating.
        input_ids: token ids (B, S), integer, on the device of ``hidden``.
        image_token_id: the id of an image's placeholder, ``model.config.image_token_id``.
        lengths: visual tokens of each image, in order, all at least 1; they sum to the number of placeholders, and no
            image crosses from one sample to the next. None: take the runs.

    Returns:
        The tokens (sum n, d) and the list of n, ready for ``RelationalCKA()(student, teacher, lengths)``. Without any
        visual token (0, d), still attached to the graph, and an empty list.

    Raises:
        TypeError: ``hidden`` is not floating, or ``input_ids`` or ``lengths`` are not integers.
        ValueError: shapes or devices do not agree, or ``lengths`` do not fit the placeholders (on an accelerator the
            latter is an asynchronous assertion).

    Example:
        >>> hidden = torch.arange(6.0).reshape(1, 6, 1)
        >>> input_ids = torch.tensor([[1, 9, 9, 2, 9, 3]])
        >>> tokens, lengths = visual_tokens(hidden, input_ids, image_token_id=9)
        >>> tokens.flatten().tolist(), lengths
        ([1.0, 2.0, 4.0], [2, 1])
    """
    _checks.check_floating("hidden", hidden)
    _checks.check_rank("hidden", hidden, (3,), "(B, S, d)")
    _checks.check_integral("input_ids", input_ids)
    if input_ids.shape != hidden.shape[:2]:
        raise ValueError(
            f"input_ids must have the shape (B, S) of hidden (B, S, d), got input_ids of shape {tuple(input_ids.shape)} "
            f"and hidden of shape {tuple(hidden.shape)}; are they of the same forward?"
        )
    _checks.check_same_device(hidden=hidden, input_ids=input_ids)
    mask_BS = input_ids == _checks.check_int("image_token_id", image_token_id, low=0)
    if lengths is None:
        sizes = run_lengths(mask_BS)
    elif not isinstance(lengths, Iterable):
        raise TypeError(f"lengths must be a sequence of integers, got {type(lengths).__name__}")
    else:
        sizes = [_checks.check_int(f"lengths[{i}]", length, low=1) for i, length in enumerate(lengths)]
        _check_lengths(sizes, mask_BS)
    # The number of rows is known, so finding them needs no synchronisation.
    rows = torch.nonzero_static(mask_BS.flatten(), size=sum(sizes)).squeeze(1)
    return hidden.flatten(0, 1).index_select(0, rows), sizes


def run_lengths(mask_BS: Tensor) -> list[int]:
    """Return the length of each contiguous run of True within a row, row by row; reads the mask on the host."""
    mask = torch.nn.functional.pad(mask_BS.cpu().to(torch.int8), (1, 1))
    steps = mask.diff(dim=1)
    starts, ends = (steps == 1).nonzero()[:, 1], (steps == -1).nonzero()[:, 1]
    return [int(length) for length in (ends - starts).tolist()]


def feature_lengths(features: object) -> list[int] | None:
    """Return the number of tokens of each image in what ``get_image_features`` gave, or None where it does not tell.

    A sequence has an entry per image (per sample in Idefics3 and SmolVLM since transformers 5.20), each (n, d) or
    (tiles, n, d); a tensor (images, n, d) has a row per image (per tile in InternVL). A flat (sum n, d) tensor does not say
    where images end.
    """
    features = getattr(features, "pooler_output", features)
    if isinstance(features, Tensor) and features.ndim == 3:
        return [features.shape[1]] * features.shape[0]
    if isinstance(features, tuple | list) and all(isinstance(item, Tensor) and item.ndim >= 2 for item in features):
        # A sample without an image is an empty entry in the families that list features by sample.
        return [length for item in features if (length := item.shape[:-1].numel())]
    return None


def _check_lengths(lengths: list[int], mask_BS: Tensor) -> None:
    """Demand that ``lengths`` add up to the placeholders, with a border wherever a sample ends."""
    message = (
        f"lengths must sum to the number of image placeholders, and no image may cross from one sample to the next, got "
        f"{len(lengths)} lengths with sum {sum(lengths)}"
    )
    if not _checks.has_values(mask_BS):
        return
    # From pageable memory this returns at once when non_blocking, where torch.tensor(..., device="cuda") would wait.
    borders = torch.tensor([0, *accumulate(lengths)]).to(mask_BS.device, non_blocking=True)
    ends = mask_BS.sum(dim=1).cumsum(0)
    if mask_BS.device.type == "cpu":
        message += f" for {int(mask_BS.sum())} placeholders, {mask_BS.sum(dim=1).tolist()} by sample"
    _checks.check_values(torch.isin(ends, borders), message)
    _checks.check_values(mask_BS.sum() == borders[-1], message)
