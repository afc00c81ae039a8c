"""A teacher's answers for a whole data set, on disk: it answers once, and students train without it.

For each sample there are the hidden states that its output head takes at supervised tokens (T, d) and its visual tokens (sum n, d),
a few megabytes for a model of 7 billion weights; where the head is more than one product, logits (T, V) take the place of the
hidden states. Shards are written beside and renamed, so a computation that was interrupted goes on with the first one missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset

from gracekit._distributed import world_size
from gracekit.recipe.distillation import Teacher, supervised_rows
from gracekit.recipe.stages import write_json

SHARD = 128
ABOUT, _HEAD = "states.json", "head.safetensors"
_PREFIX = "teacher_"


class Samples(Protocol):
    """Encoded samples by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def compute_states(
    teacher: Teacher,
    dataset: Samples,
    collate: Callable[[Sequence[Any]], Mapping[str, Any]],
    folder: Path,
    about: Mapping[str, Any],
    *,
    device: torch.device,
    rank: int = 0,
    advance: Callable[[int], Any] = lambda count: None,
) -> None:
    """Write a teacher's answers for every sample; shards that are there already stay.

    Args:
        teacher: the teacher, on ``device``.
        dataset: encoded samples.
        collate: makes a batch of a list of samples.
        folder: made where it does not exist.
        about: what the answers depend on (teacher, processor, data), plain values.
        device: where to compute.
        rank: of this process; shards are dealt out over all of them.
        advance: called with the number of samples done.

    Raises:
        ValueError: the folder holds the answers to something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    described = {
        **about,
        "from_hidden": teacher.reader.from_hidden,
        "visual": teacher.reader.visual is not None,
        "samples": len(dataset),
        "shard": SHARD,
    }
    _check(folder, described)
    if rank == 0:
        write_json(folder / ABOUT, described)
        if teacher.head is not None:
            _save({"weight": teacher.head.cpu().contiguous()}, folder / _HEAD)
    for number, start in enumerate(range(0, len(dataset), SHARD)):
        indices = range(start, min(start + SHARD, len(dataset)))
        path = _shard(folder, number)
        if number % world_size() != rank or path.is_file():
            advance(len(indices))
            continue
        tensors: dict[str, Tensor] = {}
        for index in indices:
            for name, value in _answer(teacher, collate([dataset[index]]), device).items():
                tensors[f"{index}.{name}"] = value
            advance(1)
        _save(tensors, path)


def _answer(teacher: Teacher, batch: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    given = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    labels = given.pop("labels")
    # One sample at a time: nothing is padded, and an answer does not depend on its neighbours.
    signal = teacher(given, supervised_rows(labels))
    found = {"hidden": signal.hidden, "logits": signal.logits, "tokens": signal.tokens}
    kept = {name: value.to("cpu").contiguous().clone() for name, value in found.items() if value is not None}
    if signal.lengths is not None:
        kept["lengths"] = torch.tensor(signal.lengths, dtype=torch.long)
    return kept


class TeacherStates:
    """Answers that :func:`~gracekit.recipe.teacher_states.compute_states` wrote, by sample.

    Args:
        folder: where they are.
        about: what they must have been computed for.
        visual: give visual tokens too. Answers that have them serve losses that take none as well.

    Attributes:
        from_hidden: whether they are hidden states, which have a head, and not logits.

    Raises:
        ValueError: they are incomplete, or of something else.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], *, visual: bool = True) -> None:
        self.folder = folder
        described = read_about(folder)
        if described is None:
            raise ValueError(f"teacher_states must be a folder of a teacher's answers, got {str(folder)!r}")
        _check(folder, {**about, "visual": True} if visual else about)
        missing = _missing(folder, described)
        if missing:
            raise ValueError(f"teacher_states must be complete, got {len(missing)} missing files in {str(folder)!r}")
        self.samples, self.shard = int(described["samples"]), int(described["shard"])
        self.from_hidden = bool(described["from_hidden"])
        self._names = ("hidden", "logits", "tokens", "lengths") if visual else ("hidden", "logits")

    def head(self) -> Tensor | None:
        """Return the weight (V, d) of the teacher's output head; None where the answers are logits."""
        path = self.folder / _HEAD
        return load_file(path)["weight"] if path.is_file() else None

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        with safe_open(_shard(self.folder, index // self.shard), "pt") as file:
            keys = set(file.keys())
            return {name: file.get_tensor(f"{index}.{name}") for name in self._names if f"{index}.{name}" in keys}


class TaughtDataset(Dataset[dict[str, Any]]):
    """Samples with the teacher's answers beside them."""

    def __init__(self, dataset: Samples, states: TeacherStates) -> None:
        if len(dataset) != states.samples:
            raise ValueError(
                f"teacher_states must have an answer for each sample, got {states.samples} for {len(dataset)}"
            )
        self.dataset, self.states = dataset, states

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        answers = {f"{_PREFIX}{name}": value for name, value in self.states[index].items()}
        return {**self.dataset[index], **answers}


class TaughtCollator:
    """A collator that also joins the teacher's answers."""

    def __init__(self, collate: Callable[[Sequence[Any]], Mapping[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the batch."""
        plain = [{k: v for k, v in example.items() if not k.startswith(_PREFIX)} for example in examples]
        batch = dict(self.collate(plain))
        for name in (key for key in examples[0] if key.startswith(_PREFIX)):
            joined = torch.cat([example[name] for example in examples])
            batch[name] = joined.tolist() if name == f"{_PREFIX}lengths" else joined
        return batch


def read_about(folder: Path) -> dict[str, Any] | None:
    """Return what a folder's answers were computed for; None where it has none.

    Raises:
        ValueError: its description is not one.
    """
    path = folder / ABOUT
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or not {"from_hidden", "visual", "samples", "shard"} <= found.keys():
        raise ValueError(
            f"teacher_states must be a folder of a teacher's answers, got another {ABOUT} in {str(folder)!r}"
        )
    return found


def is_complete(folder: Path) -> bool:
    """Whether a folder has the answers for every sample, whatever they are of."""
    described = read_about(folder)
    return described is not None and not _missing(folder, described)


def _missing(folder: Path, described: Mapping[str, Any]) -> list[Path]:
    shards = -(-int(described["samples"]) // int(described["shard"]))
    needed = [_shard(folder, number) for number in range(shards)]
    needed += [folder / _HEAD] if described["from_hidden"] else []
    return [path for path in needed if not path.is_file()]


def _shard(folder: Path, number: int) -> Path:
    return folder / f"states-{number:05d}.safetensors"


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    part = path.with_name(path.name + ".part")
    save_file(tensors, part)
    part.replace(path)


def _check(folder: Path, described: Mapping[str, Any]) -> None:
    there = read_about(folder)
    if there is None:
        return
    differing = [
        f"{name}: {there.get(name)!r} -> {value!r}" for name, value in described.items() if there.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"teacher_states must be a new folder or answers to the same, got {str(folder)!r} with other ones "
            f"(there -> asked for): {'; '.join(differing)}"
        )
