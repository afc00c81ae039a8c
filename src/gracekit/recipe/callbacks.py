"""What happens beside a training step: the controller's ascent, its state in checkpoints, warnings, a progress bar."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainingArguments

from gracekit.control import LagrangianController
from gracekit.recipe.calibration import TauCalibration

if TYPE_CHECKING:
    from gracekit.recipe.trainer import GraceTrainer

CONTROLLER_FILE = "grace_controller.safetensors"
_LEAST_SHARE, _PATIENCE = 0.01, 3


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
        self.low = self.saturated = 0

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up the controller where the checkpoint left it."""
        if self.calibration is not None:
            self.calibration.begin(state.max_steps)
        controller = self.trainer.objective.controller
        self.saturated = int(controller.saturated_steps)
        if state.global_step:
            folder = self.trainer.resumed_from or Path(args.output_dir) / f"checkpoint-{state.global_step}"
            load_controller(controller, folder / CONTROLLER_FILE, self.calibration)
        self.trainer.meters.begin(int(controller.saturated_steps))

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
            controller.skipped += ~self.calibration.values[-1].isfinite()
            if tau is not None:
                controller.target = tau
            return
        controller.step(value, reduce="sum")

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Warn once when a step had no finite L_GDKD, the multiplier rests on a bound, or the relational part is drowned."""
        logs = logs or {}
        if not math.isfinite(logs.get("ce", 0.0)):
            raise ValueError(
                f"the cross-entropy must stay finite, got {logs['ce']} up to step {state.global_step}: training has diverged "
                f"(learning_rate={args.learning_rate:g})"
            )
        if logs.get("skipped"):
            self._warn(
                "skipped",
                f"L_GDKD was not finite in {logs['skipped']:.0f} steps up to step {state.global_step}, in which beta stayed "
                "where it was",
            )
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
        steps = int(controller.saturated_steps) - self.saturated
        if steps > max(20, state.max_steps // 10):
            side = "floor" if abs(beta - bounds[0]) < abs(beta - bounds[1]) else "ceiling"
            self._warn(
                "saturation",
                f"beta has been on a bound for {steps} steps (now {beta:.3g}, {side}): "
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
        save_controller(self.trainer.objective.controller, folder / CONTROLLER_FILE, self.calibration)


def save_controller(controller: LagrangianController, path: Path, calibration: TauCalibration | None) -> None:
    """Write a controller's state, and how far its calibration is, beside and then in place."""
    tensors = {name: value.cpu().clone() for name, value in controller.state_dict().items()}
    if calibration is not None:
        tensors |= calibration.state()
    part = path.with_name(path.name + ".part")
    save_file(tensors, part)
    os.replace(part, path)


def load_controller(controller: LagrangianController, path: Path, calibration: TauCalibration | None) -> None:
    """Take up what :func:`save_controller` wrote; a tau that was found there becomes the controller's target."""
    saved = load_file(path)
    kept = {name: saved.pop(name) for name in list(saved) if name.startswith("calibration_")}
    controller.load_state_dict(saved)
    if calibration is not None and kept:
        calibration.load(kept)
        if calibration.target is not None:
            controller.target = calibration.target


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
    numbered = [path for path in found if path.name.removeprefix("checkpoint-").isdecimal()]  # a copy has another name
    return max(numbered, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)
