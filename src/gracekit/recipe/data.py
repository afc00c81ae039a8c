"""Images with questions, and sequences that hold one image, several or none, and several questions about them.

The questions of one scene share its tokens: a packed sequence is the prefix ``<s> USER: <image>...`` followed by question after
question with its answer, where each question attends to the prefix and itself alone, and counts its positions from the end
of the prefix. The logits are those of separate samples, at a fraction of the tokens.
"""

# C packed examples, L sequence length, N images, n visual tokens of one image, T supervised tokens

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

IGNORE_INDEX = -100
BOS, EOS, PAD, UNKNOWN, IMAGE, USER, ASSISTANT = "<s>", "</s>", "<pad>", "<unk>", "<image>", "USER:", "ASSISTANT:"


class Question(NamedTuple):
    """One question about what is shown: an image, or a scene of its split."""

    image: int
    text: str
    answer: str


@dataclass(frozen=True)
class VqaSplit:
    """Images and the questions about them.

    Attributes:
        images: (N, 3, H, W) uint8.
        questions: about them, in any order.
        centre: brightness in [0, 255] that becomes 0 in a model's input; easy-VQA has a light background.
        spread: brightness that becomes 1, from there.
        open_vocabulary: words that the tokenizer does not know may occur, and are read as ``<unk>``; else they are an error.
        scenes: images that questions are about together: several, one or none. None: each image alone.
        bad_records: how many records of its file were left out.
    """

    images: Tensor
    questions: list[Question]
    centre: float = 225.0
    spread: float = 60.0
    open_vocabulary: bool = False
    scenes: tuple[tuple[int, ...], ...] | None = None
    bad_records: int = 0

    @property
    def shown(self) -> Sequence[tuple[int, ...]]:
        """Images of each scene, which is what a question's ``image`` counts."""
        return self.scenes if self.scenes is not None else [(image,) for image in range(len(self.images))]

    def pixels(self, indices: Any) -> Tensor:
        """Return some of the images as a model takes them, float32."""
        return pixel_values(self.images[indices], self.centre, self.spread)


def load_easy_vqa(split: str, image_count: int) -> VqaSplit:
    """Return the first ``image_count`` images of easy-VQA's "train" or "test" split and their questions."""
    folder = files("easy_vqa") / "data" / split
    records = json.loads((folder / "questions.json").read_text(encoding="utf-8"))

    def read(index: int) -> np.ndarray[Any, Any]:
        with (folder / "images" / f"{index}.png").open("rb") as file, Image.open(file) as image:
            return np.asarray(image.convert("RGB"))

    with ThreadPoolExecutor(4) as pool:
        pixels = np.stack(list(pool.map(read, range(image_count))))
    questions = [Question(image, text, answer) for text, answer, image in records if image < image_count]
    return VqaSplit(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), questions)


def pixel_values(images: Tensor, centre: float = 225.0, spread: float = 60.0) -> Tensor:
    """Return uint8 images as float32, centred (by default on a light background) and scaled to about unit spread."""
    return (images.float() - centre) / spread


