"""Export to compressed-tensors "pack-quantized", which vLLM and transformers (with compressed-tensors) read.

weight_packed (out, in * bits / 32) int32 holds unsigned codes q + 2^(b-1) of neighbouring inputs, the first in the lowest bits;
weight_scale (out, in / G) has the layer's dtype, weight_shape is (out, in). Widths that divide 32 are laid out alike by
compressed-tensors 0.19 and 0.20; others are not.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

from gracekit.quant.formats._files import (
    checkpoint_tensors,
    exact_scale,
    other_linears,
    uniform_layers,
    write_checkpoint,
)
from gracekit.quant.int4 import read_scale
from gracekit.quant.scheme import QuantizedWeight

WIDTHS = (2, 4, 8)


def export_compressed_tensors(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write a model with quantised layers as a compressed-tensors "pack-quantized" checkpoint.

    W_q = q * s with the codes and scales of training, exactly. Tensors that are not quantised are written as they are.

    Args:
        model: a model after :func:`prepare_qat` or :func:`convert`, with 4 or 8 (or 2) bits and one group size.
        directory: made where it does not exist. model.safetensors, config.json and, for a model that generates,
            generation_config.json are written beside their places and renamed.

    Raises:
        ValueError: a layer does not fit: another width, inputs that do not fill whole 32-bit words, unequal group sizes, or a
            scale that the layer's dtype cannot hold exactly. The layer is named, and nothing is written.
        FileExistsError: one of the files exists.

    Example:
        >>> import tempfile
        >>> from gracekit.quant import LSQConfig, prepare_qat
        >>> model = nn.Sequential(nn.Linear(64, 16))
        >>> names = prepare_qat(model, LSQConfig(group_size=32))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_compressed_tensors(model, folder)
        ...     sorted(os.listdir(folder))
        ['config.json', 'model.safetensors']
    """
    layers, bits, group_size = uniform_layers(model, "compressed-tensors")
    for name, layer in layers.items():
        if bits not in WIDTHS:
            raise ValueError(f"compressed-tensors needs bits in {WIDTHS}, got bits={bits} ({name})")
        if layer.in_features * bits % 32:
            raise ValueError(
                f"compressed-tensors needs in_features of whole words, got in_features={layer.in_features} ({name})"
            )
        exact_scale(read_scale(layer), layer.weight.dtype, "compressed-tensors", name)
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": None,
        "observer_kwargs": {},
    }
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": other_linears(model, layers),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    dtype = str(next(iter(layers.values())).weight.dtype).removeprefix("torch.")
    write_checkpoint(model, directory, checkpoint_tensors(model, layers, pack_compressed), quantization, dtype)


def pack_compressed(weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return weight_packed, weight_scale and weight_shape of one layer."""
    bits = weight.bits
    unsigned = weight.codes.to(torch.int32) + (1 << (bits - 1))
    words = unsigned.reshape(len(unsigned), -1, 32 // bits)
    packed = torch.zeros_like(words[..., 0])
    for position in range(32 // bits):
        packed |= words[..., position] << (bits * position)
    shape = torch.tensor(weight.codes.shape, dtype=torch.int64)
    return {"weight_packed": packed, "weight_scale": weight.scale.to(weight.dtype), "weight_shape": shape}
