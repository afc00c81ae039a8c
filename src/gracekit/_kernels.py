"""Whether kernels can be had."""

import functools
import importlib.util


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None
