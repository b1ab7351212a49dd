"""Activation weighting: a decomposition that is good for the inputs a layer really sees.

The error that matters is that of the output, E ||(W - W') x||^2 = tr((W - W') C (W - W')^T) with the second moment
C = E[x x^T] of the layer's inputs (the idea for low-rank adapters: CorDA arXiv:2406.05223, EVA arXiv:2410.07170).
There it is solved in closed form. Here a general C destroys the Kronecker structure, so it is done in two steps:

1. Start: the nearest Kronecker product C1 (n, n) kron C2 (q, q) of C keeps the structure. W (C1 kron C2)^(1/2) is
   decomposed, and the roots are taken out of the factors again. Optimal when C is a Kronecker product (the identity,
   for one), but worth nothing by itself on correlated inputs without that structure.
2. Alternating least squares with C itself, one term after the other: with right[k] fixed the best left[k] solves an
   n x n system, and the reverse a q x q one. No step makes the output error larger.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from soka_serve.kron.apply import apply_kron
from soka_serve.kron.decompose import Decomposition, kpsvd
from soka_serve.kron.factors import Factors, recompress, stack_terms
from soka_serve.kron.shapes import FactorShape

_POWER_STEPS = 20
_POWER_CHANGE = 1e-5  # of a unit vector
_ROWS = 256
_INNER = 1024  # of a product with the second moment: long enough for libraries to reach their speed
_TOKENS = 1024
_ROOT_DAMPING = 1e-3  # share of the mean eigenvalue; only the start of the least squares depends on it


class InputMoments:
    """The second moment E[x x^T] of a layer's inputs, summed over batches.

    Args:
        in_features: size of an input; its square values are kept (float32: 64 MiB at 4096, 462 MiB at 11008).
    """

    def __init__(self, in_features: int) -> None:
        self.in_features = in_features
        self.tokens = 0
        self._sum: Tensor | None = (
            None  # of what does not wait: in its lower blocks, until `_known_sum` fills the others
        )
        self._waiting: list[Tensor] = []  # a product of few tokens takes longest to read and write the sum
        self._filled = False
        self._fits: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # several modules may share these inputs

    @torch.no_grad()
    def accumulate(self, x: Tensor) -> None:
        """Add the inputs x (..., in_features), any floating dtype, on their device; summed in float32 or float64.

        Raises:
            ValueError: the last dimension is not in_features, or a value is not finite (nothing is added then).
        """
        if x.ndim < 1 or x.shape[-1] != self.in_features:
            raise ValueError(f"expected inputs (..., {self.in_features}); got {tuple(x.shape)}")
        flat = x.reshape(-1, self.in_features)
        flat = flat.to(torch.promote_types(x.dtype, torch.float32))
        if not bool(flat.square().sum(0).isfinite().all()):
            raise ValueError("expected finite inputs; got NaN, infinity or values whose squares overflow")
        if self._sum is None:
            self._sum = torch.zeros(self.in_features, self.in_features, dtype=flat.dtype, device=flat.device)
        self._waiting.append(flat.to(self._sum, copy=True))
        self.tokens += flat.shape[0]
        self._fits.clear()
        if sum(map(len, self._waiting)) >= _TOKENS:
            self._add_waiting()

    def _add_waiting(self) -> None:
        """Add what waits to the lower blocks of the sum, in place: it may be the largest tensor there is."""
        assert self._sum is not None
        flat = torch.cat(self._waiting)
        self._waiting.clear()
        self._filled = False
        for start in range(0, self.in_features, _ROWS):
            stop = start + _ROWS
            self._sum[start:stop, :stop].addmm_(flat[:, start:stop].t(), flat[:, :stop])

    def moment(self) -> Tensor:
        """The mean: (in_features, in_features).

        Raises:
            ValueError: no inputs were accumulated.
        """
        return self._known_sum() / self.tokens

    def mean_square(self) -> float:
        """The mean of the moment's diagonal. Raises ValueError: no inputs were accumulated."""
        return float(self._known_sum().diagonal().double().mean()) / self.tokens

    def sums(self, start: int, stop: int) -> Tensor:
        """Rows of the sum over tokens, (stop - start, in_features); a view.

        Raises:
            ValueError: no inputs were accumulated.
        """
        return self._known_sum()[start:stop]

    def _known_sum(self) -> Tensor:
        if self._sum is None or not self.tokens:
            raise ValueError("no inputs were accumulated; the moment is undefined")
        if self._waiting:
            self._add_waiting()
        if not self._filled:
            for start in range(0, self.in_features, _ROWS):
                stop = start + _ROWS
                self._sum[:start, start:stop] = self._sum[start:stop, :start].t()
            self._filled = True
        return self._sum

    def fit_kronecker(self, shape: FactorShape) -> tuple[Tensor, Tensor]:
        """The symmetric positive semi-definite C1 (n, n) and C2 (q, q) whose Kronecker product is nearest to C.

        Both are scaled to trace n and q: the average input direction weighs 1, so weighted energies compare with
        unweighted ones. Inputs that are all zero give identities. On the moment's device.

        Raises:
            ValueError: no inputs were accumulated, or n*q is not in_features.

        Reference: Van Loan and Pitsianis 1993, theorem 5.8: the nearest product of a semi-definite matrix has
        semi-definite factors.
        """
        n, q = shape.n, shape.q
        if n * q != self.in_features:
            raise ValueError(f"expected n*q = {self.in_features}; got {n}*{q}")
        found = self._known_sum()
        if (n, q) not in self._fits:
            self._fits[n, q] = self._fit(found, n, q)
        return self._fits[n, q]

    def _fit(self, found: Tensor, n: int, q: int) -> tuple[Tensor, Tensor]:
        if not bool(found.any()):
            first, second = (torch.eye(size, dtype=found.dtype, device=found.device) for size in (n, q))
            return first, second
        pair = _leading_term(lambda j: self.sums(j * q, (j + 1) * q).view(q, n, q), n, q)
        nearest = (_nearest_semidefinite(part) for part in pair)
        first, second = (part * (part.shape[0] / part.trace()) for part in nearest)
        return first, second


