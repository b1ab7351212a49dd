"""A worker puts adapters into slots; vLLM's manager is a stand-in, layers and readers are the plugin's."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.bench.loads import make_manager, make_model
from eval.llama import random_factors
from soka_serve.adapter.format import write_adapter
from soka_serve.kron import dense_delta

with warnings.catch_warnings():  # vLLM uses what torch has deprecated
    warnings.simplefilter("ignore")
    from vllm.lora.lora_weights import PackedLoRALayerWeights
    from vllm.lora.request import LoRARequest

    from soka_vllm import reading, worker
    from soka_vllm.slots import SlotStore

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
