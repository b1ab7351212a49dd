"""Kronecker components of what holding the base in few bits loses, W - Q(W); nothing is subtracted.

LoftQ (arXiv:2310.08659) and SVDQuant (arXiv:2411.05007) take up the error of a quantised weight in low-rank factors, so
that the model starts nearer to the full one; here in Kronecker terms. Differs from LoftQ, which quantises again and
again what its factors leave over: Q(W) is that of the weight, so that every adapter of one quantised base has the same.
Differs from both by the inputs' metric, as in LQER (arXiv:2402.02446): see `[[adapt]] calibration_batches`.

The terms add to Q(W) and not to W, where they would be an error. So the stored adapter says which base it is for
(`soka_serve.adapter.format`, `soka_quantize`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from soka_serve.starts.start import Material, Start

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Quantisation(Start):
    """What quantising the base's weight loses."""

    meaning: ClassVar[str] = "components of what base.quantize loses of the weight; right on the quantised base only"
    told: ClassVar[str] = (
        "the strongest Kronecker components of what quantising the base loses, so the untrained adapter brings the "
        "quantised model nearer to the full one"
    )
    spectrum_of: ClassVar[str] = "the quantisation error"
    calibrated: ClassVar[bool] = True
    subtracted: ClassVar[bool] = False
    changes: ClassVar[bool] = True
    on_quantised: ClassVar[bool] = True

    def matrix(self, material: Material) -> Tensor:
        assert material.held is not None
        return material.weight.float().sub(material.held)
