"""The runs of a suite, in which order and so many at a time, until none is left or a limit is reached.

They are processes of this machine, or tasks of a Ray cluster (`soka_serve.comparison.cluster`).
"""

from __future__ import annotations

import multiprocessing
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

from soka_serve.comparison.cluster import Cluster, RayPool
from soka_serve.comparison.plan import Cell, Record, RunSpec
from soka_serve.comparison.read import LoadedSuite
from soka_serve.comparison.records import Records, progress_of
from soka_serve.comparison.sweep import choose
from soka_serve.io.progress import track
from soka_serve.io.scoped import scoped_environment
from soka_serve.io.workspace import Workspace

_STOP_S = 10.0


@dataclass(frozen=True)
class CallLimits:
    """How much to do in this call, and where; None is no limit.

    Args:
        jobs: runs at a time; None: one on this machine, on a cluster as many as it has CPUs or GPUs.
        minutes, runs: start none after so many minutes, and no more than so many.
        cluster: a Ray cluster for the runs; None: this machine.
    """

    jobs: int | None = None
    minutes: float | None = None
    runs: int | None = None
    cluster: Cluster | None = None


class Pool(Protocol):
    """Where runs are done, several at a time."""

    @property
    def has_room(self) -> bool:
        """Whether one more can be started."""

    @property
    def busy(self) -> bool:
        """Whether any is running."""

    def start(self, run: RunSpec, loaded: LoadedSuite, scratch: Path, file: Path) -> None:
        """Start a run, whose record will be `file`; it may use the folder `scratch`."""

    def wait(self) -> list[RunSpec]:
        """The runs that have ended, at least one; one that left no record has died."""

    def stop(self) -> None:
        """End what runs."""


def next_runs(cells: Sequence[Cell], records: Mapping[str, Record]) -> list[RunSpec]:
    """The runs that can start now, the most informative first; empty when the suite is finished.

    Order: priority, then sweeps before results, then seed by seed over all cells, so that a suite that is stopped has
    something about every method.
    """
    found: list[tuple[tuple[int, int, int], RunSpec]] = []
    seen: set[str] = set()
    for cell in cells:
        choice, missing = choose(cell, records)
        seeds = cell.suite.protocol.seeds
        if choice.setting is not None:
            missing = [run for run in cell.finals(choice.setting) if run.key not in records]
        for run in missing:
            if run.key not in seen:
                seen.add(run.key)
                place = 0 if run.stage == "sweep" else 1 + seeds.index(run.seed)
                found.append(((cell.contender.priority, min(place, 1), place), run))
    return [run for _, run in sorted(found, key=lambda item: item[0])]


def run_all(
    loaded: LoadedSuite, cells: list[Cell], store: Records, limits: CallLimits, workspace: Workspace, progress: bool
) -> None:
    """Run what is missing of a suite; each run leaves a record, a process that dies too."""
    if not next_runs(cells, store.read()):
        return
    scratch = workspace.cache / "runs"
    scratch.mkdir(exist_ok=True)
    for leftover in scratch.glob("run-*"):  # of killed runs; nobody else writes here while the lock is held
        shutil.rmtree(leftover, ignore_errors=True)
    deadline = None if limits.minutes is None else time.monotonic() + 60 * limits.minutes
    begun: set[str] = set()
    total = max(progress_of(cells, store.read())["left"], 1)
    with (
        _workers(limits, loaded, cells) as pool,
        track(total, loaded.suite.name, unit="run", enabled=progress) as advance,
    ):
        while True:
            stop = (deadline is not None and time.monotonic() >= deadline) or (
                limits.runs is not None and len(begun) >= limits.runs
            )
            waiting = [] if stop else [run for run in next_runs(cells, store.read()) if run.key not in begun]
            for run in waiting:
                if not pool.has_room or (limits.runs is not None and len(begun) >= limits.runs):
                    break
                begun.add(run.key)
                pool.start(run, loaded, scratch, store.path(run.key))
            if not pool.busy:
                return
            for run in pool.wait():
                if not store.path(run.key).exists():
                    store.write(run.key, run.describe() | run.failure("the process died: out of memory, or killed"))
                record = store.read()[run.key]
                advance(f"{run.to_text()}: {outcome(record)}")


def outcome(record: Mapping[str, Any]) -> str:
    """A record in a few words."""
    if record["status"] != "done":
        return f"{record['status']}: {str(record['error']).splitlines()[0]}"
    loss = sum(record["answer_loss"]) / len(record["answer_loss"])
    right = f", {record['correct']}/{record['answered']} right" if record["answered"] else ""
    return f"held-out loss {loss:.4f}{right}, {record['run_s']:.0f} s"


class _LocalPool:
    """Processes, one per run, so that each has its own memory and may die alone."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["soka_serve.comparison.worker", "soka_serve.comparison.pool"])
        self._running: dict[Any, RunSpec] = {}

    @property
    def has_room(self) -> bool:
        return len(self._running) < self.jobs

    @property
    def busy(self) -> bool:
        return bool(self._running)

    def start(self, run: RunSpec, loaded: LoadedSuite, scratch: Path, file: Path) -> None:
        process = self._context.Process(target=_work, args=(loaded, run, scratch, file), daemon=True)
        process.start()
        self._running[process] = run

    def wait(self) -> list[RunSpec]:
        """The runs that have ended, at least one."""
        ready = wait([process.sentinel for process in self._running])
        ended = [process for process in self._running if process.sentinel in ready]
        for process in ended:
            process.join()
        return [self._running.pop(process) for process in ended]

    def stop(self) -> None:
        for process in self._running:
            process.terminate()
        for process in self._running:
            process.join(_STOP_S)


@contextmanager
def _workers(limits: CallLimits, loaded: LoadedSuite, cells: Sequence[Cell]) -> Iterator[Pool]:
    """A pool whose processes have one thread each, and end with this one."""
    pool: Pool
    if limits.cluster is None:
        pool = _LocalPool(limits.jobs or 1)
    else:
        pool = RayPool(limits.cluster, limits.jobs, loaded, cells[0].inputs)
    # Before the workers' libraries are loaded.
    with scoped_environment({"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}):
        try:
            yield pool
        finally:
            pool.stop()


def _work(loaded: LoadedSuite, spec: RunSpec, work: Path, file: Path) -> None:
    from soka_serve.comparison.worker import run_and_record  # only workers import torch

    run_and_record(loaded, spec, work, file)
