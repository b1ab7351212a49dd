"""`[train] precision`: what "auto" is, and what keys make of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from soka_serve.compiler.keys import InputHashes, stage_keys
from soka_serve.compiler.train.precision import computing_dtype
from soka_serve.compiler.train.trainer import make_arguments
from tests.support.training import make_manifest

INPUTS = InputHashes(base="b", config="c", tokenizer="t", data="d", finetuned={}, base_name="n", manifest="m")


def set_device(patch: pytest.MonkeyPatch, device: str, *, amx: bool = False, bfloat16: bool = True) -> None:
    found = None if device == "cpu" else torch.device(device)
    patch.setattr(torch.accelerator, "current_accelerator", lambda: found)
    patch.setattr(torch.accelerator, "is_available", lambda: found is not None)
    patch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx}, raising=False)
    patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bfloat16)


@pytest.mark.parametrize(
    ("said", "stored", "device", "computed"),
    [
        ({}, "float32", {"device": "cuda"}, "float32"),
        ({}, "bfloat16", {"device": "cuda"}, "bfloat16"),
        ({}, "float16", {"device": "cuda"}, "float16"),
        ({}, "bfloat16", {"device": "cuda", "bfloat16": False}, "float32"),
        ({"dtype": "bfloat16"}, "float32", {"device": "cuda"}, "bfloat16"),
        ({"dtype": "float32"}, "bfloat16", {"device": "cuda"}, "float32"),
        ({"precision": "float32"}, "bfloat16", {"device": "cuda"}, "float32"),
        ({"method": "full"}, "bfloat16", {"device": "cuda"}, "float32"),
        ({"quantize": "4bit"}, "float32", {"device": "cuda"}, "bfloat16"),
        ({"quantize": "4bit"}, "bfloat16", {"device": "cpu", "amx": True}, "float32"),
        ({}, "bfloat16", {"device": "cpu", "amx": True}, "bfloat16"),
        ({}, "bfloat16", {"device": "cpu", "amx": False}, "float32"),
        ({"dtype": "bfloat16"}, "float32", {"device": "cpu", "amx": False}, "bfloat16"),
        ({}, "float16", {"device": "cpu", "amx": True}, "float32"),
    ],
)
def test_auto_is_the_dtype_in_which_the_base_is_held(
    monkeypatch: pytest.MonkeyPatch, said: dict[str, Any], stored: str, device: dict[str, Any], computed: str
) -> None:
    set_device(monkeypatch, **device)
    assert computing_dtype(make_manifest(**said), stored) == computed


@pytest.mark.parametrize("why", ["accelerate launch --cpu", "a build of torch for GPUs, and none"])
@pytest.mark.parametrize(("said", "computed"), [({"dtype": "bfloat16"}, "bfloat16"), ({"dtype": "float16"}, "float32")])
def test_auto_on_the_cpu_of_a_torch_for_gpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, why: str, said: dict[str, Any], computed: str
) -> None:
    set_device(monkeypatch, "cuda", bfloat16="launch" in why)
    if "launch" in why:
        monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    else:
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    manifest = make_manifest(**said)
    assert computing_dtype(manifest, "float16") == computed
    arguments = make_arguments(manifest.train, tmp_path, name="n", evaluate=False, precision=computed)
    assert arguments.device.type == "cpu"
    assert arguments.use_cpu


def keys(inputs: InputHashes, **said: Any) -> dict[str, str]:
    return stage_keys(make_manifest(**said), inputs, ["model.layers.0.self_attn.q_proj"])


def test_keys_tell_computations_apart() -> None:
    half = replace(INPUTS, dtype="bfloat16")
    assert keys(INPUTS) == keys(INPUTS, precision="float32") != keys(INPUTS, precision="bfloat16")
    assert keys(half) != keys(half, precision="float32")
    assert keys(half, dtype="float32") == keys(half, dtype="float32", precision="float32")
    assert keys(half, method="full") == keys(half, method="full", precision="float32")
