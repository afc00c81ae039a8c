"""What the exports share: the tensors of a model beside its packed layers, its configuration, and files put in place whole."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from gracekit._structure import is_adapter
from gracekit.quant.deploy import quantized_layers
from gracekit.quant.int4 import read_bits, read_scale, read_weight
from gracekit.quant.scheme import QuantizedWeight, holds_scale

_WRAPPERS = (nn.DataParallel, DistributedDataParallel, AveragedModel)
Packer = Callable[[QuantizedWeight], dict[str, Tensor]]


def uniform_layers(model: nn.Module, format_name: str) -> tuple[dict[str, nn.Linear], int, int]:
    """Return the quantised layers with the bits and group size that all of them have, or raise."""
    layers = quantized_layers(model)
    check_bare(model)
    schemes = {
        name: (read_bits(layer), layer.in_features // read_scale(layer).shape[1]) for name, layer in layers.items()
    }
    first = next(iter(schemes))
    for name, scheme in schemes.items():
        if scheme != schemes[first]:
            raise ValueError(
                f"{format_name} needs one (bits, group_size) for all layers, "
                f"got {schemes[first]} ({first}) and {scheme} ({name})"
            )
    return layers, *schemes[first]


def exact_scale(scale: Tensor, dtype: torch.dtype, format_name: str, name: str) -> Tensor:
    """Return ``scale`` in ``dtype``, or raise, naming the layer, where that would change a value."""
    if not holds_scale(dtype, scale):
        worst = scale[scale.to(dtype).double() != scale.double()][0].item()
        raise ValueError(f"{format_name} needs scales that {dtype} holds exactly, got {worst!r} ({name})")
    return scale.to(dtype)


def checkpoint_tensors(model: nn.Module, layers: Mapping[str, nn.Linear], pack: Packer) -> dict[str, Tensor]:
    """Return the state of a model with each quantised weight replaced by what ``pack`` makes of it."""
    packed = {layer: pack(read_weight(layer)) for layer in layers.values()}
    # A layer that stands in two places is in the state under both names.
    places = {name: module for name, module in model.named_modules(remove_duplicate=False) if module in packed}
    replaced = {f"{name}.{part}" for name in places for part in ("weight", "weight_fake_quantizer.log_scale")}
    tensors = {key: value for key, value in model.state_dict().items() if key not in replaced}
    for name, layer in places.items():
        tensors |= {f"{name}.{part}": tensor for part, tensor in packed[layer].items()}
    return tensors


def other_linears(model: nn.Module, layers: Mapping[str, nn.Linear]) -> list[str]:
    """Return the full names of the nn.Linear modules that stay as they are."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in layers]


def write_checkpoint(
    model: nn.Module,
    directory: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    quantization: dict[str, Any],
    dtype: str,
) -> None:
    """Write model.safetensors, config.json and, for a model that generates, generation_config.json.

    Each file is written beside its place and renamed into it, config.json last. A file that is there already is an error.
    """
    folder = Path(directory)
    config = _json_text(getattr(model, "config", None))
    described = {} if config is None else json.loads(config)
    described |= {"architectures": [type(model).__name__], "dtype": dtype, "quantization_config": quantization}
    generation = _json_text(getattr(model, "generation_config", None))
    texts = {"config.json": json.dumps(described, indent=2, sort_keys=True) + "\n"}
    if generation is not None:
        texts = {"generation_config.json": generation} | texts
    check_absent(folder, ["model.safetensors", *texts])
    folder.mkdir(parents=True, exist_ok=True)
    kept, aliases = without_aliases(tensors)
    put_in_place(folder / "model.safetensors", lambda path: save_file(kept, path, metadata={"format": "pt"} | aliases))
    for name, text in texts.items():
        put_in_place(folder / name, partial(Path.write_text, data=text, encoding="utf-8"))


def check_bare(model: nn.Module) -> None:
    """Raise where tensors have names that no plain model would take them up by: inside a wrapper, or beside adapters."""
    if isinstance(model, _WRAPPERS) or hasattr(model, "_orig_mod"):
        raise ValueError(f"model must be the one inside its wrapper, got {type(model).__name__}")
    adapter = next((name for name, _ in model.named_parameters() if is_adapter(name)), None)
    if adapter is not None:
        raise ValueError(
            f"model must have no adapters left (PEFT's merge_and_unload() adds them to the weights), got {adapter}"
        )


def check_absent(folder: Path, names: list[str]) -> None:
    """Raise where one of the files exists."""
    present = [name for name in names if (folder / name).exists()]
    if present:
        raise FileExistsError(
            f"directory must hold none of the files to be written, got {', '.join(present)} in {folder}"
        )


def put_in_place(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file beside ``path``, then rename it."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as beside:
        draft = Path(beside) / path.name
        write(draft)
        os.replace(draft, path)


def _json_text(config: object) -> str | None:
    # transformers' configuration objects, told by what they can do.
    write = getattr(config, "to_json_string", None)
    return str(write()) if callable(write) else None


def without_aliases(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return each distinct tensor once, on the CPU, and by name the others as what they are tied to."""
    # A file holds a tied weight once, under its first name; the others are named in the metadata, as safetensors does it.
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first_names: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        place = (
            tensor.device,
            tensor.untyped_storage().data_ptr(),
            tensor.storage_offset(),
            tensor.shape,
            tensor.stride(),
        )
        if tensor.numel() and place in first_names:
            aliases[name] = first_names[place]
        else:
            first_names[place] = name
            # A clone, since parts of one storage under different shapes count as shared memory too.
            kept[name] = tensor.detach().cpu().contiguous().clone()
    return kept, aliases
