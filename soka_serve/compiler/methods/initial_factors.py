"""The factors that a run of a rewriting method started from: kept beside it, checked, and subtracted at its end."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from accelerate import PartialState
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file

from soka_serve.compiler.methods.adapter_files import save_tensors
from soka_serve.errors import BuildError
from soka_serve.io.file_names import CONFIG_FILE, WEIGHTS_FILE
from soka_serve.io.files import replace_directory


def keep_initial(model: PeftModel, directory: Path) -> None:
    """Keep the factors of a model before its training; where a run has kept some already, they must be the same.

    Resuming needs the same residual base, bit for bit, and PEFT computes it anew from an exact SVD, which is
    deterministic for one machine, library and number of threads.

    Raises:
        BuildError: the factors differ from those that the run started from.
    """
    if (directory / WEIGHTS_FILE).exists():
        _check(model, directory)
    elif PartialState().is_main_process:
        with replace_directory(directory) as new:
            save_tensors(get_peft_model_state_dict(model), new / WEIGHTS_FILE)


def _check(model: PeftModel, directory: Path) -> None:
    stored = load_file(directory / WEIGHTS_FILE)
    fresh = get_peft_model_state_dict(model)
    different = [name for name in stored if name not in fresh or not torch.equal(stored[name], fresh[name].cpu())]
    if different or len(stored) != len(fresh):
        raise BuildError(
            f"PiSSA's initial factors came out differently than when this run began ({len(different)} tensors, such "
            f"as {different[:1]}), so it cannot be resumed",
            hint="resume on the same machine with the same number of threads, or build with --force",
        )


def subtract_initial(trained: Path, initial: Path, out: Path) -> None:
    """Write trained factors, less the initial ones, as a plain LoRA adapter of the untouched base.

    Semantics: A = [A_trained; A_initial], B = [B_trained, -B_initial], rank and alpha doubled (the scale alpha / rank
    stays); B A is then exactly what training changed.

    Args:
        trained: adapter directory in training (adapter_config.json and tensors).
        initial: directory with the factors before training, from `keep_initial`.
        out: existing directory; gets adapter_config.json and tensors.
    """
    tensors = load_file(trained / WEIGHTS_FILE)
    before = load_file(initial / WEIGHTS_FILE)
    stacked = {
        name: torch.cat([tensor, before[name]], dim=0)
        if ".lora_A." in name
        else torch.cat([tensor, -before[name]], dim=1)
        for name, tensor in tensors.items()
    }
    config = json.loads((trained / CONFIG_FILE).read_text())
    config.update(r=2 * config["r"], lora_alpha=2 * config["lora_alpha"], init_lora_weights=True)
    save_tensors(stacked, out / WEIGHTS_FILE)
    (out / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
