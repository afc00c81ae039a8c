"""How a compiled decode step attends: one token over the whole static cache.

The kernels behind scaled_dot_product_attention are made for many queries; with one they leave most of the memory's bandwidth
unused. torch's flex attention compiles to a kernel that deals the places of the cache out among programs (flash decoding). It is
put in transformers' own registry of attention functions and asked for by name while a step is compiled. A model that was loaded
with another implementation than sdpa keeps it.
"""

# B samples, H query heads, K heads of keys and values, D head size, C places of the cache

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

_NAME = "gracekit_decode"
_LEAST_WIDTH = 16  # of a head, for flex attention
# What would change the result, under the names that transformers' models hand it over with.
_OTHER_FORMS = ("softcap", "position_bias", "s_aux", "sliding_window", "cache")


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Return attention (B, L, H, D) of a query (B, H, L, D) as transformers' layers ask for it, and no weights.

    One token with an additive mask (B, 1, 1, C) goes through flex attention, everything else through transformers' own function.
    """
    plain = not options.get("dropout") and all(options.get(name) is None for name in _OTHER_FORMS)
    if (
        not plain
        or attention_mask is None
        or not attention_mask.dtype.is_floating_point
        or query.shape[2] > 1
        or query.shape[3] < _LEAST_WIDTH
    ):
        result: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return result
    hidden_BC = attention_mask[:, 0, 0]

    def masked(score: Tensor, row: Tensor, head: Tensor, token: Tensor, place: Tensor) -> Tensor:
        return score + hidden_BC[row, place]

    grouped = key.shape[1] != query.shape[1]
    attended: Any = flex_attention(
        query, key, value, score_mod=masked, scale=options.get("scaling"), enable_gqa=grouped
    )
    return attended.transpose(1, 2), None


AttentionInterface.register(_NAME, attend)
AttentionMaskInterface.register(_NAME, sdpa_mask)


@contextlib.contextmanager
def decode_attention(config: Any) -> Iterator[None]:
    """Let the layers of a decoder with this configuration attend by :func:`attend`, if they do by sdpa."""
    if config._attn_implementation != "sdpa":
        yield
        return
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"
