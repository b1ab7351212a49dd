"""Principal Kronecker components of the weight (arXiv:2506.15251).

The base is never rewritten: the adapter is K(theta) - K(theta0), so it is zero at step 0 in every dtype. Differs from
the paper, which freezes W - K(theta0): same function and gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from soka_serve.starts.start import Start


@dataclass(frozen=True)
class Weights(Start):
    """The paper's start, in the metric of the inputs where batches calibrate it."""

    meaning: ClassVar[str] = "principal Kronecker components of the weight"
    told: ClassVar[str] = (
        "the strongest Kronecker components of the base weight. What they are worth at the start is subtracted again, "
        "so the untrained adapter changes nothing"
    )
    calibrated: ClassVar[bool] = True
