"""Records that cannot be used: collected with their reasons, written to a file, and either left out or raised together."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

BAD_RECORDS = "bad_records.jsonl"
_SHOWN = 20
_WINDOW = 1024
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class BadRecord:
    """One record that is left out.

    Attributes:
        index: its place in the data, from 0.
        id: its name.
        kind: what is wrong, in words that repeat.
        reason: the kind with the particulars.
    """

    index: int
    id: str
    kind: str
    reason: str


class BadRecordsError(ValueError):
    """Bad records of a data set: how many of each kind, the first 20 in full, and where all of them are.

    Attributes:
        records: every one of them.
        file: a line of JSON for each; None: none was written.
    """

    def __init__(self, records: Sequence[BadRecord], total: int, file: Path | None = None) -> None:
        self.records, self.file = tuple(records), file
        rule = "good records only, or be read with on_bad_record='skip'"
        if len(self.records) == total:
            rule = "at least one good record"
        lines = [f"  record {bad.index} ({bad.id!r}): {bad.reason}" for bad in self.records[:_SHOWN]]
        if len(self.records) > _SHOWN:
            where = file if file is not None else "the records of this error"
            lines.append(f"  and {len(self.records) - _SHOWN:,} more: all are in {where}")
        elif file is not None:
            lines.append(f"  also in {file}")
        found = f"{len(self.records):,} bad of {total:,} ({_kinds(self.records)})"
        super().__init__(f"data must hold {rule}, got {found}:\n" + "\n".join(lines))


class BadRecordError(ValueError):
    """One bad record of data that are read as they come.

    A dataloader's worker has it raised again with the text of its traceback, of which only the last line is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].rstrip())


def count_kinds(records: Sequence[BadRecord]) -> dict[str, int]:
    """Return how many there are of each kind, the commonest first."""
    return dict(Counter(bad.kind for bad in records).most_common())


def left_out(records: Sequence[BadRecord], total: int | None, file: Path | None = None) -> str:
    """Return a line on records that were left out, for those who read along; no total: it is not known."""
    where = f", listed in {file}" if file is not None else ""
    of_all = f" of {total:,}" if total is not None else ""
    return f"{len(records):,}{of_all} records left out ({_kinds(records)}){where}"


def _kinds(records: Sequence[BadRecord]) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in count_kinds(records).items())


def settle(
    records: Sequence[BadRecord], total: int, on_bad_record: str, file: Path | None = None
) -> tuple[BadRecord, ...]:
    """Return bad records, in order, that are to be skipped; raise them where they stop the run or nothing else is there.

    Either way they are written to ``file``; without any, one that an earlier try left is removed.
    """
    found = tuple(sorted(records, key=lambda bad: bad.index))
    if file is not None and found:
        write_bad_records(file, found)
    elif file is not None:
        file.unlink(missing_ok=True)
    if found and (on_bad_record == "stop" or len(found) == total):
        raise BadRecordsError(found, total, file)
    return found


def write_bad_records(path: Path, records: Sequence[BadRecord]) -> None:
    """Write a line of JSON for each, beside and then in place; ranks may do so at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text("".join(json.dumps(asdict(bad)) + "\n" for bad in records), encoding="utf-8")
    part.replace(path)


def append_bad_record(path: Path, record: BadRecord) -> None:
    """Add a line of JSON for a record; processes may do so at the same time, for a line is written at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        file.write(f"{json.dumps(asdict(record))}\n".encode())


def read_bad_records(path: Path) -> list[BadRecord]:
    """Return the records of such a file, in order; none where it is not there."""
    if not path.is_file():
        return []
    found = [BadRecord(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    return sorted(found, key=lambda bad: bad.index)


def in_threads(work: Callable[[int], _Found], count: int, threads: int) -> Iterator[_Found]:
    """Yield ``work(0), ..., work(count - 1)`` in order, some at a time; what is waiting never grows with ``count``."""
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, count, _WINDOW):
            yield from pool.map(work, range(start, min(start + _WINDOW, count)))
