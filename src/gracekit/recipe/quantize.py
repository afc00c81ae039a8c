"""Saved models as folders for inference engines: ``gracekit quantize`` rounds a plain one, ``gracekit export`` takes a trained one.

Both write weights, configuration and whatever lies beside them that an engine needs (tokenizer, processor, chat template).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from gracekit.quant import (
    LSQConfig,
    convert,
    coverage,
    export_awq,
    export_compressed_tensors,
    load_qat,
    quantize_rtn,
)
from gracekit.quant.formats import awq, compressed_tensors
from gracekit.quant.formats.trained import SCALES_FILE, learned_widths
from gracekit.quant.int4 import is_quantized
from gracekit.recipe.digests import BESIDE, WEIGHTS
from gracekit.recipe.output_folder import is_free
from gracekit.recipe.progress import quiet, say
from gracekit.recipe.weights import model_class, read_model

EXPORTS = {"compressed-tensors": export_compressed_tensors, "awq": export_awq}
# Formats, and the widths in bits that each can hold.
FORMATS = {
    "torchao": (4, 8),
    "torchao-reference": tuple(range(2, 9)),
    "compressed-tensors": compressed_tensors.WIDTHS,
    "awq": awq.WIDTHS,
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# The weights are written anew, and what describes them with them.
_WEIGHTS = (*WEIGHTS, ".index.json")
_OWN = ("config.json", "generation_config.json")


def load(folder: Path) -> Any:
    """Return the model of a folder, of the class that its config.json names, in the dtype it was saved in.

    Raises:
        ValueError: the folder holds no model of transformers, or not all of its weights.
    """
    kind, described = class_of(folder)
    if "quantization_config" in described:
        method = described["quantization_config"].get("quant_method")
        raise ValueError(f"the folder must hold a model that is not quantised yet, got one of {method!r} in {folder}")
    return read_model(kind, folder, dtype="auto").eval()


def class_of(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return the class that a folder's config.json names, and what it says.

    Raises:
        ValueError: the folder holds no model of transformers.
    """
    settings = folder / "config.json"
    if not settings.is_file():
        raise ValueError(f"the folder must hold a model that save_pretrained wrote, got no config.json in {folder}")
    described = json.loads(settings.read_text(encoding="utf-8"))
    if not isinstance(described, dict):
        raise ValueError(f"config.json must hold an object, got {type(described).__name__} in {folder}")
    names = described.get("architectures") or []
    kind = model_class(names, folder)
    if kind is None:
        raise ValueError(f"config.json must name a class of transformers under architectures, got {names} in {folder}")
    return kind, described


def trained_folder(run: Path) -> Path:
    """Return the folder of save_qat that a run holds: itself, or the one below ``model`` or ``models``.

    Raises:
        ValueError: there is none, or several.
    """
    found = [path.parent for pattern in ("", "model/", "models/*/") for path in run.glob(pattern + SCALES_FILE)]
    if len(found) != 1:
        names = ", ".join(str(path) for path in sorted(found)) or "none"
        raise ValueError(f"RUN_DIR must hold one model with learned scales, or be its folder, got {names} in {run}")
    return found[0]


def write(model: Any, source: Path, output: Path, form: str, dtype: torch.dtype | None) -> None:
    """Write a prepared or converted model in a format, with the files that lie beside it in ``source``.

    All of it is written beside ``output``, a new or empty folder, and renamed.

    Raises:
        ValueError: a layer does not fit the format.
    """
    part = output.with_name(f".{output.name}.gracekit-part")
    shutil.rmtree(part, ignore_errors=True)  # of an interrupted writing
    try:
        _write(model, source, part, form, dtype)
        part.replace(output)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    say(f"{coverage(model)}. Written: {output}")


def _write(model: Any, source: Path, output: Path, form: str, dtype: torch.dtype | None) -> None:
    plain = "portable" if form == "torchao" else "reference"
    # AWQ's scales are float16 whatever the other weights are.
    convert(model, plain, dtype=None if form == "awq" else dtype)
    if dtype is not None:
        _cast_others(model, dtype)
    if form in EXPORTS:
        EXPORTS[form](model, output)
    else:
        model.save_pretrained(output)
    for path in sorted(source.iterdir()):
        beside = path.name.endswith(BESIDE) and not path.name.endswith(_WEIGHTS) and path.name not in _OWN
        if path.is_file() and beside and not (output / path.name).exists():
            shutil.copyfile(path, output / path.name)


