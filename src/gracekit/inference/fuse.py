"""Projections of one input as one matrix product: q, k and v, or gate and up.

A decode step reads every weight once, and a product of few rows costs its launches as much as its bytes, so one product with
all output rows is cheaper than three. Codes and scales of a quantised weight belong to single output rows and are put one below
the other as they are. Nothing of transformers' classes is touched: in the place of each projection stands a module that returns
its rows of the shared product, which the first one asked computes.
"""

# O output rows of one projection, I inputs

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gracekit._structure import find_decoder
from gracekit.quant import convert
from gracekit.quant.int4 import form_of, is_quantized, read_bits, read_scale, read_weight, to_reference
from gracekit.quant.scheme import QuantizedWeight
from gracekit.quant.triton_tensor import share_workspace

# In transformers' decoders these names say what shares an input; what a block calls otherwise stays as it is.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class SharedProduct(nn.Module):
    """One linear layer for several projections; holds the rows not yet asked for, and the input they belong to."""

    def __init__(self, linear: nn.Linear, sizes: Sequence[int]) -> None:
        super().__init__()
        self.linear, self.sizes = linear, list(sizes)
        self._input: Tensor | None = None
        self._parts: list[Tensor | None] = [None] * len(self.sizes)

    def take(self, x: Tensor, index: int) -> Tensor:
        """Return the output (..., O) of projection ``index`` for ``x``."""
        part = self._parts[index] if x is self._input else None
        if part is None:
            self._input = x
            self._parts = list(self.linear(x).split(self.sizes, dim=-1))
            part = self._parts[index]
            assert part is not None
        self._parts[index] = None
        if all(left is None for left in self._parts):
            self._input = None  # an input that is written into later is another input
        return part

    def extra_repr(self) -> str:
        """Say how many rows each projection has."""
        return f"sizes={self.sizes}"


class ProjectionRows(nn.Module):
    """Stands in for one of the projections."""

    def __init__(self, shared: SharedProduct, index: int) -> None:
        super().__init__()
        self.index = index
        # Only the first is the owner; registered in all, the weight would count several times.
        self._owner = (shared,)
        if index == 0:
            self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (..., O) of this projection for ``x`` (..., I)."""
        return self._owner[0].take(x, self.index)

    def extra_repr(self) -> str:
        """Say which of the shared product's projections this is."""
        return f"index={self.index}"


def fuse_projections(model: nn.Module) -> list[str]:
    """Make q, k and v, and gate and up, of a model's decoder one linear layer each, in place, for generation.

    Codes, scales and plain weights are the same, bit for bit. Outputs are those of the same kernel for a taller matrix: equal
    where it sums a row alike at any height, else within the rounding of the sums' order. The model is for inference from then on:
    it cannot be saved or converted as it was.

    Args:
        model: of transformers, plain or after :func:`~gracekit.quant.convert`; layers that are still training are left alone.

    Returns:
        Names of the blocks' parts that were fused, such as ``model.layers.0.self_attn.q_proj+k_proj+v_proj``.

    Raises:
        ValueError: no decoder; nothing to fuse; or siblings of which some are quantised in another way, have a bias or carry
            hooks where others do not. The model is unchanged then.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
        >>> fuse_projections(LlamaForCausalLM(LlamaConfig(vocab_size=100, **size)))
        ['model.layers.0.self_attn.q_proj+k_proj+v_proj', 'model.layers.0.mlp.gate_proj+up_proj']
    """
    decoder: Any = find_decoder(model)
    if decoder is None:
        raise ValueError(f"model must have a decoder (get_decoder().layers), got {type(model).__name__}")
    inside = {id(module) for module in decoder.layers.modules()}
    groups = [
        (f"{name}.{'+'.join(names)}", parent, names)
        for name, parent in model.named_modules()
        if id(parent) in inside
        for names in SIBLINGS
        if all(type(getattr(parent, part, None)) is nn.Linear for part in names)
    ]
    if not groups:
        raise ValueError(
            f"model must have projections of one input in its decoder's blocks, got none in {type(model).__name__}"
        )
    for where, parent, names in groups:
        _check([getattr(parent, part) for part in names], where)
    for _, parent, names in groups:
        layers = [getattr(parent, part) for part in names]
        shared = SharedProduct(_stacked(layers), [layer.out_features for layer in layers])
        for index, part in enumerate(names):
            setattr(parent, part, ProjectionRows(shared, index))
    share_workspace(model)
    return [where for where, _, _ in groups]


def _check(layers: list[nn.Linear], where: str) -> None:
    kinds = {_kind(layer) for layer in layers}
    if (
        len(kinds) > 1
        or len({layer.in_features for layer in layers}) > 1
        or len({layer.bias is None for layer in layers}) > 1
    ):
        raise ValueError(f"projections of one input must be alike in form, inputs and bias, got {layers} ({where})")
    if is_quantized(layers[0]):
        if form_of(layers[0]) is None:
            raise ValueError(
                f"quantised projections must be in a form of convert, got {type(layers[0].weight).__name__} ({where})"
            )
        if len({read_scale(layer).shape[1] for layer in layers}) > 1:
            raise ValueError(f"projections of one input must have one group size, got several ({where})")
    if any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers):
        raise ValueError(f"projections must carry no hooks, which would not see them any more ({where})")


def _kind(layer: nn.Linear) -> tuple[object, ...]:
    weight = layer.weight
    return type(weight), weight.dtype, weight.device, read_bits(layer) if is_quantized(layer) else None


@torch.no_grad()
def _stacked(layers: list[nn.Linear]) -> nn.Linear:
    """Return one layer whose output rows are those of all, in their form."""
    first = layers[0]
    linear = nn.Linear(first.in_features, sum(layer.out_features for layer in layers), bias=False, device="meta")
    if is_quantized(first):
        weights = [read_weight(layer) for layer in layers]
        linear.weight = nn.Parameter(
            to_reference(
                QuantizedWeight(
                    codes=torch.cat([weight.codes for weight in weights]),
                    scale=torch.cat([weight.scale for weight in weights]),
                    bits=weights[0].bits,
                    dtype=weights[0].dtype,
                )
            ),
            requires_grad=False,
        )
        form = form_of(first)
        assert form is not None  # checked for all layers before the first is touched
        holder = convert(nn.Sequential(linear), form)
        linear = holder[0]  # type: ignore[index]
    else:
        linear.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]), requires_grad=False)
    if first.bias is not None:
        linear.bias = nn.Parameter(torch.cat([layer.bias for layer in layers]), requires_grad=False)
    return linear.eval()
