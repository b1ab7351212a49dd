"""The product of a delta with activations, alone and in a linear layer, against float64 oracles."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from soka_serve.kron import Factors, apply_kron, linear_with_delta
from soka_serve.kron import apply as kron_apply
from soka_serve.kron.cost import Order, Ways, apply_cost, choose_ways
from soka_serve.kron.shapes import FactorShape
from tests.support import kron_oracle as oracle
from tests.support.tolerances import RELATIVE_ERROR, relative_error

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ORDERS: list[Order] = ["auto", "left", "right", "dense"]


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
        monkeypatch.setitem(kron_apply._PIECE_BYTES, "cpu", 1)  # the smallest pieces: 64 tokens
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


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_a_large_layer_in_bfloat16(order: Order, autocast: bool, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients are those of float64 up to bfloat16's rounding, computed in it or in float32."""
    monkeypatch.setattr(kron_apply, "NATIVE", {torch.bfloat16} if native else set())
    shape, tokens = FactorShape(16, 24, 12, 24), 200
    theta, start = (oracle.draw_factors(shape, 2, seed=s, dtype=torch.float32, scale=0.1) for s in (0, 20))
    leaves = (theta.left.requires_grad_(), theta.right.requires_grad_(), theta.sigma.requires_grad_())
    weight = oracle.draw(shape.out_features, shape.in_features, seed=3, dtype=torch.bfloat16)
    bias = oracle.draw(shape.out_features, seed=6, dtype=torch.bfloat16)
    x = oracle.draw(tokens, shape.in_features, seed=9, dtype=torch.bfloat16).requires_grad_()
    upstream = oracle.draw(tokens, shape.out_features, seed=13, dtype=torch.bfloat16)
    given = x.float() if autocast else x
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = linear_with_delta(given, weight, bias, leaves, initial=(start.left, start.right, start.sigma), order=order)
    assert y.dtype == torch.bfloat16
    exact = [leaf.detach().double().requires_grad_() for leaf in (x, *leaves)]
    terms = zip(*exact[1:], strict=True)
    delta = torch.stack([s * torch.kron(left, right) for left, right, s in terms]).sum(0) - oracle.oracle_delta(start)
    expected = exact[0] @ (weight.double() + delta).t() + bias.double()
    assert relative_error(y, expected) < RELATIVE_ERROR[torch.bfloat16]
    assert relative_error(linear(x, weight, bias), expected) > 0.05
    grads = torch.autograd.grad(y, (x, *leaves), upstream)
    assert [grad.dtype for grad in grads] == [torch.bfloat16, *[torch.float32] * 3]
    for one, other in zip(grads, torch.autograd.grad(expected, exact, upstream.double()), strict=True):
        assert relative_error(one, other) < RELATIVE_ERROR[torch.bfloat16]


