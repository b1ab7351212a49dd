"""Random factors: what is decomposed decides the ranks only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from soka_serve.starts.start import Pool, Start

if TYPE_CHECKING:
    from soka_serve.kron import Factors


@dataclass(frozen=True)
class Random(Start):
    """Both factors random; K(theta) - K(theta0)."""

    meaning: ClassVar[str] = "both factors random (to compare with)"
    told: ClassVar[str] = (
        "random factors. What they are worth at the start is subtracted again, so the untrained adapter changes nothing"
    )
    unweighed: ClassVar[str] = "nothing is decomposed"
    drawn: ClassVar[bool] = True
    with_zero: ClassVar[bool] = False
    """Right is zero."""

    def factors(self, pool: Pool, rank: int) -> Factors:
        from torch import Generator

        from soka_serve.kron.factors import random_terms

        generator = Generator().manual_seed(pool.seed)
        return random_terms(rank, pool.shape, pool.size, generator, zero=self.with_zero)


@dataclass(frozen=True)
class Zero(Random):
    """Left random, Right zero, as in KronA (arXiv:2212.10650): the delta is zero and nothing is subtracted.

    The default. On a pretrained model it was no worse than principal components of the weights, whose terms take time
    to find and twice the place (docs/training.md).
    """

    meaning: ClassVar[str] = "Left random, Right zero (as in KronA)"
    told: ClassVar[str] = "factors of which one is zero, so the untrained adapter changes nothing"
    subtracted: ClassVar[bool] = False
    with_zero: ClassVar[bool] = True
    needs_trained: ClassVar[str] = "right"
