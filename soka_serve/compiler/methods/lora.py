"""LoRA and its variants in PEFT's LoraConfig: rsLoRA, and DoRA with its magnitudes.

The update is scale B A: alpha = scale * rank. rsLoRA keeps PEFT's rank-stabilised factor on top of that: its update is
sqrt(rank) scale B A.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from soka_serve.compiler.methods.method import StartingPoint
from soka_serve.compiler.methods.peft_method import PeftMethod, alpha, common_options

if TYPE_CHECKING:
    from peft import PeftConfig

    from soka_serve.base.modules import Module


@dataclass(frozen=True)
class Lora(PeftMethod):
    """LoRA with further `options` of LoraConfig."""

    scaled: ClassVar[bool] = True

    options: Mapping[str, Any] = field(default_factory=dict)

    def parameters(self, module: Module, rank: int) -> int:
        return lora_parameters(module, rank)

    def config(self, start: StartingPoint) -> PeftConfig:
        from peft import LoraConfig

        return LoraConfig(**lora_options(start), **self.options)


@dataclass(frozen=True)
class Dora(Lora):
    """LoRA with a trained magnitude per output (arXiv:2402.09353)."""

    def parameters(self, module: Module, rank: int) -> int:
        return lora_parameters(module, rank) + module.out_features


def lora_parameters(module: Module, rank: int) -> int:
    """Parameters of two low-rank factors on one module: r(in + out)."""
    return rank * (module.in_features + module.out_features)


def lora_options(start: StartingPoint) -> dict[str, Any]:
    """The options of LoraConfig that all LoRAs share."""
    return {"r": start.rank, "lora_alpha": alpha(start), **common_options(start)}
