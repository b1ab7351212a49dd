"""What the rest may ask of a start, and the objects that it is handed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from soka_serve.kron import Factors
    from soka_serve.kron.decompose import Decomposition
    from soka_serve.kron.shapes import FactorShape


@dataclass(frozen=True)
class Material:
    """What a start may be made of, for one module.

    Args:
        weight: (out, in), of the base.
        tuned: (out, in), of the fine-tuned checkpoint; for starts whose `source` is `finetuned`.
        gradient: (out, in), of the mean loss over the calibration batches; for starts that need it.
        held: (out, in), float32, what a quantised base computes with in the weight's place; for starts `on_quantised`.
    """

    weight: Tensor
    tuned: Tensor | None = None
    gradient: Tensor | None = None
    held: Tensor | None = None


class Pool(Protocol):
    """The terms that a decomposition found, and the size that starting factors are to have."""

    @property
    def module(self) -> str:
        """Full name of the module."""

    @property
    def shape(self) -> FactorShape:
        """Of the terms."""

    @property
    def sigma(self) -> tuple[float, ...]:
        """The spectrum, descending."""

    @property
    def size(self) -> float:
        """Root mean square of sigma at the start: the rule's scale times that of the weight's entries."""

    @property
    def seed(self) -> int:
        """Of random factors."""

    def terms(self, lefts: Sequence[int], rights: Sequence[int]) -> Factors:
        """Left and sigma of some terms beside Right of others, in float32 on the CPU."""


@dataclass(frozen=True)
class Start:
    """Where the factors of a module start.

    Args:
        name: what `[[adapt]] init` calls it, or `components` or `right`.
        variants: starts that another value of `components` or `right` makes of it.
    """

    name: str
    variants: Mapping[str, Start] = field(default_factory=dict, hash=False, compare=False)

    meaning: ClassVar[str]
    """For the manifest's reference: what the factors are."""
    told: ClassVar[str]
    """For the report: the same in a sentence's part, with what that means for the untrained adapter."""
    spectrum_of: ClassVar[str] = "the weight"
    """For the report: what was decomposed."""

    source: ClassVar[str | None] = None
    """The key of the rule that names what is decomposed besides the base."""
    source_is: ClassVar[str] = ""
    """What that key names, in words."""
    needs_gradient: ClassVar[bool] = False
    """It takes the loss's gradient over the calibration batches, which then do not weigh anything."""
    calibrated: ClassVar[bool] = False
    """Without `calibration_batches` it looks at some."""
    unweighed: ClassVar[str] = ""
    """Why calibration batches cannot weigh it; empty where they can."""
    given: ClassVar[str] = ""
    """Why the rule says neither rank nor shape; empty where it does."""
    fixed_rank: ClassVar[str] = ""
    """Why its rank is given by the rule, and no term more than that is computed; empty where policies choose it."""
    fixed_shape: ClassVar[str] = ""
    """Why `shape = "auto"` cannot be searched; empty where it can."""
    needs_trained: ClassVar[str] = ""
    """The factor that it starts at zero, so that it must be trained."""
    frozen: ClassVar[tuple[str, ...]] = ()
    """Factors that are never trained."""
    drawn: ClassVar[bool] = False
    """Its factors are random numbers: of what is decomposed the spectrum alone counts, for ranks."""
    subtracted: ClassVar[bool] = True
    """The adapter is K(theta) - K(theta0), so that it changes nothing at the start."""
    cuts: ClassVar[bool] = False
    """The adapter is K(theta) - K(cut): what is subtracted are other terms than the starting ones, of the weight."""
    changes: ClassVar[bool] = False
    """The adapter changes the model from the start, by terms of their own size, which `scale` does not set."""
    on_quantised: ClassVar[bool] = False
    """Its terms add to the base as `base.quantize` holds it, so that the adapter is right on no other."""
    terms_per_rank: ClassVar[int] = 1
    """Terms of the decomposition that one starting term takes."""

    @property
    def starts_at_zero(self) -> bool:
        """One of the factors is zero at the start, so that the delta is."""
        return not (self.subtracted or self.changes)

    @property
    def moves_base(self) -> bool:
        """The adapter changes the model before it is trained."""
        return self.changes or self.cuts

    @property
    def stores_frozen(self) -> bool:
        """A finished adapter has as many frozen terms as trained ones."""
        return self.subtracted or self.cuts

    @property
    def written(self) -> str:
        """What a manifest says to have it."""
        return f"init = {self.name!r}"

    def matrix(self, material: Material) -> Tensor:
        """(out, in): what is decomposed."""
        return material.weight

    def decompose(
        self, matrix: Tensor, shape: FactorShape, count: int, seed: int, terms: Factors | None = None
    ) -> Decomposition:
        """Terms of what is decomposed, where nothing weighs it.

        Args:
            matrix: (out, in), from `matrix`, perhaps weighed by the gradients of outputs.
            shape: of the terms.
            count: how many terms, capped by the shape.
            seed: of random choices.
            terms: of the adapter, for a start whose `source` is `adapter`.
        """
        from soka_serve.kron import kpsvd

        return kpsvd(matrix, shape, count, seed=seed)

    def check(self, module: str, sigma: Sequence[float]) -> None:
        """Refuse a spectrum that nothing can start from.

        Raises:
            PlanError: names the module.
        """

    def factors(self, pool: Pool, rank: int) -> Factors:
        """The `rank` terms that training starts from, in float32 on the CPU; entries of left and right have RMS 1."""
        found = pool.terms(range(rank), range(rank)).with_unit_rms()
        return found if self.changes or not rank else found.with_size(pool.size)

    def cut(self, pool: Pool, rank: int) -> Factors | None:
        """The `rank` terms that are taken off the weight for good, on the CPU; None where the start has none."""
        return None
