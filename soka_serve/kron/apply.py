"""The product of a delta with activations, from its Kronecker factors.

Per token X = x.view(n, q), Y = sum over k of sigma[k] * left[k] X right[k]^T, y = Y.flatten(). Three ways, none of
which copies the activations or keeps anything but the inputs for the backward (the rest is computed again):

- left first:  Z = (m*r, n) @ X, one small product per token; Y = Z.view(T*m, r*q) @ (r*q, p), one large product;
- right first: Z = X.view(T*n, q) @ (q, r*p), one large product; Y = (m, n*r) @ Z.view(n*r, p), one per token;
- dense: the delta is built for the moment, and multiplied by all tokens at once.

Both orders take all terms at once, so the sum over terms happens in the accumulator of the second product, and long
inputs go through in pieces, so that Z stays small. `soka_serve.kron.cost` chooses among the three.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from soka_serve.kron.cost import Order, choose_order
from soka_serve.kron.factors import rearrange, unrearrange
from soka_serve.kron.shapes import FactorShape

Terms = tuple[Tensor, Tensor, Tensor]  # left (r, m, n), right (r, p, q), sigma (r,)

_PIECE_VALUES = {"cpu": 1 << 21, "cuda": 1 << 26}  # most values of an intermediate: 8 MiB keeps to caches on a CPU


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
    return _with_autocast(x, lambda inputs: _apply(inputs, None, None, (left, right, sigma), order, len(left)))


def linear_with_delta(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    terms: Terms,
    *,
    trained_left: int | None = None,
    order: Order = "auto",
) -> Tensor:
    """A frozen linear layer and a delta together: x (weight + delta)^T + bias.

    With the delta built ("dense") the layer's own two products, forward and to its input, serve the delta as well, so
    the price of training it is one more product, its dense gradient; that is the faster way for many tokens and small
    layers. The sum weight + delta is formed in the dtype of the computation; in the other orders the second product
    adds to the layer's output, and to its input's gradient, in place. A half-precision weight would swallow a small
    delta, so there the delta is applied apart and added. Where the delta is exactly zero, the result is the layer's.

    Args:
        x: (..., in).
        weight: (out, in). Where it or the bias needs a gradient, the delta is applied apart.
        bias: (out,) or None.
        terms, order: left, right and sigma, and the order, as for `apply_kron`.
        trained_left: how many terms, from the first, have a left factor that needs a gradient; the others' is zero.
            None: all.

    Returns:
        (..., out), as `apply_kron`. Differentiable once in `x` and the terms.

    Raises:
        ValueError: the tensors do not fit together.
    """
    _check(x, *terms)
    shape, rank = _shape_of(terms), len(terms[0])
    if tuple(weight.shape) != (shape.out_features, shape.in_features):
        raise ValueError(f"expected a weight of shape {(shape.out_features, shape.in_features)}; got {weight.shape}")
    if order == "auto":
        order = choose_order(shape, rank, x.numel() // shape.in_features, dense_products=1)
    exact = weight.dtype == x.dtype and x.dtype.itemsize >= 4 and not torch.is_autocast_enabled(x.device.type)
    frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))
    if exact and frozen:
        return _apply(x, weight, bias, terms, order, rank if trained_left is None else trained_left)
    base = torch.nn.functional.linear(x, weight, bias)
    return base + apply_kron(x, *terms, order=order).to(base.dtype)


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
    x: Tensor, weight: Tensor | None, bias: Tensor | None, terms: Terms, order: Order, trained_left: int
) -> Tensor:
    left, right, sigma = terms
    shape = _shape_of(terms)
    tokens = x.numel() // shape.in_features
    if order == "auto":
        order = choose_order(shape, left.shape[0], tokens)
    work = torch.float32 if x.device.type == "cpu" and x.dtype.itemsize < 4 else x.dtype
    inputs = x.to(work).reshape(tokens, shape.in_features).contiguous()
    # Scaled before the cast: sigma and left are trained in float32, and their product is rounded once.
    scaled, right = (left * sigma[:, None, None]).to(work), right.to(work)
    function = {"dense": _Dense, "left": _LeftFirst, "right": _RightFirst}[order]
    out = function.apply(inputs, weight, bias, scaled, right, trained_left)  # type: ignore[no-untyped-call]
    return cast(Tensor, out).reshape(*x.shape[:-1], shape.out_features).to(x.dtype)


def _shape_of(terms: Terms) -> FactorShape:
    return FactorShape(*terms[0].shape[1:], *terms[1].shape[1:])


_Grads = tuple[Tensor | None, ...]


def _without_autocast(backward: Callable[[Any, Tensor], _Grads]) -> Callable[[Any, Tensor], _Grads]:
    """A backward that computes in the dtype of the forward, wherever it is called."""

    def run(ctx: Any, grad: Tensor) -> _Grads:
        with torch.autocast(grad.device.type, enabled=False):
            return backward(ctx, grad)

    return run


class _Dense(torch.autograd.Function):
    """(T, in), frozen weight and bias or None, scaled left (r, m, n), right (r, p, q) -> (T, out).

    Of left's gradients only those of the first `some` terms are wanted. An autograd function takes each tensor as an
    argument of its own, hence seven of them here and in the two others.
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor | None, bias: Tensor | None, left: Tensor, right: Tensor, some: int
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight, left, right)
        ctx.some = some
        return torch.nn.functional.linear(inputs, _dense_sum(weight, left, right), bias)

    @staticmethod
    @once_differentiable
    @_without_autocast
    def backward(ctx: Any, grad: Tensor) -> _Grads:
        inputs, weight, left, right = ctx.saved_tensors
        need_inputs, _, _, need_left, need_right, _ = ctx.needs_input_grad
        grad_inputs = grad_left = grad_right = None
        if need_inputs:
            grad_inputs = grad @ _dense_sum(weight, left, right)
        if need_left or need_right:
            matrix = rearrange(grad.t() @ inputs, FactorShape(*left.shape[1:], *right.shape[1:]))
            grad_left = (right[: ctx.some].flatten(1) @ matrix.t()).view(-1, *left.shape[1:])
            grad_left = _with_zeros(grad_left, left)
            grad_right = (left.flatten(1) @ matrix).view_as(right)
        return grad_inputs, None, None, grad_left, grad_right, None


