"""Protection of a weight's principal terms, after OSF (arXiv:2504.07097), with Kronecker terms for singular vectors.

With R the rearrangement, U (m n, K) and V (p q, K) the sides of the K leading terms of R(W), and D = R(delta) what the
adapter adds: U^T D V stays what it is at the start, which is zero where the initial factors are subtracted. That is no
component along any U_i ⊗ V_j for i, j up to K, the K terms themselves among them.

D is a sum over k of sigma[k] vec(left[k]) vec(right[k])^T, so this holds exactly, after any number of steps, where

- left[k] moves in the complement of U, and right[k] in that of V, so that U^T vec(left[k]) = a[k] and
  V^T vec(right[k]) = b[k] are constant;
- sigma moves in the null space of the matrix with the columns vec(a[k] b[k]^T). A term outside of what is protected has
  a column of zeros, and its sigma is free; up to K^2 terms inside keep theirs.

Gradients are projected, so that neither norms nor the optimiser's averages hold what is not used, and so is each step,
since an optimiser that rescales values one by one leads out of a subspace.

Differs from OSF, which also asks U^T D = 0 and D V = 0: no step of a term that starts as a principal one does that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from soka_serve.regularisers.regulariser import Constraint

if TYPE_CHECKING:
    from torch import Tensor

    from soka_serve.kron import Factors
    from soka_serve.kron.shapes import FactorShape

_INSIDE = 1e-6  # of a term's norm: less than that in what is protected is the rounding of float32


@dataclass(frozen=True)
class Complement:
    """What one module's factors may do.

    Args:
        left: (m n, K), orthonormal columns; vec(left[k]) moves in their complement.
        right: (p q, K), alike.
        sigma: (r, r), the projection onto what sigma may do.
    """

    left: Tensor
    right: Tensor
    sigma: Tensor

    def allowed(self, part: str, change: Tensor) -> Tensor:
        if part == "sigma":
            return (self.sigma @ change.to(self.sigma.dtype)).to(change.dtype)
        basis: Tensor = getattr(self, part).to(change.dtype)
        rows = change.flatten(1)
        return (rows - (rows @ basis) @ basis.t()).view_as(change)


class Protect(Constraint):
    """The K leading terms of each weight are protected."""

    meaning: ClassVar[str] = (
        "K: deltas get no component along a weight's K leading Kronecker terms (after OSF): gradients and steps are "
        "projected. The history has the share of the gradient's energy that this removes."
    )
    excludes: ClassVar[Mapping[str, str]] = {"prune": "what sigma may do is worked out for the terms of the start"}

    def misfit(self, shape: FactorShape, count: int) -> str | None:
        most = shape.max_rank
        return None if count < most else f"expected fewer than the {most} terms of the weight; got {count}"

    def guard(self, weight: Tensor, theta: Factors, count: int) -> Complement:
        import torch

        from soka_serve.kron import kpsvd

        if problem := self.misfit(theta.shape, count):
            raise ValueError(problem)
        terms = kpsvd(weight, theta.shape, count).factors
        left, right = terms.left.flatten(1).t(), terms.right.flatten(1).t()
        lefts, rights = (t.double().flatten(1) for t in (theta.left, theta.right))
        inside = torch.einsum("ki,kj->ijk", lefts @ left.double(), rights @ right.double()).flatten(0, 1)
        norms = lefts.norm(dim=1) * rights.norm(dim=1)
        _, sizes, directions = torch.linalg.svd(inside / torch.where(norms > 0, norms, 1.0).max(), full_matrices=False)
        held = directions[sizes > _INSIDE]
        return Complement(left, right, torch.eye(theta.rank, dtype=held.dtype, device=held.device) - held.t() @ held)
