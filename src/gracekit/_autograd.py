"""What mathematics under autograd and autocast shares: one precision, and no second derivative that is silently wrong."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def differentiable_once(name: str, gradient: Tensor, source: Tensor) -> Tensor:
    """Return ``gradient`` such that differentiating it raises a RuntimeError that names ``name``.

    ``source`` is the tensor it is the gradient of. Only with ``create_graph=True`` does this do anything.
    """
    if torch.is_grad_enabled() and source.requires_grad:
        return _Once.apply(gradient, source, name)  # type: ignore[no-any-return, no-untyped-call]
    return gradient


def differentiated_twice(name: str) -> RuntimeError:
    """Return what is raised where a second derivative of ``name`` is asked for."""
    return RuntimeError(f"{name} has a closed-form gradient and cannot be differentiated twice")


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, source: Tensor, name: str) -> Tensor:
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        raise differentiated_twice(ctx.name)


def without_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """Return a context in which operations on the device of ``tensor`` keep the dtypes they are given."""
    if tensor.is_meta:  # has no autocast to switch off
        return nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


def autocasts(tensor: Tensor) -> bool:
    """Whether autocast is on for the device of ``tensor``."""
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)
