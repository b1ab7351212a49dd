"""Requests go on as fast as ever while somebody loads hostile adapters, one after the other, without a pause."""

from __future__ import annotations

import shutil
import statistics
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.support.malformed import HOSTILE
from tests.support.serve_adapters import BETA, LOKR, LORA, TARGET_OPTIONS, write_peft, write_soka
from tests.support.serving import ONE_PROCESS, Server, random_factors, serve

pytestmark = pytest.mark.slow

PAIRS = 60
PAUSE_S = 0.02  # between two hostile loads; what a client costs that asks thousands of times a second is not measured
SLACK_S = 0.005
MORE_MIB = 256
# Threads of one step wait for each other: on a machine that does other things too, two take longer than one.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def latency(server: Server) -> float:
    """Seconds of a small request."""
    started = time.perf_counter()
    server.ask("beta", [1, 2, 3], 8)
    return time.perf_counter() - started


def resident(server: Server) -> int:
    """MiB of all its processes."""
    process = psutil.Process(server.pid)
    return sum(p.memory_info().rss for p in (process, *process.children(recursive=True))) >> 20


class Attack(threading.Thread):
    """Loads the folders in turn, again and again, while `on` is set; `idle` says that it is not."""

    def __init__(self, server: Server, folders: list[Path]) -> None:
        super().__init__(daemon=True)
        self._server, self._folders = server, folders
        self.on, self.idle = threading.Event(), threading.Event()
        self.seconds: list[float] = []
        self.statuses: set[int] = set()

    def load(self) -> None:
        folder = self._folders[len(self.seconds) % len(self._folders)]
        started = time.perf_counter()
        status, _ = self._server.load("x", folder)
        self.seconds.append(time.perf_counter() - started)
        self.statuses.add(status)

    def run(self) -> None:
        while True:
            self.idle.set()
            self.on.wait()
            self.idle.clear()
            self.load()
            time.sleep(PAUSE_S)


def test_requests_are_as_fast_during_hostile_loads(tmp_path: Path) -> None:
    """Pairs of a request alone and one during loads, so that other work on the machine meets both alike."""
    write_soka(tmp_path / "beta", random_factors(BETA, 4, seed=2, scale=0.04))
    write_peft(tmp_path / "lokr", LOKR, seed=3)
    write_peft(tmp_path / "lora", LORA, seed=3)
    folders = []
    for i, (start, spoil, reason) in enumerate(HOSTILE.values()):
        if reason:
            folders.append(Path(shutil.copytree(tmp_path / start, tmp_path / "bad" / str(i))))
            spoil(folders[-1])
    options = [*TARGET_OPTIONS, "--max-loras", "2", "--max-lora-rank", "8"]
    options += ["--lora-modules", f"beta={tmp_path / 'beta'}"]
    with serve(tmp_path, options, more=ONE_PROCESS | ONE_THREAD) as server:
        attack = Attack(server, folders)
        for _ in folders:  # each once: what is imported at the first use is not measured
            attack.load()
        latency(server)
        before, quiet, under = resident(server), [], []
        attack.start()
        for _ in range(PAIRS):
            attack.idle.wait(60)
            quiet.append(latency(server))
            attack.on.set()
            under.append(latency(server))
            attack.on.clear()
        assert attack.idle.wait(60)  # the last load is answered before the server ends
        after = resident(server)
    medians = statistics.median(quiet), statistics.median(under)
    figures = f"{medians} s, {len(attack.seconds)} loads, at most {max(attack.seconds)} s; {before} MiB, then {after}"
    print(figures)
    assert attack.statuses == {400}
    assert len(attack.seconds) >= len(folders) + PAIRS, figures
    assert medians[1] < 2 * medians[0] + SLACK_S, figures
    assert max(attack.seconds) < 10, figures
    assert after < before + MORE_MIB, figures