@pytest.mark.parametrize("order", ORDERS)
def test_a_weight_in_bfloat16_swallows_no_small_delta(order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight's part of these outputs is 0, and 1 + delta is 1 in bfloat16."""
    monkeypatch.setattr(kron_apply, "NATIVE", {torch.bfloat16})
    monkeypatch.setattr(kron_apply, "_SMALL_WORK", 0)
    shape = FactorShape(8, 8, 8, 8)
    factors = oracle.draw_factors(shape, 2, dtype=torch.float32, scale=1e-4)
    x = oracle.draw(16, 32, dtype=torch.bfloat16)
    x = torch.cat([x, -x], 1)
    weight = torch.ones(64, 64, dtype=torch.bfloat16)
    y = linear_with_delta(x, weight, None, (factors.left, factors.right, factors.sigma), order=order)
    assert relative_error(y, x.double() @ oracle.oracle_delta(factors).t()) < RELATIVE_ERROR[torch.bfloat16]
    zero = (torch.zeros_like(factors.left), factors.right, factors.sigma)
    assert torch.equal(linear_with_delta(x, weight, None, zero, order=order), linear(x, weight))


def test_half_precision_is_multiplied_where_that_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, large, small = FactorShape(16, 24, 12, 24), torch.empty(200, 576), torch.empty(8, 576)
    found = []
    for native in ({torch.bfloat16}, set()):
        monkeypatch.setattr(kron_apply, "NATIVE", native)
        found += [kron_apply._work_dtype(x, torch.bfloat16, shape) for x in (large, small, large.to("meta"))]
    assert found == [torch.bfloat16, torch.float32, torch.bfloat16, torch.float32, torch.float32, torch.bfloat16]
    assert kron_apply._work_dtype(large, torch.float16, shape) == torch.float32
    assert kron_apply._work_dtype(small, torch.float64, shape) == torch.float64


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
    assert choose_ways(shape, 1, tokens=1) == Ways("right", "right")
    assert choose_ways(shape, 64, tokens=4096) == Ways("dense", "dense")
    large = FactorShape(64, 64, 64, 64)
    assert choose_ways(large, 1, tokens=4096, fused=True) == Ways("dense", "left")
    assert choose_ways(large, 1, tokens=16, fused=True) == Ways("left", "left")
    assert choose_ways(large, 2, tokens=256, stacked=4) == choose_ways(large, 2, tokens=256) == Ways("left", "left")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_with_delta(order: Order, dtype: torch.dtype, bias: bool) -> None:
    for shape in oracle.SHAPES:
        factors = oracle.draw_factors(shape, 2, dtype=torch.promote_types(dtype, torch.float32))
        leaves = (factors.left.requires_grad_(), factors.right.requires_grad_(), factors.sigma.requires_grad_())
        weight = oracle.draw(shape.out_features, shape.in_features, seed=3, dtype=dtype)
        offset = oracle.draw(shape.out_features, seed=6, dtype=dtype) if bias else None
        x = oracle.draw(2, 3, shape.in_features, seed=9, dtype=dtype).requires_grad_()
        y = linear_with_delta(x, weight, offset, leaves, order=order)
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
@pytest.mark.parametrize("alone", [False, True])
def test_initial_terms_are_subtracted_and_get_no_gradient(order: Order, alone: bool) -> None:
    """Values and gradients of x (weight + delta - initial delta)^T, with and without the weight."""
    for shape in oracle.SHAPES:
        theta, start = oracle.draw_factors(shape, 3), oracle.draw_factors(shape, 3, seed=20)
        leaves = (theta.left.requires_grad_(), theta.right.requires_grad_(), theta.sigma.requires_grad_())
        initial = (start.left.requires_grad_(), start.right, start.sigma)
        weight = oracle.draw(shape.out_features, shape.in_features, seed=3)
        x = oracle.draw(5, shape.in_features, seed=9).requires_grad_()
        delta = torch.stack([s * torch.kron(a, b) for a, b, s in zip(*leaves, strict=True)]).sum(0)
        total = delta - oracle.oracle_delta(Factors(start.left.detach(), *initial[1:])) + (0 if alone else weight)
        if alone:
            y = apply_kron(x, *leaves, initial=initial, order=order)
        else:
            y = linear_with_delta(x, weight, None, leaves, initial=initial, order=order)
        assert relative_error(y, x @ total.t()) < RELATIVE_ERROR[torch.float64]
        actual, expected = (torch.autograd.grad(t.square().sum(), (x, *leaves)) for t in (y, x @ total.t()))
        for one, other in zip(actual, expected, strict=True):
            assert relative_error(one, other) < 10 * RELATIVE_ERROR[torch.float64]
    with pytest.raises(ValueError, match="initial terms alike"):
        apply_kron(x, *leaves, initial=(start.left[:1], start.right[:1], start.sigma[:1]))


def test_gradients_do_not_depend_on_autocast_around_the_backward() -> None:
    factors = oracle.draw_factors(FactorShape(4, 3, 2, 5), 2, dtype=torch.float32)
    weight = oracle.draw(8, 15, seed=3, dtype=torch.float32)
    left = factors.left.requires_grad_()
    found = []
    for enabled in (False, True):
        y = linear_with_delta(
            oracle.draw(6, 15, seed=9, dtype=torch.float32), weight, None, (left, factors.right, factors.sigma)
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
        y = linear_with_delta(x, weight, None, (zero.left, zero.right, zero.sigma), order=order)
        assert torch.equal(y, linear(x, weight))


def test_linear_with_delta_does_not_lose_the_gradient_of_a_trained_weight() -> None:
    factors = oracle.draw_factors(FactorShape(4, 3, 2, 5), 2)
    weight = oracle.draw(8, 15).requires_grad_()
    x = oracle.draw(6, 15, seed=1)
    terms = (factors.left, factors.right, factors.sigma)
    linear_with_delta(x, weight, None, terms, order="dense").sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(8, 15))
    with pytest.raises(ValueError, match=r"expected a weight of shape \(8, 15\)"):
        linear_with_delta(x, weight.t(), None, terms)