def _contract_right(block: Tensor, pairs: Tensor) -> Tensor:
    """Rows of a left gram matrix: sums over b, c of block[b, h, c] pairs[b, c, k], as (n, k)."""
    found: Tensor = torch.bmm(block, pairs).sum(0)
    return found


def _add_contracted_left(total: Tensor, block: Tensor, pairs: Tensor) -> None:
    """Adds to `total` (q, k, q) what a row of left pairs (k, n) gives: sums over h of pairs[k, h] block[b, h, c]."""
    total.baddbmm_(pairs.expand(len(block), *pairs.shape), block)


def _leading_term(block: Callable[[int], Tensor], n: int, q: int) -> tuple[Tensor, Tensor]:
    """The leading singular vectors of R(C), as (n, n) and (q, q), by power iteration over its blocks of rows.

    A copy of R(C) would be the largest tensor of all. Semi-definite C has semi-definite factors, so the identity, which
    is not orthogonal to any, is where to start. Close is enough: only a start depends on it.

    Args:
        block: gives rows [j q, (j + 1) q) of C as (q, n, q).
    """
    vector = torch.eye(q, dtype=block(0).dtype, device=block(0).device)
    vector /= vector.norm()
    left = vector.new_zeros(n, n)
    for _ in range(_POWER_STEPS):
        found = vector.new_zeros(q, 1, q)
        for j in range(n):
            rows = block(j)
            left[j] = _contract_right(rows, vector[:, :, None])[:, 0]
            _add_contracted_left(found, rows, left[j][None])
        found = found[:, 0] / found.norm()
        moved = float((found - vector).norm())
        vector = found
        if moved < _POWER_CHANGE:
            break
    return left, vector


