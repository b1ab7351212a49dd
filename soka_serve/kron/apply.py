"""The product of a delta with activations, from its Kronecker factors.

Per token X = x.view(n, q), Y = sum over k of sigma[k] * left[k] X right[k]^T, y = Y.flatten(). Three ways, none of
which copies the activations or keeps anything but the inputs for the backward (the rest is computed again):

- left first:  Z = (m*r, n) @ X, one small product per token; Y = Z.view(T*m, r*q) @ (r*q, p), one large product;
- right first: Z = X.view(T*n, q) @ (q, r*p), one large product; Y = (m, n*r) @ Z.view(n*r, p), one per token;
- dense: the delta is built for the moment, and multiplied by all tokens at once.

Both orders take all terms at once, so the sum over terms happens in the accumulator of the second product, and long
inputs go through in pieces, so that Z stays small. The gradients of the factors have the same three ways: from small
intermediates of either order, or from the dense gradient. `soka_serve.kron.cost` chooses for the product and for the
gradients apart: building a delta is cheap, its dense gradient is one more product of the layer's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from soka_serve.kron.cost import Order, Ways, choose_ways
from soka_serve.kron.cpu import NATIVE
from soka_serve.kron.factors import Factors, rearrange, stack_difference, unrearrange
from soka_serve.kron.shapes import FactorShape

Terms = tuple[Tensor, Tensor, Tensor]  # left (r, m, n), right (r, p, q), sigma (r,)

_PIECE_BYTES = {"cpu": 1 << 23, "cuda": 1 << 28}  # most of an intermediate: 8 MiB keeps to caches on a CPU
_SMALL_WORK = 1 << 24  # multiply-adds of a layer below which a CPU computes half precision in float32: calls cost more
_ADDED_APART = 4  # most terms that are added to a weight one by one: more are summed in one product


def apply_kron(
    x: Tensor, left: Tensor, right: Tensor, sigma: Tensor, *, initial: Terms | None = None, order: Order = "auto"
) -> Tensor:
    """The delta times each row of `x`.

    Semantics: y[..., :] = sum over k of sigma[k] * kron(left[k], right[k]) @ x[..., :], minus the same with `initial`.

    Args:
        x: (..., in) with in = n*q, floating point; any leading dimensions, none and empty ones included.
        left: (r, m, n). r = 0 gives zeros.
        right: (r, p, q).
        sigma: (r,).
        initial: left, right and sigma of as many terms to subtract, which get no gradient (`stack_difference`).
        order: which factor meets the input first, or "dense"; "auto" chooses by shape, rank and number of tokens
            (`choose_ways`).

    Returns:
        (..., out) with out = m*p, in the dtype of `x` (under autocast, in the autocast dtype, as a linear layer).
        Differentiable once in `x`, `left`, `right` and `sigma`.

    Precision: float32 and float64 inputs are computed in that dtype. So is half precision on a GPU, and bfloat16 in
    large products on a CPU that multiplies it natively (`soka_serve.kron.cpu`): products accumulate in float32, the sum
    over terms included, so that the one further rounding is that of the intermediate. Elsewhere half precision is
    computed in float32 and rounded once. Gradients of the factors are rounded likewise, then summed in float32.

    Raises:
        ValueError: the tensors do not fit together.
    """
    terms = (left, right, sigma)
    _check(x, terms, initial)
    return _with_autocast(x, lambda inputs: _apply(inputs, (None, None), terms, initial, order))


def linear_with_delta(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    terms: Terms,
    *,
    initial: Terms | None = None,
    order: Order = "auto",
) -> Tensor:
    """A frozen linear layer and a delta together: x (weight + delta)^T + bias.

    With the delta built ("dense") the layer's own two products, forward and to its input, serve the delta as well: the
    sum weight + delta is formed in the dtype of the computation. In the other orders the second product adds to the
    layer's output, and to its input's gradient, in place. A half-precision weight would swallow a small delta, so there
    a built one is multiplied apart and adds to them likewise. Where the delta is exactly zero, the result is the
    layer's.

    Args:
        x: (..., in).
        weight: (out, in). Where it or the bias needs a gradient, or where half precision is not computed as such, the
            delta is applied apart, and added.
        bias: (out,) or None.
        terms, initial, order: left, right and sigma, those to subtract, and the order, as for `apply_kron`.

    Returns:
        (..., out), as `apply_kron`. Differentiable once in `x` and `terms`.

    Raises:
        ValueError: the tensors do not fit together.
    """
    _check(x, terms, initial)
    shape = _shape_of(terms)
    if tuple(weight.shape) != (shape.out_features, shape.in_features):
        raise ValueError(f"expected a weight of shape {(shape.out_features, shape.in_features)}; got {weight.shape}")
    frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))

    def together(inputs: Tensor) -> Tensor:
        layer = weight.to(inputs.dtype), None if bias is None else bias.to(inputs.dtype)
        return _apply(inputs, layer, terms, initial, order)

    computed, autocast = _computed_dtype(x), torch.is_autocast_enabled(x.device.type)
    if frozen and _work_dtype(x, computed, shape) == computed and (autocast or weight.dtype == computed):
        return _with_autocast(x, together)
    base = torch.nn.functional.linear(x, weight, bias)
    return base + apply_kron(x, *terms, initial=initial, order=order).to(base.dtype)


def _with_autocast(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Run `function` on `x` as a linear layer runs under autocast: in the autocast dtype, without casts inside."""
    dtype = _computed_dtype(x)
    if not torch.is_autocast_enabled(x.device.type):
        return function(x)
    with torch.autocast(x.device.type, enabled=False):
        return function(x.to(dtype))


