"""Kronecker factors, and what needs nothing but them: rearrangement, dense delta, stacking, recompression.

Kronecker order is numpy's: kron(left, right)[i*p + a, j*q + b] = left[i, j] * right[a, b].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from soka_serve.kron.shapes import FactorShape


@dataclass(frozen=True, eq=False)
class Factors:
    """The terms of one module: delta = sum over k of sigma[k] * kron(left[k], right[k]).

    Args:
        left: (r, m, n), floating point.
        right: (r, p, q), floating point.
        sigma: (r,), floating point; any sign (subtracting a term negates its sigma).

    Raises:
        ValueError: the three tensors do not fit together.
    """

    left: Tensor
    right: Tensor
    sigma: Tensor

    def __post_init__(self) -> None:
        dims = (self.left.ndim, self.right.ndim, self.sigma.ndim)
        if dims != (3, 3, 1) or not self.left.shape[0] == self.right.shape[0] == self.sigma.shape[0]:
            shapes = f"left {tuple(self.left.shape)}, right {tuple(self.right.shape)}, sigma {tuple(self.sigma.shape)}"
            expected = "left, right and sigma must have the same number of terms"
            if dims != (3, 3, 1):
                expected = "expected left (r, m, n), right (r, p, q), sigma (r,)"
            raise ValueError(f"{expected}; got {shapes}")
        if not all(t.is_floating_point() for t in (self.left, self.right, self.sigma)):
            raise ValueError(f"factors must be floating point; got {self.left.dtype}, {self.right.dtype}")

    @property
    def rank(self) -> int:
        """Number of terms."""
        return self.sigma.shape[0]

    @property
    def shape(self) -> FactorShape:
        """The factor shape (m, n, p, q)."""
        return FactorShape(*self.left.shape[1:], *self.right.shape[1:])

    @property
    def parameters(self) -> int:
        """Number of values in the three tensors, r * (m*n + p*q + 1)."""
        return self.left.numel() + self.right.numel() + self.sigma.numel()

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Factors:
        """The same terms in another dtype or on another device."""
        return Factors(*(t.to(device=device, dtype=dtype) for t in (self.left, self.right, self.sigma)))

    def with_unit_rms(self) -> Factors:
        """The same terms, the entries of left and of right with a root mean square of 1 each; sigma takes the rest.

        A factor of zeros stays as it is.
        """
        lefts, rights = (t.square().mean((1, 2)).sqrt() for t in (self.left, self.right))
        lefts, rights = (torch.where(size > 0, size, 1.0) for size in (lefts, rights))
        left, right = self.left / lefts[:, None, None], self.right / rights[:, None, None]
        return Factors(left, right, self.sigma * lefts * rights)

    def with_size(self, size: float) -> Factors:
        """The same terms times one number, such that sigma's root mean square is `size`; zeros become `size` each."""
        typical = self.sigma.square().mean().sqrt()
        sigma = self.sigma / typical if typical > 0 else torch.ones_like(self.sigma)
        return Factors(self.left, self.right, sigma * size)

    def terms(self, index: int | slice | Sequence[int] | Tensor) -> Factors:
        """The chosen terms, in the order of `index`; one number gives a single term."""
        if isinstance(index, int):
            index = [index]
        elif not isinstance(index, slice | Tensor):
            index = list(index)
        return Factors(self.left[index], self.right[index], self.sigma[index])


def typical_entry(weight_norm: float, shape: FactorShape) -> float:
    """Root mean square of a weight's entries; a norm of zero counts as that of a weight that keeps its inputs' size.

    Args:
        weight_norm: the weight's Frobenius norm.
        shape: a factor shape of it.
    """
    if weight_norm == 0:
        return 1 / math.sqrt(shape.in_features)
    return weight_norm / math.sqrt(shape.out_features * shape.in_features)


def random_terms(
    rank: int, shape: FactorShape, sigma: float, generator: torch.Generator | None = None, *, zero: bool = False
) -> Factors:
    """Terms of normally distributed factors whose entries have a root mean square of 1 (float32, on the CPU).

    Args:
        rank, shape: number of terms, and their factor shape.
        sigma: scale of every term.
        generator: of the numbers; None is torch's own.
        zero: leave Right zero, so that the delta is zero and Left begins to learn with Right's second step (KronA).
    """
    m, n, p, q = shape
    left = torch.randn(rank, m, n, generator=generator)
    right = torch.zeros(rank, p, q) if zero else torch.randn(rank, p, q, generator=generator)
    terms = Factors(left, right, torch.ones(rank)).with_unit_rms()
    return Factors(terms.left, terms.right, torch.full((rank,), sigma))


