"""Bytes of adapters: a slot on each GPU, a worker's memory, files. Calculated, and checked. For `simulate_fleet.py`.

No formula here says what a slot takes. vLLM's own LoRA layers, and the plugin's on top of them, are made on torch's
"meta" device (it has shapes and no memory, and the plugin treats it as a GPU), around layers of the base that were
never initialised, for every rank of a tensor-parallel group; an adapter is put into a slot, and what was allocated is
read off. So the cuts of the factors, GQA and the integer tables are vLLM's and the plugin's. The rank with most counts.
All decoder layers are alike: one is made, and multiplied. Values have 2 bytes, on GPUs and on the host.

- SoKA: balanced factor shapes. "soka_R" has R terms a module (init "zero" or "delta"). "soka_R_weights" was trained
  with R terms and is served with 2R: what starts from the weights ends as trained minus initial terms; so
  do init "gradient" and "random". `slot_bytes` is with SOKA_SLOT_PARAMETERS as small as it may be (`slot_values`) and
  SOKA_LORA=0. With neither set, a slot on a GPU takes the model's `unset_slot_bytes` whatever it holds, and adapters of
  more `slot_values` than the default are refused. Under tensor parallelism Left is cut, Right whole on every GPU.
- LoRA: max_lora_rank is the adapter's rank (an adapter of a smaller one would be padded). Layers whose rows are shared
  out (qkv, gate_up) hold all of A and a part of B, those whose columns are (o, down) a part of A and all of B.
  "lora_R_sharded" is with --fully-sharded-loras, which cuts the other one too (qkv's and gate_up's A by its rank).
- lm_head and the embedding take no adapters (--lora-target-modules, as `soka-serve serve` sets it).
- Host: each worker keeps the whole adapter, and copies its part into a slot. So N GPUs take N times of it.
- Files: adapter_model.safetensors, and SoKA's adapter_config.json, which names every module. soka.lock and the card
  (some KB) and LoRA's config (1 KB) are left out.

Checked: slot bytes against those that `eval/bench/serve.py` measured, on layers filled as it does and read with its
function; files against ones written; host bytes, and what is refused, against the plugin's loader.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

os.environ |= {"VLLM_PLUGINS": "", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}

import numpy as np
import torch
from safetensors.torch import save_file
from vllm.config.lora import LoRAConfig
from vllm.lora import layers as layers_with_lora
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear

from eval.bench.loads import model_manager
from eval.bench.serve import SLOTS, SMALL_LLAMA, slot_bytes
from soka_serve.adapter.format import KEY_PREFIX, PEFT_TYPE, write_adapter
from soka_serve.base.modules import Module, modules_from_config
from soka_serve.builtin import base_directory
from soka_serve.compiler.methods.lora import lora_parameters
from soka_serve.io.json_files import read_json
from soka_serve.kron import Factors
from soka_serve.kron.shapes import FactorShape, balanced_shape
from soka_vllm.layers import kronecker_class
from soka_vllm.loader import load_adapter
from soka_vllm.settings import LORA_VARIABLE, SLOT_DEFAULT, SLOT_VARIABLE, keep_limit

CONFIGS = base_directory().parent / "configs"
PARALLEL = (1, 2, 4, 8)
TIMED = ("soka_1", "lora_1", "lora_16")  # kinds whose slots and load times serve_cpu_100m.json has
BFLOAT16_BYTES = 2


class Model(NamedTuple):
    """A base: what its projections and their packing follow from."""

    modules: list[Module]
    layers: int
    heads: int
    kv_heads: int

    @property
    def first(self) -> dict[str, Module]:
        """The first decoder layer's projections, by the last part of their names."""
        return {module.projection: module for module in self.modules if module.layer == 0}


class Shard(NamedTuple):
    """One rank of a tensor-parallel group."""

    rank: int = 0
    ranks: int = 1


class AdapterKind(NamedTuple):
    """A kind of adapter on all projections. `served` is what a slot must hold, where that is not the trained rank."""

    name: str
    kind: str
    rank: int
    served: int
    sharded: bool = False


METHODS = (
    *(AdapterKind(f"soka_{r}{kind}", "soka", r, k * r) for r in (1, 4, 16) for kind, k in (("", 1), ("_weights", 2))),
    *(AdapterKind(f"lora_{r}", "lora", r, r) for r in (1, 8, 16)),
    *(AdapterKind(f"lora_{r}_sharded", "lora", r, r, sharded=True) for r in (8, 16)),
)


