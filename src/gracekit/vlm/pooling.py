"""Average pooling of an image's tokens from one grid to a coarser one.

Every target cell is the mean of the source cells it covers, each weighted with the area that lies inside. Along one axis,
from H cells to h, that is the (h, H) matrix W[i, j] = |[i, i+1) * H/h  intersected with  [j, j+1)| * h/H. Rows sum to 1,
so a constant stays constant; columns sum to h/H, so the mean over the image stays what it was, also where h does not
divide H; for h = H it is the identity. Where h divides H this is ordinary average pooling.
"""

# n visual tokens of one image, d hidden, T frames, H and W rows and columns of the token grid

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from gracekit import _checks

Grid = tuple[int, int, int]


def pool_tokens(
    tokens: Tensor, grids: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]
) -> tuple[Tensor, list[int]]:
    """Pool packed visual tokens, image by image, from one grid to a coarser one.

    The mean over the source cells that a target cell covers, weighted with the area covered; see the module's docstring.
    Gradients flow through it. fp16 and bf16 tokens are averaged in fp32 and returned in their own dtype.

    Args:
        tokens: packed tokens (sum n, d), floating; each image in order of frames, rows and columns.
        grids: the token grid of each image, (H, W) or (T, H, W), all at least 1; their products are the n.
        targets: the grid wanted for each image, along no axis finer than the one it has.

    Returns:
        The pooled tokens (sum n', d) and the list of n'.

    Raises:
        TypeError: ``tokens`` is not floating, or a grid's size is no integer.
        ValueError: the grids do not add up to the tokens, a target is finer than its grid, or their numbers differ.

    Example:
        >>> tokens = torch.tensor([[1.0], [3.0], [5.0], [7.0]])
        >>> pooled, lengths = pool_tokens(tokens, [(2, 2)], [(1, 2)])
        >>> pooled.flatten().tolist(), lengths
        ([3.0, 5.0], [2])
    """
    _checks.check_floating("tokens", tokens)
    _checks.check_rank("tokens", tokens, (2,), "(sum n, d)")
    sources, wanted = check_grids("grids", grids), check_grids("targets", targets)
    if len(sources) != len(wanted):
        raise ValueError(f"grids and targets must be as many, got {len(sources)} grids and {len(wanted)} targets")
    for i, (source, target) in enumerate(zip(sources, wanted, strict=True)):
        if any(t > s for s, t in zip(source, target, strict=True)):
            raise ValueError(
                f"targets must be no finer than grids along any axis, got {target} for {source} (image {i})"
            )
    lengths = [cells(source) for source in sources]
    if sum(lengths) != len(tokens):
        raise ValueError(f"grids must have as many cells as there are tokens, got {sum(lengths)} and {len(tokens)}")
    images = torch.split(tokens, lengths)
    pooled = [_pool(image, s, t) for image, s, t in zip(images, sources, wanted, strict=True)]
    return torch.cat([tokens[:0], *pooled]), [cells(target) for target in wanted]


def check_grids(name: str, grids: Sequence[Sequence[int]]) -> list[Grid]:
    """Return every grid as (T, H, W), or raise."""
    if not isinstance(grids, Collection) or not all(isinstance(grid, Collection) for grid in grids):
        raise TypeError(
            f"{name} must be a sequence of (rows, columns) or (frames, rows, columns), got {name}={grids!r}"
        )
    return [check_grid(f"{name}[{i}]", grid) for i, grid in enumerate(grids)]


def check_grid(name: str, grid: Sequence[int]) -> Grid:
    """Return ``grid`` as (T, H, W), one frame where it has two sizes only."""
    sizes = tuple(_checks.check_int(name, size, low=1) for size in grid)
    if len(sizes) not in (2, 3):
        raise ValueError(f"{name} must be (rows, columns) or (frames, rows, columns), got {name}={sizes}")
    return (1, *sizes) if len(sizes) == 2 else (sizes[0], sizes[1], sizes[2])


def cells(grid: Grid) -> int:
    """Return the number of tokens of a grid."""
    return grid[0] * grid[1] * grid[2]


def coarser(one: Grid, other: Grid) -> Grid:
    """Return the grid with the smaller size along each axis."""
    frames, rows, columns = (min(a, b) for a, b in zip(one, other, strict=True))
    return frames, rows, columns


def _pool(image: Tensor, source: Grid, target: Grid) -> Tensor:
    if source == target:
        return image
    # Averages of many half-precision numbers would lose what is averaged.
    wide = image if image.dtype in (torch.float32, torch.float64) else image.float()
    cube = wide.reshape(*source, -1)
    for axis, (size, wanted) in enumerate(zip(source, target, strict=True)):
        if size != wanted:
            weights = _weights(size, wanted).to(device=cube.device, dtype=cube.dtype, non_blocking=True)
            product: Tensor = torch.tensordot(weights, cube, dims=([1], [axis]))
            cube = product.movedim(0, axis)
    return cube.flatten(0, 2).to(image.dtype)


def _weights(size: int, wanted: int) -> Tensor:
    """Return the (wanted, size) matrix of the areas covered, in float64."""
    # In units of 1/wanted of a source cell all borders are integers.
    cell, window = torch.arange(size) * wanted, torch.arange(wanted)[:, None] * size
    overlap = torch.minimum(cell + wanted, window + size) - torch.maximum(cell, window)
    return overlap.clamp_min(0).double() / size
