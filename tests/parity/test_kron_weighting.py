"""Activation weighting: the output error it is for, measured on the inputs themselves."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from soka_serve.kron import Factors, dense_delta, kpsvd
from soka_serve.kron.shapes import FactorShape, balanced_shape
from soka_serve.kron.weighting import InputMoments, OutputError, refine_terms, weighted_kpsvd
from tests.support import kron_oracle as oracle
from tests.support.tolerances import relative_error

SIZES = [(96, 64), (64, 96), (128, 128)]


def correlated_inputs(size: int, tokens: int = 2000, seed: int = 5) -> Tensor:
    """Inputs (tokens, size) with a full, decaying covariance, as activations have."""
    mixing = oracle.draw(size, size, seed=seed, dtype=torch.float32) * torch.arange(1, size + 1) ** -0.7
    return oracle.draw(tokens, size, seed=seed + 1, dtype=torch.float32) @ mixing.t()


def moments_of(inputs: Tensor) -> InputMoments:
    moments = InputMoments(inputs.shape[-1])
    moments.accumulate(inputs)
    return moments


def output_error(weight: Tensor, factors: Factors, inputs: Tensor) -> float:
    """||(W - W') X|| / ||W X||, on the inputs, not on any moment."""
    left_over = weight.double() - oracle.oracle_delta(factors)
    return float((inputs.double() @ left_over.t()).norm() / (inputs.double() @ weight.double().t()).norm())


@pytest.mark.parametrize("width", [24, 600])
def test_moments_add_up_over_batches_of_any_form(width: int) -> None:
    """Whether they are asked for meanwhile or not, and when their inputs are overwritten."""
    inputs = correlated_inputs(width, tokens=1500)
    moments = InputMoments(width)
    for start, stop in ((0, 100), (100, 299), (299, 300), (300, 300), (300, 1400), (1400, 1500)):
        part = inputs[start:stop].clone()
        moments.accumulate(part.view(1, stop - start, width) if start else part)
        part.zero_()
        assert moments.tokens == stop
        if stop != 300:
            expected = inputs[:stop].double().t() @ inputs[:stop].double() / stop
            torch.testing.assert_close(moments.moment().double(), expected, rtol=1e-4, atol=1e-4)
    moments.accumulate(inputs[0])
    assert moments.tokens == 1501
    half = moments_of(inputs.bfloat16())
    assert half.moment().dtype == torch.float32


def test_moments_refuse_what_they_cannot_use() -> None:
    moments = InputMoments(8)
    with pytest.raises(ValueError, match="no inputs"):
        moments.moment()
    with pytest.raises(ValueError, match=r"inputs \(..., 8\); got \(3, 9\)"):
        moments.accumulate(torch.ones(3, 9))
    with pytest.raises(ValueError, match="finite"):
        moments.accumulate(torch.full((3, 8), float("nan")))
    assert moments.tokens == 0
    moments.accumulate(torch.ones(3, 8))
    with pytest.raises(ValueError, match=r"n\*q = 8; got 3\*3"):
        moments.fit_kronecker(FactorShape(1, 3, 1, 3))
    with pytest.raises(ValueError, match="expected a weight"):
        OutputError(torch.ones(4, 6), FactorShape(2, 2, 2, 4), moments)
    with pytest.raises(ValueError, match="finite weight"):
        weighted_kpsvd(OutputError(torch.full((4, 8), float("inf")), FactorShape(2, 2, 2, 4), moments), 1)
    with pytest.raises(ValueError, match="damping"):
        OutputError(torch.ones(4, 8), FactorShape(2, 2, 2, 4), moments, damping=-1)


def test_a_kronecker_moment_is_fitted_exactly() -> None:
    shape = FactorShape(3, 4, 3, 6)
    first, second = (a @ a.t() for a in (oracle.draw(4, 4, seed=1), oracle.draw(6, 6, seed=2)))
    root = torch.linalg.cholesky(torch.kron(first, second))
    c1, c2 = moments_of(root.t()).fit_kronecker(shape)  # rows of root^T: their second moment is root root^T / 24
    assert relative_error(c1, first * 4 / first.trace()) < 1e-10
    assert relative_error(c2, second * 6 / second.trace()) < 1e-10


def test_the_kronecker_fit_is_semidefinite_and_scaled() -> None:
    moments = moments_of(correlated_inputs(24, tokens=10))  # of rank 10 only
    for part in moments.fit_kronecker(FactorShape(3, 4, 3, 6)):
        torch.testing.assert_close(part, part.t())
        assert float(torch.linalg.eigvalsh(part)[0]) > -1e-10
        assert float(part.trace()) == pytest.approx(len(part))
    for part in moments_of(torch.zeros(5, 24)).fit_kronecker(FactorShape(3, 4, 3, 6)):
        assert torch.equal(part, torch.eye(len(part)))


@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("size", SIZES)
def test_output_error_is_lower_than_the_unweighted_one(size: tuple[int, int], rank: int) -> None:
    weight = oracle.draw(*size, dtype=torch.float32)
    shape = balanced_shape(*size)
    inputs = correlated_inputs(size[1])
    plain = kpsvd(weight, shape, rank).factors
    problem = OutputError(weight, shape, moments_of(inputs))
    weighted = weighted_kpsvd(problem, rank)
    refined = refine_terms(problem, weighted.factors)
    errors = [output_error(weight, f, inputs) for f in (plain, weighted.factors, refined)]
    assert errors[1] < 0.9 * errors[0]
    assert errors[2] < errors[1]
    # The energies say the same (up to the damping).
    assert weighted.captured_frac == pytest.approx(1 - errors[1] ** 2, abs=2e-3)
    # And the weight error is the price: it cannot be below the optimum.
    assert relative_error(dense_delta(weighted.factors), weight) >= relative_error(dense_delta(plain), weight)


@pytest.mark.parametrize("size", SIZES)
def test_leading_terms_stand_by_themselves(size: tuple[int, int]) -> None:
    weight, shape, inputs = oracle.draw(*size, dtype=torch.float32), balanced_shape(*size), correlated_inputs(size[1])
    pool = weighted_kpsvd(OutputError(weight, shape, moments_of(inputs)), 12).factors
    assert bool((pool.sigma[:-1] >= pool.sigma[1:]).all())
    errors = [output_error(weight, pool.terms(slice(0, rank)), inputs) for rank in range(13)]
    assert all(later < earlier for earlier, later in pairwise(errors))
    assert errors[4] < output_error(weight, kpsvd(weight, shape, 4).factors, inputs)


def test_white_inputs_change_nothing() -> None:
    weight = oracle.draw(96, 64, dtype=torch.float32)
    shape = balanced_shape(96, 64)
    moments = moments_of(3 * torch.eye(64))
    problem = OutputError(weight, shape, moments)
    plain, weighted = kpsvd(weight, shape, 6), weighted_kpsvd(problem, 6)
    assert relative_error(dense_delta(weighted.factors), dense_delta(plain.factors)) < 1e-4
    torch.testing.assert_close(weighted.factors.sigma, plain.factors.sigma, rtol=1e-4, atol=0)
    assert weighted.total_energy == pytest.approx(plain.total_energy, rel=1e-5)
    refined = refine_terms(problem, weighted.factors)
    assert relative_error(dense_delta(refined), dense_delta(plain.factors)) < 1e-4


def test_a_kronecker_moment_gives_the_closed_form_optimum() -> None:
    # There ||(W - W') C^(1/2)|| has a Kronecker structure, so the truncated SVD of the weighted weight is optimal.
    shape = FactorShape(8, 6, 6, 8)
    first, second = (oracle.draw(6, 6, seed=1), oracle.draw(8, 8, seed=2))
    weight = oracle.draw(48, 48)
    inputs = torch.kron(first, second).t()  # second moment (first first^T) kron (second second^T), over 48
    spectrum = torch.linalg.svdvals(oracle.oracle_rearrangement(weight @ inputs.t(), shape))
    optimum = float(spectrum[3:].norm() / spectrum.norm())
    problem = OutputError(weight, shape, moments_of(inputs), damping=1e-9)
    weighted = weighted_kpsvd(problem, 3)
    refined = refine_terms(problem, weighted.factors, sweeps=10)
    assert output_error(weight, refined, inputs) == pytest.approx(optimum, rel=1e-3)
    assert optimum - 1e-9 <= output_error(weight, weighted.factors, inputs) < 1.02 * optimum


def test_every_refinement_sweep_lowers_the_error() -> None:
    weight, shape, inputs = oracle.draw(64, 96), balanced_shape(64, 96), correlated_inputs(96).double()
    start = weighted_kpsvd(OutputError(weight, shape, moments_of(inputs)), 5).factors
    problem = OutputError(weight, shape, moments_of(inputs), damping=1e-9)
    errors = [output_error(weight, refine_terms(problem, start, sweeps=s), inputs) for s in range(5)]
    assert all(later < earlier for earlier, later in pairwise(errors))


def test_fewer_inputs_than_features_and_inputs_never_seen() -> None:
    weight, shape = oracle.draw(32, 48, dtype=torch.float32), balanced_shape(32, 48)
    few = correlated_inputs(48, tokens=3)
    result = weighted_kpsvd(OutputError(weight, shape, moments_of(few)), 6)
    assert bool(dense_delta(result.factors).isfinite().all())
    assert output_error(weight, result.factors, few) < 0.2
    nothing = weighted_kpsvd(OutputError(weight, shape, moments_of(torch.zeros(4, 48))), 2)
    assert relative_error(dense_delta(nothing.factors), dense_delta(kpsvd(weight, shape, 2).factors)) < 1e-4


def test_no_terms_and_a_zero_weight() -> None:
    shape, inputs = balanced_shape(32, 48), correlated_inputs(48)
    none = weighted_kpsvd(OutputError(torch.ones(32, 48), shape, moments_of(inputs)), 0)
    assert none.factors.rank == 0
    assert none.total_energy > 0
    problem = OutputError(torch.zeros(32, 48), shape, moments_of(inputs))
    zero = weighted_kpsvd(problem, 2)
    assert float(dense_delta(zero.factors).abs().max()) == 0.0
    refined = refine_terms(problem, zero.factors)
    assert (refined.rank, float(dense_delta(refined).abs().max())) == (2, 0.0)


def test_a_problem_used_again_gives_the_same_as_a_new_one() -> None:
    # The product with the second moment is kept, and what was taken out of it is put back.
    weight, shape, inputs = oracle.draw(64, 96), balanced_shape(64, 96), correlated_inputs(96).double()
    used, fresh = (OutputError(weight, shape, moments_of(inputs)) for _ in range(2))
    first = weighted_kpsvd(used, 4).factors
    torch.testing.assert_close(
        dense_delta(refine_terms(used, first)), dense_delta(refine_terms(fresh, first)), rtol=0, atol=1e-10
    )
    again = weighted_kpsvd(used, 4).factors
    torch.testing.assert_close(dense_delta(again), dense_delta(first), rtol=0, atol=1e-10)
    assert output_error(weight, first, inputs) < 0.9  # four terms are something


def test_least_squares_are_those_of_the_dense_moment() -> None:
    weight, shape = oracle.draw(24, 30), FactorShape(4, 5, 6, 6)
    inputs = correlated_inputs(30).double()
    moments = moments_of(inputs)
    problem = OutputError(weight, shape, moments, damping=0.01)
    full = moments.moment()
    second = (full / full.diagonal().mean() + 0.01 * torch.eye(30)) / 1.01
    root = torch.linalg.cholesky(second)
    right = oracle.draw(2, 6, 6, seed=3)

    def unknowns(terms: Tensor, side: str) -> Tensor:
        """(left kron right) root for every unit matrix in place of the other factor, as rows."""
        units = torch.eye(20 if side == "left" else 36, dtype=torch.float64)
        rows = []
        for term in terms:
            for unit in units:
                pair = (unit.view(4, 5), term) if side == "left" else (term, unit.view(6, 6))
                rows.append((torch.kron(*pair) @ root).flatten())
        return torch.stack(rows)

    def solve(terms: Tensor, side: str) -> Tensor:
        system = unknowns(terms, side)
        return torch.linalg.lstsq(system.t(), (weight @ root).flatten()[:, None], driver="gelsd").solution.flatten()

    lefts = problem.best_lefts(right)
    torch.testing.assert_close(lefts.flatten(), solve(right, "left"), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(problem.best_rights(lefts).flatten(), solve(lefts, "right"), rtol=1e-6, atol=1e-8)
