"""What adapters do, in vLLM's Prometheus endpoint: requests, tokens, loads, slots. Names begin with `soka:`.

Two kinds of processes know different things:

- The API process sees every request with its adapter's name, and every load that comes over HTTP: ordinary counters,
  which also add up over several API processes. Like vLLM's own they stand still under --disable-log-stats.
- The workers know which adapters are in slots. They do not talk to the API process but through the engine, so each
  writes a small file into a folder of the API process's (SOKA_METRICS_DIR) when something has changed, which is read
  when somebody looks. Under several API processes the endpoint of each shows all of them.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from soka_vllm.counters import Counters
from soka_vllm.settings import METRICS_PREFIX, METRICS_VARIABLE

_logger = logging.getLogger("vllm.soka")

_LABELS = ("engine", "rank")  # of a worker


def make_folder() -> None:
    """Make the folder that workers write to, in the first of vLLM's processes, and let its endpoint show them."""
    folder = Path(tempfile.mkdtemp(prefix=METRICS_PREFIX))
    os.environ[METRICS_VARIABLE] = str(folder)
    atexit.register(_remove, folder, os.getpid())
    REGISTRY.register(WorkerCollector(folder))


def collect(stock: Any, collector: Any) -> Iterator[Any]:
    """MultiProcessCollector.collect: what the endpoint of one of several API processes shows is this alone."""
    yield from stock(collector)
    if (folder := os.environ.get(METRICS_VARIABLE)) is not None:
        yield from WorkerCollector(Path(folder)).collect()


def _remove(folder: Path, maker: int) -> None:
    if os.getpid() == maker:  # not a child that inherited the handler
        shutil.rmtree(folder, ignore_errors=True)


# --- requests and loads, in the API process -------------------------------------------------------------------------


@cache
def counters() -> Counters:
    """Those of this process."""
    return Counters()


def count_tokens(
    stock: Any, processor: Any, req_state: Any, engine_core_output: Any, timestamp: Any, iteration_stats: Any
) -> None:
    """OutputProcessor._update_stats_from_output."""
    if iteration_stats is not None:
        prompt, generated = counters().tokens(req_state.lora_name)
        if req_state.is_prefilling:
            prompt.inc(req_state.prompt_len)
        if engine_core_output.new_token_ids:
            generated.inc(len(engine_core_output.new_token_ids))
    stock(processor, req_state, engine_core_output, timestamp, iteration_stats)


def count_finished(stock: Any, processor: Any, req_state: Any, finish_reason: Any, iteration_stats: Any) -> None:
    """OutputProcessor._update_stats_from_finished."""
    if iteration_stats is not None:
        counters().finished(req_state.lora_name, str(finish_reason))
    stock(processor, req_state, finish_reason, iteration_stats)


def count_aborted(stock: Any, processor: Any, request_ids: Iterable[str], internal: bool) -> Any:
    """OutputProcessor.abort_requests."""
    wanted = list(request_ids)
    inner = wanted if internal else [i for r in wanted for i in processor.external_req_ids.get(r, ())]
    states = [processor.request_states[i] for i in inner if i in processor.request_states]
    if processor.log_stats:
        for state in states:
            counters().finished(state.lora_name, "abort")
    return stock(processor, wanted, internal)


# --- slots, in the workers -------------------------------------------------------------------------------------------


class _WorkerMetrics:
    """Metrics of one worker; belongs to a WorkerLoRAManager."""

    def __init__(self) -> None:
        self.names: dict[int, str] = {}
        self.reads = 0
        self.read_seconds = 0.0
        self.fills = 0
        self.slots: list[int | None] = []
        self.engine = 0

    def write(self, manager: Any) -> None:
        """Write this worker's metrics file atomically."""
        from vllm.distributed import get_world_group

        folder = os.environ.get(METRICS_VARIABLE)
        if folder is None:
            return
        adapters = manager._adapter_manager
        known = set(adapters.list_adapters())
        self.names = {number: name for number, name in self.names.items() if number in known}
        told = {
            "engine": self.engine,
            "rank": int(get_world_group().rank),
            "slots": [None if number is None else self.names.get(number, str(number)) for number in self.slots],
            "in_memory": len(known),
            "reads": self.reads,
            "read_seconds": self.read_seconds,
            "fills": self.fills,
            "kronecker_bytes": sum(
                layer._kronecker.nbytes for layer in adapters.modules.values() if hasattr(layer, "_kronecker")
            ),
        }
        path = Path(folder) / f"{os.getpid()}.json"
        try:
            path.with_suffix(".new").write_text(json.dumps(told))
            path.with_suffix(".new").replace(path)
        except OSError as error:
            _logger.warning("No metrics of slots: %s", error)
            os.environ.pop(METRICS_VARIABLE, None)  # once is enough


