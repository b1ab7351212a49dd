"""The baselines: LoRA, PiSSA and LoKr through PEFT over the same modules, and full fine-tuning.

What is held equal and what is not:

- `lora`, `pissa`: alpha = rank, so that the update is B A without a further factor (PiSSA needs that: its factors
  *are* parts of the weight) and the learning rate is the only scale.
- `pissa`: PEFT rewrites the base in memory, W - B0 A0, and trains B A from (B0, A0), arXiv:2404.02948. What is written
  at the end is the equal plain LoRA of twice the rank, [B, -B0] [A; A0], which leaves the base as it is.
- `lokr`: alpha = rank; PEFT's balanced factorisation; its smaller factor is full, the larger one of low rank when
  that is smaller.
- `full`: every parameter of the model in float32, embeddings and norms too, not only the target modules.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from peft import LoKrConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from soka_serve.errors import BuildError, CheckpointError, PlanError

Method = Literal["soka", "lora", "pissa", "lokr", "full"]

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"


def build_baseline(
    model: PreTrainedModel, method: Method, rank: int, targets: Sequence[str], base_model: str
) -> PeftModel | PreTrainedModel:
    """Put a baseline's trainable parameters on a base model.

    Args:
        model: the base; `full` trains its own parameters, which must be float32.
        method: "lora", "pissa", "lokr" or "full".
        rank: rank of the adapter; `full` ignores it.
        targets: full names of the modules to adapt.
        base_model: what adapter_config.json names as the base.

    Raises:
        PlanError: no module to adapt, or PiSSA on a quantised base.
    """
    if method == "pissa" and getattr(model, "is_quantized", False):
        raise PlanError(
            "train.method = 'pissa' rewrites the base's weights, and base.quantize holds them in a few bits",
            hint='set base.quantize = "none", or use method "soka", "lora" or "lokr"',
        )
    if method == "full":
        model.requires_grad_(True)
        return model
    if not targets:
        raise PlanError(f"train.method = {method!r}: no module to adapt")
    names = sorted(targets)
    config: PeftConfig
    if method == "lokr":
        config = LoKrConfig(r=rank, alpha=rank, target_modules=names, task_type="CAUSAL_LM")
    else:
        init = "pissa" if method == "pissa" else True
        config = LoraConfig(
            r=rank, lora_alpha=rank, target_modules=names, init_lora_weights=init, task_type="CAUSAL_LM"
        )
    config.base_model_name_or_path = base_model
    return get_peft_model(model, config)


def write_initial(model: PeftModel, directory: Path) -> None:
    """Write the PiSSA factors as they are before training; `directory` exists."""
    save_file(_contiguous(get_peft_model_state_dict(model)), directory / ADAPTER_WEIGHTS)


def check_initial(model: PeftModel, directory: Path) -> None:
    """Compare the freshly computed PiSSA factors with those that the run started from.

    Resuming needs the same residual base, bit for bit, and PEFT computes it anew from an exact SVD, which is
    deterministic for one machine, library and number of threads.

    Raises:
        BuildError: the factors differ.
    """
    stored = load_file(directory / ADAPTER_WEIGHTS)
    fresh = get_peft_model_state_dict(model)
    different = [name for name in stored if name not in fresh or not torch.equal(stored[name], fresh[name].cpu())]
    if different or len(stored) != len(fresh):
        raise BuildError(
            f"PiSSA's initial factors came out differently than when this run began ({len(different)} tensors, such "
            f"as {different[:1]}), so it cannot be resumed",
            hint="resume on the same machine with the same number of threads, or build with --force",
        )


def load_adapter(model: PreTrainedModel, directory: Path) -> PeftModel:
    """Put the adapter in `directory`, of any method, on the base model, trainable.

    Raises:
        CheckpointError: its tensors are not those that its config announces.
    """
    config = PeftConfig.from_pretrained(str(directory))
    config.inference_mode = False
    config.base_model_name_or_path = None  # PEFT fills in the base's name, and warns where it was another before
    adapted = get_peft_model(model, config)
    load_adapter_weights(adapted, directory)
    return adapted


def load_adapter_weights(model: PeftModel, directory: Path) -> None:
    """Copy an adapter's tensors from `directory` into a model that has the same adapter.

    Raises:
        CheckpointError: a tensor is missing, too many, or of another shape.
    """
    tensors = load_file(directory / ADAPTER_WEIGHTS)
    expected = get_peft_model_state_dict(model)
    wrong = sorted(
        list(tensors.keys() ^ expected.keys())
        + [name for name in tensors.keys() & expected.keys() if tensors[name].shape != expected[name].shape]
    )
    if wrong:
        raise CheckpointError(
            f"{directory / ADAPTER_WEIGHTS}: {len(wrong)} tensors do not fit the adapter on this base, "
            f"such as {wrong[0]}"
        )
    set_peft_model_state_dict(model, tensors)


def convert_pissa(trained: Path, initial: Path, out_dir: Path) -> None:
    """Write trained PiSSA factors as a plain LoRA adapter of the untouched base.

    Semantics: A = [A_trained; A_initial], B = [B_trained, -B_initial], rank and alpha doubled (the scale alpha / rank
    stays); B A is then exactly what training changed.

    Args:
        trained: adapter directory in training (adapter_config.json and tensors).
        initial: directory with the factors before training, from `write_initial`.
        out_dir: existing directory; gets adapter_config.json and tensors.
    """
    tensors = load_file(trained / ADAPTER_WEIGHTS)
    before = load_file(initial / ADAPTER_WEIGHTS)
    stacked = {}
    for name, tensor in tensors.items():
        if ".lora_A." in name:
            stacked[name] = torch.cat([tensor, before[name]], dim=0)
        else:
            stacked[name] = torch.cat([tensor, -before[name]], dim=1)
    config = json.loads((trained / ADAPTER_CONFIG).read_text())
    config.update(r=2 * config["r"], lora_alpha=2 * config["lora_alpha"], init_lora_weights=True)
    save_file(_contiguous(stacked), out_dir / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    (out_dir / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _contiguous(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
