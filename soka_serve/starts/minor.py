"""The smallest Kronecker components of the weight: what pretraining used least.

MiLoRA (arXiv:2406.09044) and SoMA (arXiv:2412.04077) train the smallest singular components of a weight, so that what
the large ones hold stays; here they are terms of R(W), and the adapter is K(theta) - K(theta0). Differs from MiCA
(arXiv:2604.01694), which freezes the left vectors (`left_lr = 0` does) and starts the right ones at zero. SoMA lets the
weight decay fade, as `[train] weight_decay_schedule` does.

The tail is exact: a full SVD of R(W), since a randomised range finder only finds what is large. Terms have the size
that `scale` says and their ratios from the spectrum, as the principal ones do.
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
class Minor(Start):
    """The last terms of the KPSVD."""

    meaning: ClassVar[str] = "the smallest Kronecker components of the weight"
    told: ClassVar[str] = (
        "the weakest Kronecker components of the base weight. What they are worth at the start is subtracted again, "
        "so the untrained adapter changes nothing"
    )
    spectrum_of: ClassVar[str] = "the weakest part of the weight"
    unweighed: ClassVar[str] = "in the inputs' metric terms are found from the strongest on, and the last are not exact"
    fixed_rank: ClassVar[str] = "the other policies count the energy of the strongest terms"
    fixed_shape: ClassVar[str] = "the search asks which shape's strongest terms hold most"

    @property
    def written(self) -> str:
        return f"components = {self.name!r}"

    def decompose(
        self, matrix: Tensor, shape: FactorShape, count: int, seed: int, terms: Factors | None = None
    ) -> Decomposition:
        from soka_serve.kron.decompose import minor_kpsvd

        return minor_kpsvd(matrix, shape, count)