class OutputError:
    """The least-squares problem: E ||(W - W') x||^2 over Kronecker terms, for one weight and one factor shape.

    Args:
        weight: (out, in).
        shape: of the factors.
        moments: accumulated inputs of the layer. Its second moment is used with a mean diagonal of 1.
        damping: this many times the identity is added to it, so that input directions that the calibration never
            showed keep a small weight.

    Memory: less than three times the weight in float32. The moments are read in place: they can be larger than the
    weight, and no scaled or rearranged copy of them is ever made (but for one in another dtype or on another device).

    Raises:
        ValueError: another shape than the weight's, negative damping, or no inputs were accumulated.
    """

    def __init__(self, weight: Tensor, shape: FactorShape, moments: InputMoments, *, damping: float = 1e-3) -> None:
        if tuple(weight.shape) != (shape.out_features, shape.in_features):
            expected = (shape.out_features, shape.in_features)
            raise ValueError(f"expected a weight of shape {expected} for {tuple(shape)}; got {tuple(weight.shape)}")
        if damping < 0:
            raise ValueError(f"expected damping from 0; got {damping}")
        self.shape = shape
        self.dtype = torch.promote_types(weight.dtype, torch.float32)
        self.weight = weight
        self.moments = moments
        self.total_energy = 0.0
        # C = scale * sums + ridge * identity; the identity where there was nothing but zeros.
        mean = moments.mean_square() * moments.tokens
        self._scale = 1 / mean / (1 + damping) if mean > 0 else 0.0
        self._ridge = damping / (1 + damping) if mean > 0 else 1.0
        self._cross: Tensor | None = None
        self._taken: list[tuple[Tensor, Tensor]] = []

    def block(self, j: int) -> Tensor:
        """Rows [j q, (j + 1) q) of the sums: (q, n, q)."""
        n, q = self.shape.n, self.shape.q
        return self._sums(j * q, (j + 1) * q).view(q, n, q)

    def _sums(self, start: int, stop: int) -> Tensor:
        return self.moments.sums(start, stop).to(device=self.weight.device, dtype=self.dtype)

    def start(self, rank: int, seed: int) -> Factors:
        """The decomposition in the norm of the Kronecker product nearest to C, its roots taken out of the factors."""
        m, n, p, q = self.shape
        roots = [_roots(part.to(self.weight.device)) for part in self.moments.fit_kronecker(self.shape)]
        (root1, inverse1), (root2, inverse2) = [(a.to(self.dtype), b.to(self.dtype)) for a, b in roots]
        weighted = torch.empty(self.weight.shape, dtype=self.dtype, device=self.weight.device)
        for i in range(m):
            rows = self.weight[i * p : (i + 1) * p].to(self.dtype).view(p, n, q)
            weighted[i * p : (i + 1) * p] = torch.matmul(root1, rows).matmul(root2).view(p, n * q)
        factors = kpsvd(weighted, self.shape, rank, algorithm="rough", seed=seed).factors
        return Factors(factors.left @ inverse1, factors.right @ inverse2, factors.sigma)

    def cross(self) -> Tensor:
        """R(E C), (m*n, p*q), with E the weight minus the terms taken out; sets the total energy.

        Raises:
            ValueError: the weight is not finite.
        """
        if self._cross is not None:
            return self._cross
        m, n, p, q = self.shape
        cross = torch.empty(m, n, p, q, dtype=self.dtype, device=self.weight.device)
        energy = 0.0
        together = max(1, _ROWS // p)
        for i in range(0, m, together):
            rows = self.weight[i * p : (i + together) * p].to(self.dtype)
            product = rows * self._ridge
            for j in range(0, n * q, _INNER):
                product.addmm_(rows[:, j : j + _INNER], self._sums(j, j + _INNER), alpha=self._scale)
            for part, other in zip(torch.split(product, 64), torch.split(rows, 64), strict=True):
                energy += float((part.double() * other).sum())
            cross[i : i + together] = product.view(-1, p, n, q).transpose(1, 2)
        if not math.isfinite(energy):
            raise ValueError("expected a finite weight; got NaN or infinity")
        self.total_energy = energy
        self._cross = cross.view(m * n, p * q)
        return self._cross

    def best_lefts(self, right: Tensor) -> Tensor:
        """The left factors (r, m, n) that together lower the error most beside `right` (r, p, q)."""
        m, n, _, q = self.shape
        rank = len(right)
        pairs = torch.einsum("kab,lac->bckl", right, right).reshape(q, q, rank * rank)
        # Filled in place: small results kept between large temporaries would tear the allocator's free memory apart.
        blocks = torch.empty(n, n, rank * rank, dtype=self.dtype, device=right.device)
        for j in range(n):
            blocks[j] = _contract_right(self.block(j), pairs)
        blocks *= self._scale
        blocks.diagonal().add_(pairs.diagonal().sum(-1)[:, None], alpha=self._ridge)
        gram = blocks.view(n, n, rank, rank).permute(2, 0, 3, 1).reshape(rank * n, rank * n)
        target = (right.flatten(1) @ self.cross().t()).view(rank, m, n).transpose(0, 1).reshape(m, rank * n)
        return _solve(gram, target).view(m, rank, n).transpose(0, 1).contiguous()

    def best_rights(self, left: Tensor) -> Tensor:
        """The right factors (r, p, q) that together lower the error most beside `left` (r, m, n)."""
        _, n, p, q = self.shape
        rank = len(left)
        pairs = torch.einsum("kij,lih->jklh", left, left).reshape(n, rank * rank, n)
        products = torch.zeros(q, rank * rank, q, dtype=self.dtype, device=left.device)
        for j in range(n):
            _add_contracted_left(products, self.block(j), pairs[j])
        products *= self._scale
        products.diagonal(dim1=0, dim2=2).add_(pairs.diagonal(dim1=0, dim2=2).sum(-1)[:, None], alpha=self._ridge)
        gram = products.view(q, rank, rank, q).permute(1, 0, 2, 3).reshape(rank * q, rank * q)
        target = (left.flatten(1) @ self.cross()).view(rank, p, q).transpose(0, 1).reshape(p, rank * q)
        return _solve(gram, target).view(p, rank, q).transpose(0, 1).contiguous()

    def take(self, left: Tensor, right: Tensor) -> float:
        """Take a term, (m, n) and (p, q), out of what is left of the weight; returns the energy that it captured."""
        before = (left.flatten() @ self.cross()) @ right.flatten()
        self._add(left[None], right[None], -1)
        self._taken.append((left, right))
        after = (left.flatten() @ self.cross()) @ right.flatten()
        # With t the term: 2 <t, E C> - <t, t C>, and `after` is <t, (E - t) C>.
        return float(before.double() + after.double())

    def give_back(self) -> None:
        """Put the terms that were taken out back in."""
        if self._taken:
            left, right = (torch.stack(parts) for parts in zip(*self._taken, strict=True))
            self._add(left, right, 1)
            self._taken.clear()

    def _add(self, left: Tensor, right: Tensor, sign: int) -> None:
        """Add terms (r, m, n) and (r, p, q) to E."""
        m, n, p, q = self.shape
        weights = torch.full((len(left),), sign * self._scale, dtype=self.dtype, device=left.device)
        cross = self.cross().view(m, n, p, q)
        for j in range(n):
            # R((left kron right) C): C is symmetric, so this is the delta applied to its rows, transposed.
            rows = apply_kron(self._sums(j * q, (j + 1) * q), left, right, weights)
            cross[:, j] += rows.view(q, m, p).permute(1, 2, 0)
        self.cross().addmm_(left.flatten(1).t(), right.flatten(1), alpha=sign * self._ridge)


@torch.no_grad()
def weighted_kpsvd(problem: OutputError, rank: int, *, sweeps: int = 3, seed: int = 0) -> Decomposition:
    """Terms that lower the output error on a layer's inputs most, one after the other.

    Semantics: term k minimises E ||(W - terms before k - term k) x||^2 approximately, by `sweeps` of alternating least
    squares from the k-th term of the Kronecker-weighted decomposition. Any leading terms can be used without the
    others; for the best terms of one rank together, follow with `refine_terms` on the same problem.

    Args:
        problem: weight, factor shape and inputs.
        rank, seed: as for `kpsvd`.
        sweeps: least-squares solves per factor and term; 0 gives the start.

    Returns:
        sigma[k]^2 is the output energy that term k captured, the total energy that of W, both with C scaled to a mean
        diagonal of 1 (comparable with the unweighted ones; rank policies then count output energy). Sigma descends;
        left[k] and right[k] are of equal norm, but not of unit norm, and not orthogonal.

    Raises:
        ValueError: as `kpsvd`, as `InputMoments.fit_kronecker`, or `sweeps` is negative.
    """
    if sweeps < 0:
        raise ValueError(f"expected sweeps from 0; got {sweeps}")
    start = problem.start(rank, seed)
    problem.cross()
    problem.give_back()
    lefts, rights, captured = [], [], []
    for k in range(start.rank):
        left, right = start.left[k] * start.sigma[k], start.right[k]
        for _ in range(sweeps):
            left = problem.best_lefts(right[None])[0]
            right = problem.best_rights(left[None])[0]
        captured.append(problem.take(left, right))
        balance = float((right.norm() / left.norm()).sqrt()) if captured[-1] > 0 else 1.0
        lefts.append(left * balance)
        rights.append(right / balance)
    energies = torch.tensor(captured, dtype=torch.float64, device=problem.weight.device).clamp(min=0)
    order = energies.argsort(descending=True, stable=True)
    if not start.rank:
        return Decomposition(start, problem.total_energy)
    sigma = energies.sqrt().to(start.sigma.dtype)
    scale = torch.where(sigma > 0, sigma, 1.0)[:, None, None]  # a term that captures nothing gets sigma 0
    factors = Factors(torch.stack(lefts) / scale.sqrt(), torch.stack(rights) / scale.sqrt(), sigma)
    return Decomposition(factors.terms(order), problem.total_energy)


@torch.no_grad()
def refine_terms(problem: OutputError, factors: Factors, *, sweeps: int = 3) -> Factors:
    """The same number of terms, fitted together to lower the output error further.

    Semantics: alternating least squares on E ||(W - sum of terms) x||^2 over all left factors, then over all right
    ones. Each solve is exact, so the damped output error never grows. An r*n and an r*q square system per sweep.

    Args:
        problem: weight, factor shape and inputs; the one that the terms were found with saves a product with the
            second moment, which costs most of all.
        factors: the terms to start from, as from `weighted_kpsvd`, already cut to their final rank.
        sweeps: solves per side; 0 returns `factors`.

    Returns:
        Factors of the same rank with orthogonal terms of unit norm, sigma descending.

    Raises:
        ValueError: the weight is not finite, or `sweeps` is negative.
    """
    if sweeps < 0:
        raise ValueError(f"expected sweeps from 0; got {sweeps}")
    if sweeps == 0 or factors.rank == 0:
        return factors
    problem.give_back()
    left = (factors.left * factors.sigma[:, None, None]).to(problem.dtype)
    right = factors.right.to(problem.dtype)
    for _ in range(sweeps):
        left = problem.best_lefts(right)
        right = problem.best_rights(left)
    ones = torch.ones(factors.rank, dtype=left.dtype, device=left.device)
    refined, _ = recompress(Factors(left, right, ones), rank=factors.rank)
    if refined.rank < factors.rank:  # terms that became equal: keep the caller's rank, with sigma 0
        spare = factors.terms(slice(refined.rank, None)).to(dtype=refined.left.dtype)
        refined = stack_terms(refined, Factors(spare.left, spare.right, torch.zeros_like(spare.sigma)))
    return refined.to(dtype=factors.left.dtype)


def _solve(gram: Tensor, target: Tensor) -> Tensor:
    """target gram^-1 for a symmetric semi-definite gram, in float64."""
    gram = gram.double()
    gram = (gram + gram.t()) / 2
    gram.diagonal().add_(1e-12 * gram.diagonal().mean() + torch.finfo(torch.float64).tiny)
    solved: Tensor = torch.linalg.solve(gram, target.double().t())
    return solved.t().to(target.dtype)


def _nearest_semidefinite(matrix: Tensor) -> Tensor:
    """Symmetric part with negative eigenvalues, which are rounding, set to zero; the sign makes the trace positive."""
    matrix = (matrix + matrix.t()).double() / 2
    matrix = matrix * (-1 if matrix.trace() < 0 else 1)
    values, vectors = torch.linalg.eigh(matrix)
    result: Tensor = (vectors * values.clamp(min=0)) @ vectors.t()
    return result


def _roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Square root and inverse square root of a semi-definite matrix, slightly damped, in float64."""
    values, vectors = torch.linalg.eigh(matrix.double())
    damped = values.clamp(min=0) + _ROOT_DAMPING * values.clamp(min=0).mean()
    return (vectors * damped.sqrt()) @ vectors.t(), (vectors / damped.sqrt()) @ vectors.t()
