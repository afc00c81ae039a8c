"""A folder of one's own for the small recipe: pictures, and train.json and test.json with conversations about them.

Each turn of a conversation becomes a question about its images (one, several or none), which come first, asked without the turns
before it. The tokenizer is made of the words of train.json, so that words of test.json may be unknown: in a question they are read
as ``<unk>``, and an answer that holds one counts as wrong, because no model can give it.
"""

from __future__ import annotations

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

from gracekit.recipe.bad_records import BadRecord, BadRecordsError, left_out, settle
from gracekit.recipe.config import RunConfig
from gracekit.recipe.conversations import Record, find_conversations
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
from gracekit.recipe.models import load_teacher
from gracekit.recipe.progress import say
from gracekit.recipe.record_format import IMAGE_MARK, RecordError, open_image
from gracekit.recipe.record_sources import open_source

SPLITS = ("train", "test")
BAD_RECORDS = "bad_records-{}.jsonl"  # of a split
_MOST_IMAGES = 3  # a model has positions for four times an image's tokens, and questions need some
_SPECIAL = (BOS, EOS, PAD, UNKNOWN, USER, ASSISTANT)


class BadSplitsError(BadRecordsError):
    """Bad records of the files of a folder.

    Attributes:
        records: all of them, those of train.json first.
    """

    def __init__(self, errors: dict[str, BadRecordsError]) -> None:
        ValueError.__init__(self, "\n".join(f"{name}: {error}" for name, error in errors.items()))
        self.records, self.file = tuple(bad for error in errors.values() for bad in error.records), None


def check_run(run: RunConfig) -> None:
    """Raise ValueError unless a run's folder has two files of records, and its teacher loads and takes images of the run's size."""
    if run.data:
        for name in SPLITS:
            open_source(_file(Path(run.data), name))
    if run.teacher:
        theirs = load_teacher(run.teacher)[0].config.vision_config.image_size
        if theirs != run.image_size:
            raise ValueError(f"image_size must be the teacher's, got {run.image_size} and {theirs} in {run.teacher!r}")


def load_splits(run: RunConfig, folder: Path | None = None) -> tuple[VqaSplit, VqaSplit]:
    """Return the training and test questions of a run: those of its folder of data, or easy-VQA's.

    Args:
        run: which data, and what to do about bad records.
        folder: of the run, where bad records are written, and what is left out is said. None: neither.

    Raises:
        ValueError: the folder of data lacks a file.
        BadSplitsError: records are bad and are to stop, or all of a file are.
    """
    if not run.data:
        return load_easy_vqa("train", run.train_images), load_easy_vqa("test", run.test_images)
    loaded, errors = [], {}
    for name in SPLITS:
        file = _file(Path(run.data), name)
        try:
            loaded.append(_load(run, file, folder / BAD_RECORDS.format(name) if folder is not None else None))
        except BadRecordsError as error:
            errors[file.name] = error
    if errors:
        raise BadSplitsError(errors)
    train, test = loaded
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
        "train_bad_records": train.bad_records,
        "test_images": len(test.images),
        "test_questions": len(test.questions),
        "test_bad_records": test.bad_records,
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


def _load(run: RunConfig, file: Path, bad_records_file: Path | None) -> VqaSplit:
    # What they lack for the small recipe is listed with what is wrong with them at all.
    records = find_conversations(file, run.image_folder or run.data)
    asked: list[tuple[Record, str, str]] = []
    bad = list(records.bad)
    for record in records:
        try:
            asked += [(record, question, answer) for question, answer in _questions(record)]
        except RecordError as error:
            bad.append(BadRecord(record.index, record.id, error.kind, str(error)))
    paths = list(dict.fromkeys(path for record, _, _ in asked for path in record.images))
    with ThreadPoolExecutor(4) as pool:
        decoded = dict(zip(paths, pool.map(lambda path: _square(path, run.image_size), paths), strict=True))
    for record in dict.fromkeys(record for record, _, _ in asked):
        found = next((decoded[path] for path in record.images if isinstance(decoded[path], RecordError)), None)
        if isinstance(found, RecordError):
            bad.append(BadRecord(record.index, record.id, found.kind, str(found)))
    left = settle(bad, records.total, run.on_bad_record, bad_records_file)
    if left and bad_records_file is not None:
        say(f"{file.name}: {left_out(left, records.total, bad_records_file)}")
    lost = {one.index for one in left}
    asked = [one for one in asked if one[0].index not in lost]
    if not asked:
        raise ValueError(f"data must hold at least one record, got 0 in {str(file)!r}")
    # Records about the same pictures share them, and their questions are packed behind them.
    scenes = {images: number for number, images in enumerate(dict.fromkeys(record.images for record, _, _ in asked))}
    numbers = {path: number for number, path in enumerate(dict.fromkeys(path for images in scenes for path in images))}
    pixels = np.zeros((len(numbers), run.image_size, run.image_size, 3), dtype=np.uint8)
    for path, number in numbers.items():
        pixels[number] = decoded[path]
    return VqaSplit(
        torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
        [Question(scenes[record.images], text, answer) for record, text, answer in asked],
        scenes=tuple(tuple(numbers[path] for path in images) for images in scenes),
        bad_records=len(left),
    )


def _questions(record: Record) -> list[tuple[str, str]]:
    """Return (question, answer) for each pair of turns of a record."""
    if len(record.images) > _MOST_IMAGES:
        raise RecordError(
            "too many images", f"the small recipe's models have positions for {_MOST_IMAGES}, got {len(record.images)}"
        )
    if record.turns[0].role == "system":
        raise RecordError("system turn", "the template of the small recipe's models has no place for one")
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
    """Return mean and standard deviation over all pixels, the latter at least 1; of no images, 0 and 1."""
    if not len(images):
        return 0.0, 1.0
    counts = torch.stack([torch.bincount(image.flatten(), minlength=256) for image in images]).sum(0).double()
    levels = torch.arange(256, dtype=torch.float64)
    mean = (counts * levels).sum() / counts.sum()
    spread = ((counts * (levels - mean) ** 2).sum() / counts.sum()).sqrt()
    return round(mean.item(), 1), max(1.0, round(spread.item(), 1))
