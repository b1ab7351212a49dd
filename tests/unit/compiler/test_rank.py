"""Rank policies: properties that hold for every spectrum, and exact answers on known ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from soka_serve.compiler.init.rank import choose_rank, elbow_rank, energy_rank, spread_budget
from soka_serve.errors import PlanError
from soka_serve.kron import kpsvd
from soka_serve.kron.shapes import FactorShape
from soka_serve.manifest.rules import RankBudget, RankElbow, RankEnergy, RankFixed, RankSpectrum

# Whole numbers: scaling by a power of two is exact, and no two energies differ by rounding alone.
SPECTRA = st.lists(st.integers(0, 10_000), min_size=1, max_size=40).map(
    lambda values: [float(v) for v in sorted(values, reverse=True)]
)
THRESHOLDS = st.floats(0.01, 1.0)


@st.composite
def policies(draw: st.DrawFn) -> RankFixed | RankEnergy | RankElbow | RankSpectrum:
    limits: Any = dict(zip(("min", "max", "pool"), sorted(draw(st.tuples(*[st.integers(1, 40)] * 3))), strict=True))
    share: Any = {"threshold": draw(THRESHOLDS), "of": draw(st.sampled_from(["pool", "total"]))}
    combine: Any = draw(st.sampled_from(["min", "max"]))
    made = (
        RankFixed(rank=limits["min"]),
        RankEnergy(policy="energy", **share, **limits),
        RankElbow(policy="elbow", **limits),
        RankSpectrum(policy="spectrum", combine=combine, **share, **limits),
    )
    return draw(st.sampled_from(made))


POLICIES = policies()


@given(SPECTRA, THRESHOLDS, THRESHOLDS, st.floats(1.0, 10.0))
def test_energy_rank_grows_with_the_threshold(sigma: list[float], one: float, other: float, more: float) -> None:
    low, high = sorted((one, other))
    assert energy_rank(sigma, low) <= energy_rank(sigma, high)
    total = sum(s * s for s in sigma) * more
    assert energy_rank(sigma, low, total_energy=total) <= energy_rank(sigma, high, total_energy=total)
    assert energy_rank(sigma, low) <= energy_rank(sigma, low, total_energy=total * (1 + 1e-12))


@given(SPECTRA, THRESHOLDS)
def test_energy_rank_is_the_smallest_that_reaches_the_threshold(sigma: list[float], threshold: float) -> None:
    rank = energy_rank(sigma, threshold)
    energies = [s * s for s in sigma]
    assert 1 <= rank <= len(sigma)
    assert sum(energies[:rank]) >= threshold * sum(energies) * (1 - 1e-12)
    if rank > 1:
        assert sum(energies[: rank - 1]) < threshold * sum(energies) * (1 + 1e-12)


@given(SPECTRA, POLICIES, st.integers(-60, 60), st.floats(1.0, 5.0))
def test_no_policy_sees_the_scale(
    sigma: list[float], policy: RankFixed | RankEnergy | RankElbow | RankSpectrum, exponent: int, more: float
) -> None:
    total = sum(s * s for s in sigma) * more
    scale = 2.0**exponent
    scaled = choose_rank([s * scale for s in sigma], total * scale * scale, policy)
    assert scaled == choose_rank(sigma, total, policy)


@given(SPECTRA, POLICIES)
def test_rank_stays_within_bounds(
    sigma: list[float], policy: RankFixed | RankEnergy | RankElbow | RankSpectrum
) -> None:
    rank = choose_rank(sigma, sum(s * s for s in sigma), policy)
    assert 1 <= rank <= len(sigma)
    if isinstance(policy, RankFixed):
        assert rank == min(policy.rank, len(sigma))
    else:
        assert min(policy.min, len(sigma)) <= rank <= policy.max


@given(st.integers(0, 2**31))
def test_rank_does_not_see_the_sign_of_the_weight(seed: int) -> None:
    weight = torch.randn(12, 8, generator=torch.Generator().manual_seed(seed))
    spectra = [kpsvd(w, FactorShape(4, 2, 3, 4), 8).factors.sigma.tolist() for w in (weight, -weight)]
    for policy in (RankElbow(policy="elbow"), RankEnergy(policy="energy", threshold=0.7)):
        assert choose_rank(spectra[0], 1.0, policy) == choose_rank(spectra[1], 1.0, policy)


@given(st.integers(1, 20), st.integers(3, 40), st.integers(0, 3), st.integers(-2, 2))
def test_elbow_of_a_step_is_exact(head: int, tail: int, slope: int, exponent: int) -> None:
    # `head` large values, then a tail far below: the elbow lies where the tail begins.
    sigma = [1000.0 + slope * (head - k) for k in range(head)] + [10.0 - 0.1 * k for k in range(tail)]
    assert elbow_rank([s * 10.0**exponent for s in sigma]) == head


@given(st.integers(1, 15), st.integers(1, 15), st.integers(5, 50))
def test_elbow_of_two_straight_lines_is_where_they_meet(steep: int, flat: int, drop: int) -> None:
    sigma = [float(flat + drop * (steep - k)) for k in range(steep)] + [float(flat - k) for k in range(flat + 1)]
    assert elbow_rank(sigma) == steep


@pytest.mark.parametrize("sigma", [[3.0], [3.0, 1.0], [2.0] * 6, [5.0, 4.0, 3.0, 2.0, 1.0], [9.0, 8.0, 6.0, 0.0]])
def test_without_an_elbow_all_terms_are_kept(sigma: list[float]) -> None:
    assert elbow_rank(sigma) == len(sigma)


def test_known_answers() -> None:
    sigma = [2.0, 1.0, 1.0]  # energies 4, 1, 1
    assert [energy_rank(sigma, t) for t in (0.5, 2 / 3, 0.7, 1.0)] == [1, 1, 2, 3]
    assert energy_rank(sigma, 0.5, total_energy=10.0) == 2
    assert energy_rank(sigma, 0.9, total_energy=100.0) == 3
    assert energy_rank([0.0, 0.0], 0.5) == 1
    assert energy_rank([], 0.5) == elbow_rank([]) == 0
    assert energy_rank([1e200, 1e-200], 1.0) == 1


def test_spectrum_combines_energy_and_elbow() -> None:
    sigma = [10.0, 9.0, 1.0, 0.9, 0.8]
    ranks = [
        choose_rank(sigma, 0.0, RankSpectrum(policy="spectrum", threshold=0.5, combine=combine))
        for combine in ("min", "max")
    ]
    assert ranks == [1, 2]


def test_pool_limits_the_candidates() -> None:
    sigma = [4.0, 3.0, 2.0, 1.0]
    assert choose_rank(sigma, 30.0, RankEnergy(policy="energy", threshold=1.0, max=2, pool=2)) == 2
    assert choose_rank(sigma, 30.0, RankEnergy(policy="energy", threshold=0.6, max=2, pool=2)) == 1


@pytest.mark.parametrize("sigma", [[1.0, 2.0], [1.0, float("nan")], [float("inf")], [1.0, -1.0]])
def test_what_is_no_spectrum_is_refused(sigma: list[float]) -> None:
    for function in (elbow_rank, lambda s: energy_rank(s, 0.5)):
        with pytest.raises(ValueError, match="expected a spectrum"):
            function(sigma)


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.01, float("nan")])
def test_threshold_outside_its_range_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold"):
        energy_rank([1.0], threshold)


MODULES = st.dictionaries(
    st.sampled_from([f"layer{i}" for i in range(8)]), st.tuples(SPECTRA, st.integers(1, 300)), min_size=1
)


@given(MODULES, st.integers(1, 5000), st.integers(0, 3), st.integers(3, 20))
def test_budget_is_spent_to_within_one_term(
    modules: dict[str, tuple[list[float], int]], parameters: int, low: int, high: int
) -> None:
    spectra = {name: sigma for name, (sigma, _) in modules.items()}
    costs = {name: cost for name, (_, cost) in modules.items()}
    policy = RankBudget(policy="budget", parameters=parameters, min=low, max=high)
    floor = sum(costs[name] * min(low, len(sigma)) for name, sigma in spectra.items())
    if floor > parameters:
        with pytest.raises(PlanError, match=f"min = {low}"):
            spread_budget(spectra, costs, policy)
        return
    ranks = spread_budget(spectra, costs, policy)
    left = parameters - sum(costs[name] * rank for name, rank in ranks.items())
    assert left >= 0
    assert list(ranks) == list(spectra)
    for name, rank in ranks.items():
        most = min(high, len(spectra[name]))
        assert min(low, most) <= rank <= most
        assert rank == most or costs[name] > left


@given(MODULES, st.integers(1, 5000), st.integers(-30, 30))
def test_budget_does_not_see_the_scale_and_takes_the_best_terms(
    modules: dict[str, tuple[list[float], int]], parameters: int, exponent: int
) -> None:
    spectra = {name: sigma for name, (sigma, _) in modules.items()}
    costs = dict.fromkeys(spectra, 7)
    policy = RankBudget(policy="budget", parameters=parameters, max=20)
    ranks = spread_budget(spectra, costs, policy)
    scaled = {name: [s * 2.0**exponent for s in sigma] for name, sigma in spectra.items()}
    assert spread_budget(scaled, costs, policy) == ranks
    # At equal costs the chosen terms are the largest ones of all modules together.
    pool = sorted((s for sigma in spectra.values() for s in sigma[:20]), reverse=True)
    chosen = sorted((s for name, rank in ranks.items() for s in spectra[name][:rank]), reverse=True)
    assert chosen == pool[: len(chosen)]


def test_budget_weighs_energy_against_parameters() -> None:
    spectra = {"dear": [3.0, 2.9], "cheap": [2.0, 1.9]}
    # Per parameter, cheap's terms hold 0.40 and 0.36, dear's 0.09 and 0.08; after cheap's two, 95 pay for no dear one.
    costs = {"dear": 100, "cheap": 10}
    assert spread_budget(spectra, costs, RankBudget(policy="budget", parameters=115)) == {"dear": 0, "cheap": 2}
    assert spread_budget(spectra, costs, RankBudget(policy="budget", parameters=120)) == {"dear": 1, "cheap": 2}


def test_budget_needs_a_cost_for_every_module() -> None:
    policy = RankBudget(policy="budget", parameters=10)
    with pytest.raises(ValueError, match="missing: b"):
        spread_budget({"a": [1.0], "b": [1.0]}, {"a": 1}, policy)
