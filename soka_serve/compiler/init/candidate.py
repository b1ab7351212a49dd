"""One module's decomposition: the terms that its rank policy may choose from."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from soka_serve.compiler.init.rank import choose_rank
from soka_serve.errors import CheckpointError
from soka_serve.io.files import disk_errors
from soka_serve.io.safetensors import check_finite
from soka_serve.kron import Factors
from soka_serve.kron.decompose import energy_of
from soka_serve.kron.factors import typical_entry
from soka_serve.kron.output_weighting import OutputMoments
from soka_serve.kron.shape_search import search_shape
from soka_serve.kron.shapes import FactorShape, candidate_shapes, parallel_of
from soka_serve.kron.weighting import InputMoments, OutputError, refine_terms, weighted_kpsvd
from soka_serve.manifest.rules import RankBudget, RankFixed
from soka_serve.starts import Material

if TYPE_CHECKING:
    from soka_serve.base.target_modules import TargetModule
    from soka_serve.base.weight_map import WeightMap

logger = logging.getLogger(__name__)

# Terms computed for a fixed rank, so that the report can show what was cut off.
FIXED_POOL = 32


class TargetStatistics(NamedTuple):
    """A target, with what a pass over data tells of it, as far as its rule needs that."""

    target: TargetModule
    gradient: Tensor | None = None
    """(out, in), of the mean loss, in float32."""
    moments: InputMoments | None = None
    outputs: OutputMoments | None = None


@dataclass(frozen=True)
class DecompositionInput:
    """What of a module is decomposed.

    Args:
        values: (out, in): the weight, or what the rule's start has instead.
        weight_norm: Frobenius norm of the weight.
        terms: of the adapter that the rule names, if its start takes one's.
    """

    values: Tensor
    weight_norm: float
    terms: Factors | None = None


def read_matrix(
    target: TargetModule,
    weights: WeightMap,
    *,
    finetuned: WeightMap | None = None,
    gradient: Tensor | None = None,
    held: Callable[[Tensor], Tensor] | None = None,
    device: torch.device | None = None,
) -> DecompositionInput:
    """Read what a target's start decomposes.

    Args:
        target: the module and its rule.
        weights: of the base; the weight (out, in) is read and let go of.
        finetuned: of the checkpoint that the rule names, if its start reads one.
        gradient: (out, in) mean gradient of the loss, for starts that need it.
        held: makes of a weight what the quantised base computes with (`held_weight`), for starts `on_quantised`.
        device: where the decomposition runs; None is the CPU.

    Raises:
        CheckpointError: the weight is missing, not finite, or of another shape in the fine-tuned checkpoint.
    """
    name = target.module.name
    weight = check_finite(weights.read(name), f"{name}.weight").to(device)
    norm = energy_of(weight) ** 0.5
    tuned = None
    if finetuned is not None:
        tuned = check_finite(finetuned.read(name), f"{name}.weight").to(device)
        if tuned.shape != weight.shape:
            raise CheckpointError(
                f"{finetuned.source}: {name}.weight is {tuple(tuned.shape)}; the base's is {tuple(weight.shape)}",
                hint="`finetuned` must be a fine-tuned version of the same base.",
            )
    rounded = held(weight) if held is not None and target.rule.start.on_quantised else None
    material = Material(weight, tuned, None if gradient is None else gradient.to(device), rounded)
    return DecompositionInput(target.rule.start.matrix(material), norm)


@dataclass(frozen=True)
class Candidate:
    """A module's decomposition. Its terms, no more than its policy can take, lie in a file: many would fill memory."""

    target: TargetModule
    shape: FactorShape
    sigma: tuple[float, ...]
    total_energy: float
    most: int
    """Most terms it may get: the policy's, or as many as cost the same where `auto` chose a costlier shape."""
    file: Path
    size: float
    """Root mean square of sigma at the start: the rule's scale times that of the weight's entries."""
    seed: int
    is_greedy: bool
    """Its terms were found one after the other, and could be fitted together once their number is known."""

    @property
    def module(self) -> str:
        """Full name of the module."""
        return self.target.module.name

    def read(self, rank: int) -> Factors:
        """The `rank` terms that training starts from, in float32 on the CPU; entries of left and right have RMS 1."""
        return self.target.rule.start.factors(self, rank)

    def cut(self, rank: int) -> Factors | None:
        """The `rank` terms that are taken off the weight, likewise; None where the start takes none off."""
        return self.target.rule.start.cut(self, rank) if rank else None

    def terms(self, lefts: Sequence[int], rights: Sequence[int]) -> Factors:
        """Left and sigma of some terms beside Right of others."""
        with safe_open(self.file, framework="pt") as file:
            # Indexed: a slice may be a view of the mapped file.
            left, right, sigma = (file.get_tensor(part) for part in ("left", "right", "sigma"))
            return Factors(left[list(lefts)], right[list(rights)], sigma[list(lefts)])


