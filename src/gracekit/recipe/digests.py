"""What a run was made from, in a few bytes: data by content, pictures and weights by the sizes and times of their files.

A path says where something was, not what: edited answers or a teacher trained further have the same one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# By the ends of their names, a model's weights, and what describes it, its tokenizer, chat template and processor.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
BESIDE = (".json", ".jinja", ".model", ".txt", ".tiktoken")
_SHOWN = 16  # hexadecimal digits
_BLOCK = 1 << 20


def data_digest(data: str | Path) -> str:
    """Return the digest of a data file's content, or of a saved data set's description and the sizes of its files.

    ``datasets`` writes a new fingerprint into the description with every change. Nothing there: an empty string.
    """
    path = Path(data)
    if path.is_dir():
        return files_digest(path, [file for file in path.rglob("*") if file.is_file()], times=False)
    return _content(path) if path.is_file() else ""


def data_stamp(data: str | Path) -> str:
    """Return the digest of a data file's size and time of change, its content unread; of a folder that of :func:`data_digest`."""
    path = Path(data)
    return _digest([_stamp(path)]) if path.is_file() else data_digest(path)


def files_digest(folder: Path, files: Iterable[Path], *, times: bool = True) -> str:
    """Return the digest of files by name: the content of JSON, of all others size and time of change."""
    found = []
    for path in sorted(files):
        plain = _stamp(path) if times else str(path.stat().st_size)
        found.append(f"{path.relative_to(folder)} {_content(path) if path.suffix == '.json' else plain}")
    return _digest(found)


def weights_digest(name: str) -> str:
    """Return the digest of a model's configuration and weights.

    Args:
        name: directory, or hub name of a model that was downloaded.

    Raises:
        OSError: there is no such model.
    """
    from transformers.utils import cached_file

    folder = Path(name) if Path(name).is_dir() else Path(str(cached_file(name, "config.json"))).parent
    kinds = ("config.json", "*.index.json", "*.safetensors", "*.bin")
    return files_digest(folder, {file for kind in kinds for file in folder.glob(kind)})


def model_files(folder: Path, *, weights: bool = True) -> dict[str, str]:
    """Return what tells each file of a model's folder from another: content, of weights size and time of change.

    Args:
        folder: of model and processor.
        weights: have them too.
    """
    found = {path.name: path for path in sorted(folder.glob("*")) if path.is_file()}
    texts = {name: _content(path) for name, path in found.items() if name.endswith(BESIDE)}
    return texts | {name: _stamp(path) for name, path in found.items() if weights and name.endswith(WEIGHTS)}


def records_digests(records: Iterable[Any]) -> dict[str, str]:
    """Return the digests of which records there are, and of the sizes and times of change of the files they name as images."""
    numbers, pictures = hashlib.sha256(), hashlib.sha256()
    stamps: dict[Path, str] = {}
    for record in records:
        numbers.update(f"{record.index}\n".encode())
        for image in record.images:
            if isinstance(image, Path):
                stamps[image] = stamps.get(image) or _stamp(image)
                pictures.update(f"{record.index} {stamps[image]}\n".encode())
    return {"kept_records": numbers.hexdigest()[:_SHOWN], "pictures": pictures.hexdigest()[:_SHOWN]}


def processor_digest(processor: Any) -> str:
    """Return the digest of what makes a conversation a model's input: tokenizer, chat template, image processor."""
    tokenizer = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    for name in ("padding", "truncation"):  # of the latest call
        tokenizer.pop(name, None)
    images = processor.image_processor.to_dict()
    images = {name: value for name, value in images.items() if not name.startswith("_") and name != "processor_class"}
    return _digest(
        [json.dumps(part, sort_keys=True, default=str) for part in (tokenizer, processor.chat_template, images)]
    )


def _stamp(path: Path) -> str:
    stat = path.stat()
    return f"{stat.st_size} {stat.st_mtime_ns}"


def _content(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            found.update(block)
    return found.hexdigest()[:_SHOWN]


def _digest(lines: Iterable[str]) -> str:
    found = hashlib.sha256()
    for line in lines:
        found.update(f"{line}\n".encode())
    return found.hexdigest()[:_SHOWN]