def model_of(config: Mapping[str, Any]) -> Model:
    """From a config.json."""
    modules = modules_from_config(dict(config))
    heads = int(config["num_attention_heads"])
    model = Model(modules, int(config["num_hidden_layers"]), heads, int(config.get("num_key_value_heads", heads)))
    shapes = {(module.projection, module.out_features, module.in_features) for module in modules}
    assert len(shapes) == len(model.first)  # all layers are alike
    return model


def models() -> dict[str, Model]:
    """The bases; "100M" and "embedded" are those of `eval/bench/serve.py`."""
    folders = {
        "LLaMA-2-7B": "meta-llama--Llama-2-7b-hf",
        "Llama-3-8B": "meta-llama--Llama-3.1-8B",
        "LLaMA-2-70B": "meta-llama--Llama-2-70b-hf",
    }
    configs = {"embedded": read_json(base_directory() / "config.json"), "100M": {"model_type": "llama", **SMALL_LLAMA}}
    configs |= {name: read_json(CONFIGS / folder / "config.json") for name, folder in folders.items()}
    return {name: model_of(config) for name, config in configs.items()}


# --- one decoder layer, as vLLM and the plugin hold it ---------------------------------------------------------------


def bare(cls: type[Any], device: str, **attributes: Any) -> Any:
    """A layer of the base as its LoRA layer sees it. Its own constructor wants process groups and makes the weight."""
    layer: Any = object.__new__(cls)
    torch.nn.Module.__init__(layer)
    layer.weight = torch.empty(0, device=device)
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


