"""What is trained of one module: rows of the registry, each with a value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

from soka_serve.kron.shapes import FactorShape
from soka_serve.trained.core import Core
from soka_serve.trained.extra_terms import ExtraTerms
from soka_serve.trained.row import PARTS, Part, Trained
from soka_serve.trained.train_factors import TrainFactors

if TYPE_CHECKING:
    from torch import Tensor

    from soka_serve.kron import Factors

TRAINED: dict[str, Trained] = {row.key: row for row in (TrainFactors(), Core(), ExtraTerms())}
"""By the key that `[[adapt]]` has for it, in the order in which terms go through them."""

TENSORS = tuple(name for row in TRAINED.values() for name in row.tensors)
"""Names of all tensors that rows add to left, right and sigma."""


@dataclass(frozen=True)
class Form:
    """What is trained of a module's terms; without choices everything is.

    Args:
        choices: values by key of `TRAINED`, as an adapter's config has them.
    """

    choices: Mapping[str, Any] = field(default_factory=dict)

    @property
    def frozen(self) -> frozenset[str]:
        """Which of left, right and sigma stay as they start."""
        return frozenset().union(*(row.frozen(value) for row, value in self._rows))

    @property
    def _rows(self) -> list[tuple[Trained, Any]]:
        """The rows that are chosen, in the registry's order, with their values."""
        return [(row, self.choices[key]) for key, row in TRAINED.items() if key in self.choices]

    def spec(self) -> dict[str, Any]:
        """What `soka_modules` of an adapter says of it: nothing where everything is trained."""
        return {"trained": dict(self.choices)} if self.choices else {}

    def parameters(self, rank: int, shape: FactorShape) -> int:
        """Trained parameters of `rank` terms; without choices r(mn + pq + 1)."""
        return self.trained_factors(rank, shape) + sum(prod(p.size) for p in self.parts(rank, shape).values())

    def trained_factors(self, rank: int, shape: FactorShape) -> int:
        """Trained values of left, right and sigma alone."""
        sizes = dict(zip(PARTS, (shape.m * shape.n, shape.p * shape.q, 1), strict=True))
        return rank * sum(size for part, size in sizes.items() if part not in self.frozen)

    def parts(self, rank: int, shape: FactorShape) -> dict[str, Part]:
        """The tensors beside left, right and sigma, by name; all of them are trained."""
        found: dict[str, Part] = {}
        for row, value in self._rows:
            found |= row.parts(value, rank, shape)
        return found

    def sizes(self, rank: int, shape: FactorShape) -> dict[str, tuple[int, ...]]:
        """The sizes of all tensors of a module, by name."""
        m, n, p, q = shape
        own = dict(zip(PARTS, ((rank, m, n), (rank, p, q), (rank,)), strict=True))
        return own | {name: part.size for name, part in self.parts(rank, shape).items()}

    @property
    def rates(self) -> frozenset[str]:
        """The factors whose learning rates something has that is trained."""
        likes = {part.like for part in self.parts(1, FactorShape(1, 1, 1, 1)).values()}
        return frozenset(PARTS) - self.frozen | likes

    def start(self, terms: Factors) -> dict[str, Tensor]:
        """The values at the start of the tensors beside left, right and sigma, by name."""
        found: dict[str, Tensor] = {}
        for row, value in self._rows:
            found |= row.start(value, terms)
        return found

    def apply(self, terms: Factors, parts: Mapping[str, Tensor]) -> Factors:
        """The terms with what the tensors beside left, right and sigma make of them. See `Trained.apply`."""
        for row, value in self._rows:
            terms = row.apply(value, terms, parts)
        return terms

    def delta(self, theta: Factors, initial: Factors | None, parts: Mapping[str, Tensor]) -> Factors:
        """The terms of the whole change in float32, worked out in float64.

        Args:
            theta: left, right and sigma.
            initial: those to subtract, if any.
            parts: the tensors beside left, right and sigma, by name.
        """
        from torch import float32, float64

        from soka_serve.kron.factors import subtract_terms

        terms = theta.to(float64)
        if initial is not None:
            terms = subtract_terms(terms, initial.to(float64))
        return self.apply(terms, {name: part.double() for name, part in parts.items()}).to(float32)

    def served(self, rank: int, *, subtracted: bool) -> int:
        """Most terms of the delta of `rank` trained terms, from which as many starting ones may be subtracted."""
        added = sum(row.added(value) for row, value in self._rows)
        return rank * (2 if subtracted and not self.frozen & {"left", "right"} else 1) + added


PLAIN = Form()


def form_problem(choices: object, rank: int = 1) -> str | None:
    """What is wrong with the choices of a form that a file or a caller says for `rank` terms; None where nothing is."""
    if not isinstance(choices, Mapping):
        return f"expected an object, got {choices!r:.80}"
    for key, value in choices.items():
        if key not in TRAINED:
            return f"unknown key {key!r:.80}; this version reads {', '.join(TRAINED)}"
        if (problem := TRAINED[key].problem(value)) is not None:
            return f"{key}: {problem}; got {value!r:.80}"
        if (most := TRAINED[key].most_terms) is not None and rank > most:
            return f"{key}: takes {most} terms at most, not {rank}"
    return None
