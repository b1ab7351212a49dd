"""How many terms a module gets, from its Kronecker spectrum.

A spectrum is sigma >= 0 in descending order: the candidate pool of one module. Energies are squares. Everything here
depends on the spectrum's form only, not on its scale, nor on the sign of the weight (which changes no sigma).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

from soka_serve.errors import PlanError
from soka_serve.manifest.rules import RankBudget, RankElbow, RankEnergy, RankFixed, RankSpectrum

_FLAT = 1e-9  # a point this near to the chord, relative to the spectrum's range, lies on it


def energy_rank(sigma: Sequence[float], threshold: float, *, total_energy: float | None = None) -> int:
    """The smallest number of terms whose cumulative energy reaches a share of the total.

    Args:
        sigma: descending spectrum.
        threshold: the share, in (0, 1].
        total_energy: energy of everything that was decomposed; None takes the pool's own. Pool sums are taken in one
            order, so a threshold of 1 is reached exactly.

    Returns:
        A rank from 1 to len(sigma) (0 for an empty spectrum); len(sigma) when the share is out of reach.

    Raises:
        ValueError: `threshold` is outside (0, 1], or `sigma` is not a descending spectrum.

    >>> energy_rank([2.0, 1.0, 1.0], 0.6), energy_rank([2.0, 1.0, 1.0], 0.6, total_energy=10.0)
    (1, 3)
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"expected a threshold in (0, 1]; got {threshold}")
    relative = _relative(sigma)
    if not relative:
        return 0
    cumulative = list(accumulate(value * value for value in relative))
    total = cumulative[-1] if total_energy is None else total_energy / (sigma[0] * sigma[0]) if sigma[0] > 0 else 0.0
    wanted = threshold * total
    return next((rank for rank, energy in enumerate(cumulative, 1) if energy >= wanted), len(relative))


def elbow_rank(sigma: Sequence[float]) -> int:
    """The number of terms before the spectrum's elbow.

    The elbow is the point (k, sigma[k]) that lies farthest below the chord from the first point to the last (Satopaa
    et al. 2011, "kneedle"; the first such point on ties). It is where the flat tail begins, so the terms before it
    are kept (Cattell's scree test), at least one. A spectrum that nowhere falls below its chord (straight, flat,
    bulging, or of fewer than three terms) has no elbow, and all of it is kept.

    >>> elbow_rank([10.0, 9.0, 8.0, 1.0, 0.9, 0.8]), elbow_rank([4.0, 3.0, 2.0, 1.0])
    (3, 4)

    Raises:
        ValueError: `sigma` is not a descending spectrum.
    """
    relative = _relative(sigma)
    last = len(relative) - 1
    if last < 2 or relative[0] == relative[-1]:
        return len(relative)
    drop = relative[0] - relative[-1]
    depths = [(relative[0] - value) / drop - k / last for k, value in enumerate(relative)]
    deepest = max(range(1, last), key=lambda k: depths[k])
    return deepest if depths[deepest] > _FLAT else len(relative)


def choose_rank(
    sigma: Sequence[float], total_energy: float, policy: RankFixed | RankEnergy | RankElbow | RankSpectrum
) -> int:
    """The rank that a policy gives one module.

    Args:
        sigma: descending spectrum of the candidate pool; of more terms than `policy.pool`, the first are used.
        total_energy: energy of everything that was decomposed.
        policy: any policy but a budget, which needs all modules (`spread_budget`).

    Returns:
        A rank within the policy's `min` and `max`, and at most len(sigma).

    Raises:
        ValueError: `sigma` is not a descending spectrum.
    """
    if isinstance(policy, RankFixed):
        return min(policy.rank, len(_relative(sigma)))
    pool = sigma[: policy.pool]
    total = total_energy if not isinstance(policy, RankElbow) and policy.of == "total" else None
    if isinstance(policy, RankElbow):
        rank = elbow_rank(pool)
    elif isinstance(policy, RankEnergy):
        rank = energy_rank(pool, policy.threshold, total_energy=total)
    else:
        both = energy_rank(pool, policy.threshold, total_energy=total), elbow_rank(pool)
        rank = min(both) if policy.combine == "min" else max(both)
    return min(max(rank, policy.min), policy.max, len(pool))


def spread_budget(
    spectra: Mapping[str, Sequence[float]], costs: Mapping[str, int], policy: RankBudget
) -> dict[str, int]:
    """Ranks of all modules under one total of parameters, by captured energy per parameter.

    Every module first gets `policy.min` terms. Then the term with the most energy per parameter that still fits is
    taken, again and again (ties in the order of `spectra`). Spectra descend, so the ranks are those of the best terms
    overall. The budget is never exceeded, and it is spent to within one term: at the end no module that may have
    another term can pay for it.

    Args:
        spectra: descending spectrum of each module's candidate pool.
        costs: parameters per term of each module, m*n + p*q + 1.
        policy: the budget in parameters, and the fewest and most terms per module.

    Returns:
        The rank of every module, in the order of `spectra`.

    Raises:
        PlanError: the fewest terms already cost more than the budget.
        ValueError: a spectrum does not descend, or a cost is missing or below 1.
    """
    relative = {name: _squares(sigma) for name, sigma in spectra.items()}
    unpriced = [name for name in spectra if costs.get(name, 0) < 1]
    if unpriced:
        raise ValueError(f"expected a cost of at least 1 for every module; missing: {', '.join(unpriced)}")
    most = {name: min(policy.max, policy.pool, len(energies)) for name, energies in relative.items()}
    ranks = {name: min(policy.min, limit) for name, limit in most.items()}
    left = policy.parameters - sum(rank * costs[name] for name, rank in ranks.items())
    if left < 0:
        raise PlanError(
            f"a budget of {policy.parameters:,} parameters does not pay for min = {policy.min} terms in each of "
            f"{len(spectra)} modules, which take {policy.parameters - left:,}",
            hint="raise the budget, lower `min`, or adapt fewer modules",
        )
    order = {name: position for position, name in enumerate(spectra)}
    heap = [
        (-relative[name][rank] / costs[name], order[name], name) for name, rank in ranks.items() if rank < most[name]
    ]
    heapq.heapify(heap)
    while heap:
        _, position, name = heapq.heappop(heap)
        if costs[name] > left:
            continue  # what is left only shrinks, so this module is done
        ranks[name] += 1
        left -= costs[name]
        if ranks[name] < most[name]:
            heapq.heappush(heap, (-relative[name][ranks[name]] / costs[name], position, name))
    return ranks


def _relative(sigma: Sequence[float]) -> list[float]:
    """The spectrum over its largest value (no overflow, no underflow of squares); checks that it is one."""
    if any(not math.isfinite(value) or value < 0 for value in sigma):
        raise ValueError("expected a spectrum of finite values from 0")
    if any(later > earlier for earlier, later in pairwise(sigma)):
        raise ValueError("expected a spectrum in descending order")
    if not sigma or sigma[0] == 0:
        return [0.0] * len(sigma)
    return [value / sigma[0] for value in sigma]


def _squares(sigma: Sequence[float]) -> list[float]:
    _relative(sigma)
    return [value * value for value in sigma]
