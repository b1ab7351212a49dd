"""How near two results of the same mathematics must be, by the dtype they were computed in.

Each is (rtol, atol) for `torch.testing.assert_close` on values of order 1, against a float64 reference.
"""

from __future__ import annotations

import torch

TOLERANCE: dict[torch.dtype, tuple[float, float]] = {
    # Rounding 1e-16, sums of up to some thousand products: a hundred times the typical error.
    torch.float64: (1e-10, 1e-10),
    # Rounding 6e-8; sums of some hundred products of order 1 lose about two digits.
    torch.float32: (1e-4, 1e-4),
    # Rounding 4e-3 of inputs and result; sums are accumulated in float32, so it does not grow with their length.
    torch.bfloat16: (2e-2, 2e-2),
    # Rounding 5e-4 of inputs and result, as above.
    torch.float16: (3e-3, 3e-3),
}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The Frobenius norm of the difference over that of `expected`, in float64: an error that ignores small entries."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


# The same for a norm over a whole matrix: no single entry can stand out, so it holds the rounding of the dtype itself
# with a factor for the length of the sums.
RELATIVE_ERROR: dict[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.float32: 3e-6,
    torch.bfloat16: 1e-2,
    torch.float16: 1.5e-3,
}


def rms(values: torch.Tensor) -> float:
    """Root mean square."""
    return float(values.square().mean().sqrt())
