"""Conversations of data too large to be looked at before training: each record is checked and encoded when its turn comes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from accelerate.data_loader import IterableDatasetShard
from torch.utils.data import IterableDataset, get_worker_info

from gracekit._checks import check_choice, check_int
from gracekit.recipe.bad_records import BadRecord, BadRecordError, append_bad_record, read_bad_records
from gracekit.recipe.record_format import Encoder, Record, RecordError, encode_record, parse_record, record_name
from gracekit.recipe.record_streams import Part, open_stream


class ConversationStream(IterableDataset[Mapping[str, Any]]):
    r"""Encoded conversations without a length and without an end: after the last record comes the first again.

    Each record is encoded by one dataloader worker, and under :class:`~gracekit.recipe.trainer.GraceTrainer` by one rank. The
    order is that of the data, with ranks and workers in turn, so the same number of both gives the same samples again. Each goes
    round its own part: where parts have different sizes, as shards may have, the records of the smaller come again sooner. Shuffle
    the data beforehand, or give a ``datasets.IterableDataset`` with its ``shuffle``, whose order changes with every pass.

    Args:
        data: a ``.jsonl`` file, the folder of a data set that ``datasets`` saved, a ``datasets.Dataset``, or what has no length: a
            ``datasets.IterableDataset``, which divides itself by its shards, or any iterable of records that gives all of them in
            every process, as often as it is iterated over (``set_epoch(number)`` is called before, where it has that).
        processor: of the model, a :class:`~gracekit.recipe.processors.ConversationProcessor`.
        max_length: tokens of one record at most. None: any.
        image_folder: where relative paths of images start. None: the folder of the file.
        on_bad_record: "stop" raises an error at the first bad record that is met; "skip" leaves bad ones out.
        bad_records_file: where bad records are added as they are met, a line of JSON each, and none twice (of data whose order
            changes, none with the same name and reason). None: nowhere.

    Raises:
        ValueError: ``data`` is nothing of that kind; while iterating, that a rank or a worker found no good record.
        BadRecordError: a ValueError, while iterating: a bad record under "stop", with its index, name and reason. The index is
            its place in the data; of data that divide themselves, its number if their parts took turns.

    Example:
        >>> from itertools import islice
        >>> class Words:  # stands for a ConversationProcessor
        ...     def encode(self, turns, images):
        ...         return {"input_ids": [turn.text for turn in turns]}
        >>> asked = {"from": "human", "value": "Is it?"}
        >>> talks = [{"conversations": [asked, {"from": "gpt", "value": answer}]} for answer in ("Yes.", "No.")]
        >>> [sample["input_ids"][1] for sample in islice(ConversationStream(talks, Words()), 5)]
        ['Yes.', 'No.', 'Yes.', 'No.', 'Yes.']
    """

    def __init__(
        self,
        data: Any,
        processor: Encoder,
        max_length: int | None = None,
        *,
        image_folder: str | Path | None = None,
        on_bad_record: str = "stop",
        bad_records_file: str | Path | None = None,
    ) -> None:
        if max_length is not None:
            check_int("max_length", max_length, low=1)
        check_choice("on_bad_record", on_bad_record, ("stop", "skip"))
        self.source, home = open_stream(data)
        self.image_folder = Path(image_folder) if image_folder is not None else home
        self.processor, self.max_length, self.on_bad_record = processor, max_length, on_bad_record
        self.bad_records_file = Path(bad_records_file) if bad_records_file is not None else None
        self.rank, self.ranks = 0, 1

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        """Return the samples of this rank and worker, without an end."""
        worker = get_worker_info()
        place = {} if worker is None else {"worker": worker.id, "workers": worker.num_workers}
        part = Part(rank=self.rank, ranks=self.ranks, **place)
        file = self.bad_records_file
        # Those too that were met before an interruption.
        noted = set() if file is None else {self._identity(bad) for bad in read_bad_records(file)}
        for epoch in count():
            read = good = 0
            for found in self._pass(part, epoch):
                read += 1
                if not isinstance(found, BadRecord):
                    good += 1
                    yield found[1]
                    continue
                if file is not None and self._identity(found) not in noted:
                    append_bad_record(file, found)
                    noted.add(self._identity(found))
                self._stop_at(found)
            if not read and part.worker:
                return  # fewer records, or shards, than workers: the first of them have all
            if not good:
                raise ValueError(
                    "data must hold at least one good record for each rank and dataloader worker, got none among the "
                    f"{read} of rank {part.rank}, worker {part.worker}"
                )

    def first(self, number: int) -> list[Record]:
        """Return the first good records, or all where they are fewer; bad ones before them are written nowhere.

        Raises:
            BadRecordError: a ValueError, for a bad one under "stop".
            ValueError: there is no good record.
        """
        good: list[Record] = []
        for found in self._pass(Part(), 0):
            if isinstance(found, BadRecord):
                self._stop_at(found)
            else:
                good.append(found[0])
            if len(good) == number:
                break
        if not good:
            raise ValueError("data must hold at least one good record, got 0")
        return good

    def _pass(self, part: Part, epoch: int) -> Iterator[tuple[Record, Mapping[str, Any]] | BadRecord]:
        for number, read in enumerate(self.source.read(part, epoch)):
            index = number * part.count + part.index
            name = str(index)
            try:
                raw = read()
                name = record_name(raw, index)
                record = parse_record(raw, index, self.image_folder)
                sample = encode_record(record, self.processor, self.max_length)
            except RecordError as error:
                yield BadRecord(index, name, error.kind, str(error))
            else:
                yield record, sample

    def _identity(self, bad: BadRecord) -> object:
        return bad.index if self.source.ordered else (bad.id, bad.reason)

    def _stop_at(self, bad: BadRecord) -> None:
        if self.on_bad_record == "stop":
            raise BadRecordError(
                "data must hold good records only, or be read with on_bad_record='skip', got record "
                f"{bad.index} ({bad.id!r}): {bad.reason}"
            )


def deal_out(loader: Any, rank: int, ranks: int) -> None:
    """Let each rank's loader of a stream encode what is its own.

    accelerate lets every rank encode all samples and pass over the others'. Batches of it that one rank sends to the others are no
    way either: samples differ in length, and what belongs to images does not come a row a sample.

    Args:
        loader: as accelerate prepared it; one of anything else than a :class:`ConversationStream` is left as it is.
        rank: of this process.
        ranks: how many there are.
    """
    shard = loader.dataset
    stream = shard.dataset if isinstance(shard, IterableDatasetShard) else shard
    if not isinstance(stream, ConversationStream):
        return
    stream.rank, stream.ranks = rank, ranks
    if shard is not stream:
        shard.num_processes, shard.process_index = 1, 0
