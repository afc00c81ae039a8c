"""The method inside transformers' Trainer: its losses, its parameter groups, and its controller once an optimiser step."""

# B batch, S sequence length, T supervised tokens, V vocabulary

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from gracekit._checks import check_choice
from gracekit.losses import shift_labels
from gracekit.objective import GraceObjective
from gracekit.quant import qat_parameter_groups
from gracekit.quant.lsq import LSQFakeQuantizer
from gracekit.recipe.config import LOSSES
from gracekit.recipe.data import IGNORE_INDEX
from gracekit.vlm import VisualTokenTap

CONTROLLER_FILE = "grace_controller.safetensors"


class GraceTrainer(Trainer):  # type: ignore[misc]
    """Train a vision-language model with GRACE's losses.

    A batch holds ``labels`` (B, S) and, unless ``losses`` is "ce", ``teacher_logits`` (T, V) for its supervised tokens in the
    order in which they stand; for "grace" also ``teacher_tokens``, the teacher's visual tokens packed image after image.

    Args:
        losses: "ce", "kl" (plus a plain KL divergence to the teacher), "gdkd" or "grace".
        objective: weights, gate and controller of "gdkd" and "grace"; its controller is stepped once an optimiser step and is part
            of every checkpoint.
        **kwargs: as transformers' Trainer takes them.

    Raises:
        ValueError: unknown losses, or gradient accumulation, under which the normalisers would be those of the parts.
    """

    def __init__(self, *, losses: str, objective: GraceObjective, **kwargs: Any) -> None:
        check_choice("losses", losses, LOSSES)
        self.optimizer: torch.optim.Optimizer | None = None
        super().__init__(**kwargs)
        if self.args.gradient_accumulation_steps != 1:
            raise ValueError(
                "gradient_accumulation_steps must be 1, because the gate's sum is that of the whole batch, "
                f"got {self.args.gradient_accumulation_steps}"
            )
        self.losses, self.objective = losses, objective.to(self.args.device)
        self.tap = VisualTokenTap(self.model) if losses == "grace" else None
        self._sums: dict[str, Tensor] = {}
        self._calls = 0
        self.latest: tuple[Tensor, Tensor] | None = None
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(ControllerCallback(self))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of one batch; its parts are kept for the log and the controller."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        teacher_logits, teacher_tokens = inputs.pop("teacher_logits", None), inputs.pop("teacher_tokens", None)
        with self.tap or nullcontext() as tap:
            outputs = model(**inputs, use_cache=False)
            tokens, lengths = tap.tokens(inputs) if tap else (None, None)
        if self.losses == "ce":
            loss = F.cross_entropy(outputs.logits.flatten(0, 1).float(), shift_labels(labels).flatten())
            parts = {"ce": loss}
        else:
            student_logits, targets = supervised(outputs.logits, labels, count=len(teacher_logits))
            if self.losses == "kl":
                cross_entropy = F.cross_entropy(student_logits.float(), targets)
                divergence = kl_divergence(
                    student_logits, teacher_logits, self.objective.distillation.config.temperature
                )
                loss, parts = cross_entropy + divergence, {"ce": cross_entropy, "kl": divergence}
            else:
                given = {"student_tokens": tokens, "teacher_tokens": teacher_tokens, "lengths": lengths} if tap else {}
                result = self.objective(student_logits, teacher_logits, targets, **given)
                loss = result.total
                parts = {"ce": result.cross_entropy, "gdkd": result.gated_dkd, "rcka": result.relational}
                self.latest = (result.gated_dkd, result.gate_sum)
        for name, value in parts.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value.detach())) + value.detach()
        self._calls += 1
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return AdamW over weights, vectors without decay, and learned scales at ten times the rate."""
        if self.optimizer is None:
            rate, decay = self.args.learning_rate, self.args.weight_decay
            if any(isinstance(module, LSQFakeQuantizer) for module in self.model.modules()):
                groups = qat_parameter_groups(self.model, lr=rate, weight_decay=decay)
            else:
                trained = [p for p in self.model.parameters() if p.requires_grad]
                groups = [
                    {"params": [p for p in trained if p.ndim >= 2], "lr": rate, "weight_decay": decay},
                    {"params": [p for p in trained if p.ndim < 2], "lr": rate, "weight_decay": 0.0},
                ]
            betas = (self.args.adam_beta1, self.args.adam_beta2)
            self.optimizer = torch.optim.AdamW(groups, betas=betas, eps=self.args.adam_epsilon, fused=True)
        return self.optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save a checkpoint whose weights have the model's own names.

        By default the weights of a vision-language model are saved under the names of published checkpoints, which resuming looks
        up in vain and without a word: it would go on from the weights it finds in memory (transformers #43701).
        """
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            self.model.save_pretrained(folder, state_dict=state_dict, save_original_format=False)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean of each loss since the last entry, and what the controller does."""
        if self._calls and "loss" in logs:
            logs |= {name: value.item() / self._calls for name, value in self._sums.items()}
            self._sums, self._calls = {}, 0
            if self.latest is not None:
                controller = self.objective.controller
                logs |= {"beta": controller.multiplier.item(), "ema": controller.ema.item()}
                logs["saturated_share"] = controller.saturated_steps.item() / max(1, self.state.global_step)
        super().log(logs, *args, **kwargs)


class ControllerCallback(TrainerCallback):  # type: ignore[misc]
    """Steps a trainer's controller with the optimiser, and keeps its state with the checkpoints.

    The state file is the last thing written into a checkpoint, and is moved into place at once: a checkpoint that holds it is
    whole.
    """

    def __init__(self, trainer: GraceTrainer) -> None:
        self.trainer = trainer
        self.warned = False

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up the controller where the checkpoint left it."""
        if state.global_step:
            saved = load_file(Path(args.output_dir) / f"checkpoint-{state.global_step}" / CONTROLLER_FILE)
            self.trainer.objective.controller.load_state_dict(saved)

    def on_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Take one step of projected dual ascent."""
        if self.trainer.latest is not None:
            self.trainer.objective.controller.step(*self.trainer.latest)

    def on_log(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Warn once when the multiplier has come to rest on a bound."""
        controller = self.trainer.objective.controller
        if self.warned or self.trainer.latest is None or controller.lr == 0:
            return
        beta, bounds = controller.multiplier.item(), controller.bounds
        if controller.saturated_steps.item() > max(20, state.max_steps // 10):
            self.warned = True
            side = "floor" if abs(beta - bounds[0]) < abs(beta - bounds[1]) else "ceiling"
            warnings.warn(
                f"beta has been on a bound for {controller.saturated_steps.item()} steps (now {beta:.3g}, {side}): "
                f"L_GDKD is at {controller.ema.item():.3g} and tau={controller.target:g}, so the controller is a constant",
                stacklevel=2,
            )

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the controller's state beside the model's."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        tensors = {name: value.cpu().clone() for name, value in self.trainer.objective.controller.state_dict().items()}
        save_file(tensors, folder / f"{CONTROLLER_FILE}.part")
        os.replace(folder / f"{CONTROLLER_FILE}.part", folder / CONTROLLER_FILE)


class StepCallback(TrainerCallback):  # type: ignore[misc]
    """Tells a progress bar how many steps are done, and the latest loss."""

    def __init__(self, report: Callable[[int, str], None]) -> None:
        self.report, self.text = report, ""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Keep the losses to show."""
        shown = {name: (logs or {}).get(name) for name in ("ce", "kl", "gdkd", "rcka", "beta")}
        self.text = " ".join(f"{name} {value:.3f}" for name, value in shown.items() if value is not None) or self.text

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report."""
        self.report(state.global_step, self.text)


def supervised(logits: Tensor, labels: Tensor, *, count: int) -> tuple[Tensor, Tensor]:
    """Return logits (T, V) and targets (T,) of the supervised tokens, T = ``count``, in order; without a host sync."""
    targets = shift_labels(labels).flatten()
    rows = torch.nonzero_static(targets != IGNORE_INDEX, size=count).squeeze(1)
    return logits.flatten(0, 1)[rows], targets[rows]


def kl_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return T^2 * KL(teacher, student) at a temperature, the mean over tokens: distillation without gate or decoupling."""
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean") * temperature**2


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of a stage, or None."""
    found = [path.parent for path in folder.glob(f"checkpoint-*/{CONTROLLER_FILE}")]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
