"""Capturing what runs over tensors of fixed shape and place in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def captured(run: Callable[[], Any], *, warm_up: int, pool: Any = None) -> Callable[[], Any]:
    """Return a replay of ``run`` from a CUDA graph; what ``run`` returned is overwritten at each replay.

    Args:
        run: what is captured.
        warm_up: how often it is called first, so that everything it needs is loaded.
        pool: memory that graphs share of which no two are replayed at once (``torch.cuda.graph_pool_handle()``). None: one's own.
    """
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_up):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        out = run()

    def replay(keep: object = run) -> Any:  # the graph reads tensors that ``run`` holds
        graph.replay()
        return out

    return replay
