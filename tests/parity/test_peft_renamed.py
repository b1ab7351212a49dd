"""Adapters on models whose modules have other names than when the adapter was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from soka_serve.errors import CheckpointError
from soka_serve.peft import SokaConfig
from tests.support.peft_models import INITS, close, logits, perturb, saved, tiny_llama, tokens, trained


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.head = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attn(x)) + x  # type: ignore[no-any-return]


class _Model(nn.Module):
    def __init__(self, *path: str, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        inner: nn.Module = nn.ModuleDict({"layers": nn.ModuleList([_Block() for _ in range(layers)])})
        for name in reversed(path):
            inner = nn.ModuleDict({name: inner})
        self.model, self.path = inner, path

    def forward(self, x: Tensor) -> Tensor:
        inner: Any = self.model
        for name in self.path:
            inner = inner[name]
        for block in inner["layers"]:
            x = block(x)
        return x


@pytest.mark.parametrize("targets", ["short", "full"])
@pytest.mark.parametrize("way", ["_checkpoint_conversion_mapping", "key_mapping", "keys renamed by hand"])
def test_an_adapter_loads_into_a_renamed_model(way: str, targets: str, tmp_path: Path) -> None:
    names = ["attn"] if targets == "short" else ["model.layers.0.attn", "model.layers.1.attn"]
    config = SokaConfig(r=2, target_modules=names, soka_modules={"model.layers.1.attn": {"shape": [6, 2, 2, 6]}})
    model = get_peft_model(_Model(), config)
    perturb(model, 0.3)
    x = torch.randn(3, 12)
    want, before = model(x), _Model()(x)
    model.save_pretrained(str(tmp_path))
    renamed, options = _Model("language_model"), {}
    if way == "_checkpoint_conversion_mapping":
        renamed._checkpoint_conversion_mapping = {"^model": "model.language_model"}
    elif way == "key_mapping":
        options["key_mapping"] = {r"^model\.": "model.language_model."}
    else:
        file = tmp_path / "adapter_model.safetensors"
        save_file(
            {k.replace("model.layers", "model.language_model.layers"): v for k, v in load_file(file).items()}, file
        )
    loaded = PeftModel.from_pretrained(renamed, str(tmp_path), **options)
    assert torch.allclose(loaded(x), want, atol=1e-6)
    assert not torch.allclose(want, before, atol=1e-2)
    assert set(loaded.peft_config["default"].soka_modules) == {f"model.language_model.layers.{i}.attn" for i in (0, 1)}


def test_targets_and_the_file_decide_where_no_name_is_known(tmp_path: Path) -> None:
    config = SokaConfig(r=2, target_modules=["attn"], shape=[6, 2, 2, 6])
    model = get_peft_model(_Model(), config)
    perturb(model, 0.3)
    x = torch.randn(3, 12)
    want = model(x)
    model.save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    spec = json.loads(file.read_text())
    spec["soka_modules"] = {k.replace("layers", "h"): v for k, v in spec["soka_modules"].items()}
    file.write_text(json.dumps({**spec, "shape": "balanced", "r": 1}))
    loaded = PeftModel.from_pretrained(_Model(), str(tmp_path))
    assert torch.allclose(loaded(x), want, atol=1e-6)


def test_a_renamed_model_that_lacks_layers_is_refused(tmp_path: Path) -> None:
    get_peft_model(_Model(), SokaConfig(target_modules=["attn"])).save_pretrained(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"the config does not name|missing|does not name"):
        PeftModel.from_pretrained(_Model("language_model", layers=1), str(tmp_path))


def test_transformers_own_loading(tmp_path: Path) -> None:
    """`model.load_adapter` has its own renaming of keys."""
    ids, model = tokens(), trained()
    want = logits(model, ids)
    model.save_pretrained(str(tmp_path))
    base = tiny_llama()
    report = base.load_adapter(str(tmp_path))
    assert not report.missing_keys
    assert not report.unexpected_keys
    assert torch.equal(logits(base, ids), want)
    assert not close(want, logits(tiny_llama(), ids))
    assert set(base.get_adapter_state_dict()) == {
        key.removeprefix("base_model.model.") for key in load_file(tmp_path / "adapter_model.safetensors")
    }


@pytest.mark.parametrize("init", INITS)
def test_an_adapter_is_injected_from_its_tensors(init: str, tmp_path: Path) -> None:
    ids, model = tokens(), trained(init)
    want, tensors = logits(model, ids), saved(model, tmp_path)
    tensors = {key.removeprefix("base_model.model."): value for key, value in tensors.items()}
    config = SokaConfig(target_modules=["q_proj"], init_soka_weights=init)
    with pytest.warns(RuntimeWarning, match="The state_dict contained these additional target modules"):
        injected = peft.inject_adapter_in_model(config, tiny_llama(), state_dict=tensors)
    peft.set_peft_model_state_dict(injected, tensors)
    assert torch.equal(logits(injected, ids), want)
