"""Everything that depends on vLLM's version: its classes and functions that the plugin uses, and whether they fit.

Imports vLLM, hence only to be imported once an engine is wanted (`soka_vllm.register`).
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import vllm
from vllm.distributed import get_pp_group, get_world_group
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.lora import utils as lora_utils
from vllm.lora.layers import (
    ColumnParallelLinearWithLoRA,
    ColumnParallelLinearWithShardedLoRA,
    MergedColumnParallelLinearWithLoRA,
    MergedColumnParallelLinearWithShardedLoRA,
    MergedQKVParallelLinearWithLoRA,
    MergedQKVParallelLinearWithShardedLoRA,
    QKVParallelLinearWithLoRA,
    QKVParallelLinearWithShardedLoRA,
    RowParallelLinearWithLoRA,
    RowParallelLinearWithShardedLoRA,
)
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry
from vllm.lora.utils import get_adapter_absolute_path
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager, WorkerLoRAManager
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.platforms import current_platform
from vllm.v1.core import kv_cache_utils
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.core_client import AsyncMPClient
from vllm.v1.engine.output_processor import OutputProcessor

from soka_serve.kron.sharding import Heads, LayerShards, column_parallel, qkv_parallel, row_parallel
from soka_vllm.versions import is_supported, supported_text

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
else:
    CPUModelRunner = None

__all__ = [
    "LORA_LAYERS",
    "PLAIN_LINEARS",
    "AsyncLLM",
    "CPUModelRunner",
    "EngineCore",
    "ErrorResponse",
    "LRUCacheWorkerLoRAManager",
    "LoRALayerWeights",
    "LoRAModel",
    "LoRAModelManager",
    "LoRARequest",
    "LoRAResolver",
    "LoRAResolverRegistry",
    "OpenAIServingModels",
    "OutputProcessor",
    "PEFTHelper",
    "PunicaWrapperBase",
    "WorkerLoRAManager",
    "adapter_directory",
    "check_vllm",
    "create_error_response",
    "has_operator",
    "kv_cache_utils",
    "lora_utils",
    "make_pipeline_buffers",
    "modules_elsewhere",
    "on_cpu",
    "pipeline_stages",
    "served_name",
    "shards_of",
    "worker_rank",
    "workers",
]

# The layers that take Kronecker adapters: qkv_proj and gate_up_proj, packed or one module, o_proj and down_proj.
# Names with "Sharded" are what vLLM takes under --fully-sharded-loras.
LORA_LAYERS: tuple[type[Any], ...] = (
    ColumnParallelLinearWithLoRA,
    ColumnParallelLinearWithShardedLoRA,
    MergedColumnParallelLinearWithLoRA,
    MergedColumnParallelLinearWithShardedLoRA,
    MergedQKVParallelLinearWithLoRA,
    MergedQKVParallelLinearWithShardedLoRA,
    QKVParallelLinearWithLoRA,
    QKVParallelLinearWithShardedLoRA,
    RowParallelLinearWithLoRA,
    RowParallelLinearWithShardedLoRA,
)
# Base layers of these exact types are computed by their quantisation method alone.
PLAIN_LINEARS: tuple[type[Any], ...] = (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)

# What is overridden or called, and the parameters it must have, in order.
_SIGNATURES: tuple[tuple[Any, str, str], ...] = (
    *(
        (layer, name, parameters)
        for layer in LORA_LAYERS
        for name, parameters in (
            ("create_lora_weights", "self max_loras lora_config model_config"),
            ("reset_lora", "self index"),
            ("set_lora", "self index lora_a lora_b"),
            ("apply", "self x bias"),
        )
    ),
    *([(CPUModelRunner, "load_model", "self load_dummy_weights")] if CPUModelRunner else []),
    (WorkerLoRAManager, "_load_adapter", "self lora_request"),
    (LRUCacheWorkerLoRAManager, "_apply_adapters", "self lora_requests"),
    (LoRAModelManager, "activate_adapter", "self lora_id"),
    (AsyncLLM, "add_lora", "self lora_request"),
    (AsyncMPClient, "call_utility_async", "self method args"),
    (LRUCacheWorkerLoRAManager, "add_adapter", "self lora_request"),
    (OpenAIServingModels, "init_static_loras", "self"),
    (OpenAIServingModels, "resolve_lora", "self lora_name"),
    (OutputProcessor, "abort_requests", "self request_ids internal"),
    (
        OutputProcessor,
        "_update_stats_from_output",
        "self req_state engine_core_output engine_core_timestamp iteration_stats",
    ),
    (OutputProcessor, "_update_stats_from_finished", "self req_state finish_reason iteration_stats"),
    (EngineCore, "add_lora", "self lora_request"),
    (EngineCore, "add_request", "self request request_wave"),
    (kv_cache_utils, "_gen_lora_extra_hash_keys", "request"),
    (OpenAIServingModels, "load_lora_adapter", "self request base_model_name"),
    (OpenAIServingModels, "unload_lora_adapter", "self request"),
    (lora_utils, "get_adapter_absolute_path", "lora_path"),
)


def adapter_directory(path: str, roots: Sequence[Path] | None) -> Path:
    """Where an adapter's files are; hub ids are fetched, but not for those who may load from `roots` only."""
    if roots is None:
        return Path(get_adapter_absolute_path(path))
    return Path(os.path.expanduser(path)).absolute()  # noqa: PTH111 (pathlib's raises for users that do not exist)