def base_layers(model: Model, shard: Shard, device: str) -> dict[str, Any]:
    """The four linear layers of a decoder layer on one rank, by the names that vLLM gives them."""
    q, k, gate, down, o = (model.first[f"{name}_proj"] for name in ("q", "k", "gate", "down", "o"))
    rank, ranks = shard
    assert ranks <= model.kv_heads  # else key/value heads are held twice, which is for the plugin's tests
    head = q.out_features // model.heads
    common = {"tp_rank": rank, "tp_size": ranks}
    qkv_sizes = [q.out_features, k.out_features, k.out_features]

    def column(cls: type[Any], sizes: list[int], inputs: int, **more: Any) -> Any:
        outputs = {"output_sizes": sizes, "output_size_per_partition": sum(sizes) // ranks}
        return bare(cls, device, input_size=inputs, input_size_per_partition=inputs, **outputs, **common, **more)

    def row(module: Module) -> Any:
        outputs = {"output_size": module.out_features, "output_size_per_partition": module.out_features}
        inputs = {"input_size": module.in_features, "input_size_per_partition": module.in_features // ranks}
        return bare(RowParallelLinear, device, **inputs, **outputs, **common)

    heads = {
        "total_num_heads": model.heads, "num_heads": model.heads // ranks, "head_size": head,
        "total_num_kv_heads": model.kv_heads, "num_kv_heads": model.kv_heads // ranks, "num_kv_head_replicas": 1,
    }  # fmt: skip
    return {
        "qkv_proj": column(QKVParallelLinear, qkv_sizes, q.in_features, **heads),
        "o_proj": row(o),
        "gate_up_proj": column(MergedColumnParallelLinear, [gate.out_features] * 2, gate.in_features),
        "down_proj": row(down),
    }


PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
WRAPPERS = {
    "qkv_proj": "MergedQKVParallelLinearWith{}LoRA",
    "o_proj": "RowParallelLinearWith{}LoRA",
    "gate_up_proj": "MergedColumnParallelLinearWith{}LoRA",
    "down_proj": "RowParallelLinearWith{}LoRA",
}


def slot_layers(
    model: Model,
    method: AdapterKind,
    shard: Shard,
    slots: int = 1,
    device: str = "meta",
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    """A decoder layer's four LoRA layers with their slots; for SoKA the plugin's, with vLLM's own classes below."""
    config = LoRAConfig(
        max_lora_rank=method.served if method.kind == "lora" else LoRAConfig().max_lora_rank,
        max_loras=slots,
        lora_dtype=dtype,
        fully_sharded_loras=method.sharded,
    )
    layers = {}
    for name, base in base_layers(model, shard, device).items():
        cls = getattr(layers_with_lora, WRAPPERS[name].format("Sharded" if method.sharded else ""))
        layers[name] = (kronecker_class(cls) if method.kind == "soka" else cls)(base)
        layers[name].create_lora_weights(slots, config, None)
    return layers


def shape_of(module: Module) -> FactorShape:
    """What the balanced rule gives."""
    return balanced_shape(module.out_features, module.in_features)


def fill(model: Model, layers: Mapping[str, Any], slot: int, terms: int) -> None:
    """Put a SoKA adapter into a slot of a decoder layer, the way vLLM's manager does."""
    for name, layer in layers.items():
        lefts, rights = [], []
        for projection in PACKED.get(name, [name]):
            m, n, p, q = shape_of(model.first[projection])
            lefts.append(torch.zeros(terms, m, n))
            rights.append(torch.zeros(terms, p, q))
        if name in PACKED:
            layer.set_lora(slot, lefts, rights)
        else:
            layer.set_lora(slot, lefts[0], rights[0])


def stacked_bytes(layers: Mapping[str, Any]) -> int:
    """LoRA's buffers."""
    return sum(t.nbytes for layer in layers.values() for t in (*layer.lora_a_stacked, *layer.lora_b_stacked))


# --- memory ----------------------------------------------------------------------------------------------------------


def gpu_slot(model: Model, method: AdapterKind, ranks: int) -> dict[str, int]:
    """One slot on the GPU that has most to hold: its bytes, and for SoKA how many of them are factors' values."""
    found = []
    for rank in range(ranks):
        layers = slot_layers(model, method, Shard(rank, ranks))
        if method.kind == "lora":
            found.append({"slot_bytes": model.layers * stacked_bytes(layers)})
            continue
        fill(model, layers, 0, method.served)
        stores = [layer._kronecker for layer in layers.values()]
        table = model.layers * sum(store.table.nbytes for store in stores)
        total = model.layers * sum(store.nbytes for store in stores)
        values = (total - table) // BFLOAT16_BYTES
        found.append({"slot_bytes": total, "slot_values": values, "table_bytes": table})
    return max(found, key=lambda slot: slot["slot_bytes"])


def tensor_shapes(model: Model, method: AdapterKind) -> dict[str, tuple[int, ...]]:
    """The tensors of an adapter file."""
    shapes: dict[str, tuple[int, ...]] = {}
    for module in model.modules:
        if method.kind == "soka":
            m, n, p, q = shape_of(module)
            parts = {"soka_left": (m, n), "soka_right": (p, q), "soka_sigma": ()}
            shapes |= {f"{KEY_PREFIX}{module.name}.{part}": (method.served, *rest) for part, rest in parts.items()}
        else:
            shapes[f"{KEY_PREFIX}{module.name}.lora_A.weight"] = (method.rank, module.in_features)
            shapes[f"{KEY_PREFIX}{module.name}.lora_B.weight"] = (module.out_features, method.rank)
    return shapes


def file_bytes(shapes: Mapping[str, tuple[int, ...]], code: str, width: int) -> int:
    """A safetensors file's size: eight bytes, a header of JSON padded to eight, the values."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(shapes):
        start, end = end, end + width * int(np.prod(shapes[name], dtype=np.int64))
        header[name] = {"dtype": code, "shape": list(shapes[name]), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"))
    return 8 + -(-len(text) // 8) * 8 + end


def parameters(model: Model, method: AdapterKind) -> int:
    """Trained parameters."""
    if method.kind == "lora":
        return sum(lora_parameters(module, method.rank) for module in model.modules)
    return sum(shape_of(module).parameters(method.rank) for module in model.modules)


def host_bytes(model: Model, method: AdapterKind, width: int = BFLOAT16_BYTES) -> int:
    """An adapter in a worker's memory: whole factors, sigma multiplied in; or whole A and B."""
    if method.kind == "lora":
        return width * parameters(model, method)
    shapes = [shape_of(module) for module in model.modules]
    return width * method.served * sum(s.m * s.n + s.p * s.q for s in shapes)


def write_soka(folder: Path, model: Model, terms: int) -> Path:
    """A SoKA adapter of so many terms, of ones."""
    factors = {}
    for module in model.modules:
        m, n, p, q = shape_of(module)
        factors[module.name] = Factors(torch.ones(terms, m, n), torch.ones(terms, p, q), torch.ones(terms))
    write_adapter(folder, factors, base_model="base")
    return folder


def memory_of(model: Model, config_bytes: int) -> dict[str, Any]:
    """All methods on one base."""
    rows: dict[str, Any] = {}
    for method in METHODS:
        shapes = tensor_shapes(model, method)
        host = host_bytes(model, method)
        row: dict[str, Any] = {
            "trained_parameters": parameters(model, method),
            "file_bytes": {"float32": file_bytes(shapes, "F32", 4), "bfloat16": file_bytes(shapes, "BF16", 2)},
            "config_bytes": config_bytes if method.kind == "soka" else 0,
            "host_bytes_per_worker": host,
            "kept_in_4_gib": keep_limit() // host,
            "per_gpu": {},
        }
        for ranks in PARALLEL:
            if ranks <= model.kv_heads:
                row["per_gpu"][ranks] = gpu_slot(model, method, ranks) | {"host_bytes_all_workers": ranks * host}
        rows[method.name] = row
    return rows


def unset_slot(model: Model, ranks: int) -> int:
    """A GPU's slot with the plugin's variables unset: its part of the arena, tables, LoRA's buffers of rank 16."""
    saved = {name: os.environ.pop(name) for name in (SLOT_VARIABLE, LORA_VARIABLE)}
    layers = slot_layers(model, METHODS[0], Shard(0, ranks))
    os.environ |= saved
    stores = [layer._kronecker for layer in layers.values()]
    assert all(store.values is stores[0].values for store in stores)  # one arena, for all decoder layers too
    arena: int = stores[0].values.nbytes
    tables: int = sum(store.table.nbytes for store in stores)
    return arena + model.layers * (tables + stacked_bytes(layers))


# --- checks of the memory --------------------------------------------------------------------------------------------


def check_measured_slots(bases: Mapping[str, Model], measured: Mapping[str, Any]) -> dict[str, Any]:
    """Fill every slot on a CPU as `eval/bench/serve.py` did, and read them with its own function."""
    checked = {}
    for name, dtype in (("embedded", torch.float32), ("100M", torch.bfloat16)):
        model = bases[name]
        for method in (m for m in METHODS if m.name in TIMED):
            layers: list[Any] = []
            for _ in range(model.layers):
                here = slot_layers(model, method, Shard(), slots=SLOTS, device="cpu", dtype=dtype)
                for slot in range(SLOTS if method.kind == "soka" else 0):
                    fill(model, here, slot, method.served)
                layers += here.values()
            ours = round(slot_bytes(torch.nn.ModuleList(layers)))
            theirs = measured[name]["load"][method.name]["slot_bytes"]
            assert ours == theirs, (name, method.name, ours, theirs)
            checked[f"{name} {method.name}"] = ours
    return checked


def check_files(model: Model, folder: Path) -> list[int]:
    """Sizes of small files of both kinds, as written and as worked out."""
    sizes = []
    for method in (METHODS[0], METHODS[-1]._replace(sharded=False)):
        shapes = tensor_shapes(model, method)
        file = folder / f"{method.name}.safetensors"
        save_file({name: torch.ones(shape) for name, shape in shapes.items()}, file, metadata={"format": "pt"})
        assert file.stat().st_size == file_bytes(shapes, "F32", 4), method
        sizes.append(file.stat().st_size)
    return sizes


def load(model: Model, adapter: Path, ranks: int) -> Any:
    """What the plugin's loader keeps of an adapter, on a rank of a server that is made of nothing but its layers."""
    layers = [slot_layers(model, METHODS[0], Shard(0, ranks)) for _ in range(model.layers)]
    modules, packed = {}, {}
    parent = {"qkv_proj": "self_attn", "o_proj": "self_attn", "gate_up_proj": "mlp", "down_proj": "mlp"}
    for i, here in enumerate(layers):
        for name, layer in here.items():
            prefix = f"model.layers.{i}.{parent[name]}"
            modules[f"{prefix}.{name}"] = layer
            if name in PACKED:
                packed[f"{prefix}.{name}"] = [f"{prefix}.{part}" for part in PACKED[name]]
    manager = model_manager(modules, packed, alone=ranks == 1)
    request = SimpleNamespace(lora_int_id=1, lora_name="adapter", lora_path=str(adapter))
    return load_adapter(adapter, PEFT_TYPE, request, manager, torch.bfloat16)


def check_loader(name: str, model: Model, adapter: Path, values: Mapping[int, int]) -> dict[str, Any]:
    """Host bytes against what the plugin's loader makes of a real file; and whether it refuses what is too large."""
    loaded = load(model, adapter, 1)
    nbytes = sum(part.lora_a.nbytes + part.lora_b.nbytes for part in loaded.loras.values())
    assert nbytes == host_bytes(model, METHODS[0]), name
    room = os.environ.pop(SLOT_VARIABLE)
    refused = {}
    for ranks, needed in values.items():
        refusal = ""
        try:
            load(model, adapter, ranks)
        except ValueError as error:
            refusal = str(error)
        refused[ranks] = needed > SLOT_DEFAULT
        assert (f"need {needed} values" in refusal) if refused[ranks] else not refusal, (name, ranks, refusal)
    os.environ[SLOT_VARIABLE] = room
    return {"host_bytes": nbytes, "refused_by_default": refused}
