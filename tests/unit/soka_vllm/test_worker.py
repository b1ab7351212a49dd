"""A worker puts adapters into slots; vLLM's manager is a stand-in, layers and readers are the plugin's."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from eval.bench.loads import make_manager, make_model
from eval.llama import random_factors
from soka_serve.adapter.format import write_adapter
from soka_serve.kron import dense_delta

with warnings.catch_warnings():  # vLLM uses what torch has deprecated
    warnings.simplefilter("ignore")
    from vllm.lora import lora_model
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.lora_weights import LoRALayerWeights, PackedLoRALayerWeights
    from vllm.lora.peft_helper import PEFTHelper
    from vllm.lora.request import LoRARequest

    from soka_vllm import hooks, loader, reading, sum_names, summing, sums, worker
    from soka_vllm.slots import SlotStore
    from soka_vllm.store import ReadResult, tensors_of, worker_adapters

SIZE = (1, 64, 96, 4, 2, 16)  # layers, hidden, inner, heads, key/value heads, features of a head


def test_an_adapter_takes_the_place_of_one_that_was_trained_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, packed, weights = make_model(SIZE)
    manager = make_manager(shards, packed)
    adapters = manager._adapter_manager
    adapters.lora_index_to_id = [None]
    loaded: dict[int, dict[str, Any]] = {}

    def set_all(adapters: Any, number: int) -> bool:
        for name, layer in adapters.modules.items():
            layer.set_lora(0, loaded[number][name].lora_a, loaded[number][name].lora_b)
        return True

    overwritten: list[bool] = []
    overwrite = SlotStore.overwrite

    def noted(store: SlotStore, slot: int, parts: Any) -> bool:
        overwritten.append(overwrite(store, slot, parts))
        return overwritten[-1]

    monkeypatch.setattr(SlotStore, "overwrite", noted)
    for number in (1, 2, 3):
        torch.manual_seed(number)
        factors = random_factors(weights, 1 if number < 3 else 2)
        write_adapter(tmp_path / f"{number}", factors, base_model="base", dtype=torch.bfloat16)
        request = LoRARequest(f"{number}", number, str(tmp_path / f"{number}"), load_inplace=True)
        found = dict(reading.load(None, manager, request).loras)
        found |= {
            name: PackedLoRALayerWeights.pack([found.pop(part) for part in parts]) for name, parts in packed.items()
        }
        loaded[number] = found
        assert worker.activate(set_all, adapters, number)
        for name, layer in adapters.modules.items():
            x = torch.randn(3, shards[name].in_features)
            out = torch.zeros(3, sum(shards[name].widths))
            layer._kronecker.add_to(out, x, torch.zeros(3, dtype=torch.long))
            dense = torch.cat([dense_delta(factors[part], torch.float64) for part in packed.get(name, [name])])
            want = x.double() @ dense.T
            assert (out - want).norm() < 2e-2 * want.norm()
    layers = len(shards)
    assert overwritten == [False] * layers + [True] * layers + [False] * layers


def test_a_module_that_a_layer_holds_twice(tmp_path: Path) -> None:
    """Gemma 4's k_proj where it is the values' too: its delta is in both slices, and once in a sum."""
    shards, packed, weights = make_model(SIZE)
    qkv = "model.layers.0.self_attn.qkv_proj"
    q, k, v = packed[qkv]
    packed[qkv] = [q, k, k]
    shared = (replace(part, source=min(part.source, 1)) for part in shards[qkv].slices)
    shards[qkv] = replace(shards[qkv], slices=tuple(shared))
    del weights[v]
    manager = make_manager(shards, packed)
    adapters = manager._adapter_manager
    assert loader.places_of(adapters)[k] == (adapters.modules[qkv], 1)
    adapters.lora_index_to_id = [None]
    factors = random_factors(weights, 1)
    write_adapter(tmp_path, factors, base_model="base", dtype=torch.bfloat16)
    model = reading.load(None, manager, LoRARequest("a", 1, str(tmp_path), load_inplace=True))
    loras = dict(model.loras)
    for name, parts in packed.items():
        model.loras[name] = PackedLoRALayerWeights.pack([loras[part] for part in parts])
        for part in parts:
            model.loras.pop(part, None)

    def fill(served: Any) -> None:
        for name, layer in adapters.modules.items():
            parts = packed.get(name, [name])
            given = served.loras.get(name) or PackedLoRALayerWeights.pack([served.loras[part] for part in parts])
            layer.set_lora(0, given.lora_a, given.lora_b)

    def check(scale: float) -> None:
        layer = adapters.modules[qkv]
        x = torch.randn(3, shards[qkv].in_features)
        out = torch.zeros(3, sum(shards[qkv].widths))
        layer._kronecker.add_to(out, x, torch.zeros(3, dtype=torch.long))
        want = scale * x.double() @ torch.cat([dense_delta(factors[part], torch.float64) for part in (q, k, k)]).T
        assert (out - want).norm() < 2e-2 * want.norm()

    fill(model)
    check(1.0)
    worker_adapters(manager).adapters[1] = model, ReadResult(fingerprint="a")
    path = sums.request_of([sum_names.Term(0.5, "a")], {"a": LoRARequest("a", 1, str(tmp_path))}, {}).lora_path
    fill(summing.add_up(manager, LoRARequest("0.5*a", 2, path), 1 << 30))
    check(0.5)


@pytest.mark.parametrize("taken", [True, False])
def test_a_sum_is_by_the_served_model_s_names(taken: bool) -> None:
    """Of a multimodal model, LoRA adapters may have those of a checkpoint of its language model alone."""
    shards, packed, weights = make_model(SIZE)
    prefix = "language_model."
    manager = make_manager(
        {prefix + name: part for name, part in shards.items()},
        {prefix + name: [prefix + part for part in parts] for name, parts in packed.items()},
    )
    adapters = manager._adapter_manager
    adapters.supports_mm, adapters.mm_mapping = True, SimpleNamespace(language_model=[prefix])
    if taken:  # vLLM from 0.33 on
        adapters._get_text_lora_names = None
    module = "model.layers.0.self_attn.o_proj"
    rows, columns = weights[module]
    requests = {}
    for number, name in enumerate((module, prefix + module), 1):
        held = LoRALayerWeights(name, 1, 1, torch.ones(1, columns), torch.ones(rows, 1), scaling=1)
        worker_adapters(manager).adapters[number] = LoRAModel(number, 1, {name: held}), ReadResult(fingerprint=name)
        requests["ab"[number - 1]] = LoRARequest("ab"[number - 1], number, name)
    terms = [sum_names.Term(1.0, "a"), sum_names.Term(1.0, "b")]
    path = sums.request_of(terms, requests, {}).lora_path
    found = summing.add_up(manager, LoRARequest("a+b", 3, path), 1 << 30).loras
    names = [prefix + module] if taken else [module, prefix + module]
    assert list(found) == names
    assert found[names[0]].rank == 3 - len(names)


def write_lora(folder: Path, weights: dict[str, tuple[int, int]], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """An ordinary LoRA of ones for one module, with a classifier where the config has one; returns its tensors."""
    name = next(name for name in weights if name.endswith("o_proj"))
    rows, columns = weights[name]
    prefix = f"base_model.model.{name}."
    values = {f"{prefix}lora_A.weight": torch.ones(2, columns), f"{prefix}lora_B.weight": torch.ones(rows, 2)}
    if "modules_to_save" in config:
        values |= {f"base_model.model.score.{part}": torch.ones(4, 4) for part in ("weight", "bias")}
    values = {key: value.bfloat16() for key, value in values.items()}
    save_file(values, folder / "adapter_model.safetensors")
    lora = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["o_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(lora | config))
    return values


def stock(manager: Any, request: Any, modules: Any = frozenset({"o_proj"})) -> Any:
    """What vLLM's reader does without the served model."""
    helper = PEFTHelper.from_local_dir(request.lora_path, None)
    return LoRAModel.from_local_checkpoint(
        request.lora_path, modules, helper, lora_model_id=1, device="cpu", dtype=torch.bfloat16
    )


