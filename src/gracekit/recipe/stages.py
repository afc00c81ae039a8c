"""One training run of a model: from its checkpoint if it was interrupted, not at all if it is done."""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainingArguments, set_seed

from gracekit.objective import GraceObjective
from gracekit.recipe.calibration import TauCalibration
from gracekit.recipe.callbacks import (
    CONTROLLER_FILE,
    StepCallback,
    latest_checkpoint,
    load_controller,
    save_controller,
)
from gracekit.recipe.data import PackedVqa
from gracekit.recipe.trainer import GraceTrainer

CHECKPOINTS = 4


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What one stage does.

    Args:
        name: its folder below the run's.
        losses: see :class:`~gracekit.recipe.trainer.GraceTrainer`.
        steps: optimiser steps.
        learning_rate: at its highest.
        schedule: "constant_with_warmup" or "linear", which falls to 0.
        batch_size: packed examples a step.
        warmup: share of the steps in which the rate rises.
        weight_decay: of parameters with two or more dimensions.
        seed: of the order of the data.
        tau: finds the controller's target in this stage; None: it has one.
    """

    name: str
    losses: str
    steps: int
    learning_rate: float
    schedule: str
    batch_size: int
    warmup: float
    weight_decay: float
    seed: int
    tau: TauCalibration | None = None


def run_stage(
    stage: Stage,
    model: nn.Module,
    data: PackedVqa,
    objective: GraceObjective,
    folder: Path,
    *,
    device: torch.device,
    report: Callable[[int, str], None] = lambda step, text: None,
) -> list[dict[str, float]]:
    """Train a model in place and return its log; a stage that is done is only loaded.

    Args:
        stage: what to do.
        model: with the stage's initial weights.
        data: packed examples, with the teacher's outputs unless the losses need none.
        objective: its controller's state becomes what it was at the end of the stage.
        folder: of the run; the stage keeps to ``folder / stage.name``.
        device: where to train.
        report: called after each step with the number of steps done and the latest losses.
    """
    home = folder / stage.name
    if (home / "log.json").is_file():
        model.load_state_dict(load_file(home / "model.safetensors"))
        load_controller(objective.controller, home / CONTROLLER_FILE, stage.tau)
        model.to(device)
        log: list[dict[str, float]] = json.loads((home / "log.json").read_text())
        return log
    home.mkdir(parents=True, exist_ok=True)
    set_seed(stage.seed)
    trainer = GraceTrainer(
        losses=stage.losses,
        objective=objective,
        calibration=stage.tau,
        model=model,
        train_dataset=data,
        data_collator=data.collate,
        callbacks=[StepCallback(report)],
        args=TrainingArguments(
            output_dir=str(home),
            max_steps=stage.steps,
            per_device_train_batch_size=stage.batch_size,
            learning_rate=stage.learning_rate,
            lr_scheduler_type=stage.schedule,
            warmup_steps=round(stage.warmup * stage.steps),
            weight_decay=stage.weight_decay,
            adam_beta2=0.98,
            max_grad_norm=1.0,
            seed=stage.seed,
            data_seed=stage.seed,
            use_cpu=device.type == "cpu",
            logging_steps=max(1, min(10, stage.steps // 4)),
            save_steps=max(1, -(-stage.steps // CHECKPOINTS)),
            save_total_limit=2,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            report_to="none",
        ),
    )
    checkpoint = latest_checkpoint(home)
    with warnings.catch_warnings():
        # The order of schedule and optimiser steps is the Trainer's business.
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    save_state(model, home / "model.safetensors")
    save_controller(objective.controller, home / CONTROLLER_FILE, stage.tau)
    write_json(home / "log.json", log)
    for left in home.glob("checkpoint-*"):
        shutil.rmtree(left)
    finite: list[dict[str, float]] = only_finite(log)
    return finite


def save_state(module: nn.Module, path: Path) -> None:
    """Write a module's state, beside and then in place."""
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in module.state_dict().items()}
    part = path.with_name(path.name + ".part")
    save_file(tensors, part)
    os.replace(part, path)


def write_text(path: Path, text: str) -> None:
    """Write a text file, beside and then in place."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, beside and then in place; null stands for what is not finite, which JSON has no word for."""
    write_text(path, json.dumps(only_finite(value), indent=1, allow_nan=False) + "\n")


def only_finite(value: Any) -> Any:
    """Return a JSON value with None in the place of each NaN and infinity."""
    if isinstance(value, dict):
        return {key: only_finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [only_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
