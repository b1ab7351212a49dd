"""PiSSA: a LoRA that starts as the principal singular directions of each weight (arXiv:2404.02948)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from soka_serve.compiler.methods.method import StartingPoint
from soka_serve.compiler.methods.peft_method import common_options
from soka_serve.compiler.methods.rewriting import RewritingLora

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True)
class Pissa(RewritingLora):
    """PEFT's PiSSA. alpha = rank is no choice here: the factors *are* parts of the weight."""

    def config(self, start: StartingPoint) -> PeftConfig:
        from peft import LoraConfig

        return LoraConfig(r=start.rank, lora_alpha=start.rank, init_lora_weights="pissa", **common_options(start))
