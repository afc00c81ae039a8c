"""GRACE (arXiv 2601.22709) in parts: confidence-gated distillation, relational alignment, learned INT4 weights."""

from gracekit.control import LagrangianController
from gracekit.losses import (
    ConfidenceGatedDKD,
    DistillationLoss,
    LinearGatedDKD,
    RelationalCKA,
    cka,
    entropy_gate,
    gated_dkd,
    linear_gated_dkd,
    shift_labels,
)
from gracekit.objective import GraceLoss, GraceObjective

__version__ = "0.1.0"

__all__ = [
    "ConfidenceGatedDKD",
    "DistillationLoss",
    "GraceLoss",
    "GraceObjective",
    "LagrangianController",
    "LinearGatedDKD",
    "RelationalCKA",
    "cka",
    "entropy_gate",
    "gated_dkd",
    "linear_gated_dkd",
    "shift_labels",
]
