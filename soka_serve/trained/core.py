"""A trained core between frozen factors: `core = true` trains the r x r matrix N of sum_jk N[j, k] Left_j x Right_k.

NLoRA's IntTune (arXiv:2502.14482) trains the matrix between the two outer ones of a Nystrom approximation; SVFT
(arXiv:2405.19597) the one between a weight's singular vectors. Here it lies between the Left and the Right factors of r
Kronecker terms, and starts as diag(sigma). What is kept and trained is N - diag(sigma), which starts at zero: the same
steps with every optimiser that does not look at a parameter's own size, and a delta that is zero at the start. The sum
over k is one factor: sum_j Left_j x (sum_k N[j, k] Right_k) has r terms, and so has the difference from the start.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from soka_serve.trained.row import PARTS, Part, RuleFacts, Trained

if TYPE_CHECKING:
    from torch import Tensor

    from soka_serve.kron import Factors
    from soka_serve.kron.shapes import FactorShape


class Core(Trained):
    """An r x r matrix."""

    key: ClassVar[str] = "core"
    tensors: ClassVar[tuple[str, ...]] = ("core",)

    most_terms: ClassVar[int | None] = 1024  # whoever reads an adapter in training multiplies r x r values by Right

    def problem(self, value: Any) -> str | None:
        return None if isinstance(value, bool) else "expected true or false"

    def misfits(self, value: Any, rule: RuleFacts) -> Iterator[tuple[str, str]]:
        start, zero = rule.start, rule.start.needs_trained
        if zero:
            yield self.key, f"core does not go with {start.written}, which starts {zero} at zero: nothing would change"
        if "train_factors" in rule.chosen:
            yield "train_factors", "train_factors does not go with core, which is trained in place of all factors"
        if self.most_terms and rule.terms > self.most_terms:
            yield "rank", f"core takes {self.most_terms} terms at most, not {rule.terms}"
        if rule.policy == "budget":
            yield "rank", "policy = 'budget' does not go with core, of r x r parameters: no term has a price of its own"

    def frozen(self, value: Any) -> frozenset[str]:
        return frozenset(PARTS if value else ())

    def parts(self, value: Any, rank: int, shape: FactorShape) -> dict[str, Part]:
        return {"core": Part((rank, rank), "sigma", rank * rank)} if value else {}

    def start(self, value: Any, terms: Factors) -> dict[str, Tensor]:
        sigma = terms.sigma
        return {"core": sigma.new_zeros(len(sigma), len(sigma))} if value else {}

    def apply(self, value: Any, terms: Factors, parts: Mapping[str, Tensor]) -> Factors:
        if not value:
            return terms
        from torch import autocast, ones_like

        from soka_serve.kron import Factors

        with autocast(terms.right.device.type, enabled=False):
            mixed = (parts["core"] @ terms.right.flatten(1)).view_as(terms.right)
        right = terms.sigma[:, None, None] * terms.right + mixed
        return Factors(terms.left, right, ones_like(terms.sigma))
