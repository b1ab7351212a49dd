"""A load in the API process: the adapter is checked before the engine is called, and the load is counted.

Adapters come from clients. The engine's loop reads them between two steps, so what costs much more than an adapter of
this model can is refused here, in a thread of its own. The engine's workers hold the same limits again: they read
later, and files change. The weights are read here first, so that the engine, on this machine, waits for no disk.
"""

from __future__ import annotations

import asyncio
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from soka_serve.errors import CheckpointError
from soka_serve.io.budget import read_limited
from soka_serve.io.file_names import LOCK_FILE, WEIGHTS_FILE
from soka_vllm import metrics
from soka_vllm.engine import check_served_base
from soka_vllm.limits import ModelLimits
from soka_vllm.lycoris import find_lycoris
from soka_vllm.places import adapter_files
from soka_vllm.readers import LORA, READERS, look_at
from soka_vllm.resolver import limits_of, note_reason
from soka_vllm.sums import is_sum

# One thread: however many loads are asked for at once, the rest of this process shares its time with one of them.
_thread = ThreadPoolExecutor(1, "soka-admission")
# Not the same: one adapter on a slow disk would keep all others waiting.
_reading = ThreadPoolExecutor(4, "soka-read-ahead")
_AHEAD_BYTES = 1 << 20  # at a time


async def add_lora(stock: Any, front: Any, lora_request: Any) -> bool:
    """AsyncLLM.add_lora.

    Raises:
        ValueError: what is wrong with the adapter.
    """
    started = time.perf_counter()
    outcome = "refused"
    try:
        limited = limits_of(lora_request)
        if not is_sum(limited.lora_path):  # which has no files
            await _check(front, limited)
        # Reading a base of many GB takes a while; the engine, which asks again, then finds the answer.
        await asyncio.to_thread(check_served_base, limited, front.vllm_config.model_config)
        answer = bool(await stock(front, limited))
        outcome = "loaded"
        return answer
    except Exception as error:
        note_reason(error)
        raise
    finally:
        metrics.counters().loaded(lora_request.lora_name, outcome, time.perf_counter() - started)


async def _check(front: Any, lora_request: Any) -> None:
    """Check an adapter's files within the budget of the served model."""
    if "_soka_limits" not in front.__dict__:
        front._soka_limits = ModelLimits(*await front.engine_core.call_utility_async("soka_limits"))
    limits = front._soka_limits
    loop = asyncio.get_running_loop()
    kind = await loop.run_in_executor(_thread, _look, lora_request, limits)
    if kind == LORA or kind in READERS:
        await loop.run_in_executor(_reading, read_ahead, lora_request, limits)


def _look(lora_request: Any, limits: ModelLimits) -> str | None:
    """Raises ValueError where something is wrong with an adapter; else its kind."""
    with adapter_files(lora_request) as directory:
        kind, budget = limits.open(directory)
        look_at(directory, kind, budget)
        for folder in (directory, Path(os.path.realpath(directory)).parent):  # parsed by `check_base`, in a thread too
            if (folder / LOCK_FILE).exists():
                try:
                    read_limited(folder / LOCK_FILE, budget.lock_bytes, budget.source)
                except CheckpointError as error:
                    raise ValueError(error.message.replace(f"{folder}/", "")) from error
                break
        return kind


def read_ahead(lora_request: Any, limits: ModelLimits) -> None:
    """Have the weights of an adapter that was looked at in the kernel's page cache.

    Args:
        lora_request: vLLM's, with what `limited` puts into it.
        limits: no more is read than they allow; the file may be another one than was looked at.

    Raises:
        ValueError: the file cannot be read.
    """
    most = 8 * max(limits.values, limits.lora_values)  # bytes
    with adapter_files(lora_request) as directory:
        file = directory / WEIGHTS_FILE
        found = file if file.exists() else find_lycoris(directory, limits.budget())
        if found is None or not found.is_file():  # a pipe, say: to open it would be to wait for its writer
            return
        buffer = bytearray(_AHEAD_BYTES)
        with found.open("rb", buffering=0) as stream:
            while (read := stream.readinto(buffer)) and most > 0:
                most -= read
