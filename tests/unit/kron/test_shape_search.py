"""The search behind `shape = "auto"`."""

from __future__ import annotations

import pytest
import torch

from soka_serve.kron import kpsvd
from soka_serve.kron.decompose import captured_energy
from soka_serve.kron.shape_search import search_shape
from soka_serve.kron.shapes import FactorShape, balanced_shape, candidate_shapes


def planted(shape: FactorShape, terms: int, noise: float, seed: int = 0) -> torch.Tensor:
    """A weight that is a few Kronecker products of one shape and some noise."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    weight = sum(
        (torch.kron(draw(shape.m, shape.n), draw(shape.p, shape.q)) for _ in range(terms)),
        start=torch.zeros(shape.out_features, shape.in_features),
    )
    return weight + noise * draw(shape.out_features, shape.in_features)


@pytest.mark.parametrize("shape", [(8, 12, 12, 4), (16, 6, 6, 8), (4, 16, 24, 3)])
def test_finds_the_shape_that_a_weight_was_made_of(shape: tuple[int, int, int, int]) -> None:
    weight = planted(FactorShape(*shape), terms=2, noise=0.05)
    assert search_shape(weight, candidate_shapes(96, 48), 4) == shape


def test_a_tie_goes_to_the_balanced_shape() -> None:
    weight = torch.zeros(64, 64)
    assert search_shape(weight, candidate_shapes(64, 64), 4) == balanced_shape(64, 64)


def test_no_shape_captures_more_at_equal_parameters() -> None:
    weight = planted(FactorShape(6, 8, 8, 4), terms=3, noise=0.5)
    candidates = candidate_shapes(48, 32)
    budget = candidates[0].parameters(2)
    chosen = search_shape(weight, candidates, 2)

    def energy(shape: FactorShape) -> float:
        rank = min(budget // shape.parameters(1), shape.max_rank)
        return float(kpsvd(weight, shape, rank, algorithm="exact").factors.sigma.square().sum())

    assert energy(chosen) >= max(map(energy, candidates)) * (1 - 1e-3)
    assert chosen.parameters(budget // chosen.parameters(1)) <= budget


def test_the_result_repeats() -> None:
    weight = planted(FactorShape(8, 6, 6, 8), terms=1, noise=1.0)
    assert search_shape(weight, candidate_shapes(48, 48), 3) == search_shape(weight, candidate_shapes(48, 48), 3)


def test_no_candidates_are_refused() -> None:
    with pytest.raises(ValueError, match="got none"):
        search_shape(torch.ones(8, 8), (), 1)


def test_captured_energy_agrees_with_the_decomposition() -> None:
    weight = planted(FactorShape(8, 8, 6, 6), terms=4, noise=0.3) * 1e-3
    shape = FactorShape(12, 6, 4, 8)
    expected = float(kpsvd(weight, shape, 5, algorithm="exact").factors.sigma.double().square().sum())
    assert captured_energy(weight, shape, 5) == pytest.approx(expected, rel=1e-4)
    assert captured_energy(weight, shape, 5, rough=True) <= expected * (1 + 1e-4)
