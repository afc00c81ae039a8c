"""Conversations about images, read record by record from LLaVA-style JSON or JSONL, or from a data set that ``datasets`` saved.

Every record is looked at before any training: a run must not die of the 400,000th one. Images are opened when they are asked for,
and JSONL is read by the offsets of its lines, so that memory does not grow with the data; JSON is held parsed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

from PIL import Image

from gracekit._checks import check_choice, check_int
from gracekit.recipe.bad_records import BadRecord, BadRecordsError, in_threads, left_out, settle
from gracekit.recipe.record_format import (
    BROKEN_IMAGE,
    Encoder,
    Record,
    RecordError,
    Turn,
    check_range,
    encode_record,
    open_images,
    parse_record,
    record_name,
)
from gracekit.recipe.record_sources import RecordSource, open_source

__all__ = ["BadRecord", "BadRecordsError", "Conversations", "Record", "Turn", "load_conversations", "open_images"]

_THREADS = 4


@dataclass(frozen=True)
class Conversations(Sequence[Record]):
    """Records that :func:`load_conversations` found good; indexing reads one, a slice is a selection of them.

    Attributes:
        bad: what was left out, under ``on_bad_record="skip"``; of :func:`find_conversations`, what is not settled yet.
    """

    _source: RecordSource
    _image_folder: Path
    _kept: Sequence[int]
    _on_bad_record: str
    _bad_records_file: Path | None
    bad: tuple[BadRecord, ...] = field(default=())

    def __len__(self) -> int:
        return len(self._kept)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Conversations: ...
    def __getitem__(self, index: int | slice) -> Record | Conversations:
        if isinstance(index, slice):
            return replace(self, _kept=self._kept[index])
        number = self._kept[index]
        return parse_record(self._source[number], number, self._image_folder)

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))

    @property
    def total(self) -> int:
        """Records, good and bad."""
        return len(self._kept) + len(self.bad)

    def note(self) -> str:
        """Return a line on what was left out; nothing where nothing was."""
        return left_out(self.bad, self.total, self._bad_records_file) if self.bad else ""

    def settle(self) -> Conversations:
        """Treat the bad records as ``on_bad_record`` says: leave them out, or raise them; both write them to their file.

        Raises:
            BadRecordsError: some are bad and ``on_bad_record`` is "stop", or all are.
            ValueError: there are no records.
        """
        bad = settle(self.bad, self.total, self._on_bad_record, self._bad_records_file)
        if not self._kept:
            raise ValueError("data must hold at least one record, got 0")
        return replace(self, bad=bad)

    def check_lengths(
        self,
        processor: Encoder,
        max_length: int,
        *,
        threads: int = _THREADS,
        advance: Callable[[int], Any] = lambda count: None,
    ) -> Conversations:
        """Encode every record as training will, and treat those that fail or are too long as ``on_bad_record`` says.

        This decodes every image in full, so pictures that are cut off are found here.

        Args:
            processor: a :class:`~gracekit.recipe.processors.ConversationProcessor`.
            max_length: tokens of one record, visual ones included, at most.
            threads: records encoded at a time.
            advance: called with the number of records done, for a progress bar.

        Returns:
            The records that are left.

        Raises:
            BadRecordsError: some are bad and ``on_bad_record`` is "stop", or all are.
        """
        check_int("max_length", max_length, low=1)

        def check(number: int) -> BadRecord | None:
            record = self[number]
            try:
                encode_record(record, processor, max_length)
            except RecordError as error:
                return BadRecord(record.index, record.id, error.kind, str(error))
            return None

        good, bad = _sorted_out(range(len(self)), check, threads, advance)
        return replace(self, _kept=[self._kept[number] for number in good], bad=(*self.bad, *bad)).settle()


def load_conversations(
    data: Any,
    image_folder: str | Path | None = None,
    *,
    on_bad_record: str = "stop",
    bad_records_file: str | Path | None = None,
    threads: int = _THREADS,
    advance: Callable[[int], Any] = lambda count: None,
) -> Conversations:
    r"""Read conversations and check every record.

    A record of the LLaVA format is ``{"id", "image", "conversations": [{"from": "human", "value": "<image>\nWhat is it?"},
    {"from": "gpt", "value": "A boat."}]}``; ``image`` is a path or a list of them, or absent. The other format is
    ``{"messages": [{"role", "content"}], "images": [...]}``, where a content is text or a list of ``{"type": "image"}`` and
    ``{"type": "text", "text": ...}``.

    Args:
        data: a ``.json`` or ``.jsonl`` file, the folder of a data set that ``datasets`` saved, or a ``datasets.Dataset``.
        image_folder: where relative paths of images start. None: the folder of the file.
        on_bad_record: "stop" raises one error about all bad records; "skip" leaves them out.
        bad_records_file: where they are written, a line of JSON each. None: nowhere.
        threads: records checked at a time.
        advance: called with the number of records checked, for a progress bar.

    Returns:
        The good records, a sequence that reads each when it is asked for.

    Raises:
        ValueError: ``data`` is nothing of that kind, or empty.
        BadRecordsError: some are bad and ``on_bad_record`` is "stop", or all are. Bad is a record whose image is missing or cannot
            be opened, whose markers are not as many as its images, that has no assistant's turn or an empty one, whose roles
            do not alternate from the user's to the assistant's, whose texts are no Unicode, and a line that is no JSON.

    Example:
        >>> import json, tempfile, pathlib
        >>> from PIL import Image
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (40, 30)).save(folder / "boat.png")
        >>> talk = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A boat."}]
        >>> _ = (folder / "train.json").write_text(json.dumps([{"id": "a", "image": "boat.png", "conversations": talk}]))
        >>> record = load_conversations(folder / "train.json")[0]
        >>> record.id, record.images[0].name, record.turns[1].text
        ('a', 'boat.png', 'A boat.')
    """
    found = find_conversations(
        data,
        image_folder,
        on_bad_record=on_bad_record,
        bad_records_file=bad_records_file,
        threads=threads,
        advance=advance,
    )
    return found.settle()


def find_conversations(
    data: Any,
    image_folder: str | Path | None = None,
    *,
    on_bad_record: str = "stop",
    bad_records_file: str | Path | None = None,
    threads: int = _THREADS,
    begin: Callable[[int], Any] = lambda count: None,
    advance: Callable[[int], Any] = lambda count: None,
) -> Conversations:
    """Read conversations as :func:`load_conversations` does, and leave what is bad for later.

    The result's :meth:`~Conversations.check_lengths` or :meth:`~Conversations.settle` raises or leaves out all that is bad by then,
    so that one error lists what both passes found. ``begin`` is called once with the number of records, before the first is
    looked at.

    Raises:
        ValueError: ``data`` is nothing of that kind.
    """
    check_choice("on_bad_record", on_bad_record, ("stop", "skip"))
    source, home = open_source(data)
    folder = Path(image_folder) if image_folder is not None else home
    seen: dict[Path, str] = {}
    begin(len(source))

    def check(number: int) -> BadRecord | None:
        identity = str(number)
        try:
            raw = source[number]
            identity = record_name(raw, number)
            record = parse_record(raw, number, folder)
            for image in record.images:
                _check_image(image, seen)
        except RecordError as error:
            return BadRecord(number, identity, error.kind, str(error))
        return None

    kept, bad = _sorted_out(range(len(source)), check, threads, advance)
    file = Path(bad_records_file) if bad_records_file is not None else None
    return Conversations(source, folder, kept, on_bad_record, file, tuple(bad))


def _sorted_out(
    numbers: range, check: Callable[[int], BadRecord | None], threads: int, advance: Callable[[int], Any]
) -> tuple[list[int], list[BadRecord]]:
    """Return the numbers that a check has nothing against, and what it found of the others."""
    good, bad = [], []
    for number, found in zip(numbers, in_threads(check, len(numbers), threads), strict=True):
        if found is None:
            good.append(number)
        else:
            bad.append(found)
        advance(1)
    return good, bad


def _check_image(image: Any, seen: dict[Path, str]) -> None:
    """Raise for a file that is missing or whose header or checksums are wrong; each is looked at once."""
    if not isinstance(image, Path):
        return
    if image not in seen:
        seen[image] = _image_problem(image)
    if seen[image]:
        kind, _, detail = seen[image].partition(": ")
        raise RecordError(kind, detail)


def _image_problem(image: Path) -> str:
    try:
        if not image.is_file():
            return f"missing image: {image}"
    except OSError as error:  # a name that no file can have
        return f"missing image: {str(image)[:200]!r}: {error.strerror}"
    try:
        with Image.open(image) as file:
            check_range(file)
            file.verify()
    except RecordError as error:
        return str(error)
    except BROKEN_IMAGE as error:
        return f"broken image: {image}: {error}"
    return ""
