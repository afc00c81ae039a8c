"""How many visual tokens a picture becomes in a saved model, without its weights.

The folder's processor writes placeholders for it; the model makes features of it, and how many follows from the grid that
the image processor gives (the Qwen line) or from the shapes of ``get_image_features`` on the meta device. Training needs
the two to agree.
"""

from __future__ import annotations

import contextlib
import inspect
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gracekit.recipe.paired_processor import load_image_processor
from gracekit.recipe.record_format import open_image
from gracekit.vlm.families import placeholder_id
from gracekit.vlm.tokens import feature_lengths


@dataclass(kw_only=True)
class PictureTokens:
    """Token counts of one picture, None where not found out.

    Attributes:
        features: tokens that the model's image features have.
        grid: (frames, rows, columns) of these, where the processor tells.
        placeholders: placeholder ids that the folder's processor writes.
        notes: what could not be found out, a line each.
        problems: what the model or its processor refused.
    """

    features: int | None = None
    grid: tuple[int, int, int] | None = None
    placeholders: int | None = None
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def picture_tokens(folder: Path, model: nn.Module, image: Path) -> PictureTokens:
    """Count the visual tokens of a picture for the model of a folder.

    Args:
        folder: the saved model, with its processor's files.
        model: the model, on the meta device.
        image: a picture that Pillow reads.

    Returns:
        PictureTokens.

    Raises:
        ValueError: Pillow cannot read the picture.
    """
    picture = open_image(image)
    found = PictureTokens()
    inputs = _by_processor(folder, picture, found) or _by_image_processor(folder, picture, found)
    if "input_ids" in inputs:
        found.placeholders = int((inputs["input_ids"] == placeholder_id(model, "image")).sum())
    if inputs:
        _count_features(model, inputs, found)
    return found


def _by_processor(folder: Path, picture: Any, found: PictureTokens) -> dict[str, Any]:
    """Return what the folder's own processor makes of the picture, ids included; nothing where it does not load."""
    from transformers import AutoProcessor

    try:
        with _quiet():
            processor = AutoProcessor.from_pretrained(folder)
            # Gemma's processor looks for the token that begins an image, the others for the placeholder.
            mark = getattr(processor, "boi_token", None) or processor.image_token
            return dict(processor(images=[picture], text=[mark], return_tensors="pt"))
    except Exception as error:  # whatever a processor of any family may need and not find
        found.notes.append(
            f"AutoProcessor cannot be used ({_reason(error)}): pair the folder's AutoImageProcessor and AutoTokenizer"
        )
        return {}


def _by_image_processor(folder: Path, picture: Any, found: PictureTokens) -> dict[str, Any]:
    try:
        with _quiet():
            return dict(load_image_processor(folder)(images=[picture], return_tensors="pt"))
    except Exception as error:
        found.notes.append(f"AutoImageProcessor cannot be used either ({_reason(error)})")
        return {}


def _count_features(model: Any, inputs: dict[str, Any], found: PictureTokens) -> None:
    merge = getattr(getattr(model.config, "vision_config", None), "spatial_merge_size", None)
    grids = inputs.get("image_grid_thw")
    if isinstance(grids, Tensor) and isinstance(merge, int):
        frames, height, width = grids[0].tolist()
        found.grid = (frames, height // merge, width // merge)
        found.features = frames * height * width // merge**2
        return
    accepted = inspect.signature(model.get_image_features).parameters
    given = {
        name: value.to("meta") if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
        if name in accepted
    }
    try:
        with torch.no_grad(), _quiet():
            lengths = feature_lengths(model.get_image_features(**given))
    except ValueError as error:
        found.problems.append(f"the model refuses what its image processor gives: {error}")
    except (RuntimeError, NotImplementedError):  # values are needed, and the meta device has none
        found.notes.append("how many features the model makes of a picture depends on pixel values: not checked here")
    else:
        found.features = sum(lengths) if lengths else None


def _reason(error: Exception) -> str:
    """Return the beginning of an error on one line; those of missing packages run over many."""
    text = " ".join(str(error).split())
    if "torchvision" in text.lower():
        return "it needs torchvision, which cannot be imported"
    return f"{type(error).__name__}: {text[:100]}"


def _quiet() -> contextlib.AbstractContextManager[object]:
    """Keep what processors print while they are built out of the report."""
    return contextlib.redirect_stdout(io.StringIO())
