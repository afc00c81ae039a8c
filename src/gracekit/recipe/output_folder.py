"""The folder that a command writes to: new, empty, or its own of an earlier try, which is known by a settings file in it."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any


def own_settings(path: Path, expected: Collection[str], command: str) -> dict[str, Any] | None:
    """Return what an earlier try of a command wrote into its settings file; None where the folder is new or empty.

    Args:
        path: of the settings file, whose folder is looked at.
        expected: names of the settings, all of which the command writes.
        command: whose folder it must be, for the message.

    Raises:
        FileExistsError: the folder is a file, or holds something and not the command's settings.
    """
    folder = path.parent
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or not set(expected) <= found.keys():
        raise FileExistsError(
            f"output must be a new or empty folder, or one of {command}, got {str(folder)!r}, which holds something else"
        )
    return found
