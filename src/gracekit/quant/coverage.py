"""How much of a decoder is quantised, and what is not: a prepared model can be mostly bfloat16 without looking so.

Mixture-of-experts models keep their experts in three-dimensional parameters instead of nn.Linear modules; a rule that takes
nn.Linear covers a third of such a decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from gracekit._structure import find_decoder
from gracekit.quant.int4 import is_quantized


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """What part of the blocks of a decoder is quantised.

    ``quantized`` and ``left_out`` give full parameter names and numbers of elements; ``left_out`` has matrices and larger only
    (norms and biases are never quantised), but ``share`` counts everything.
    """

    quantized: dict[str, int]
    left_out: dict[str, int]
    share: float
    experts: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.share:.1%} of the parameters of the decoder's blocks are quantised (layers: {len(self.quantized)})"
        ]
        if self.left_out:
            largest = sorted(self.left_out, key=lambda name: -self.left_out[name])[:3]
            lines.append(f"left out: {len(self.left_out)}, the largest {', '.join(largest)}")
        if self.experts:
            lines.append(f"with three dimensions (experts of a mixture, no nn.Linear): {len(self.experts)}")
        return "; ".join(lines)


def coverage(model: nn.Module) -> Coverage:
    """Report which parameters of a decoder's blocks are quantised, and which are not.

    The blocks are ``get_decoder().layers``; a model without a decoder counts as one block. Sizes are those of the weights before
    packing.

    Args:
        model: a model after :func:`prepare_qat`, :func:`convert` or :func:`quantize_rtn` (or a plain one: a share of 0).

    Returns:
        Coverage. Printed, it is one sentence.

    Raises:
        ValueError: the blocks have no parameter.

    Example:
        >>> from gracekit.quant import LSQConfig, prepare_qat
        >>> model = nn.Sequential(nn.Linear(64, 32, bias=False), nn.Embedding(8, 64))
        >>> names = prepare_qat(model, LSQConfig(group_size=32))
        >>> print(coverage(model))
        80.0% of the parameters of the decoder's blocks are quantised (layers: 1); left out: 1, the largest 1.weight
    """
    decoder: Any = find_decoder(model)
    inside = {id(module) for module in (model if decoder is None else decoder.layers).modules()}
    quantized: dict[str, int] = {}
    others: dict[str, tuple[int, int]] = {}
    for prefix, module in model.named_modules():
        if id(module) not in inside:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{prefix}.{name}" if prefix else name
            if name == "weight" and is_quantized(module):
                quantized[full] = parameter.numel()
            elif not name.endswith("log_scale"):
                others[full] = (parameter.ndim, parameter.numel())
    total = sum(quantized.values()) + sum(size for _, size in others.values())
    if not total:
        raise ValueError(f"model must have parameters in its blocks, got none in {type(model).__name__}")
    return Coverage(
        quantized=quantized,
        left_out={name: size for name, (ndim, size) in others.items() if ndim > 1},
        share=sum(quantized.values()) / total,
        experts=tuple(name for name, (ndim, _) in others.items() if ndim == 3),
    )
