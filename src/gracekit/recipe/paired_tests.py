"""Whether two variants differ: intervals and paired tests over seeds, McNemar's test over questions, Holm's correction.

A few seeds are a small sample, so their mean has Student's t distribution. Its distribution function has a closed form for a whole
number of degrees of freedom, and that is all that a mean of n seeds needs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from gracekit._checks import check_int, check_real

_FLIPPED = 20  # 2**20 patterns of signs take a second or two


class Interval(NamedTuple):
    """A mean, and its confidence interval from ``low`` to ``high`` (NaN where one value cannot tell)."""

    mean: float
    low: float
    high: float


def t_two_sided(t: float, df: int) -> float:
    """Return the probability of ``|T| >= |t|`` in Student's t distribution (Abramowitz and Stegun, 26.7.3 and 26.7.4).

    Args:
        t: statistic; infinity is taken.
        df: degrees of freedom, a whole number of at least 1.

    Returns:
        A probability, right to about 1e-15 (absolute).

    Raises:
        ValueError: df is below 1.

    Example:
        >>> round(t_two_sided(2.776, 4), 3)
        0.05
    """
    check_int("df", df, low=1)
    angle = math.atan2(abs(t), math.sqrt(df))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = df % 2
    term = total = math.cos(angle) if odd else 1.0
    for k in range(2 + odd, df - 1, 2):
        term *= square * (k - 1) / k
        total += term
    inside = 2 / math.pi * (angle + (sine * total if df > 1 else 0.0)) if odd else sine * total
    return min(1.0, max(0.0, 1.0 - inside))


def t_quantile(confidence: float, df: int) -> float:
    """Return the t that ``|T|`` stays below with probability ``confidence``, by bisection.

    Args:
        confidence: in (0, 1).
        df: degrees of freedom, a whole number of at least 1.

    Raises:
        ValueError: confidence is not inside (0, 1), or df below 1.

    Example:
        >>> round(t_quantile(0.95, 4), 3)
        2.776
    """
    check_real("confidence", confidence, low=0.0, high=1.0, open_low=True)
    if confidence == 1.0:
        raise ValueError("confidence must be below 1, got confidence=1.0")
    low, high = 0.0, 1.0
    while t_two_sided(high, df) > 1.0 - confidence:
        low, high = high, 2.0 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_two_sided(middle, df) > 1.0 - confidence else (low, middle)
    return (low + high) / 2


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Return the mean of some values, and the interval of Student's t around it.

    Raises:
        ValueError: no value, or confidence not inside (0, 1).

    Example:
        >>> mean, low, high = mean_interval([0.90, 0.92, 0.94])
        >>> round(mean, 3), round(high - mean, 3)
        (0.92, 0.05)
    """
    mean, error = _mean_and_error(values)
    half = t_quantile(confidence, len(values) - 1) * error if len(values) > 1 else math.nan
    return Interval(mean, mean - half, mean + half)


def paired_t(differences: Sequence[float]) -> float:
    """Return the two-sided p value of Student's t test that paired differences have the mean 0.

    One difference tells nothing: 1. Differences that are all the same and not 0 leave no doubt: 0.

    Raises:
        ValueError: no difference.

    Example:
        >>> round(paired_t([1.0, 2.0, 3.0]), 4)
        0.0742
    """
    mean, error = _mean_and_error(differences)
    if len(differences) < 2 or mean == 0.0:
        return 1.0
    return t_two_sided(mean / error if error else math.inf, len(differences) - 1)


def sign_flip(differences: Sequence[float]) -> float:
    """Return the two-sided p value of Fisher's permutation test of paired differences.

    Were there no difference between the two of a pair, each sign would be as likely as the other. All 2^n patterns are
    looked at, so the least possible value is 2 / 2^n: 0.0625 for five seeds, which no effect can get below 0.05.

    Args:
        differences: at most 20.

    Raises:
        ValueError: no difference, or more than 20.

    Example:
        >>> sign_flip([1.0, 2.0, 3.0])
        0.25
    """
    check_int("the number of differences", len(differences), low=1, high=_FLIPPED)
    observed = abs(math.fsum(differences))
    slack = 1e-12 * math.fsum(map(abs, differences))  # so that equal sums are, whatever the order of adding up
    sums = [0.0]
    for value in differences:
        sums = list(itertools.chain((s + value for s in sums), (s - value for s in sums)))
    return sum(abs(s) >= observed - slack for s in sums) / len(sums)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Return the exact two-sided p value of McNemar's test: whether two models are right about as many of the same questions.

    Only the questions that one alone has right count; were the models equally good, each would be either's with probability 1/2.

    Args:
        first: whether the first model is right, a question each.
        second: the same questions, the second model.

    Raises:
        ValueError: the two have different lengths.

    Example:
        >>> mcnemar([True] * 9 + [False], [False] * 9 + [True])
        0.021484375
    """
    if len(first) != len(second):
        raise ValueError(f"first and second must be about the same questions, got {len(first)} and {len(second)}")
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    count = only_first + only_second
    tail = sum(math.comb(count, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, float(Fraction(2 * tail, 2**count)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values corrected for how many there are (Holm, 1979): those below 0.05 hold together at that level.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    for value in p_values:
        check_real("p_values", value, low=0.0, high=1.0)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error; differences of rounding alone count as none."""
    if not values:
        raise ValueError("values must hold at least one number, got none")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, math.nan
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    if spread <= 1e-12 * max(map(abs, values)):
        spread = 0.0
    return mean, spread / math.sqrt(len(values))