def _dense_sum(weight: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    delta = unrearrange(left.flatten(1).t() @ right.flatten(1), FactorShape(*left.shape[1:], *right.shape[1:]))
    return delta if weight is None else delta.add_(weight)


def _with_zeros(grad: Tensor, like: Tensor) -> Tensor:
    """The gradient of the first terms, with zeros for the others, in the dtype of `like`."""
    missing = grad.new_zeros(like.shape[0] - grad.shape[0], *like.shape[1:])
    return torch.cat((grad, missing)).to(like.dtype)


class _LeftFirst(torch.autograd.Function):
    """As `_Dense`, with left applied first, some tokens at a time; all of one dtype."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor | None, bias: Tensor | None, left: Tensor, right: Tensor, some: int
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight, left, right)
        ctx.some = some
        rank, m, _ = left.shape
        p, q = right.shape[1:]
        stacked = right.transpose(1, 2).reshape(rank * q, p)
        out, beta = _start(inputs, weight, bias, m * p)
        for x, y in _pieces(left, right, inputs, out):
            y.view(-1, p).addmm_(_left_middle(x, left, q), stacked, beta=beta)
        return out

    @staticmethod
    @once_differentiable
    @_without_autocast
    def backward(ctx: Any, grad: Tensor) -> _Grads:
        inputs, weight, left, right = ctx.saved_tensors
        need_inputs, _, _, need_left, need_right, _ = ctx.needs_input_grad
        rank, m, n = left.shape
        p, q = right.shape[1:]
        some: int = ctx.some
        grad, grad_inputs, beta = _start_back(grad, weight, n * q, wanted=need_inputs)
        grad_left, grad_right = _sums(left, m * some, n), _sums(right, p, rank * q)
        to_right = right.transpose(0, 1).reshape(p, rank * q)
        to_left = left.permute(2, 1, 0).reshape(n, m * rank)
        for x, g, gx in _pieces(left, right, inputs, grad, inputs if grad_inputs is None else grad_inputs):
            tokens, rows = x.shape[0], g.view(-1, p)
            if need_right:
                grad_right += rows.t() @ _left_middle(x, left, q)
            if not (need_inputs or need_left):
                continue
            back = (rows @ to_right).view(tokens, m, rank, q)
            if grad_inputs is not None:
                terms = back.view(tokens, m * rank, q)
                gx.view(tokens, n, q).baddbmm_(to_left.expand(tokens, -1, -1), terms, beta=beta)
            if need_left:
                # Summed over tokens and q: copies with q running last, then one product.
                back = back[:, :, :some].reshape(tokens, m * some, q)
                grad_left += _rows_first(back) @ _rows_first(x.view(tokens, n, q)).t()
        all_left = _with_zeros(grad_left.view(m, some, n).transpose(0, 1), left) if need_left else None
        all_right = grad_right.view(p, rank, q).transpose(0, 1).to(right.dtype) if need_right else None
        return grad_inputs, None, None, all_left, all_right, None


class _RightFirst(torch.autograd.Function):
    """As `_LeftFirst`, with the two products in the other order."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor | None, bias: Tensor | None, left: Tensor, right: Tensor, some: int
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight, left, right)
        ctx.some = some
        rank, m, n = left.shape
        p = right.shape[1]
        stacked = left.permute(1, 2, 0).reshape(m, n * rank)
        out, beta = _start(inputs, weight, bias, m * p)
        for x, y in _pieces(left, right, inputs, out):
            tokens = x.shape[0]
            middle = _right_middle(x, right).view(tokens, n * rank, p)
            y.view(tokens, m, p).baddbmm_(stacked.expand(tokens, -1, -1), middle, beta=beta)
        return out

    @staticmethod
    @once_differentiable
    @_without_autocast
    def backward(ctx: Any, grad: Tensor) -> _Grads:
        inputs, weight, left, right = ctx.saved_tensors
        need_inputs, _, _, need_left, need_right, _ = ctx.needs_input_grad
        rank, m, n = left.shape
        p, q = right.shape[1:]
        some: int = ctx.some
        grad, grad_inputs, beta = _start_back(grad, weight, n * q, wanted=need_inputs)
        grad_left, grad_right = _sums(left, m, n * some), _sums(right, rank * p, q)
        to_left = left.permute(2, 0, 1).reshape(n * rank, m)
        to_right = right.reshape(rank * p, q)
        for x, g, gx in _pieces(left, right, inputs, grad, inputs if grad_inputs is None else grad_inputs):
            tokens = x.shape[0]
            columns = g.view(tokens, m, p)
            if need_left:
                middle = _right_middle(x, right[:some]).view(tokens, n * some, p)
                grad_left += _rows_first(columns) @ _rows_first(middle).t()
            if not (need_inputs or need_right):
                continue
            back = torch.matmul(to_left, columns).view(tokens * n, rank * p)
            if grad_inputs is not None:
                gx.view(-1, q).addmm_(back, to_right, beta=beta)
            if need_right:
                grad_right += back.t() @ x.view(-1, q)
        all_left = _with_zeros(grad_left.view(m, n, some).permute(2, 0, 1), left) if need_left else None
        all_right = grad_right.view(rank, p, q).to(right.dtype) if need_right else None
        return grad_inputs, None, None, all_left, all_right, None


