"""Statistics of a comparison: intervals, sign-flip tests, gradient noise, and what is on the Pareto front."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from soka_serve.errors import BuildError, install_extra

CONFIDENCE = 0.95


def _scipy_stats() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise BuildError("comparisons need scipy, which is not installed", hint=install_extra("compare")) from error
    return stats


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% confidence interval over `n` values; the bounds are None where n = 1."""

    mean: float
    low: float | None
    high: float | None
    n: int


def interval(values: Sequence[float]) -> Interval | None:
    """Student's t interval of the mean; None without values.

    >>> found = interval([0.4, 0.6])
    >>> round(found.mean, 3), round(found.low, 3), round(found.high, 3)
    (0.5, -0.771, 1.771)
    >>> interval([0.5])
    Interval(mean=0.5, low=None, high=None, n=1)
    """
    n = len(values)
    if n == 0:
        return None
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, None, None, 1)
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = float(_scipy_stats().t.ppf((1 + CONFIDENCE) / 2, n - 1)) * spread / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


EXACT_PAIRS = 14
"""Up to so many pairs all sign flips are counted, beyond it `_FLIPS` random ones."""
_FLIPS = 20_000


def sign_flip(values: Sequence[float]) -> float | None:
    """One-sided p-value of the sign-flip test that the mean of `values` is below 0; None without values.

    The share of sign patterns whose sum is at most the sum that came (Fisher's randomisation test for pairs); with more
    than 14 values, of 20,000 random patterns with a fixed seed, the pattern that came among them.

    >>> sign_flip([-1.0, -2.0, -3.0]), sign_flip([1.0, -1.0])
    (0.125, 0.75)
    """
    n = len(values)
    if n == 0:
        return None
    found = np.asarray(values, dtype=np.float64)
    if n <= EXACT_PAIRS:
        signs = 1.0 - 2.0 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)
    else:
        signs = np.random.default_rng(0).choice((-1.0, 1.0), (_FLIPS, n))
        signs[0] = 1.0
    tolerance = 1e-12 * float(np.abs(found).sum())  # sums of one pattern and its rounding
    return float((signs @ found <= found.sum() + tolerance).mean())


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction. A test without a value, which is None, counts among them all the same.

    >>> [round(p, 6) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    >>> holm([0.02, None])
    [0.04, None]
    """
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for place, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(p_values) - place)))
        corrected[i] = largest
    return corrected


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which of (cost, value) no other point beats: none has at most the cost and at least the value, and one better.

    >>> pareto_front([(1, 0.5), (2, 0.4), (2, 0.9), (3, 0.9)])
    [True, False, True, False]
    """

    def beaten(cost: float, value: float) -> bool:
        return any(c <= cost and v >= value and (c < cost or v > value) for c, v in points)

    return [not beaten(cost, value) for cost, value in points]


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values at each place; None of them before there are so many.

    >>> running_mean([1.0, 3.0, 5.0], 2)
    [2.0, 4.0]
    """
    return [math.fsum(values[i - window : i]) / window for i in range(window, len(values) + 1)]


def steps_to(values: Sequence[float], target: float, window: int) -> int | None:
    """The first step after which the mean loss of the last `window` steps is at most `target`; None if never.

    >>> steps_to([4.0, 3.0, 2.0, 1.0], 2.5, 2)
    3
    """
    for place, mean in enumerate(running_mean(values, window)):
        if mean <= target:
            return place + window
    return None


def noise(values: Sequence[float]) -> float | None:
    """Standard deviation of the logarithm around its trend, from successive differences; None for fewer than two.

    sqrt(mean (log v_t - log v_(t-1))^2 / 2), the root of half the mean square successive difference (von Neumann,
    1941): a slow trend cancels in each difference. None where a value is not positive and finite.

    >>> round(noise([1.0, 2.0, 1.0, 2.0]), 4), noise([1.0])
    (0.4901, None)
    """
    if len(values) < 2 or not all(v > 0 and math.isfinite(v) for v in values):
        return None
    squares = [math.log(b / a) ** 2 for a, b in itertools.pairwise(values)]
    return math.sqrt(math.fsum(squares) / len(squares) / 2)
