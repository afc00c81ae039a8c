"""Vision-language models of transformers: which tokens are visual, which layers are the language model."""

from gracekit._coverage import Coverage
from gracekit.vlm.families import coverage, language_linears
from gracekit.vlm.pair import PairedTokens, VisualTokenPair
from gracekit.vlm.pooling import pool_tokens
from gracekit.vlm.tap import VisualTokenTap
from gracekit.vlm.tokens import visual_tokens

__all__ = [
    "Coverage",
    "PairedTokens",
    "VisualTokenPair",
    "VisualTokenTap",
    "coverage",
    "language_linears",
    "pool_tokens",
    "visual_tokens",
]
