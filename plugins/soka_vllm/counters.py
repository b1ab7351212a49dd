"""What an API process counts of requests and loads, by adapter; series end with their adapter."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram

# In place of an adapter's name, which begins otherwise: for requests without one, for those that end after their
# adapter was unloaded, and for the names beyond _MOST_NAMES where series cannot be taken back.
BASE = "__base__"
UNLOADED = "__unloaded__"
OTHERS = "__others__"
_MOST_NAMES = 1000
_LOAD_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class AdapterLabels:
    """Which adapters have series of their own: those that are loaded, by the name that requests use.

    Several API processes write to files that prometheus_client reads together, and it can take no series back there:
    a number of names is then all that there will be. An engine in the caller's own process is told of no loads: there
    all names count.
    """

    def __init__(self) -> None:
        self._loaded: set[str] = set()
        self._is_told = False
        self._ever: set[str] | None = set() if "PROMETHEUS_MULTIPROC_DIR" in os.environ else None

    def load(self, name: str) -> None:
        self._is_told = True
        self._loaded.add(name)

    def unload(self, name: str) -> bool:
        """Note that an adapter is unloaded; True when its series can be removed."""
        self._is_told = True
        self._loaded.discard(name)
        return self._ever is None

    def label(self, name: str | None) -> str:
        """The metrics label of a request to the adapter of this name, or to the base."""
        if name is None:
            return BASE
        if self._is_told and name not in self._loaded:
            return UNLOADED
        if self._ever is not None and name not in self._ever:
            if len(self._ever) >= _MOST_NAMES:
                return OTHERS
            self._ever.add(name)
        return name


class Counters:
    """The metrics of one API process; the adapter of a request is None for the base.

    Args:
        registry: takes them, once.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        # Made at first use: with several API processes vLLM says only then where their values are kept.
        self._requests = Counter(
            "soka:requests", "Finished requests, by adapter and reason.", ["adapter", "reason"], registry=registry
        )
        self._prompt = Counter(
            "soka:prompt_tokens", "Prompt tokens of requests, by adapter.", ["adapter"], registry=registry
        )
        self._generated = Counter(
            "soka:generation_tokens", "Tokens generated, by adapter.", ["adapter"], registry=registry
        )
        self._loads = Histogram(
            "soka:adapter_load_seconds",
            "Time of loads over HTTP, from the question to the engine's answer.",
            ["outcome"],
            buckets=_LOAD_BUCKETS,
            registry=registry,
        )
        self._names = AdapterLabels()
        # `labels` takes a lock and builds a key: once per adapter, not once per token.
        self._children: dict[str | None, tuple[Any, Any]] = {}
        self._reasons: set[str] = set()

    def tokens(self, adapter: str | None) -> tuple[Any, Any]:
        """Counters of prompt and generated tokens."""
        found = self._children.get(adapter)
        if found is None:
            label = self._names.label(adapter)
            found = self._prompt.labels(label), self._generated.labels(label)
            if label == adapter or adapter is None:
                self._children[adapter] = found
        return found

    def finished(self, adapter: str | None, reason: str) -> None:
        self._reasons.add(reason)  # a handful
        self._requests.labels(self._names.label(adapter), reason).inc()

    def loaded(self, adapter: str, outcome: str, seconds: float) -> None:
        self._loads.labels(outcome).observe(seconds)
        if outcome == "loaded":
            self._names.load(adapter)

    def unloaded(self, adapter: str) -> None:
        """Take back the series of an adapter."""
        if not self._names.unload(adapter):
            return
        self._children.pop(adapter, None)
        gone = [(self._prompt, (adapter,)), (self._generated, (adapter,))]
        for counter, labels in gone + [(self._requests, (adapter, reason)) for reason in self._reasons]:
            with suppress(KeyError):  # there was none
                counter.remove(*labels)