def _computed_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear layer computes: autocast's, where that is at work and the input takes it."""
    takes_it = torch.is_autocast_enabled(x.device.type) and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return torch.get_autocast_dtype(x.device.type) if takes_it else x.dtype


_Layer = tuple[Tensor | None, Tensor | None]  # frozen weight and bias


def _apply(x: Tensor, layer: _Layer, terms: Terms, initial: Terms | None, order: Order) -> Tensor:
    shape, rank = _shape_of(terms), len(terms[0])
    tokens = x.numel() // shape.in_features
    if order == "auto":
        stacked = rank if initial is None else 2 * rank
        fused = layer[0] is not None and _takes_delta(layer[0])
        ways = choose_ways(shape, rank, tokens, stacked=stacked, fused=fused)
    else:
        ways = Ways(order, order)
    work = _work_dtype(x, x.dtype, shape)
    inputs = x.to(work).reshape(tokens, shape.in_features).contiguous()
    out = _Product.apply(ways, inputs, *layer, *terms, *(initial or ()))  # type: ignore[no-untyped-call]
    return cast(Tensor, out).reshape(*x.shape[:-1], shape.out_features).to(x.dtype)


def _work_dtype(x: Tensor, dtype: torch.dtype, shape: FactorShape) -> torch.dtype:
    """The dtype in which inputs are multiplied whose own is `dtype`, that of autocast in the end."""
    if x.device.type != "cpu" or dtype.itemsize >= 4:
        return dtype
    return dtype if dtype in NATIVE and x.numel() * shape.out_features >= _SMALL_WORK else torch.float32


def _takes_delta(weight: Tensor) -> bool:
    """Whether a small delta can be added to a weight without being rounded away."""
    return weight.dtype.itemsize >= 4


def _shape_of(terms: tuple[Tensor, ...]) -> FactorShape:
    return FactorShape(*terms[0].shape[1:], *terms[1].shape[1:])


_Grads = tuple[Tensor | None, ...]


def _without_autocast(backward: Callable[[Any, Tensor], _Grads]) -> Callable[[Any, Tensor], _Grads]:
    """A backward that computes in the dtype of the forward, wherever it is called."""

    def run(ctx: Any, grad: Tensor) -> _Grads:
        with torch.autocast(grad.device.type, enabled=False):
            return backward(ctx, grad)

    return run


