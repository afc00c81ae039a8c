"""Whether a teacher's entropy tells how often it is wrong: the ground for a gate of confidence.

The gate weighs a token by exp(-H / log V). That helps only if the teacher is wrong more often where its entropy H is high; GRACE's
paper reports a Pearson correlation of 0.484 between the two and an R^2 of 0.901 over bins (section 3). Both are computed here
for any teacher, on data it was not trained on; and how much of its probability lies beside the answers.
"""

# T supervised tokens, V vocabulary

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gracekit._checks import check_int


@dataclass(frozen=True, kw_only=True)
class GateGround:
    """How entropy and error go together.

    Attributes:
        pearson: correlation of entropy with error (0 or 1), NaN where either is constant.
        binned_r2: R^2 of a line through the bins' mean entropies and error rates, NaN where either is constant.
        bins: (mean entropy in nats, error rate, count) of each bin, by rising entropy.
        count: answers or tokens looked at.
        error_rate: their share that is wrong.
    """

    pearson: float
    binned_r2: float
    bins: list[tuple[float, float, int]]
    count: int
    error_rate: float


def token_entropy(logits: Tensor) -> Tensor:
    """Return the entropy in nats of softmax(logits) at temperature 1, in float32 at least.

    Args:
        logits: (..., V); a class with -inf has no weight.

    Returns:
        (...), in [0, log V].
    """
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    entropy: Tensor = torch.special.entr(logits.softmax(-1)).sum(-1)
    return entropy


def rest_share(logits: Tensor, labels: Tensor, temperature: float) -> float:
    """Return the mean of 1 - p^y, what a teacher leaves to the classes other than the answer.

    It is the weight with which a plain divergence hears what the teacher says of them: KL = TCKD + (1 - p_T^y) NCKD (Zhao et al.,
    CVPR 2022). Decoupled distillation sets that weight itself.

    Args:
        logits: (T, V), the teacher's.
        labels: (T,), the answers' classes.
        temperature: of the softmax, positive.

    Returns:
        In [0, 1].

    Example:
        >>> rest_share(torch.zeros(3, 4), torch.tensor([0, 1, 2]), 2.0)
        0.75
    """
    logits = logits.float() / temperature
    others = logits.scatter(1, labels[:, None], -torch.inf).logsumexp(1)
    return float((others - logits.logsumexp(1)).exp().mean())


def gate_ground(entropy: Tensor, wrong: Tensor, *, bins: int = 15) -> GateGround:
    """Return how a teacher's entropy and its errors go together.

    Bins hold equally many items of neighbouring entropy, up to one; items of equal entropy keep their order.

    Args:
        entropy: (T,), in nats, one for each answer or token.
        wrong: (T,), bool.
        bins: how many; at least 2 and at most T.

    Raises:
        ValueError: shapes differ, or there are fewer items than bins.

    Example:
        >>> entropy = torch.linspace(0, 1, 1000)
        >>> found = gate_ground(entropy, torch.rand(1000, generator=torch.Generator().manual_seed(0)) < entropy)
        >>> found.pearson > 0.5, found.binned_r2 > 0.9
        (True, True)
    """
    if entropy.ndim != 1 or entropy.shape != wrong.shape:
        raise ValueError(
            f"entropy and wrong must be (T,) alike, got shapes {tuple(entropy.shape)} and {tuple(wrong.shape)}"
        )
    check_int("bins", bins, low=2, high=max(2, len(entropy)))
    if len(entropy) < bins:
        raise ValueError(f"entropy must hold at least one value for each bin, got {len(entropy)} for bins={bins}")
    x, y = entropy.double().cpu(), wrong.double().cpu()
    parts = x.argsort(stable=True).tensor_split(bins)
    means, rates = (torch.stack([values[part].mean() for part in parts]) for values in (x, y))
    sizes = [len(part) for part in parts]
    return GateGround(
        pearson=_correlation(x, y),
        binned_r2=_correlation(means, rates) ** 2,
        bins=list(zip(means.tolist(), rates.tolist(), sizes, strict=True)),
        count=len(x),
        error_rate=y.mean().item(),
    )


def _correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's correlation; its square is the R^2 of a line."""
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x.square().sum() * y.square().sum()).sqrt())
