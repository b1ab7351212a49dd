"""What the rest may ask of a regulariser."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from soka_serve.kron import Factors
    from soka_serve.kron.shapes import FactorShape


@dataclass(frozen=True)
class Regulariser:
    """One row.

    Args:
        name: its key in `[train.regularise]`, and in the history.
    """

    name: str

    meaning: ClassVar[str]
    """For the manifest's reference: what its number says."""
    whole: ClassVar[bool] = False
    """Its number is a whole one."""
    kronecker: ClassVar[bool] = True
    """It looks at Kronecker factors, which method = "soka" trains."""
    needs_base: ClassVar[bool] = False
    """It asks the base, which a method must not have changed."""
    trains: ClassVar[Collection[str]] = ("left", "right", "sigma")
    """The parts of the factors that it acts on; one of them must be trained."""
    needs_sigma: ClassVar[bool] = False
    """Sigma is trained with it unless a manifest says otherwise: it acts on sigma, or leaves a term's size to it."""
    unit_factors: ClassVar[bool] = False
    """It holds factors at the size that they start with, so that none may start at zero."""
    own_delta: ClassVar[bool] = False
    """The factors must be the delta, with nothing subtracted from them."""
    excludes: ClassVar[Mapping[str, str]] = {}
    """Keys of [train] and other rows that it does not go with, each with the reason."""


class Penalty(Regulariser, ABC):
    """A function of the factors that is added to the loss, times the number that the manifest gives."""

    @abstractmethod
    def penalty(self, modules: Sequence[tuple[Factors, Factors | None]]) -> Tensor:
        """The value, differentiable: a scalar in the factors' dtype.

        Args:
            modules: theta of each adapted module, with the initial factors where these are subtracted. At the start of
                training, entries of left and right have a root mean square of 1 in each term.
        """


class Divergence(Regulariser, ABC):
    """How far the model's answers are from the base's, added to the loss times the number that the manifest gives."""

    kronecker: ClassVar[bool] = False
    needs_base: ClassVar[bool] = True

    @abstractmethod
    def divergences(self, base: Tensor, adapted: Tensor) -> Tensor:
        """The value at each position, differentiable by `adapted`: (positions,), float32 at least.

        Args:
            base: logits of the model with its adapter off, (positions, vocabulary), any float dtype.
            adapted: logits of the model that is trained, alike.
        """


class Guard(Protocol):
    """What one module's factors may do."""

    def allowed(self, part: str, change: Tensor) -> Tensor:
        """The allowed part of a change, or of a gradient: a linear projection.

        Args:
            part: "left", "right" or "sigma".
            change: (r, a, b), or some of its terms, for left and right; (r,) for sigma.
        """


class Constraint(Regulariser, ABC):
    """Something that the factors of each module may not do, by gradients or by steps."""

    whole: ClassVar[bool] = True

    @abstractmethod
    def misfit(self, shape: FactorShape, count: int) -> str | None:
        """Why nothing is left to train of a module with a factor shape; None where something is.

        Args:
            shape: of the module.
            count: the number that the manifest gives.
        """

    @abstractmethod
    def guard(self, weight: Tensor, theta: Factors, count: int) -> Guard:
        """What a module may do.

        Args:
            weight: (out, in), the base's, in floating point.
            theta: the factors at the start of training.
            count: the number that the manifest gives.

        Raises:
            ValueError: there is a `misfit`.
        """


class Rewrite(Regulariser, ABC):
    """Other factors of the same delta, every so many steps; the optimiser's averages then begin at zero."""

    whole: ClassVar[bool] = True
    needs_sigma: ClassVar[bool] = True
    own_delta: ClassVar[bool] = True
    excludes: ClassVar[Mapping[str, str]] = {
        "prune": "terms are told apart by their numbers",
        "protect": "what sigma may do is worked out for the terms of the start",
        "optimiser": "what an average of zero means to others than adamw is not known",
        "left_lr": "all parts of the factors change together",
        "right_lr": "all parts of the factors change together",
        "sigma_lr": "all parts of the factors change together",
    }

    @abstractmethod
    def rewritten(self, theta: Factors) -> tuple[Factors, Tensor]:
        """The new terms, as many and with the same dtype, and a number for the history (a scalar).

        Args:
            theta: the terms of one module.
        """


def orthonormal_size(factors: Factors) -> float:
    """What sigma is multiplied by where left and right are taken as unit vectors: sqrt(m n p q)."""
    return math.sqrt(math.prod(factors.shape))
