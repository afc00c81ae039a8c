"""The folder that a command writes to: new, empty, or its own of an earlier try, which is known by a settings file in it."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any


def is_free(folder: Path) -> bool:
    """Whether a folder is not there yet, or empty."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def own_settings(
    path: Path, expected: Collection[str], command: str = "", *, name: str = "output", sections: bool = False
) -> dict[str, Any] | None:
    """Return what an earlier try of a command wrote into its settings file; None where the folder is new or empty.

    Args:
        path: of the settings file, whose folder is looked at.
        expected: names of the settings, all of which the command writes.
        command: whose folder it must be, for the message.
        name: of the option that names the folder, for the message.
        sections: whether each of the settings must be an object.

    Raises:
        FileExistsError: the folder is a file, or holds something and not the command's settings.
    """
    folder = path.parent
    if is_free(folder):
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    whole = isinstance(found, dict) and set(expected) <= found.keys()
    if not whole or (sections and not all(isinstance(section, dict) for section in found.values())):
        own = f", or one of {command}" if command else ""
        raise FileExistsError(
            f"{name} must be a new or empty folder{own}, got {str(folder)!r}, which holds something else"
        )
    return dict(found)
