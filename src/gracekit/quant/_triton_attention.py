"""Attention of one new token over a cache of fixed size, as a Triton kernel that reads keys and values once.

One token of a few rows has too few heads to fill a device with, so the places of the cache are dealt out among programs. Each
keeps the greatest score, the sum of exponentials and the weighted sum of values of its share; a second kernel brings the shares
together (flash decoding). The query heads that share a head of keys are the rows of one product.
"""

# B samples, H query heads, K heads of keys and values, D head size, C places of the cache

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from gracekit.quant._triton_launch import early, launch, processors

_BLOCK = 64
_FILLING = 4  # programs per multiprocessor
_LEAST_ROWS = 16  # of a tensor cores' product
_FEW_WARPS, _MANY_WARPS = 1, 4
_STAGES = 2
_MASKED = tl.constexpr(-1e30)


@triton.jit
def shares_kernel(
    query, keys, values, mask, out, states, C,
    query_batch, query_head, keys_batch, keys_head, values_batch, values_head, mask_batch, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
    SHARES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One head of keys and GROUP of queries, over STEPS blocks of places.

    With one share ``out`` (B, H, D) is written; else ``states`` (B, H, SHARES, D + 2) float32: weighted sum, sum of exponentials,
    greatest score. EARLY: launched while the kernel before it ends; waits for what that has written.
    """
    batch = (tl.program_id(0) // HEADS).to(tl.int64)
    head = tl.program_id(0) % HEADS
    row, column = tl.arange(0, ROWS), tl.arange(0, D)
    is_head = row < GROUP
    heads = batch * (HEADS * GROUP) + head * GROUP + row
    if EARLY:
        gdc_wait()
    at = query + batch * query_batch + (head * GROUP + row)[:, None] * query_head + column[None, :]
    q = tl.load(at, mask=is_head[:, None], other=0.0)
    peak = tl.full([ROWS], _MASKED, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, D], tl.float32)
    for step in range(STEPS):
        place = (tl.program_id(1) * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        here = place < C
        inside = place[:, None] * D + column[None, :]
        k = tl.load(keys + batch * keys_batch + head * keys_head + inside, mask=here[:, None], other=0.0)
        v = tl.load(values + batch * values_batch + head * values_head + inside, mask=here[:, None], other=0.0)
        hidden = tl.load(mask + batch * mask_batch + place, mask=here, other=float("-inf")).to(tl.float32)
        # Masked places keep a finite score, so that a share without any other is no NaN.
        score = tl.maximum(tl.dot(q, tl.trans(k)) * scale + hidden[None, :], _MASKED)
        score = tl.where(here[None, :], score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        weight = tl.exp(score - higher[:, None])
        shrink = tl.exp(peak - higher)
        total = total * shrink + tl.sum(weight, 1)
        sums = sums * shrink[:, None] + tl.dot(weight.to(v.dtype), v)
        peak = higher
    if SHARES == 1:
        to = out + heads[:, None] * D + column[None, :]
        tl.store(to, (sums / total[:, None]).to(out.dtype.element_ty), mask=is_head[:, None])
    else:
        to = states + (heads * SHARES + tl.program_id(1)) * (D + 2)
        tl.store(to[:, None] + column[None, :], sums, mask=is_head[:, None])
        tl.store(to + D, total, mask=is_head)
        tl.store(to + D + 1, peak, mask=is_head)


@triton.jit
def together_kernel(states, out, D: tl.constexpr, SHARES: tl.constexpr, PADDED: tl.constexpr, EARLY: tl.constexpr):
    """One query head: the shares' sums, each to the scale of the greatest score of all."""
    share, column = tl.arange(0, PADDED), tl.arange(0, D)
    head = tl.program_id(0).to(tl.int64)
    here = share < SHARES
    at = states + (head * SHARES + share) * (D + 2)
    if EARLY:
        gdc_wait()
    peak = tl.load(at + D + 1, mask=here, other=float("-inf"))
    shrink = tl.exp(peak - tl.max(peak, 0))
    total = tl.sum(tl.load(at + D, mask=here, other=0.0) * shrink, 0)
    sums = tl.load(at[:, None] + column[None, :], mask=here[:, None], other=0.0)
    tl.store(out + head * D + column, (tl.sum(sums * shrink[:, None], 0) / total).to(out.dtype.element_ty))


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Return attention (B, 1, H, D) of one token, in its dtype.

    Args:
        query: (B, H, 1, D), bfloat16 or float16, D a power of two from 16 on.
        keys: (B, K, C, D), K dividing H; a head's places follow one another.
        values: likewise.
        mask: (B, 1, 1, C), what is added to the scores; at least one place of a row is 0.
        scale: of the scores.
    """
    batch, count, _, width = query.shape
    heads, places = keys.shape[1:3]
    shares, steps = _shares(batch * heads, places, processors(query.device))
    out = query.new_empty(batch, 1, count, width)
    states = query.new_empty(batch * count * shares * (width + 2) if shares > 1 else 0, dtype=torch.float32)
    sizes = [
        places,
        query.stride(0),
        query.stride(1),
        keys.stride(0),
        keys.stride(1),
        values.stride(0),
        values.stride(1),
    ]
    options = {
        "HEADS": heads,
        "GROUP": count // heads,
        "ROWS": max(_LEAST_ROWS, triton.next_power_of_2(count // heads)),
        "D": width,
        "BLOCK": _BLOCK,
        "STEPS": steps,
        "SHARES": shares,
        "num_warps": _FEW_WARPS if shares == 1 else _MANY_WARPS,
        "num_stages": _STAGES,
        **early(query.device),
    }
    tensors = [query, keys, values, mask, out, states]
    launch(shares_kernel, (batch * heads, shares), tensors, [*sizes, mask.stride(0), scale], options)
    if shares > 1:
        options = {
            "D": width,
            "SHARES": shares,
            "PADDED": triton.next_power_of_2(shares),
            "num_warps": _FEW_WARPS,
            "num_stages": _STAGES,
            **early(query.device),
        }
        launch(together_kernel, (batch * count,), [states, out], [], options)
    return out


def _shares(heads: int, places: int, processors: int) -> tuple[int, int]:
    """Return among how many programs a head's places are dealt out, and how many blocks each has."""
    blocks = triton.cdiv(places, _BLOCK)
    steps = triton.cdiv(blocks, max(1, min(blocks, _FILLING * processors // heads)))
    return triton.cdiv(blocks, steps), steps
