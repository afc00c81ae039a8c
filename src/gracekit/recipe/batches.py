"""Conversations as samples and batches, in the shapes that each family of models takes."""

# B samples, L tokens of the longest one

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from gracekit._checks import check_choice, check_int
from gracekit.recipe.conversations import Record, open_images
from gracekit.recipe.processors import IGNORE_INDEX, ConversationProcessor


class ConversationDataset(Dataset[dict[str, Any]]):
    """Encoded conversations; an item depends on its index alone, in any process.

    Args:
        records: from :func:`~gracekit.recipe.conversations.load_conversations`.
        processor: of the model.
        max_length: tokens of one sample at most; see
            :meth:`~gracekit.recipe.conversations.Conversations.check_lengths` to find longer ones beforehand. None: any.

    Raises:
        ValueError: ``max_length`` is below 1; when an item is asked for, that its sample is longer or cannot be encoded.
    """

    def __init__(
        self, records: Sequence[Record], processor: ConversationProcessor, max_length: int | None = None
    ) -> None:
        if max_length is not None:
            check_int("max_length", max_length, low=1)
        self.records, self.processor, self.max_length = records, processor, max_length

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        sample = self.processor.encode(record.turns, open_images(record))
        length = len(sample["input_ids"])
        if self.max_length is not None and length > self.max_length:
            raise ValueError(
                f"a sample must have at most max_length={self.max_length} tokens, got {length} in record {record.index} "
                f"({record.id!r})"
            )
        return sample


class ConversationCollator:
    """Make a batch of encoded conversations.

    What belongs to tokens is padded to the longest sample; what belongs to images is put one behind the other, as LLaVA's stacked
    pictures, LLaVA-NeXT's tiles (padded to the most that a picture has) with their ``image_sizes``, and the Qwen-VL line's patches
    with their ``image_grid_thw`` want it. A batch without images has no such tensors.

    Args:
        processor: of the model.
        padding_side: "right" or "left".

    Attributes:
        pad: the id that ``input_ids`` are padded with.

    Raises:
        ValueError: ``padding_side`` is neither, or the tokenizer has no token to pad with.
    """

    def __init__(self, processor: ConversationProcessor, padding_side: Literal["right", "left"] = "right") -> None:
        check_choice("padding_side", padding_side, ("right", "left"))
        tokenizer = processor.tokenizer
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if padding is None:
            raise ValueError(f"tokenizer must have a pad_token or an eos_token, got neither ({processor.name})")
        self.padding_side, self.pad = padding_side, int(padding)
        self._fill = {"input_ids": self.pad, "labels": IGNORE_INDEX}

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return ``input_ids``, ``attention_mask`` and ``labels`` (B, L), and the other tensors of the samples."""
        lengths = [len(sample["input_ids"]) for sample in samples]
        longest = max(lengths)
        batch = {"attention_mask": self._rows([torch.ones(n, dtype=torch.long) for n in lengths], longest, 0)}
        for name in dict.fromkeys(key for sample in samples for key in sample):
            values = [sample[name] for sample in samples if name in sample]
            if len(values) == len(samples) and all(v.shape == (n,) for v, n in zip(values, lengths, strict=True)):
                batch[name] = self._rows(values, longest, self._fill.get(name, 0))
            elif name == "pixel_attention_mask":
                raise ValueError("images must come one behind the other, got a processor that groups them by sample")
            else:
                batch[name] = _joined(values)
        return batch

    def _rows(self, values: Sequence[Tensor], longest: int, fill: int) -> Tensor:
        rows = values[0].new_full((len(values), longest), fill)
        for row, value in zip(rows, values, strict=True):
            if self.padding_side == "right":
                row[: len(value)] = value
            else:
                row[longest - len(value) :] = value
        return rows


def _joined(values: Sequence[Tensor]) -> Tensor:
    """Put tensors one behind the other, with zeros where one is smaller in a dimension that is not the first."""
    sizes = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    padded = []
    for value in values:
        if list(value.shape[1:]) != sizes:
            larger = value.new_zeros(len(value), *sizes)
            larger[tuple(slice(size) for size in value.shape)] = value
            value = larger
        padded.append(value)
    return torch.cat(padded)