def _of(manager: Any) -> _WorkerMetrics:
    worker = manager.__dict__.setdefault("_soka_metrics", _WorkerMetrics())
    assert isinstance(worker, _WorkerMetrics)
    return worker


def note_engine(stock: Any, manager: Any, model: Any, vllm_config: Any) -> Any:
    """LRUCacheWorkerLoRAManager.create_lora_manager: note the number of the data-parallel engine, as vLLM's metrics do.

    Workers of two engines have the same ranks, but for those of mixtures of experts, which are one world.
    """
    _of(manager).engine = int(vllm_config.parallel_config.data_parallel_index)
    if vllm_config.model_config.enable_sleep_mode:
        _logger.warning("--enable-sleep-mode: what adapters hold in slots may be gone after a sleep; do not sleep")
    return stock(manager, model, vllm_config)


def note_read(manager: Any, seconds: float) -> None:
    """Count an adapter that a WorkerLoRAManager has read from its files."""
    worker = _of(manager)
    worker.reads += 1
    worker.read_seconds += seconds


def note_slots(stock: Any, manager: Any, lora_request: Any) -> Any:
    """LRUCacheWorkerLoRAManager.add_adapter: write the metrics file when the slots have changed."""
    # Called at every step for every adapter in the batch: nothing but a comparison as long as nothing changes.
    try:
        return stock(manager, lora_request)
    finally:
        worker, slots = _of(manager), manager._adapter_manager.lora_index_to_id
        worker.names[lora_request.lora_int_id] = lora_request.lora_name
        if worker.slots != slots:
            before = [*worker.slots, *[None] * len(slots)]
            worker.fills += sum(new not in (None, old) for new, old in zip(slots, before, strict=False))
            worker.slots = list(slots)
            worker.write(manager)


class WorkerCollector:
    """Prometheus collector of the workers' metrics files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterator[Any]:
        """The metrics, one sample per worker; none before the first adapter."""
        slots, used, resident, memory, size = (
            GaugeMetricFamily(f"soka:{name}", text, labels=[*_LABELS, *more])
            for name, text, *more in (
                ("slots", "Slots for adapters."),
                ("slots_used", "Slots that hold an adapter."),
                ("adapter_in_slot", "1 for each adapter in a slot.", "adapter"),
                ("adapters_in_memory", "Adapters in vLLM's CPU cache."),
                ("slot_bytes", "Bytes of Kronecker factors in slots."),
            )
        )
        fills, reads, seconds = (
            CounterMetricFamily(f"soka:{name}", text, labels=_LABELS)
            for name, text in (
                ("slot_fills", "Times that an adapter was put into a slot."),
                ("adapter_reads", "Adapters read from files."),
                ("adapter_read_seconds", "Time spent reading them."),
            )
        )
        for told in self._told():
            worker = [str(told[label]) for label in _LABELS]
            slots.add_metric(worker, len(told["slots"]))
            names = [name for name in told["slots"] if name is not None]
            used.add_metric(worker, len(names))
            for name in sorted(set(names)):
                resident.add_metric([*worker, name], 1)
            for family, key in (
                (memory, "in_memory"),
                (size, "kronecker_bytes"),
                (fills, "fills"),
                (reads, "reads"),
                (seconds, "read_seconds"),
            ):
                family.add_metric(worker, told[key])
        yield from (slots, used, resident, memory, size, fills, reads, seconds)

    def _told(self) -> list[dict[str, Any]]:
        found = []
        for file in self._folder.glob("*.json"):
            try:
                found.append(json.loads(file.read_text()))
            except (OSError, ValueError):
                continue  # the worker has just ended
        return sorted(found, key=lambda told: [int(told[label]) for label in _LABELS])
