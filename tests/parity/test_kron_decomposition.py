"""The KPSVD, exact and truncated: optimal, exact on synthetic sums, and near enough on real and random weights."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from soka_serve.base.checkpoint import Checkpoint
from soka_serve.builtin import base_directory
from soka_serve.kron import Factors, decompose, dense_delta, kpsvd
from soka_serve.kron.decompose import Algorithm, minor_kpsvd, sampled_kpsvd
from soka_serve.kron.factors import rearrange, unrearrange
from soka_serve.kron.shapes import FactorShape, balanced_shape
from tests.support import kron_oracle as oracle
from tests.support.tolerances import RELATIVE_ERROR, relative_error

ALGORITHMS: list[Algorithm] = ["exact", "truncated", "auto"]


@pytest.mark.parametrize("algorithm", ["exact", "auto"])
def test_error_is_the_optimal_one(algorithm: Algorithm) -> None:
    oracle.check_decomposition(lambda w, s, r: kpsvd(w, s, r, algorithm=algorithm).factors)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_sum_of_kronecker_products_is_recovered(algorithm: Algorithm, dtype: torch.dtype) -> None:
    shape = FactorShape(8, 6, 5, 9)
    planted = oracle.draw_factors(shape, 3)
    weight = oracle.oracle_delta(planted).to(dtype)
    result = kpsvd(weight, shape, 3, algorithm=algorithm)
    assert relative_error(oracle.oracle_delta(result.factors), weight) < 2 * RELATIVE_ERROR[dtype]
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert result.factors.left.dtype == result.factors.right.dtype == result.factors.sigma.dtype == expected
    assert result.captured_frac == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_a_block_that_adds_only_rounding_errors_is_made_orthogonal_all_the_same(terms: int) -> None:
    shape = FactorShape(8, 6, 5, 9)
    weight = oracle.oracle_delta(oracle.draw_factors(shape, terms)).float()
    for seed in range(10):
        result = kpsvd(weight, shape, 3, algorithm="truncated", seed=seed)
        assert relative_error(oracle.oracle_delta(result.factors), weight) < 2 * RELATIVE_ERROR[torch.float32], seed


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_terms_are_normed_orthogonal_descending_and_signed(algorithm: Algorithm) -> None:
    weight = oracle.draw(72, 60, dtype=torch.float32)
    factors = kpsvd(weight, FactorShape(9, 10, 8, 6), 7, algorithm=algorithm).factors
    for stack in (factors.left, factors.right):
        flat = stack.double().flatten(1)
        torch.testing.assert_close(flat @ flat.t(), torch.eye(7, dtype=torch.float64), rtol=0, atol=1e-5)
    assert bool((factors.sigma[:-1] >= factors.sigma[1:]).all())
    assert float(factors.sigma[-1]) > 0
    for left in factors.left:
        assert float(left.flatten()[left.abs().argmax()]) > 0
    # Whatever the sign of the weight; the right factors carry it.
    negated = kpsvd(-weight, FactorShape(9, 10, 8, 6), 7, algorithm=algorithm).factors
    torch.testing.assert_close(negated.left, factors.left)
    torch.testing.assert_close(negated.right, -factors.right)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_same_arguments_give_the_same_bits(algorithm: Algorithm) -> None:
    weight = oracle.draw(96, 96, dtype=torch.float32)
    shape = balanced_shape(96, 96)
    torch.manual_seed(1)
    one = kpsvd(weight, shape, 5, algorithm=algorithm, seed=3)
    torch.manual_seed(2)
    other = kpsvd(weight, shape, 5, algorithm=algorithm, seed=3)
    for part in ("left", "right", "sigma"):
        assert torch.equal(getattr(one.factors, part), getattr(other.factors, part))
    assert one.total_energy == other.total_energy


def test_the_callers_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    kpsvd(oracle.draw(64, 64), balanced_shape(64, 64), 2, algorithm="truncated")
    assert torch.equal(torch.get_rng_state(), before)


def test_total_energy_is_exact() -> None:
    # In float32 the small entries would vanish beside the large one.
    weight = torch.full((256, 256), 1e-3)
    weight[0, 0] = 100.0
    expected = math.fsum(float(value) ** 2 for value in weight.double().flatten())
    assert kpsvd(weight, balanced_shape(256, 256), 1).total_energy == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("scale", [1e-36, 1e-12, 1e15, 1e36])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_tiny_and_huge_weights(scale: float, algorithm: Algorithm) -> None:
    weight = oracle.draw(48, 48, dtype=torch.float32)
    shape = balanced_shape(48, 48)
    plain = kpsvd(weight, shape, 4, algorithm=algorithm).factors
    scaled = kpsvd(weight * scale, shape, 4, algorithm=algorithm).factors
    torch.testing.assert_close(scaled.sigma.double() / scale, plain.sigma.double(), rtol=1e-4, atol=0)
    assert relative_error(scaled.left, plain.left) < 1e-2


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_zero_weight_and_zero_rank(algorithm: Algorithm) -> None:
    shape = FactorShape(4, 3, 3, 4)
    zero = kpsvd(torch.zeros(12, 12), shape, 2, algorithm=algorithm)
    assert (zero.total_energy, zero.captured_frac) == (0.0, 0.0)
    assert torch.equal(zero.factors.sigma, torch.zeros(2))
    assert bool(zero.factors.left.isfinite().all() and zero.factors.right.isfinite().all())
    none = kpsvd(oracle.draw(12, 12), shape, 0, algorithm=algorithm)
    assert none.factors.rank == 0
    assert none.factors.shape == shape


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_rank_is_capped_by_the_shape(algorithm: Algorithm) -> None:
    for shape in oracle.SHAPES:
        weight = oracle.draw(shape.out_features, shape.in_features)
        factors = kpsvd(weight, shape, 10_000, algorithm=algorithm).factors
        assert factors.rank == shape.max_rank
        assert relative_error(oracle.oracle_delta(factors), weight) < 1e-10


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    weight = torch.ones(12, 12)
    weight[7, 5] = bad
    with pytest.raises(ValueError, match="finite"):
        kpsvd(weight, FactorShape(4, 3, 3, 4), 1)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(12, 12\) for \(4, 3, 3, 4\); got \(12, 13\)"):
        kpsvd(torch.ones(12, 13), FactorShape(4, 3, 3, 4), 1)
    with pytest.raises(ValueError, match="floating-point weight"):
        kpsvd(torch.ones(12, 12, dtype=torch.int8), FactorShape(4, 3, 3, 4), 1)
    with pytest.raises(ValueError, match="rank from 0"):
        kpsvd(torch.ones(12, 12), FactorShape(4, 3, 3, 4), -1)


def test_the_weight_is_not_written_to() -> None:
    weight = oracle.draw(48, 40, dtype=torch.float32) * 100
    before = weight.clone()
    for shape in (FactorShape(1, 40, 48, 1), FactorShape(48, 1, 1, 40), FactorShape(6, 8, 8, 5)):
        for algorithm in ALGORITHMS:
            kpsvd(weight, shape, 2, algorithm=algorithm)
    assert torch.equal(weight, before)


# --- truncated against exact -----------------------------------------------------------------------------------------


def deficit(weight: Tensor, shape: FactorShape, rank: int, algorithm: Algorithm = "truncated") -> float:
    """Share of the optimal captured energy (float64 SVD) that the terms miss, measured on the terms themselves."""
    spectrum = torch.linalg.svdvals(rearrange(weight.double(), shape))
    factors = kpsvd(weight, shape, rank, algorithm=algorithm).factors
    total = float(weight.double().square().sum())
    left_over = float((weight.double() - dense_delta(factors.to(torch.float64))).square().sum())
    return 1 - (total - left_over) / float(spectrum[:rank].square().sum())


@pytest.mark.parametrize("rank", [1, 4, 64])
@pytest.mark.parametrize(("out_features", "in_features"), [(1024, 1024), (1376, 512), (256, 1024)])
def test_truncated_is_near_exact_on_random_weights(out_features: int, in_features: int, rank: int) -> None:
    # The flattest spectra there are, hence the slowest convergence.
    weight = oracle.draw(out_features, in_features, dtype=torch.float32)
    assert -1e-5 < deficit(weight, balanced_shape(out_features, in_features), rank) < 0.005


@pytest.mark.parametrize("decay", [0.1, 0.5, 1.0, 3.0])
def test_truncated_is_near_exact_on_decaying_spectra(decay: float) -> None:
    shape = FactorShape(32, 24, 24, 32)
    side = shape.max_rank
    vectors = [torch.linalg.qr(oracle.draw(side, side, seed=seed)).Q for seed in (1, 2)]
    matrix = (vectors[0] * torch.arange(1, side + 1).double() ** -decay) @ vectors[1]
    units = torch.eye(24 * 32, dtype=torch.float64).reshape(-1, 24, 32)
    weight = dense_delta(Factors(matrix.t().reshape(-1, 32, 24), units, torch.ones(side).double()))
    for rank in (1, 8, 64):
        assert -1e-5 < deficit(weight.float(), shape, rank) < 0.005


def test_truncated_is_near_exact_on_trained_weights() -> None:
    base = Checkpoint.open(base_directory())
    names = [name for name, info in base.tensors.items() if name.endswith("_proj.weight") and min(info.shape) >= 64]
    assert len(names) >= 7
    for name in names:
        weight = base.read(name).float()
        shape = balanced_shape(*weight.shape)
        for rank in (1, 64):
            rank = min(rank, shape.max_rank)
            assert -1e-5 < deficit(weight, shape, rank) < 0.005, (name, rank)


@pytest.mark.parametrize("smallest", [1e-1, 1e-3, 1e-5])
def test_exact_through_the_gram_matrix_keeps_small_singular_values(
    smallest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One Gram matrix in float32 loses everything below 3e-4 of the largest.
    monkeypatch.setattr(decompose, "_SVD_SIDE", 16)
    shape = FactorShape(12, 10, 11, 9)
    side, rank = shape.max_rank, 40
    sigma = torch.logspace(0, math.log10(smallest), side, dtype=torch.float64)
    vectors = [torch.linalg.qr(oracle.draw(size, side, seed=size)).Q for size in (120, 99)]
    matrix = ((vectors[0] * sigma) @ vectors[1].t()).float()
    weight = unrearrange(matrix, shape)
    for side_up in (weight, weight.t().contiguous()):
        this = shape if side_up is weight else FactorShape(10, 12, 9, 11)
        factors = kpsvd(side_up, this, rank, algorithm="exact").factors
        expected = torch.linalg.svdvals(rearrange(side_up.double(), this))[:rank]
        # Relative to the largest, as for any backward-stable SVD in float32.
        assert float((factors.sigma.double() - expected).abs().max()) < 2e-6
        flat = factors.right.double().flatten(1)
        torch.testing.assert_close(flat @ flat.t(), torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-4)
        left_over = float((side_up.double() - dense_delta(factors.to(torch.float64))).norm())
        optimal = float(torch.linalg.svdvals(rearrange(side_up.double(), this))[rank:].norm())
        assert left_over < optimal * (1 + 1e-4) + 1e-5


_MEMORY_PROBE = """
import re, sys, torch
from pathlib import Path
from soka_serve.kron import kpsvd
from soka_serve.kron.shapes import balanced_shape

