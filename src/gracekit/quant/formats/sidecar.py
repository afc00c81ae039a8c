"""Import of the GRACE authors' sidecar: a torch file with fake-quantised weights and the logarithms of their scales.

NAME.weight (out, in), NAME.log_scale float32 with out * in / G numbers in row-major order, optionally NAME.bias. The bit width is
not in the file, and the authors' scales are not rounded: W_q equals the file's weights up to the rounding of the scales to
``scale_dtype``, with the very codes of the file.
"""

from __future__ import annotations

import os
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from gracekit._checks import check_int, check_module
from gracekit.quant._modules import swap_modules
from gracekit.quant.qat import check_alone, check_layer, prepare_layer
from gracekit.quant.scheme import LSQConfig, code_range, deployed_scale, float_codes, quotients, times_scale

_REQUIRED = {"weight", "log_scale"}
_PARTS = {*_REQUIRED, "bias"}


def import_grace_sidecar(model: nn.Module, path: str | os.PathLike[str], *, bits: int = 4) -> list[str]:
    """Prepare the layers that a GRACE sidecar file names, with its weights and scales, in place.

    The group size follows from the sizes of each layer's tensors. Weights are taken over as they are; where the rounding of
    a scale would change a code (a matter of 8 bits), that weight becomes code times rounded scale. Read with
    ``weights_only=True``. Source: SPEC of GRACE (arXiv 2601.22709), released checkpoints.

    Args:
        model: a plain model whose nn.Linear layers have the file's names and sizes; its dtypes stay.
        path: the file.
        bits: width of the codes, 2 to 8, which the file does not tell.

    Returns:
        Full names of the layers prepared, in the file's order. Go on training, :func:`convert` or export from there.

    Raises:
        TypeError: ``model`` is no nn.Module, or ``bits`` no integer.
        ValueError: the file needs more than tensors to be read, is no sidecar, names a layer the model lacks, does not fit
            its sizes, holds codes beyond ``bits`` or weights that are no multiples of their scales. The model is unchanged then.

    Example:
        >>> import tempfile
        >>> model = nn.Sequential(nn.Linear(4, 1, bias=False))
        >>> file = {"0.weight": torch.tensor([[0.5, -0.5, 2.0, 0.0]]), "0.log_scale": torch.tensor([0.5, 1.0]).log()}
        >>> with tempfile.NamedTemporaryFile() as place:
        ...     torch.save(file, place.name)
        ...     import_grace_sidecar(model, place.name)
        ['0']
        >>> model[0].weight_fake_quantizer.config.group_size
        2
    """
    check_module("model", model)
    check_int("bits", bits, low=2, high=8)
    linears = {name: module for name, module in model.named_modules() if name and isinstance(module, nn.Linear)}
    plans: dict[str, tuple[nn.Linear, LSQConfig, Tensor, Tensor, Tensor | None]] = {}
    for name, parts in _read(path).items():
        if name not in linears:
            raise ValueError(f"model must have an nn.Linear for each layer of the file, got none called {name!r}")
        layer = linears[name]
        config, log_scale = _fit(name, layer, parts, bits)
        check_layer(layer, config, name)
        plans[name] = (
            layer,
            config,
            log_scale,
            _keep_codes(name, layer, parts["weight"], log_scale, config),
            parts.get("bias"),
        )
    check_alone(model, {name: plan[0] for name, plan in plans.items()})
    with torch.no_grad():
        for layer, _, _, weight, bias in plans.values():
            layer.weight.copy_(weight)
            if bias is not None:
                layer.bias.copy_(bias)
    swap_modules(model, {layer: prepare_layer(layer, config, scale) for layer, config, scale, _, _ in plans.values()})
    return list(plans)


def _read(path: str | os.PathLike[str]) -> dict[str, dict[str, Tensor]]:
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of a damaged file torch.load makes nearly any
        raise ValueError(
            f"path must be a torch file of tensors alone (it is read with weights_only=True), got {path}"
        ) from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"path must hold a dict of tensors, got {type(content).__name__} in {path}")
    layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in content.items():
        name, _, part = str(key).rpartition(".")
        if not name or part not in _PARTS or not isinstance(value, Tensor) or not value.is_floating_point():
            raise ValueError(
                f"a sidecar holds NAME.weight, NAME.log_scale and NAME.bias as floating tensors, got {key!r}"
            )
        if value.layout != torch.strided or value.dtype.itemsize < 2:
            raise ValueError(f"a sidecar's tensors must be dense and of 16 bits at least, got {value.dtype} ({key})")
        layers[name][part] = value.detach()
    for name, parts in layers.items():
        if not parts.keys() >= _REQUIRED:
            raise ValueError(
                f"a layer of a sidecar has a weight and a log_scale, got {' and '.join(sorted(parts))} ({name})"
            )
        if not all(bool(tensor.isfinite().all()) for tensor in parts.values()):
            raise ValueError(f"a sidecar's tensors must be finite, got NaN or infinity ({name})")
    return layers


def _fit(name: str, layer: nn.Linear, parts: dict[str, Tensor], bits: int) -> tuple[LSQConfig, Tensor]:
    shape = (layer.out_features, layer.in_features)
    if tuple(parts["weight"].shape) != shape:
        raise ValueError(f"weight must have the layer's shape {shape}, got {tuple(parts['weight'].shape)} ({name})")
    count = parts["log_scale"].numel()
    if not count or count % layer.out_features or layer.in_features % (count // layer.out_features):
        raise ValueError(f"log_scale must have a number per group of a {shape} weight, got {count} ({name})")
    if "bias" in parts and (layer.bias is None or parts["bias"].shape != layer.bias.shape):
        own = None if layer.bias is None else tuple(layer.bias.shape)
        raise ValueError(f"bias must have the layer's shape {own}, got {tuple(parts['bias'].shape)} ({name})")
    groups = count // layer.out_features
    config = LSQConfig(bits=bits, group_size=layer.in_features // groups)
    return config, parts["log_scale"].to(torch.float32).reshape(layer.out_features, groups).to(layer.weight.device)


def _keep_codes(name: str, layer: nn.Linear, weight: Tensor, log_scale: Tensor, config: LSQConfig) -> Tensor:
    exact = log_scale.exp()
    if not bool(((exact > 0) & exact.isfinite()).all()):
        raise ValueError(
            f"log_scale must be logarithms of float32 scales, got {log_scale.min():g} to {log_scale.max():g} ({name})"
        )
    wide = weight.to(device=log_scale.device, dtype=torch.float32)
    ratio = quotients(wide, exact).flatten(-2)
    codes = ratio.round()
    low, high = code_range(config.bits)
    if not bool(((codes >= low) & (codes <= high)).all()):
        found = f"{int(codes.min())} to {int(codes.max())}"
        raise ValueError(f"bits={config.bits} must hold the file's codes, {low} to {high}, got {found} ({name})")
    # Stored in bfloat16 a multiple of its scale is off by 2^-9 of itself.
    off = (ratio - codes).abs() > 2**-8 * codes.abs() + 1e-3
    if bool(off.any()):
        raise ValueError(
            f"a sidecar's weight must be whole multiples of its scales, got {ratio[off][0]:g} times one ({name})"
        )
    scale = deployed_scale(log_scale, config.scale_dtype)
    taken = wide.to(layer.weight.dtype)
    if not bool(taken.isfinite().all()):
        raise ValueError(f"weight must fit the layer's {taken.dtype}, got values up to {wide.abs().max():g} ({name})")
    changed = float_codes(taken, scale, config.bits) != codes
    return torch.where(changed, times_scale(codes, scale, taken.dtype), taken)
