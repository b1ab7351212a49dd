"""A worker reads an adapter's files, within limits that are computed from the served model's layers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor

from soka_serve.adapter import patterns
from soka_vllm import compat, metrics
from soka_vllm.layers import KroneckerMixin
from soka_vllm.limits import ModelLimits, values_kept
from soka_vllm.loader import check_lora, load_adapter
from soka_vllm.places import adapter_files
from soka_vllm.readers import LORA, READERS, look_at
from soka_vllm.settings import LORA_VARIABLE, serves_lora
from soka_vllm.store import worker_adapters
from soka_vllm.summing import add_up
from soka_vllm.sums import is_sum


def load(stock: Any, manager: Any, lora_request: Any) -> Any:
    """WorkerLoRAManager._load_adapter: the adapter from memory; or from its files, with `load_inplace` always.

    A sum is made of its members in memory.

    Raises:
        ValueError: why it cannot be served.
    """
    model = None if lora_request.load_inplace else worker_adapters(manager).model(lora_request.lora_int_id)
    if model is not None:
        return model
    if is_sum(lora_request.lora_path):
        return add_up(manager, lora_request, limits_of(manager).values)
    started = time.perf_counter()
    with adapter_files(lora_request) as directory:
        model = _read(stock, manager, directory, lora_request)
    metrics.note_read(manager, time.perf_counter() - started)
    return model


def _read(stock: Any, manager: Any, directory: Path, lora_request: Any) -> Any:
    kind, budget = limits_of(manager).open(directory)
    if kind == LORA and not serves_lora():
        raise ValueError(f"an ordinary LoRA adapter; this server was started with {LORA_VARIABLE}=0")
    if kind in (None, LORA):
        with patterns.matching(look_at(directory, kind, budget)):
            model = stock(manager, msgspec.structs.replace(lora_request, lora_path=str(directory)))
        check_lora(model, manager._adapter_manager)
        return model
    if not compat.has_operator():
        raise ValueError("Kronecker adapters run on CPUs and on NVIDIA's and AMD's GPUs; this is neither")
    if kind not in READERS:
        raise ValueError(f"peft_type is {kind!r}; supported are LORA, {', '.join(READERS)}")
    return load_adapter(directory, kind, lora_request, manager._adapter_manager, manager.lora_config.lora_dtype, budget)


def limits_of(manager: Any) -> ModelLimits:
    """Of the model behind a WorkerLoRAManager, computed once."""
    if "_soka_limits" not in manager.__dict__:
        manager._soka_limits = _compute(manager)
    found = manager._soka_limits
    assert isinstance(found, ModelLimits)
    return found


def _compute(manager: Any) -> ModelLimits:
    adapters, rank = manager._adapter_manager, manager.lora_config.max_lora_rank
    modules = dense = lora = widest = 0
    for layer in adapters.modules.values():
        if isinstance(layer, KroneckerMixin):
            shapes: Sequence[tuple[int, int]] = layer.shards.shapes
            modules += len(shapes)
            dense += sum(out * width for out, width in shapes)
            lora += sum((out + width) * rank for out, width in shapes)
            widest = max(widest, *(width for _, width in shapes))
        else:
            count, values = _of_buffers(layer)
            modules, lora = modules + count, lora + values
    # A pipeline's ranks hold some of the layers each, not always as many.
    stages = compat.pipeline_stages()
    spread = 1 if stages == 1 else 2 * stages
    more = 1
    if adapters._is_moe or adapters.supports_mm or adapters.is_pooling_model:  # vLLM leaves out modules on purpose
        modules, more = modules + 4096, 4
    # Adapters may have the embedding and the head saved along, which vLLM reads and leaves out.
    lora += 4 * widest * int(getattr(manager, "vocab_size", 0) or 0)
    # All terms that a weight can have take twice its values at most, and a training's checkpoint has them twice.
    return ModelLimits(modules * spread * more, min(5 * dense * spread, values_kept()), lora * spread * more)


def _of_buffers(layer: Any) -> tuple[int, int]:
    """Modules (at least so many) and values of one slot, from vLLM's own buffers for a layer, on all ranks together."""
    modules = values = 0
    for name, held in vars(layer).items():
        for tensor in held if isinstance(held, tuple | list) else (held,):
            if "lora" in name and isinstance(tensor, Tensor) and tensor.ndim >= 3:
                modules += tensor.shape[1]  # one, or a number of experts
                values += tensor.numel() // max(tensor.shape[0], 1)
    return modules, values * compat.workers()
