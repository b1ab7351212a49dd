"""Intruder dimensions: the count against whole SVDs in float64, and what truncated SVDs may settle by themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from soka_serve.kron import intruders
from soka_serve.kron.intruders import count_intruders
from tests.support.kron_oracle import draw


def direct(weight: Tensor, changed: Tensor, leading: int = 10, threshold: float = 0.5) -> int:
    """The definition."""
    old = torch.linalg.svd(weight.double(), full_matrices=False)[0]
    new = torch.linalg.svd(changed.double(), full_matrices=False)[0]
    nearest = [max(abs(float(new[:, j] @ old[:, i])) for i in range(old.shape[1])) for j in range(leading)]
    return sum(cosine < threshold for cosine in nearest)


def weights(out: int, into: int, *, spikes: int = 6, added: int = 3, size: float = 0.0) -> tuple[Tensor, Tensor]:
    """A weight with some large singular values, and the same with some directions of its own added."""
    flat, strong = draw(out, into), draw(out, spikes, seed=1) @ draw(spikes, into, seed=2)
    weight = (flat + strong * (8 / into**0.5)).float()
    return weight, weight + (size * draw(out, added, seed=3) @ draw(added, into, seed=4)).float()


@pytest.mark.parametrize(("out", "into"), [(40, 40), (60, 24), (24, 60)])
@pytest.mark.parametrize("size", [0.0, 0.1, 1.0, 4.0])
def test_as_the_definition_says(out: int, into: int, size: float) -> None:
    weight, changed = weights(out, into, size=size)
    assert count_intruders(weight, changed) == direct(weight, changed)


def test_new_directions_are_found_and_none_without_a_delta() -> None:
    weight, changed = weights(60, 60, size=4.0)
    assert count_intruders(weight, weight) == 0
    assert count_intruders(weight, changed) == 3
    assert count_intruders(weight, changed, threshold=1e-6) == 0


@pytest.mark.parametrize(("size", "calls"), [(0.0, 0), (0.02, 0), (4.0, 1)])
def test_truncated_svds_settle_what_they_are_sure_of(size: float, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intruders, "_WHOLE_SIDE", 30)
    whole, seen = intruders._whole_svd, []
    monkeypatch.setattr(intruders, "_whole_svd", lambda *given: seen.append(given) or whole(*given))
    weight, changed = weights(80, 64, spikes=30, size=size)
    assert count_intruders(weight, changed) == direct(weight, changed)
    assert len(seen) == calls


def test_errors_of_truncated_vectors_are_bounded() -> None:
    weight, _ = weights(700, 640, spikes=12)
    found, bounds = intruders._leading_vectors(weight, 20)
    exact = torch.linalg.svd(weight.double(), full_matrices=False)[0][:, :20]
    angles = (found.double() * exact).sum(0).abs().clamp(max=1).arccos()
    sure = bounds < 0.5
    assert int(sure.sum()) >= 10
    assert bool((angles[sure] <= bounds[sure] + 1e-3).all())


def test_few_and_zero_singular_values() -> None:
    weight, changed = weights(5, 7, size=4.0)
    assert count_intruders(weight, changed) == direct(weight, changed, leading=5)
    assert count_intruders(weight, torch.zeros(5, 7)) == 0
    assert count_intruders(torch.zeros(5, 7), torch.outer(draw(5), draw(7)).float()) == 1


def test_more_leading_vectors_than_a_truncated_svd_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intruders, "_WHOLE_SIDE", 30)
    weight, changed = weights(80, 64, size=4.0)
    assert count_intruders(weight, changed, leading=20) == direct(weight, changed, leading=20)


def test_the_wider_dtype_of_the_two_counts() -> None:
    weight, changed = weights(60, 60, size=4.0)
    assert count_intruders(weight.double(), changed) == count_intruders(weight, changed.double()) == 3
