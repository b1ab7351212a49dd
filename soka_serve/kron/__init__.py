"""The Kronecker mathematics: terms, the KPSVD, and the product with activations.

A name is loaded when it is first asked for, so that `soka_serve.kron.shapes` can be had without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from soka_serve.kron.apply import apply_kron, linear_with_delta
    from soka_serve.kron.cost import apply_cost, cheaper_order
    from soka_serve.kron.decompose import Decomposition, kpsvd
    from soka_serve.kron.factors import (
        Factors,
        add_delta_,
        dense_delta,
        rearrange,
        recompress,
        stack_terms,
        unrearrange,
    )

__all__ = [
    "Decomposition",
    "Factors",
    "add_delta_",
    "apply_cost",
    "apply_kron",
    "cheaper_order",
    "dense_delta",
    "kpsvd",
    "linear_with_delta",
    "rearrange",
    "recompress",
    "stack_terms",
    "unrearrange",
]

_HOMES = {
    "Decomposition": "soka_serve.kron.decompose",
    "Factors": "soka_serve.kron.factors",
    "add_delta_": "soka_serve.kron.factors",
    "apply_cost": "soka_serve.kron.cost",
    "apply_kron": "soka_serve.kron.apply",
    "cheaper_order": "soka_serve.kron.cost",
    "dense_delta": "soka_serve.kron.factors",
    "kpsvd": "soka_serve.kron.decompose",
    "linear_with_delta": "soka_serve.kron.apply",
    "rearrange": "soka_serve.kron.factors",
    "recompress": "soka_serve.kron.factors",
    "stack_terms": "soka_serve.kron.factors",
    "unrearrange": "soka_serve.kron.factors",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
