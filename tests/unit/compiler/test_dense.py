"""Dense models written from memory keep the dtypes of the base."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from soka_serve.base.model import Dtype
from soka_serve.base.opened import Base
from soka_serve.builtin import base_directory
from soka_serve.compiler.methods import FULL, Merging
from soka_serve.io.safetensors import read_header

WIDE = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The embedded base in bfloat16, with one weight, and a buffer that sorts first, in float32."""
    folder = tmp_path / "base"
    shutil.copytree(base_directory(), folder)
    tensors = {name: value.to(torch.bfloat16) for name, value in load_file(folder / "model.safetensors").items()}
    tensors[WIDE] = tensors[WIDE].float()
    tensors["a.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    return folder


@pytest.mark.parametrize(("dtype", "wide", "others"), [("auto", "F32", "BF16"), ("float16", "F16", "F16")])
def test_each_weight_keeps_its_own_dtype(tmp_path: Path, base: Path, dtype: Dtype, wide: str, others: str) -> None:
    FULL.merge(base_directory(), Merging(Base(base), tmp_path / "out", dtype, "base", progress=False))
    written = read_header(tmp_path / "out" / "model.safetensors")
    assert written[WIDE].dtype == wide
    assert set(Counter(info.dtype for name, info in written.items() if name != WIDE)) == {others}
    expected = load_file(base_directory() / "model.safetensors")[WIDE]
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[WIDE], expected.to(written[WIDE].torch_dtype))
