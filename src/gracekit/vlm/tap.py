"""Capturing a decoder's hidden states at visual tokens during a forward that runs anyway.

``output_hidden_states=True`` keeps the output of every layer, and in some families the vision tower's as well; the tap
keeps one tensor. It takes the *input* of the block after the tapped one, because some decoders add visual features between
two blocks, and because under checkpointing the input is the tensor that has its gradient graph. The tensor is stored raw
and gathered after the forward: indexing inside the hook would happen in the checkpoint's first, gradient-free run.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gracekit import _checks
from gracekit._structure import unwrap
from gracekit.capture import HookContext, first_tensor
from gracekit.vlm.families import placeholder_id, require_decoder, require_image_token_id
from gracekit.vlm.tokens import feature_lengths, visual_tokens

_FEATURES = {"image": "get_image_features", "video": "get_video_features"}


class _Capture(NamedTuple):
    """What one forward left: hidden states (B, S, d), and tokens per image and per video where the model encoded any."""

    hidden: Tensor
    lengths: dict[str, list[int] | None]


class VisualTokenTap(HookContext):
    """Capture the hidden states of visual tokens at one layer of a vision-language model.

    The tap watches forwards while its with block lasts, and changes nothing about them. Tokens per image are recorded from
    what the model's own ``get_image_features`` and ``get_video_features`` return during the forward. Where a forward did
    not call them (precomputed features), each contiguous run of placeholders counts as one image, with a warning, because
    adjacent images then merge.

    Args:
        model: a vision-language model of transformers: it has ``get_decoder()`` and ``config.image_token_id``. It may be
            wrapped by DistributedDataParallel, FSDP2, PEFT or torch.compile; compile it, or let it compile, inside the tap.
        layer: which of the decoder's ``layers`` to tap the output of, in [-L, L-1]. -2 is the penultimate one, equal to
            ``hidden_states[-2]``; -1 is the last one's output *before* the final norm, unlike ``hidden_states[-1]``.

    Raises:
        TypeError: ``model`` is no nn.Module, or ``layer`` no integer.
        ValueError: ``model`` has no decoder or no image token id, or ``layer`` is out of range.

    Example:
        >>> from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
        >>> size = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2)
        >>> vision = CLIPVisionConfig(**size, image_size=8, patch_size=4)
        >>> config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**size, vocab_size=32), image_token_index=9)
        >>> model = LlavaForConditionalGeneration(config)
        >>> batch = dict(input_ids=torch.tensor([[1, 9, 9, 9, 9, 2]]), pixel_values=torch.randn(1, 3, 8, 8))
        >>> with VisualTokenTap(model, layer=-2) as tap:
        ...     out = model(**batch)
        ...     tokens, lengths = tap.tokens(batch)
        >>> tokens.shape, lengths
        (torch.Size([4, 16]), [4])
    """

    def __init__(self, model: nn.Module, layer: int = -2) -> None:
        super().__init__()
        self._decoder = require_decoder(model)
        self._image_token_id = require_image_token_id(model)
        self._video_token_id = placeholder_id(model, "video")
        self._model = unwrap(model)
        self._next = _module_after(self._decoder, layer)
        self.layer = layer
        self._capture: _Capture | None = None
        self._reset()

    def tokens(self, batch: Mapping[str, Any], *, lengths: Sequence[int] | None = None) -> tuple[Tensor, list[int]]:
        """Return the visual tokens of the latest forward, and forget it.

        Args:
            batch: what the model was called with; its ``input_ids`` (B, S) say where visual tokens are.
            lengths: tokens of each image, all at least 1, where an image is not what the features list, as below. They sum
                to the image placeholders, and no image crosses from one sample to the next. None: as the features list.

        Returns:
            Tokens (sum n, d) packed image by image, part of the forward's graph, and the list of n. Images come in the
            order of their samples, left to right in each; after all images come the videos, one length each. InternVL
            lists features by tile, and Idefics3 and SmolVLM (since transformers 5.20) by sample; nothing in them tells which
            tiles are one image, but the processor does, so give ``lengths`` there.

        Raises:
            TypeError: ``batch`` is no mapping, or ``lengths`` are not integers.
            ValueError: ``batch`` has no ``input_ids``, or they or ``lengths`` do not fit the forward.
            RuntimeError: no forward was seen since the tap was entered or last read.
        """
        if not isinstance(batch, Mapping):
            raise TypeError(f"batch must be a mapping with input_ids, got {type(batch).__name__}")
        input_ids = batch.get("input_ids")
        if not isinstance(input_ids, Tensor):
            raise ValueError(f"batch must have a tensor input_ids, got keys {sorted(map(str, batch))}")
        hidden, recorded = self._latest()
        # Under device dispatch the decoder's last blocks may live elsewhere than the batch.
        input_ids = input_ids.to(hidden.device, non_blocking=True)
        images: Mapping[str, Sequence[int] | None] = recorded if lengths is None else {"image": lengths}
        tokens, found = _gather(hidden, input_ids, self._image_token_id, images, "image")
        if self._video_token_id is not None and self._video_token_id != self._image_token_id:
            videos, video_lengths = _gather(hidden, input_ids, self._video_token_id, recorded, "video")
            if video_lengths:
                tokens, found = torch.cat([tokens, videos]), found + video_lengths
        self._capture = None
        return tokens, found

    def hidden(self) -> Tensor:
        """Return what the tapped layer gave in the latest forward, (B, S, d), all tokens; :meth:`tokens` still works after it.

        Raises:
            RuntimeError: no forward was seen since the tap was entered or last read.
        """
        return self._latest().hidden

    def _latest(self) -> _Capture:
        if self._capture is None:
            raise RuntimeError(
                "no forward of the model was seen since the tap was entered or its tokens were last taken; run the model "
                "inside the with block, once per tokens(), and enter the tap before torch.compile first runs the model"
            )
        return self._capture

    def _install(self, stack: ExitStack) -> None:
        self._capture = None
        self._reset()
        for owner in self._model.modules():
            kinds = [kind for kind, name in _FEATURES.items() if callable(getattr(type(owner), name, None))]
            for kind in kinds:
                stack.callback(_watch(owner, kind, self))
            if kinds:
                stack.callback(owner.register_forward_pre_hook(self._start).remove)
        stack.callback(self._decoder.register_forward_pre_hook(self._arm).remove)
        stack.callback(self._next.register_forward_pre_hook(self._take, with_kwargs=True).remove)
        stack.callback(self._decoder.register_forward_hook(self._finish).remove)

    def _reset(self) -> None:
        self._armed = False
        self._hidden: Tensor | None = None
        self._lengths: dict[str, list[int] | None] = {}
        self._depth = 0

    def _start(self, owner: nn.Module, args: tuple[Any, ...]) -> None:
        """Forget the forward before, and features that were computed outside of one."""
        if self._depth == 0:  # else a vision tower with feature methods of its own is running for the model's
            self._lengths, self._capture = {}, None

    def _arm(self, decoder: nn.Module, args: tuple[Any, ...]) -> None:
        self._armed, self._hidden, self._capture = True, None, None

    def _take(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Disarmed during the backward pass, where checkpointing may run the block's hooks again.
        if self._armed and self._hidden is None:
            self._hidden = first_tensor(args) if args else first_tensor(kwargs)

    def _finish(self, decoder: nn.Module, args: tuple[Any, ...], output: object) -> None:
        if self._hidden is not None:
            self._capture = _Capture(self._hidden, self._lengths)
        self._armed, self._hidden, self._lengths = False, None, {}

    def _record(self, kind: str, features: object) -> None:
        # One feature method may call another (video by way of image); what the model scatters is the outer one's result.
        if self._depth == 0:
            new, old = feature_lengths(features), self._lengths.get(kind, [])
            self._lengths[kind] = None if new is None or old is None else old + new

    def __repr__(self) -> str:
        return f"VisualTokenTap({type(self._model).__name__}, layer={self.layer})"


class _FeatureWatch:
    """Stands in for one bound feature method of one module while taps are open, and tells them what it returned.

    No hook exists for a method that is not ``forward``, and no submodule returns the features by image: the split happens
    inside the method. So the *instance* gets an attribute that hides its class's method until the last tap is left
    (accelerate does the same with ``forward``); no class of transformers is touched, and taps may be left in any order.
    """

    def __init__(self, owner: nn.Module, kind: str) -> None:
        self.owner, self.kind, self.name = owner, kind, _FEATURES[kind]
        self.hidden = vars(owner).get(self.name)  # an instance attribute that somebody else has set, as FSDP2 does
        self.method: Callable[..., Any] = getattr(owner, self.name)
        functools.update_wrapper(self, self.method)
        self.taps: list[VisualTokenTap] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for tap in self.taps:
            tap._depth += 1
        try:
            features = self.method(*args, **kwargs)
        finally:
            for tap in self.taps:
                tap._depth -= 1
        for tap in self.taps:
            tap._record(self.kind, features)
        return features

    def release(self, tap: VisualTokenTap) -> None:
        self.taps.remove(tap)
        if not self.taps:
            delattr(self.owner, self.name)
            if self.hidden is not None:
                setattr(self.owner, self.name, self.hidden)


def _watch(owner: nn.Module, kind: str, tap: VisualTokenTap) -> Callable[[], None]:
    """Let ``tap`` know what ``owner``'s feature method returns; the function returned ends that."""
    watch = vars(owner).get(_FEATURES[kind])
    if not isinstance(watch, _FeatureWatch):
        watch = _FeatureWatch(owner, kind)
        setattr(owner, watch.name, watch)
    watch.taps.append(tap)
    return functools.partial(watch.release, tap)