def split_words(text: str) -> list[str]:
    """Return a text's words and punctuation marks in lower case, as the tokenizer splits it."""
    lower = normalizers.Lowercase().normalize_str(text)
    return [word for word, _ in pre_tokenizers.Whitespace().pre_tokenize_str(lower)]


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer of the words in ``texts``; ids do not depend on their order."""
    words = {word for text in texts for word in split_words(text)}
    vocabulary = [PAD, BOS, EOS, UNKNOWN, IMAGE, USER, ASSISTANT, *sorted(words)]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=UNKNOWN))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        additional_special_tokens=[IMAGE, USER, ASSISTANT],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def prefix_text(image_tokens: int, images: int = 1) -> str:
    """Return what stands before every question about some images, with a placeholder for each visual token."""
    return f"{BOS}{USER} {IMAGE * image_tokens * images}\n"


def question_text(question: str) -> str:
    """Return a question as the model reads it, up to where its answer begins."""
    return f"{question} {ASSISTANT}"


def encode(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], *, open_vocabulary: bool = False
) -> list[list[int]]:
    """Return the ids of texts, nothing added.

    A word that the tokenizer does not know is a ValueError, or ``<unk>`` with ``open_vocabulary``.
    """
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    for text, row in zip(texts, ids, strict=True):
        if not open_vocabulary and tokenizer.unk_token_id in row:
            raise ValueError(f"text must be made of the tokenizer's words, got {text!r}")
    return ids


def longest_answer(questions: Iterable[Question]) -> int:
    """Return the tokens of the longest answer, its end included, and at least 3."""
    return max(3, 1 + max(len(split_words(question.answer)) for question in questions))


class PackedVqa(Dataset[int]):
    """Packed examples of a split. An item is its own index; :meth:`collate` makes the batch from a list of them.

    Args:
        split: images and questions.
        tokenizer: from :func:`build_tokenizer`.
        image_tokens: n, visual tokens of one image.
        questions_per_image: largest number of questions in one sequence; an image with more has several sequences of about
            the same size. None: all.
        teacher: outputs of a teacher for this split, to be part of each batch.
    """

    def __init__(
        self,
        split: VqaSplit,
        tokenizer: PreTrainedTokenizerFast,
        *,
        image_tokens: int,
        questions_per_image: int | None = None,
        teacher: TeacherOutputs | None = None,
    ) -> None:
        self.split, self.image_tokens, self.teacher = split, image_tokens, teacher
        self.shown = shown = split.shown
        most = max(map(len, shown))
        prefixes = encode(tokenizer, [prefix_text(image_tokens, count) for count in range(most + 1)])
        asked, answers = (
            encode(tokenizer, texts, open_vocabulary=split.open_vocabulary)
            for texts in ([question_text(q.text) for q in split.questions], [q.answer for q in split.questions])
        )
        answered = [[*ids, tokenizer.eos_token_id] for ids in answers]
        groups = _groups([q.image for q in split.questions], questions_per_image)
        self.scene_index = torch.tensor([split.questions[group[0]].image for group in groups])
        rows = [
            _pack(prefixes[len(shown[scene])], [(asked[q], answered[q]) for q in group])
            for group, scene in zip(groups, self.scene_index.tolist(), strict=True)
        ]
        # Where a teacher's visual tokens of a scene's images begin, image after image and scene after scene.
        self.first_image = np.cumsum([0, *map(len, shown)]).tolist()
        # Numbers of each example's supervised tokens in the order of the split's questions.
        ends = np.cumsum([0, *map(len, answered)]).tolist()
        spans = [[token for q in group for token in range(ends[q], ends[q + 1])] for group in groups]
        self.supervised_count = ends[-1]
        self.lengths = torch.tensor([len(row[0]) for row in rows])
        ids, labels, positions, segments = zip(*rows, strict=True)
        self.input_ids = _padded(ids, tokenizer.pad_token_id)
        self.labels = _padded(labels, IGNORE_INDEX)
        self.position_ids = _padded(positions, 0)
        self.segments = _padded(segments, -1)
        self.supervised = _padded(spans, -1)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> int:
        return index

    def collate(self, indices: Sequence[int]) -> dict[str, Any]:
        """Return the batch of these examples, cut to its longest one."""
        rows = torch.as_tensor(indices)
        length = int(self.lengths[rows].max())
        scenes = self.scene_index[rows].tolist()
        images = [image for scene in scenes for image in self.shown[scene]]
        batch: dict[str, Any] = {
            "input_ids": self.input_ids[rows, :length],
            "labels": self.labels[rows, :length],
            "position_ids": self.position_ids[rows, :length],
            "attention_mask": packed_attention_mask(self.segments[rows, :length]),
        }
        if images:
            batch["pixel_values"] = self.split.pixels(images)
        if self.teacher is not None:
            tokens = self.supervised[rows]
            batch["teacher_logits"] = self.teacher.logits[tokens[tokens >= 0]].float()
            batch["teacher_tokens"] = self.teacher.visual_tokens[self.places(rows)].flatten(0, 1).float()
            batch["teacher_lengths"] = [self.teacher.visual_tokens.shape[1]] * len(images)
        return batch

    def places(self, rows: Tensor) -> list[int]:
        """Return where in a teacher's visual tokens the images of some examples are."""
        scenes = self.scene_index[rows].tolist()
        return [place for scene in scenes for place in range(self.first_image[scene], self.first_image[scene + 1])]


@dataclass(frozen=True)
class TeacherOutputs:
    """What a teacher says about a whole split.

    Attributes:
        logits: (T, V) for the supervised tokens of all questions, in the split's order.
        visual_tokens: (N, n, d), its hidden states at the penultimate layer, for the images of scene after scene. They depend on
            the scene alone, because its images come first and attention is causal.
    """

    logits: Tensor
    visual_tokens: Tensor


def packed_attention_mask(segments: Tensor) -> Tensor:
    """Return the mask (C, 1, L, L) that is added to attention scores.

    It is 0 where a query may look, back at the prefix (segment 0) and its own question, and the least float32 elsewhere. A
    bool mask would do for SDPA, but eager attention would add it as 0 and 1.
    """
    query, key = segments[:, :, None], segments[:, None, :]
    causal = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool, device=segments.device).tril()
    visible = ((query == key) | (key == 0)) & causal
    return torch.zeros(visible.shape, device=segments.device).masked_fill_(~visible, torch.finfo(torch.float32).min)[
        :, None
    ]


def _pack(prefix: list[int], questions: Iterable[tuple[list[int], list[int]]]) -> tuple[list[int], ...]:
    ids, labels = list(prefix), [IGNORE_INDEX] * len(prefix)
    positions, segments = list(range(len(prefix))), [0] * len(prefix)
    for number, (asked, answered) in enumerate(questions, start=1):
        size = len(asked) + len(answered)
        ids += asked + answered
        labels += [IGNORE_INDEX] * len(asked) + answered
        positions += range(len(prefix), len(prefix) + size)
        segments += [number] * size
    return ids, labels, positions, segments


def _groups(images: Sequence[int], largest: int | None) -> list[list[int]]:
    """Return question indices grouped by image, groups of one image differing by at most one in size."""
    by_image: dict[int, list[int]] = {}
    for question, image in enumerate(images):
        by_image.setdefault(image, []).append(question)
    # Neighbouring questions resemble each other, so each group takes every k-th.
    groups = []
    for found in by_image.values():
        parts = -(-len(found) // (largest or len(found)))
        groups += [found[k::parts] for k in range(parts)]
    return groups


def _padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    out = np.full((len(rows), max(map(len, rows))), fill, dtype=np.int64)
    for row, values in zip(out, rows, strict=True):
        row[: len(values)] = values
    return torch.from_numpy(out)
