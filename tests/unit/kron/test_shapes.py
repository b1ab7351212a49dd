"""Factor shapes: what is chosen, what is allowed, what is refused, and the search behind `shape = "auto"`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from soka_serve.errors import PlanError
from soka_serve.kron import kpsvd
from soka_serve.kron.decompose import captured_energy
from soka_serve.kron.shape_search import search_shape
from soka_serve.kron.shapes import FactorShape, balanced_shape, candidate_shapes, check_shape, parallel_of

SIZES = st.integers(1, 600)


@pytest.mark.parametrize(
    ("out_features", "in_features", "expected"),
    [
        (4096, 4096, (64, 64, 64, 64)),
        (11008, 4096, (128, 64, 86, 64)),
        (4096, 11008, (64, 128, 64, 86)),
        (14336, 4096, (128, 64, 112, 64)),
        (1024, 4096, (32, 64, 32, 64)),
        (128, 128, (16, 8, 8, 16)),
        (7, 11, (7, 1, 1, 11)),
        (1, 1, (1, 1, 1, 1)),
    ],
)
def test_balanced_shape_of_known_sizes(out_features: int, in_features: int, expected: tuple[int, ...]) -> None:
    assert balanced_shape(out_features, in_features) == expected


@given(SIZES, SIZES)
def test_balanced_shape_has_the_fewest_parameters_of_all_divisor_pairs(out_features: int, in_features: int) -> None:
    shape = balanced_shape(out_features, in_features)
    fewest = min(
        m * n + (out_features // m) * (in_features // n)
        for m in range(1, out_features + 1)
        if out_features % m == 0
        for n in range(1, in_features + 1)
        if in_features % n == 0
    )
    assert shape.out_features == out_features
    assert shape.in_features == in_features
    assert shape.parameters(1) == fewest + 1


@given(SIZES, SIZES, st.sampled_from([1, 2, 4, 8]), st.sampled_from(["column", "row", "none"]))
def test_candidates_are_all_and_only_the_shapes_that_fit(
    out_features: int, in_features: int, tp: int, parallel: str
) -> None:
    cut = {"column": out_features, "row": in_features, "none": tp}[parallel]
    if cut % tp:
        with pytest.raises(PlanError, match=f"tp = {tp}"):
            candidate_shapes(out_features, in_features, tp=tp, parallel=parallel)  # type: ignore[arg-type]
        return
    shapes = candidate_shapes(out_features, in_features, tp=tp, parallel=parallel)  # type: ignore[arg-type]
    expected = {
        (m, n, out_features // m, in_features // n)
        for m in range(1, out_features + 1)
        if out_features % m == 0 and (parallel != "column" or m % tp == 0)
        for n in range(1, in_features + 1)
        if in_features % n == 0 and (parallel != "row" or n % tp == 0)
    }
    assert len(shapes) == len(expected)
    assert set(shapes) == expected
    assert shapes[0] == balanced_shape(out_features, in_features, tp=tp, parallel=parallel)  # type: ignore[arg-type]
    for shape in shapes:
        assert check_shape(shape, out_features, in_features, module="m", tp=tp, parallel=parallel) == shape  # type: ignore[arg-type]


def test_tensor_parallel_size_changes_the_shape_only_where_it_must() -> None:
    assert balanced_shape(11008, 4096, tp=8, parallel="column") == balanced_shape(11008, 4096)
    assert balanced_shape(96, 64, tp=32, parallel="column").m % 32 == 0
    assert balanced_shape(96, 64, tp=32, parallel="row").n % 32 == 0


@pytest.mark.parametrize(
    ("size", "message"),
    [((96, 64, 5, "column"), "96x64.*tp = 5.*column-parallel.*96 rows"), ((64, 97, 2, "row"), "97 columns")],
)
def test_impossible_tensor_parallel_size_is_refused(size: tuple[int, int, int, str], message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        balanced_shape(size[0], size[1], tp=size[2], parallel=size[3])  # type: ignore[arg-type]
    assert caught.value.hint is not None


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(PlanError, match="out=0, in=4"):
        balanced_shape(0, 4)


def test_check_shape_names_the_module_and_everything_that_is_wrong() -> None:
    with pytest.raises(PlanError, match=r"layers.3.q_proj: .*3\*4 = 12.*10 rows.*2\*2 = 4.*6 columns.*tp = 2"):
        check_shape((3, 2, 4, 2), 10, 6, module="layers.3.q_proj", tp=2, parallel="column")
    with pytest.raises(PlanError, match="n = 3 does not divide over tp = 2"):
        check_shape((2, 3, 5, 2), 10, 6, module="layers.3.o_proj", tp=2, parallel="row")


@pytest.mark.parametrize("shape", [(1, 2, 3), (0, 1, 1, 1), (-2, 1, -2, 1)])
def test_check_shape_refuses_what_is_no_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(PlanError, match="four numbers from 1"):
        check_shape(shape, 4, 1, module="m")


def test_parallel_of_reads_the_last_part_of_the_name() -> None:
    assert [parallel_of(f"model.layers.0.self_attn.{name}_proj") for name in "qkvo"] == ["column"] * 3 + ["row"]
    assert [parallel_of(f"mlp.{name}_proj") for name in ("gate", "up", "down")] == ["column", "column", "row"]
    assert parallel_of("lm_head") == "none"


def test_factor_shape_counts() -> None:
    shape = FactorShape(4, 3, 2, 5)
    assert (shape.out_features, shape.in_features, shape.max_rank, shape.parameters(3)) == (8, 15, 10, 69)


# --- the search behind `shape = "auto"` -------------------------------------------------------------------------------


def planted(shape: FactorShape, terms: int, noise: float, seed: int = 0) -> torch.Tensor:
    """A weight that is a few Kronecker products of one shape and some noise."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    weight = sum(
        (torch.kron(draw(shape.m, shape.n), draw(shape.p, shape.q)) for _ in range(terms)),
        start=torch.zeros(shape.out_features, shape.in_features),
    )
    return weight + noise * draw(shape.out_features, shape.in_features)


