"""Terms from zero beside a weight without its smallest Kronecker components: KaSA's start (arXiv:2412.06071).

KaSA takes the r smallest singular components off the base, as noise, and trains r new ones. Here they are the last
terms of R(W), as many as are trained. The base stays as it is: the adapter is K(theta) - K(cut), with the cut terms
frozen, so that it changes the model from the start, and is stored and served with 2r terms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from soka_serve.starts.minor import Minor
from soka_serve.starts.random import Zero

if TYPE_CHECKING:
    from torch import Tensor

    from soka_serve.kron import Factors
    from soka_serve.kron.decompose import Decomposition
    from soka_serve.kron.shapes import FactorShape
    from soka_serve.starts.start import Pool


@dataclass(frozen=True)
class Truncated(Zero):
    """Left random, Right zero; the weight's smallest components are taken off."""

    meaning: ClassVar[str] = (
        "as 'zero', with as many of the weight's smallest Kronecker components taken off it (KaSA; a fixed rank)"
    )
    told: ClassVar[str] = (
        "factors of which one is zero. As many of the weakest Kronecker components of the base weight are taken off, "
        "and stay off"
    )
    spectrum_of: ClassVar[str] = Minor.spectrum_of
    unweighed: ClassVar[str] = Minor.unweighed
    fixed_rank: ClassVar[str] = Minor.fixed_rank
    fixed_shape: ClassVar[str] = Minor.fixed_shape
    drawn: ClassVar[bool] = False
    cuts: ClassVar[bool] = True

    def decompose(
        self, matrix: Tensor, shape: FactorShape, count: int, seed: int, terms: Factors | None = None
    ) -> Decomposition:
        from soka_serve.kron.decompose import minor_kpsvd

        return minor_kpsvd(matrix, shape, count)

    def cut(self, pool: Pool, rank: int) -> Factors | None:
        return pool.terms(range(rank), range(rank)).with_unit_rms()
