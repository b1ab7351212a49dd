"""KaSA: knowledge-aware singular values, the regulariser of their size (arXiv:2412.06071).

Semantics: mean over the modules of the sum over k of (s[k] - s0[k])^2, with s = sqrt(m n p q) sigma, the singular
values beside factors of norm 1, and s0 those at the start where the initial factors are subtracted, zero elsewhere.

KaSA's singular values are those of an update that starts small. Where K(theta) - K(theta0) is added to the weight, its
counterpart is how far the values have moved: with sigma at zero the model would be at W - K(theta0).

KaSA's other regulariser, of orthogonality, sums both norms of a module and takes the mean over modules, so that KaSA's
gamma is half of what `sorsa` takes. Its third part, a base without its smallest singular components, is a start
(`soka_serve.starts.truncated`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from soka_serve.regularisers.regulariser import Penalty, orthonormal_size

if TYPE_CHECKING:
    from torch import Tensor

    from soka_serve.kron import Factors


class Kasa(Penalty):
    """beta * mean over modules of ||s - s0||^2."""

    meaning: ClassVar[str] = (
        "KaSA's beta, on the mean over modules of the squared norm of s − s₀: s is sigma beside factors of norm 1, s₀ "
        "its start where that is subtracted. Beside `sorsa`, which holds Left and Right, it keeps deltas small; "
        "`sorsa` is KaSA's gamma, at twice the number."
    )
    needs_sigma: ClassVar[bool] = True
    trains: ClassVar[Sequence[str]] = ("sigma",)

    def penalty(self, modules: Sequence[tuple[Factors, Factors | None]]) -> Tensor:
        from torch import stack

        return stack([_energy(theta, initial) for theta, initial in modules]).mean()


def _energy(theta: Factors, initial: Factors | None) -> Tensor:
    moved = theta.sigma if initial is None else theta.sigma - initial.sigma.to(theta.sigma.dtype)
    return (moved * orthonormal_size(theta)).square().sum()
