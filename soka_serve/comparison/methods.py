"""The methods that only comparisons train: rsLoRA, DoRA, AdaLoRA, CorDA, EVA and OSF, through PEFT.

What is held equal with the baselines of `soka_serve.compiler.train.baselines`: the modules, the data and the
schedule, and alpha such that a rank-r update has no further factor (B A for LoRA), so that the learning rate is the
only scale. Exceptions:

- `rslora`: alpha = rank and PEFT's rank-stabilised factor, so the update is sqrt(rank) B A.
- `adalora`: begins with half as many ranks again as it ends with (both are the method's own numbers); its penalty for
  factors that are not orthogonal is part of its training loss.
- `eva`: no redistribution of ranks (rho = 1), so that every module has the rank asked for.
- `osf`: PEFT's default, the smaller half of each weight's singular directions is trained; there is no rank.

They are not in manifests: what CorDA and OSF train is relative to an SVD of the base that PEFT computes anew, and
AdaLoRA's ranks end up ragged; no engine we serve with loads them as they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import AdaLoraConfig, EvaConfig, LoraConfig, OSFConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from soka_serve.comparison.preview import adalora_start

Batch = Mapping[str, torch.Tensor]


def build_extra(
    model: PreTrainedModel, method: str, rank: int, targets: Sequence[str], *, steps: int, batches: Sequence[Batch]
) -> Any:
    """Put a method's trainable parameters on a base model.

    Args:
        model: the base, float32.
        method: rslora, dora, adalora, corda, eva or osf.
        rank: see `soka_serve.comparison.suite.Contender`.
        targets: full names of the modules to adapt.
        steps: optimiser steps of the run, for AdaLoRA's schedule.
        batches: training batches on the model's device, for CorDA and EVA.

    Returns:
        The PEFT model, trainable.
    """
    names = sorted(targets)
    common: dict[str, Any] = {"target_modules": names, "task_type": "CAUSAL_LM"}
    if method == "osf":
        return get_peft_model(model, OSFConfig(**common))
    common["lora_alpha"] = rank
    if method == "adalora":
        start = adalora_start(rank)
        return get_peft_model(
            model,
            AdaLoraConfig(
                target_r=rank,
                init_r=start,
                total_step=steps,
                tinit=steps // 10,
                tfinal=steps // 3,
                deltaT=max(steps // 30, 1),
                **(common | {"lora_alpha": start}),
            ),
        )
    if method == "corda":
        config = LoraConfig(r=rank, init_lora_weights="corda", corda_config=CordaConfig(corda_method="ipm"), **common)
        preprocess_corda(model, config, run_model=lambda: _run(model, batches))
        return get_peft_model(model, config)
    if method == "eva":
        eva = EvaConfig(rho=1.0, use_label_mask=False)
        config = LoraConfig(r=rank, init_lora_weights="eva", eva_config=eva, **common)
        with warnings.catch_warnings():
            # Of memory that could be saved, and of layers whose SVD has not settled after all batches.
            warnings.simplefilter("ignore")
            adapted = get_peft_model(model, config)
            initialize_lora_eva_weights(adapted, [dict(batch) for batch in batches], show_progress_bar=False)
        return adapted
    return get_peft_model(model, LoraConfig(r=rank, use_rslora=method == "rslora", use_dora=method == "dora", **common))


@torch.no_grad()
def _run(model: PreTrainedModel, batches: Sequence[Batch]) -> None:
    """Row by row and without padding: the hooks of CorDA take a batch of one, and count every token."""
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            model(input_ids=ids[mask.bool()][None])


class AdaLoraSteps(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Let AdaLoRA reallocate its ranks: after the optimiser's step, while the gradients are still there."""

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kwargs["model"].base_model.update_and_allocate(state.global_step)