class _Product(torch.autograd.Function):
    """Ways, (T, in), frozen weight and bias or None, theta's left, right and sigma, theta0's or nothing -> (T, out).

    Only theta's r terms have gradients, so those cost r terms; what is applied has 2r where there is a theta0.
    """

    @staticmethod
    def forward(
        ctx: Any, ways: Ways, inputs: Tensor, weight: Tensor | None, bias: Tensor | None, *terms: Tensor
    ) -> Tensor:
        left, right = _applied(terms, inputs.dtype)
        ctx.save_for_backward(inputs, weight, left, right, *terms[:3])
        ctx.ways = ways
        if ways.product == "dense" and (weight is None or _takes_delta(weight)):
            return torch.nn.functional.linear(inputs, _dense_sum(weight, left, right), bias)
        out = None if weight is None else torch.nn.functional.linear(inputs, weight, bias)
        if ways.product == "dense":
            return cast(Tensor, out).addmm_(inputs, _dense_sum(None, left, right).t())
        return _in_order(ways.product, inputs, left, right, out)

    @staticmethod
    @once_differentiable
    @_without_autocast
    def backward(ctx: Any, grad: Tensor) -> _Grads:
        inputs, weight, left, right, *theta = ctx.saved_tensors
        _, need_inputs, _, _, need_left, need_right, need_sigma, *others = ctx.needs_input_grad
        ways: Ways = ctx.ways
        grad = grad.contiguous()
        grad_inputs = grad_left = grad_right = grad_sigma = None
        if need_inputs:
            apart = weight is not None and not (ways.product == "dense" and _takes_delta(weight))
            out = grad @ weight if apart else None
            if ways.product == "dense":
                dense = _dense_sum(None if apart else weight, left, right)
                grad_inputs = grad @ dense if out is None else out.addmm_(grad, dense)
            else:  # the transposed delta, through the same intermediate
                order: Order = "left" if ways.product == "right" else "right"
                grad_inputs = _in_order(order, grad, left.transpose(1, 2), right.transpose(1, 2), out)
        if need_left or need_right or need_sigma:
            wanted = (need_left or need_sigma, need_right)
            on_scaled, grad_right = _gradients(ways.gradients, inputs, grad, *_applied(theta, grad.dtype), wanted)
            if on_scaled is not None:
                grad_left, grad_sigma = on_scaled * theta[2][:, None, None], (on_scaled * theta[0]).sum((1, 2))
        return None, grad_inputs, None, None, grad_left, grad_right, grad_sigma, *(None for _ in others)


