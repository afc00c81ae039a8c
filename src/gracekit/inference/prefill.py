"""The decoder's part of a prefill from a CUDA graph, for shapes that come again.

A prompt of some hundred tokens keeps the device busy for less time than the host takes to launch its thousand kernels. A graph
takes that time away, but belongs to one shape and takes several prefills to make, so it is made when a shape comes for the second
time. What stands before the decoder (vision tower, the images' place among the tokens) looks at values and runs as it is.
"""

# B samples, L tokens of the padded prompt, C places of the cache

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

# With more tokens the kernels are longer than their launches.
_MOST_TOKENS = 4096
_MOST_GRAPHS = 8
# What a decoder is called with that changes from prompt to prompt. Other tensors (DeepStack's places, say) are selected by, which
# asks for their values.
_CHANGING = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position")


class DecoderGraphs:
    """Stands in for a decoder's forward during prefills into an empty cache.

    Args:
        decoder: of transformers, with what it is called with in keywords.
        cache: what it writes into.
        capture: makes a replay of what is run, with the same tensors.
    """

    def __init__(
        self, decoder: Any, cache: StaticCache, capture: Callable[[Callable[[], Any]], Callable[[], Any]]
    ) -> None:
        self.decoder, self.cache, self._capture = decoder, cache, capture
        self._forward: Callable[..., Any] = decoder.forward
        self._seen: dict[object, tuple[dict[str, Any], Callable[[], Any]] | None] = {}

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Let calls of the decoder come here."""
        held = vars(self.decoder).get("forward")  # of a hook of accelerate's, say
        self.decoder.forward = self
        try:
            yield
        finally:
            del self.decoder.forward
            if held is not None:
                self.decoder.forward = held

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the decoder's output; a graph's is overwritten at its next replay."""
        key = None if args else signature(kwargs)
        if key is None or key not in self._seen:
            if key is not None:
                self._remember(key)
            return self._forward(*args, **kwargs)
        kwargs["attention_mask"] = self._mask(kwargs.get("attention_mask"), _tokens(kwargs))
        call = self._seen[key]
        if call is None:
            held = _copied(kwargs)
            call = self._seen[key] = held, self._capture(lambda: self._forward(**held))
            self.cache.reset()  # what the capture has written
        held, replay = call
        for (_, to), (_, given) in zip(_leaves(held), _leaves(kwargs), strict=True):
            if isinstance(to, Tensor):
                to.copy_(given)
        return replay()

    def _remember(self, key: object) -> None:
        if len(self._seen) >= _MOST_GRAPHS:
            del self._seen[next(iter(self._seen))]
        self._seen[key] = None

    def _mask(self, mask: Any, tokens: Tensor) -> Any:
        """Return an additive mask (B, 1, L, C) for one over tokens (B, L) or none; such masks are given back.

        Left to itself, transformers makes another under capture than without, for which kernels may not have been loaded.
        """
        if isinstance(mask, dict) or (mask is not None and mask.ndim == 4):
            return mask
        rows, length = tokens.shape[:2]
        like: Any = next(self.decoder.parameters())
        seen = torch.ones(
            rows, 1, length, self.cache.layers[0].max_cache_len, dtype=torch.bool, device=like.device
        ).tril_()
        if mask is not None:
            seen[..., :length] &= mask.bool()[:, None, None, :]
        least = torch.finfo(like.dtype).min
        return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, least)


def signature(kwargs: dict[str, Any]) -> object | None:
    """Return what calls that one graph can serve have in common; None for a call that none can."""
    found: list[object] = []
    for name, value in _leaves(kwargs):
        if isinstance(value, Tensor) and name[0] in _CHANGING:
            found.append((name, tuple(value.shape), value.dtype))
        elif value is None or isinstance(value, bool | int | float | str):
            found.append((name, value))
        elif isinstance(value, StaticCache):
            found.append((name, id(value)))
        else:
            return None
    tokens = _tokens(kwargs)
    return None if tokens is None or tokens.shape[0] * tokens.shape[1] > _MOST_TOKENS else tuple(found)


def _tokens(kwargs: dict[str, Any]) -> Any:
    """Ids (B, L) or embeddings (B, L, d)."""
    embeddings = kwargs.get("inputs_embeds")
    return kwargs.get("input_ids") if embeddings is None else embeddings


def _leaves(kwargs: dict[str, Any], where: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield names and values; those of a dictionary (masks by kind of layer) one by one."""
    for name, value in kwargs.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*where, name))
        else:
            yield (*where, name), value


def _copied(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the same with tensors of its own."""
    return {
        name: _copied(value) if isinstance(value, dict) else value.clone() if isinstance(value, Tensor) else value
        for name, value in kwargs.items()
    }
