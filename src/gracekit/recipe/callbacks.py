"""What happens beside a training step: the controller's ascent, its state in checkpoints, warnings, a progress bar."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from gracekit._checks import check_int, check_real
from gracekit._distributed import all_sum

if TYPE_CHECKING:
    from gracekit.recipe.trainer import GraceTrainer

CONTROLLER_FILE = "grace_controller.safetensors"
_LEAST_SHARE, _PATIENCE = 0.01, 3


class TauCalibration:
    """Finds the controller's target from the first steps: a quantile of their L_GDKD.

    L_GDKD falls by an order of magnitude in training, and where it ends depends on data, vocabulary and teacher. A fixed tau is
    then either never reached or never missed, and beta sits on a bound. The low end of what the first steps reached is a
    level that this student passes and can hold. Until it is known beta stays where it starts.

    Args:
        steps: optimiser steps to look at, at least 2.
        quantile: of their L_GDKD, in [0, 1].

    Raises:
        TypeError: a number of the wrong type.
        ValueError: one out of range.
    """

    def __init__(self, steps: int, quantile: float = 0.1) -> None:
        self.steps = check_int("steps", steps, low=2)
        self.quantile = check_real("quantile", quantile, low=0.0, high=1.0)
        self.values: list[Tensor] = []
        self.target: float | None = None

    def add(self, value: Tensor) -> float | None:
        """Take the next step's L_GDKD; once there are enough, return tau."""
        self.values.append(all_sum(value.detach().double()))
        if len(self.values) == self.steps:
            self.target = torch.stack(self.values).quantile(self.quantile).item()
        return self.target

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps."""
        found = {"calibration_values": torch.stack(self.values).cpu() if self.values else torch.zeros(0).double()}
        return found if self.target is None else found | {"calibration_target": torch.tensor(self.target).double()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take up what a checkpoint kept."""
        self.values = list(state["calibration_values"])
        self.target = state["calibration_target"].item() if "calibration_target" in state else None


class ControllerCallback(TrainerCallback):  # type: ignore[misc]
    """Steps a trainer's controller with the optimiser, and keeps its state with the checkpoints.

    The state file is the last thing written into a checkpoint, and is moved into place at once: a checkpoint that holds it is
    whole.
    """

    def __init__(
        self, trainer: GraceTrainer, *, relational_warmup: int = 0, calibration: TauCalibration | None = None
    ) -> None:
        self.trainer, self.calibration = trainer, calibration
        self.relational_warmup, self.relational_weight = relational_warmup, trainer.objective.relational_weight
        self.warned: set[str] = set()
        self.low = 0

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up the controller where the checkpoint left it."""
        if not state.global_step:
            return
        saved = load_file(Path(args.output_dir) / f"checkpoint-{state.global_step}" / CONTROLLER_FILE)
        kept = {name: saved.pop(name) for name in list(saved) if name.startswith("calibration_")}
        controller = self.trainer.objective.controller
        controller.load_state_dict(saved)
        if self.calibration is not None and kept:
            self.calibration.load(kept)
            if self.calibration.target is not None:
                controller.target = self.calibration.target

    def on_step_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise the relational part's weight while it warms up."""
        share = min(1.0, (state.global_step + 1) / self.relational_warmup) if self.relational_warmup else 1.0
        self.trainer.objective.relational_weight = self.relational_weight * share

    def on_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Take one step of projected dual ascent, with L_GDKD of the global batch."""
        value = self.trainer.meters.end_step()
        if value is None:
            return
        controller = self.trainer.objective.controller
        if self.calibration is not None and self.calibration.target is None:
            tau = self.calibration.add(value)
            if tau is not None:
                controller.target = tau
            return
        controller.step(value, reduce="sum")

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Warn once when the multiplier has come to rest on a bound, and when the relational part is drowned."""
        logs = logs or {}
        if "beta" in logs and self.trainer.objective.controller.lr:
            self._saturation(state)
        share = logs.get("rcka_gradient_share")
        warm = state.global_step > self.relational_warmup
        self.low = self.low + 1 if warm and share is not None and share < _LEAST_SHARE else 0
        if self.low >= _PATIENCE:
            self._warn(
                "relational",
                f"L_RCKA gives {100 * share:.2g} % of the gradient at the layer it acts on: raise its weight "
                f"(now {self.trainer.objective.relational_weight:g}), or it only costs time",
            )

    def _saturation(self, state: Any) -> None:
        controller = self.trainer.objective.controller
        beta, bounds = controller.multiplier.item(), controller.bounds
        if controller.saturated_steps.item() > max(20, state.max_steps // 10):
            side = "floor" if abs(beta - bounds[0]) < abs(beta - bounds[1]) else "ceiling"
            self._warn(
                "saturation",
                f"beta has been on a bound for {controller.saturated_steps.item()} steps (now {beta:.3g}, {side}): "
                f"L_GDKD is at {controller.ema.item():.3g} and tau={controller.target:g}, so the controller is a constant",
            )

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self.warned:
            self.warned.add(kind)
            warnings.warn(text, stacklevel=2)

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the controller's state beside the model's."""
        if not args.should_save:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        tensors = {name: value.cpu().clone() for name, value in self.trainer.objective.controller.state_dict().items()}
        if self.calibration is not None:
            tensors |= self.calibration.state()
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


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of a training, or None."""
    found = [path.parent for path in folder.glob(f"checkpoint-*/{CONTROLLER_FILE}")]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
