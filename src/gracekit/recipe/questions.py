"""The questions of a held-out set of conversations: what is asked, what is true, and what an answer is worth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from gracekit.recipe.bad_records import BadRecord, in_threads, settle
from gracekit.recipe.conversations import Record, find_conversations
from gracekit.recipe.metrics import choice_score, exact_match, vqa_score
from gracekit.recipe.processors import ConversationProcessor
from gracekit.recipe.record_format import IMAGE_MARK, RecordError
from gracekit.recipe.record_sources import open_source

METRICS = ("exact", "vqa", "choice")
_THREADS = 4


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One question: the turn of a record that a model is to give.

    Attributes:
        record: the conversation.
        turn: index of the answer in its turns.
        truths: true answers: the record's ``answers``, or what the turn says.
    """

    record: Record
    turn: int
    truths: tuple[str, ...]

    @property
    def key(self) -> tuple[int, int]:
        """What tells it from the others of its set."""
        return self.record.index, self.turn

    @property
    def text(self) -> str:
        """What is asked last."""
        return self.record.turns[self.turn - 1].text

    def score(self, metric: str, answer: str) -> float:
        """Return what an answer is worth, in [0, 1]."""
        if metric == "choice":
            return choice_score(answer, self.truths, self.text)
        return {"exact": exact_match, "vqa": vqa_score}[metric](answer, self.truths)

    def encode(self, processor: ConversationProcessor) -> dict[str, Any]:
        """Return what a model reads to answer it: all that stands before."""
        turns = self.record.turns[: self.turn]
        seen = sum(turn.text.count(IMAGE_MARK) for turn in turns)
        return processor.encode(turns, self.record.images[:seen], add_generation_prompt=True)


@dataclass(frozen=True, kw_only=True)
class Questions(Sequence[Asked]):
    """The questions of a set.

    Attributes:
        bad: records that were left out, under ``on_bad_record="skip"``.
        total: records, good and bad.
    """

    asked: Sequence[Asked]
    bad: tuple[BadRecord, ...]
    total: int

    def __len__(self) -> int:
        return len(self.asked)

    @overload
    def __getitem__(self, index: int) -> Asked: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Asked]: ...
    def __getitem__(self, index: int | slice) -> Asked | Sequence[Asked]:
        return self.asked[index]

    def __iter__(self) -> Iterator[Asked]:
        return iter(self.asked)


def read_questions(
    data: Any,
    images: str | Path | None = None,
    on_bad_record: str = "stop",
    *,
    processor: ConversationProcessor | None = None,
    metric: str = "exact",
    bad_records_file: str | Path | None = None,
    begin: Callable[[int], Any] = lambda count: None,
    advance: Callable[[int], Any] = lambda count: None,
) -> Questions:
    """Return all questions of a set.

    Args:
        data: as :func:`~gracekit.recipe.conversations.load_conversations` takes it; a record with a single answer may have
            ``answers``, a list of several people's (texts, or VQA's objects with ``answer``).
        images: where relative paths of images start; None: the file's folder.
        on_bad_record: as :func:`~gracekit.recipe.conversations.load_conversations` takes it.
        processor: of the model: a record that it cannot encode is a bad one. None: that is not looked at.
        metric: one of METRICS: a record whose answers it cannot judge is a bad one.
        bad_records_file: where bad records are written.
        begin: called at the begin of each of two passes, with the number of records that it goes over: all, then the good ones.
        advance: called with the number of records done in a pass, for a progress bar.

    Raises:
        ValueError: ``data`` is nothing of that kind.
        BadRecordsError: records are bad and are to stop, or all are; so is one that has ``answers`` and more than one answer.
    """
    source, _ = open_source(data)
    records = find_conversations(data, images, on_bad_record=on_bad_record, begin=begin, advance=advance)

    def look(number: int) -> list[Asked] | BadRecord:
        record = records[number]
        try:
            found = _questions(record, source[record.index].get("answers"))
            for asked in found:
                if processor is not None:
                    asked.encode(processor)
        except RecordError as error:
            return BadRecord(record.index, record.id, error.kind, str(error))
        except (ValueError, TypeError) as error:
            return BadRecord(record.index, record.id, "cannot be encoded", f"cannot be encoded: {error}")
        try:
            for asked in found:
                asked.score(metric, "")
        except ValueError as error:
            return BadRecord(record.index, record.id, f"not for {metric}", f"not for {metric}: {error}")
        return found

    asked: list[Asked] = []
    bad = list(records.bad)
    begin(len(records))
    for found in in_threads(look, len(records), _THREADS):
        if isinstance(found, BadRecord):
            bad.append(found)
        else:
            asked += found
        advance(1)
    file = Path(bad_records_file) if bad_records_file is not None else None
    left_out = settle(bad, records.total, on_bad_record, file)
    if not asked:
        raise ValueError(f"data must hold at least one record, got 0 in {str(data)!r}")
    return Questions(asked=asked, bad=left_out, total=records.total)


def _questions(record: Record, people: Any) -> list[Asked]:
    answered = [place for place, turn in enumerate(record.turns) if turn.role == "assistant"]
    if people is None:
        return [Asked(record=record, turn=place, truths=(record.turns[place].text,)) for place in answered]
    if not isinstance(people, list | tuple) or not people:
        raise RecordError("wrong answers", f"answers must be a list of texts, got {str(people)[:80]!r}")
    if len(answered) > 1:
        raise RecordError(
            "wrong answers",
            f"answers must be those to a record's one question, got {len(people)} for {len(answered)} in record {record.id}",
        )
    given = [one.get("answer") if isinstance(one, Mapping) else one for one in people]
    if not all(isinstance(one, str | int | float) for one in given):
        raise RecordError("wrong answers", f"answers must be texts or objects with answer, got {str(people)[:80]!r}")
    return [Asked(record=record, turn=answered[0], truths=tuple(map(str, given)))]
