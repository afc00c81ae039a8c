"""What a log entry says: losses of the global batch, the controller, learned scales, speed and memory."""

from __future__ import annotations

import functools
import math
import resource
import sys
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from gracekit._distributed import all_sum
from gracekit.quant.lsq import LSQFakeQuantizer

if TYPE_CHECKING:
    from gracekit.recipe.trainer import GraceTrainer

_COUNTS = ("gates", "tokens", "visual")
_SQUARES = ("relational_square", "total_square")


class Meters:
    """Sums over the micro-batches since the last log entry. Nothing is read from the device before :meth:`read`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._saturated = 0
        self._step_value: Tensor | None = None
        self._reset()

    def begin(self, saturated_steps: int) -> None:
        """Say how many steps the controller has sat on a bound before the training."""
        self._saturated = saturated_steps

    def _reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = self._supervised = 0
        self._since = time.monotonic()

    def _add(self, name: str, value: Tensor) -> None:
        value = value.detach().double()
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def add(self, parts: dict[str, Tensor], gate_sum: Tensor | None, supervised: int, mask: Tensor) -> None:
        """Take a micro-batch's losses, which are parts of its step's, its sum of gates and its numbers of tokens."""
        for name, value in parts.items():
            self._add(name, value)
        if gate_sum is not None:
            self._add("gates", gate_sum)
            value = parts["gdkd"]
            self._step_value = value if self._step_value is None else self._step_value + value
        self._supervised += supervised
        self._add("tokens", (mask.diagonal(dim1=-2, dim2=-1) >= 0).sum() if mask.ndim == 4 else (mask != 0).sum())

    def watch(self, tokens: Tensor, tapped: Tensor) -> None:
        """Measure what the relational part adds to the gradient at the layer where its tokens are taken."""
        self._add("visual", tokens.new_tensor(len(tokens), dtype=torch.float64))
        for name, tensor in zip(_SQUARES, (tokens, tapped), strict=True):
            if tensor.requires_grad:
                hook = functools.partial(self._add_square, name)
                tensor.register_hook(hook)  # type: ignore[no-untyped-call]

    def _add_square(self, name: str, gradient: Tensor) -> None:
        self._add(name, gradient.float().square().sum())

    def end_step(self) -> Tensor | None:
        """Count an optimiser step, and return this rank's part of its L_GDKD, or None where there is none."""
        self._steps += 1
        value, self._step_value = self._step_value, None
        return value

    def read(self, trainer: GraceTrainer) -> dict[str, float]:
        """Return the entry, means over the optimiser steps since the last one, and start anew. On all ranks together."""
        if not self._sums or not self._steps:
            return {}
        names = sorted(self._sums)
        sums = torch.stack([*(self._sums[name] for name in names), torch.tensor(self._supervised, device=self.device)])
        values = all_sum(sums).tolist()
        supervised: float = values.pop()
        total = dict(zip(names, values, strict=True))
        seconds = max(time.monotonic() - self._since, 1e-9)
        entry = {name: value / self._steps for name, value in total.items() if name not in _COUNTS + _SQUARES}
        if "gates" in total:
            controller = trainer.objective.controller
            entry["gate_mean"] = total["gates"] / max(1.0, supervised)
            entry |= {"beta": controller.multiplier.item(), "skipped": float(controller.skipped)}
            ema = controller.ema.item()
            entry |= {"ema": ema} if math.isfinite(ema) else {}  # there is none before the controller's first step
            entry |= {"tau": controller.target} if trainer.tau_is_known() else {}
            saturated = int(controller.saturated_steps)
            entry["saturated_share"] = (saturated - self._saturated) / self._steps
            self._saturated = saturated
        if total.get("total_square") and total["visual"]:  # of text alone there is nothing to say
            entry["rcka_gradient_share"] = (total.get("relational_square", 0.0) / total["total_square"]) ** 0.5
        entry["tokens_per_second"] = total["tokens"] / seconds
        entry["memory_gib"] = peak_memory(self.device) / 2**30
        entry |= scale_statistics(trainer.model)
        self._reset()
        return entry


def scale_statistics(model: torch.nn.Module) -> dict[str, float]:
    """Return the least, mean (geometric) and greatest learned scale of a prepared model; nothing of another one."""
    scales = [module.log_scale.detach() for module in model.modules() if isinstance(module, LSQFakeQuantizer)]
    if not scales:
        return {}
    whole = [scale.full_tensor() if isinstance(scale, DTensor) else scale for scale in scales]
    mean = sum(scale.double().sum() for scale in whole) / sum(scale.numel() for scale in whole)
    least, greatest = (torch.stack([pick(scale) for scale in whole]) for pick in (torch.min, torch.max))
    found = torch.stack([least.min().double(), torch.as_tensor(mean), greatest.max().double()]).exp().tolist()
    return dict(zip(("scale_min", "scale_mean", "scale_max"), found, strict=True))


def peak_memory(device: torch.device) -> float:
    """Return the most bytes that tensors on the GPU, or this process on a CPU, have held."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
