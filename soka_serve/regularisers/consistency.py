"""BA-LoRA's consistency: the adapted model's answers stay near the base's (arXiv:2408.04556).

Semantics: mean over the positions that count in the loss of KL(base || adapted) = sum over words w of
p(w) (log p(w) - log q(w)), p and q the distributions of the next token without and with the adapter.

The base is the model itself with its adapter off, on the same batch and without gradients. Differs from the paper: no
temperature, and a constant weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from soka_serve.regularisers.regulariser import Divergence

if TYPE_CHECKING:
    from torch import Tensor


class Consistency(Divergence):
    """lambda * mean KL(base || adapted)."""

    meaning: ClassVar[str] = (
        "BA-LoRA's weight of consistency, on the mean KL divergence of the model's answers from the base's at the "
        "trained positions. A step takes a further forward pass, with the adapter off."
    )

    def divergences(self, base: Tensor, adapted: Tensor) -> Tensor:
        from torch import float32, promote_types

        dtype = promote_types(adapted.dtype, float32)
        before, after = (logits.to(dtype).log_softmax(-1) for logits in (base, adapted))
        return (before.exp() * (before - after)).sum(-1)
