"""PiSSA: a LoRA that starts as the principal singular directions of each weight (arXiv:2404.02948)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from soka_serve.compiler.methods.lora import lora_options
from soka_serve.compiler.methods.method import StartingPoint
from soka_serve.compiler.methods.rewriting import RewritingLora

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True)
class Pissa(RewritingLora):
    """PEFT's PiSSA. Its product is a part of the weight at any scale, which only says how large the factors are."""

    def config(self, start: StartingPoint) -> PeftConfig:
        from peft import LoraConfig

        return LoraConfig(init_lora_weights="pissa", **lora_options(start))
