"""Records that cannot be trained on: collected with their reasons, and either raised together or written to a file."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

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
    """All bad records of a data set: how many of each kind, and the first 20 in full.

    Attributes:
        records: every one of them.
    """

    def __init__(self, records: Sequence[BadRecord], total: int) -> None:
        self.records = tuple(records)
        lines = [f"  record {bad.index} ({bad.id!r}): {bad.reason}" for bad in self.records[:_SHOWN]]
        if len(self.records) > _SHOWN:
            lines.append(f"  and {len(self.records) - _SHOWN:,} more")
        super().__init__(
            f"data must hold good records only, or be read with on_bad_record='skip', got {len(self.records):,} bad of "
            f"{total:,} ({count_kinds(self.records)}):\n" + "\n".join(lines)
        )


def count_kinds(records: Sequence[BadRecord]) -> str:
    """Return "3 missing image, 1 empty answer"; nothing for none."""
    return ", ".join(f"{count:,} {kind}" for kind, count in Counter(bad.kind for bad in records).most_common())


def settle(records: Sequence[BadRecord], total: int, on_bad_record: str) -> tuple[BadRecord, ...]:
    """Return bad records that are to be skipped; raise them where they stop the run."""
    if records and on_bad_record == "stop":
        raise BadRecordsError(records, total)
    return tuple(records)


def write_bad_records(path: Path, records: Sequence[BadRecord]) -> None:
    """Write a line of JSON for each, beside and then in place; ranks may do so at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text("".join(json.dumps(asdict(bad)) + "\n" for bad in records), encoding="utf-8")
    part.replace(path)


def in_threads(work: Callable[[int], _Found], count: int, threads: int) -> Iterator[_Found]:
    """Yield ``work(0), ..., work(count - 1)`` in order, some at a time; what is waiting never grows with ``count``."""
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, count, _WINDOW):
            yield from pool.map(work, range(start, min(start + _WINDOW, count)))
