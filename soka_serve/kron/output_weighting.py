"""Weighing a decomposition by what the loss makes of a layer's outputs, beside what the layer's inputs are.

To second order in an error E of the weight, the loss changes by E[(g^T E x)^2] / 2, with x the inputs and g the loss's
gradient by the outputs (the empirical Fisher). With x and g taken as independent (K-FAC, arXiv:1503.05671) that is
tr(D E C E^T), C = E[x x^T] as in `weighting` and D = E[g g^T]. With D taken as a Kronecker product D1 kron D2, which
keeps Kronecker terms, it is the problem of C alone for the weight (D1 kron D2)^(1/2) W; roots taken out of its
solution's left sides again give the solution here. For plain low rank: FWSVD (arXiv:2207.00112), with a diagonal D, and
GFWSVD (arXiv:2505.17974).
"""

from __future__ import annotations

import torch
from torch import Tensor

from soka_serve.kron.factors import Factors
from soka_serve.kron.shapes import FactorShape

_DAMPING = 0.1  # of the mean eigenvalue: fewer tokens tell of gradients than of inputs
_COLUMNS = 256


class OutputMoments:
    """The second moment of the gradients of a layer's outputs, as a Kronecker product of (m, m) and (p, p).

    With G = g as (m, p), the two are E[G G^T] and E[G^T G], scaled to a mean diagonal of 1: up to scale the factors of
    D where it is a Kronecker product.

    Args:
        shape: of the factors of the weight's terms.
    """

    def __init__(self, shape: FactorShape) -> None:
        self.shape = shape
        self.tokens = 0
        self._sums = [torch.zeros(size, size) for size in (shape.m, shape.p)]

    @torch.no_grad()
    def accumulate(self, gradients: Tensor) -> None:
        """Add gradients (..., out), any floating dtype, on their device; summed in float32.

        Raises:
            ValueError: the last dimension is not out, or a value is not finite.
        """
        m, p = self.shape.m, self.shape.p
        if gradients.shape[-1] != m * p:
            raise ValueError(f"expected gradients (..., {m * p}); got {tuple(gradients.shape)}")
        by_row = gradients.float().reshape(-1, m, p)
        if not bool(by_row.square().sum().isfinite()):
            raise ValueError("expected finite gradients; got NaN, infinity or values whose squares overflow")
        self._sums = [total.to(by_row.device) for total in self._sums]
        for total, sides in zip(
            self._sums, (by_row.transpose(1, 2).reshape(-1, m), by_row.reshape(-1, p)), strict=True
        ):
            total.addmm_(sides.t(), sides)
        self.tokens += len(by_row)

    def mean_square(self) -> float:
        """Of the gradients' values. Raises ValueError: none were accumulated."""
        if not self.tokens:
            raise ValueError("no gradients were accumulated; their mean square is undefined")
        return float(self._sums[0].trace()) / (self.tokens * self.shape.out_features)

    def weigh(self, weight: Tensor) -> Tensor:
        """(D1 kron D2)^(1/2) W for a weight (out, in): float32, in memory of its own."""
        m, p = self.shape.m, self.shape.p
        (first, second) = (root.to(weight.device) for root in self._roots(0.5))
        weighed = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
        for columns, into in zip(torch.split(weight, _COLUMNS, 1), torch.split(weighed, _COLUMNS, 1), strict=True):
            into.copy_(torch.einsum("ij,ab,jbk->iak", first, second, columns.float().reshape(m, p, -1)).flatten(0, 1))
        return weighed

    def take_out(self, factors: Factors) -> Factors:
        """The terms of the weight itself, from terms of the weighed one; each side of them has norm 1."""
        first, second = (root.to(factors.left) for root in self._roots(-0.5))
        left, right, sigma = first @ factors.left, second @ factors.right, factors.sigma
        for norms in (left.flatten(1).norm(dim=1), right.flatten(1).norm(dim=1)):
            sigma = sigma * norms
        return Factors(_unit(left), _unit(right), sigma)

    def _roots(self, power: float) -> list[Tensor]:
        roots = []
        for total in self._sums:
            values, vectors = torch.linalg.eigh(total.double())
            mean = values.mean()
            values = (values.clamp(min=0) / mean + _DAMPING) / (1 + _DAMPING) if mean > 0 else torch.ones_like(values)
            roots.append(((vectors * values**power) @ vectors.t()).float())
        return roots


def _unit(parts: Tensor) -> Tensor:
    """Matrices (r, x, y), each over its norm; zeros stay."""
    norms: Tensor = parts.flatten(1).norm(dim=1)
    return parts / torch.where(norms > 0, norms, 1.0)[:, None, None]
