"""A run of the recipe and its folder: what its parts share, what it took, and how it is begun or gone on with."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from gracekit.recipe.config import RecipeConfig
from gracekit.recipe.data import TeacherOutputs, VqaSplit
from gracekit.recipe.models import STUDENT, ModelSize, load_teacher, teacher_outputs
from gracekit.recipe.output_folder import own_settings
from gracekit.recipe.own_data import BAD_RECORDS, SPLITS, check_run, describe, load_splits
from gracekit.recipe.progress import say
from gracekit.recipe.stages import write_json
from gracekit.recipe.teacher import own_teacher


@dataclass
class Run:
    """What the parts of a run share."""

    config: RecipeConfig
    folder: Path
    device: torch.device
    train: VqaSplit
    test: VqaSplit
    tokenizer: PreTrainedTokenizerFast
    size: ModelSize  # of every student
    teacher_path: str
    teacher: TeacherOutputs
    bars: Progress
    held_out: TeacherOutputs | None = None


def open_folder(config: RecipeConfig) -> Path | None:
    """Return the run's folder, ready to write to; None if it holds a finished run of these settings.

    Raises:
        FileExistsError: the folder holds something else, or a run with other settings.
        ValueError: the data or the teacher cannot be this run's.
    """
    check_run(config.run)
    folder = Path(config.run.output)
    settings = folder / "config.json"
    # Other programs have files of that name too.
    there = own_settings(settings, RecipeConfig().as_dict(), sections=True)
    if there is not None:
        differences = config.differences(there)
        if differences and not _begun(folder):
            write_json(settings, config.as_dict())  # of a run that was refused or left before it kept anything
        elif differences:
            raise FileExistsError(
                f"output must be a new folder or a run with the same settings, got {str(folder)!r} with other ones "
                f"(there -> asked for): {'; '.join(differences)}"
            )
        return None if (folder / "results.json").is_file() else folder
    folder.mkdir(parents=True, exist_ok=True)
    write_json(settings, config.as_dict())
    return folder


def attempt(name: str, work: Callable[[], object]) -> int:
    """Do what a command is to do in its folder and return its exit code; what ends it early is said in one line.

    Args:
        name: of the command.
        work: may be taken up again after an error of a file or an interruption.
    """
    try:
        work()
    except (ValueError, FileExistsError) as error:
        print(f"gracekit {name}: error: {error}", file=sys.stderr)
        return 2
    except (OSError, SafetensorError, RuntimeError) as error:
        # This is how torch.save says that a disk is full.
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        what = str(error).partition("\n")[0]
        print(f"gracekit {name}: error: {what}; the same command goes on from the last checkpoint", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("Interrupted; the same command goes on from the last checkpoint.")
        return 130
    return 0


def _begun(folder: Path) -> bool:
    """Whether a folder holds more than what is written before anything is trained."""
    before = {"config.json", "seconds.json", *(BAD_RECORDS.format(name) for name in SPLITS)}
    return any(path.is_file() for path in folder.rglob("*") if str(path.relative_to(folder)) not in before)


def open_run(config: RecipeConfig, folder: Path, bars: Progress, *, held_out: bool = False) -> Run:
    """Return what all students of a run need, with the teacher's answers to the training set.

    Args:
        config: of the run.
        folder: where the teacher's answers are kept.
        bars: to show progress in.
        held_out: have the teacher read the test questions too.
    """
    device = config.run.torch_device()
    train, test = load_splits(config.run, folder)
    path = config.run.teacher
    if config.run.data and not path:
        path = str(own_teacher(config.run, train, test, folder / "teacher", bars))
    teacher, tokenizer = load_teacher(path)
    _say_unknown(describe(train, test, tokenizer))
    teacher.to(device)
    return Run(
        config,
        folder,
        device,
        train,
        test,
        tokenizer,
        replace(STUDENT, image_size=config.run.image_size),
        path,
        _teacher_outputs(teacher, train, tokenizer, folder / "stages" / "teacher.safetensors", bars),
        bars,
        _teacher_outputs(teacher, test, tokenizer, folder / "stages" / "teacher-test.safetensors", bars)
        if held_out
        else None,
    )


def _say_unknown(found: dict[str, Any]) -> None:
    if found["unknown_words"]:
        say(
            f"{found['unknown_words']:,} words of the test questions are not among the training set's: the models read them as "
            f"<unk>, {found['unknown_words_read']:,} times"
        )
    if found["unknown_answers"]:
        say(
            f"{found['unknown_answers']:,} test answers have words that no training answer or question has: they count as wrong"
        )


class Clock:
    """Adds up the seconds of named parts over all sittings of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}
        self.name, self.since = "", 0.0

    def __call__(self, name: str) -> Clock:
        """Name the part that the with block measures."""
        self.name = name
        return self

    def __enter__(self) -> None:
        self.since = time.monotonic()

    def __exit__(self, *error: object) -> None:
        spent = time.monotonic() - self.since
        self.seconds[self.name] = round(self.seconds.get(self.name, 0.0) + spent, 2)
        write_json(self.path, self.seconds)


def announce(folder: Path) -> None:
    """Say that a run goes on, where it does."""
    done = sorted(path.parent.name for path in folder.glob("stages/*/log.json"))
    if done:
        say(f"Going on in {folder}; done already: {', '.join(done)}")


def _teacher_outputs(
    teacher: LlavaForConditionalGeneration,
    split: VqaSplit,
    tokenizer: PreTrainedTokenizerFast,
    path: Path,
    bars: Progress,
) -> TeacherOutputs:
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        task = bars.add_task(f"teacher: read {len(split.questions):,} questions", total=len(split.shown))
        outputs = teacher_outputs(teacher, split, tokenizer, advance=lambda count: bars.advance(task, count))
        part = path.with_name(path.name + ".part")
        save_file({"logits": outputs.logits, "visual_tokens": outputs.visual_tokens}, part)
        part.replace(path)
    saved = load_file(path)
    return TeacherOutputs(saved["logits"], saved["visual_tokens"])
