"""Adapters on disk, of any PEFT method, and models that hold them."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import soka_serve.peft  # noqa: F401 - registers SOKA
from soka_serve.errors import CheckpointError
from soka_serve.io.file_names import WEIGHTS_FILE

ADAPTER = "default"  # PEFT's name of the adapter in a model


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
    tensors = load_file(directory / WEIGHTS_FILE)
    expected = get_peft_model_state_dict(model)
    wrong = sorted(
        list(tensors.keys() ^ expected.keys())
        + [name for name in tensors.keys() & expected.keys() if tensors[name].shape != expected[name].shape]
    )
    if wrong:
        raise CheckpointError(
            f"{directory / WEIGHTS_FILE}: {len(wrong)} tensors do not fit the adapter on this base, such as {wrong[0]}"
        )
    set_peft_model_state_dict(model, tensors)


def save_tensors(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Write tensors as safetensors, whatever their device and strides."""
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, file, metadata={"format": "pt"})
