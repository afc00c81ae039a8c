"""A controller's target from the data: ``--tau auto``."""

from __future__ import annotations

import torch
from torch import Tensor

from gracekit._checks import check_int, check_real
from gracekit._distributed import all_sum

SHARE = 0.7
_FINITE = 0.5  # of the steps, at least; a training that loses more has nothing to hold


class TauCalibration:
    """Finds the controller's target from the first steps: a quantile of their L_GDKD.

    L_GDKD falls by an order of magnitude in training, and where it ends depends on data, vocabulary and teacher. A fixed tau is
    then either never reached or never missed, and beta sits on a bound. The low end of what the first part of a training
    reached is a level that this student can reach. Until it is known beta stays where it starts; while L_GDKD still falls
    steeply no level is worth holding, and a target of the early steps is met ever after and takes beta to its floor. So this takes
    the first 70 % of the training unless told otherwise. Where L_GDKD goes on falling, the target is met from the start, and beta
    falls.

    Args:
        steps: optimiser steps to look at, at least 2; 0: 70 % of the training.
        quantile: of their L_GDKD, in [0, 1].

    Raises:
        TypeError: a number of the wrong type.
        ValueError: one out of range.
    """

    def __init__(self, steps: int = 0, quantile: float = 0.1) -> None:
        self.steps = check_int("steps", steps, low=0)
        if steps == 1:
            raise ValueError("steps must be at least 2, or 0, got steps=1")
        self.quantile = check_real("quantile", quantile, low=0.0, high=1.0)
        self.values: list[Tensor] = []
        self.target: float | None = None

    def begin(self, training_steps: int) -> None:
        """Say how long the training is.

        Raises:
            ValueError: no step would be left for the controller.
        """
        self.steps = self.steps or max(2, round(SHARE * training_steps))
        if self.steps >= training_steps:
            raise ValueError(
                f"tau_steps must be below the training's {training_steps} steps for tau='auto', got tau_steps={self.steps}"
            )

    def add(self, value: Tensor) -> float | None:
        """Take the next step's L_GDKD; once there are enough, return tau.

        Raises:
            ValueError: fewer than half of the steps had a finite L_GDKD; the others are left out.
        """
        self.values.append(all_sum(value.detach().double()))
        if len(self.values) == self.steps:
            values = torch.stack(self.values)
            finite = values[values.isfinite()]
            if len(finite) < _FINITE * self.steps:
                raise ValueError(
                    f"tau='auto' needs a finite L_GDKD in at least half of its tau_steps={self.steps} steps, got {len(finite)}"
                )
            self.target = finite.quantile(self.quantile).item()
        return self.target

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps."""
        found = {"calibration_values": torch.stack(self.values).cpu() if self.values else torch.zeros(0).double()}
        return (
            found
            if self.target is None
            else found | {"calibration_target": torch.tensor(self.target, dtype=torch.float64)}
        )

    def load(self, state: dict[str, Tensor]) -> None:
        """Take up what a checkpoint kept."""
        self.values = list(state["calibration_values"])
        self.target = state["calibration_target"].item() if "calibration_target" in state else None
