"""What the workers tell of their slots, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from soka_vllm import metrics
from soka_vllm.settings import METRICS_VARIABLE


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(METRICS_VARIABLE, str(tmp_path))
    return tmp_path


class Worker:
    """A worker of an engine, with one slot; what it tells goes into a file of its own, as of a process."""

    def __init__(self, pid: int, engine: int, monkeypatch: pytest.MonkeyPatch, *, sleeps: bool = False) -> None:
        adapters = SimpleNamespace(lora_index_to_id=[None], modules={}, list_adapters=lambda: [1])
        self.manager = SimpleNamespace(_adapter_manager=adapters)
        self._pid, self._patch = pid, monkeypatch
        config = SimpleNamespace(
            parallel_config=SimpleNamespace(data_parallel_index=engine),
            model_config=SimpleNamespace(enable_sleep_mode=sleeps),
        )
        assert metrics.note_engine(lambda manager, model, given: given, self.manager, None, config) is config

    def put(self, name: str) -> None:
        def fill(manager: Any, request: Any) -> None:
            manager._adapter_manager.lora_index_to_id[0] = request.lora_int_id

        self._patch.setattr("vllm.distributed.get_world_group", lambda: SimpleNamespace(rank=0))
        self._patch.setattr("os.getpid", lambda: self._pid)
        metrics.note_slots(fill, self.manager, SimpleNamespace(lora_int_id=1, lora_name=name))


def samples(folder: Path) -> Iterator[tuple[str, tuple[tuple[str, str], ...], float]]:
    registry = CollectorRegistry()
    registry.register(metrics.WorkerCollector(folder))
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            yield sample.name, tuple(sorted(sample.labels.items())), sample.value


def test_workers_of_data_parallel_engines_are_told_apart(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    for engine in (1, 0):
        with monkeypatch.context() as patch:
            Worker(100 + engine, engine, patch).put("math")
    found = list(samples(folder))
    assert len({sample[:2] for sample in found}) == len(found)  # Prometheus refuses a page that has one twice
    assert [dict(labels)["engine"] for name, labels, _ in found if name == "soka:slots"] == ["0", "1"]
    in_slot = [dict(labels) for name, labels, _ in found if name == "soka:adapter_in_slot"]
    assert in_slot == [{"engine": engine, "rank": "0", "adapter": "math"} for engine in "01"]


@pytest.mark.parametrize("sleeps", [False, True])
def test_sleep_mode_is_warned_of(
    sleeps: bool, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(metrics._logger, "propagate", True)
    Worker(1, 0, monkeypatch, sleeps=sleeps)
    assert ("may be gone after a sleep" in caplog.text) == sleeps
