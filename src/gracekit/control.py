r"""A Lagrange multiplier that follows its constraint (GRACE, arXiv 2601.22709, section 3.3).

To minimise the cross-entropy subject to :math:`\mathcal L_\mathrm{GDKD} \le \tau`, projected dual ascent once an optimiser step:

.. math::
    m \leftarrow d\, m + (1 - d)\, \mathcal L_\mathrm{GDKD}, \qquad
    \beta \leftarrow \mathrm{clip}(\beta + \eta\,(m - \tau), \beta_{\min}, \beta_{\max})

A :math:`\tau` that the loss never reaches pins :math:`\beta` at its ceiling, where the controller is a constant: watch
``saturated_steps``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from gracekit._checks import check_choice, check_real
from gracekit._distributed import all_sum, world_size

_LARGEST = torch.finfo(torch.float32).max  # the buffers hold no more


class LagrangianController(nn.Module):
    """Projected dual ascent on one multiplier.

    Its state is four 0-d buffers: ``multiplier`` (beta) and ``ema`` (m; NaN before the first value) in float32, whatever dtype
    the module around it is cast to; ``skipped``, values that were NaN or infinite; ``saturated_steps``, steps that ended on
    a bound. They are read with a sync of the reader's choosing; :meth:`step` itself has none.

    Args:
        target: tau, what the value should come down to.
        lr: eta >= 0, ascent per step and unit of the gap; 0 keeps the multiplier fixed.
        initial: beta before the first step, within ``bounds``.
        bounds: least and greatest multiplier, 0 <= least <= greatest.
        ema_decay: d in [0, 1).

    Raises:
        TypeError: an option that is no number.
        ValueError: an option out of range.

    Example:
        >>> controller = LagrangianController(target=0.35, lr=0.1)
        >>> round(controller.step(1.35).item(), 4)
        1.1
        >>> controller.step(float("nan")).item() == controller.multiplier.item(), controller.skipped.item()
        (True, 1)
    """

    multiplier: Tensor
    ema: Tensor
    skipped: Tensor
    saturated_steps: Tensor

    def __init__(
        self,
        target: float = 0.35,
        *,
        lr: float = 0.0015,
        initial: float = 1.0,
        bounds: tuple[float, float] = (0.1, 5.0),
        ema_decay: float = 0.99,
    ) -> None:
        super().__init__()
        self.target = check_real("target", target, low=-_LARGEST, high=_LARGEST)
        self.lr = check_real("lr", lr, low=0.0, high=_LARGEST)
        if not isinstance(bounds, Sequence) or len(bounds) != 2:
            raise ValueError(f"bounds must be (least, greatest), got bounds={bounds!r}")
        low = check_real("bounds[0]", bounds[0], low=0.0)
        self._bounds = (low, check_real("bounds[1]", bounds[1], low=low))
        self.initial = check_real("initial", initial, low=low, high=self.bounds[1])
        self.ema_decay = check_real("ema_decay", ema_decay, low=0.0, high=1.0)
        if self.ema_decay == 1.0:
            raise ValueError("ema_decay must be below 1, got ema_decay=1.0")
        self._limits = _within_float32(*self.bounds)
        self.register_buffer("multiplier", torch.tensor(self.initial, dtype=torch.float32).clamp(*self._limits))
        self.register_buffer("ema", torch.tensor(math.nan, dtype=torch.float32))
        self.register_buffer("skipped", torch.tensor(0, dtype=torch.long))
        self.register_buffer("saturated_steps", torch.tensor(0, dtype=torch.long))

    @property
    def bounds(self) -> tuple[float, float]:
        """Least and greatest multiplier; they stay what they were made."""
        return self._bounds

    @torch.no_grad()
    def step(self, value: Tensor | float, weight: Tensor | float | None = None, *, reduce: str = "mean") -> Tensor:
        """Take one projected ascent step and return the new multiplier; once an optimiser step, without a host sync.

        Under ``torch.distributed`` every rank must call it; the multiplier is then the same on all.

        Args:
            value: L_GDKD of this rank, a number or a tensor of one element.
            weight: with ``reduce="mean"``, what this rank's value weighs: its sum of gates. None weighs all ranks alike;
                where no rank weighs anything, the step is skipped.
            reduce: ``"mean"`` over the ranks, or ``"sum"`` of parts that were computed with a global ``gate_sum``.

        Returns:
            A copy of the multiplier, 0-d. A NaN or infinite value leaves multiplier and EMA as they are and counts in
            ``skipped``.

        Raises:
            TypeError: a value or weight that is no number.
            ValueError: a value or weight of more than one element, a weight with ``reduce="sum"``, an unknown ``reduce``.
        """
        check_choice("reduce", reduce, ("mean", "sum"))
        if reduce == "sum" and weight is not None:
            raise ValueError("weight belongs to reduce='mean', got reduce='sum'")
        value = self._scalar("value", value)
        if reduce == "sum":
            value = all_sum(value)
        else:
            share = torch.ones_like(value) if weight is None else self._scalar("weight", weight)
            if world_size() > 1:
                part, share = all_sum(torch.stack((torch.where(share > 0, value * share, 0.0), share)))
                value = part / share
            # Without a supervised token there is nothing to learn of the constraint.
            value = torch.where(share > 0, value, math.nan)
        first = self.ema.isnan()
        ema = torch.where(first, value, self.ema_decay * self.ema + (1.0 - self.ema_decay) * value)
        moved = (self.multiplier + self.lr * (ema - self.target)).clamp(*self._limits)
        usable = value.isfinite() & moved.isfinite()
        self.ema.copy_(torch.where(usable, ema, self.ema))
        self.multiplier.copy_(torch.where(usable, moved, self.multiplier))
        at_bound = (self.multiplier <= self._limits[0]) | (self.multiplier >= self._limits[1])
        self.saturated_steps += usable & at_bound
        self.skipped += ~usable
        return self.multiplier.clone()

    def _scalar(self, name: str, value: Tensor | float) -> Tensor:
        if not isinstance(value, Tensor):
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"{name} must be a number or a tensor of one element, got {type(value).__name__}")
            # A number beyond float32 is as infinite as the buffers can tell.
            beyond = abs(value) > torch.finfo(torch.float32).max
            return torch.full_like(self.multiplier, math.inf if beyond else float(value))
        if value.numel() != 1:
            raise ValueError(f"{name} must hold one element, got shape {tuple(value.shape)}")
        if value.is_complex():
            raise TypeError(f"{name} must be a real number, got {value.dtype}")
        return value.detach().reshape(()).to(self.multiplier)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Load a state; a multiplier that comes from under other bounds is brought within these."""
        super()._load_from_state_dict(*args, **kwargs)
        with torch.no_grad():
            self.multiplier.clamp_(*self._limits)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move with the module but keep the precision: steps of 1e-3 vanish in bfloat16."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype or moved.is_meta else tensor.to(moved.device)

        return super()._apply(move, recurse)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """Return the constructor's arguments."""
        return f"target={self.target}, lr={self.lr}, initial={self.initial}, bounds={self.bounds}, ema_decay={self.ema_decay}"


def _within_float32(low: float, high: float) -> tuple[float, float]:
    """Return the bounds rounded inwards to float32, so that a float32 between them is between the given ones."""
    near = torch.tensor((low, high), dtype=torch.float32, device="cpu")
    inwards = torch.nextafter(near, near.flip(0))
    rounded_low = (near[0] if near[0].item() >= low else inwards[0]).item()
    rounded_high = (near[1] if near[1].item() <= high else inwards[1]).item()
    return (rounded_low, rounded_high) if rounded_low <= rounded_high else (near[0].item(), near[0].item())
