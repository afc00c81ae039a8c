"""A blank picture for the vision tower where a rank's micro-batch has none.

Ranks that share a sharded vision tower must run it together: a rank that leaves it out gathers other weights and reduces fewer
gradients than the rest, and all of them wait for ever. So a micro-batch without a picture runs it on a blank one, and zero times
its features is added to the embeddings: every parameter takes part, and no value changes.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from PIL import Image
from torch import Tensor, nn

from gracekit._structure import unwrap
from gracekit.capture import HookContext
from gracekit.recipe.conversations import Turn
from gracekit.recipe.processors import ConversationProcessor

_SIDE = 64


class BlankPicture(HookContext):
    """While the with block lasts, forwards of a model also run its vision tower on a blank picture.

    Args:
        model: a vision-language model of transformers, unwrapped or not.
        inputs: what its vision tower takes of one picture, by name, as a batch has it: ``pixel_values`` and their like.

    Raises:
        ValueError: the model gives no features of a picture alone, or not from these inputs.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._model: Any = unwrap(model)
        features = getattr(self._model, "get_image_features", None)
        if not callable(features):
            raise ValueError(
                f"a model must have get_image_features() to run its vision tower alone, got {type(self._model).__name__}"
            )
        known = inspect.signature(features).parameters
        self.inputs = {name: value for name, value in inputs.items() if name in known}
        if "pixel_values" not in self.inputs:
            raise ValueError(f"inputs must have the pixel_values of a picture, got {sorted(inputs)}")

    def _install(self, stack: ExitStack) -> None:
        # After the embeddings, as in a forward with pictures: sharded modules must be gathered in one order on all ranks.
        stack.callback(self._model.get_input_embeddings().register_forward_hook(self._join).remove)

    def _join(self, embeddings: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        inputs = {name: value.to(output.device) for name, value in self.inputs.items()}
        inputs["pixel_values"] = inputs["pixel_values"].to(output.dtype)
        features = self._model.get_image_features(**inputs, return_dict=True)
        # Only what a forward would use: a tower's own last state is often left out.
        used = [getattr(features, "pooler_output", features), getattr(features, "deepstack_features", None)]
        for tensor in _tensors(used):
            output = output + 0 * tensor.sum().to(output.dtype)
        return output

    def __repr__(self) -> str:
        return f"BlankPicture({type(self._model).__name__}, {sorted(self.inputs)})"


def has_pictures(batch: Mapping[str, Any]) -> bool:
    """Whether a batch has pictures or videos."""
    return any(name.startswith("pixel_values") for name in batch)


def blank_picture(processor: ConversationProcessor) -> dict[str, Tensor]:
    """Return what a model's vision tower takes of a blank picture, by name."""
    turns = [Turn("user", "<image>\n?"), Turn("assistant", ".")]
    encoded = processor.encode(turns, [Image.new("RGB", (_SIDE, _SIDE))])
    length = len(encoded["input_ids"])
    return {name: value for name, value in encoded.items() if value.shape != (length,)}


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in _tensors(part)]
    return []
