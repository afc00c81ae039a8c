"""What hypothesis draws: seeds, sizes and scales; tensors are made from them, never element by element."""

import torch
from hypothesis import strategies as st

seeds = st.integers(0, 2**31 - 1)
scales = st.sampled_from([1e-3, 0.1, 1.0, 10.0, 100.0])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=generator(seed), dtype=torch.float64) * scale).to(dtype)


def labels(seed: int, count: int, classes: int, *, ignored: float = 0.3, ignore_index: int = -100) -> torch.Tensor:
    """``count`` labels below ``classes``, about a share ``ignored`` of them replaced by ``ignore_index``."""
    drawn = torch.randint(classes, (count,), generator=generator(seed))
    drop = torch.rand(count, generator=generator(seed + 1)) < ignored
    return drawn.masked_fill(drop, ignore_index)
