"""The product of a delta with activations, from its Kronecker factors.

Per token X = x.view(n, q), Y = sum over k of sigma[k] * left[k] X right[k]^T, y = Y.flatten(). Three ways, none of
which copies the activations or keeps anything but the inputs for the backward (the rest is computed again):

- left first:  Z = (m*r, n) @ X, one small product per token; Y = Z.view(T*m, r*q) @ (r*q, p), one large product;
- right first: Z = X.view(T*n, q) @ (q, r*p), one large product; Y = (m, n*r) @ Z.view(n*r, p), one per token;
- dense: the delta is built for the moment, and multiplied by all tokens at once.

Both orders take all terms at once, so the sum over terms happens in the accumulator of the second product, and long
inputs go through in pieces, so that Z stays small. `eval/bench_apply.py` measures the three against each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from soka_serve.factors import rearrange, unrearrange
from soka_serve.shapes import FactorShape

Order = Literal["auto", "left", "right", "dense"]

# Work is counted in multiply-adds of a large matrix product, forward and backward together, fitted to what
# eval/bench_apply.py measured on a CPU from 128 to 4096 features: the factors' two products with their gradients and
# the recomputed intermediate cost 5 for each multiply-add, and every value that moves through memory costs 200.
_FACTOR_PRODUCTS = 5
_MOVED_VALUE = 200
_PIECE_VALUES = {"cpu": 1 << 21, "cuda": 1 << 26}  # most values of an intermediate: 8 MiB keeps to caches on a CPU


def apply_cost(shape: FactorShape, rank: int, order: Order = "auto") -> int:
    """Multiply-adds per token of `apply_kron`; "auto" is the cheaper of "left" and "right".

    >>> shape = FactorShape(64, 64, 64, 64)
    >>> apply_cost(shape, rank=1), apply_cost(shape, rank=1, order="dense")
    (524288, 16777216)
    """
    m, n, p, q = shape
    costs = {"left": rank * m * q * (n + p), "right": rank * n * p * (q + m)}
    if order == "dense":
        return shape.out_features * shape.in_features
    return min(costs.values()) if order == "auto" else costs[order]


def cheaper_order(shape: FactorShape) -> Literal["left", "right"]:
    """The order of the two factors with fewer multiply-adds; "left" when they are equal."""
    return "left" if apply_cost(shape, 1, "left") <= apply_cost(shape, 1, "right") else "right"


def choose_order(
    shape: FactorShape, rank: int, tokens: int, *, dense_products: int = 3
) -> Literal["left", "right", "dense"]:
    """What "auto" means: dense where building the delta and multiplying all tokens at once is less work.

    Args:
        shape, rank, tokens: the case.
        dense_products: large products that the dense way takes, forward and backward together: 3 alone, 1 more than
            the layer's own where those carry the delta as well (`linear_with_delta`).

    >>> choose_order(FactorShape(64, 64, 64, 64), rank=4, tokens=2048)
    'left'
    >>> choose_order(FactorShape(64, 64, 64, 64), rank=64, tokens=2048)
    'dense'
    >>> choose_order(FactorShape(64, 64, 64, 64), rank=64, tokens=1)
    'left'
    """
    order = cheaper_order(shape)
    middle = rank * (shape.m * shape.q if order == "left" else shape.n * shape.p)
    moved = shape.in_features + shape.out_features + middle
    factors = tokens * (_FACTOR_PRODUCTS * apply_cost(shape, rank) + _MOVED_VALUE * moved)
    build = 3 * (rank + _MOVED_VALUE)  # per value of the delta: made twice, its gradient reduced to the factors'
    dense = (tokens * dense_products + build) * apply_cost(shape, rank, "dense")
    return "dense" if dense < factors else order


def apply_kron(x: Tensor, left: Tensor, right: Tensor, sigma: Tensor, *, order: Order = "auto") -> Tensor:
    """The delta times each row of `x`.

    Semantics: y[..., :] = sum over k of sigma[k] * kron(left[k], right[k]) @ x[..., :].

    Args:
        x: (..., in) with in = n*q, floating point; any leading dimensions, none and empty ones included.
        left: (r, m, n). r = 0 gives zeros.
        right: (r, p, q).
        sigma: (r,).
        order: which factor meets the input first, or "dense"; "auto" chooses by shape, rank and number of tokens
            (`choose_order`).

    Returns:
        (..., out) with out = m*p, in the dtype of `x` (under autocast, in the autocast dtype, as a linear layer).
        Differentiable once in all four tensors.

    Precision: float32 and float64 inputs are computed in that dtype. Half precision is computed in float32 on the
    CPU and rounded once; on a GPU the products run in half precision with float32 accumulation, the sum over terms
    included, so the one further rounding is that of the intermediate.

    Raises:
        ValueError: the tensors do not fit together.
    """
    _check(x, left, right, sigma)
    return _with_autocast(x, lambda inputs: _apply(inputs, None, None, left, right, sigma, order))


def linear_with_delta(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    left: Tensor,
    right: Tensor,
    sigma: Tensor,
    *,
    order: Order = "auto",
) -> Tensor:
    """A frozen linear layer and a delta together: x (weight + delta)^T + bias.

    With the delta built ("dense") the layer's own two products, forward and to its input, serve the delta as well, so
    the price of training it is one more product, its dense gradient; that is the faster way for many tokens and small
    layers. The sum weight + delta is formed in the dtype of the computation; a half-precision weight would swallow a
    small delta, so there, and in the other orders, the delta is applied apart and added. Where the delta is exactly
    zero, the result is the layer's own.

    Args:
        x: (..., in).
        weight: (out, in). Where it or the bias needs a gradient, the delta is applied apart.
        bias: (out,) or None.
        left, right, sigma, order: as for `apply_kron`.

    Returns:
        (..., out), as `apply_kron`. Differentiable once in `x`, `left`, `right` and `sigma`.

    Raises:
        ValueError: the tensors do not fit together.
    """
    _check(x, left, right, sigma)
    shape = FactorShape(left.shape[1], left.shape[2], right.shape[1], right.shape[2])
    if tuple(weight.shape) != (shape.out_features, shape.in_features):
        raise ValueError(f"expected a weight of shape {(shape.out_features, shape.in_features)}; got {weight.shape}")
    if order == "auto":
        order = choose_order(shape, left.shape[0], x.numel() // shape.in_features, dense_products=1)
    exact = weight.dtype == x.dtype and x.dtype.itemsize >= 4 and not torch.is_autocast_enabled(x.device.type)
    frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))
    if order == "dense" and exact and frozen:
        return _apply(x, weight, bias, left, right, sigma, order)
    base = torch.nn.functional.linear(x, weight, bias)
    return base + apply_kron(x, left, right, sigma, order=order).to(base.dtype)


def _with_autocast(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Run `function` on `x` as a linear layer runs under autocast: in the autocast dtype, without casts inside."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return function(x)
    if x.dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        return function(x)


def _apply(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, left: Tensor, right: Tensor, sigma: Tensor, order: Order
) -> Tensor:
    shape = FactorShape(left.shape[1], left.shape[2], right.shape[1], right.shape[2])
    tokens = x.numel() // shape.in_features
    if order == "auto":
        order = choose_order(shape, left.shape[0], tokens)
    work = torch.float32 if x.device.type == "cpu" and x.dtype.itemsize < 4 else x.dtype
    inputs = x.to(work)
    # Scaled before the cast: sigma and left are trained in float32, and their product is rounded once.
    scaled, right = (left * sigma[:, None, None]).to(work), right.to(work)
    if order == "dense":
        out = _Dense.apply(inputs.reshape(tokens, shape.in_features), weight, bias, scaled, right)  # type: ignore[no-untyped-call]
    else:
        function = _LeftFirst if order == "left" else _RightFirst
        out = function.apply(inputs.reshape(tokens, shape.n, shape.q), scaled, right)  # type: ignore[no-untyped-call]
    return cast(Tensor, out).reshape(*x.shape[:-1], shape.out_features).to(x.dtype)


_Grads = tuple[Tensor | None, ...]


class _Dense(torch.autograd.Function):
    """inputs (T, in), frozen weight (out, in) and bias, scaled left (r, m, n), right (r, p, q) -> (T, out)."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor | None, bias: Tensor | None, left: Tensor, right: Tensor
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight, left, right)
        return torch.nn.functional.linear(inputs, _dense_sum(weight, left, right), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> _Grads:
        inputs, weight, left, right = ctx.saved_tensors
        need_inputs, _, _, need_left, need_right = ctx.needs_input_grad
        grad_inputs = grad_left = grad_right = None
        if need_inputs:
            grad_inputs = grad @ _dense_sum(weight, left, right)
        if need_left or need_right:
            matrix = rearrange(grad.t() @ inputs, FactorShape(*left.shape[1:], *right.shape[1:]))
            grad_left = (right.flatten(1) @ matrix.t()).view_as(left)
            grad_right = (left.flatten(1) @ matrix).view_as(right)
        return grad_inputs, None, None, grad_left, grad_right


def _dense_sum(weight: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    delta = unrearrange(left.flatten(1).t() @ right.flatten(1), FactorShape(*left.shape[1:], *right.shape[1:]))
    return delta if weight is None else delta.add_(weight)


class _LeftFirst(torch.autograd.Function):
    """inputs (T, n, q), scaled left (r, m, n), right (r, p, q) -> (T, m, p); all of one dtype."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, left, right)
        pieces = [_left_first(piece, left, right) for piece in _pieces(inputs, left, right)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> _Grads:
        inputs, left, right = ctx.saved_tensors
        return _sum_pieces(_left_first_grads, ctx.needs_input_grad, inputs, grad, left, right)


class _RightFirst(torch.autograd.Function):
    """As `_LeftFirst`, with the two products in the other order."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, left, right)
        pieces = [_right_first(piece, left, right) for piece in _pieces(inputs, left, right)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> _Grads:
        inputs, left, right = ctx.saved_tensors
        return _sum_pieces(_right_first_grads, ctx.needs_input_grad, inputs, grad, left, right)


def _pieces(tensor: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, ...]:
    """The tensor cut along tokens so that the intermediates stay small; whole when traced by torch.compile."""
    if torch.compiler.is_compiling():
        return (tensor,)
    rank, m, n = left.shape
    p, q = right.shape[1:]
    width = max(1, rank * max(m * q, n * p))
    limit = _PIECE_VALUES["cpu" if tensor.device.type == "cpu" else "cuda"]
    return torch.split(tensor, max(64, limit // width))


def _sum_pieces(
    grads_of: Any, needs: tuple[bool, bool, bool], inputs: Tensor, grad: Tensor, left: Tensor, right: Tensor
) -> _Grads:
    """Gradients piece by piece: those of the inputs side by side, those of the factors summed."""
    parts = [
        grads_of(needs, *pair, left, right)
        for pair in zip(_pieces(inputs, left, right), _pieces(grad, left, right), strict=True)
    ]
    if len(parts) == 1:
        return cast(_Grads, parts[0])
    by_tensor = list(zip(*parts, strict=True))
    grad_inputs = torch.cat(by_tensor[0]) if needs[0] else None
    summed = [torch.stack(by_tensor[i]).sum(0) if needs[i] else None for i in (1, 2)]
    return grad_inputs, *summed


def _left_middle(inputs: Tensor, left: Tensor) -> Tensor:
    """(T, m*r, q): left[k] @ X for every term, rows ordered (i, k) so that the next product sums over k and q."""
    rank, m, n = left.shape
    return torch.matmul(left.transpose(0, 1).reshape(m * rank, n), inputs)


def _left_first(inputs: Tensor, left: Tensor, right: Tensor) -> Tensor:
    rank, m, _ = left.shape
    p, q = right.shape[1:]
    tokens = inputs.shape[0]
    middle = _left_middle(inputs, left).view(tokens * m, rank * q)
    return (middle @ right.transpose(1, 2).reshape(rank * q, p)).view(tokens, m, p)


def _left_first_grads(
    needs: tuple[bool, bool, bool], inputs: Tensor, grad: Tensor, left: Tensor, right: Tensor
) -> _Grads:
    rank, m, n = left.shape
    p, q = right.shape[1:]
    tokens = inputs.shape[0]
    rows = grad.reshape(tokens * m, p)
    grad_inputs = grad_left = grad_right = None
    if needs[2]:
        middle = _left_middle(inputs, left).view(tokens * m, rank * q)
        grad_right = (rows.t() @ middle).view(p, rank, q).transpose(0, 1)
        del middle
    if needs[0] or needs[1]:
        back = (rows @ right.transpose(0, 1).reshape(p, rank * q)).view(tokens, m * rank, q)
        if needs[0]:
            grad_inputs = torch.matmul(left.permute(2, 1, 0).reshape(n, m * rank), back)
        if needs[1]:
            # Summed over tokens and q: copies with q running last, then one product.
            summed = _rows_first(back) @ _rows_first(inputs).t()
            grad_left = summed.view(m, rank, n).transpose(0, 1)
    return grad_inputs, grad_left, grad_right


def _right_middle(inputs: Tensor, right: Tensor) -> Tensor:
    """(T*n, r*p): X @ right[k]^T for every term; as (T, n*r, p) the next product sums over n and k."""
    rank, p, q = right.shape
    return inputs.reshape(-1, q) @ right.reshape(rank * p, q).t()


def _right_first(inputs: Tensor, left: Tensor, right: Tensor) -> Tensor:
    rank, m, n = left.shape
    middle = _right_middle(inputs, right).view(inputs.shape[0], n * rank, right.shape[1])
    return torch.matmul(left.permute(1, 2, 0).reshape(m, n * rank), middle)


def _right_first_grads(
    needs: tuple[bool, bool, bool], inputs: Tensor, grad: Tensor, left: Tensor, right: Tensor
) -> _Grads:
    rank, m, n = left.shape
    p, q = right.shape[1:]
    tokens = inputs.shape[0]
    grad_inputs = grad_left = grad_right = None
    if needs[1]:
        middle = _right_middle(inputs, right).view(tokens, n * rank, p)
        summed = _rows_first(grad) @ _rows_first(middle).t()
        grad_left = summed.view(m, n, rank).permute(2, 0, 1)
        del middle
    if needs[0] or needs[2]:
        back = torch.matmul(left.permute(2, 0, 1).reshape(n * rank, m), grad).view(tokens * n, rank * p)
        if needs[0]:
            grad_inputs = (back @ right.reshape(rank * p, q)).view(tokens, n, q)
        if needs[2]:
            grad_right = (back.t() @ inputs.reshape(tokens * n, q)).view(rank, p, q)
    return grad_inputs, grad_left, grad_right


def _rows_first(tensor: Tensor) -> Tensor:
    """(T, rows, cols) as (rows, T*cols)."""
    tokens, rows, cols = tensor.shape
    return tensor.transpose(0, 1).reshape(rows, tokens * cols)


def _check(x: Tensor, left: Tensor, right: Tensor, sigma: Tensor) -> None:
    fits = (
        left.ndim == right.ndim == 3
        and sigma.ndim == 1
        and left.shape[0] == right.shape[0] == sigma.shape[0]
        and x.ndim >= 1
        and x.shape[-1] == left.shape[2] * right.shape[2]
    )
    if not fits:
        raise ValueError(
            "expected x (..., n*q), left (r, m, n), right (r, p, q), sigma (r,); got "
            f"{tuple(x.shape)}, {tuple(left.shape)}, {tuple(right.shape)}, {tuple(sigma.shape)}"
        )
