"""Factors, rearrangement, dense delta: against float64 `torch.kron` and loops; and planted mistakes, which are seen."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from soka_serve.kron import Factors, add_delta_, apply_kron, dense_delta, kpsvd, recompress, stack_terms
from soka_serve.kron.factors import rearrange, unrearrange
from soka_serve.kron.shapes import FactorShape
from tests.support import kron_oracle as oracle
from tests.support.tolerances import RELATIVE_ERROR, relative_error

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def test_rearrangement() -> None:
    oracle.check_rearrangement(rearrange)


@pytest.mark.parametrize("shape", oracle.SHAPES)
def test_unrearrange_is_the_inverse_and_norms_stay(shape: FactorShape) -> None:
    weight = oracle.draw(shape.out_features, shape.in_features)
    matrix = rearrange(weight, shape)
    assert torch.equal(unrearrange(matrix, shape), weight)
    assert float(matrix.norm()) == pytest.approx(float(weight.norm()), rel=1e-14)


def test_rearrangement_refuses_another_shape() -> None:
    with pytest.raises(ValueError, match=r"expected weight of shape \(6, 20\); got \(20, 6\)"):
        rearrange(torch.zeros(20, 6), FactorShape(2, 4, 3, 5))
    with pytest.raises(ValueError, match="expected matrix"):
        unrearrange(torch.zeros(6, 20), FactorShape(2, 4, 3, 5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_delta(dtype: torch.dtype) -> None:
    oracle.check_dense_delta(dense_delta, dtype)


def test_dense_delta_in_another_dtype_and_without_terms() -> None:
    factors = oracle.draw_factors(FactorShape(2, 3, 4, 5), 2, dtype=torch.float32)
    assert dense_delta(factors, torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(dense_delta(factors.terms([])), torch.zeros(8, 15))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [1, 100, 1 << 20])
def test_add_delta_in_place(dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("soka_serve.kron.factors._BLOCK_VALUES", block)
    for shape in oracle.SHAPES:
        factors = oracle.draw_factors(shape, 3, dtype=torch.float32)
        weight = oracle.draw(shape.out_features, shape.in_features, seed=8, dtype=dtype)
        expected = weight.double() - 0.5 * oracle.oracle_delta(factors)
        changed = weight.clone()
        assert add_delta_(changed, factors, scale=-0.5) is changed
        # The factors are float32, so the sum is no better than that.
        tolerance = max(RELATIVE_ERROR[dtype], RELATIVE_ERROR[torch.float32])
        assert relative_error(changed, expected) < tolerance
        assert relative_error(changed, weight) > 0.1


# --- stacking and recompression --------------------------------------------------------------------------------------


def test_stacked_terms_subtract() -> None:
    oracle.check_difference(lambda trained, initial: stack_terms(trained, initial, signs=(1, -1)))


def test_stacking_refuses_what_does_not_fit() -> None:
    one, other = (oracle.draw_factors(FactorShape(2, 3, 3, n), 1) for n in (2, 4))
    with pytest.raises(ValueError, match="factors of one shape"):
        stack_terms(one, other)
    with pytest.raises(ValueError, match="expected 1 signs; got 2"):
        stack_terms(one, signs=(1, -1))
    with pytest.raises(ValueError, match="at least one"):
        stack_terms()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", oracle.SHAPES)
def test_recompression_of_a_difference_is_exact(shape: FactorShape, dtype: torch.dtype) -> None:
    trained = oracle.draw_factors(shape, 3, seed=1, dtype=dtype)
    initial = oracle.draw_factors(shape, 3, seed=5, dtype=dtype)
    stacked = stack_terms(trained, initial, signs=(1, -1))
    small, dropped = recompress(stacked)
    expected = oracle.oracle_delta(stacked)
    assert small.rank == min(6, shape.max_rank)
    assert small.left.dtype == dtype
    assert relative_error(oracle.oracle_delta(small), expected) < RELATIVE_ERROR[dtype]
    assert dropped < 1e-12
    assert bool((small.sigma[:-1] >= small.sigma[1:]).all())
    ones = torch.ones(small.rank, dtype=dtype)
    torch.testing.assert_close(small.left.flatten(1).norm(dim=1), ones)
    torch.testing.assert_close(small.right.flatten(1).norm(dim=1), ones)


def test_recompression_finds_the_true_rank_of_a_small_difference() -> None:
    # A trained adapter is near its start: two terms moved a little, one not at all.
    initial = oracle.draw_factors(FactorShape(6, 5, 5, 6), 3, dtype=torch.float32)
    step = 1e-3 * oracle.draw(6, 5, seed=7, dtype=torch.float32)
    left = initial.left.clone()
    left[:2] += step
    stacked = stack_terms(Factors(left, initial.right, initial.sigma), initial, signs=(1, -1))
    small, _ = recompress(stacked)
    # Both moved by the same step, so the difference is one Kronecker product (and float32 rounding of `left`).
    kept, dropped = recompress(stacked, rank=1)
    assert relative_error(oracle.oracle_delta(small), oracle.oracle_delta(stacked)) < 1e-6
    assert kept.rank == 1
    assert dropped < 1e-6


def test_truncated_recompression_reports_the_energy_it_drops_and_is_optimal() -> None:
    shape = FactorShape(5, 4, 3, 6)
    stacked = oracle.draw_factors(shape, 6)
    expected = oracle.oracle_delta(stacked)
    spectrum = torch.linalg.svdvals(oracle.oracle_rearrangement(expected, shape))
    for rank in range(1, 7):
        small, dropped = recompress(stacked, rank=rank)
        assert small.rank == rank
        share = float(spectrum[rank:].square().sum() / spectrum.square().sum())
        assert dropped == pytest.approx(share, abs=1e-12)
        assert relative_error(oracle.oracle_delta(small), expected) ** 2 == pytest.approx(share, abs=1e-10)


def test_recompression_keeps_as_few_terms_as_hold_the_energy() -> None:
    shape = FactorShape(5, 4, 3, 6)
    stacked = oracle.draw_factors(shape, 6)
    rearranged = oracle.oracle_rearrangement(oracle.oracle_delta(stacked), shape)
    energy = torch.linalg.svdvals(rearranged)[:6].square()
    held = energy.cumsum(0) / energy.sum()
    ranks = set()
    for wanted in (0.2, 0.8, 0.9, 0.99):
        small, dropped = recompress(stacked, energy=wanted)
        ranks.add(small.rank)
        assert small.rank == 1 + int((held < wanted).sum())
        assert dropped == pytest.approx(1 - float(held[small.rank - 1]), abs=1e-12)
        assert dropped <= 1 - wanted
    assert len(ranks) > 2
    assert recompress(stacked, energy=1.0)[0].rank == 6
    assert recompress(stacked, energy=0.99, rank=1)[0].rank == 1
    assert recompress(stacked, energy=1e-6)[0].rank == 1
    for wrong in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="share of the energy"):
            recompress(stacked, energy=wrong)


def test_recompression_of_nothing() -> None:
    factors = oracle.draw_factors(FactorShape(3, 4, 4, 3), 2, dtype=torch.float32)
    zero, dropped = recompress(stack_terms(factors, factors, signs=(1, -1)))
    assert (zero.rank, float(zero.sigma[0]), dropped) == (1, 0.0, 0.0)
    none, dropped = recompress(factors.terms([]))
    assert (none.rank, dropped) == (0, 0.0)
    cut, dropped = recompress(factors, rank=0)
    assert (cut.rank, dropped) == (0, 1.0)
    with pytest.raises(ValueError, match="rank from 0"):
        recompress(factors, rank=-1)
    with pytest.raises(ValueError, match="finite"):
        recompress(Factors(factors.left, factors.right, factors.sigma * float("nan")))


# --- Factors ----------------------------------------------------------------------------------------------------------


def test_factors_describe_themselves() -> None:
    factors = oracle.draw_factors(FactorShape(2, 3, 4, 5), 6, dtype=torch.bfloat16)
    assert (factors.rank, factors.shape) == (6, (2, 3, 4, 5))
    assert factors.parameters == factors.shape.parameters(6)
    assert factors.to(torch.float32).left.dtype == torch.float32
    assert factors.terms(1).rank == 1
    assert factors.terms(slice(2)).rank == 2
    assert torch.equal(factors.terms((4, 0)).sigma, factors.sigma[[4, 0]])
    assert torch.equal(factors.terms(torch.tensor([5])).left, factors.left[5:])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (((2, 3, 4), (2, 3, 4), (3,)), "same number of terms"),
        (((3, 4), (2, 3, 4), (2,)), "expected left"),
        (((2, 3, 4), (2, 3, 4), (2, 1)), "expected left"),
    ],
)
def test_factors_refuse_what_does_not_fit(sizes: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Factors(*(torch.zeros(size) for size in sizes))
    with pytest.raises(ValueError, match="floating point"):
        Factors(torch.zeros(1, 1, 1, dtype=torch.int64), torch.zeros(1, 1, 1), torch.zeros(1))


def test_principal_terms_of_a_weight_are_an_effect() -> None:
    weight = oracle.draw(12, 12)
    factors = kpsvd(weight, FactorShape(4, 3, 3, 4), 2).factors
    x = oracle.draw(5, 12, seed=1)
    change = apply_kron(x, factors.left, factors.right, factors.sigma)
    assert relative_error(x @ weight.t() + change, x @ weight.t()) > 0.1


# --- planted mistakes: each wrong variant is rejected by the check that the tests above use ---------------------------


def plain_reshape(weight: Tensor, shape: FactorShape) -> Tensor:
    """Mutation: the weight reshaped to the rearrangement's size, blocks not gathered."""
    m, n, p, q = shape
    return weight.reshape(m * n, p * q)


