"""The whole run: teacher outputs, students, INT4 answers, results; each part is kept, so an interrupted run goes on."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from gracekit.quant import LSQConfig, convert, prepare_qat, quantize_rtn
from gracekit.recipe.config import GraceConfig, RecipeConfig
from gracekit.recipe.data import PackedVqa, TeacherOutputs, VqaSplit, longest_answer
from gracekit.recipe.environment import environment
from gracekit.recipe.evaluate import accuracy, generate_answers
from gracekit.recipe.models import (
    STUDENT,
    ModelSize,
    build_model,
    load_teacher,
    parameter_count,
    teacher_folder,
    teacher_outputs,
)
from gracekit.recipe.own_data import BAD_RECORDS, SPLITS, check_run, describe, load_splits
from gracekit.recipe.progress import progress_bars, say
from gracekit.recipe.stages import Stage, run_stage, write_json
from gracekit.recipe.student_files import save_student
from gracekit.recipe.teacher import own_teacher
from gracekit.vlm import language_linears

FULL, RTN, QAT = "bf16", "int4-rtn", "int4-qat"


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


@dataclass(frozen=True, kw_only=True)
class Student:
    """One student: how it is trained, and the precisions it is finished and judged in.

    Args:
        name: of its stages and, with a precision behind it, of its variants.
        losses: one of LOSSES.
        grace: weights and controller of the losses.
        precisions: "bf16"; "intB-rtn", the BF16 student rounded to B bits; "intB-qat", B bits in the loop of its finish.
    """

    name: str
    losses: str
    grace: GraceConfig
    precisions: tuple[str, ...]


def open_folder(config: RecipeConfig) -> Path | None:
    """Return the run's folder, ready to write to; None if it holds a finished run of these settings.

    Raises:
        FileExistsError: the folder holds something else, or a run with other settings.
        ValueError: the data or the teacher cannot be this run's.
    """
    check_run(config.run)
    folder = Path(config.run.output)
    settings = folder / "config.json"
    if settings.is_file():
        differences = config.differences(json.loads(settings.read_text(encoding="utf-8")))
        if differences and not _begun(folder):
            write_json(settings, config.as_dict())  # of a run that was refused or left before it kept anything
        elif differences:
            raise FileExistsError(
                f"output must be a new folder or a run with the same settings, got {str(folder)!r} with other ones "
                f"(there -> asked for): {'; '.join(differences)}"
            )
        return None if (folder / "results.json").is_file() else folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"output must be a new or empty folder, got {str(folder)!r}, which holds something else")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(settings, config.as_dict())
    return folder


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


def run_recipe(config: RecipeConfig, folder: Path) -> dict[str, Any]:
    """Run, or go on with, a recipe in its folder and return its results."""
    clock = Clock(folder / "seconds.json")
    with progress_bars() as bars:
        with clock("teacher"):
            run = open_run(config, folder, bars)
        variants = [teacher_variant(run.teacher_path)]
        for losses in config.run.losses:
            student = Student(name=losses, losses=losses, grace=config.grace, precisions=(FULL, RTN, QAT))
            variants += train_student(run, student, clock)
    return {
        "environment": environment(run.device),
        "config": config.as_dict() | {"student": asdict(run.size), "finish_steps": config.train.finish},
        "data": describe(run.train, run.test, run.tokenizer),
        "variants": variants,
        "questions": len(run.test.questions),
        "seconds": clock.seconds,
    }


def teacher_variant(path: str) -> dict[str, Any]:
    """Return the row of the teacher: what its own training measured, on all test images."""
    training = json.loads((teacher_folder(path) / "training.json").read_text(encoding="utf-8"))
    return {
        "name": "teacher",
        "losses": "ce",
        "precision": FULL,
        "kernel": "torch",
        "seed": training["config"]["seed"],
        "accuracy": training["accuracy"],
        "questions": training["questions"],
        "parameters": training["parameters"],
        "steps": training["config"]["steps"],
    }


def train_student(run: Run, student: Student, clock: Clock) -> list[dict[str, Any]]:
    """Train a student in all its precisions and return the variants that come of it; what is done already is only loaded."""
    train, seed = run.config.train, run.config.run.seed
    data = PackedVqa(
        run.train,
        run.tokenizer,
        image_tokens=run.size.image_tokens,
        questions_per_image=train.questions_per_image,
        teacher=None if student.losses == "ce" else run.teacher,
    )
    objective = student.grace.objective(student.losses)

    def stage(model: nn.Module, name: str, steps: int, rate: float, schedule: str, objective: Any, order: int) -> Any:
        task = run.bars.add_task(f"{name}: train", total=steps)
        with clock(name):
            log = run_stage(
                Stage(
                    name=f"stages/{name}",
                    losses=student.losses,
                    steps=steps,
                    learning_rate=rate,
                    schedule=schedule,
                    batch_size=train.batch_size,
                    warmup=train.warmup,
                    weight_decay=train.weight_decay,
                    seed=order,
                    # Found in the common start; what comes after has it in its copy of the controller.
                    tau=student.grace.calibration() if name.endswith("-start") else None,
                ),
                model,
                data,
                objective,
                run.folder,
                device=run.device,
                report=lambda step, text: run.bars.update(task, completed=step, note=text),
            )
        run.bars.update(task, completed=steps)
        return log

    start = build_model(run.size, run.tokenizer, seed=seed)
    common = stage(
        start, f"{student.name}-start", train.steps, train.learning_rate, "constant_with_warmup", objective, seed
    )

    def finish(precision: str) -> tuple[nn.Module, list[dict[str, float]]]:
        model, own = copy.deepcopy(start).cpu(), copy.deepcopy(objective)
        if precision != FULL:
            prepare_qat(model, _quantiser(run, precision))
        # The same data in the same order for all precisions.
        name = f"{student.name}-{precision}"
        log = stage(model, name, train.finish, train.finish_learning_rate, "linear", own, seed + 1)
        if precision != FULL:
            home = run.folder / "models" / name
            save_student(model, run.tokenizer, home, centre=run.train.centre, spread=run.train.spread)
        history = common + [entry | {"step": entry["step"] + train.steps} for entry in log]
        return (model.to(torch.bfloat16) if precision == FULL else model), history

    finished: dict[str, tuple[nn.Module, list[dict[str, float]]]] = {}
    variants = []
    for precision in student.precisions:
        trained_in = precision if precision.endswith("-qat") else FULL
        if trained_in not in finished:
            finished[trained_in] = finish(trained_in)
        model, history = finished[trained_in]
        variant = _judge(run, student, precision, model, clock)
        variants.append(variant | {"steps": train.steps + train.finish, "history": history})
    return variants


def _quantiser(run: Run, precision: str) -> LSQConfig:
    """Return what "int4-rtn" or "int8-qat" stands for."""
    bits = int(precision.partition("-")[0].removeprefix("int"))
    return LSQConfig(bits=bits, group_size=run.config.train.group_size)


def _judge(run: Run, student: Student, precision: str, trained: nn.Module, clock: Clock) -> dict[str, Any]:
    def deployed() -> nn.Module:
        model = copy.deepcopy(trained).to(run.device)
        if precision.endswith("-rtn"):
            quantize_rtn(model, _quantiser(run, precision))
        elif precision.endswith("-qat"):
            # Codes come from the trained float32 weights; everything else is cast afterwards.
            convert(model, dtype=torch.bfloat16)
        return model.to(torch.bfloat16)

    name = f"{student.name}-{precision}"
    kernel, answers = _answers(run, name, deployed, clock)
    return {
        "name": name,
        "losses": student.losses,
        "precision": precision,
        "kernel": kernel,
        "seed": run.config.run.seed,
        "accuracy": accuracy(answers, run.test.questions),
        "questions": len(answers),
        "parameters": parameter_count(build_model(run.size, run.tokenizer, seed=0)),
    }


def _answers(run: Run, name: str, deployed: Callable[[], Any], clock: Clock) -> tuple[str, list[str]]:
    """Return a variant's kernel and its answers to the test questions, from its file if it has answered them."""
    path = run.folder / "answers" / f"{name}.json"
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        task = run.bars.add_task(f"{name}: answer", total=len(run.test.questions))
        with clock(f"{name}-answers"):
            model = deployed()
            answers = generate_answers(
                model,
                run.test,
                run.tokenizer,
                image_tokens=run.size.image_tokens,
                max_new_tokens=longest_answer(run.train.questions),
                advance=lambda count: run.bars.advance(task, count),
            )
        write_json(path, {"kernel": kernel_name(model), "answers": answers})
    kept = json.loads(path.read_text(encoding="utf-8"))
    return kept["kernel"], kept["answers"]


def kernel_name(model: nn.Module) -> str:
    """Return what the decoder's linear layers compute with: "torch", or the class of torchao's tensor with its device."""
    weights = [layer.weight for layer in language_linears(model).values()]
    (kind,) = {type(weight) for weight in weights}
    return "torch" if kind is nn.Parameter else f"torchao {kind.__name__} ({weights[0].device.type})"


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
