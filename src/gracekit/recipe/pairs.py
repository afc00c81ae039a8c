"""A student and its teacher as models of transformers, and what is checked about them before any training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gracekit._structure import find_output_head
from gracekit.quant.formats.trained import SCALES_FILE
from gracekit.recipe.conversations import Record, open_images
from gracekit.recipe.processors import ConversationProcessor, load_processor
from gracekit.recipe.sharding import zero_stage
from gracekit.recipe.train_config import TrainConfig
from gracekit.recipe.weights import read_model
from gracekit.vlm.families import placeholder_id, require_image_token_id

_SAMPLES = 4  # records whose tokens both sides are compared on
_SHOWN = 3
# Numbers that an optimiser keeps for each weight, by what transformers' name for it begins with. Of others none are counted.
_MOMENTS = {"adam": 2, "ademamix": 3, "adagrad": 1, "lion": 1, "rmsprop": 1}


@dataclass(kw_only=True)
class Pair:
    """Both models with what reads their input.

    Attributes:
        student: to be trained.
        teacher: frozen, in bfloat16; None for cross-entropy alone.
        processor: the student's.
        teacher_processor: the teacher's.
        vocab_size: classes that both have, where their heads are padded differently; else None.
        notes: what was found out, a line each.
    """

    student: Any
    teacher: Any
    processor: ConversationProcessor
    teacher_processor: ConversationProcessor | None
    vocab_size: int | None = None
    notes: list[str] = field(default_factory=list)


def load_pair(config: TrainConfig, *, teacher_weights: bool = True) -> Pair:
    """Load both models and their processors.

    Args:
        config: the settings.
        teacher_weights: without them the teacher is on the meta device, for a run that has its answers.

    Raises:
        OSError: a directory or hub name that is none.
        ValueError: a model that transformers knows no vision-language class for, one with quantised weights, or a broken file.
    """
    student = load_student(config, config.pair.dtype())
    teacher = teacher_processor = None
    if config.method.losses != "ce":
        teacher = _load("teacher", config.pair.teacher, torch.bfloat16, weights=teacher_weights)
        teacher_processor = _load_processor("teacher", config.pair.teacher)
    return Pair(
        student=student,
        teacher=teacher,
        processor=_load_processor("student", config.pair.student),
        teacher_processor=teacher_processor,
    )


def scales_folder(name: str) -> Path | None:
    """Return the folder of a model's learned scales, by its directory or hub name; None for a model without them."""
    from transformers.utils import cached_file

    if Path(name).is_dir():
        return Path(name) if (Path(name) / SCALES_FILE).is_file() else None
    found = cached_file(
        name, SCALES_FILE, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    return None if found is None else Path(found).parent


def load_student(config: TrainConfig, dtype: torch.dtype) -> Any:
    """Load the student alone, in a dtype."""
    return _load("student", config.pair.student, dtype)


def _load(side: str, name: str, dtype: torch.dtype, *, weights: bool = True) -> Any:
    from transformers import AutoConfig, AutoModelForImageTextToText

    with _named(side, name):
        config = AutoConfig.from_pretrained(name)
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised.quant_method
        raise ValueError(
            f"{side} must be a model in plain weights, got a quantization_config ({getattr(method, 'value', method)}) in {name!r}"
        )
    if side == "teacher" and scales_folder(name) is not None:
        raise ValueError(
            f"teacher must be a model in plain weights, got learned scales, without which it is another model, in {name!r}"
        )
    if not weights:
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config, dtype=dtype)
    with _named(side, name):
        return read_model(AutoModelForImageTextToText, name, dtype=dtype)


def _load_processor(side: str, name: str) -> ConversationProcessor:
    with _named(side, name):
        return load_processor(name)