def pool_size(target: TargetModule, shape: FactorShape) -> int:
    """Number of candidate terms to compute for a target, capped by its shape."""
    policy, per_rank = target.rule.rank, target.rule.start.terms_per_rank
    if target.rule.start.fixed_rank or target.rule.start.given:
        wanted = _most_terms(target)
    elif per_rank > 1:
        wanted = max(policy.pool if not isinstance(policy, RankFixed) else FIXED_POOL, per_rank * _most_terms(target))
    elif not isinstance(policy, RankFixed):
        wanted = policy.pool
    elif target.rule.batches:
        wanted = policy.rank  # every further term costs least squares on the whole moment
    else:
        wanted = max(policy.rank, FIXED_POOL)
    return min(wanted, shape.max_rank)


def _most_terms(target: TargetModule) -> int:
    policy = target.rule.rank
    return policy.rank if isinstance(policy, RankFixed) else policy.max


def decompose(known: TargetStatistics, matrix: DecompositionInput, file: Path, *, seed: int = 0) -> Candidate:
    """Kronecker-decompose one target, unless nothing depends on it.

    Args:
        known: the module, its rule and its factor shape (None: `shape = "auto"` is searched here), with the moments of
            its inputs and of its outputs' gradients, which weigh the decomposition.
        matrix: what `read_matrix` read.
        file: where the terms are written (safetensors: left, right, sigma, in float32); not for a start that is
            drawn with a fixed rank, which takes none.
        seed: of the randomised range finder, and of random factors.

    Raises:
        PlanError: nothing can start from what was found.
    """
    target, outputs, values = known.target, known.outputs, matrix.values
    start, shape, most = target.rule.start, target.shape, _most_terms(target)
    if shape is None:
        shape, most = _search_shape(target, values, most, seed)
    if start.drawn and isinstance(target.rule.rank, RankFixed):  # the spectrum decides nothing, and is not worked out
        size = target.rule.scale * typical_entry(matrix.weight_norm, shape)
        return Candidate(target, shape, (), matrix.weight_norm**2, min(most, shape.max_rank), file, size, seed, False)
    pool = pool_size(target, shape)
    if outputs is not None:
        values = outputs.weigh(values)
    # Least squares finds factors of zeros for zeros, which no step would ever change.
    problem = OutputError(values, shape, known.moments) if known.moments is not None and bool(values.any()) else None
    if problem is None:
        decomposition = start.decompose(values, shape, pool, seed, matrix.terms)
    else:
        decomposition = weighted_kpsvd(problem, pool, seed=seed)
    # Moments are normalised within a module; with their size back, energies of modules are output energies (with the
    # outputs' gradients: squared changes of the loss) and compare.
    square = math.prod(m.mean_square() for m in (known.moments, outputs) if m is not None)
    energy = decomposition.total_energy * square
    sigma = tuple((decomposition.factors.sigma.double() * square**0.5).tolist())
    start.check(target.module.name, sigma)
    factors = decomposition.factors.terms(slice(0, min(start.terms_per_rank * most, shape.max_rank)))
    policy = target.rule.rank
    if problem is not None and not isinstance(policy, RankBudget):
        # The greedy terms stand alone; with the rank known, fitting them together lowers the output error further.
        rank = min(choose_rank(sigma, energy, policy), most)
        factors = refine_terms(problem, decomposition.factors.terms(slice(0, rank)))
    if outputs is not None:
        factors = outputs.take_out(factors)
    factors = factors.to(dtype=torch.float32, device=torch.device("cpu"))
    parts = {part: getattr(factors, part).contiguous() for part in ("left", "right", "sigma")}
    with disk_errors(file):
        save_file(parts, file, metadata={"format": "pt"})
    is_greedy = problem is not None and isinstance(policy, RankBudget)
    size = target.rule.scale * typical_entry(matrix.weight_norm, shape)
    return Candidate(target, shape, sigma, energy, most, file, size, seed, is_greedy)


def _search_shape(target: TargetModule, values: Tensor, most: int, seed: int) -> tuple[FactorShape, int]:
    """The shape that `auto` finds, and how many of its terms cost what `most` cost in the balanced one."""
    module = target.module
    candidates = candidate_shapes(
        module.out_features, module.in_features, tp=target.rule.tp, parallel=parallel_of(module.name)
    )
    shape = search_shape(values, candidates, most, seed=seed)
    logger.info("%s: auto shape %s", module.name, tuple(shape))
    return shape, max(1, candidates[0].parameters(most) // shape.parameters(1))
