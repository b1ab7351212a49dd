"""Statistics of a comparison: intervals, paired tests, and what is on the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from soka_serve.errors import BuildError

CONFIDENCE = 0.95


def _scipy_stats() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise BuildError(
            "comparisons need scipy, which is not installed", hint="pip install 'soka-serve[compare]'"
        ) from error
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


@dataclass(frozen=True)
class PairedTest:
    """A paired t-test, candidate minus reference.

    `p` is two-sided, None with fewer than two pairs. `p_holm` is `p` after Holm's correction within its family.
    """

    pairs: int
    difference: Interval
    wins: int
    losses: int
    p: float | None
    p_holm: float | None = None


def paired_test(candidate: Sequence[float], reference: Sequence[float]) -> PairedTest | None:
    """Compare values that belong together by place (the same seed and dataset); None without pairs."""
    differences = [a - b for a, b in zip(candidate, reference, strict=True)]
    summary = interval(differences)
    if summary is None:
        return None
    wins, losses = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    p: float | None = None
    if len(differences) >= 2:
        if max(differences) - min(differences) < 1e-12:  # no spread: the statistic is 0/0 or infinite
            p = 1.0 if abs(differences[0]) < 1e-12 else 0.0
        else:
            p = float(_scipy_stats().ttest_rel(candidate, reference).pvalue)
    return PairedTest(len(differences), summary, wins, losses, p)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction over the values that are not None.

    >>> [round(p, 6) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for place, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - place)))
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


def coefficient_of_variation(values: Sequence[float]) -> float | None:
    """Standard deviation over mean; None for fewer than two values or a mean of 0."""
    n = len(values)
    mean = math.fsum(values) / n if n else 0.0
    if n < 2 or mean == 0 or not math.isfinite(mean):
        return None
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1)) / mean
