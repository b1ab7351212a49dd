"""AdaLoRA: a LoRA with singular values that moves ranks to where they are worth most (arXiv:2303.10512).

It begins with half as many ranks again as it ends with (both are the method's own numbers). Its penalty for factors
that are not orthogonal is part of its training loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from soka_serve.compiler.methods.lora import lora_parameters
from soka_serve.compiler.methods.method import StartingPoint
from soka_serve.compiler.methods.peft_method import PeftMethod, common_options

if TYPE_CHECKING:
    from peft import PeftConfig

    from soka_serve.base.modules import Module


@dataclass(frozen=True)
class AdaLora(PeftMethod):
    """PEFT's AdaLoRA; `rank` is the mean rank that it ends with."""

    scaled: ClassVar[bool] = True

    def parameters(self, module: Module, rank: int) -> int:
        return lora_parameters(module, start_rank(rank)) + start_rank(rank)

    def config(self, start: StartingPoint) -> PeftConfig:
        from peft import AdaLoraConfig

        steps = start.steps or 1
        return AdaLoraConfig(
            target_r=start.rank,
            init_r=start_rank(start.rank),
            lora_alpha=start.scale * start_rank(start.rank),
            total_step=steps,
            tinit=steps // 10,
            tfinal=steps // 3,
            deltaT=max(steps // 30, 1),
            **common_options(start),
        )

    def callbacks(self) -> list[Any]:
        from transformers import TrainerCallback

        class Reallocation(TrainerCallback):  # type: ignore[misc, unused-ignore]
            """Let AdaLoRA move its ranks: after the optimiser's step, while the gradients are still there."""

            def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                kwargs["model"].base_model.update_and_allocate(state.global_step)

        return [Reallocation()]


def start_rank(rank: int) -> int:
    """The rank that AdaLoRA begins with.

    >>> start_rank(1), start_rank(2), start_rank(8)
    (2, 3, 12)
    """
    return math.ceil(1.5 * rank)
