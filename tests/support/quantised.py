"""Quantised copies of the embedded base, of the form that each method writes; their values mean nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from soka_serve.builtin import base_directory

Tensors = dict[str, torch.Tensor]


def gptq(name: str, weight: torch.Tensor) -> Tensors:
    rows, columns = weight.shape
    module, groups = name.removesuffix(".weight"), columns // 32
    return {
        f"{module}.qweight": torch.zeros(columns // 8, rows, dtype=torch.int32),
        f"{module}.qzeros": torch.zeros(groups, rows // 8, dtype=torch.int32),
        f"{module}.scales": torch.ones(groups, rows).half(),
        f"{module}.g_idx": torch.zeros(columns, dtype=torch.int32),
    }


def awq(name: str, weight: torch.Tensor) -> Tensors:
    rows, columns = weight.shape
    module, groups = name.removesuffix(".weight"), columns // 32
    return {
        f"{module}.qweight": torch.zeros(columns, rows // 8, dtype=torch.int32),
        f"{module}.qzeros": torch.zeros(groups, rows // 8, dtype=torch.int32),
        f"{module}.scales": torch.ones(groups, rows).half(),
    }


def bnb(name: str, weight: torch.Tensor) -> Tensors:
    return {
        name: torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8),
        f"{name}.absmax": torch.zeros(weight.numel() // 64, dtype=torch.uint8),
        f"{name}.quant_map": torch.zeros(16),
        f"{name}.quant_state.bitsandbytes__nf4": torch.zeros(80, dtype=torch.uint8),
    }


def fp8(name: str, weight: torch.Tensor) -> Tensors:
    return {name: weight.to(torch.float8_e4m3fn), f"{name}_scale": torch.ones(1)}


def mx(name: str, weight: torch.Tensor) -> Tensors:
    scale = torch.zeros(weight.shape[0], weight.shape[1] // 32, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    return {name: weight.to(torch.float8_e4m3fn), f"{name}_scale": scale}


def packed(name: str, weight: torch.Tensor) -> Tensors:
    rows, columns = weight.shape
    module = name.removesuffix(".weight")
    return {
        f"{module}.weight_packed": torch.zeros(rows, columns // 8, dtype=torch.int32),
        f"{module}.weight_scale": torch.ones(rows, 1).half(),
        f"{module}.weight_shape": torch.tensor([rows, columns]),
    }


_PACKED = {"config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int"}, "targets": ["Linear"]}}}
METHODS: dict[str, tuple[Callable[[str, torch.Tensor], Tensors], dict[str, Any]]] = {
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}),
    "bitsandbytes": (bnb, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "fp8": (fp8, {"quant_method": "fp8", "activation_scheme": "dynamic"}),
    "mxfp8": (mx, {"quant_method": "mxfp8"}),
    "compressed-tensors": (packed, {"quant_method": "compressed-tensors", "format": "pack-quantized", **_PACKED}),
}


def write_copy(
    folder: Path, change: Callable[[str, torch.Tensor], Tensors], config: Mapping[str, Any] | None = None
) -> Path:
    """A copy of the embedded base whose projections are stored otherwise.

    Args:
        folder: to make.
        change: name and weight of a projection -> what is stored instead.
        config: more keys of config.json; None takes one out.
    """
    shutil.copytree(base_directory(), folder)
    tensors: Tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        tensors |= change(name, tensor) if "_proj" in name else {name: tensor}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, config or {})
    return folder


def edit_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Set keys of a config.json; None takes one out."""
    file = folder / "config.json"
    changed = json.loads(file.read_text()) | config
    file.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))


def write_quantised(folder: Path, method: str) -> Path:
    """The embedded base as a method of METHODS stores it."""
    change, config = METHODS[method]
    return write_copy(folder, change, {"quantization_config": config})