def rearrange(weight: Tensor, shape: FactorShape) -> Tensor:
    """The Van Loan-Pitsianis rearrangement: Kronecker products become outer products.

    Semantics: R[i*n + j, a*q + b] = weight[i*p + a, j*q + b], so that for weight = kron(left, right),
    R = vec(left) vec(right)^T with row-major vec. It is a permutation, hence keeps the Frobenius norm.

    Args:
        weight: (out, in) = (m*p, n*q), any dtype.
        shape: the factor shape.

    Returns:
        (m*n, p*q), contiguous copy, dtype of `weight`.

    Raises:
        ValueError: `weight` is not (m*p, n*q).

    Reference: Van Loan and Pitsianis, Approximation with Kronecker products, 1993. A plain reshape of the weight to
    (m*n, p*q) is something else and recovers nothing.
    """
    m, n, p, q = shape
    _check_matrix(weight, (m * p, n * q), "weight")
    return weight.reshape(m, p, n, q).permute(0, 2, 1, 3).reshape(m * n, p * q)


def unrearrange(matrix: Tensor, shape: FactorShape) -> Tensor:
    """The inverse of `rearrange`: (m*n, p*q) back to (out, in).

    Raises:
        ValueError: `matrix` is not (m*n, p*q).
    """
    m, n, p, q = shape
    _check_matrix(matrix, (m * n, p * q), "matrix")
    return matrix.reshape(m, n, p, q).permute(0, 2, 1, 3).reshape(m * p, n * q)


def dense_delta(factors: Factors, dtype: torch.dtype | None = None) -> Tensor:
    """The sum of the terms as a dense matrix; differentiable.

    Semantics: delta = sum over k of sigma[k] * kron(left[k], right[k]).

    Args:
        factors: the terms; half precision is computed in float32.
        dtype: dtype of the result; default: that of `factors.left`.

    Returns:
        (out, in). No terms give zeros. Peak memory is twice the result; `add_delta_` needs none.
    """
    work = _work_dtype(factors)
    left = (factors.left.to(work) * factors.sigma.to(work)[:, None, None]).flatten(1)
    matrix = left.t() @ factors.right.to(work).flatten(1)
    return unrearrange(matrix, factors.shape).to(dtype or factors.left.dtype)


