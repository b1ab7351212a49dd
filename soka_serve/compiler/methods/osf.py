"""OSF: orthogonal subspace fine-tuning, which trains the smaller half of each weight's singular directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from soka_serve.compiler.methods.method import StartingPoint, Trainable
from soka_serve.compiler.methods.peft_method import PeftMethod, common_options

if TYPE_CHECKING:
    from peft import PeftConfig

    from soka_serve.base.modules import Module


@dataclass(frozen=True)
class Osf(PeftMethod):
    """PEFT's OSF with its default share of directions."""

    ranked: ClassVar[bool] = False
    keeps_base: ClassVar[bool] = False

    def parameters(self, module: Module, rank: int) -> int:
        directions = min(module.in_features, module.out_features)
        return (directions - directions // 2) * (module.in_features + module.out_features + 1)

    def config(self, start: StartingPoint) -> PeftConfig:
        from peft import OSFConfig

        return OSFConfig(**common_options(start))

    def adapt(self, model: Any, config: PeftConfig, start: StartingPoint) -> Trainable:
        return super().adapt(model.to(start.device), config, start)