def _module_after(decoder: nn.Module, layer: int) -> nn.Module:
    """Return the module whose input is the output of ``decoder.layers[layer]``: the next block, or the final norm."""
    layers: Any = decoder.layers
    count = len(layers)
    index = _checks.check_int("layer", layer, low=-count, high=count - 1) % count
    following = layers[index + 1] if index + 1 < count else getattr(decoder, "norm", None)
    if not isinstance(following, nn.Module):
        raise ValueError(
            f"layer must not be the last one of a decoder without a final `norm`, got layer={layer} of {count}"
        )
    return following


def _gather(
    hidden: Tensor, input_ids: Tensor, token_id: int, recorded: Mapping[str, Sequence[int] | None], kind: str
) -> tuple[Tensor, list[int]]:
    # A forward that encoded images but no video has no video tokens; one that encoded nothing may have precomputed ones.
    lengths = recorded.get(kind, [] if recorded else None)
    tokens, lengths_out = visual_tokens(hidden, input_ids, token_id, lengths=lengths)
    if lengths is None and lengths_out:
        warnings.warn(
            f"the model's {_FEATURES[kind]} was not seen to give tokens per {kind}, so each run of placeholders counts as one "
            f"{kind}: adjacent ones merge",
            stacklevel=3,
        )
    return tokens, lengths_out
