"""vLLM's layers and what they hold of a model, where that depends on vLLM's version; imported by workers only."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vllm.distributed import get_pp_group, get_world_group
from vllm.lora import layers
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.platforms import current_platform

from soka_serve.kron.sharding import Heads, LayerShards, column_parallel, qkv_parallel, row_parallel
from soka_vllm import checks

# The layers that take Kronecker adapters.
LORA_LAYERS: tuple[type[Any], ...] = tuple(getattr(layers, name) for name in checks.LORA_LAYERS)
# Base layers of these exact types are computed by their quantisation method alone.
PLAIN_LINEARS: tuple[type[Any], ...] = (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)


def shards_of(layer: Any) -> LayerShards:
    """What this rank's part of one of LORA_LAYERS holds of its modules' weights.

    Raises:
        RuntimeError: a layer whose output has other widths than this version of the plugin computes.
    """
    base, rank, ranks = layer.base_layer, layer.tp_rank, layer.tp_size
    if isinstance(layer, layers.MergedQKVParallelLinearWithLoRA | layers.QKVParallelLinearWithLoRA):
        heads = Heads(base.total_num_heads, base.total_num_kv_heads, base.head_size)
        fused = isinstance(layer, layers.QKVParallelLinearWithLoRA)
        shards = qkv_parallel(heads, base.input_size, rank, ranks, fused=fused)
    elif isinstance(layer, layers.MergedColumnParallelLinearWithLoRA):
        shards = column_parallel(base.output_sizes, base.input_size, rank, ranks)
    elif isinstance(layer, layers.ColumnParallelLinearWithLoRA):
        sizes = base.output_sizes if layer.is_merged_col_linear else [base.output_size]
        shards = column_parallel(sizes, base.input_size, rank, ranks, fused=True)
    else:
        shards = row_parallel(base.output_size, base.input_size, rank, ranks)
    # What vLLM's packing repeats is one module of the checkpoint: Gemma 4's k_proj, where it is the values' too.
    names = getattr(base, "lora_packed_modules", None)
    if names and len(names) == len(shards.shapes):
        slices = tuple(replace(part, source=names.index(names[part.source])) for part in shards.slices)
        shards = replace(shards, slices=slices)
    # Not layer.output_slices: under --fully-sharded-loras that is a shard of LoRA's B.
    rows = base.output_size_per_partition, base.input_size_per_partition
    if (sum(shards.widths), shards.in_features) != rows:
        raise RuntimeError(
            f"{base.prefix}: {type(base).__name__} computes {rows[0]} outputs of {rows[1]} inputs on this rank, the "
            f"plugin expected {sum(shards.widths)} of {shards.in_features}; serve this model without the plugin "
            "(VLLM_PLUGINS=) and report it"
        )
    return shards


def served_name(model: Any, name: str) -> str:
    """What a served model calls a module of the checkpoint, as vLLM names the modules of LoRA adapters."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return name
    if hasattr(mapper, "get_rename_mapper"):
        mapper = mapper.get_rename_mapper()
    return str(mapper._map_name(f"{name}.weight") or name).removesuffix(".weight")


def language_model_prefix(manager: Any) -> str | None:
    """Of the names of a multimodal model's language model, with a dot behind it; None where it is all of the model."""
    return f"{manager.mm_mapping.language_model[0].rstrip('.')}." if manager.supports_mm else None


def text_names_are_taken(manager: Any) -> bool:
    """Whether this vLLM takes LoRA's modules by the names of a checkpoint of the language model alone (0.33 does)."""
    return hasattr(manager, "_get_text_lora_names")


def modules_elsewhere(model: Any) -> tuple[str, ...]:
    """Names of the modules that other ranks of a pipeline hold, each with a dot behind it."""
    return tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, PPMissingLayer))


def workers() -> int:
    """How many workers there are."""
    return int(get_world_group().world_size)


def pipeline_stages() -> int:
    """Of a pipeline; 1 where there is none."""
    return int(get_pp_group().world_size)


def has_operator() -> bool:
    """Whether the operator is there for the devices that this vLLM runs on: CPUs, CUDA and what looks like it."""
    return bool(current_platform.is_cpu() or current_platform.is_cuda_alike())


def on_cpu() -> bool:
    """Whether this vLLM runs on CPUs."""
    return bool(current_platform.is_cpu())
