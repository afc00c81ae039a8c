"""How a decode step on CUDA attends: one token over the whole static cache, by a kernel made for that.

The kernels behind scaled_dot_product_attention are made for many queries, and transformers repeats grouped keys and values for
them. The function here is put in transformers' own registry and asked for by name while steps run or are captured; whatever it
does not know goes to transformers' function for sdpa. A model that was loaded with another implementation keeps it.
"""

# B samples, H query heads, K heads of keys and values, D head size, C places of the cache

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from gracekit._kernels import has_triton

_NAME = "gracekit_decode"
_LEAST_WIDTH, _MOST_WIDTH = 16, 256  # of a head
# What would change the result, under the names that transformers' models hand it over with.
_OTHER_FORMS = ("softcap", "position_bias", "s_aux", "sliding_window", "cache")


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Return attention (B, L, H, D) of a query (B, H, L, D) as transformers' layers ask for it, and no weights."""
    scale = options.get("scaling")
    plain = not options.get("dropout") and all(options.get(name) is None for name in _OTHER_FORMS)
    if plain and scale is not None and _is_known(query, key, value, attention_mask):
        # The operator is for compilers; it takes the host longer than the kernel takes the device.
        one: Any = torch.ops.gracekit.decode_attention if torch.compiler.is_compiling() else _attend_one
        return one(query, key, value, attention_mask, scale), None
    result: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return result


def _is_known(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether it is one token of halves, with an additive mask over places that follow one another."""
    if mask is None:
        return False
    batch, heads, length, width = query.shape
    return (
        query.dtype in (torch.bfloat16, torch.float16)
        and query.dtype == key.dtype == value.dtype == mask.dtype
        and length == 1
        and _LEAST_WIDTH <= width <= _MOST_WIDTH
        and width & (width - 1) == 0
        and key.shape == value.shape == (batch, key.shape[1], key.shape[2], width)
        and heads % key.shape[1] == 0
        and mask.shape == (batch, 1, 1, key.shape[2])
        and all(rows.stride(3) == 1 and rows.stride(2) == width for rows in (key, value))
        and query.stride(3) == mask.stride(3) == 1
    )


def _attend_one(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    from gracekit.quant import _triton_attention

    return _triton_attention.attend(query, key, value, mask, scale)


_decode_attention = torch.library.custom_op("gracekit::decode_attention", _attend_one, mutates_args=())


@_decode_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    return query.new_empty(query.shape[0], 1, query.shape[1], query.shape[3])


AttentionInterface.register(_NAME, attend)
AttentionMaskInterface.register(_NAME, sdpa_mask)


@contextlib.contextmanager
def decode_attention(config: Any, device: torch.device) -> Iterator[None]:
    """Let the layers of a decoder with this configuration attend by :func:`attend`, if they do by sdpa on a CUDA device."""
    if config._attn_implementation != "sdpa" or device.type != "cuda" or not has_triton():
        yield
        return
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"
