"""Planted mistakes: each wrong variant must be rejected by the check that the parity tests use.

The right implementation passes the same checks in test_kron.py; here it is only shown that they can fail.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from soka_serve.kron import Factors, dense_delta, kpsvd, stack_terms
from soka_serve.kron.factors import rearrange
from soka_serve.kron.shapes import FactorShape
from tests.support import kron_oracle as oracle


def plain_reshape(weight: Tensor, shape: FactorShape) -> Tensor:
    """Mutation: the weight reshaped to the rearrangement's size, blocks not gathered."""
    m, n, p, q = shape
    return weight.reshape(m * n, p * q)


def swapped_rearrangement(weight: Tensor, shape: FactorShape) -> Tensor:
    """Mutation: the rearrangement for kron(right, left); the size is right where (m, n) = (p, q)."""
    m, n, p, q = shape
    return weight.reshape(p, m, q, n).permute(1, 3, 0, 2).reshape(m * n, p * q)


def test_plain_reshape_is_rejected() -> None:
    with pytest.raises(AssertionError):
        oracle.check_rearrangement(plain_reshape)


def test_swapped_rearrangement_is_rejected() -> None:
    with pytest.raises(AssertionError):
        oracle.check_rearrangement(swapped_rearrangement)


@pytest.mark.parametrize("wrong", [plain_reshape, swapped_rearrangement])
def test_decomposition_of_a_wrong_rearrangement_is_rejected(wrong: object) -> None:
    def decompose(weight: Tensor, shape: FactorShape, rank: int) -> Factors:
        left, sigma, right = torch.linalg.svd(wrong(weight, shape), full_matrices=False)  # type: ignore[operator]
        m, n, p, q = shape
        return Factors(left.t()[:rank].reshape(-1, m, n), right[:rank].reshape(-1, p, q), sigma[:rank])

    with pytest.raises(AssertionError):
        oracle.check_decomposition(decompose)


def test_a_plain_reshape_recovers_nothing_of_a_kronecker_product() -> None:
    shape = FactorShape(8, 8, 8, 8)
    weight = torch.kron(oracle.draw(8, 8), oracle.draw(8, 8, seed=1))
    right_way = kpsvd(weight, shape, 1).factors
    left, sigma, right = torch.linalg.svd(plain_reshape(weight, shape))
    wrong_way = Factors(left[:, 0].reshape(1, 8, 8), right[0].reshape(1, 8, 8), sigma[:1])
    errors = [float((weight - dense_delta(f)).norm() / weight.norm()) for f in (right_way, wrong_way)]
    assert errors[0] < 1e-12
    assert errors[1] > 0.9


def test_swapped_kronecker_order_is_rejected() -> None:
    def swapped(factors: Factors) -> Tensor:
        terms = zip(factors.left, factors.right, factors.sigma, strict=True)
        return torch.stack([s * torch.kron(right, left) for left, right, s in terms]).sum(0)

    with pytest.raises(AssertionError):
        oracle.check_dense_delta(swapped)

    def swapped_apply(x: Tensor, left: Tensor, right: Tensor, sigma: Tensor) -> Tensor:
        return x @ swapped(Factors(left, right, sigma)).t()

    with pytest.raises(AssertionError):
        oracle.check_apply(swapped_apply)


def test_dropped_sigma_is_rejected() -> None:
    def without(factors: Factors) -> Tensor:
        return dense_delta(Factors(factors.left, factors.right, torch.ones_like(factors.sigma)))

    with pytest.raises(AssertionError):
        oracle.check_dense_delta(without)
    with pytest.raises(AssertionError):
        oracle.check_apply(lambda x, left, right, sigma: x @ without(Factors(left, right, sigma)).t())
    with pytest.raises(AssertionError):
        oracle.check_decomposition(lambda w, s, r: _with_unit_sigma(kpsvd(w, s, r).factors))


def _with_unit_sigma(factors: Factors) -> Factors:
    return Factors(factors.left, factors.right, torch.ones_like(factors.sigma))


def test_dropped_initial_factors_are_rejected() -> None:
    with pytest.raises(AssertionError):
        oracle.check_difference(lambda trained, initial: trained)
    with pytest.raises(AssertionError):  # added instead of subtracted
        oracle.check_difference(lambda trained, initial: stack_terms(trained, initial))


def test_the_right_ones_pass_the_same_checks() -> None:
    oracle.check_rearrangement(rearrange)
    oracle.check_dense_delta(dense_delta)
    oracle.check_decomposition(lambda w, s, r: kpsvd(w, s, r).factors)
    oracle.check_difference(lambda trained, initial: stack_terms(trained, initial, signs=(1, -1)))
