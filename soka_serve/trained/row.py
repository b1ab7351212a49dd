"""What the rest may ask of a row of the registry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from soka_serve.kron import Factors
    from soka_serve.kron.shapes import FactorShape
    from soka_serve.starts import Start

Factor = Literal["left", "right", "sigma"]
PARTS: tuple[Factor, ...] = ("left", "right", "sigma")


class Part(NamedTuple):
    """A tensor that a row trains beside left, right and sigma.

    Args:
        size: of the tensor.
        like: the factor whose learning rate it has; with values of zero its size counts as that of the module's own.
        terms: how many of its terms a step moves together, by whose root the rate is divided.
    """

    size: tuple[int, ...]
    like: Factor
    terms: int


class RuleFacts(NamedTuple):
    """What a row may ask of the rule that it stands in.

    Args:
        start: where the factors start.
        policy: of the ranks, if the rule says one.
        terms: the number of terms, or the most that the policy may give.
        chosen: the keys of the registry that the rule sets.
    """

    start: Start
    policy: str | None
    terms: int
    chosen: frozenset[str]


class Trained:
    """A key of `[[adapt]]` that says what of a module is trained; `value` is what it is set to."""

    key: ClassVar[str]
    """Of `[[adapt]]`, and of an adapter in training (`trained` in its `soka_modules`)."""
    tensors: ClassVar[tuple[str, ...]] = ()
    """Names of the tensors that it adds."""

    needs_trained: ClassVar[str] = ""
    """The factor of terms of its own that starts at zero, so that it must have a learning rate."""
    most_terms: ClassVar[int | None] = None
    """Most terms that it can do with; None: any number."""

    def problem(self, value: Any) -> str | None:
        """Why a value cannot be; None where it can. Manifests have checked theirs already, files have not."""
        raise NotImplementedError

    def misfits(self, value: Any, rule: RuleFacts) -> Iterator[tuple[str, str]]:
        """What of a rule does not go with it: (key, message)."""
        yield from ()

    def frozen(self, value: Any) -> frozenset[str]:
        """Which of left, right and sigma stay as they start."""
        return frozenset()

    def parts(self, value: Any, rank: int, shape: FactorShape) -> dict[str, Part]:
        """The tensors that it adds to a module of `rank` terms, by name."""
        return {}

    def start(self, value: Any, terms: Factors) -> dict[str, Tensor]:
        """The values of `parts` at the start, at which `apply` changes nothing.

        Args:
            value: of the key.
            terms: left, right and sigma at the start.
        """
        return {}

    def apply(self, value: Any, terms: Factors, parts: Mapping[str, Tensor]) -> Factors:
        """The terms that a module has with its further tensors. Differentiable.

        Args:
            value: of the key.
            terms: without them; all of them, or what is left when the starting ones are subtracted.
            parts: the tensors, by name.
        """
        return terms

    def added(self, value: Any) -> int:
        """Terms that `apply` adds."""
        return 0
