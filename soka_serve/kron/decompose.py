"""The Kronecker-product SVD (KPSVD): the best sum of Kronecker products for a weight, exact or truncated.

The rearranged weight's SVD is the KPSVD (see `soka_serve.kron.factors.rearrange`). Three ways to it, in terms of the
shorter side d of the rearranged weight:

- the full SVD, for small d and for almost all terms;
- exact through the Gram matrix and `eigh`, about half the time and memory of the full SVD at d = 4096;
- truncated, a randomised block Krylov method with full reorthogonalisation: several times faster at d = 4096, and
  within 0.1% of the exact one's captured energy (eval/bench/kpsvd.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from soka_serve.kron.factors import Factors, from_vectors
from soka_serve.kron.shapes import FactorShape

Algorithm = Literal["auto", "exact", "truncated", "rough"]

_SVD_SIDE = 512  # up to this shorter side the full SVD takes well under a second and a few MiB
_KRYLOV_BASIS = 12  # most columns of the Krylov basis over rank; decaying spectra need 4 or 5, random weights 9 to 12
_KRYLOV_LEAST = 400  # columns that are tried at any rank
_KRYLOV_REST = 5e-4  # stop when what is still to come is estimated below this share of the captured energy
_ENERGY_VALUES_CPU = 1 << 16  # half a MiB in float64, which stays in a core's cache
_ENERGY_VALUES_GPU = 1 << 22
_MOST_PROJECTIONS = 8
_GRAM_RANGE = 1e-2  # singular values below this share of the largest are taken from a second, deflated Gram matrix


@dataclass(frozen=True)
class Decomposition:
    """A truncated KPSVD and the energy of what it truncates.

    Args:
        factors: the leading terms: left[k] and right[k] of unit Frobenius norm and orthogonal to the other terms',
            sigma >= 0 and descending, the entry of largest magnitude in left[k] positive.
        total_energy: the squared Frobenius norm of the whole weight, accumulated in float64.
    """

    factors: Factors
    total_energy: float

    @property
    def captured_frac(self) -> float:
        """Share of the total energy in the terms, in [0, 1]; 0 for a zero weight."""
        if self.total_energy == 0:
            return 0.0
        return min(1.0, float(self.factors.sigma.double().square().sum()) / self.total_energy)


@torch.no_grad()
def kpsvd(
    weight: Tensor, shape: FactorShape, rank: int, *, algorithm: Algorithm = "auto", seed: int = 0
) -> Decomposition:
    """The leading terms of the Kronecker-product SVD of `weight`.

    Semantics: the sum of sigma[k] * kron(left[k], right[k]) nearest to `weight` in Frobenius norm.

    Args:
        weight: (out, in) = (m*p, n*q); half precision is computed in float32. CPU or GPU; never written to.
        shape: the factor shape (m, n, p, q).
        rank: number of terms, capped at `shape.max_rank`; 0 gives none.
        algorithm: "exact"; "truncated" (randomised, never more energy than the exact one); "auto" takes the exact one
            where it is cheap and the truncated one otherwise; "rough" too, but stops after a few passes over the
            weight, for a start that is improved on.
        seed: seed of the truncated method's random start, drawn on the CPU, so that it is the same on every device.

    Returns:
        Factors in float32 (float64 for a float64 weight) on the weight's device, and the total energy. The same
        weight, arguments, device and torch give the same bits.

    Memory: beyond `weight`, below 6 times its size in float32, as eval/bench/kpsvd.py measures it: about 2 for the
    truncated method (64 terms of 4096 x 4096), 5 for the exact one. Not so where the full SVD is taken, about 8
    times: for rearrangements with a side of up to 512, where that is a few MiB, and for more than half of all terms.

    Raises:
        ValueError: `weight` does not fit `shape`, is not floating point or not finite, or `rank` is negative.

    Reference: arXiv:2506.15251 section 3; Van Loan and Pitsianis 1993; Musco and Musco 2015 (block Krylov).
    """
    matrix, scale, total_energy = _prepare(weight, shape, rank)
    rank = min(rank, shape.max_rank)
    exact = _exact_is_cheap(min(matrix.shape), rank) if algorithm in ("auto", "rough") else algorithm == "exact"
    if exact:
        left, right, sigma = _exact(matrix, rank)
    else:
        left, right, sigma = _truncated(matrix, rank, total_energy / scale**2, seed, rough=algorithm == "rough")
    return Decomposition(from_vectors(left, right, sigma * scale, shape), total_energy)


@torch.no_grad()
def minor_kpsvd(weight: Tensor, shape: FactorShape, rank: int) -> Decomposition:
    """The last terms of the Kronecker-product SVD of `weight`, those of the smallest sigma, by a full SVD.

    Args:
        weight, shape: as for `kpsvd`.
        rank: number of terms, capped at `shape.max_rank`.

    Returns:
        As `kpsvd`: sigma descends within what is returned. Where the rearranged weight has a lower rank, the last
        terms have a sigma of zero to rounding, and sides that are orthogonal to all others all the same.

    Cost: that of all terms, whatever the rank: 19 s at 4096 x 4096 on one thread (eval/results/kpsvd_starts.json), and
    about 7 times the weight's memory in float32.

    Raises:
        ValueError: as for `kpsvd`.
    """
    matrix, scale, total_energy = _prepare(weight, shape, rank)
    left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
    first = len(sigma) - min(rank, len(sigma))
    factors = from_vectors(left[:, first:].contiguous(), right[first:].t(), sigma[first:] * scale, shape)
    return Decomposition(factors, total_energy)


@torch.no_grad()
def sampled_kpsvd(weight: Tensor, shape: FactorShape, rank: int, *, seed: int = 0) -> Decomposition:
    """Terms from a sample of the rearranged weight's rows and columns (CUR; the Nystroem method has U^+ for its core).

    Semantics: with C and R some columns and rows of M = R(weight), the best `rank` terms of C (C^+ M R^+) R.

    Args:
        weight, shape: as for `kpsvd`.
        rank: number of terms, capped at `shape.max_rank`; 2 rank + 16 rows and columns are drawn.
        seed: of the drawing, on the CPU.

    Returns:
        As `kpsvd`: sigma[k]^2 is what term k captures of the weight. Exact for a sum of at most `rank` terms (almost
        surely), and for all of them.

    Raises:
        ValueError: as for `kpsvd`.
    """
    matrix, scale, total_energy = _prepare(weight, shape, rank)
    rank = min(rank, shape.max_rank)
    count = min(2 * rank + 16, *matrix.shape)
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randperm(side, generator=generator)[:count].to(matrix.device) for side in matrix.shape)
    left_basis = torch.linalg.qr(matrix[:, columns]).Q
    right_basis = torch.linalg.qr(matrix[rows].t()).Q
    core_left, sigma, core_right = torch.linalg.svd((left_basis.t() @ matrix) @ right_basis, full_matrices=False)
    factors = from_vectors(
        left_basis @ core_left[:, :rank], right_basis @ core_right[:rank].t(), sigma[:rank] * scale, shape
    )
    return Decomposition(factors, total_energy)


@torch.no_grad()
def captured_energy(weight: Tensor, shape: FactorShape, rank: int, *, rough: bool = False, seed: int = 0) -> float:
    """The energy of the leading `rank` terms, computed without the terms themselves.

    Args:
        weight, shape, rank, seed: as for `kpsvd`.
        rough: stop after a few passes over the weight; a lower bound that is good for ranking shapes.

    Raises:
        ValueError: as for `kpsvd`.
    """
    matrix, scale, total_energy = _prepare(weight, shape, rank)
    rank = min(rank, shape.max_rank)
    side = min(matrix.shape)
    if side <= _SVD_SIDE or rank * 2 > side:
        squares = torch.linalg.eigvalsh(matrix @ matrix.t() if matrix.shape[0] == side else matrix.t() @ matrix)
        energy = float(squares[side - rank :].clamp(min=0).double().sum())
    else:
        sigma = _truncated(matrix, rank, total_energy / scale**2, seed, rough=rough)[2]
        energy = float(sigma.double().square().sum())
    return energy * scale * scale


def _prepare(weight: Tensor, shape: FactorShape, rank: int) -> tuple[Tensor, float, float]:
    """The rearranged weight over a scale, the scale, and the weight's total energy.

    The scale is the power of two nearest to the root mean square: dividing by it is exact, and squares then neither
    overflow nor vanish in float32.
    """
    if rank < 0:
        raise ValueError(f"expected a rank from 0; got {rank}")
    matrix, total_energy = _rearranged_copy(weight, shape)
    exponent = round(math.log2(total_energy / matrix.numel()) / 2) if total_energy > 0 else 0
    scale = 2.0 ** max(-126, min(126, exponent))  # itself and its inverse are normal numbers in float32
    return matrix.mul_(1 / scale), scale, total_energy


def _exact_is_cheap(side: int, rank: int) -> bool:
    # A Krylov basis that spans half the space costs more than the exact method and gains nothing.
    return side <= _SVD_SIDE or rank * 4 > side


def _rearranged_copy(weight: Tensor, shape: FactorShape) -> tuple[Tensor, float]:
    """The rearranged weight in float32 or float64, in one copy, and its energy; checks the weight."""
    m, n, p, q = shape
    if tuple(weight.shape) != (m * p, n * q):
        raise ValueError(f"expected a weight of shape {(m * p, n * q)} for {tuple(shape)}; got {tuple(weight.shape)}")
    if not weight.is_floating_point():
        raise ValueError(f"expected a floating-point weight; got {weight.dtype}")
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    matrix = torch.empty((m, n, p, q), dtype=dtype, device=weight.device)
    matrix.copy_(weight.reshape(m, p, n, q).permute(0, 2, 1, 3))
    energy = energy_of(matrix)
    if not math.isfinite(energy):
        raise ValueError("expected a finite weight; got NaN or infinity (or values whose squares overflow float64)")
    return matrix.view(m * n, p * q), energy


def energy_of(tensor: Tensor) -> float:
    """The sum of squares, accumulated in float64 some rows at a time; NaN or infinity when a value is."""
    values = _ENERGY_VALUES_CPU if tensor.device.type == "cpu" else _ENERGY_VALUES_GPU
    rows = max(1, values // max(1, tensor[:1].numel()))
    # In place: small results kept between large temporaries would tear the allocator's free memory apart.
    energy = torch.zeros((), dtype=torch.float64, device=tensor.device)
    for part in torch.split(tensor, rows):
        wide = part.double().flatten()
        energy += torch.dot(wide, wide)
    return float(energy)


_Triple = tuple[Tensor, Tensor, Tensor]  # left vectors (rows, r), right vectors (cols, r), sigma (r,)


def _exact(matrix: Tensor, rank: int) -> _Triple:
    side = min(matrix.shape)
    if side <= _SVD_SIDE or rank * 2 > side:
        left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank], right[:rank].t(), sigma[:rank]
    if matrix.shape[0] < matrix.shape[1]:
        right_vectors, left_vectors, sigma = _exact(matrix.t(), rank)
        return left_vectors, right_vectors, sigma
    return _ritz(matrix, _leading_by_gram(matrix, rank))


def _leading_by_gram(matrix: Tensor, rank: int) -> Tensor:
    """Right singular vectors (cols, at least rank) from eigenvectors of the Gram matrix.

    Squaring squares the condition: below about sqrt(eps) of the largest singular value the eigenvectors are noise
    among themselves, though their span is right. So only those within `_GRAM_RANGE` of the largest are taken, and
    the rest come from the Gram matrix of what is left when the first ones are projected out. Real weights mostly
    need one round.
    """
    found: list[Tensor] = []
    span: Tensor | None = None  # orthonormal basis of what is left; None is everything
    rest, count = matrix, 0
    while True:
        values, vectors = torch.linalg.eigh(rest.t() @ rest)  # ascending
        good = max(1, int((values > values[-1] * _GRAM_RANGE**2).sum()))
        done = count + good >= rank or float(values[-1]) <= 0
        good = min(rank - count, values.shape[0]) if done else good
        lead = vectors[:, values.shape[0] - good :].flip(1)
        found.append(lead if span is None else span @ lead)
        if done:
            return torch.cat(found, dim=1)
        count += good
        tail = vectors[:, : values.shape[0] - good]
        span = tail if span is None else span @ tail
        del vectors, lead, tail
        rest = matrix @ span


def _ritz(matrix: Tensor, right_basis: Tensor) -> _Triple:
    """Singular triples of `matrix` restricted to orthonormal columns; no squaring."""
    left_basis, core = torch.linalg.qr(matrix @ right_basis)
    core_left, sigma, core_right = torch.linalg.svd(core, full_matrices=False)
    return left_basis @ core_left, right_basis @ core_right.t(), sigma


def _truncated(matrix: Tensor, rank: int, total: float, seed: int, *, rough: bool = False) -> _Triple:
    """Leading singular triples from a block Krylov space of matrix @ matrix^T, grown until little more is to come.

    Each block costs two products with `matrix` of its width, as a power iteration does, but the whole history is
    kept, which converges far faster on the slow spectra of real weights. Narrow blocks reach a higher power of the
    matrix with as many columns, so that they need fewer; below 16 columns CPU libraries are slower per product.

    Args:
        matrix: (rows, cols), float32 or float64.
        rank: number of triples.
        total: the matrix's squared Frobenius norm.
        seed: of the random start.
        rough: stop at a quarter of the basis.
    """
    rows, cols = matrix.shape
    width = min(rows, cols, max(16, rank // 2 + 16))
    most = _KRYLOV_BASIS * (rank + max(8, rank // 8))
    most = most // 4 if rough else max(most, _KRYLOV_LEAST)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(cols, width, generator=generator, dtype=matrix.dtype).to(matrix.device)
    # basis: orthonormal columns (rows, K); image = matrix^T basis (cols, K), so that matrix ~ basis image^T.
    basis = torch.linalg.qr(matrix @ start).Q
    image = matrix.t() @ basis
    captured = [_leading_energy(image, rank)] if width >= rank else []
    while basis.shape[1] < max(rank, most) and not (captured and _has_converged(captured, total)):
        width = min(width, rows - basis.shape[1], cols - basis.shape[1])
        if width <= 0:
            break
        block = matrix @ image[:, -width:]
        block = _orthogonal_to(basis, block)
        basis = torch.cat((basis, block), dim=1)
        image = torch.cat((image, matrix.t() @ block), dim=1)
        if basis.shape[1] >= rank:
            captured.append(_leading_energy(image, rank))
    right_basis, core = torch.linalg.qr(image)
    core_right, sigma, core_left = torch.linalg.svd(core, full_matrices=False)
    return basis @ core_left[:rank].t(), right_basis @ core_right[:, :rank], sigma[:rank]


def _orthogonal_to(basis: Tensor, block: Tensor) -> Tensor:
    """Orthonormal columns (rows, w) that are orthogonal to `basis` (rows, K) and span what `block` (rows, w) adds.

    One projection is not enough in floating point. Two are not where the block adds nothing but rounding errors (a
    matrix of low rank): the factorisation then makes up columns, some of which lie in the basis.
    """
    tolerance = 64 * torch.finfo(block.dtype).eps
    for number in range(_MOST_PROJECTIONS):
        overlap = basis.t() @ block
        if number >= 2 and float(overlap.abs().max()) <= tolerance:
            break
        block = torch.linalg.qr(block - basis @ overlap).Q
    return block


def _has_converged(captured: list[float], total: float) -> bool:
    """Whether the gains so far, continued as a geometric series, would add less than `_KRYLOV_REST` of it."""
    if captured[-1] >= total * (1 - 1e-10):
        return True
    if len(captured) < 3:
        return False
    before, last = captured[-2] - captured[-3], captured[-1] - captured[-2]
    if last <= 0:
        return True
    return last < before and last * last / (before - last) <= _KRYLOV_REST * captured[-1]


def _leading_energy(image: Tensor, rank: int) -> float:
    values = torch.linalg.eigvalsh((image.t() @ image).double())
    return float(values[-rank:].sum()) if rank else 0.0