@pytest.mark.parametrize("shape", [(8, 12, 12, 4), (16, 6, 6, 8), (4, 16, 24, 3)])
def test_finds_the_shape_that_a_weight_was_made_of(shape: tuple[int, int, int, int]) -> None:
    weight = planted(FactorShape(*shape), terms=2, noise=0.05)
    assert search_shape(weight, candidate_shapes(96, 48), 4) == shape


def test_a_tie_goes_to_the_balanced_shape() -> None:
    weight = torch.zeros(64, 64)
    assert search_shape(weight, candidate_shapes(64, 64), 4) == balanced_shape(64, 64)


def test_no_shape_captures_more_at_equal_parameters() -> None:
    weight = planted(FactorShape(6, 8, 8, 4), terms=3, noise=0.5)
    candidates = candidate_shapes(48, 32)
    budget = candidates[0].parameters(2)
    chosen = search_shape(weight, candidates, 2)

    def energy(shape: FactorShape) -> float:
        rank = min(budget // shape.parameters(1), shape.max_rank)
        return float(kpsvd(weight, shape, rank, algorithm="exact").factors.sigma.square().sum())

    assert energy(chosen) >= max(map(energy, candidates)) * (1 - 1e-3)
    assert chosen.parameters(budget // chosen.parameters(1)) <= budget


def test_the_result_repeats() -> None:
    weight = planted(FactorShape(8, 6, 6, 8), terms=1, noise=1.0)
    first = search_shape(weight, candidate_shapes(48, 48), 3)
    assert first == search_shape(weight, candidate_shapes(48, 48), 3)


def test_no_candidates_are_refused() -> None:
    with pytest.raises(ValueError, match="got none"):
        search_shape(torch.ones(8, 8), (), 1)


def test_captured_energy_agrees_with_the_decomposition() -> None:
    weight = planted(FactorShape(8, 8, 6, 6), terms=4, noise=0.3) * 1e-3
    shape = FactorShape(12, 6, 4, 8)
    expected = float(kpsvd(weight, shape, 5, algorithm="exact").factors.sigma.double().square().sum())
    assert captured_energy(weight, shape, 5) == pytest.approx(expected, rel=1e-4)
    assert captured_energy(weight, shape, 5, rough=True) <= expected * (1 + 1e-4)
