"""The folder of `gracekit evaluate`: answers as they come, what they were given by and to, and what was seen with each.

An answer is used again only where everything that decided it is what it was: the model's files, the data, how it was asked, and the
pictures of its record.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gracekit.recipe.digests import records_digests
from gracekit.recipe.output_folder import own_settings
from gracekit.recipe.questions import Asked
from gracekit.recipe.stages import write_json

Kept = dict[tuple[int, int], dict[str, Any]]  # lines of answers, by the key of their question


def open_answers(output: Path, settings: dict[str, Any]) -> Kept:
    """Return the lines of answers that an interrupted evaluation has left in its folder, which is made if absent.

    Raises:
        FileExistsError: the folder holds something else, or answers of another model or to another set.
    """
    described, kept = output / "settings.json", output / "answers.jsonl"
    there = own_settings(described, settings, "gracekit evaluate")
    written = kept.read_bytes() if kept.is_file() else b""
    # What follows the last line break was being written when the run ended.
    whole = written[: written.rfind(b"\n") + 1]
    if there is not None and whole:
        old, new = _flat(there), _flat(settings)
        different = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        if different:
            raise _another(output, ", ".join(different))
    output.mkdir(parents=True, exist_ok=True)
    write_json(described, settings)  # also over those of a try that got no answer
    if len(whole) < len(written):
        os.truncate(kept, len(whole))
    lines = [json.loads(line) for line in whole.splitlines()]
    return {(line["record"], line["turn"]): line for line in lines}


def pictures_of(questions: Iterable[Asked], done: Kept, output: Path) -> dict[int, str]:
    """Return what tells the pictures of each record from others, by the record's index.

    Args:
        questions: of the set.
        done: answers that are there already.
        output: their folder.

    Raises:
        FileExistsError: one of them was given to another picture.
    """
    records = {asked.record.index: asked.record for asked in questions}
    found = {index: records_digests([record])["pictures"] for index, record in records.items()}
    for (index, _), line in done.items():
        if index in found and line["pictures"] != found[index]:
            raise _another(output, f"picture in record {index} ({records[index].id})")
    return found


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with the files of a folder as settings of their own."""
    files = {name: value for name, value in settings.items() if isinstance(value, dict)}
    flat = {f"{name}/{file}": what for name, value in files.items() for file, what in value.items()}
    return {name: value for name, value in settings.items() if name not in files} | flat


def _another(output: Path, what: str) -> FileExistsError:
    return FileExistsError(
        f"output must be a new folder or an evaluation of the same, got {str(output)!r} with another {what}"
    )
