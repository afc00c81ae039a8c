"""How much of a model's decoder is quantised now."""

from __future__ import annotations

from torch import nn

from gracekit._checks import check_module
from gracekit._coverage import Coverage, coverage_of
from gracekit.quant.int4 import is_quantized


def coverage(model: nn.Module) -> Coverage:
    """Report which parameters of a decoder's blocks are quantised, and which are not.

    The blocks are ``get_decoder().layers``; a model without a decoder counts as one block. Sizes are those of the weights before
    packing. Low-rank adapters (``lora_*``) count on neither side.

    Args:
        model: a model after :func:`prepare_qat`, :func:`convert` or :func:`quantize_rtn` (or a plain one: a share of 0).

    Returns:
        Coverage. Printed, it is one sentence.

    Raises:
        TypeError: ``model`` is no nn.Module.
        ValueError: the blocks have no parameter.

    Example:
        >>> from gracekit.quant import LSQConfig, prepare_qat
        >>> model = nn.Sequential(nn.Linear(64, 32, bias=False), nn.Embedding(8, 64))
        >>> names = prepare_qat(model, LSQConfig(group_size=32))
        >>> print(coverage(model))
        80.0% of the parameters of the decoder's blocks are quantised (layers: 1); left out: 1, the largest 1.weight
    """
    check_module("model", model)
    return coverage_of(model, is_quantized)
