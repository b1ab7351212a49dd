"""Weighing by outputs: terms that lower tr(D E C E^T), against plain linear algebra in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from soka_serve.kron import Factors, kpsvd
from soka_serve.kron.output_weighting import OutputMoments
from soka_serve.kron.shapes import FactorShape
from soka_serve.kron.weighting import InputMoments, OutputError, refine_terms, weighted_kpsvd
from tests.support import kron_oracle as oracle

SHAPE = FactorShape(4, 6, 5, 3)


def _gradients(tokens: int = 4000) -> Tensor:
    """Gradients whose second moment is a Kronecker product with eigenvalues over three decades."""
    generator = torch.Generator().manual_seed(0)
    roots = [torch.randn(n, n, generator=generator) * torch.logspace(0, -1.5, n) for n in (SHAPE.m, SHAPE.p)]
    plain = torch.randn(tokens, SHAPE.m, SHAPE.p, generator=generator)
    return torch.einsum("ij,tjb,ab->tia", roots[0], plain, roots[1]).reshape(tokens, -1)


def _decompose(weight: Tensor, inputs: Tensor, outputs: OutputMoments | None) -> Factors:
    moments = InputMoments(SHAPE.in_features)
    moments.accumulate(inputs)
    problem = OutputError(weight if outputs is None else outputs.weigh(weight), SHAPE, moments)
    factors = refine_terms(problem, weighted_kpsvd(problem, 2).factors)
    return factors if outputs is None else outputs.take_out(factors)


def test_the_error_that_the_loss_sees_is_smaller() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(SHAPE.out_features, SHAPE.in_features, generator=generator)
    inputs = torch.randn(200, SHAPE.in_features, generator=generator)
    gradients = _gradients()
    outputs = OutputMoments(SHAPE)
    outputs.accumulate(gradients[:3000].view(3, 1000, -1))
    outputs.accumulate(gradients[3000:].double())
    assert outputs.mean_square() == pytest.approx(float(gradients.square().mean()), rel=1e-4)
    errors = []
    for given in (None, outputs):
        rest = weight.double() - oracle.oracle_delta(_decompose(weight, inputs, given))
        errors.append(float((inputs.double() @ rest.t() @ gradients.double().t()).square().mean()))
    assert errors[1] < 0.8 * errors[0]


def test_a_sum_of_terms_is_found_again_with_sides_of_norm_1() -> None:
    generator = torch.Generator().manual_seed(2)
    m, n, p, q = SHAPE
    parts = torch.randn(2, m, n, generator=generator), torch.randn(2, p, q, generator=generator)
    weight = oracle.oracle_delta(Factors(*parts, torch.tensor([2.0, 1.0]))).float()
    outputs = OutputMoments(SHAPE)
    outputs.accumulate(_gradients())
    found = _decompose(weight, torch.randn(100, n * q, generator=generator), outputs)
    torch.testing.assert_close(oracle.oracle_delta(found).float(), weight, rtol=1e-3, atol=1e-3)
    for side in (found.left, found.right):
        torch.testing.assert_close(side.flatten(1).norm(dim=1), torch.ones(2))


def test_gradients_of_zero_weigh_nothing() -> None:
    weight = torch.randn(SHAPE.out_features, SHAPE.in_features, generator=torch.Generator().manual_seed(3)).bfloat16()
    outputs = OutputMoments(SHAPE)
    outputs.accumulate(torch.zeros(3, SHAPE.out_features))
    torch.testing.assert_close(outputs.weigh(weight), weight.float())
    factors = kpsvd(weight.float(), SHAPE, 2).factors
    torch.testing.assert_close(outputs.take_out(factors).sigma, factors.sigma)


def test_gradients_that_cannot_be_used_are_refused() -> None:
    outputs = OutputMoments(SHAPE)
    with pytest.raises(ValueError, match="no gradients"):
        outputs.mean_square()
    with pytest.raises(ValueError, match=r"gradients \(..., 20\); got \(3, 9\)"):
        outputs.accumulate(torch.ones(3, 9))
    with pytest.raises(ValueError, match="finite"):
        outputs.accumulate(torch.full((3, 20), float("inf")))
