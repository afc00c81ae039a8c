"""Argument errors: each names the argument, the rule and the value, before any work is done."""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Integral, Real

import torch
from torch import Tensor, nn


def check_real(
    name: str, value: object, *, low: float = -math.inf, high: float = math.inf, open_low: bool = False
) -> float:
    """Return ``value`` as a float in [low, high], or in (low, high] with ``open_low``."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {name}={value!r}")
    number = float(value)
    inside = (low < number if open_low else low <= number) and number <= high
    if not (inside and -math.inf < number < math.inf):
        bracket = "(" if open_low else "["
        raise ValueError(f"{name} must be finite and in {bracket}{low:g}, {high:g}], got {name}={value!r}")
    return number


def check_int(name: str, value: object, *, low: int, high: int | None = None) -> int:
    """Return ``value`` as an int of at least ``low`` and at most ``high``."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {name}={value!r}")
    if int(value) < low or (high is not None and int(value) > high):
        upper = "" if high is None else f" and at most {high}"
        raise ValueError(f"{name} must be at least {low}{upper}, got {name}={value!r}")
    return int(value)


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {name}={value!r}")


def check_module(name: str, value: object) -> None:
    """Raise unless ``value`` is a module."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {type(value).__name__}")


def check_floating(name: str, tensor: object) -> None:
    """Raise unless ``tensor`` is a tensor of a real floating dtype."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name} must have a floating dtype, got {tensor.dtype}")
    if tensor.dtype.itemsize < 2:
        raise TypeError(f"{name} must have a floating dtype of at least 16 bits, got {tensor.dtype}")


def check_integral(name: str, tensor: object) -> None:
    """Raise unless ``tensor`` is a tensor of integers (bool is none)."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must have an integer dtype, got {tensor.dtype}")


def check_rank(name: str, tensor: Tensor, ranks: Collection[int], layout: str) -> None:
    """Raise unless ``tensor`` has one of ``ranks`` dimensions; ``layout`` says what they mean."""
    if tensor.ndim not in ranks:
        raise ValueError(f"{name} must have shape {layout}, got {tuple(tensor.shape)}")


def check_same_device(**tensors: Tensor) -> None:
    """Raise unless all tensors are on one device."""
    devices = {name: tensor.device for name, tensor in tensors.items()}
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{' and '.join(tensors)} must be on one device, got {listed}")


def has_values(tensor: Tensor) -> bool:
    """Whether values of ``tensor`` can be looked at: not while compiling, not on meta or fake tensors."""
    if torch.compiler.is_compiling() or tensor.is_meta:
        return False
    return type(tensor) in (Tensor, torch.nn.Parameter)


def check_values(condition: Tensor, message: str) -> None:
    """Demand that every element of a bool tensor holds, without a device-to-host sync.

    A ValueError on the CPU, an asynchronous assertion on an accelerator, nothing where there are no values to look at.
    """
    if not has_values(condition):
        return
    if condition.device.type == "cpu":
        if not bool(condition.all()):
            raise ValueError(message)
    else:
        torch._assert_async(condition.all(), message)


def check_not_negative(name: str, number: Tensor) -> None:
    """Demand a tensor of one element that is not below 0 (NaN is not), as :func:`check_values` does."""
    shown = f", got {name}={number.item()!r}" if has_values(number) and number.device.type == "cpu" else ""
    check_values(~(number < 0), f"{name} must be at least 0{shown}")
