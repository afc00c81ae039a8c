"""The decoder's and the vision tower's parts of a prefill from CUDA graphs, for shapes that come again.

A prompt of some hundred tokens keeps the device busy for less time than the host takes to launch its thousand kernels. A graph
takes that time away, but belongs to one shape and takes several prefills to make, so it is made when a shape comes for the second
time. What stands between tower and decoder (the images' place among the tokens) looks at values and runs as it is.
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
# Configurations of vision towers that look at nothing but pixels, and at no value of those.
_PLAIN_TOWERS = ("clip_vision_model", "siglip_vision_model")

Capture = Callable[[Callable[[], Any]], Callable[[], Any]]


class _Graphs:
    """Stands in for a module's forward.

    Args:
        module: of transformers.
        capture: makes a replay of what is run, with the same tensors.
    """

    def __init__(self, module: Any, capture: Capture) -> None:
        self.module, self._capture = module, capture
        self._forward: Callable[..., Any] = module.forward
        self._seen: dict[object, tuple[dict[str, Any], Callable[[], Any]] | None] = {}

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Let calls of the module come here."""
        held = vars(self.module).get("forward")  # of a hook of accelerate's, say
        self.module.forward = self
        try:
            yield
        finally:
            del self.module.forward
            if held is not None:
                self.module.forward = held

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output; a graph's is overwritten at its next replay."""
        named = self._named(args, kwargs)
        key = None if named is None else self._key(named)
        if key is None or key not in self._seen:
            if key is not None:
                self._remember(key)
            return self._forward(*args, **kwargs)
        given = self._ready(named)
        call = self._seen[key]
        if call is None:
            held = _copied(given)
            call = self._seen[key] = held, self._capture(lambda: self._forward(**held))
            self._captured()
        held, replay = call
        for (_, to), (_, tensor) in zip(_leaves(held), _leaves(given), strict=True):
            if isinstance(to, Tensor):
                to.copy_(tensor)
        return replay()

    def _remember(self, key: object) -> None:
        if len(self._seen) >= _MOST_GRAPHS:
            del self._seen[next(iter(self._seen))]
        self._seen[key] = None

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return all arguments by name; None where that is not known."""
        return None if args else kwargs

    def _key(self, kwargs: dict[str, Any]) -> object | None:
        """Return what calls that one graph can serve have in common; None for a call that none can."""
        raise NotImplementedError

    def _ready(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return what the module is called with where a graph is."""
        return kwargs

    def _captured(self) -> None:
        """Undo what capturing has written."""


class TowerGraphs(_Graphs):
    """For a vision tower, whose only tensor is ``pixel_values``."""

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) > 1:
            return None
        return {"pixel_values": args[0], **kwargs} if args else kwargs

    def _key(self, kwargs: dict[str, Any]) -> object | None:
        pixels, config = kwargs.get("pixel_values"), self.module.config
        if not isinstance(pixels, Tensor) or pixels.ndim != 4:
            return None
        patches = pixels.shape[0] * (pixels.shape[2] // config.patch_size) * (pixels.shape[3] // config.patch_size)
        return _common(kwargs, ("pixel_values",)) if patches <= _MOST_TOKENS else None


class DecoderGraphs(_Graphs):
    """For a decoder in prefills into an empty cache.

    Args:
        decoder: of transformers, with what it is called with in keywords.
        cache: what it writes into.
        capture: makes a replay of what is run, with the same tensors.
    """

    def __init__(self, decoder: Any, cache: StaticCache, capture: Capture) -> None:
        super().__init__(decoder, capture)
        self.cache = cache

    def _key(self, kwargs: dict[str, Any]) -> object | None:
        tokens = _tokens(kwargs)
        few = tokens is not None and tokens.shape[0] * tokens.shape[1] <= _MOST_TOKENS
        return _common(kwargs, _CHANGING) if few else None

    def _ready(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return kwargs | {"attention_mask": self._mask(kwargs.get("attention_mask"), _tokens(kwargs))}

    def _captured(self) -> None:
        self.cache.reset()

    def _mask(self, mask: Any, tokens: Tensor) -> Any:
        """Return an additive mask (B, 1, L, C) for one over tokens (B, L) or none; such masks are given back.

        Left to itself, transformers makes another under capture than without, for which kernels may not have been loaded.
        """
        if isinstance(mask, dict) or (mask is not None and mask.ndim == 4):
            return mask
        rows, length = tokens.shape[:2]
        like: Any = next(self.module.parameters())
        seen = torch.ones(
            rows, 1, length, self.cache.layers[0].max_cache_len, dtype=torch.bool, device=like.device
        ).tril_()
        if mask is not None:
            seen[..., :length] &= mask.bool()[:, None, None, :]
        least = torch.finfo(like.dtype).min
        return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, least)


def tower_of(model: Any) -> Any:
    """Return a model's vision tower, where its kind is known to look at pixels alone, or None."""
    tower = getattr(getattr(model, "model", None), "vision_tower", None)
    return tower if getattr(getattr(tower, "config", None), "model_type", None) in _PLAIN_TOWERS else None


def _common(kwargs: dict[str, Any], changing: tuple[str, ...]) -> object | None:
    """Return names, plain values, and the shapes of the tensors in ``changing``; None where there is anything else."""
    found: list[object] = []
    for name, value in _leaves(kwargs):
        if isinstance(value, Tensor) and name[0] in changing:
            found.append((name, tuple(value.shape), value.dtype))
        elif value is None or isinstance(value, bool | int | float | str):
            found.append((name, value))
        elif isinstance(value, StaticCache):
            found.append((name, id(value)))
        else:
            return None
    return tuple(found)


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
