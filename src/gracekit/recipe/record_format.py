"""One record of conversation data: the LLaVA format and that of messages, as turns and images.

Both become the same :class:`Record`, in which a marker stands where an image goes. Whatever keeps a record from being read is a
:class:`RecordError`, whose kind is what bad records are counted by.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps

IMAGE_MARK = "<image>"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# What Pillow's decoders raise for files that are no pictures, or broken ones.
BROKEN_IMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
_SIXTEEN_BITS = ("PNG", "PPM")  # formats whose pixels of mode I are in [0, 65535]


@dataclass(frozen=True)
class Turn:
    """What one side says.

    Attributes:
        role: "system", "user" or "assistant".
        text: with the marker ``<image>`` where an image stands, in the user's turns only.
    """

    role: str
    text: str


@dataclass(frozen=True)
class Record:
    """One conversation.

    Attributes:
        index: its place in the data, from 0.
        id: its own name; the index, as text, where it has none.
        images: in the order of their markers: paths, or Pillow images where the data holds the pictures themselves.
        turns: an optional system turn, and then user and assistant in turn.
    """

    index: int
    id: str
    images: tuple[Any, ...]
    turns: tuple[Turn, ...]


class RecordError(ValueError):
    """What is wrong with one record: a kind to count by, and the particulars."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind


def open_image(image: Any) -> Image.Image:
    """Return a picture in RGB, decoded, turned as its EXIF says; ``image`` is a path or a Pillow image.

    16 bits of grey become 8.

    Raises:
        RecordError: a ValueError, for one that cannot be decoded, and one of floats or wider integers, whose white nobody knows.
    """
    try:
        if isinstance(image, Image.Image):
            return _as_rgb(image)
        with Image.open(image) as file:
            return _as_rgb(file)
    except RecordError:
        raise
    except FileNotFoundError as error:
        raise RecordError("missing image", str(image)) from error
    except BROKEN_IMAGE as error:
        raise RecordError("broken image", f"{image}: {error}") from error


