"""Some of the factors alone: `train_factors = ["sigma"]` trains one number per term.

SVFit (arXiv:2409.05926) and CLIP-SVD (arXiv:2509.03740) train the singular values of a weight's SVD and freeze its
vectors; here they are those of its Kronecker terms. What a module's terms share with those that are subtracted is not
stored twice: with Left and Right frozen the delta is (sigma - sigma0) Left x Right, of r terms.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from soka_serve.trained.row import PARTS, RuleFacts, Trained


class TrainFactors(Trained):
    """Left, right and sigma, or some of them."""

    key: ClassVar[str] = "train_factors"

    def problem(self, value: Any) -> str | None:
        known = isinstance(value, list | tuple) and value and all(part in PARTS for part in value)
        return None if known and len(set(value)) == len(value) else f"expected some of {', '.join(PARTS)}, each once"

    def misfits(self, value: Any, rule: RuleFacts) -> Iterator[tuple[str, str]]:
        zero = rule.start.needs_trained
        if zero and zero not in value:
            yield self.key, f"{zero} is missing, which {rule.start.written} starts at zero: nothing would ever change"

    def frozen(self, value: Any) -> frozenset[str]:
        return frozenset(PARTS) - frozenset(value)
