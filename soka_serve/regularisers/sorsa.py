"""SORSA: factors stay orthonormal, so that their size moves into sigma (arXiv:2409.00055).

Semantics: mean over all matrices V of ||V^T V - I||_F, with V the columns vec(left[k]) / sqrt(m n) of a module, or
vec(right[k]) / sqrt(p q).

The paper's singular vectors have norm 1 at the start. Here entries of a factor have a root mean square of 1, so a
factor of m n entries has norm sqrt(m n) at the start: the constant division makes it 1. Columns are not normalised
again later, since the norm that they grow to is what the term counts beside their angles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from soka_serve.regularisers.regulariser import Penalty

if TYPE_CHECKING:
    from torch import Tensor

    from soka_serve.kron import Factors


class Sorsa(Penalty):
    """gamma * mean(||L^T L - I||, ||R^T R - I||)."""

    meaning: ClassVar[str] = (
        "SORSA's gamma, on the mean norm of VᵀV − I over the matrices V of Left, and of Right, factors of a module, as "
        "columns of norm 1 at the start. It keeps the terms of a module orthogonal, and their size in sigma."
    )
    needs_sigma: ClassVar[bool] = True
    trains: ClassVar[Sequence[str]] = ("left", "right")
    unit_factors: ClassVar[bool] = True

    def penalty(self, modules: Sequence[tuple[Factors, Factors | None]]) -> Tensor:
        from torch import stack

        return stack([_gap(factor) for theta, _ in modules for factor in (theta.left, theta.right)]).mean()


def _gap(factor: Tensor) -> Tensor:
    """||V^T V - I||_F for a factor (r, a, b)."""
    from torch import eye, linalg

    columns = factor.flatten(1) / math.sqrt(factor[0].numel())
    gram = columns @ columns.t()
    gap: Tensor = linalg.matrix_norm(gram - eye(len(gram), dtype=gram.dtype, device=gram.device))
    return gap