@torch.no_grad()
def add_delta_(weight: Tensor, factors: Factors, scale: float = 1.0) -> Tensor:
    """Add scale * delta to `weight` in place, some rows of Left at a time, without the dense delta.

    Args:
        weight: (out, in), any floating dtype; each block is summed in float32 (float64 when one of the two is) and
            rounded once.
        factors: the terms.
        scale: multiplies the delta; -1 takes it out again.

    Returns:
        `weight`.

    Raises:
        ValueError: `weight` is not (m*p, n*q).
    """
    m, n, p, q = factors.shape
    _check_matrix(weight, (m * p, n * q), "weight")
    work = torch.promote_types(_work_dtype(factors), weight.dtype)
    left = factors.left.to(work) * (factors.sigma.to(work) * scale)[:, None, None]
    right = factors.right.to(work).flatten(1)
    rows = max(1, _BLOCK_VALUES // (p * n * q))
    for start in range(0, m, rows):
        part = left[:, start : start + rows]
        block = (part.flatten(1).t() @ right).view(part.shape[1], n, p, q).transpose(1, 2).reshape(-1, n * q)
        target = weight[start * p : start * p + block.shape[0]]
        target.copy_(block.add_(target))
    return weight


_BLOCK_VALUES = 1 << 20  # values of a block in `add_delta_`: 4 MiB in float32, still one efficient GEMM


def stack_terms(*factors: Factors, signs: Sequence[float] | None = None) -> Factors:
    """All terms of several deltas of the same module: the sum of the deltas, each times its sign.

    >>> f = Factors(torch.ones(1, 2, 2), torch.ones(1, 3, 3), torch.ones(1))
    >>> dense_delta(stack_terms(f, f, signs=(1, -1))).abs().max().item()
    0.0

    Args:
        factors: at least one; all of one factor shape.
        signs: one multiplier per argument; default: all 1.

    Raises:
        ValueError: nothing to stack, different factor shapes, or another number of signs.
    """
    if not factors:
        raise ValueError("expected at least one set of factors; got none")
    shapes = {f.shape for f in factors}
    if len(shapes) > 1:
        raise ValueError(f"expected factors of one shape; got {sorted(map(tuple, shapes))}")
    signs = (1.0,) * len(factors) if signs is None else tuple(signs)
    if len(signs) != len(factors):
        raise ValueError(f"expected {len(factors)} signs; got {len(signs)}")
    return Factors(
        torch.cat([f.left for f in factors]),
        torch.cat([f.right for f in factors]),
        torch.cat([f.sigma * sign for f, sign in zip(factors, signs, strict=True)]),
    )


def stack_difference(theta: Factors, initial: Factors) -> Factors:
    """K(theta) - K(initial) as one stack of 2r terms that is exactly zero where theta equals initial.

    Semantics: sigma L (x) R - sigma0 L0 (x) R0 = (sigma L - sigma0 L0) (x) R + sigma0 L0 (x) (R - R0), term by term.

    Stacking theta and -initial instead would leave the cancellation to the rounding of a long sum. Here it happens
    between the factors themselves: at step 0 one factor of every term is exactly 0, so the adapted model equals its
    base bit for bit in every dtype, and a low-precision GEMM afterwards rounds a small number, not a small difference
    of large ones. It costs the same. Differentiable; gradients are those of K(theta).

    Args:
        theta: r terms, any float dtype.
        initial: r terms of the same shape; cast to theta's dtype first, so that both are rounded alike.
    """
    sigma = theta.sigma[:, None, None]
    sigma_initial = initial.sigma.to(theta.sigma.dtype)[:, None, None]
    right_initial = initial.right.to(theta.right.dtype)
    scaled_initial = sigma_initial * initial.left.to(theta.left.dtype)
    left = torch.cat([sigma * theta.left - scaled_initial, scaled_initial])
    right = torch.cat([theta.right, theta.right - right_initial])
    return Factors(left=left, right=right, sigma=torch.ones(len(left), dtype=left.dtype, device=left.device))


def fold_difference(theta: Factors, initial: Factors, *, left: bool, right: bool) -> Factors:
    """K(theta) - K(initial) as r terms, where the two share factors.

    Semantics, term by term: both shared: (sigma - sigma0) L (x) R; left: L (x) (sigma R - sigma0 R0); right:
    (sigma L - sigma0 L0) (x) R. Exactly zero where theta equals initial. Differentiable in theta.

    Args:
        theta: r terms, any float dtype.
        initial: r terms of the same shape; cast to theta's dtype first.
        left, right: which factors are the same in both; at least one.
    """
    initial = initial.to(theta.sigma.dtype)
    if left and right:
        return Factors(theta.left, theta.right, theta.sigma - initial.sigma)
    one, start = theta.sigma[:, None, None], initial.sigma[:, None, None]
    ones = torch.ones_like(theta.sigma)
    if left:
        return Factors(theta.left, one * theta.right - start * initial.right, ones)
    return Factors(one * theta.left - start * initial.left, theta.right, ones)


def subtract_terms(theta: Factors, initial: Factors) -> Factors:
    """The terms of K(theta) - K(initial), in float32 as they are: r where all share a factor bit for bit, else 2r.

    Args:
        theta: r terms.
        initial: terms to subtract, of the same factor shape.
    """
    same = theta.rank == initial.rank
    left, right = (same and torch.equal(getattr(theta, part), getattr(initial, part)) for part in ("left", "right"))
    if not left and not right:
        return stack_terms(theta, initial, signs=(1, -1))
    # The factor that is not shared is a difference, rounded once.
    folded = fold_difference(theta.to(torch.float64), initial, left=left, right=right)
    return folded.to(theta.sigma.dtype)


def energy_by_term(theta: Factors, initial: Factors | None = None) -> Tensor:
    """What each term adds to the weight, as a squared Frobenius norm: (r,), in the factors' dtype.

    Semantics: ||sigma[k] kron(left[k], right[k])||^2, and with `initial` that of the term minus the initial one, which
    is split as (a - b) x R + b x (R - S), so that no difference of large numbers is taken: exactly 0 where they agree.

    Args:
        theta: r terms.
        initial: as many terms of the same shape; None: zero.
    """
    scaled, right = theta.sigma[:, None, None] * theta.left, theta.right
    if initial is None:
        return _dot(scaled, scaled) * _dot(right, right)
    start = initial.sigma[:, None, None] * initial.left
    step, turn = scaled - start, right - initial.right
    cross = 2 * _dot(step, start) * _dot(right, turn)
    energies = _dot(step, step) * _dot(right, right) + _dot(start, start) * _dot(turn, turn) + cross
    return energies.clamp_min(0)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product per term: (r, x, y), (r, x, y) -> (r,)."""
    return (a * b).sum(dim=(1, 2))


@torch.no_grad()
def recompress(
    factors: Factors, *, rank: int | None = None, energy: float | None = None, rtol: float | None = None
) -> tuple[Factors, float]:
    """The same delta with the fewest terms: orthogonal factors, sigma descending; or the best `rank` of them.

    QR of the two factor stacks (m*n x r and p*q x r), then an SVD of the r x r core, all in float64; the dense delta
    is never built. With `rank` None only terms that are zero to rounding are dropped: sigma at most `rtol` times the
    largest one, or lost in the cancellation of the terms that went in. At least one term is kept (with sigma 0 when
    the delta is zero), so that an adapter never holds empty tensors; no terms in gives no terms out.

    Args:
        factors: the terms, for instance `stack_terms(trained, initial, signs=(1, -1))`.
        rank: most terms to keep; None keeps all that are not numerically zero.
        energy: the share of the delta's energy that the fewest terms must hold, in (0, 1]; None keeps all of it.
        rtol: relative size of a numerically zero term; default 1e-7 (1e-14 for float64 factors).

    Returns:
        The factors (unit Frobenius norm, sigma >= 0 descending, dtype of `factors.left`, at most min(r, m*n, p*q)
        terms), and the share of the delta's energy that was dropped, in [0, 1].

    Raises:
        ValueError: `rank` is negative, `energy` is no share, or a factor is not finite.
    """
    if rank is not None and rank < 0:
        raise ValueError(f"expected a rank from 0; got {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"expected a share of the energy above 0, at most 1; got {energy}")
    if rtol is None:
        rtol = 1e-14 if factors.left.dtype == torch.float64 else 1e-7
    shape = factors.shape
    left = factors.left.double().flatten(1).t()
    right = factors.right.double().flatten(1).t()
    sigma = factors.sigma.double()
    if not all(bool(t.isfinite().all()) for t in (left, right, sigma)):
        raise ValueError("expected finite factors; got NaN or infinity")
    left_basis, left_core = torch.linalg.qr(left * sigma)
    right_basis, right_core = torch.linalg.qr(right)
    core_left, core_sigma, core_right = torch.linalg.svd(left_core @ right_core.t(), full_matrices=False)
    if core_sigma.numel() == 0:
        return factors, 0.0
    # What cancelled: below the float64 rounding of the terms that went in there is only noise.
    noise = 1e-13 * (sigma.abs() * left.norm(dim=0) * right.norm(dim=0)).norm()
    core_sigma = torch.where(core_sigma > noise, core_sigma, 0.0)
    keep = max(1, int((core_sigma > core_sigma[0] * rtol).sum()))
    energies = core_sigma.square()
    if energy is not None:
        lost = energies.flip(0).cumsum(0).flip(0)  # by keeping fewer than each term's number
        keep = min(keep, max(1, int((lost > (1 - energy) * lost[0]).sum())))
    keep = keep if rank is None else min(keep, rank)
    dropped = float(energies[keep:].sum() / energies.sum()) if core_sigma[0] > 0 else 0.0
    result = from_vectors(
        left_basis @ core_left[:, :keep], right_basis @ core_right[:keep].t(), core_sigma[:keep], shape
    )
    return result.to(dtype=factors.left.dtype), dropped


def from_vectors(left: Tensor, right: Tensor, sigma: Tensor, shape: FactorShape) -> Factors:
    """Singular vectors in columns, (m*n, r) and (p*q, r), as factors with the sign fixed.

    The sign of a singular pair is arbitrary; the entry of largest magnitude in left[k] is made positive.
    """
    m, n, p, q = shape
    rank = sigma.shape[0]
    if rank:
        sign = left.gather(0, left.abs().argmax(dim=0, keepdim=True)).sign()
        sign = torch.where(sign == 0, torch.ones_like(sign), sign)
        left, right = left * sign, right * sign
    return Factors(
        left.t().reshape(rank, m, n).contiguous(), right.t().reshape(rank, p, q).contiguous(), sigma.contiguous()
    )


def _work_dtype(factors: Factors) -> torch.dtype:
    """Float32 for half precision, else the widest of the three."""
    widest = torch.promote_types(torch.promote_types(factors.left.dtype, factors.right.dtype), factors.sigma.dtype)
    return torch.promote_types(widest, torch.float32)


def _check_matrix(matrix: Tensor, expected: tuple[int, int], name: str) -> None:
    if tuple(matrix.shape) != expected:
        raise ValueError(f"expected {name} of shape {expected}; got {tuple(matrix.shape)}")
