"""CorDA: a LoRA that starts from an SVD of each weight in the metric of its inputs (arXiv:2406.05223)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from soka_serve.compiler.methods.lora import lora_options
from soka_serve.compiler.methods.method import StartingPoint, Trainable
from soka_serve.compiler.methods.rewriting import RewritingLora

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig


@dataclass(frozen=True)
class Corda(RewritingLora):
    """PEFT's CorDA in its instruction-previewed mode."""

    reads_batches: ClassVar[bool] = True

    def config(self, start: StartingPoint) -> PeftConfig:
        from peft import LoraConfig
        from peft.tuners.lora.config import CordaConfig

        corda = CordaConfig(corda_method="ipm")
        return LoraConfig(init_lora_weights="corda", corda_config=corda, **lora_options(start))

    def adapt(self, model: Any, config: PeftConfig, start: StartingPoint) -> Trainable:
        from peft.tuners.lora.corda import preprocess_corda

        model.to(start.device)
        batches = start.batches()
        preprocess_corda(model, config, run_model=lambda: _run(model, batches))
        return super().adapt(model, config, start)


def _run(model: Any, batches: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Row by row and without padding: the hooks of CorDA take a batch of one, and count every token."""
    import torch

    with torch.no_grad():
        for batch in batches:
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                model(input_ids=ids[mask.bool()][None])
