"""The Kronecker mathematics in one place: what other modules import. Torch only.

factors.py holds the terms and what can be done with them, decompose.py the KPSVD, kron_apply.py the product with
activations.
"""

from soka_serve.decompose import Decomposition, kpsvd
from soka_serve.factors import Factors, add_delta_, dense_delta, rearrange, recompress, stack_terms, unrearrange
from soka_serve.kron_apply import apply_cost, apply_kron, cheaper_order, linear_with_delta

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
