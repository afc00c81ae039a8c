"""Options and argument checks that the distillation losses share."""

# N tokens, V vocabulary

from __future__ import annotations

import os
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from gracekit._checks import check_choice, check_int, check_not_negative, check_real, check_values
from gracekit._kernels import has_triton
from gracekit.losses._rows import DKDParameters

BACKENDS = ("auto", "torch", "triton")
# Beyond, float32 holds nothing of logits / T, or of a loss that is T^2 times a difference near 0.
_TEMPERATURES = (1e-4, 1e3)


@dataclass(frozen=True, kw_only=True)
class DKDConfig:
    """The options that the loss has whatever its inputs; names and meaning as in :func:`gated_dkd`."""

    temperature: float = 2.0
    alpha: float = 1.0
    beta: float = 4.0
    gate: str | None = "entropy"
    ignore_index: int = -100
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        check_choice("gate", self.gate, ("entropy", None))
        least, most = _TEMPERATURES
        checked: dict[str, float | int] = {
            "temperature": check_real("temperature", self.temperature, low=least, high=most),
            "alpha": check_real("alpha", self.alpha, low=0.0),
            "beta": check_real("beta", self.beta, low=0.0),
            "ignore_index": check_int("ignore_index", self.ignore_index, low=-(2**63), high=2**63 - 1),
        }
        if self.vocab_size is not None:
            checked["vocab_size"] = check_int("vocab_size", self.vocab_size, low=2)
        for name, value in checked.items():  # plain numbers, whatever kind of number was given
            object.__setattr__(self, name, value)

    def describe(self) -> str:
        """Return the fields as keyword arguments."""
        return ", ".join(f"{field.name}={getattr(self, field.name)!r}" for field in fields(self))

    def for_classes(self, classes: int) -> DKDParameters:
        """Return what the rows of logits with that many compared classes need to know."""
        return DKDParameters(self.temperature, self.alpha, self.beta, self.gate is not None, classes)


def check_backend(backend: str) -> None:
    """Demand a known backend."""
    check_choice("backend", backend, BACKENDS)


def use_triton(backend: str, *tensors: Tensor) -> bool:
    """Choose the kernels for CUDA tensors outside torch.compile (which fuses the formula itself), or as asked."""
    check_backend(backend)
    if backend == "torch" or (backend == "auto" and (torch.compiler.is_compiling() or not tensors[0].is_cuda)):
        return False
    reason = _why_no_triton(*tensors)
    if backend == "triton" and reason is not None:
        raise ValueError(f"backend='triton' is not available: {reason}")
    return reason is None


def _why_no_triton(*tensors: Tensor) -> str | None:
    if not has_triton():
        return "triton is not installed"
    for tensor in tensors:
        if tensor.dtype == torch.float64:
            return "the kernels compute in float32, got float64 tensors"
        if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            return f"the kernels need CUDA tensors, got {tensor.device}"
    return None


def compared_classes(*, vocab_size: int | None, **logits: Tensor) -> int:
    """Return K, how many classes both sides are compared on."""
    sizes = {name: tensor.shape[-1] if tensor.ndim else 0 for name, tensor in logits.items()}
    listed = " and ".join(f"{size} ({name})" for name, size in sizes.items())
    if vocab_size is None:
        if len(set(sizes.values())) > 1:
            raise ValueError(f"V must be the same on both sides unless vocab_size is given, got {listed}")
        vocab_size = next(iter(sizes.values()))
    if vocab_size > min(sizes.values()):
        raise ValueError(f"vocab_size must be at most V, got vocab_size={vocab_size} and V = {listed}")
    if vocab_size < 2:
        raise ValueError(f"V must be at least 2 classes, got {listed}")
    return vocab_size


def supervised_targets(labels: Tensor, ignore_index: int, classes: int) -> tuple[Tensor, Tensor]:
    """Return flat (keep, target): which tokens are supervised, and a valid class for every token; labels are checked."""
    labels_N = labels.reshape(-1).long()  # in a narrow dtype ignore_index would be another number
    keep_N = labels_N != ignore_index
    check_labels(keep_N, labels_N, classes)
    return keep_N, torch.where(keep_N, labels_N, 0)


def check_labels(keep_N: Tensor, labels_N: Tensor, classes: int) -> None:
    """Demand supervised labels in [0, classes)."""
    inside = (labels_N >= 0) & (labels_N < classes)
    check_values(
        inside | ~keep_N, f"labels must be in [0, {classes}) or ignore_index{_worst(labels_N, inside, keep_N)}"
    )


def _worst(labels_N: Tensor, inside: Tensor, keep_N: Tensor) -> str:
    """Name the first bad label, where looking costs no sync."""
    if torch.compiler.is_compiling() or labels_N.device.type != "cpu" or type(labels_N) is not Tensor:
        return ""
    bad = labels_N[~inside & keep_N]
    return f", got {int(bad[0])}" if len(bad) else ""


def check_not_masked(name: str, rows_NV: Tensor, target_N: Tensor, keep_N: Tensor) -> None:
    """Demand that no supervised target has the logit -inf."""
    chosen_N = rows_NV.gather(1, target_N[:, None])[:, 0]
    check_values((chosen_N != -torch.inf) | ~keep_N, f"{name} must not be -inf (masked) at the label")


def check_aligned(name: str, logits: Tensor, labels: Tensor) -> None:
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"{name} must have shape (*labels.shape, V), got {tuple(logits.shape)} and labels {tuple(labels.shape)}"
        )


def divisor(name: str, given: Tensor | float | None, own: Tensor) -> Tensor | float:
    """Return what a weighted sum is divided by: the global sum if given, else the call's own; 1 in place of 0.

    A sum that is NaN, as of a teacher without numbers, is returned as it is: the loss tells, where a check would end the process.
    """
    if given is None:
        given = own.detach()
    if isinstance(given, Tensor):
        if given.numel() != 1:
            raise ValueError(f"{name} must be a number or hold one element, got shape {tuple(given.shape)}")
        if given.is_complex():
            raise TypeError(f"{name} must be a real number, got {given.dtype}")
        given = given.detach().reshape(())
        check_not_negative(name, given)
        return torch.where(given <= 0, torch.ones_like(given), given)
    return check_real(name, given, low=0.0) or 1.0
