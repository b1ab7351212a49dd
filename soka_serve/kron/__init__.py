"""The Kronecker mathematics: terms, the KPSVD, and the product with activations.

A name is loaded when it is first asked for, so that `soka_serve.kron.shapes` can be had without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from soka_serve.kron.apply import apply_kron, linear_with_delta
    from soka_serve.kron.decompose import kpsvd
    from soka_serve.kron.factors import Factors, add_delta_, dense_delta, recompress, stack_terms

__all__ = [
    "Factors",
    "add_delta_",
    "apply_kron",
    "dense_delta",
    "kpsvd",
    "linear_with_delta",
    "recompress",
    "stack_terms",
]
_HOMES = {"apply_kron": "apply", "linear_with_delta": "apply", "kpsvd": "decompose"}  # of those not in `factors`


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'factors')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