@pytest.fixture
def rebound(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the table has for vLLM's reader of LoRA is in force."""
    monkeypatch.setattr(lora_model, "safetensors", lora_model.safetensors)  # put back at the end
    hooks._rebind([lora_model.__name__])


@pytest.mark.usefixtures("rebound")
@pytest.mark.parametrize("config", [{}, {"modules_to_save": ["score"]}], ids=["lora", "classifier"])
def test_a_lora_in_memory_is_not_its_file(tmp_path: Path, config: dict[str, Any]) -> None:
    shards, packed, weights = make_model(SIZE)
    manager = make_manager(shards, packed)
    values = write_lora(tmp_path, weights, config)
    model = reading.load(stock, manager, LoRARequest("a", 1, str(tmp_path), load_inplace=True))
    with (tmp_path / "adapter_model.safetensors").open("r+b") as file:
        size = file.seek(0, 2)
        start = size - sum(value.nbytes for value in values.values())
        file.seek(start)
        file.write(bytes(size - start))
    found = [tensor for _, tensor in tensors_of(model)]
    assert len(found) == len(values)
    assert all(bool((tensor == 1).all()) for tensor in found)


@pytest.mark.usefixtures("rebound")
@pytest.mark.parametrize("left", [0, 4096])
def test_a_lora_that_is_cut_while_it_is_read_is_refused(tmp_path: Path, left: int) -> None:
    """Between its header and its values; to read what was mapped of it would end the process (SIGBUS)."""
    shards, packed, weights = make_model((1, 1024, 96, 4, 2, 256))
    manager = make_manager(shards, packed)
    write_lora(tmp_path, weights, {})
    file = tmp_path / "adapter_model.safetensors"

    class Cutting(frozenset[str]):
        """The modules that vLLM asks for when it has opened the file, and before it reads a tensor."""

        def __contains__(self, name: object) -> bool:
            os.truncate(file, left)
            return super().__contains__(name)

    def cutting(manager: Any, request: Any) -> Any:
        return stock(manager, request, Cutting({"o_proj"}))

    with pytest.raises(ValueError, match=rf"{file}: base_model.*lora_[AB].weight: truncated: expected \d+ bytes"):
        reading.load(cutting, manager, LoRARequest("a", 1, str(tmp_path), load_inplace=True))
    os.truncate(file, 0)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: truncated: expected at least 8 bytes"):
        reading.load(stock, manager, LoRARequest("a", 1, str(tmp_path), load_inplace=True))
