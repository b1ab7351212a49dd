"""How benchmarks measure: times of functions that take turns, the peak of memory, a process of its own."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from eval.memory import reset_peak, resident_bytes


def best_us(ways: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Best wall time of each way, in microseconds, over rounds that take about `seconds` after one that warms up."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    rounds, end = 0, 0.0
    while rounds < 6 or time.perf_counter() < end:
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - start)
        end, rounds = end or time.perf_counter() + seconds, rounds + 1
    return {name: round(min(values[1:]) * 1e6, 1) for name, values in times.items()}


class Peak:
    """The most memory while it is open, beyond what there was: torch's on a GPU, else what is resident."""

    def __init__(self, device: str = "cpu") -> None:
        self._cuda = device == "cuda"

    def __enter__(self) -> Peak:
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated() if self._cuda else reset_peak()
        return self

    def __exit__(self, *_: object) -> None:
        most = torch.cuda.max_memory_allocated() if self._cuda else resident_bytes("VmHWM")
        self.added_bytes = most - self._before


def alone(function: Callable[[Any], Any], case: Any) -> Any:
    """Its result from a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, (case,))
