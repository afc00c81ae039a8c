"""How much of a decoder is quantised, and what is not: a prepared model can be mostly bfloat16 without looking so.

Mixture-of-experts models keep their experts in three-dimensional parameters instead of nn.Linear modules; a rule that takes
nn.Linear covers a third of such a decoder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd

from gracekit._structure import find_decoder, is_adapter

# Dense decoders of 12 families have 98 % or more of their blocks' parameters in linears.
EXPECTED_SHARE = 0.95


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """What part of the blocks of a decoder is quantised, low-rank adapters and learned scales aside.

    Attributes:
        quantized: full names of the quantised weights, with their numbers of elements.
        left_out: all other parameters of the blocks, the largest first.
        experts: those of them with three dimensions that are no convolution's: stacked experts.
    """

    quantized: dict[str, int]
    left_out: dict[str, int]
    experts: tuple[str, ...]

    @property
    def quantized_size(self) -> int:
        """How many parameters are quantised."""
        return sum(self.quantized.values())

    @property
    def total(self) -> int:
        """How many parameters the blocks hold."""
        return self.quantized_size + sum(self.left_out.values())

    @property
    def share(self) -> float:
        """The quantised share, in [0, 1]; about 0.98 to 0.99 for a dense decoder of usual width."""
        return self.quantized_size / self.total

    def __str__(self) -> str:
        lines = [
            f"{self.share:.1%} of the parameters of the decoder's blocks are quantised (layers: {len(self.quantized)})"
        ]
        if self.share < EXPECTED_SHARE:  # else norms, biases and the like
            lines.append(f"left out: {len(self.left_out)}, the largest {', '.join(list(self.left_out)[:3])}")
        if self.experts:
            lines.append(f"with three dimensions (experts of a mixture, no nn.Linear): {len(self.experts)}")
        return "; ".join(lines)


def coverage_of(model: nn.Module, covered: Callable[[nn.Module], bool]) -> Coverage:
    """Return what part of the blocks of a model (all of it, where it has no decoder) are weights of ``covered`` modules.

    Raises:
        ValueError: the blocks have no parameter.
    """
    decoder = find_decoder(model)
    blocks = model if decoder is None else decoder.layers
    inside = {id(module) for module in blocks.modules()}  # type: ignore[union-attr]
    quantized: dict[str, int] = {}
    others: dict[str, int] = {}
    experts = []
    for prefix, module in model.named_modules():
        if id(module) not in inside:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{prefix}.{name}" if prefix else name
            if name == "weight" and covered(module):
                quantized[full] = parameter.numel()
            elif not name.endswith("log_scale") and not is_adapter(full):
                others[full] = parameter.numel()
                if parameter.ndim == 3 and not isinstance(module, _ConvNd):
                    experts.append(full)
    if not quantized and not others:
        raise ValueError(f"model must have parameters in its blocks, got none in {type(model).__name__}")
    left_out = dict(sorted(others.items(), key=lambda item: -item[1]))
    return Coverage(quantized=quantized, left_out=left_out, experts=tuple(experts))
