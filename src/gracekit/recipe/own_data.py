"""A folder of one's own for the small recipe: pictures, and train.json and test.json with conversations about them.

Each turn of a conversation becomes a question about its image, asked without the turns before it. The tokenizer is made of the
words of train.json, so that words of test.json may be unknown: in a question they are read as ``<unk>``, and an answer that holds
one counts as wrong, because no model can give it.
"""

from __future__ import annotations

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from gracekit.recipe.bad_records import BadRecord, BadRecordsError
from gracekit.recipe.config import RunConfig
from gracekit.recipe.conversations import Record, load_conversations
from gracekit.recipe.data import (
    ASSISTANT,
    BOS,
    EOS,
    PAD,
    UNKNOWN,
    USER,
    Question,
    VqaSplit,
    load_easy_vqa,
    split_words,
)
from gracekit.recipe.models import teacher_folder
from gracekit.recipe.record_format import IMAGE_MARK, RecordError, open_image

_SPECIAL = (BOS, EOS, PAD, UNKNOWN, USER, ASSISTANT)


def check_run(run: RunConfig) -> None:
    """Raise ValueError unless a run's folder of data has its two files, and its teacher takes images of the run's size."""
    if run.data:
        for name in ("train", "test"):
            _file(Path(run.data), name)
    if run.teacher:
        described = json.loads((teacher_folder(run.teacher) / "config.json").read_text(encoding="utf-8"))
        theirs = described["vision_config"]["image_size"]
        if theirs != run.image_size:
            raise ValueError(f"image_size must be the teacher's, got {run.image_size} and {theirs} in {run.teacher!r}")


def load_splits(run: RunConfig) -> tuple[VqaSplit, VqaSplit]:
    """Return the training and test questions of a run: those of its folder, or easy-VQA's.

    Raises:
        ValueError: the folder lacks a file, or holds bad records, all of which are listed.
    """
    if not run.data:
        return load_easy_vqa("train", run.train_images), load_easy_vqa("test", run.test_images)
    folder = Path(run.data)
    pictures = Path(run.image_folder) if run.image_folder else folder
    train, test = (_load(_file(folder, name), pictures, run.image_size) for name in ("train", "test"))
    centre, spread = _brightness(train.images)
    return replace(train, centre=centre, spread=spread), replace(
        test, centre=centre, spread=spread, open_vocabulary=True
    )


def describe(train: VqaSplit, test: VqaSplit, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return how much data there is, and what of the test set the tokenizer does not know.

    Args:
        train: what is learned from.
        test: what is asked.
        tokenizer: of both models.
    """
    known = tokenizer.get_vocab()
    unknown = Counter(word for q in test.questions for word in split_words(q.text) if word not in known)
    answers = sum(any(word not in known for word in split_words(q.answer)) for q in test.questions)
    return {
        "train_images": len(train.images),
        "train_questions": len(train.questions),
        "test_images": len(test.images),
        "test_questions": len(test.questions),
        "words": len(known),
        "unknown_words": len(unknown),
        "unknown_words_read": unknown.total(),
        "unknown_answers": answers,
    }


def _file(folder: Path, name: str) -> Path:
    found = [folder / f"{name}{ending}" for ending in (".json", ".jsonl") if (folder / f"{name}{ending}").is_file()]
    if len(found) != 1:
        raise ValueError(
            f"data must be a folder with one of {name}.json and {name}.jsonl, got {len(found)} in {str(folder)!r}"
        )
    return found[0]


def _load(file: Path, pictures: Path, size: int) -> VqaSplit:
    # What they lack for the small recipe is listed with what is wrong with them at all.
    records = load_conversations(file, pictures, on_bad_record="skip")
    asked: list[tuple[Record, str, str]] = []
    bad = list(records.bad)
    for record in records:
        try:
            asked += [(record, question, answer) for question, answer in _questions(record)]
        except RecordError as error:
            bad.append(BadRecord(record.index, record.id, error.kind, str(error)))
    # Records about one picture share it, and their questions are packed behind it.
    paths = list(dict.fromkeys(record.images[0] for record, _, _ in asked))
    with ThreadPoolExecutor(4) as pool:
        decoded = dict(zip(paths, pool.map(lambda path: _square(path, size), paths), strict=True))
    broken = {
        record.index: (record, found)
        for record, _, _ in asked
        if isinstance(found := decoded[record.images[0]], RecordError)
    }
    bad += [BadRecord(index, record.id, error.kind, str(error)) for index, (record, error) in broken.items()]
    if bad:
        raise BadRecordsError(sorted(bad, key=lambda one: one.index), len(records) + len(records.bad))
    numbers = {path: number for number, path in enumerate(paths)}
    pixels = torch.from_numpy(np.stack([decoded[path] for path in paths]))
    return VqaSplit(
        pixels.permute(0, 3, 1, 2).contiguous(),
        [Question(numbers[record.images[0]], text, answer) for record, text, answer in asked],
    )


def _questions(record: Record) -> list[tuple[str, str]]:
    """Return (question, answer) for each pair of turns of a record."""
    if len(record.images) != 1:
        raise RecordError("not one image", f"the small recipe takes one for each record, got {len(record.images)}")
    if record.turns[0].role == "system":
        raise RecordError("system turn", "the small recipe's models read none")
    texts = [" ".join(turn.text.replace(IMAGE_MARK, " ").split()) for turn in record.turns]
    for text in texts:
        if not split_words(text):
            raise RecordError("no words", f"in {text!r}")
        inside = [token for token in _SPECIAL if token in text]
        if inside:
            raise RecordError(
                "special token", f"what is said holds {inside[0]!r}, which the tokenizer keeps for itself"
            )
    # As models write it: in lower case, with spaces around punctuation.
    pairs = zip(texts[::2], texts[1::2], strict=True)
    return [(question, " ".join(split_words(answer))) for question, answer in pairs]


def _square(path: Path, size: int) -> np.ndarray[Any, Any] | RecordError:
    """Return a picture (size, size, 3), stretched to the square as a CLIP image processor would; or why there is none."""
    try:
        return np.asarray(open_image(path).resize((size, size), Image.Resampling.BICUBIC))
    except RecordError as error:
        return error


def _brightness(images: Tensor) -> tuple[float, float]:
    """Return mean and standard deviation over all pixels, the latter at least 1."""
    counts = torch.stack([torch.bincount(image.flatten(), minlength=256) for image in images]).sum(0).double()
    levels = torch.arange(256, dtype=torch.float64)
    mean = (counts * levels).sum() / counts.sum()
    spread = ((counts * (levels - mean) ** 2).sum() / counts.sum()).sqrt()
    return round(mean.item(), 1), max(1.0, round(spread.item(), 1))
