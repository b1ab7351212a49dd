"""EVA: a LoRA whose A starts as the principal directions of each layer's inputs (arXiv:2410.07170)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from soka_serve.compiler.methods.lora import Lora, lora_options
from soka_serve.compiler.methods.method import StartingPoint, Trainable

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True)
class Eva(Lora):
    """PEFT's EVA without redistribution of ranks (rho = 1), so that every module has the rank asked for."""

    reads_batches: ClassVar[bool] = True

    def config(self, start: StartingPoint) -> PeftConfig:
        from peft import EvaConfig, LoraConfig

        eva = EvaConfig(rho=1.0, use_label_mask=False)
        return LoraConfig(init_lora_weights="eva", eva_config=eva, **lora_options(start))

    def adapt(self, model: Any, config: PeftConfig, start: StartingPoint) -> Trainable:
        from peft import initialize_lora_eva_weights

        model.to(start.device)
        batches = [dict(batch) for batch in start.batches()]
        with warnings.catch_warnings():
            # Of memory that could be saved, and of layers whose SVD has not settled after all batches.
            warnings.simplefilter("ignore")
            adapted = super().adapt(model, config, start)
            initialize_lora_eva_weights(adapted, batches, show_progress_bar=False)
        return adapted
