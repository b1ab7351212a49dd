"""Which names have series of their own: what is loaded, and no more of them than can be taken back or counted."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from soka_vllm.counters import _MOST_NAMES, BASE, OTHERS, UNLOADED, AdapterLabels, Counters


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)


def test_names_of_a_server() -> None:
    names = AdapterLabels()
    assert names.label(None) == BASE
    assert names.label("a") == "a"  # an engine in the caller's own process is told of no loads
    names.load("b")
    assert (names.label("a"), names.label("b")) == (UNLOADED, "b")
    assert names.unload("b")
    assert names.label("b") == UNLOADED


def test_where_series_cannot_be_taken_back_there_are_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "/nowhere")
    names = AdapterLabels()
    labels = set()
    for at in range(3 * _MOST_NAMES):
        names.load(f"a{at}")
        labels.add(names.label(f"a{at}"))
        assert not names.unload(f"a{at}")
    assert len(labels) == _MOST_NAMES + 1
    assert OTHERS in labels
    names.load("a0")
    assert names.label("a0") == "a0"


def test_counters_come_and_go() -> None:
    registry = CollectorRegistry()
    counters = Counters(registry)

    def series(name: str) -> int:
        samples = [sample for family in registry.collect() for sample in family.samples]
        return sum(sample.labels.get("adapter") == name for sample in samples)

    for name in ("a", "b"):
        counters.loaded(name, "loaded", 0.1)
        for counter in counters.tokens(name):
            counter.inc(3)
        counters.finished(name, "stop")
    counters.loaded("c", "refused", 0.1)
    counters.finished("c", "stop")
    assert (series("a"), series("b"), series("c")) == (6, 6, 0)  # a total and a time of creation each
    counters.unloaded("a")
    counters.unloaded("never")
    assert (series("a"), series("b")) == (0, 6)
    counters.finished("a", "stop")  # it was still running
    for counter in counters.tokens("a"):
        counter.inc()
    assert (series("a"), series(UNLOADED)) == (0, 6)
    counters.loaded("a", "loaded", 0.1)
    assert counters.tokens("a")[0]._value.get() == 0
