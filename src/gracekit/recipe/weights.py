"""A saved model as transformers reads it: its class, and all of its weights.

transformers fills up what a file lacks with random numbers, and only warns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError


def model_class(names: Any, folder: Path) -> Any:
    """Return the first class of ``architectures`` in a folder's config.json that transformers has; None where it has none.

    Raises:
        ValueError: they are no list of names.
    """
    import transformers

    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"architectures must be a list of names in config.json, got {names!r} in {folder}")
    return next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)


def read_model(kind: Any, name: str | Path, **options: Any) -> Any:
    """Return ``kind.from_pretrained(name, **options)``.

    Raises:
        ValueError: a file is damaged, or a weight of the model is missing or has another shape.
        OSError: as transformers says it.
    """
    try:
        model, found = kind.from_pretrained(name, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except SafetensorError as error:
        raise ValueError(f"files of weights must be whole, got a broken one in {str(name)!r}: {error}") from error
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(f"files of weights must be whole, got {str(name)!r} without {len(missing)} ({missing[0]})")
    for key, held, wanted in found["mismatched_keys"]:
        raise ValueError(f"{key} must have the shape {tuple(wanted)}, got {tuple(held)} in {str(name)!r}")
    return model
