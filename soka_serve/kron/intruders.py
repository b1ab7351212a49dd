"""Intruder dimensions: leading singular vectors that an adapted weight has, and its base weight has not.

A product of vectors is a Kronecker product of shape (out, 1, 1, in), so that a weight's SVD is its KPSVD of that shape.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from soka_serve.kron.decompose import kpsvd
from soka_serve.kron.shapes import FactorShape

LEADING, THRESHOLD = 10, 0.5  # the paper's k and epsilon

_WHOLE_SIDE = 1024  # up to this shorter side whole SVDs are taken at once
_KNOWN = 4  # leading vectors of the base weight that are compared first, over those of the adapted one
_SHARP = 1e-2  # radians: vectors of a truncated SVD that are surer than this are taken for exact ones


@torch.no_grad()
def count_intruders(weight: Tensor, changed: Tensor, leading: int = LEADING, threshold: float = THRESHOLD) -> int:
    """How many leading left singular vectors of `changed` are far from every left singular vector of `weight`.

    Semantics: the number of u_j, j < leading, with max over i of |<u_j, v_i>| < threshold, over all i.

    Args:
        weight: (out, in), floating point, finite; computed in float32, or in float64 where it is that.
        changed: (out, in), the weight with its delta.
        leading: how many vectors of `changed` are looked at; those whose singular value is zero do not count.
        threshold: cosine below which a vector is new. Vectors of `weight` with a singular value of zero do not count.

    Cost: where truncated SVDs find a near vector for each of `changed`'s, beyond their own error, nothing else is done;
    the answer is then 0, exactly. Otherwise a whole SVD of `weight`: 19 s at 4096 x 4096 on one thread
    (eval/results/kpsvd_starts.json).

    Reference: arXiv:2410.21228 (LoRA vs full fine-tuning).
    """
    leading = min(leading, *weight.shape)
    wide = torch.promote_types(weight.dtype, changed.dtype)
    weight, changed = weight.to(wide), changed.to(wide)
    if min(weight.shape) > max(_WHOLE_SIDE, _KNOWN * leading):
        new, new_error = _leading_vectors(changed, leading)
        old, old_error = _leading_vectors(weight, _KNOWN * leading)
        angles = (new.t() @ old).abs().clamp(max=1).arccos() + old_error
        if bool((angles.amin(1) + new_error < math.acos(threshold)).all()):
            return 0
        if float(new_error.max()) > _SHARP:
            new = _whole_svd(changed, leading)
    else:
        new = _whole_svd(changed, leading)
    old = _whole_svd(weight, min(weight.shape))
    if not old.shape[1]:  # beside a weight of zeros everything is new
        return new.shape[1]
    return int(((new.t() @ old).abs().amax(1) < threshold).sum())


def _whole_svd(matrix: Tensor, count: int) -> Tensor:
    """The leading left singular vectors (out, at most count), without those of a singular value of zero."""
    wide = matrix if matrix.dtype == torch.float64 else matrix.float()
    left, sigma, _ = torch.linalg.svd(wide, full_matrices=False)
    zero = float(sigma[0]) * max(matrix.shape) * torch.finfo(wide.dtype).eps
    found: Tensor = left[:, : min(count, int((sigma > zero).sum()))]
    return found


def _leading_vectors(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Leading left singular vectors (out, count) by a truncated SVD, and bounds (count,) of their errors in radians.

    An eigenvector of M M^T is as far off as its residual over the gap to the other eigenvalues (Davis and Kahan), for
    which those that were found stand, with one more than is returned.
    """
    found = kpsvd(matrix, FactorShape(matrix.shape[0], 1, 1, matrix.shape[1]), count + 1).factors
    left, squares = found.left[:, :, 0].t(), found.sigma.square()
    wide = matrix.to(left.dtype)
    residuals = (wide @ (wide.t() @ left) - left * squares).norm(dim=0)
    steps = squares[:-1] - squares[1:]
    gaps = torch.minimum(steps, torch.cat((steps.new_full((1,), math.inf), steps[:-1])))
    return left[:, :count], (residuals[:count] / gaps).nan_to_num(nan=math.inf).clamp(max=1).arcsin()