@contextmanager
def _named(side: str, name: str) -> Iterator[None]:
    """Say for which side it was where transformers refuses a name."""
    try:
        yield
    except (OSError, ValueError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        reason = " ".join(str(error).split())
        raise kind(
            f"{side} must be a model that transformers reads, with its processor, got {name!r}: {reason}"
        ) from error


def check_pair(pair: Pair, records: Sequence[Record]) -> list[str]:
    """Return why this student cannot learn from this teacher on these records, a line a reason; notes go to ``pair``.

    Looked at are tokenizers, chat templates, placeholders and their number in some records with images, pixels, and the sizes
    of the output heads.
    """
    if pair.teacher is None or pair.teacher_processor is None:
        return []
    problems = _tokenizers(pair)
    problems += _heads(pair)
    if placeholder_id(pair.teacher, "image") is None or placeholder_id(pair.student, "image") is None:
        return [*problems, "both models must be vision-language models with an image_token_id in their config"]
    if problems:
        return problems
    return _samples(pair, records)


def _tokenizers(pair: Pair) -> list[str]:
    assert pair.teacher_processor is not None
    ours, theirs = (p.tokenizer.get_vocab() for p in (pair.processor, pair.teacher_processor))
    differing = [token for token, index in ours.items() if theirs.get(token) != index]
    # A placeholder may have another id, or another name, on the other side: it is exchanged.
    placeholders = {pair.processor.image_token, pair.teacher_processor.image_token}
    differing = [token for token in differing if token not in placeholders]
    if not differing:
        return []
    shown = ", ".join(f"{token!r} is {ours[token]} and {theirs.get(token)}" for token in differing[:_SHOWN])
    return [f"the tokenizers must give every token one id, got {len(differing)} that differ: {shown}"]


def _heads(pair: Pair) -> list[str]:
    assert pair.teacher_processor is not None
    sizes = [len(_head(model).weight) for model in (pair.student, pair.teacher)]
    used = max(pair.processor.tokenizer.get_vocab().values()) + 1
    if min(sizes) < used:
        return [f"both output heads must have the tokenizer's {used} classes, got {sizes[0]} and {sizes[1]}"]
    if sizes[0] != sizes[1]:
        pair.vocab_size = min(sizes)
        pair.notes.append(
            f"output heads of {sizes[0]:,} and {sizes[1]:,} classes: the first {pair.vocab_size:,} are compared"
        )
    return []


def _samples(pair: Pair, records: Sequence[Record]) -> list[str]:
    """Compare what both sides make of some records; those that the student's cannot read are bad ones, and not its affair."""
    assert pair.teacher_processor is not None
    first = records[: 50 * _SAMPLES]
    with_images = (encoded for record in first if record.images and (encoded := _encoded(pair.processor, record)))
    found = list(islice(with_images, _SAMPLES))
    for record, images, ours in found or list(filter(None, (_encoded(pair.processor, record) for record in first[:1]))):
        try:
            theirs = pair.teacher_processor.encode(record.turns, images)
        except ValueError as error:
            return [f"the teacher's processor must read what the student's does, got record {record.index}: {error}"]
        counts = [
            int((torch.as_tensor(side["input_ids"]) == require_image_token_id(model)).sum())
            for side, model in ((ours, pair.student), (theirs, pair.teacher))
        ]
        where = f"record {record.index} ({record.id!r})"
        if counts[0] != counts[1]:
            return [f"both sides must have as many visual tokens, got {counts[0]} and {counts[1]} for {where}"]
        exchanged = _exchange(torch.as_tensor(ours["input_ids"]), pair)
        if not torch.equal(exchanged, torch.as_tensor(theirs["input_ids"])):
            return [
                f"both sides must write a conversation with the same tokens (their chat templates differ?), got others for {where}"
            ]
        for name, value in ours.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                other = theirs.get(name)
                if not isinstance(other, Tensor) or other.shape != value.shape or not torch.equal(other, value):
                    return [f"both image processors must give the same {name}, got others for {where}"]
    return []


def _encoded(processor: ConversationProcessor, record: Record) -> tuple[Record, list[Any], dict[str, Any]] | None:
    try:
        images = open_images(record)
        return record, images, processor.encode(record.turns, images)
    except (ValueError, TypeError):
        return None


def _exchange(ids: Tensor, pair: Pair) -> Tensor:
    ours, theirs = require_image_token_id(pair.student), require_image_token_id(pair.teacher)
    return torch.where(ids == ours, torch.tensor(theirs), ids)


def _head(model: nn.Module) -> Any:
    head = find_output_head(model)
    if head is None:
        raise ValueError(f"a model must have an output head (get_output_embeddings()), got {type(model).__name__}")
    return head


def memory_needed(pair: Pair, config: TrainConfig, *, ranks: int) -> dict[str, float]:
    """Return the bytes that do not depend on the batch, by what holds them, for one process.

    Weights, their gradients and the optimiser's moments. FSDP divides all of them by the number of ranks, DeepSpeed's ZeRO-1 the
    moments and ZeRO-2 the gradients too. A teacher that is not online leaves its output head. Activations come on top, and one
    micro-batch with its teacher's answer: the others of an optimiser step wait on the CPU.
    """
    size = bytes_of(pair.student)
    stage = 3 if config.training.fsdp else zero_stage(config.training)  # FSDP shards what ZeRO-3 does
    weights, gradients, states = (ranks if stage >= least else 1 for least in (3, 2, 1))
    needed = {"student": size / weights, "its gradients": size / gradients}
    optim = str(getattr(config.training.optim, "value", config.training.optim)).removeprefix("paged_")
    moments = next((count for name, count in _MOMENTS.items() if optim.startswith(name)), 0)
    each = sum(p.numel() for p in pair.student.parameters()) if "8bit" in optim else size
    needed["the optimiser's moments"] = moments * each / states
    if pair.teacher is not None and config.pair.teacher_mode == "online":
        needed["teacher"] = bytes_of(pair.teacher)
    elif pair.teacher is not None:
        head = _head(pair.teacher).weight
        needed["teacher's output head"] = float(head.numel() * head.element_size())
    return needed


def bytes_of(model: nn.Module) -> float:
    """Return the bytes of a model's weights."""
    return float(sum(p.numel() * p.element_size() for p in model.parameters()))


def check_memory(needed: dict[str, float], device: torch.device) -> list[str]:
    """Return a reason where that is more than a device has free."""
    if device.type == "cuda":
        free = float(torch.cuda.mem_get_info(device)[0])
    else:
        import psutil

        free = float(psutil.virtual_memory().available)
        needed = {name: size for name, size in needed.items() if name not in ("student", "teacher")}  # there already
    total = sum(needed.values())
    if total <= free:
        return []
    listed = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in needed.items())
    return [
        f"before any activations {total / 2**30:.1f} GiB are needed on {device} ({listed}), got {free / 2**30:.1f} GiB free: "
        "shard with --fsdp, train in bfloat16 (--student_dtype), or let the teacher answer beforehand (--teacher_mode precomputed)"
    ]