def _applied(terms: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Left, scaled by sigma, and right of the terms that are applied: theta's, or those of theta - theta0.

    Scaled before the cast: sigma and left are trained in float32, and their product is rounded once.
    """
    factors = Factors(*terms[:3])
    if len(terms) > 3:
        factors = stack_difference(factors, Factors(*terms[3:]))
    return (factors.left * factors.sigma[:, None, None]).to(dtype), factors.right.to(dtype)


def _dense_sum(weight: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """(out, in): the delta, added to the weight where there is one; few terms one by one, in place."""
    m, n, p, q = shape = _shape_of((left, right))
    if weight is None or not 1 <= len(left) <= _ADDED_APART:
        delta = unrearrange(left.flatten(1).t() @ right.flatten(1), shape)
        return delta if weight is None else delta.add_(weight)
    terms = zip(left.view(-1, m, 1, n, 1), right.view(-1, 1, p, 1, q), strict=True)
    total = torch.addcmul(weight.reshape(m, p, n, q), *next(terms))
    for term in terms:
        total.addcmul_(*term)
    return total.view(m * p, n * q)


def _in_order(order: Order, inputs: Tensor, left: Tensor, right: Tensor, out: Tensor | None) -> Tensor:
    """(T, in) times the delta, one factor after the other, some tokens at a time; added to `out` in place."""
    rank, m, n = left.shape
    p, q = right.shape[1:]
    beta = 0 if out is None else 1
    out = inputs.new_empty(len(inputs), m * p) if out is None else out
    stacked = right.transpose(1, 2).reshape(rank * q, p) if order == "left" else left.permute(1, 2, 0).reshape(m, -1)
    for x, y in _pieces(left, right, inputs, out):
        if order == "left":
            y.view(-1, p).addmm_(_left_middle(x, left, q), stacked, beta=beta)
        else:
            middle = _right_middle(x, right).view(len(x), n * rank, p)
            y.view(-1, m, p).baddbmm_(stacked.expand(len(x), -1, -1), middle, beta=beta)
    return out


def _gradients(
    way: Order, inputs: Tensor, grad: Tensor, left: Tensor, right: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of left and right, (r, m, n) and (r, p, q), in float32 at least; None where they are not wanted."""
    rank, m, n = left.shape
    p, q = right.shape[1:]
    if way == "left":  # the transposed problem, right factors first
        turned = _gradients("right", grad, inputs, left.transpose(1, 2), right.transpose(1, 2), wanted)
        return cast("tuple[Tensor, Tensor]", tuple(None if g is None else g.transpose(1, 2) for g in turned))
    if way == "dense":
        matrix = rearrange(grad.t() @ inputs, _shape_of((left, right)))
        grad_left = (right.flatten(1) @ matrix.t()).view_as(left) if wanted[0] else None
        return grad_left, (left.flatten(1) @ matrix).view_as(right) if wanted[1] else None
    # In float32 at least, to which the pieces' gradients are added.
    total = torch.promote_types(inputs.dtype, torch.float32)
    grad_left = left.new_zeros(left.shape, dtype=total) if wanted[0] else None
    grad_right = right.new_zeros(right.shape, dtype=total) if wanted[1] else None
    for x, g in _pieces(left[:1], right[:1], inputs, grad):
        tokens = x.shape[0]
        rows = g.view(tokens, m, p).transpose(0, 1).reshape(m, tokens * p)
        columns = x.view(tokens, n, q).transpose(0, 1).reshape(n * tokens, q)
        for k in range(rank):
            if grad_left is not None:
                grad_left[k] += rows @ (columns @ right[k].t()).view(n, tokens * p).t()
            if grad_right is not None:
                grad_right[k] += (left[k].t() @ rows).view(n * tokens, p).t() @ columns
    return grad_left, grad_right


def _pieces(left: Tensor, right: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors cut along tokens so that the intermediates stay small; whole when traced by torch.compile."""
    (rank, m, n), (p, q) = left.shape, right.shape[1:]
    width = max(1, rank * max(m * q, n * p))
    limit = max(64, _PIECE_BYTES["cpu" if left.device.type == "cpu" else "cuda"] // left.itemsize // width)
    if torch.compiler.is_compiling() or tensors[0].shape[0] <= limit:
        yield tensors
        return
    yield from zip(*(torch.split(tensor, limit) for tensor in tensors), strict=True)


def _left_middle(inputs: Tensor, left: Tensor, q: int) -> Tensor:
    """(T*m, r*q): left[k] @ X for every term, so that the next product sums over k and q."""
    rank, m, n = left.shape
    tokens = inputs.shape[0]
    return torch.matmul(left.transpose(0, 1).reshape(m * rank, n), inputs.view(tokens, n, q)).view(tokens * m, rank * q)


def _right_middle(inputs: Tensor, right: Tensor) -> Tensor:
    """(T*n, r*p): X @ right[k]^T for every term; as (T, n*r, p) the next product sums over n and k."""
    rank, p, q = right.shape
    return inputs.view(-1, q) @ right.reshape(rank * p, q).t()


def _check(x: Tensor, terms: Terms, initial: Terms | None) -> None:
    left, right, sigma = terms
    fits = (
        left.ndim == right.ndim == 3
        and sigma.ndim == 1
        and left.shape[0] == right.shape[0] == sigma.shape[0]
        and x.ndim >= 1
        and x.shape[-1] == left.shape[2] * right.shape[2]
        and (initial is None or [t.shape for t in initial] == [t.shape for t in terms])
    )
    if not fits:
        raise ValueError(
            "expected x (..., n*q), left (r, m, n), right (r, p, q), sigma (r,), and initial terms alike; got "
            + ", ".join(str(tuple(t.shape)) for t in (x, *terms, *(initial or ())))
        )