torch.set_num_threads(1)
torch.manual_seed(0)
resident = lambda field: int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
weight = torch.randn(1536, 2048).to(getattr(torch, sys.argv[2]))
kpsvd(torch.randn(600, 600), balanced_shape(600, 600), 8, algorithm=sys.argv[1])
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
kpsvd(weight, balanced_shape(1536, 2048), 64, algorithm=sys.argv[1])
print((resident("VmHWM") - before) / (weight.numel() * 4))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resets the memory mark through Linux's /proc")
@pytest.mark.parametrize(("algorithm", "dtype"), [("auto", "float32"), ("auto", "bfloat16"), ("exact", "float32")])
def test_peak_memory_stays_below_six_weights(algorithm: str, dtype: str) -> None:
    # The allocator keeps freed blocks of up to 32 MiB, which is everything at this size and nothing at a 7B model's.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    command = [sys.executable, "-c", _MEMORY_PROBE, algorithm, dtype]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert 0.5 < float(result.stdout) < 6


@pytest.mark.gpu
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_gpu_agrees_with_the_cpu(algorithm: Algorithm) -> None:
    weight = oracle.draw(1024, 768, dtype=torch.float32)
    shape = balanced_shape(1024, 768)
    cpu = kpsvd(weight, shape, 8, algorithm=algorithm)
    gpu = kpsvd(weight.cuda(), shape, 8, algorithm=algorithm)
    assert gpu.total_energy == pytest.approx(cpu.total_energy, rel=1e-10)
    torch.testing.assert_close(gpu.factors.sigma.cpu(), cpu.factors.sigma, rtol=2e-3, atol=0)


