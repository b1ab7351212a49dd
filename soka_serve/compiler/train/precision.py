"""The dtype in which training computes, where the manifest leaves that to the base and the device."""

from __future__ import annotations

import torch
from accelerate.utils import parse_flag_from_env

from soka_serve.base.model import held_dtype
from soka_serve.compiler.methods import METHODS
from soka_serve.manifest.schema import Manifest


def training_device() -> torch.device:
    """Where training runs: on the accelerator that is there, unless `accelerate launch --cpu` asks for the CPU.

    torch names the accelerator that it was built for, on machines without one too.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if accelerator is None or parse_flag_from_env("ACCELERATE_USE_CPU") else accelerator


def dtypes_here(manifest: Manifest, stored: str) -> str:
    """The dtypes in which this machine holds a plain base and computes, in words; arguments as `computing_dtype`'s."""
    held = held_dtype(manifest.base.dtype, getattr(torch, stored), training_device())
    return f"held in {held}, computed in {computing_dtype(manifest, stored)}".replace("torch.", "")


def computing_dtype(manifest: Manifest, stored: str) -> str:
    """The autocast dtype of a training: 'float32' is none.

    "auto" is the dtype in which the base is held. Float32 where autocast does not work: for float16 on a CPU, and for
    bfloat16 on a GPU that lacks it. The whole model is trained in float32. A base in 8 or 4 bits computes in bfloat16
    on GPUs; on CPUs that was not measured, and float32 stays.

    Args:
        manifest: [base] and [train] are read.
        stored: the dtype of the base's weights as stored, in torch's spelling ('bfloat16').
    """
    train, base = manifest.train, manifest.base
    if train.precision != "auto":
        return train.precision
    device = training_device()
    on_cpu = device.type == "cpu"
    if METHODS[train.method].whole_model or (base.quantize != "none" and on_cpu):
        return "float32"
    held = held_dtype(base.dtype, getattr(torch, stored), device)
    if base.quantize != "none" and base.dtype == "auto":
        held = torch.bfloat16
    lacking = {torch.float16} if on_cpu else set()
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        lacking = {torch.bfloat16}
    return "float32" if held in lacking else str(held).removeprefix("torch.")