def _as_rgb(image: Image.Image) -> Image.Image:
    check_range(image)
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # convert would clip at 255 instead
        upright = Image.fromarray(((np.asarray(upright).astype(np.uint32) + 128) // 257).astype(np.uint8))
    return upright.convert("RGB")


def check_range(image: Image.Image) -> None:
    """Raise RecordError for a picture whose mode does not say what white is; its pixels are not looked at."""
    if image.mode == "F" or (image.mode == "I" and image.format not in _SIXTEEN_BITS):
        name = getattr(image, "filename", "") or "a picture"
        kind = "floats" if image.mode == "F" else "integers beyond 16 bits"
        raise RecordError(
            "image of unknown range", f"{name}: pixels must have 8 or 16 bits, got {kind} (mode {image.mode!r})"
        )


def open_images(record: Record) -> list[Image.Image]:
    """Return a record's images in RGB, decoded.

    Raises:
        RecordError: a ValueError, for one that cannot be decoded.
    """
    return [open_image(image) for image in record.images]


class Encoder(Protocol):
    """What encoding a record needs of a processor."""

    def encode(self, turns: Sequence[Turn], images: Sequence[Any]) -> Mapping[str, Any]:
        """Return at least ``input_ids``."""


def encode_record(record: Record, processor: Encoder, max_length: int | None) -> Mapping[str, Any]:
    """Return a record as a model's input.

    Raises:
        RecordError: a ValueError, for an image that cannot be decoded, what the processor does not take, and more than
            ``max_length`` tokens.
    """
    images = open_images(record)
    try:
        sample = processor.encode(record.turns, images)
    except RecordError:
        raise
    except (ValueError, TypeError) as error:  # tokenizers know both
        raise RecordError("cannot be encoded", str(error)) from error
    length = len(sample["input_ids"])
    if max_length is not None and length > max_length:
        raise RecordError("too long", f"{length} tokens, max_length={max_length}")
    return sample


def parse_record(raw: Any, index: int, image_folder: Path) -> Record:
    """Return a record of either format.

    Raises:
        RecordError: a ValueError that says what is wrong; images are not looked at.
    """
    if not isinstance(raw, Mapping):
        raise RecordError("no record", f"an object with conversations or messages, got {type(raw).__name__}")
    inline: list[Any] = []
    if raw.get("conversations") is not None:
        said = [(turn.get("from"), turn.get("value")) for turn in _turns(raw["conversations"])]
    elif raw.get("messages") is not None:
        said = [(turn.get("role"), _content(turn.get("content"), inline)) for turn in _turns(raw["messages"])]
    else:
        raise RecordError("no conversation", f"neither conversations nor messages among {sorted(map(str, raw))}")
    turns = tuple(_turn(role, text) for role, text in said)
    _check_roles(turns)
    given = raw.get("images") if raw.get("images") is not None else raw.get("image")
    if given is not None and inline:
        raise RecordError("images twice", "in the record and inside its messages")
    listed = list(given) if isinstance(given, list | tuple) else [given] if given is not None else inline
    marks = sum(turn.text.count(IMAGE_MARK) for turn in turns)
    if marks != len(listed):
        raise RecordError(
            "number of image markers", f"{len(listed)} images and {marks} {IMAGE_MARK} in the user's turns"
        )
    return Record(index, record_name(raw, index), tuple(_image(image, image_folder) for image in listed), turns)


def _turns(value: Any) -> list[Mapping[str, Any]]:
    if not isinstance(value, list | tuple) or not all(isinstance(turn, Mapping) for turn in value):
        raise RecordError("no conversation", f"turns must be a list of objects, got {str(value)[:80]!r}")
    return list(value)


def _turn(role: Any, text: Any) -> Turn:
    if not isinstance(role, str) or role not in _ROLES:
        raise RecordError("unknown role", f"{str(role)[:80]!r}, not one of {', '.join(_ROLES)}")
    if not isinstance(text, str):
        raise RecordError("no text", f"a turn of {role!r} holds {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can write and no tokenizer reads
        raise RecordError("no Unicode text", f"a turn of {role!r} holds {text[error.start]!r}") from error
    turn = Turn(_ROLES[role], text)
    if turn.role != "user" and IMAGE_MARK in text:
        raise RecordError("image marker outside a user's turn", f"in one of {role!r}")
    return turn


def _content(content: Any, inline: list[Any]) -> Any:
    """Return a message's content as text with markers; images that stand in it go to ``inline``."""
    if not isinstance(content, list | tuple):
        return content
    text = ""
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            said = part.get("text")
            if not isinstance(said, str | None):
                raise RecordError("no text", f"a part of type 'text' holds {type(said).__name__}")
            text += said or ""
        elif kind == "image":
            text += IMAGE_MARK
            held = [part[name] for name in ("image", "path") if part.get(name) is not None]
            inline += held[:1]
        else:
            raise RecordError("unknown content", f"a part of type {kind!r}, not 'text' or 'image'")
    return text


def _check_roles(turns: tuple[Turn, ...]) -> None:
    said = turns[1:] if turns and turns[0].role == "system" else turns
    if not any(turn.role == "assistant" for turn in said):
        raise RecordError("no assistant turn", f"{len(turns)} turns")
    if any(turn.role != ("user", "assistant")[i % 2] for i, turn in enumerate(said)) or len(said) % 2:
        raise RecordError("roles do not alternate", ", ".join(turn.role for turn in turns)[:200])
    if any(turn.role == "assistant" and not turn.text.strip() for turn in said):
        raise RecordError("empty answer")


def _image(image: Any, folder: Path) -> Any:
    if isinstance(image, Mapping):  # what a data set holds where its images are not decoded
        if isinstance(image.get("bytes"), bytes):
            return _from_bytes(image["bytes"])
        image = image.get("path")
    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, str | Path):
        raise RecordError("no image", f"a path or a picture, got {type(image).__name__}")
    return folder / image


def _from_bytes(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except BROKEN_IMAGE as error:
        raise RecordError("broken image", str(error)) from error


def record_name(raw: Any, index: int) -> str:
    """Return a record's own name, or its index as text."""
    return str(raw["id"]) if isinstance(raw, Mapping) and raw.get("id") is not None else str(index)
