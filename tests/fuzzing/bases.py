"""Bases whose tensors and config do not agree: listed as the model has them, or refused."""

from __future__ import annotations

import json
import math
import shutil
import struct
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

import soka_serve.base.meta_model  # noqa: F401 - transformers is imported before the clock runs
from soka_serve.base.opened import Base
from soka_serve.builtin import base_directory
from soka_serve.errors import SokaError, is_printable
from soka_serve.io.safetensors import read_header
from tests.fuzzing.limits import bounded

_KINDS = ("llama", "qwen2", "qwen3", "granite", "phi3", "gemma3_text", "gpt2", "mixtral", "clip", "new")
_SIZES = ("num_hidden_layers", "hidden_size", "num_key_value_heads", "intermediate_size", "vocab_size", "head_dim")


def write_shapes(folder: Path) -> None:
    """The embedded base."""
    shutil.copytree(base_directory(), folder)


def spoil_base(draw: st.DrawFn, folder: Path) -> None:
    """Tensors renamed, taken out, added and of other shapes; another architecture, other sizes."""
    file = folder / "model.safetensors"
    shapes = {name: list(info.shape) for name, info in read_header(file).items()}
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(sorted(shapes))) if shapes else "none"
        kind = draw(st.sampled_from(["drop", "shape", "extra layer", "mtp", "bare", "prefix", "rename"]))
        if kind == "drop":
            shapes.pop(name, None)
        elif kind == "shape":
            shapes[name] = draw(st.lists(st.integers(0, 9), max_size=3))
        elif kind == "extra layer":
            shapes[f"model.layers.{draw(st.integers(3, 10**6))}.self_attn.q_proj.weight"] = [8, 8]
        elif kind == "mtp":
            shapes[f"mtp.{name}"] = [8, 8]
        elif kind == "bare":
            shapes = {other.removeprefix("model."): shape for other, shape in shapes.items()}
        elif kind == "prefix":
            shapes = {f"{draw(st.sampled_from(['model', 'language_model', 'x']))}.{n}": s for n, s in shapes.items()}
        else:
            shapes[draw(st.text(max_size=8)) or "x"] = shapes.pop(name, [2])
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    if draw(st.booleans()):
        config["model_type"] = draw(st.sampled_from(_KINDS))
    if draw(st.integers(0, 2)) == 0:
        config[draw(st.sampled_from(_SIZES))] = draw(st.sampled_from([None, 0, -1, 1, 3, 5, 8, "4", 2.5, [], True]))
    if draw(st.integers(0, 3)) == 0:
        config["text_config"] = draw(st.sampled_from([None, {}, [], 3, {"hidden_size": 8}, {"model_type": "llama"}]))
    (folder / "config.json").write_text(json.dumps(config))


def check_base(folder: Path) -> bool:
    """Every module that is listed has its weight in the file; returns whether the base was taken."""
    with bounded():
        refusal = ""
        try:
            opened = Base(folder)
            base, weights = opened.layout, opened.weights
        except SokaError as error:
            refusal = error.message
    assert all(map(is_printable, refusal.split("\n"))), refusal
    if refusal:
        return False
    for module in base.modules:
        assert weights.get(module.name).shape == (module.out_features, module.in_features)
    assert base.size.parameters > 0
    return True
