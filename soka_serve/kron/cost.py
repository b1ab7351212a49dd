"""Cost of multiplying a delta with activations, and the choice of the cheapest ways.

`soka_serve.kron.apply` explains the ways; `eval/bench/apply.py` measures them against each other.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from soka_serve.kron.shapes import FactorShape

Order = Literal["auto", "left", "right", "dense"]

# Work is counted in multiply-adds of a large matrix product, fitted to what eval/bench/apply.py measured on a CPU from
# 128 to 4096 features: a small product costs so much for each multiply-add, and every value that it moves so much.
_SMALL_PRODUCT = 2
_MOVED_VALUE = 20
_BUILT_VALUE = 80  # of a delta that is built, or of a dense gradient that is reduced to the factors'


class Ways(NamedTuple):
    """How the delta is multiplied (forward, and to the input's gradient), and how the factors' gradients are made."""

    product: Order
    gradients: Order


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


def choose_ways(shape: FactorShape, rank: int, tokens: int, *, stacked: int | None = None, fused: bool = False) -> Ways:
    """What "auto" means: dense where building the delta, or its gradient, is less work than small products.

    Args:
        shape, rank, tokens: the case; `rank` terms have gradients.
        stacked: how many terms are applied (twice the rank where initial ones are subtracted); default: the rank.
        fused: a built delta is multiplied together with the layer's weight (`linear_with_delta`), at no cost.

    >>> choose_ways(FactorShape(64, 64, 64, 64), rank=1, tokens=2048)
    Ways(product='left', gradients='left')
    >>> choose_ways(FactorShape(64, 64, 64, 64), rank=1, tokens=2048, fused=True)
    Ways(product='dense', gradients='left')
    >>> choose_ways(FactorShape(64, 64, 64, 64), rank=64, tokens=2048, fused=True)
    Ways(product='dense', gradients='dense')
    >>> choose_ways(FactorShape(64, 64, 64, 64), rank=64, tokens=1)
    Ways(product='left', gradients='left')
    """
    order, full = cheaper_order(shape), apply_cost(shape, 1, "dense")
    middle = shape.m * shape.q if order == "left" else shape.n * shape.p

    def small(terms: int) -> int:  # two products and what they move, for all tokens
        moved = shape.in_features + shape.out_features + 2 * terms * middle
        return tokens * (_SMALL_PRODUCT * apply_cost(shape, terms) + _MOVED_VALUE * moved)

    applied = rank if stacked is None else stacked
    built = (applied + _BUILT_VALUE + (0 if fused else tokens)) * full
    reduced = (rank + _BUILT_VALUE + tokens) * full
    return Ways("dense" if built < small(applied) else order, "dense" if reduced < 2 * small(rank) else order)
