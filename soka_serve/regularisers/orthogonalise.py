"""Terms made orthogonal again every so many steps, as FedSVD does with LoRA's factors (arXiv:2505.12805).

Semantics: the terms of theta are replaced by the Kronecker SVD of their sum, which is as many orthogonal terms with the
same delta. Sigma descends, and all terms of left have the root mean square that left had over all of its terms, and
right alike: the rates are shares of what factors have become, and of entries of 1 a step would be a much larger one. A
delta of zero stays as it is.

The optimiser's averages begin again at zero, as at its first step. First averages would follow the change exactly,
since gradients do so linearly; averages of squares would not, and a step of the two is not bounded by the rate.
Differs from FedSVD, where a server does it between rounds and keeps the singular values in one of two factors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from soka_serve.regularisers.regulariser import Rewrite

if TYPE_CHECKING:
    from torch import Tensor

    from soka_serve.kron import Factors


class Orthogonalise(Rewrite):
    """The Kronecker SVD of theta in place of its terms."""

    meaning: ClassVar[str] = (
        "Steps between two replacements of each module's terms by the Kronecker SVD of their sum, which is the same "
        "delta (FedSVD); AdamW's averages begin anew. The history has the mean largest cosine of two terms before it."
    )

    def rewritten(self, theta: Factors) -> tuple[Factors, Tensor]:
        from torch import linalg, stack

        from soka_serve.kron.factors import Factors, from_vectors

        lefts, rights = (t.double().flatten(1).t() for t in (theta.left, theta.right))
        cosine = stack([_largest_cosine(lefts), _largest_cosine(rights)]).mean()
        left_basis, left_core = linalg.qr(lefts * theta.sigma.double())
        right_basis, right_core = linalg.qr(rights)
        left, sigma, right = linalg.svd(left_core @ right_core.t())
        if not sigma[0] > 0:
            return theta, cosine
        terms = from_vectors(left_basis @ left, right_basis @ right.t(), sigma, theta.shape).with_unit_rms()
        sizes = [t.double().square().mean().sqrt() for t in (theta.left, theta.right)]
        found = Factors(terms.left * sizes[0], terms.right * sizes[1], terms.sigma / (sizes[0] * sizes[1]))
        return found.to(theta.left.dtype), cosine


def _largest_cosine(columns: Tensor) -> Tensor:
    """The largest |cosine| of two of the columns (size, r); 0 of a single one, and beside columns of zeros."""
    units = columns / columns.norm(dim=0).clamp_min(1e-300)
    largest: Tensor = (units.t() @ units).abs().fill_diagonal_(0.0).max()
    return largest
