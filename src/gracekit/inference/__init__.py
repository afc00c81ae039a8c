"""Generation with fixed shapes: static cache, a decode loop of its own, CUDA graphs; and projections fused where codes allow."""

from gracekit.inference.fuse import fuse_projections
from gracekit.inference.generate import Generation, Generator, generate

__all__ = ["Generation", "Generator", "fuse_projections", "generate"]
