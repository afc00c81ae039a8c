"""Where records come from: a JSON list, JSONL by the offsets of its lines, or a data set of ``datasets``."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any, Protocol

from gracekit.recipe.record_format import BROKEN_IMAGE, RecordError


class RecordSource(Protocol):
    """Raw records by their index."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


class JsonLines:
    """A JSONL file, read line by line: only the offsets of lines that are not blank are kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.starts, self.ends = array("Q"), array("Q")
        with path.open("rb") as file:
            position = 0
            for line in file:
                if line.strip():
                    self.starts.append(position)
                    self.ends.append(position + len(line))
                position += len(line)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Any:
        # Opened each time: workers and threads share no position, and the source pickles.
        with self.path.open("rb") as file:
            file.seek(self.starts[index])
            return parse_line(file.read(self.ends[index] - self.starts[index]))


class DatasetRecords:
    """Rows of a data set of ``datasets``, whose pictures are decoded as a row is read."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except BROKEN_IMAGE as error:
            raise RecordError("broken image", str(error)) from error


def parse_line(line: bytes) -> Any:
    """Return what a line of JSONL holds.

    Raises:
        RecordError: a ValueError, for a line that is no JSON.
    """
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RecordError("broken JSON", str(error)) from error


def open_source(data: Any) -> tuple[RecordSource, Path]:
    """Return the records of a file, a folder or a data set, and the folder that relative paths of images start in.

    Raises:
        ValueError: it is none of these.
    """
    if not isinstance(data, str | Path):
        if not is_indexed_dataset(data):
            raise ValueError(
                "data must be a path or one split of a datasets.Dataset (every record is looked at before training; an iterable "
                f"one is for a ConversationStream), got {type(data).__name__}"
            )
        return DatasetRecords(data), Path()
    path = existing(data)
    if path.is_dir():
        return saved_dataset(path), path
    if path.suffix == ".jsonl":
        return JsonLines(path), path.parent
    if path.suffix != ".json":
        raise ValueError(f"data must end in .json or .jsonl, got {str(path)!r}")
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"data must be JSON, got {str(path)!r}: {error}") from error
    if not isinstance(records, list):
        raise ValueError(
            f"data must be a JSON list of records, got an object of type {type(records).__name__} in {str(path)!r}"
        )
    return records, path.parent


def existing(data: str | Path) -> Path:
    """Return the path of a file or a folder.

    Raises:
        ValueError: it is not there.
    """
    path = Path(data)
    if not path.is_file() and not path.is_dir():
        raise ValueError(
            f"data must be a .json or .jsonl file or a saved data set, got {str(path)!r}, which is not there"
        )
    return path


def is_indexed_dataset(data: Any) -> bool:
    """Whether that is one split of ``datasets`` whose rows are found by their index."""
    wanted = ("column_names", "__getitem__", "__len__")
    return all(hasattr(data, name) for name in wanted) and not isinstance(data, dict)


def saved_dataset(folder: Path) -> DatasetRecords:
    """Return the rows of a data set that ``datasets`` saved.

    Raises:
        ValueError: the folder holds none, or several splits.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8")).get("splits")
        raise ValueError(f"data must be one split, got {str(folder)!r} with splits {splits}: name one of its folders")
    if not (folder / "state.json").is_file():
        raise ValueError(f"data must be a folder that Dataset.save_to_disk wrote, got no state.json in {str(folder)!r}")
    import datasets

    return DatasetRecords(datasets.load_from_disk(str(folder)))
