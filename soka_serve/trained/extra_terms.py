"""Further terms beside those of the start: `extra_terms = E` trains E terms more, which start at a delta of zero.

SALT (arXiv:2503.16055) trains sigma' = alpha * sigma + beta of a weight's leading singular values and adds a low-rank
update X Y. Its alpha and beta have an entry per singular value, so sigma' is any vector, as where sigma itself is
trained: `train_factors = ["sigma"]` with `extra_terms` is SALT on Kronecker terms, but for the step sizes of alpha and
beta. Left starts random and Right at zero, as in KronA (arXiv:2212.10650), with Left and sigma as large as the other
terms', whose learning rates they have.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from soka_serve.trained.row import PARTS, Part, RuleFacts, Trained

if TYPE_CHECKING:
    from torch import Tensor

    from soka_serve.kron import Factors
    from soka_serve.kron.shapes import FactorShape


MOST_EXTRA_TERMS = 1024  # as many as a core takes; a delta of 4096 x 4096 has 4096 terms at most


class ExtraTerms(Trained):
    """Terms of their own."""

    key: ClassVar[str] = "extra_terms"
    tensors: ClassVar[tuple[str, ...]] = tuple(f"extra_{part}" for part in PARTS)
    needs_trained: ClassVar[str] = "right"

    def problem(self, value: Any) -> str | None:
        is_count = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_EXTRA_TERMS
        return None if is_count else f"expected a whole number from 0 to {MOST_EXTRA_TERMS}"

    def misfits(self, value: Any, rule: RuleFacts) -> Iterator[tuple[str, str]]:
        if rule.policy == "budget":
            yield self.key, "extra_terms does not go with policy = 'budget', which does not pay for them"

    def parts(self, value: Any, rank: int, shape: FactorShape) -> dict[str, Part]:
        m, n, p, q = shape
        sizes = ((value, m, n), (value, p, q), (value,))
        return {f"extra_{part}": Part(size, part, rank + value) for part, size in zip(PARTS, sizes, strict=True)}

    def start(self, value: Any, terms: Factors) -> dict[str, Tensor]:
        from soka_serve.kron.factors import random_terms

        left, right, sigma = map(_size, (terms.left, terms.right, terms.sigma))
        made = random_terms(value, terms.shape, sigma or 1 / math.sqrt(terms.shape.in_features), zero=True)
        made = replace(made, left=made.left * (left or right or 1.0)).to(terms.sigma.dtype, terms.sigma.device)
        return {f"extra_{part}": getattr(made, part) for part in PARTS}

    def apply(self, value: Any, terms: Factors, parts: Mapping[str, Tensor]) -> Factors:
        from soka_serve.kron import Factors, stack_terms

        return stack_terms(terms, Factors(*(parts[f"extra_{part}"] for part in PARTS)))

    def added(self, value: Any) -> int:
        return int(value)


def _size(values: Tensor) -> float:
    """Root mean square; 0 of a tensor without memory."""
    return 0.0 if values.is_meta else float(values.detach().square().mean().sqrt())
