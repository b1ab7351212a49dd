"""Reading limits of adapters, computed from the served model's shapes and checked before the engine is called.

Adapters come from clients. The engine's loop reads them between two steps, so what costs much more than an adapter of
this model can is refused in the API process, in a thread of its own. The engine's workers hold the same limits again:
they read later, and files change.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from soka_serve.adapter.format import LOCK_FILE
from soka_serve.errors import CheckpointError
from soka_serve.io.budget import ReadingBudget, read_limited
from soka_vllm import compat
from soka_vllm.engine import KEEP_VARIABLE, keep_limit
from soka_vllm.layers import KroneckerMixin
from soka_vllm.loader import LORA, look_at, read_kind
from soka_vllm.resolver import adapter_files

_TENSORS_A_MODULE = 8  # a module of a training's checkpoint has six
_LEAST_TENSORS = 1024  # an adapter of modules that this server leaves out is told so by their names
_HEADER_BYTES_A_TENSOR = 400
_TEXT_BYTES, _CONFIG_BYTES_A_MODULE, _LOCK_BYTES_A_MODULE = 1 << 18, 1 << 10, 1 << 8
_SECONDS = 20.0
# Of the processor, in the engine's loop: below what a request of a model of this size takes.
_PATTERN_SECONDS, _PATTERN_SECONDS_A_MODULE = 0.05, 0.001
_LEAST_BYTES = 1 << 30

# One thread: however many loads are asked for at once, the rest of this process shares its time with one of them.
_thread = ThreadPoolExecutor(1, "soka-admission")


class Limits(NamedTuple):
    """Of the served model: how many modules an adapter can have, and how many values.

    Args:
        modules: that take adapters.
        values: of Kronecker factors, products multiplied out.
        lora_values: of LoRA's matrices at the largest rank served.
    """

    modules: int
    values: int
    lora_values: int

    def budget(self) -> ReadingBudget:
        """For one adapter, of a kind that is not known yet."""
        tensors = max(_TENSORS_A_MODULE * self.modules, _LEAST_TENSORS)
        return ReadingBudget(
            config_bytes=_TEXT_BYTES + _CONFIG_BYTES_A_MODULE * self.modules,
            lock_bytes=_TEXT_BYTES + _LOCK_BYTES_A_MODULE * self.modules,
            header_bytes=_TEXT_BYTES + _HEADER_BYTES_A_TENSOR * tensors,
            tensors=tensors,
            values=self.lora_values,
            seconds=_SECONDS,
            pattern_seconds=_PATTERN_SECONDS + _PATTERN_SECONDS_A_MODULE * self.modules,
            source=f" by this server, whose model has {self.modules} modules for adapters",
        )

    def open(self, directory: Path) -> tuple[str | None, ReadingBudget]:
        """The kind of adapter in a directory, see `read_kind`, and the budget for the rest of it."""
        budget = self.budget()
        kind = read_kind(directory, budget)
        if kind != LORA:
            budget.values = self.values
            budget.source += f" ({KEEP_VARIABLE} allows for more)" if self.values == _values_kept() else ""
        return kind, budget


def _values_kept() -> int:
    """Number of float32 values that a worker's adapter cache holds; an upper bound for a single adapter."""
    return max(keep_limit(), _LEAST_BYTES) // 4


def limits_of(manager: Any) -> Limits:
    """Of the model behind a WorkerLoRAManager, computed once."""
    if "_soka_limits" not in manager.__dict__:
        manager._soka_limits = _compute(manager)
    found = manager._soka_limits
    assert isinstance(found, Limits)
    return found


def _compute(manager: Any) -> Limits:
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
    return Limits(modules * spread * more, min(5 * dense * spread, _values_kept()), lora * spread * more)


def _of_buffers(layer: Any) -> tuple[int, int]:
    """Modules (at least so many) and values of one slot, from vLLM's own buffers for a layer, on all ranks together."""
    modules = values = 0
    for name, held in vars(layer).items():
        for tensor in held if isinstance(held, tuple | list) else (held,):
            if "lora" in name and isinstance(tensor, Tensor) and tensor.ndim >= 3:
                modules += tensor.shape[1]  # one, or a number of experts
                values += tensor.numel() // max(tensor.shape[0], 1)
    return modules, values * compat.workers()


def of_worker(worker: Any) -> list[int]:
    """In a worker: its limits, as plain numbers."""
    return list(limits_of(worker.model_runner.lora_manager))


def of_engine(core: Any) -> list[int]:
    """In the engine: the widest limits of its workers; called by name from the API process."""
    return [max(numbers) for numbers in zip(*core.model_executor.collective_rpc(of_worker), strict=True)]


async def check(front: Any, lora_request: Any) -> None:
    """Check an adapter's files within the budget, in the API process, before the engine is called.

    Args:
        front: vLLM's AsyncLLM.
        lora_request: vLLM's, of the adapter.

    Raises:
        ValueError: what is wrong with the adapter.
    """
    if "_soka_limits" not in front.__dict__:
        front._soka_limits = Limits(*await front.engine_core.call_utility_async("soka_limits"))
    await asyncio.get_running_loop().run_in_executor(_thread, _look, lora_request, front._soka_limits)


def _look(lora_request: Any, limits: Limits) -> None:
    with adapter_files(lora_request) as directory:
        kind, budget = limits.open(directory)
        look_at(directory, kind, budget)
        for folder in (directory, Path(os.path.realpath(directory)).parent):  # parsed by `check_base`, in a thread too
            if (folder / LOCK_FILE).exists():
                try:
                    read_limited(folder / LOCK_FILE, budget.lock_bytes, budget.source)
                except CheckpointError as error:
                    raise ValueError(error.message.replace(f"{folder}/", "")) from error
                return
