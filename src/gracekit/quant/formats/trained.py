"""A model in training as a folder: a plain checkpoint of its weights, and a file of its learned scales beside them.

The scales stay out of the checkpoint itself, so plain ``from_pretrained`` loads the float weights without a complaint, and the
names in the scales' file are those of the modules whatever a family of models calls its tensors in files.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torchao.quantization.qat import FakeQuantizedLinear

from gracekit._checks import check_module
from gracekit.quant._modules import swap_modules
from gracekit.quant.deploy import quantized_layers
from gracekit.quant.formats._files import check_absent, check_bare, put_in_place, without_aliases
from gracekit.quant.lsq import LSQFakeQuantizer
from gracekit.quant.qat import check_alone, check_layer, prepare_layer
from gracekit.quant.scheme import LSQConfig

SCALES_FILE = "learned_scales.safetensors"
_NOTE = "layers"


def save_qat(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write a model in training, or trained, so that :func:`load_qat` takes it up bit for bit.

    The folder is a checkpoint as ``save_pretrained`` writes it (model.safetensors alone for a model without that method), with the
    float weights in the dtype they are trained in, plus learned_scales.safetensors. An optimiser's state is the trainer's affair.

    Args:
        model: a model after :func:`prepare_qat`, with none of its layers converted or sharded.
        directory: made where it does not exist.

    Raises:
        ValueError: no layer trains with learned scales, or one is converted already, sharded or not finite; the model is wrapped
            (as by torch.compile or DistributedDataParallel), or holds low-rank adapters, which must be merged before.
        FileExistsError: the folder holds a model.safetensors or learned_scales.safetensors already.

    Example:
        >>> import tempfile
        >>> from gracekit.quant import load_qat, prepare_qat
        >>> model = nn.Sequential(nn.Linear(128, 16))
        >>> names = prepare_qat(model)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_qat(model, folder)
        ...     print(sorted(os.listdir(folder)))
        ['learned_scales.safetensors', 'model.safetensors']
    """
    layers = quantized_layers(model)
    check_bare(model)
    for name, layer in layers.items():
        if not isinstance(layer, FakeQuantizedLinear):
            kind = type(layer.weight).__name__
            raise ValueError(f"a layer must still train to be saved with its scales, got a converted {kind} ({name})")
    folder = Path(directory)
    check_absent(folder, ["model.safetensors", SCALES_FILE])
    folder.mkdir(parents=True, exist_ok=True)
    fakes: dict[str, LSQFakeQuantizer] = {name: layer.weight_fake_quantizer for name, layer in layers.items()}  # type: ignore[misc]
    scales = {name: fake.log_scale.detach().cpu().contiguous() for name, fake in fakes.items()}
    inner = {
        f"{name}.weight_fake_quantizer.log_scale"
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, FakeQuantizedLinear)
    }
    state = {key: value for key, value in model.state_dict().items() if key not in inner}
    write: Any = getattr(model, "save_pretrained", None)
    if write is not None:
        write(folder, state_dict=state)
    else:
        kept, aliases = without_aliases(state)
        put_in_place(
            folder / "model.safetensors", lambda path: save_file(kept, path, metadata={"format": "pt"} | aliases)
        )
    note = json.dumps({name: _describe(layer) for name, layer in layers.items()})
    # Written last: a folder that holds it is whole.
    put_in_place(folder / SCALES_FILE, lambda path: save_file(scales, path, metadata={"format": "pt", _NOTE: note}))