def shards_of(layer: Any) -> LayerShards:
    """What this rank's part of one of LORA_LAYERS holds of its modules' weights.

    Raises:
        RuntimeError: a layer whose output has other widths than this version of the plugin computes.
    """
    base, rank, ranks = layer.base_layer, layer.tp_rank, layer.tp_size
    if isinstance(layer, MergedQKVParallelLinearWithLoRA | QKVParallelLinearWithLoRA):
        heads = Heads(base.total_num_heads, base.total_num_kv_heads, base.head_size)
        fused = isinstance(layer, QKVParallelLinearWithLoRA)
        shards = qkv_parallel(heads, base.input_size, rank, ranks, fused=fused)
    elif isinstance(layer, MergedColumnParallelLinearWithLoRA):
        shards = column_parallel(base.output_sizes, base.input_size, rank, ranks)
    elif isinstance(layer, ColumnParallelLinearWithLoRA):
        sizes = base.output_sizes if layer.is_merged_col_linear else [base.output_size]
        shards = column_parallel(sizes, base.input_size, rank, ranks, fused=True)
    else:
        shards = row_parallel(base.output_size, base.input_size, rank, ranks)
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


def modules_elsewhere(model: Any) -> tuple[str, ...]:
    """Names of the modules that other ranks of a pipeline hold, each with a dot behind it."""
    return tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, PPMissingLayer))


def make_pipeline_buffers(runner: Any) -> None:
    """Allocate what a later stage of a pipeline receives, where vLLM has not done it.

    vLLM does so in its warm-up run, which its CPU build leaves out when nothing is compiled, as with LoRA: the first
    request then ends the engine (versions up to 0.32).
    """
    if not get_pp_group().is_first_rank and runner.intermediate_tensors is None:
        runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
        )


def check_vllm() -> None:
    """Check that the plugin fits the installed vLLM.

    Raises:
        RuntimeError: an unsupported version, or one whose functions have other parameters than expected.
    """
    here = f"soka_vllm supports vLLM {supported_text()}; installed is {vllm.__version__}"
    advice = "install a supported version, or set VLLM_PLUGINS= to run without Kronecker adapters"
    if not is_supported(vllm.__version__):
        raise RuntimeError(f"{here}: {advice}")
    problems = []
    for owner, name, expected in _SIGNATURES:
        function = getattr(owner, name, None)
        names = " ".join(inspect.signature(function).parameters) if function else "does not exist"
        if names != expected:
            problems.append(f"{owner.__name__}.{name} ({names}); expected ({expected})")
    if not isinstance(getattr(lora_utils, "_all_lora_classes", None), tuple):
        problems.append("vllm.lora.utils._all_lora_classes is not a tuple of classes")
    else:
        missing = [layer.__name__ for layer in LORA_LAYERS if layer not in lora_utils._all_lora_classes]
        problems += [f"{name} is not in vllm.lora.utils._all_lora_classes" for name in missing]
    for cls, attribute in (
        (LoRAModelManager, "self.packed_modules"),
        (LoRAModelManager, "self.modules"),
        (PunicaWrapperBase, "self._token_lora_indices"),
    ):
        if attribute not in inspect.getsource(cls.__init__):
            problems.append(f"{cls.__name__} has no {attribute.removeprefix('self.')}")
    if problems:
        raise RuntimeError("\n".join([f"{here}, which differs from what was tested: {advice}", *problems]))


def worker_rank() -> int:
    """Number of this process among the workers."""
    return int(get_world_group().rank)


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
