"""Memory through which programs of a product hand each other sums: one for all weights of a model.

A product finds it in the cache, where the one before it has left it. Of its own, each weight's would have come from memory.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

WORDS = 1 << 20  # what eight programs for each of Hopper's multiprocessors take

_numbers = itertools.count()
_workspaces: WeakValueDictionary[int, Workspace] = WeakValueDictionary()


class Workspace:
    """Zeros on each device, and zeros again after every product. Two products at once must not share it.

    It is no part of what a weight is: any equals any other.
    """

    def __init__(self) -> None:
        self.number = next(_numbers)
        self._zeros: dict[torch.device, Tensor] = {}
        _workspaces[self.number] = self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Workspace)

    def __hash__(self) -> int:
        return hash(Workspace)

    def __reduce__(self) -> tuple[type[Workspace], tuple[()]]:
        return Workspace, ()

    def on(self, device: torch.device) -> Tensor:
        """Return its words on a CUDA device; none while a graph is captured, if there have been none before."""
        if device not in self._zeros:
            if torch.cuda.is_current_stream_capturing():
                return torch.empty(0, dtype=torch.int32, device=device)
            torch.cuda.synchronize(device)  # who had this memory before may still be at it
            # On a stream of its own it comes from no pool that a graph's compiler keeps count of.
            with torch.cuda.stream(_stream(device)):
                self._zeros[device] = torch.zeros(WORDS, dtype=torch.int32, device=device)
            _stream(device).synchronize()
        return self._zeros[device]


def workspace_of(number: int, device: torch.device) -> Tensor:
    """Return the words of the workspace with this number."""
    return _workspaces[number].on(device)


@functools.cache
def _stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