def _cast_others(model: Any, dtype: torch.dtype) -> None:
    """Cast what is not quantised; a cast of the scales would change the weights they stand for."""

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    for module in model.modules():
        if not is_quantized(module):
            module._apply(cast, recurse=False)
        elif module.bias is not None:
            module.bias.data = cast(module.bias.data)


def check_empty(output: Path) -> None:
    """Raise where a folder or a file is in the way, or where nothing can be written."""
    there = next(path for path in (output, *output.parents) if path.exists())
    if there.is_dir() and not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"output must be where a folder can be written, got {str(output)!r} below {str(there)!r}")
    if not is_free(output):
        raise FileExistsError(f"output must be a new or empty folder, got {str(output)!r}, which holds something")


def check_width(form: str, bits: int) -> None:
    """Raise unless a format can hold weights of that many bits."""
    if bits not in FORMATS[form]:
        raise ValueError(
            f"--format {form} holds weights of {' or '.join(map(str, FORMATS[form]))} bits, got bits={bits}"
        )


def quantize(arguments: Sequence[str] | None = None) -> int:
    """Round a saved model's decoder to nearest and write it for an engine."""
    parser = _parser("quantize", "MODEL_DIR", "folder that save_pretrained wrote", quantize.__doc__)
    parser.add_argument("--method", choices=["rtn"], default="rtn", help="round to nearest, no training (default)")
    parser.add_argument("--bits", type=int, default=4, help="width of a weight (default 4)")
    parser.add_argument("--group-size", type=int, default=128, help="inputs that share a scale (default 128)")
    given = parser.parse_args(arguments)

    def act() -> Any:
        LSQConfig(bits=given.bits, group_size=given.group_size)
        check_width(given.format, given.bits)
        if (given.folder / SCALES_FILE).is_file():  # without them its weights are another model
            raise ValueError(
                f"MODEL_DIR must hold a plain model, got learned scales (gracekit export writes them) in {given.folder}"
            )
        model = load(given.folder)
        dtype = DTYPES.get(given.dtype, model.dtype)
        # What kernels of the format hold exactly: float16 scales for AWQ and for float16 models.
        half = given.format == "awq" or dtype == torch.float16
        scale_dtype = torch.float16 if half else torch.bfloat16
        config = LSQConfig(bits=given.bits, group_size=given.group_size, scale_dtype=scale_dtype)
        return quantize_rtn(model, config, target="reference")

    return _run("quantize", given, act)


def export(arguments: Sequence[str] | None = None) -> int:
    """Write a model trained with learned scales for an engine."""
    text = "folder of a run of `gracekit train` or `gracekit recipe`, or of gracekit.quant.save_qat"
    parser = _parser("export", "RUN_DIR", text, export.__doc__)
    given = parser.parse_args(arguments)

    def act() -> Any:
        given.folder = trained_folder(given.folder)
        for bits in learned_widths(given.folder):
            check_width(given.format, bits)
        model = load(given.folder)
        load_qat(model, given.folder)
        return model

    return _run("export", given, act)


def _parser(name: str, metavar: str, folder: str, description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"gracekit {name}", description=description)
    parser.add_argument("folder", metavar=metavar, type=Path, help=folder)
    parser.add_argument(
        "--format",
        required=True,
        choices=list(FORMATS),
        help="torchao: packed, for torchao's kernels and gracekit.quant.convert; torchao-reference: a byte a weight, "
        "computes wherever transformers does; compressed-tensors: vLLM and transformers; awq: engines with AWQ's GEMM layout",
    )
    parser.add_argument("--output", type=Path, help=f"new folder (default: {metavar}-FORMAT)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the activations and all other weights (default: as saved)")
    return parser


def _run(name: str, given: argparse.Namespace, act: Any) -> int:
    quiet()
    whole = Path(os.path.abspath(given.folder))  # not what a link leads to: the name is that of the folder as given
    output = (given.output or whole.parent / f"{whole.name}-{given.format}").resolve()
    try:
        check_empty(output)
        write(act(), given.folder, output, given.format, DTYPES.get(given.dtype))
    except (ValueError, OSError, SafetensorError, RuntimeError) as error:  # the last two: of files that are damaged
        print(f"gracekit {name}: error: {error}", file=sys.stderr)
        return 2
    return 0
