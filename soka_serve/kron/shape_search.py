"""`shape = "auto"`: the factor shape that captures most of a weight's energy at equal parameters."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from soka_serve.kron.decompose import captured_energy
from soka_serve.kron.shapes import FactorShape

_FINALISTS = 4
_MARGIN = 1e-3  # shapes whose energy differs by less are equal: the accuracy of the truncated decomposition


def search_shape(weight: Tensor, candidates: Sequence[FactorShape], rank: int, *, seed: int = 0) -> FactorShape:
    """The candidate with the most captured energy when all get the same number of parameters.

    Every shape may spend what `rank` terms of the first candidate take: as many terms as fit into that. Shapes of
    which not even one term fits are left out. All others are screened with a rough decomposition (a few passes over
    the weight each), then the best few, and the first candidate with them, are decomposed properly. Of shapes that are
    equal within 0.1% the earlier candidate wins, so a weight without structure gets the balanced shape. Deterministic.

    Args:
        weight: (out, in), any floating dtype, CPU or GPU.
        candidates: as from `candidate_shapes`, the preferred (balanced) one first.
        rank: the terms that the first candidate would get.
        seed: seed of the randomised decompositions.

    Raises:
        ValueError: no candidates, or the weight is not finite.
    """
    if not candidates:
        raise ValueError("expected at least one candidate shape; got none")
    budget = candidates[0].parameters(max(1, rank))
    ranks = {shape: min(budget // shape.parameters(1), shape.max_rank) for shape in candidates}
    entrants = [shape for shape in candidates if ranks[shape] > 0]

    def measure(shape: FactorShape, *, rough: bool) -> float:
        return captured_energy(weight, shape, ranks[shape], rough=rough, seed=seed)

    finalists = entrants
    if len(entrants) > _FINALISTS + 1:
        rough = {shape: measure(shape, rough=True) for shape in entrants}
        best = sorted(entrants[1:], key=lambda shape: -rough[shape])[:_FINALISTS]  # stable: ties keep their order
        finalists = [shape for shape in entrants if shape == entrants[0] or shape in best]
    chosen, most = finalists[0], -1.0
    for shape in finalists:
        energy = measure(shape, rough=False)
        if most < 0 or energy > most * (1 + _MARGIN):
            chosen, most = shape, energy
    return chosen