@pytest.mark.parametrize("shape", [FactorShape(9, 10, 8, 6), FactorShape(3, 4, 12, 20)])
@pytest.mark.parametrize("rank", [0, 1, 5, 1000])
def test_the_minor_terms_are_the_end_of_the_spectrum(shape: FactorShape, rank: int) -> None:
    """Against numpy's SVD of the rearranged weight, in float64, and term by term."""
    weight = oracle.draw(shape.out_features, shape.in_features)
    matrix = oracle.oracle_rearrangement(weight, shape).numpy()
    left, sigma, right = np.linalg.svd(matrix, full_matrices=False)
    kept = min(rank, shape.max_rank)
    result = minor_kpsvd(weight, shape, rank)
    assert result.factors.rank == kept
    np.testing.assert_allclose(result.factors.sigma.numpy(), sigma[len(sigma) - kept :], rtol=1e-9)
    for k in range(kept):
        at = len(sigma) - kept + k
        expected = np.outer(left[:, at] * sigma[at], right[at])
        term = oracle.oracle_delta(result.factors.terms(k))
        np.testing.assert_allclose(oracle.oracle_rearrangement(term, shape).numpy(), expected, rtol=0, atol=1e-9)
    assert result.total_energy == pytest.approx(float((sigma**2).sum()))


