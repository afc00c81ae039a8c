"""``gracekit inspect``: what GRACE would find in a saved model, before anyone spends GPU hours on it.

The model is built from its configuration on the meta device, so a 70B model is looked at in seconds and no weight is read.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gracekit._coverage import EXPECTED_SHARE
from gracekit._structure import find_decoder, find_output_head
from gracekit.quant import LSQConfig
from gracekit.quant.deploy import check_plain, resolve_target
from gracekit.recipe.weights import model_class
from gracekit.vlm import Coverage, VisualTokenTap, coverage, language_linears
from gracekit.vlm.families import placeholder_id

GIB = 2**30
BF16 = 2  # bytes
_STRICTER = torch.device("cpu")  # its kernel takes fewer layers than that of CUDA
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass(kw_only=True)
class Report:
    """Lines to print, by heading; what could not be found out; and what would not work."""

    lines: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        width = max(map(len, self.lines), default=0)
        rows = [f"{name:{width}}  {text}" for name, text in self.lines.items()]
        rows += [f"{'note':{width}}  {note}" for note in self.notes]
        if not self.problems:
            return "\n".join([*rows, "", "Nothing found that would not work."])
        return "\n".join([*rows, "", "Would not work:", *(f"  - {problem}" for problem in self.problems)])


def inspect_model(folder: str | Path, *, image: str | Path | None = None, config: LSQConfig | None = None) -> Report:
    """Look at a saved model without reading its weights.

    Args:
        folder: what ``save_pretrained`` wrote; config.json is enough, a picture needs the processor's files too.
        image: a picture to count visual tokens for.
        config: bits and group size to quantise with; None: INT4 in groups of 128.

    Returns:
        The report; ``str()`` of it is what the command prints.

    Raises:
        ValueError: the folder holds no configuration, or none of a model that this transformers has, or the picture cannot be
            read.
    """
    folder, config = Path(folder), config or LSQConfig()
    model = build_on_meta(folder)
    report = Report()
    _describe(model, folder, report)
    if image is not None:
        _picture(model, folder, Path(image), report)
    _quantisation(model, config, report)
    return report


def build_on_meta(folder: Path) -> nn.Module:
    """Return the model that config.json describes, on the meta device."""
    import transformers

    if not (folder / "config.json").is_file():
        raise ValueError(f"MODEL_DIR must hold a config.json, got {folder}")
    try:
        described = transformers.AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError, TypeError) as error:  # the last: of JSON that is no object
        raise ValueError(f"MODEL_DIR must hold a model of transformers {transformers.__version__}: {error}") from error
    names = getattr(described, "architectures", None) or []
    kind = model_class(names, folder)
    if kind is None:
        raise ValueError(
            f"config.json must name an architecture that transformers {transformers.__version__} has, got "
            f"architectures={names}"
        )
    with torch.device("meta"):
        model = kind(described)
    assert isinstance(model, nn.Module)
    return model


def _describe(model: Any, folder: Path, report: Report) -> None:
    """Say what the model is: family, decoder, vocabulary, placeholder."""
    described = model.config
    report.lines["family"] = f"{described.model_type} ({type(model).__name__})"
    quantised = getattr(described, "quantization_config", None)
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
        report.problems.append(
            f"the folder holds a model that is quantised already ({getattr(method, 'value', method)}): prepare_qat and gracekit "
            "quantize refuse it, and the sizes are those of its plain weights"
        )
    decoder: Any = find_decoder(model)
    if decoder is None:
        report.problems.append(
            "get_decoder() gives no module with a ModuleList `layers`: nothing tells the language model"
        )
    else:
        name = next(name for name, module in model.named_modules() if module is decoder)
        width = next((p.shape[-1] for p in decoder.parameters() if p.ndim == 2), None)
        report.lines["decoder"] = f"{name}, {len(decoder.layers)} layers, hidden size {width}"
    head = find_output_head(model)
    weight = getattr(head, "weight", None)
    if isinstance(weight, torch.Tensor):
        report.lines["vocabulary"] = _vocabulary(weight.shape[0], folder)
    ids = {kind: placeholder_id(model, kind) for kind in ("image", "video")}
    report.lines["visual token id"] = ", ".join(f"{kind} {i}" for kind, i in ids.items() if i is not None) or "none"
    try:
        VisualTokenTap(model, layer=-2)
    except ValueError as error:
        report.problems.append(f"visual tokens cannot be tapped: {error}")
    else:
        report.lines["tapped layer"] = f"{len(decoder.layers) - 2} (layer=-2)"


def _vocabulary(rows: int, folder: Path) -> str:
    """Say how many classes the head has, and how many the tokenizer uses, where it can be read."""
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in TOKENIZERS):  # else transformers makes up an empty one
        return f"{rows} classes (no tokenizer to compare with)"
    try:
        used = len(AutoTokenizer.from_pretrained(folder))
    except Exception as error:  # the rest of the report stands without it
        return f"{rows} classes (the tokenizer cannot be read: {type(error).__name__})"
    padded = f", {rows - used} of them padding: vocab_size={used} compares models padded differently"
    return f"{rows} classes" + (padded if used < rows else "")


def _picture(model: nn.Module, folder: Path, image: Path, report: Report) -> None:
    from gracekit.recipe.picture_tokens import picture_tokens

    if not callable(getattr(model, "get_image_features", None)):
        report.problems.append("the model has no get_image_features: it takes no pictures")
        return
    found = picture_tokens(folder, model, image)
    counts = [count for count in (found.features, found.placeholders) if count is not None]
    grid = f" (grid {' x '.join(map(str, found.grid))})" if found.grid else ""
    report.lines["visual tokens"] = f"{counts[0]}{grid} for {image.name}" if counts else f"not known for {image.name}"
    if len(set(counts)) > 1:
        report.problems.append(
            f"the processor writes {found.placeholders} placeholders for {image.name}, but the model gives {found.features} "
            "features: the processor's settings do not belong to this model"
        )
    report.notes += found.notes
    report.problems += found.problems


def _quantisation(model: nn.Module, config: LSQConfig, report: Report) -> None:
    """Say what would be quantised, how large it then is, and what stays."""
    try:
        with warnings.catch_warnings(action="ignore"):  # said below, with the figures
            linears = language_linears(model)
    except ValueError as error:
        report.problems.append(f"nothing can be quantised: {error}")
        return
    covered = coverage(model)
    kinds = Counter(name.rpartition(".")[2] for name in linears)
    listed = ", ".join(f"{kind} x {count}" for kind, count in kinds.items())
    report.lines["quantised"] = (
        f"{len(linears)} linear layers ({listed}): {covered.share:.1%} of the decoder's blocks, {covered.quantized_size:,} weights"
    )
    total = sum(p.numel() for p in model.parameters())
    size, group = config.bits, config.group_size
    count = covered.quantized_size
    packed = count * size / 8 + count / group * config.scale_dtype.itemsize
    rest = (total - count) * BF16
    report.lines["their size"] = (
        f"{_gib(count * BF16)} in BF16, {_gib(packed)} in INT{size} at group size {group} with its scales"
    )
    report.lines["whole model"] = f"{_gib(total * BF16)} in BF16, {_gib(packed + rest)} with INT{size}"
    report.lines["stays in BF16"] = _rest(model, covered, rest)
    if resolve_target("auto", size, _STRICTER) == "reference":
        report.notes.append(
            f"INT{size} has no kernel: its weights are multiplied out on the fly, no faster than the plain model"
        )
    report.problems += _obstacles(linears, covered, config)


def _rest(model: Any, covered: Coverage, size: float) -> str:
    head = find_output_head(model)
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    inside = sum(covered.left_out.values())
    parts = [
        "vision tower, projector, embeddings" + (" (the output head is tied to them)" if tied else ", output head"),
        f"{inside:,} parameters of the blocks (norms, biases, convolutions, gates of heads and experts)",
    ]
    return f"{_gib(size)}: {'; '.join(parts)}"


def _obstacles(linears: dict[str, nn.Linear], covered: Coverage, config: LSQConfig) -> list[str]:
    """What prepare_qat and convert would refuse, and what they would leave out."""
    found = []
    if covered.share < EXPECTED_SHARE:
        largest = ", ".join(f"{name} ({count:,})" for name, count in list(covered.left_out.items())[:2])
        found.append(
            f"{1 - covered.share:.0%} of the blocks' parameters are no nn.Linear and would stay in BF16, above all {largest}"
        )
    odd = {name: linear.in_features for name, linear in linears.items() if linear.in_features % config.group_size}
    if odd:
        name, inputs = next(iter(odd.items()))
        found.append(
            f"group_size={config.group_size} does not divide in_features of {len(odd)} layers (the first: {name}, {inputs}); "
            "prepare_qat refuses them, so give another --group-size"
        )
    target = resolve_target("auto", config.bits, _STRICTER)
    fitting = [linear for name, linear in linears.items() if name not in odd]
    refused = Counter(reason for linear in fitting for reason in _refusal(target, linear, config))
    found += [f"no kernel for {count} layers: {reason}" for reason, count in refused.items()]
    return found


def _refusal(target: str, linear: nn.Linear, config: LSQConfig) -> list[str]:
    """Why a form could not hold a layer."""
    try:
        check_plain(target, "", linear, config, device=_STRICTER, dtype=torch.bfloat16)
    except ValueError as error:
        return [str(error).removesuffix(" ()")]
    return []


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 100 else f"{size / 2**10:.1f} KiB"


def main(arguments: Sequence[str] | None = None) -> int:
    """Say what a saved model has, what would be quantised, its size, and what would not work."""
    parser = argparse.ArgumentParser(prog="gracekit inspect", description=main.__doc__)
    parser.add_argument("folder", metavar="MODEL_DIR", type=Path, help="folder that save_pretrained wrote")
    parser.add_argument("--image", type=Path, help="picture to count visual tokens for")
    parser.add_argument("--bits", type=int, default=4, help="width of a weight (default 4)")
    parser.add_argument("--group-size", type=int, default=128, help="inputs that share a scale (default 128)")
    given = parser.parse_args(arguments)
    try:
        config = LSQConfig(bits=given.bits, group_size=given.group_size)
        print(inspect_model(given.folder, image=given.image, config=config))
    except (ValueError, OSError) as error:
        print(f"gracekit inspect: error: {error}", file=sys.stderr)
        return 2
    return 0
