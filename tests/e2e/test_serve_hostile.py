"""Requests go on as fast as ever while somebody loads hostile adapters, one after the other, without a pause."""

from __future__ import annotations

import shutil
import statistics
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.e2e.malformed import HOSTILE
from tests.e2e.serve_adapters import BETA, LOKR, LORA, TARGET_OPTIONS, write_peft, write_soka
from tests.e2e.serving import ONE_PROCESS, Server, random_factors, serve

pytestmark = pytest.mark.slow

ROUNDS, REQUESTS = 6, 12
# The machine has two cores, which tests share: a wake-up more or less is not what is measured.
SLACK_S = 0.01
MORE_MIB = 256


def latency(server: Server) -> float:
    """Median seconds of a small request."""
    taken = []
    for _ in range(REQUESTS):
        started = time.perf_counter()
        server.ask("beta", [1, 2, 3], 8)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def resident(server: Server) -> int:
    """MiB of all its processes."""
    process = psutil.Process(server.pid)
    return sum(p.memory_info().rss for p in (process, *process.children(recursive=True))) >> 20


class Attack(threading.Thread):
    """Loads the folders in turn until it is stopped; `loads` counts, `largest` is the server's memory, MiB."""

    def __init__(self, server: Server, folders: list[Path]) -> None:
        super().__init__(daemon=True)
        self._server, self._folders, self._end = server, folders, threading.Event()
        self.loads, self.largest, self.slowest = 0, 0, 0.0
        self.statuses: set[int] = set()

    def run(self) -> None:
        while not self._end.is_set():
            folder = self._folders[self.loads % len(self._folders)]
            started = time.perf_counter()
            status, _ = self._server.post("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": str(folder)})
            self.slowest = max(self.slowest, time.perf_counter() - started)
            self.statuses.add(status)
            self.loads += 1
            self.largest = max(self.largest, resident(self._server))

    def stop(self) -> None:
        self._end.set()
        self.join(60)


def test_requests_are_as_fast_during_hostile_loads(tmp_path: Path) -> None:
    """Median over rounds of quiet and attack in turn, so that other work on the machine meets both alike."""
    write_soka(tmp_path / "beta", random_factors(BETA, 4, seed=2, scale=0.04))
    write_peft(tmp_path / "lokr", LOKR, seed=3)
    write_peft(tmp_path / "lora", LORA, seed=3)
    folders = []
    for i, (kind, (start, spoil, reason)) in enumerate(HOSTILE.items()):
        if reason:
            folders.append(Path(shutil.copytree(tmp_path / start, tmp_path / "bad" / str(i))))
            spoil(folders[-1])
            assert kind
    options = [*TARGET_OPTIONS, "--max-loras", "2", "--max-lora-rank", "8"]
    options += ["--lora-modules", f"beta={tmp_path / 'beta'}"]
    with serve(tmp_path, options, more=ONE_PROCESS) as server:
        every = Attack(server, folders)  # each once: what is imported at the first use is not to be measured
        for folder in folders:
            every._server.post("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": str(folder)})
        latency(server)
        before = resident(server)
        quiet, under, largest, loads = [], [], 0, 0
        for _ in range(ROUNDS):
            quiet.append(latency(server))
            attack = Attack(server, folders[loads % len(folders) :] + folders[: loads % len(folders)])
            attack.start()
            under.append(latency(server))
            attack.stop()
            assert attack.statuses == {400}
            largest, loads = max(largest, attack.largest), loads + attack.loads
        figures = {"quiet": quiet, "under": under, "loads": loads, "before": before, "largest": largest}
        print(figures)
        assert loads >= len(folders), figures
        assert statistics.median(under) < 2 * statistics.median(quiet) + SLACK_S, figures
        assert largest < before + MORE_MIB, figures
