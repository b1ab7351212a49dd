"""Right factors that are never trained: the two-dimensional cosines that align best with the first full gradient.

A low-rank optimiser (arXiv:2505.17967) projects a layer's gradients onto those columns of a fixed cosine matrix that
align best with them, where GaLore takes an SVD. Here the atoms a are those of the p x q type-II cosine transform, an
orthonormal basis of all Right factors, |R(G) a| says how much of the gradient G lies along one, and the r largest
become Right, once. Left starts at zero, so that the delta does, and its first gradient is sigma R(G) a. Nothing is
subtracted, and the adapter has r terms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from soka_serve.starts.gradient import Gradient
from soka_serve.starts.start import Pool

if TYPE_CHECKING:
    from torch import Tensor

    from soka_serve.kron import Factors
    from soka_serve.kron.decompose import Decomposition
    from soka_serve.kron.shapes import FactorShape


@dataclass(frozen=True)
class Dct(Gradient):
    """Atoms of the cosine transform."""

    meaning: ClassVar[str] = "Right fixed to the cosine atoms that align best with the first gradient, Left zero"
    told: ClassVar[str] = (
        "cosine atoms that align best with the first full gradient as Right, and Left zero, so the untrained adapter "
        "changes nothing"
    )
    spectrum_of: ClassVar[str] = "the first gradient along cosine atoms"
    subtracted: ClassVar[bool] = False
    needs_trained: ClassVar[str] = "left"
    frozen: ClassVar[tuple[str, ...]] = ("right",)
    terms_per_rank: ClassVar[int] = 1

    @property
    def written(self) -> str:
        return f"right = {self.name!r}"

    def decompose(
        self, matrix: Tensor, shape: FactorShape, count: int, seed: int, terms: Factors | None = None
    ) -> Decomposition:
        from soka_serve.kron import Factors
        from soka_serve.kron.decompose import Decomposition
        from soka_serve.kron.factors import rearrange

        m, n, p, q = shape
        rows, columns = (cosines(size).to(matrix.device) for size in (p, q))
        values = rearrange(matrix.float(), shape)
        along = (rows @ values.view(m * n, p, q) @ columns.t()).view(m * n, p * q)
        best = along.norm(dim=0).sort(descending=True, stable=True)
        chosen = best.indices[:count]
        sigma = best.values[:count]
        left = (along[:, chosen] / sigma.clamp_min(1e-30)).t().reshape(-1, m, n)
        right = rows[chosen // q][:, :, None] * columns[chosen % q][:, None, :]
        return Decomposition(Factors(left, right, sigma), float(values.double().square().sum()))

    def factors(self, pool: Pool, rank: int) -> Factors:
        from torch import ones, zeros_like

        from soka_serve.kron import Factors

        found = pool.terms(range(rank), range(rank))
        atoms = Factors(zeros_like(found.left), found.right, ones(rank)).with_unit_rms()
        return Factors(atoms.left, atoms.right, ones(rank)).with_size(pool.size) if rank else found


def cosines(size: int) -> Tensor:
    """The orthonormal type-II cosine transform: (size, size), float32, a row for each frequency.

    Semantics: C[u, a] = sqrt(2 / size) cos(pi u (a + 1/2) / size), and sqrt(1 / size) for u = 0.
    """
    import torch

    frequencies, places = torch.arange(size).double(), torch.arange(size).double() + 0.5
    found = torch.cos(math.pi / size * frequencies[:, None] * places) * math.sqrt(2 / size)
    found[0] /= math.sqrt(2)
    return found.float()
