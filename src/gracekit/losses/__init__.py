"""What is minimised: distillation from logits or hidden states, and relational alignment of visual tokens."""

from gracekit.losses.gated_dkd import ConfidenceGatedDKD, entropy_gate, gated_dkd, shift_labels
from gracekit.losses.linear_gated_dkd import DistillationLoss, LinearGatedDKD, linear_gated_dkd
from gracekit.losses.relational_cka import RelationalCKA, cka

__all__ = [
    "ConfidenceGatedDKD",
    "DistillationLoss",
    "LinearGatedDKD",
    "RelationalCKA",
    "cka",
    "entropy_gate",
    "gated_dkd",
    "linear_gated_dkd",
    "shift_labels",
]
