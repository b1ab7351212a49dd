"""What the Kronecker tests compare with: float64, `torch.kron`, explicit loops; none of the project's own formulas.

The `check_` functions are what the parity tests assert, as functions of the implementation, so that the tests of
planted mutations can hand them a wrong one and see it rejected.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from soka_serve.kron.factors import Factors
from soka_serve.kron.shapes import FactorShape
from tests.support.tolerances import RELATIVE_ERROR, relative_error

# Square, rectangular, grouped-query, m != p and n != q, longer left, longer right, and degenerate ones.
SHAPES = [
    FactorShape(4, 4, 4, 4),
    FactorShape(3, 4, 5, 2),
    FactorShape(2, 8, 4, 4),
    FactorShape(8, 2, 2, 6),
    FactorShape(6, 5, 1, 3),
    FactorShape(1, 6, 7, 1),
    FactorShape(1, 1, 6, 5),
    FactorShape(7, 3, 1, 1),
]


def draw(*size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal values; drawn in float64, so that every dtype rounds the same ones."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def draw_factors(
    shape: FactorShape, rank: int, seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 1.0
) -> Factors:
    """Random terms with sigma of both signs, of the size of `scale`."""
    m, n, p, q = shape
    return Factors(
        draw(rank, m, n, seed=seed, dtype=dtype),
        draw(rank, p, q, seed=seed + 1, dtype=dtype),
        draw(rank, seed=seed + 2, dtype=dtype) * scale,
    )


def oracle_delta(factors: Factors) -> Tensor:
    """The sum of sigma * torch.kron(left, right) in float64, one term after the other."""
    m, n, p, q = factors.shape
    delta = torch.zeros(m * p, n * q, dtype=torch.float64)
    for left, right, sigma in zip(factors.left, factors.right, factors.sigma, strict=True):
        delta += sigma.double() * torch.kron(left.double(), right.double())
    return delta


def oracle_rearrangement(weight: Tensor, shape: FactorShape) -> Tensor:
    """R[i*n + j, a*q + b] = W[i*p + a, j*q + b], entry by entry."""
    m, n, p, q = shape
    result = torch.empty(m * n, p * q, dtype=weight.dtype)
    for i in range(m):
        for j in range(n):
            for a in range(p):
                for b in range(q):
                    result[i * n + j, a * q + b] = weight[i * p + a, j * q + b]
    return result


def check_rearrangement(implementation: Callable[[Tensor, FactorShape], Tensor]) -> None:
    """Entry by entry, and on Kronecker products, whose rearrangement has rank one."""
    for shape in SHAPES:
        weight = draw(shape.out_features, shape.in_features)
        torch.testing.assert_close(implementation(weight, shape), oracle_rearrangement(weight, shape), rtol=0, atol=0)
        left, right = draw(shape.m, shape.n, seed=1), draw(shape.p, shape.q, seed=2)
        outer = torch.outer(left.flatten(), right.flatten())
        torch.testing.assert_close(implementation(torch.kron(left, right), shape), outer, rtol=1e-12, atol=1e-12)


def check_dense_delta(implementation: Callable[[Factors], Tensor], dtype: torch.dtype = torch.float64) -> None:
    """Against the sum of `torch.kron`."""
    for shape in SHAPES:
        factors = draw_factors(shape, 3, dtype=dtype)
        expected = oracle_delta(factors)
        assert relative_error(implementation(factors), expected) < RELATIVE_ERROR[dtype], shape
        assert float(expected.norm()) > 0.1


def check_apply(
    implementation: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], dtype: torch.dtype = torch.float64
) -> None:
    """Against x @ (sum of `torch.kron`)^T, for several numbers of tokens."""
    for shape in SHAPES:
        for rank, tokens in ((1, (5,)), (3, (2, 3)), (2, ())):
            factors = draw_factors(shape, rank, dtype=dtype)
            x = draw(*tokens, shape.in_features, seed=9, dtype=dtype)
            expected = x.double() @ oracle_delta(factors).t()
            actual = implementation(x, factors.left, factors.right, factors.sigma)
            assert actual.shape == expected.shape
            assert actual.dtype == dtype
            assert relative_error(actual, expected) < RELATIVE_ERROR[dtype], shape


def check_decomposition(implementation: Callable[[Tensor, FactorShape, int], Factors]) -> None:
    """The error is the optimal one (Eckart-Young on the looped rearrangement), for every rank."""
    for shape in SHAPES:
        weight = draw(shape.out_features, shape.in_features, seed=4)
        spectrum = torch.linalg.svdvals(oracle_rearrangement(weight, shape))
        for rank in {1, min(2, shape.max_rank), shape.max_rank}:
            factors = implementation(weight, shape, rank)
            error = float((weight - oracle_delta(factors)).norm())
            optimal = float(spectrum[rank:].norm())
            assert abs(error - optimal) < 1e-10 * float(weight.norm()), (shape, rank, error, optimal)


def check_difference(implementation: Callable[[Factors, Factors], Factors]) -> None:
    """Trained minus initial terms, against the two dense deltas."""
    for shape in SHAPES:
        trained, initial = draw_factors(shape, 2, seed=1), draw_factors(shape, 3, seed=5)
        expected = oracle_delta(trained) - oracle_delta(initial)
        actual = oracle_delta(implementation(trained, initial))
        assert relative_error(actual, expected) < RELATIVE_ERROR[torch.float64], shape