def swapped_rearrangement(weight: Tensor, shape: FactorShape) -> Tensor:
    """Mutation: the rearrangement for kron(right, left); the size is right where (m, n) = (p, q)."""
    m, n, p, q = shape
    return weight.reshape(p, m, q, n).permute(1, 3, 0, 2).reshape(m * n, p * q)


@pytest.mark.parametrize("wrong", [plain_reshape, swapped_rearrangement])
def test_a_wrong_rearrangement_and_its_decomposition_are_rejected(
    wrong: Callable[[Tensor, FactorShape], Tensor],
) -> None:
    with pytest.raises(AssertionError):
        oracle.check_rearrangement(wrong)

    def decompose(weight: Tensor, shape: FactorShape, rank: int) -> Factors:
        left, sigma, right = torch.linalg.svd(wrong(weight, shape), full_matrices=False)
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
    def without(factors: Factors) -> Factors:
        return Factors(factors.left, factors.right, torch.ones_like(factors.sigma))

    with pytest.raises(AssertionError):
        oracle.check_dense_delta(lambda factors: dense_delta(without(factors)))
    with pytest.raises(AssertionError):
        oracle.check_apply(lambda x, left, right, sigma: x @ dense_delta(without(Factors(left, right, sigma))).t())
    with pytest.raises(AssertionError):
        oracle.check_decomposition(lambda w, s, r: without(kpsvd(w, s, r).factors))


def test_dropped_initial_factors_are_rejected() -> None:
    with pytest.raises(AssertionError):
        oracle.check_difference(lambda trained, initial: trained)
    with pytest.raises(AssertionError):  # added instead of subtracted
        oracle.check_difference(lambda trained, initial: stack_terms(trained, initial))
