"""The statistics of a comparison, against scipy and against values that can be worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from soka_serve.comparison.stats import (
    coefficient_of_variation,
    holm,
    interval,
    paired_test,
    pareto_front,
    running_mean,
    steps_to,
)


def test_the_interval_is_students_t() -> None:
    values = [0.61, 0.70, 0.66, 0.72, 0.64]
    found = interval(values)
    assert found is not None
    low, high = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert (found.mean, found.low, found.high) == pytest.approx((np.mean(values), low, high))
    assert interval([]) is None


def test_the_paired_test_is_scipys() -> None:
    a, b = [0.8, 0.7, 0.9, 0.75, 0.85], [0.7, 0.72, 0.8, 0.7, 0.7]
    found = paired_test(a, b)
    assert found is not None
    assert found.p == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert (found.pairs, found.wins, found.losses) == (5, 4, 1)
    assert found.difference.mean == pytest.approx(0.076)


def test_paired_values_without_spread() -> None:
    same = paired_test([0.5, 0.6], [0.5, 0.6])
    shifted = paired_test([0.5, 0.75], [0.25, 0.5])
    single = paired_test([0.5], [0.4])
    assert same is not None
    assert (same.p, same.wins, same.losses) == (1.0, 0, 0)
    assert shifted is not None
    assert shifted.p == 0.0
    assert single is not None
    assert single.p is None
    assert paired_test([], []) is None


def test_holm_on_a_worked_example() -> None:
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1; the last may not fall below the one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, None, 0.8]) == [1.0, None, 1.0]
    assert holm([]) == []


def test_the_pareto_front_keeps_equals_and_drops_what_is_beaten() -> None:
    points = [(10, 0.5), (10, 0.5), (20, 0.5), (20, 0.6), (5, 0.1)]
    assert pareto_front(points) == [True, True, False, True, True]


def test_steps_to_a_loss_of_the_running_mean() -> None:
    losses = [5.0, 1.0, 4.0, 3.0, 2.0, 1.0]
    assert running_mean(losses, 3) == pytest.approx([10 / 3, 8 / 3, 3.0, 2.0])
    assert steps_to(losses, 2.7, 3) == 4
    assert steps_to(losses, 2.0, 3) == 6
    assert steps_to(losses, 1.9, 3) is None
    assert steps_to(losses, 9.9, 7) is None


def test_coefficient_of_variation() -> None:
    assert coefficient_of_variation([1.0, 3.0]) == pytest.approx(math.sqrt(2) / 2)
    assert coefficient_of_variation([2.0]) is None
    assert coefficient_of_variation([0.0, 0.0]) is None
