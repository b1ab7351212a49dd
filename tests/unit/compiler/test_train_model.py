"""Loading the base: what is wrong with it is said, not guessed around."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from soka_serve.base.model import load_base
from soka_serve.errors import BuildError, CheckpointError
from tests.support.training import make_base


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base", dtype=torch.bfloat16, layers=1)


def test_auto_dtype_is_the_checkpoints_own(base: Path) -> None:
    assert load_base(base).dtype == torch.bfloat16
    assert load_base(base, "float32").dtype == torch.float32


def _write_text(name: str, text: str) -> Callable[[Path], object]:
    return lambda base: (base / name).write_text(text)


def _cut(base: Path) -> None:
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _pickle(base: Path) -> None:
    (base / "model.safetensors").unlink()
    torch.save({}, base / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda base: (base / "config.json").unlink(), r"no config\.json"),
        (_cut, "cannot be read"),
        (lambda base: (base / "model.safetensors").unlink(), "cannot be read"),
        (_pickle, "base"),
        (_write_text("config.json", "{"), "base"),
        (_write_text("config.json", '{"model_type": "no_such_model"}'), "transformers cannot build this model"),
    ],
    ids=["no config", "truncated weights", "no weights", "pickled weights", "malformed config", "unknown architecture"],
)
def test_what_is_no_base(base: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(base)
    with pytest.raises(CheckpointError, match=message):
        load_base(base)


def _rewrite(base: Path, change: Any) -> None:
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def test_missing_tensor_is_not_filled_with_noise(base: Path) -> None:
    _rewrite(base, lambda t: t.pop("model.layers.0.self_attn.q_proj.weight"))
    with pytest.raises(CheckpointError, match=r"tensors missing: model\.layers\.0\.self_attn\.q_proj\.weight"):
        load_base(base)


def test_tensor_of_another_shape(base: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    _rewrite(base, lambda t: t.update({name: t[name][:-1].clone()}))
    with pytest.raises(
        CheckpointError, match=r"not of the shape that config\.json asks for: model\.layers\.0\.mlp\.up_proj"
    ):
        load_base(base)


def test_quantised_base_without_bitsandbytes(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "bitsandbytes" else find(n, *a))
    with pytest.raises(BuildError, match="needs bitsandbytes") as raised:
        load_base(base, quantize="4bit")
    assert "pip install -e '.[kbit]'" in str(raised.value.hint)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", [64, 96])
def test_evaluation_leaves_a_4_bit_base_as_it_is(tmp_path: Path, size: int) -> None:
    """On some CPUs bitsandbytes repacks the weights, lossily, and fails for sizes such as 96."""
    pytest.importorskip("bitsandbytes")
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=size, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = load_base(tmp_path, quantize="4bit", device=torch.device("cpu"))
    weight = model.model.layers[0].mlp.down_proj.weight
    before, ids = weight.data.clone(), torch.arange(8)[None]
    with torch.no_grad():
        first = model(ids).logits
        assert torch.equal(weight.data, before)
        assert weight.quant_state.nested, "the scales are still those of double quantisation"
        torch.testing.assert_close(model.train()(ids).logits, first)
