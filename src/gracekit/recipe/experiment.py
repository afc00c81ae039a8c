"""Students, their INT4 answers, and the results of a recipe; each part is kept, so an interrupted run goes on."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gracekit.quant import LSQConfig, convert, prepare_qat, quantize_rtn
from gracekit.recipe.config import GraceConfig, RecipeConfig
from gracekit.recipe.data import PackedVqa, longest_answer
from gracekit.recipe.environment import environment
from gracekit.recipe.evaluate import accuracy, generate_answers
from gracekit.recipe.models import build_model, parameter_count, teacher_folder
from gracekit.recipe.own_data import describe
from gracekit.recipe.progress import progress_bars
from gracekit.recipe.runs import Clock, Run, open_run
from gracekit.recipe.stages import Stage, run_stage, write_json
from gracekit.recipe.student_files import save_student
from gracekit.vlm import language_linears

FULL, RTN, QAT = "bf16", "int4-rtn", "int4-qat"


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
    """Return the row of the teacher: what its own training measured, on all test images.

    Raises:
        ValueError: its folder lacks a file, or the record of its training is of something else.
    """
    record = teacher_folder(path) / "training.json"
    try:
        training = json.loads(record.read_text(encoding="utf-8"))
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
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"teacher must be a folder that gracekit teacher wrote, got {str(record)!r} without its record: "
            f"{type(error).__name__}: {error}"
        ) from error


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
