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
from tests.support.tolerances import relative_error

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


def test_terms_are_the_best_in_the_metric_of_inputs_and_outputs() -> None:
    """Where C and D are Kronecker products, R(D^(1/2) W C^(1/2)) tells: its leading part, with the roots taken out of
    it again, is the least tr(D E C E^T) of so many terms. All of it in float64 from the dense moments."""
    m, n, p, q = SHAPE
    weight = oracle.draw(SHAPE.out_features, SHAPE.in_features, seed=4)
    # Rows of these have the second moments A A^T kron B B^T, over their number.
    first, second = (torch.kron(*(oracle.draw(k, k, seed=k) for k in sizes)) for sizes in ((m, p), (n, q)))
    moments, outputs = InputMoments(SHAPE.in_features), OutputMoments(SHAPE)
    moments.accumulate(second.t())
    outputs.accumulate(first.t())

    # D's factors are damped by a tenth of their mean eigenvalue.
    blocks = first.view(m, p, -1)
    damped = []
    for side in (torch.einsum("ixt,jxt->ij", blocks, blocks), torch.einsum("xit,xjt->ij", blocks, blocks)):
        unit = torch.eye(len(side), dtype=torch.float64)
        damped.append(torch.linalg.cholesky((side * len(side) / side.trace() + 0.1 * unit) / 1.1).t())
    above, below = torch.kron(*damped), second  # roots: D = above^T above, C ~ below below^T
    rearranged = oracle.oracle_rearrangement(above @ weight @ below, SHAPE)
    u, s, v = torch.linalg.svd(rearranged)
    pairs = zip(u.t()[:2], s[:2], v[:2], strict=True)
    best = torch.stack([size * torch.kron(a.view(m, n), b.view(p, q)) for a, size, b in pairs]).sum(0)

    problem = OutputError(outputs.weigh(weight), SHAPE, moments, damping=1e-9)
    found = oracle.oracle_delta(outputs.take_out(refine_terms(problem, weighted_kpsvd(problem, 2).factors, sweeps=20)))
    least = float(s[2:].norm())
    assert float((above @ (weight - found) @ below).norm()) == pytest.approx(least, rel=1e-6)
    # Gradients are summed in float32.
    assert relative_error(found, torch.linalg.solve(above, best) @ torch.linalg.inv(below)) < 1e-4

    by_inputs = OutputError(weight, SHAPE, moments)
    for other in (kpsvd(weight, SHAPE, 2).factors, refine_terms(by_inputs, weighted_kpsvd(by_inputs, 2).factors)):
        assert float((above @ (weight - oracle.oracle_delta(other)) @ below).norm()) > 1.2 * least


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
