"""Kronecker components of the weight from samples of R(W)'s rows and columns, without an SVD of it.

As NLoRA (arXiv:2502.14482) starts from W ~ C U^+ R, with C and R the first columns and rows of W and U where they
cross; here on R(W), for Kronecker terms. Differs from it: rows and columns are drawn by the build's seed, more of them
than terms, and the core between them is the one that fits best (one product with R(W)) and not the inverse of U, which
blows up where U is near to singular. So sigma says what each term captures. K(theta) - K(theta0) as for 'weights'.

What samples capture of a slow spectrum is a small part of what as many principal terms do: 1% to 34%
(eval/results/kpsvd_starts.json).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from soka_serve.starts.start import Start

if TYPE_CHECKING:
    from torch import Tensor

    from soka_serve.kron import Factors
    from soka_serve.kron.decompose import Decomposition
    from soka_serve.kron.shapes import FactorShape


@dataclass(frozen=True)
class Nystrom(Start):
    """Sampled terms."""

    meaning: ClassVar[str] = "components of the weight from a sample of its rearrangement's rows and columns, no SVD"
    told: ClassVar[str] = (
        "Kronecker components of the base weight, found in a sample of its rows and columns. What they are worth at "
        "the start is subtracted again, so the untrained adapter changes nothing"
    )
    spectrum_of: ClassVar[str] = "what a sample holds of the weight"
    unweighed: ClassVar[str] = "a sample is taken of the weight alone"

    def decompose(
        self, matrix: Tensor, shape: FactorShape, count: int, seed: int, terms: Factors | None = None
    ) -> Decomposition:
        from soka_serve.kron.decompose import sampled_kpsvd

        return sampled_kpsvd(matrix, shape, count, seed=seed)
