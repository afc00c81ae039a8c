"""Export to the AWQ "GEMM" layout, which vLLM, sglang and others read.

qweight (in, out / 8) int32 holds eight unsigned codes q + 8 of neighbouring outputs per word, in the order 0 2 4 6 1 3 5 7 from the
lowest nibble up; qzeros (in / G, out / 8) is 8 everywhere, and scales (in / G, out) are float16: W_q = (u - 8) * s.
AWQ: Lin et al., MLSys 2024 (arXiv 2306.00978); the layout is that of its released kernels.
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

_NIBBLE_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_ZERO = 8
WIDTHS = (4,)


def export_awq(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write a model with INT4 layers as an AWQ (GEMM) checkpoint.

    W_q = (u - 8) * s with the codes and scales of training, exactly. Tensors that are not quantised are written as they are;
    config.json asks engines for float16, the dtype of AWQ's kernels.

    Args:
        model: a model after :func:`prepare_qat` or :func:`convert`, with 4 bits and one group size.
        directory: made where it does not exist. model.safetensors, config.json and, for a model that generates,
            generation_config.json are written beside their places and renamed.

    Raises:
        ValueError: a layer does not fit: other than 4 bits, out_features that 8 does not divide, unequal group sizes, or a
            scale that float16 cannot hold exactly. The layer is named, and nothing is written.
        FileExistsError: one of the files exists.

    Example:
        >>> import tempfile
        >>> from gracekit.quant import LSQConfig, prepare_qat
        >>> model = nn.Sequential(nn.Linear(64, 16))
        >>> names = prepare_qat(model, LSQConfig(group_size=32))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_awq(model, folder)
        ...     sorted(os.listdir(folder))
        ['config.json', 'model.safetensors']
    """
    layers, bits, group_size = uniform_layers(model, "AWQ")
    for name, layer in layers.items():
        if bits not in WIDTHS:
            raise ValueError(f"AWQ needs bits=4, got bits={bits} ({name})")
        if layer.out_features % 8:
            raise ValueError(f"AWQ needs out_features that 8 divides, got out_features={layer.out_features} ({name})")
        exact_scale(read_scale(layer), torch.float16, "AWQ", name)
    quantization = {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "modules_to_not_convert": other_linears(model, layers),
    }
    write_checkpoint(model, directory, checkpoint_tensors(model, layers, pack_awq), quantization, "float16")


def pack_awq(weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return qweight, qzeros and scales of one layer."""
    unsigned = weight.codes.t().to(torch.int32) + _ZERO
    zeros = torch.full((weight.scale.shape[1], weight.scale.shape[0]), _ZERO, dtype=torch.int32, device=unsigned.device)
    scales = weight.scale.to(torch.float16).t().contiguous()
    return {"qweight": _pack_columns(unsigned), "qzeros": _pack_columns(zeros), "scales": scales}


def _pack_columns(values: Tensor) -> Tensor:
    eights = values.reshape(len(values), -1, 8)
    packed = torch.zeros_like(eights[..., 0])
    for nibble, column in enumerate(_NIBBLE_ORDER):
        packed |= eights[..., column] << (4 * nibble)
    return packed.contiguous()