def test_minor_terms_of_a_weight_of_low_rank_are_orthogonal_and_zero() -> None:
    shape = FactorShape(4, 4, 4, 4)
    weight = oracle.oracle_delta(oracle.draw_factors(shape, 3))
    found = minor_kpsvd(weight, shape, 4).factors
    assert float(found.sigma.max()) < 1e-9
    flat = found.left.flatten(1)
    torch.testing.assert_close(flat @ flat.t(), torch.eye(4, dtype=flat.dtype), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("shape", "rank"), [(FactorShape(9, 10, 8, 6), 3), (FactorShape(5, 6, 8, 9), 1)])
def test_sampled_terms_are_the_best_within_the_sample(shape: FactorShape, rank: int) -> None:
    """Against pseudo-inverses in numpy, float64, for the rows and columns of the same seed."""
    weight = oracle.draw(shape.out_features, shape.in_features)
    matrix = oracle.oracle_rearrangement(weight, shape).numpy()
    generator = torch.Generator().manual_seed(7)
    count = 2 * rank + 16
    rows, columns = (torch.randperm(side, generator=generator)[:count].numpy() for side in matrix.shape)
    chosen, crossing = matrix[:, columns], matrix[rows]
    within = chosen @ (np.linalg.pinv(chosen) @ matrix @ np.linalg.pinv(crossing)) @ crossing
    left, sigma, right = np.linalg.svd(within, full_matrices=False)
    expected = (left[:, :rank] * sigma[:rank]) @ right[:rank]
    found = sampled_kpsvd(weight, shape, rank, seed=7)
    got = oracle.oracle_rearrangement(oracle.oracle_delta(found.factors), shape).numpy()
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-9)
    left_over = float(np.square(matrix - got).sum())
    assert found.total_energy * (1 - found.captured_frac) == pytest.approx(left_over, rel=1e-9)
    assert 0 < found.captured_frac < kpsvd(weight, shape, rank, algorithm="exact").captured_frac
    assert not torch.equal(found.factors.left, sampled_kpsvd(weight, shape, rank, seed=8).factors.left)


@pytest.mark.parametrize("terms", [0, 1, 3])
def test_a_sample_recovers_a_sum_of_few_kronecker_products(terms: int) -> None:
    shape = FactorShape(8, 6, 5, 9)
    weight = oracle.oracle_delta(oracle.draw_factors(shape, terms))
    found = sampled_kpsvd(weight, shape, 3)
    assert float((oracle.oracle_delta(found.factors) - weight).norm()) <= 1e-9 * float(weight.norm() + 1)
    everything = oracle.draw(40, 54)
    found = sampled_kpsvd(everything, shape, 1000)
    assert relative_error(oracle.oracle_delta(found.factors), everything) < 1e-9
