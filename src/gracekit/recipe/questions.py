"""The questions of a held-out set of conversations: what is asked, what is true, and what an answer is worth."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gracekit.recipe.conversations import Record, load_conversations
from gracekit.recipe.metrics import choice_score, exact_match, vqa_score
from gracekit.recipe.record_sources import open_source

METRICS = ("exact", "vqa", "choice")


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


def read_questions(data: Path, images: Path | None, on_bad_record: str = "stop") -> list[Asked]:
    """Return all questions of a file.

    Args:
        data: JSON or JSONL in the LLaVA conversation format; a record with a single answer may have ``answers``, a list of several
            people's (texts, or VQA's objects with ``answer``).
        images: where relative paths of images start; None: the file's folder.
        on_bad_record: as :func:`~gracekit.recipe.conversations.load_conversations` takes it.

    Raises:
        ValueError: a record is bad, or has ``answers`` and more than one answer.
    """
    source, _ = open_source(data)
    found = []
    for record in load_conversations(data, images, on_bad_record=on_bad_record):
        answered = [place for place, turn in enumerate(record.turns) if turn.role == "assistant"]
        people = source[record.index].get("answers")
        if people is not None and (len(answered) > 1 or not people):
            raise ValueError(
                f"answers must be those to a record's one question, got {len(people)} for {len(answered)} in record {record.id}"
            )
        for place in answered:
            given = people or [record.turns[place].text]
            truths = tuple(str(one["answer"]) if isinstance(one, dict) else str(one) for one in given)
            found.append(Asked(record=record, turn=place, truths=truths))
    return found
