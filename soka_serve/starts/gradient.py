"""Components of the first full gradient, Left and Right from different ones; K(theta) - K(theta0) again."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from soka_serve.errors import PlanError
from soka_serve.starts.start import Material, Pool, Start

if TYPE_CHECKING:
    from torch import Tensor

    from soka_serve.kron import Factors

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Gradient(Start):
    """Left from the gradient's term k, Right from its term k + rank, all of one size.

    The first update of Left then adds left[k + rank] x right[k + rank] to the delta, and that of Right adds
    left[k] x right[k]: together the best approximation of the gradient by 2 rank terms (LoRA-GA, arXiv:2407.05000,
    has the same for matrix ranks). From one term for both, they would add the same one twice.
    """

    meaning: ClassVar[str] = "components of the first gradient"
    told: ClassVar[str] = "the strongest Kronecker components of the first full gradient"
    spectrum_of: ClassVar[str] = "the first gradient"
    needs_gradient: ClassVar[bool] = True
    calibrated: ClassVar[bool] = True
    terms_per_rank: ClassVar[int] = 2

    def matrix(self, material: Material) -> Tensor:
        assert material.gradient is not None
        return material.gradient

    def check(self, module: str, sigma: Sequence[float]) -> None:
        if not (sigma and sigma[0] > 0):
            raise PlanError(
                f"{module}: the gradient over the calibration batches is zero",
                hint="Check that the completions are not empty (an expert may get no token), or use init = 'weights'.",
            )

    def factors(self, pool: Pool, rank: int) -> Factors:
        from torch import ones

        from soka_serve.kron import Factors

        period = min(2 * rank, len(pool.sigma))
        if period < 2 * rank:
            logger.info("%s: the gradient has %d terms; %d were asked for", pool.module, period, 2 * rank)
        found = pool.terms(range(rank), [(k + rank) % period for k in range(rank)])
        found = Factors(found.left, found.right, ones(rank)).with_unit_rms()
        return found.with_size(pool.size) if rank else found
