"""The LoRA methods that rewrite the base's weights in memory, so that what they train is relative to an SVD of them.

W becomes W - B0 A0, and B A is trained from (B0, A0), which the run keeps. What is stored at the end is the equal plain
LoRA of twice the rank, [B, -B0] [A; A0], which leaves the base as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from soka_serve.compiler.methods.lora import Lora
from soka_serve.compiler.methods.method import StartingPoint, Trainable
from soka_serve.errors import PlanError


@dataclass(frozen=True)
class RewritingLora(Lora):
    """A LoRA whose factors at step 0 are parts of the weights."""

    keeps_base: ClassVar[bool] = False

    def stored_parameters(self, trained: int) -> int:
        return 2 * trained

    def build(self, model: Any, start: StartingPoint) -> Trainable:
        from soka_serve.compiler.methods.initial_factors import keep_initial

        if getattr(model, "is_quantized", False):
            raise PlanError(
                f"train.method = {self.name!r} rewrites the base's weights, and base.quantize holds them in a few bits",
                hint='set base.quantize = "none", or use method "soka", "lora" or "lokr"',
            )
        adapted = super().build(model, start)
        keep_initial(adapted, start.initial_dir)
        return adapted

    def collect(self, checkpoint: Path, out: Path, *, initial_dir: Path, base_dir: Path) -> None:
        from soka_serve.compiler.methods.initial_factors import subtract_initial

        subtract_initial(checkpoint, initial_dir, out)
