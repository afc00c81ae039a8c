"""Where records come from that are read one after another, and dealt out in parts: JSONL, data sets, any iterable.

A record is given as a function that reads it. What is another part's is so not parsed, and what cannot be read costs that record
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from gracekit.recipe.record_sources import DatasetRecords, existing, is_indexed_dataset, parse_line, saved_dataset

Read = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Part:
    """Which part of a stream: that of a rank, and of a dataloader's worker there.

    Attributes:
        rank: from 0.
        ranks: how many there are.
        worker: from 0; 0 without workers.
        workers: how many each rank has, at least 1.
    """

    rank: int = 0
    ranks: int = 1
    worker: int = 0
    workers: int = 1

    @property
    def index(self) -> int:
        """Its number among all parts."""
        return self.worker * self.ranks + self.rank

    @property
    def count(self) -> int:
        """How many parts there are."""
        return self.ranks * self.workers


class RecordStream(Protocol):
    """Records, one after another, as often as is wanted.

    Attributes:
        ordered: whether every pass has them in the same order, so that a record is known by its place.
    """

    ordered: bool

    def read(self, part: Part, epoch: int) -> Iterator[Read]:
        """Return one pass over a part; the parts together are all records, each once.

        Of data that do not divide themselves it is every ``part.count``-th record from the ``part.index``-th.
        """


class JsonLineStream:
    """A JSONL file from its beginning to its end; nothing of it is kept."""

    ordered = True

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, part: Part, epoch: int) -> Iterator[Read]:
        """Return one pass."""
        with self.path.open("rb") as file:
            lines = (line for line in file if line.strip())
            yield from (partial(parse_line, line) for line in islice(lines, part.index, None, part.count))


class DatasetStream:
    """Rows of a data set of ``datasets`` whose rows have an index."""

    ordered = True

    def __init__(self, records: DatasetRecords) -> None:
        self.records = records

    def read(self, part: Part, epoch: int) -> Iterator[Read]:
        """Return one pass."""
        for number in range(part.index, len(self.records), part.count):
            yield partial(self.records.__getitem__, number)


class IterableStream:
    """An iterable that gives all of its records in every process, with ``set_epoch`` where it has that."""

    def __init__(self, records: Iterable[Any]) -> None:
        self.records = records
        self.ordered = not hasattr(records, "set_epoch")

    def read(self, part: Part, epoch: int) -> Iterator[Read]:
        """Return one pass."""
        if not self.ordered:
            self.records.set_epoch(epoch)  # type: ignore[attr-defined]
        yield from map(_held, islice(self.records, part.index, None, part.count))


class ShardedStream:
    """An IterableDataset of ``datasets``, whose shards are what ranks and workers share out."""

    ordered = False  # later passes take the shards in another order

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def read(self, part: Part, epoch: int) -> Iterator[Read]:
        """Return one pass. Shards that ranks cannot share out evenly are read by all of them, and each keeps what is its own."""
        even = self.dataset.num_shards % part.ranks == 0
        # Also as one shard of one: the same data with an epoch of their own, which workers otherwise share.
        dataset = self.dataset.shard(part.ranks, part.rank) if even else self.dataset.shard(1, 0)
        dataset.set_epoch(epoch)
        # In a worker it gives that worker's shards alone.
        yield from map(_held, dataset if even else islice(dataset, part.rank, None, part.ranks))


def _held(record: Any) -> Read:
    return lambda: record


def open_stream(data: Any) -> tuple[RecordStream, Path]:
    """Return the records of a file, a folder, a data set or an iterable, and the folder that relative paths of images start in.

    Raises:
        ValueError: it is none of these, or can be iterated over only once.
    """
    import datasets

    if isinstance(data, str | Path):
        path = existing(data)
        if path.is_dir():
            return DatasetStream(saved_dataset(path)), path
        if path.suffix != ".jsonl":
            raise ValueError(
                f"data to stream must be a .jsonl file or a saved data set, because JSON is read as a whole, got {str(path)!r}"
            )
        return JsonLineStream(path), path.parent
    if is_indexed_dataset(data):
        return DatasetStream(DatasetRecords(data)), Path()
    if isinstance(data, datasets.IterableDataset):
        return ShardedStream(data), Path()
    if not isinstance(data, Iterable) or isinstance(data, Iterator | dict):
        raise ValueError(
            "data to stream must be a path, one split of datasets, or an iterable of records that can be iterated over again, got "
            f"{type(data).__name__}"
        )
    return IterableStream(data), Path()
