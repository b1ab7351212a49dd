"""Cost of multiplying a delta with activations, and the choice of the cheapest of the three ways.

`soka_serve.kron.apply` explains the ways; `eval/bench/apply.py` measures them against each other.
"""

from __future__ import annotations

from typing import Literal

from soka_serve.kron.shapes import FactorShape

Order = Literal["auto", "left", "right", "dense"]

# Work is counted in multiply-adds of a large matrix product, forward and backward together, fitted to what
# eval/bench/apply.py measured on a CPU from 128 to 4096 features: the factors' two products with their gradients and
# the recomputed intermediate cost 5 for each multiply-add, and every value that moves through memory costs 200.
_FACTOR_PRODUCTS = 5
_MOVED_VALUE = 200


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
