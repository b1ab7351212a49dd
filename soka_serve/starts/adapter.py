"""The terms of a finished adapter, SoKA's or PEFT's LoKr: training goes on from its delta, and nothing is subtracted.

LoKr (arXiv:2309.14859) has one term per module. Ranks and factor shapes are the adapter's. Its terms are made
orthogonal, which leaves the delta as it is to rounding, so that their number is the least and energies add up.
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
class Adapter(Start):
    """What an earlier training changed."""

    meaning: ClassVar[str] = "the terms of a finished adapter (SoKA's, or PEFT's LoKr), to go on from"
    told: ClassVar[str] = "the terms of a finished adapter, whose change of the model training goes on from"
    spectrum_of: ClassVar[str] = "the earlier adapter's change"
    source: ClassVar[str | None] = "adapter"
    source_is: ClassVar[str] = "the folder of the finished adapter"
    subtracted: ClassVar[bool] = False
    changes: ClassVar[bool] = True
    unweighed: ClassVar[str] = "nothing is decomposed"
    given: ClassVar[str] = "ranks and factor shapes are the adapter's"

    def decompose(
        self, matrix: Tensor, shape: FactorShape, count: int, seed: int, terms: Factors | None = None
    ) -> Decomposition:
        from torch import float32, float64

        from soka_serve.kron import recompress
        from soka_serve.kron.decompose import Decomposition

        assert terms is not None
        found = recompress(terms.to(float64), rtol=1e-7)[0]
        return Decomposition(found.to(float32), float(found.sigma.square().sum()))
