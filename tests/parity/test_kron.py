"""Factors, rearrangement, dense delta, product with activations: against float64 `torch.kron` and explicit loops."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from soka_serve.kron import (
    Factors,
    add_delta_,
    apply_cost,
    apply_kron,
    dense_delta,
    kpsvd,
    linear_with_delta,
    rearrange,
    recompress,
    stack_terms,
    unrearrange,
)
from soka_serve.kron import apply as kron_apply
from soka_serve.kron.apply import Order, choose_order
from soka_serve.kron.shapes import FactorShape
from tests.support import kron_oracle as oracle
from tests.support.tolerances import RELATIVE_ERROR, relative_error

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ORDERS: list[Order] = ["auto", "left", "right", "dense"]


def test_rearrangement() -> None:
    oracle.check_rearrangement(rearrange)


@pytest.mark.parametrize("shape", oracle.SHAPES)
def test_unrearrange_is_the_inverse_and_norms_stay(shape: FactorShape) -> None:
    weight = oracle.draw(shape.out_features, shape.in_features)
    matrix = rearrange(weight, shape)
    assert torch.equal(unrearrange(matrix, shape), weight)
    assert float(matrix.norm()) == pytest.approx(float(weight.norm()), rel=1e-14)


def test_rearrangement_refuses_another_shape() -> None:
    with pytest.raises(ValueError, match=r"expected weight of shape \(6, 20\); got \(20, 6\)"):
        rearrange(torch.zeros(20, 6), FactorShape(2, 4, 3, 5))
    with pytest.raises(ValueError, match="expected matrix"):
        unrearrange(torch.zeros(6, 20), FactorShape(2, 4, 3, 5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_delta(dtype: torch.dtype) -> None:
    oracle.check_dense_delta(dense_delta, dtype)


def test_dense_delta_in_another_dtype_and_without_terms() -> None:
    factors = oracle.draw_factors(FactorShape(2, 3, 4, 5), 2, dtype=torch.float32)
    assert dense_delta(factors, torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(dense_delta(factors.terms([])), torch.zeros(8, 15))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [1, 100, 1 << 20])
def test_add_delta_in_place(dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("soka_serve.kron.factors._BLOCK_VALUES", block)
    for shape in oracle.SHAPES:
        factors = oracle.draw_factors(shape, 3, dtype=torch.float32)
        weight = oracle.draw(shape.out_features, shape.in_features, seed=8, dtype=dtype)
        expected = weight.double() - 0.5 * oracle.oracle_delta(factors)
        changed = weight.clone()
        assert add_delta_(changed, factors, scale=-0.5) is changed
        # The factors are float32, so the sum is no better than that.
        tolerance = max(RELATIVE_ERROR[dtype], RELATIVE_ERROR[torch.float32])
        assert relative_error(changed, expected) < tolerance
        assert relative_error(changed, weight) > 0.1


# --- product with activations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ORDERS)
def test_apply(order: Order, dtype: torch.dtype) -> None:
    oracle.check_apply(partial(apply_kron, order=order), dtype)


@pytest.mark.parametrize("order", ORDERS)
def test_apply_to_nothing_and_with_no_terms(order: Order) -> None:
    factors = oracle.draw_factors(FactorShape(3, 4, 5, 2), 2)
    x = oracle.draw(6, 8)
    assert apply_kron(x[:0], factors.left, factors.right, factors.sigma, order=order).shape == (0, 15)
    none = factors.terms([])
    zero = apply_kron(x.requires_grad_(), none.left, none.right, none.sigma, order=order)
    assert torch.equal(zero, torch.zeros(6, 15, dtype=torch.float64))
    zero.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("order", ORDERS)
def test_apply_takes_inputs_that_are_not_contiguous(order: Order) -> None:
    factors = oracle.draw_factors(FactorShape(3, 4, 5, 2), 2)
    x = oracle.draw(8, 6, 2).permute(2, 1, 0)
    right = factors.right.transpose(1, 2).contiguous().transpose(1, 2)
    expected = x @ oracle.oracle_delta(factors).t()
    assert relative_error(apply_kron(x, factors.left, right, factors.sigma, order=order), expected) < 1e-12


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", oracle.SHAPES)
def test_gradients_are_those_of_the_dense_delta(
    shape: FactorShape, order: Order, pieces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = 150 if pieces else 7
    if pieces:
        monkeypatch.setitem(kron_apply._PIECE_VALUES, "cpu", 1)  # the smallest pieces: 64 tokens
    factors = oracle.draw_factors(shape, 2)
    leaves = [factors.left, factors.right, factors.sigma, oracle.draw(tokens, shape.in_features, seed=9)]
    left, right, sigma, x = (leaf.requires_grad_() for leaf in leaves)
    upstream = oracle.draw(tokens, shape.out_features, seed=11)
    delta = torch.stack([s * torch.kron(a, b) for a, b, s in zip(left, right, sigma, strict=True)]).sum(0)
    expected = torch.autograd.grad(x @ delta.t(), (x, left, right, sigma), upstream)
    actual = torch.autograd.grad(apply_kron(x, left, right, sigma, order=order), (x, left, right, sigma), upstream)
    for one, other in zip(actual, expected, strict=True):
        assert relative_error(one, other) < 1e-12


@pytest.mark.parametrize("order", ORDERS)
def test_gradcheck(order: Order) -> None:
    factors = oracle.draw_factors(FactorShape(2, 3, 3, 2), 2)
    inputs = (oracle.draw(2, 2, 6), factors.left, factors.right, factors.sigma)
    assert torch.autograd.gradcheck(
        lambda x, left, right, sigma: apply_kron(x, left, right, sigma, order=order),
        tuple(t.clone().requires_grad_() for t in inputs),
    )


@pytest.mark.parametrize("order", ORDERS)
def test_only_the_gradients_that_are_asked_for(order: Order) -> None:
    factors = oracle.draw_factors(FactorShape(2, 3, 3, 2), 2)
    tensors = [oracle.draw(4, 6), factors.left, factors.right, factors.sigma]
    for position in range(4):
        leaves = [t.clone().requires_grad_(i == position) for i, t in enumerate(tensors)]
        apply_kron(*leaves, order=order).sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [i == position for i in range(4)]


def test_backward_keeps_inputs_only() -> None:
    factors = oracle.draw_factors(FactorShape(8, 8, 8, 8), 16)
    x = oracle.draw(64, 64).requires_grad_()
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        apply_kron(x, factors.left.requires_grad_(), factors.right.requires_grad_(), factors.sigma.requires_grad_())
    assert max(saved) <= x.numel()  # an intermediate has 16 times as many
    # The input, left scaled and not, right, sigma twice at most.
    assert sum(saved) <= x.numel() + 4 * factors.parameters


@pytest.mark.parametrize("order", ORDERS)
def test_autocast_computes_in_its_dtype_and_gives_full_precision_gradients(order: Order) -> None:
    factors = oracle.draw_factors(FactorShape(4, 3, 3, 4), 2, dtype=torch.float32)
    leaves = tuple(t.requires_grad_() for t in (factors.left, factors.right, factors.sigma))
    x = oracle.draw(5, 12, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = apply_kron(x, *leaves, order=order)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, x.double() @ oracle.oracle_delta(factors).t()) < RELATIVE_ERROR[torch.bfloat16]
    y.float().sum().backward()
    assert [leaf.grad.dtype for leaf in leaves if leaf.grad is not None] == [torch.float32] * 3


def test_bfloat16_is_as_near_as_one_rounding() -> None:
    # 64 terms: if the sum over terms were rounded term by term, the error would be several times larger.
    factors = oracle.draw_factors(FactorShape(8, 8, 8, 8), 64, dtype=torch.bfloat16)
    x = oracle.draw(32, 64, seed=9, dtype=torch.bfloat16)
    expected = x.double() @ oracle.oracle_delta(factors).t()
    rounded = relative_error(expected.bfloat16(), expected)
    for order in ORDERS:
        actual = apply_kron(x, factors.left, factors.right, factors.sigma, order=order)
        assert relative_error(actual, expected) < 2 * rounded


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("order", ["left", "right", "dense"])
def test_compiles_in_one_piece(order: Order) -> None:
    factors = oracle.draw_factors(FactorShape(3, 2, 2, 4), 2)
    leaves = tuple(t.requires_grad_() for t in (factors.left, factors.right, factors.sigma))
    compiled = torch.compile(apply_kron, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (3, 70):
        x = oracle.draw(tokens, 8)
        eager, traced = (f(x, *leaves, order=order) for f in (apply_kron, compiled))
        assert relative_error(traced, eager) < 1e-12
        grads = [torch.autograd.grad(y.square().sum(), leaves) for y in (eager, traced)]
        for one, other in zip(*grads, strict=True):
            assert relative_error(one, other) < 1e-12


def test_apply_refuses_what_does_not_fit() -> None:
    factors = oracle.draw_factors(FactorShape(2, 3, 3, 2), 2)
    for bad in (
        (oracle.draw(4, 5), factors.left, factors.right, factors.sigma),
        (oracle.draw(4, 6), factors.left[:1], factors.right, factors.sigma),
        (oracle.draw(4, 6), factors.left, factors.right, factors.sigma[:1]),
        (oracle.draw(4, 6), factors.left[0], factors.right, factors.sigma),
    ):
        with pytest.raises(ValueError, match="expected x"):
            apply_kron(*bad)


def test_cheaper_order_is_taken_and_costs_are_counted() -> None:
    shape = FactorShape(16, 8, 8, 16)
    assert apply_cost(shape, 2, "left") == 2 * (16 * 8 * 16 + 16 * 16 * 8)
    assert apply_cost(shape, 2, "right") == 2 * (8 * 16 * 8 + 16 * 8 * 8)
    assert apply_cost(shape, 2) == apply_cost(shape, 2, "right")
    assert choose_order(shape, 1, tokens=1) == "right"
    assert choose_order(shape, 64, tokens=4096) == "dense"
    assert choose_order(FactorShape(64, 64, 64, 64), 1, tokens=4096, dense_products=1) == "left"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_with_delta(order: Order, dtype: torch.dtype, bias: bool) -> None:
    for shape in oracle.SHAPES:
        factors = oracle.draw_factors(shape, 2, dtype=torch.promote_types(dtype, torch.float32))
        leaves = tuple(t.requires_grad_() for t in (factors.left, factors.right, factors.sigma))
        weight = oracle.draw(shape.out_features, shape.in_features, seed=3, dtype=dtype)
        offset = oracle.draw(shape.out_features, seed=6, dtype=dtype) if bias else None
        x = oracle.draw(2, 3, shape.in_features, seed=9, dtype=dtype).requires_grad_()
        y = linear_with_delta(x, weight, offset, *leaves, order=order)
        delta = oracle.oracle_delta(Factors(*(leaf.detach() for leaf in leaves)))
        expected = x.detach().double() @ (weight.double() + delta).t() + (0 if offset is None else offset.double())
        assert y.dtype == dtype
        assert relative_error(y, expected) < RELATIVE_ERROR[dtype]
        assert relative_error(y, linear(x, weight, offset)) > 0.05
        apart = linear(x, weight, offset) + apply_kron(x, *leaves, order="left")
        upstream = oracle.draw(*y.shape, seed=13, dtype=dtype)
        for one, other in zip(*(torch.autograd.grad(t, (x, *leaves), upstream) for t in (y, apart)), strict=True):
            assert relative_error(one, other) < 2 * RELATIVE_ERROR[dtype]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("trained", [0, 1, 3])
def test_gradients_of_some_left_factors_only(order: Order, trained: int) -> None:
    """Those that are asked for, and all others, are what they are when all left factors are trained."""
    for shape in oracle.SHAPES:
        factors = oracle.draw_factors(shape, 3)
        leaves = tuple(t.requires_grad_() for t in (factors.left, factors.right, factors.sigma))
        weight = oracle.draw(shape.out_features, shape.in_features, seed=3)
        x = oracle.draw(5, shape.in_features, seed=9).requires_grad_()
        every, some = (
            torch.autograd.grad(
                linear_with_delta(x, weight, None, *leaves, order=order, trained_left=count).square().sum(),
                (x, *leaves[:2]),
            )
            for count in (None, trained)
        )
        assert relative_error(some[0], every[0]) < RELATIVE_ERROR[torch.float64]
        assert relative_error(some[2], every[2]) < RELATIVE_ERROR[torch.float64]
        assert bool((some[1][trained:] == 0).all())
        assert bool((every[1] != 0).any())
        if trained:
            assert relative_error(some[1][:trained], every[1][:trained]) < RELATIVE_ERROR[torch.float64]


def test_gradients_do_not_depend_on_autocast_around_the_backward() -> None:
    factors = oracle.draw_factors(FactorShape(4, 3, 2, 5), 2, dtype=torch.float32)
    weight = oracle.draw(8, 15, seed=3, dtype=torch.float32)
    left = factors.left.requires_grad_()
    found = []
    for enabled in (False, True):
        y = linear_with_delta(
            oracle.draw(6, 15, seed=9, dtype=torch.float32), weight, None, left, factors.right, factors.sigma
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found += torch.autograd.grad(y.square().sum(), left)
    assert torch.equal(*found)


def test_linear_with_a_zero_delta_is_the_layer_itself() -> None:
    shape = FactorShape(4, 3, 2, 5)
    factors = oracle.draw_factors(shape, 2, dtype=torch.float32)
    zero = Factors(torch.zeros_like(factors.left), factors.right, factors.sigma)
    weight, x = oracle.draw(8, 15, dtype=torch.float32), oracle.draw(6, 15, seed=1, dtype=torch.float32)
    for order in ORDERS:
        y = linear_with_delta(x, weight, None, zero.left, zero.right, zero.sigma, order=order)
        assert torch.equal(y, linear(x, weight))


def test_linear_with_delta_does_not_lose_the_gradient_of_a_trained_weight() -> None:
    factors = oracle.draw_factors(FactorShape(4, 3, 2, 5), 2)
    weight = oracle.draw(8, 15).requires_grad_()
    x = oracle.draw(6, 15, seed=1)
    linear_with_delta(x, weight, None, factors.left, factors.right, factors.sigma, order="dense").sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(8, 15))
    with pytest.raises(ValueError, match=r"expected a weight of shape \(8, 15\)"):
        linear_with_delta(x, weight.t(), None, factors.left, factors.right, factors.sigma)


# --- stacking and recompression --------------------------------------------------------------------------------------


def test_stacked_terms_subtract() -> None:
    oracle.check_difference(lambda trained, initial: stack_terms(trained, initial, signs=(1, -1)))


def test_stacking_refuses_what_does_not_fit() -> None:
    one, other = (oracle.draw_factors(FactorShape(2, 3, 3, n), 1) for n in (2, 4))
    with pytest.raises(ValueError, match="factors of one shape"):
        stack_terms(one, other)
    with pytest.raises(ValueError, match="expected 1 signs; got 2"):
        stack_terms(one, signs=(1, -1))
    with pytest.raises(ValueError, match="at least one"):
        stack_terms()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", oracle.SHAPES)
def test_recompression_of_a_difference_is_exact(shape: FactorShape, dtype: torch.dtype) -> None:
    trained = oracle.draw_factors(shape, 3, seed=1, dtype=dtype)
    initial = oracle.draw_factors(shape, 3, seed=5, dtype=dtype)
    stacked = stack_terms(trained, initial, signs=(1, -1))
    small, dropped = recompress(stacked)
    expected = oracle.oracle_delta(stacked)
    assert small.rank == min(6, shape.max_rank)
    assert small.left.dtype == dtype
    assert relative_error(oracle.oracle_delta(small), expected) < RELATIVE_ERROR[dtype]
    assert dropped < 1e-12
    assert bool((small.sigma[:-1] >= small.sigma[1:]).all())
    ones = torch.ones(small.rank, dtype=dtype)
    torch.testing.assert_close(small.left.flatten(1).norm(dim=1), ones)
    torch.testing.assert_close(small.right.flatten(1).norm(dim=1), ones)


def test_recompression_finds_the_true_rank_of_a_small_difference() -> None:
    # A trained adapter is near its start: two terms moved a little, one not at all.
    initial = oracle.draw_factors(FactorShape(6, 5, 5, 6), 3, dtype=torch.float32)
    step = 1e-3 * oracle.draw(6, 5, seed=7, dtype=torch.float32)
    left = initial.left.clone()
    left[:2] += step
    stacked = stack_terms(Factors(left, initial.right, initial.sigma), initial, signs=(1, -1))
    small, _ = recompress(stacked)
    # Both moved by the same step, so the difference is one Kronecker product (and float32 rounding of `left`).
    kept, dropped = recompress(stacked, rank=1)
    assert relative_error(oracle.oracle_delta(small), oracle.oracle_delta(stacked)) < 1e-6
    assert kept.rank == 1
    assert dropped < 1e-6


def test_truncated_recompression_reports_the_energy_it_drops_and_is_optimal() -> None:
    shape = FactorShape(5, 4, 3, 6)
    stacked = oracle.draw_factors(shape, 6)
    expected = oracle.oracle_delta(stacked)
    spectrum = torch.linalg.svdvals(oracle.oracle_rearrangement(expected, shape))
    for rank in range(1, 7):
        small, dropped = recompress(stacked, rank=rank)
        assert small.rank == rank
        share = float(spectrum[rank:].square().sum() / spectrum.square().sum())
        assert dropped == pytest.approx(share, abs=1e-12)
        assert relative_error(oracle.oracle_delta(small), expected) ** 2 == pytest.approx(share, abs=1e-10)


def test_recompression_of_nothing() -> None:
    factors = oracle.draw_factors(FactorShape(3, 4, 4, 3), 2, dtype=torch.float32)
    zero, dropped = recompress(stack_terms(factors, factors, signs=(1, -1)))
    assert (zero.rank, float(zero.sigma[0]), dropped) == (1, 0.0, 0.0)
    none, dropped = recompress(factors.terms([]))
    assert (none.rank, dropped) == (0, 0.0)
    cut, dropped = recompress(factors, rank=0)
    assert (cut.rank, dropped) == (0, 1.0)
    with pytest.raises(ValueError, match="rank from 0"):
        recompress(factors, rank=-1)
    with pytest.raises(ValueError, match="finite"):
        recompress(Factors(factors.left, factors.right, factors.sigma * float("nan")))


# --- Factors ----------------------------------------------------------------------------------------------------------


def test_factors_describe_themselves() -> None:
    factors = oracle.draw_factors(FactorShape(2, 3, 4, 5), 6, dtype=torch.bfloat16)
    assert (factors.rank, factors.shape) == (6, (2, 3, 4, 5))
    assert factors.parameters == factors.shape.parameters(6)
    assert factors.nbytes == 2 * factors.parameters
    assert factors.to(torch.float32).left.dtype == torch.float32
    assert factors.terms(1).rank == 1
    assert factors.terms(slice(2)).rank == 2
    assert torch.equal(factors.terms((4, 0)).sigma, factors.sigma[[4, 0]])
    assert torch.equal(factors.terms(torch.tensor([5])).left, factors.left[5:])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (((2, 3, 4), (2, 3, 4), (3,)), "same number of terms"),
        (((3, 4), (2, 3, 4), (2,)), "expected left"),
        (((2, 3, 4), (2, 3, 4), (2, 1)), "expected left"),
    ],
)
def test_factors_refuse_what_does_not_fit(sizes: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Factors(*(torch.zeros(size) for size in sizes))
    with pytest.raises(ValueError, match="floating point"):
        Factors(torch.zeros(1, 1, 1, dtype=torch.int64), torch.zeros(1, 1, 1), torch.zeros(1))


def test_principal_terms_of_a_weight_are_an_effect() -> None:
    weight = oracle.draw(12, 12)
    factors = kpsvd(weight, FactorShape(4, 3, 3, 4), 2).factors
    x = oracle.draw(5, 12, seed=1)
    change = apply_kron(x, factors.left, factors.right, factors.sigma)
    assert relative_error(x @ weight.t() + change, x @ weight.t()) > 0.1
