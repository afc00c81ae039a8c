"""How the Triton kernel's weights lie in memory: 4-bit codes in words of 32 bits, tile by tile and chunk by chunk.

A tile is 64 output rows, a chunk 128 inputs; both sizes are filled up, with codes of zero. The words of one tile and chunk are
contiguous, 16 to a row. Input k = 16 * plane + element of a chunk, plane 0 to 7, is in the pair of words (2j, 2j + 1) with
j = element // 2: in word 2j for the planes 0 to 3, in 2j + 1 for 4 to 7; in the low half of the word for an even element, in the
high half for an odd one; at bit 4 * (plane % 4) of that half. So one mask takes the same plane of two neighbouring elements from a
word, where a pair of halves of the tensor cores' operand wants them. The value stored is u = code + 8.

Scales are (groups, rows) of the filled-up sizes, so that a tile reads neighbours.
"""

# O out_features, K in_features, S groups per row, G group size, T tiles, C chunks

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 64
CHUNK = 128
WORDS = 16
GROUPS = (32, 64, 128)


def pack_codes(codes_OK: Tensor) -> Tensor:
    """Return the words (T, C, 64, 16) int32 of codes (O, K) int8 in [-8, 7]."""
    outputs, inputs = codes_OK.shape
    filled = F.pad(codes_OK, (0, -inputs % CHUNK, 0, -outputs % TILE)) + 8
    # tile, row, chunk, word of the pair, plane of the word, pair, half
    parts = filled.to(torch.int32).view(-1, TILE, filled.shape[1] // CHUNK, 2, 4, WORDS // 2, 2)
    shifts = 4 * torch.arange(4, device=codes_OK.device)[:, None, None] + 16 * torch.arange(2, device=codes_OK.device)
    words = (parts << shifts.to(torch.int32)).sum(dim=(4, 6), dtype=torch.int32)
    return words.permute(0, 2, 1, 4, 3).reshape(len(words), words.shape[2], TILE, WORDS).contiguous()


def unpack_codes(words_TCRW: Tensor, outputs: int, inputs: int) -> Tensor:
    """Return the codes (O, K) int8 that :func:`pack_codes` was given."""
    tiles, chunks = words_TCRW.shape[:2]
    pairs = words_TCRW.view(tiles, chunks, TILE, WORDS // 2, 2)
    device = words_TCRW.device
    shifts = 4 * torch.arange(4, device=device)[:, None] + 16 * torch.arange(2, device=device)
    parts = ((pairs[..., None, None] >> shifts.to(torch.int32)) & 15).to(torch.int8) - 8
    # tile, row, chunk, word of the pair, plane of the word, pair, half
    codes = parts.permute(0, 2, 1, 4, 5, 3, 6).reshape(tiles * TILE, chunks * CHUNK)
    return codes[:outputs, :inputs].contiguous()


def pack_scales(scale_OS: Tensor, group_size: int, inputs: int) -> Tensor:
    """Return the scales of the filled-up sizes, (groups, rows)."""
    missing = (-inputs % CHUNK) // group_size
    return F.pad(scale_OS, (0, missing, 0, -scale_OS.shape[0] % TILE), value=1.0).t().contiguous()


def unpack_scales(scale_SO: Tensor, outputs: int, groups: int) -> Tensor:
    """Return the scales (O, S) that :func:`pack_scales` was given."""
    return scale_SO[:groups, :outputs].t().contiguous()