def load_qat(model: nn.Module, directory: str | os.PathLike[str]) -> list[str]:
    """Prepare a plain model that was loaded from a folder of :func:`save_qat`, with the scales learned there.

    Args:
        model: with the folder's float weights in it, say of ``from_pretrained(directory)``.
        directory: the folder.

    Returns:
        Full names of the prepared layers. Go on training, :func:`convert` or export from there.

    Raises:
        FileNotFoundError: the folder has no learned_scales.safetensors.
        ValueError: the file is something else, or a layer of it is not in the model, has another size or another dtype than
            it was trained in. The model is unchanged then.

    Example:
        >>> import tempfile
        >>> from gracekit.quant import prepare_qat, save_qat
        >>> from safetensors.torch import load_model
        >>> trained, fresh = (nn.Sequential(nn.Linear(128, 16)) for _ in range(2))
        >>> names = prepare_qat(trained)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_qat(trained, folder)
        ...     _ = load_model(fresh, folder + "/model.safetensors")
        ...     load_qat(fresh, folder)
        ['0']
        >>> bool((fresh(torch.ones(1, 128)) == trained(torch.ones(1, 128))).all())
        True
    """
    check_module("model", model)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    plans: dict[nn.Linear, tuple[LSQConfig, Tensor]] = {}
    for name, (note, log_scale) in _read(Path(directory) / SCALES_FILE).items():
        layer = linears.get(name)
        if layer is None:
            raise ValueError(f"model must have an nn.Linear for each layer of the folder, got none called {name!r}")
        if str(layer.weight.dtype) != f"torch.{note['weight_dtype']}":
            raise ValueError(
                f"a weight must have the dtype it was trained in, torch.{note['weight_dtype']} "
                f"(from_pretrained(..., dtype='auto') keeps it), got {layer.weight.dtype} ({name})"
            )
        config = _config(note)
        check_layer(layer, config, name)
        shape = (layer.out_features, layer.in_features // config.group_size)
        if tuple(log_scale.shape) != shape:
            raise ValueError(f"log_scale must have the shape {shape}, got {tuple(log_scale.shape)} ({name})")
        plans[layer] = (config, log_scale.to(layer.weight.device))
    check_alone(model, {name: layer for name, layer in linears.items() if layer in plans})
    prepared: dict[nn.Module, nn.Module] = {
        layer: prepare_layer(layer, config, scale) for layer, (config, scale) in plans.items()
    }
    swap_modules(model, prepared)
    return [name for name, layer in linears.items() if layer in plans]


def learned_widths(directory: str | os.PathLike[str]) -> list[int]:
    """Return the widths in bits that a folder of :func:`save_qat` was trained in, smallest first.

    Raises:
        FileNotFoundError: the folder has no learned_scales.safetensors.
        ValueError: the file is something else.
    """
    return sorted({note["bits"] for note, _ in _read(Path(directory) / SCALES_FILE).values()})


def _describe(layer: FakeQuantizedLinear) -> dict[str, Any]:
    fake: LSQFakeQuantizer = layer.weight_fake_quantizer
    dtypes = {"scale_dtype": fake.config.scale_dtype, "weight_dtype": layer.weight.dtype}
    return asdict(fake.config) | {name: str(dtype).removeprefix("torch.") for name, dtype in dtypes.items()}


def _read(path: Path) -> dict[str, tuple[dict[str, Any], Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"directory must be a folder of save_qat, got no {path.name} in {path.parent}")
    try:
        with safe_open(path, "pt") as file:
            notes: dict[str, dict[str, Any]] = json.loads((file.metadata() or {})[_NOTE])
            if set(notes) != set(file.keys()):
                raise KeyError(*sorted(set(notes) ^ set(file.keys())))
            found = {name: (notes[name], file.get_tensor(name)) for name in notes}
            for note, _ in found.values():
                _config(note)
    except (SafetensorError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} must be a file of learned scales, got {error!r}") from error
    for name, (_, log_scale) in found.items():
        if log_scale.dtype not in (torch.float32, torch.float64) or not bool(log_scale.isfinite().all()):
            kind = "NaN or infinity" if log_scale.dtype.itemsize >= 4 else log_scale.dtype
            raise ValueError(f"log_scale must be finite numbers of float32, got {kind} ({name} in {path})")
    return found


def _config(note: dict[str, Any]) -> LSQConfig:
    return LSQConfig(bits=note["bits"], group_size=note["group_size"], scale_dtype=getattr(torch, note["scale_dtype"]))
