"""An image processor that works with Pillow and a tokenizer, for models whose own processor wants torchvision."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor


class PairedProcessor:
    """An image processor and a tokenizer as one processor, where the model's own cannot be imported.

    It does what the Qwen-VL line's processors do with text and images: a placeholder becomes as many as the image's grid
    (``image_grid_thw``) has patches, divided by ``merge_size**2``.

    Args:
        image_processor: gives ``image_grid_thw``, and has ``merge_size``.
        tokenizer: of the same model.
        image_token: the placeholder.

    Raises:
        ValueError: the image processor is of another kind.
    """

    def __init__(self, image_processor: Any, tokenizer: Any, image_token: str) -> None:
        if not hasattr(image_processor, "merge_size"):
            raise ValueError(
                "image_processor must be one of the Qwen-VL line (with merge_size) where the model's own processor does not "
                f"load, got {type(image_processor).__name__}"
            )
        self.image_processor, self.tokenizer, self.image_token = image_processor, tokenizer, image_token
        self.chat_template: str | None = tokenizer.chat_template

    def __call__(
        self,
        *,
        images: Sequence[Image.Image] | None,
        text: Sequence[str],
        return_tensors: str,
        add_special_tokens: bool,
    ) -> dict[str, Tensor]:
        """Return the tensors of one conversation, ``text`` being a list of one."""
        (written,) = text
        inputs: dict[str, Tensor] = {}
        counts: list[int] = []
        if images:
            inputs = dict(self.image_processor(images=list(images), return_tensors=return_tensors))
            counts = (inputs["image_grid_thw"].prod(-1) // self.image_processor.merge_size**2).tolist()
        parts = written.split(self.image_token)
        expanded = parts[0] + "".join(
            self.image_token * count + part for count, part in zip(counts, parts[1:], strict=True)
        )
        ids = self.tokenizer(expanded, return_tensors=return_tensors, add_special_tokens=add_special_tokens)[
            "input_ids"
        ]
        placeholder = self.tokenizer.convert_tokens_to_ids(self.image_token)
        return {"input_ids": ids, "mm_token_type_ids": (ids == placeholder).int(), **inputs}

    def save_pretrained(self, folder: str | Path) -> None:
        """Save both parts."""
        self.image_processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def load_image_processor(name: str | Path) -> Any:
    """Return a model's image processor, the one that works with Pillow where AutoImageProcessor wants torchvision.

    Raises:
        OSError: the model has none.
        ImportError: it wants torchvision, and none works without.
    """
    import transformers

    try:
        return transformers.AutoImageProcessor.from_pretrained(name)
    except ImportError:  # transformers 5.17 asks for torchvision before it looks at what is wanted
        described = model_settings(name, "preprocessor_config.json")
        described = described or model_settings(name, "processor_config.json").get("image_processor", {})
        if not described:
            raise OSError(f"a model must have a preprocessor_config.json, got none in {str(name)!r}") from None
        kind = described.get("image_processor_type", "")
        by_pillow = getattr(transformers, kind.removesuffix("Fast").removesuffix("Pil") + "Pil", None)
        if by_pillow is None:
            raise
        return by_pillow.from_pretrained(name)


def model_settings(name: str | Path, file: str) -> dict[str, Any]:
    """Return a JSON file of a model; nothing where it has none."""
    from transformers.utils import cached_file

    path = cached_file(
        str(name), file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    found: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
    return found