def _sums(like: Tensor, rows: int, columns: int) -> Tensor:
    """Zeros in float32 at least, to which the pieces' gradients are added."""
    return torch.zeros(rows, columns, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


def _start(inputs: Tensor, weight: Tensor | None, bias: Tensor | None, width: int) -> tuple[Tensor, int]:
    """What a delta's product is added to, and the factor of it: the linear layer's output, or nothing (0)."""
    if weight is None:
        return inputs.new_empty(inputs.shape[0], width), 0
    return torch.nn.functional.linear(inputs, weight, bias), 1


def _start_back(grad: Tensor, weight: Tensor | None, width: int, *, wanted: bool) -> tuple[Tensor, Tensor | None, int]:
    """The gradient, contiguous, and what `_start` gives for the inputs' gradient, if that is wanted."""
    grad = grad.contiguous()
    return (grad, *_start(grad, None if weight is None else weight.t(), None, width)) if wanted else (grad, None, 0)


def _pieces(left: Tensor, right: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors cut along tokens so that the intermediates stay small; whole when traced by torch.compile."""
    if torch.compiler.is_compiling():
        yield tensors
        return
    rank, m, n = left.shape
    p, q = right.shape[1:]
    width = max(1, rank * max(m * q, n * p))
    limit = _PIECE_VALUES["cpu" if left.device.type == "cpu" else "cuda"]
    yield from zip(*(torch.split(tensor, max(64, limit // width)) for tensor in tensors), strict=True)


def _left_middle(inputs: Tensor, left: Tensor, q: int) -> Tensor:
    """(T*m, r*q): left[k] @ X for every term, so that the next product sums over k and q."""
    rank, m, n = left.shape
    tokens = inputs.shape[0]
    return torch.matmul(left.transpose(0, 1).reshape(m * rank, n), inputs.view(tokens, n, q)).view(tokens * m, rank * q)


def _right_middle(inputs: Tensor, right: Tensor) -> Tensor:
    """(T*n, r*p): X @ right[k]^T for every term; as (T, n*r, p) the next product sums over n and k."""
    rank, p, q = right.shape
    return inputs.view(-1, q) @ right.reshape(rank * p, q).t()


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
