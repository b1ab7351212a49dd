"""LoKr: one Kronecker product per weight (arXiv:2309.14859), as PEFT has it.

PEFT's balanced factorisation, alpha = scale * rank. The smaller factor is full, the larger one of low rank where that
is smaller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from soka_serve.compiler.methods.method import StartingPoint
from soka_serve.compiler.methods.peft_method import PeftMethod, alpha, common_options

if TYPE_CHECKING:
    from peft import PeftConfig

    from soka_serve.base.modules import Module


@dataclass(frozen=True)
class Lokr(PeftMethod):
    """PEFT's LoKr with its defaults."""

    needs_plugin: ClassVar[bool] = True
    scaled: ClassVar[bool] = True

    def parameters(self, module: Module, rank: int) -> int:
        in_small, in_large = _split(module.in_features)
        out_small, out_large = _split(module.out_features)
        larger = rank * (out_large + in_large) if rank < max(out_large, in_large) / 2 else out_large * in_large
        return out_small * in_small + larger

    def config(self, start: StartingPoint) -> PeftConfig:
        from peft import LoKrConfig

        return LoKrConfig(r=start.rank, alpha=alpha(start), **common_options(start))


def _split(dimension: int) -> tuple[int, int]:
    """PEFT's balanced factorisation: the divisors nearest to the square root, the smaller first."""
    small = next(d for d in range(int(dimension**0.5), 0, -1) if dimension % d == 0)
    return small, dimension // small
