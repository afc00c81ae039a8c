"""Outputs of any nn.Module, captured by hook while a with block lasts.

Asking a model for all its hidden states keeps every layer alive; a tap keeps the one tensor that is wanted. It stores
the tensor as the module returned it, without copying, indexing or detaching, so that gradients flow through it as they
flow through the model. What changes it in place afterwards, such as an nn.ReLU(inplace=True), changes what is stored.

Under activation checkpointing a module runs again during the backward pass. That second run is not captured: its tensor
belongs to a graph that is thrown away.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor, nn

__all__ = ["ActivationTap"]


class HookContext:
    """A context manager whose hooks are installed on entry and released on exit, whatever happens in between."""

    def __init__(self) -> None:
        self._installed: ExitStack | None = None

    def _install(self, stack: ExitStack) -> None:
        """Install the hooks, each with its release pushed on ``stack``."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        if self._installed is not None:
            raise RuntimeError(f"{self!r} is already entered; leave it first, or make a second tap")
        with ExitStack() as stack:
            self._install(stack)
            self._installed = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        installed, self._installed = self._installed, None
        if installed is not None:
            installed.close()


class ActivationTap(HookContext):
    """Capture what one module of a model returns, by its dotted path.

    Only the latest call is kept, so memory does not grow with the number of forwards, and a value that was not taken
    never passes for that of a later batch. A module that returns a tuple, a list or a mapping gives its first tensor.
    Inside a checkpointed region with ``use_reentrant=True`` modules run without gradients, so the captured tensor has
    none either; checkpoint with ``use_reentrant=False`` to train through it.

    Args:
        model: any nn.Module.
        path: the module's name as ``model.named_modules()`` spells it; ``""`` is the model itself.

    Raises:
        TypeError: ``model`` is no nn.Module, or ``path`` no string.
        ValueError: no module has that name; the message lists those with a similar one.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> with ActivationTap(model, "1") as tap:
        ...     logits = model(torch.randn(3, 4))
        ...     hidden = tap.pop()
        >>> hidden.shape
        torch.Size([3, 8])
    """

    def __init__(self, model: nn.Module, path: str) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if not isinstance(path, str):
            raise TypeError(f"path must be a string, got path={path!r}")
        self.path = path
        self._module = _find_module(model, path)
        self._output: object = None
        self._seen = False

    def pop(self) -> Tensor:
        """Return the output of the module's latest call, and forget it.

        Returns:
            The tensor itself, part of its graph; (B, S, d) for a transformer block.

        Raises:
            RuntimeError: the module was not called since the tap was entered or last popped. A model that was compiled
                before the tap was entered does not run hooks: enter the tap first.
            TypeError: what the module returned holds no tensor.
        """
        if not self._seen:
            raise RuntimeError(
                f"no call of module {self.path!r} was seen since the tap was entered or last popped; run the model "
                "inside the with block, once per pop(), and enter the tap before torch.compile first runs the model"
            )
        output, self._output, self._seen = self._output, None, False
        tensor = first_tensor(output)
        if tensor is None:
            raise TypeError(f"module {self.path!r} must return a tensor or start with one, got {type(output).__name__}")
        return tensor

    def _install(self, stack: ExitStack) -> None:
        self._output, self._seen = None, False
        stack.callback(self._module.register_forward_hook(self._record).remove)

    def _record(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        if not _in_backward():
            self._output, self._seen = output, True

    def __repr__(self) -> str:
        return f"ActivationTap({type(self._module).__name__}, {self.path!r})"


def first_tensor(output: object) -> Tensor | None:
    """Return ``output``, or the first tensor of a tuple, list or mapping, or None."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, tuple | list):
        return next((item for item in output if isinstance(item, Tensor)), None)
    return None


def _find_module(model: nn.Module, path: str) -> nn.Module:
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if path in modules:
        return modules[path]
    close = difflib.get_close_matches(path, modules, n=3)
    hint = f"; close matches: {', '.join(map(repr, close))}" if close else f"; the model has {len(modules) - 1} modules"
    raise ValueError(f"path must name a module of {type(model).__name__}, got path={path!r}{hint}")


def _in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread: a forward then is a checkpoint's replay.

    torch.utils.checkpoint asks the same question the same way. A compiled graph replays without running Python, and the
    call cannot be traced, so there the answer is no.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
