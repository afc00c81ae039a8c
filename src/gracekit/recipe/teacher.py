"""`gracekit teacher`: train the teacher that the recipe distils from, the one in the package included."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.progress import Progress

from gracekit._checks import check_choice, check_int, check_real
from gracekit.objective import GraceObjective
from gracekit.recipe.config import RunConfig, option
from gracekit.recipe.data import PackedVqa, VqaSplit, build_tokenizer, load_easy_vqa, longest_answer
from gracekit.recipe.environment import environment
from gracekit.recipe.evaluate import accuracy, generate_answers
from gracekit.recipe.models import TEACHER, ModelSize, build_model, parameter_count
from gracekit.recipe.output_folder import own_settings
from gracekit.recipe.progress import progress_bars, say
from gracekit.recipe.stages import Stage, run_stage, write_json

SETTINGS = "gracekit-teacher.json"  # written first: what makes a folder a teacher's
_RECORD = "training.json"  # written last: what makes a teacher a finished one


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """How a teacher is trained: cross-entropy alone, half of the images mirrored."""

    output: str = option("runs/teacher", "folder of the teacher; an interrupted training goes on")
    seed: int = option(7, "seed of weights, order and mirroring")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to train")
    steps: int = option(3500, "optimiser steps")
    batch_size: int = option(32, "images a step")
    questions_per_image: int = option(10, "questions packed behind one image")
    learning_rate: float = option(1.5e-3, "at its highest")
    weight_decay: float = option(0.05, "of parameters with two or more dimensions")
    train_images: int = option(4000, "training images to use, at most 4000")
    test_images: int = option(1000, "test images to answer questions about, at most 1000")

    def __post_init__(self) -> None:
        check_int("seed", self.seed, low=0)
        check_choice("device", self.device, ("auto", "cpu", "cuda"))
        check_int("steps", self.steps, low=2)
        check_int("batch_size", self.batch_size, low=1)
        check_int("questions_per_image", self.questions_per_image, low=1)
        check_real("learning_rate", self.learning_rate, low=0.0, open_low=True)
        check_real("weight_decay", self.weight_decay, low=0.0)
        check_int("train_images", self.train_images, low=8, high=4000)
        check_int("test_images", self.test_images, low=1, high=1000)


class MirroredVqa(PackedVqa):
    """Packed examples, each image mirrored with probability 1/2: every answer stays true."""

    def collate(self, indices: Sequence[int]) -> dict[str, Any]:
        """Return a batch."""
        batch = super().collate(indices)
        mirrored = torch.rand(len(indices)) < 0.5
        pixels = batch["pixel_values"]
        batch["pixel_values"] = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
        return batch


def train_teacher(config: TeacherConfig) -> float:
    """Train a teacher on easy-VQA into ``config.output`` and return its accuracy on the test images.

    Raises:
        FileExistsError: the folder holds a teacher, one that was begun with other settings, or something else.
    """
    open_teacher(config)
    train, test = load_easy_vqa("train", config.train_images), load_easy_vqa("test", config.test_images)
    with progress_bars() as bars:
        return fit_teacher(config, train, test, bars, size=TEACHER, packed=MirroredVqa)


def open_teacher(config: TeacherConfig) -> None:
    """Make the folder of a new or interrupted training ready.

    Raises:
        FileExistsError: it holds a teacher, one that was begun with other settings, or something else.
    """
    folder, settings = Path(config.output), asdict(config)
    there = own_settings(folder / SETTINGS, settings, "an interrupted gracekit teacher") or settings
    if (folder / _RECORD).exists():
        raise FileExistsError(
            f"output must be a new folder or an unfinished training, got a teacher in {config.output!r}"
        )
    names = settings.keys() - {"output"}
    differences = [f"{n}: {there[n]!r} -> {settings[n]!r}" for n in sorted(names) if there[n] != settings[n]]
    if differences and any(path.is_file() and path.name != SETTINGS for path in folder.rglob("*")):
        raise FileExistsError(
            f"output must be a new folder or a training with the same settings, got {config.output!r} with other ones "
            f"(there -> asked for): {'; '.join(differences)}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SETTINGS, settings)  # also over those of a try that kept nothing


def own_teacher(run: RunConfig, train: VqaSplit, test: VqaSplit, folder: Path, bars: Progress) -> Path:
    """Return the folder of a teacher for a run's own data, trained there if it is not yet; nothing is mirrored.

    Args:
        run: how long to train, and on what device.
        train: what to learn.
        test: what to answer for its record.
        folder: of the teacher; an interrupted training goes on.
        bars: to show progress in.
    """
    if not (folder / _RECORD).is_file():
        config = TeacherConfig(output=str(folder), device=run.device, steps=run.teacher_steps)
        fit_teacher(config, train, test, bars, size=replace(TEACHER, image_size=run.image_size), packed=PackedVqa)
    return folder


def fit_teacher(
    config: TeacherConfig,
    train: VqaSplit,
    test: VqaSplit,
    bars: Progress,
    *,
    size: ModelSize,
    packed: type[PackedVqa],
) -> float:
    """Train a teacher on some images into ``config.output`` and return its accuracy on others.

    Args:
        config: how to train; its numbers of images are not looked at.
        train: what to learn; the tokenizer is made of its words.
        test: what to answer for the record.
        bars: to show progress in.
        size: of the model.
        packed: makes packed examples.
    """
    folder = Path(config.output)
    device = RunConfig(device=config.device).torch_device()
    start = time.monotonic()
    tokenizer = build_tokenizer(text for q in train.questions for text in (q.text, q.answer))
    model = build_model(size, tokenizer, seed=config.seed)
    data = packed(train, tokenizer, image_tokens=size.image_tokens, questions_per_image=config.questions_per_image)
    stage = Stage(
        name="stages/teacher",
        losses="ce",
        steps=config.steps,
        learning_rate=config.learning_rate,
        schedule="cosine",
        batch_size=config.batch_size,
        warmup=0.05,
        weight_decay=config.weight_decay,
        seed=config.seed,
    )
    bar = bars.add_task(f"teacher, {parameter_count(model):,} parameters", total=config.steps)
    log = run_stage(
        stage,
        model,
        data,
        GraceObjective(),
        folder,
        device=device,
        report=lambda step, text: bars.update(bar, completed=step, note=text),
    )
    model.to(torch.bfloat16)
    bar = bars.add_task("teacher answers test questions", total=len(test.questions))
    answers = generate_answers(
        model,
        test,
        tokenizer,
        image_tokens=size.image_tokens,
        max_new_tokens=longest_answer(train.questions),
        advance=lambda count: bars.advance(bar, count),
    )
    reached = accuracy(answers, test.questions)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(
        folder / _RECORD,
        {
            "environment": environment(device),
            "config": asdict(config) | {"train_images": len(train.images), "test_images": len(test.images)},
            "size": asdict(size),
            "parameters": parameter_count(model),
            "accuracy": reached,
            "questions": len(test.questions),
            "seconds": round(time.monotonic() - start, 1),
            "log": log,
        },
    )
    shutil.rmtree(folder / "stages")
    say(f"teacher: {100 * reached:.2f} % of {len(test.questions)} test questions right, in {folder}")
    return reached
