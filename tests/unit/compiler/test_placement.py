"""A base whose layers are cast one at a time: the same statistics as of the whole model in that dtype."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from soka_serve.base.base import Base
from soka_serve.base.model import load_base
from soka_serve.base.modules import Module
from soka_serve.base.target_modules import TargetModule
from soka_serve.compiler.init import probe
from soka_serve.compiler.init.placement import LayerPlacement, load_layered
from soka_serve.compiler.init.probe import gather
from soka_serve.compiler.init.walk import LayerWalk
from soka_serve.manifest.rules import Adapt
from tests.support.tiny_models import SHAPES, write_base

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "bf16", tied=request.param)


def _statistics(model: Any, placement: LayerPlacement | None, rule: dict[str, Any]) -> dict[str, Tensor]:
    targets = [
        TargetModule(Module(f"model.layers.{layer}.{name}", *size, layer, "bfloat16"), Adapt(**rule), (0,), None)
        for layer in (0, 1)
        for name, size in SHAPES.items()
    ]
    ids = torch.randint(3, 96, (3, 2, 11), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": i, "labels": i, "attention_mask": torch.ones_like(i)} for i in ids]
    found = {}
    for target, gradient, moments, _ in gather(model, batches, targets, None, placement):
        found[target.module.name] = gradient if moments is None else moments.moment()
        if placement is not None and placement._parts:  # a decomposition has the memory of the layer that was run
            assert not any(layer.mlp.up_proj.weight.dtype == torch.float32 for layer in model.model.layers)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("amx", [True, False])
def test_auto_holds_half_precision_in_float32_where_the_cpu_is_slow_in_it(
    directory: Path, monkeypatch: pytest.MonkeyPatch, amx: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx}, raising=False)
    model, placement = load_layered(Base(directory), "auto", CPU)
    assert (placement is None) == amx
    assert model.dtype == (torch.bfloat16 if amx else torch.float32)


@pytest.mark.parametrize("walked", [True, False])
@pytest.mark.parametrize("rule", [{"init": "weights", "calibration_batches": 2}, {"init": "gradient"}])
def test_the_same_statistics_as_of_the_whole_model(
    directory: Path, rule: dict[str, Any], walked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, placement = load_layered(Base(directory), "float32", CPU)
    whole = load_base(directory, "float32").requires_grad_(False)
    assert placement is not None
    if not walked:
        for one in (model, whole):
            monkeypatch.setattr(one, "get_decoder", lambda: None)
    expected = _statistics(whole, None, rule)
    found = _statistics(model, placement, rule)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_hidden_states_are_kept_of_two_layers(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedded: list[weakref.ref[Tensor]] = []

    class Watched(LayerWalk):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            embedded.extend(map(weakref.ref, self.embedded))

    monkeypatch.setattr(probe, "LayerWalk", Watched)
    model, placement = load_layered(Base(directory), "float32", CPU)
    kept = []
    target = TargetModule(
        Module("model.layers.1.mlp.up_proj", *SHAPES["mlp.up_proj"], 1, "bfloat16"),
        Adapt(init="weights", calibration_batches=2), (0,), None,
    )  # fmt: skip
    ids = torch.randint(3, 96, (2, 2, 11), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": i, "labels": i, "attention_mask": torch.ones_like(i)} for i in ids]
    for _ in gather(model, batches, [target], None, placement):
        kept = [reference() is not None for reference in embedded]
    assert kept == [False, False]


def test_a_checkpoint_of_several_dtypes_is_cast_while_it_is_read(tmp_path: Path) -> None:
    directory = write_base(tmp_path / "mixed", shard="1GB")
    file = directory / "model.safetensors"
    tensors = {k: v.float() + 1e-4 if "norm" in k else v for k, v in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    model, placement = load_layered(Base(directory), "float32", CPU)
    assert placement is None
    assert all(torch.equal(tensors[k].float(), v) for k, v in model.state_dict().items() if k in tensors)
