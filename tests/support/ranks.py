"""Threads as the processes of an `accelerate launch`: what is gathered goes from one to the other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from soka_serve.compiler.processes import Processes

T = TypeVar("T")


def as_processes(count: int, act: Callable[[Processes], T]) -> list[T]:
    """What `act` returns in each of so many processes."""
    barrier = threading.Barrier(count)
    rounds: list[dict[int, list[Any]]] = []

    class RankProcesses(Processes):
        def __init__(self, index: int) -> None:
            self.count, self.index, self._rounds = count, index, iter(range(9))

        def gather(self, items: list[Any]) -> list[Any]:
            number = next(self._rounds)
            if barrier.wait(60) == 0:
                rounds.append({})
            barrier.wait(60)
            rounds[number][self.index] = items
            barrier.wait(60)
            return [item for i in range(count) for item in rounds[number][i]]

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda index: act(RankProcesses(index)), range(count)))
