"""`soka-serve compare`: run a suite's runs, as many at a time as asked, and write what they show.

Every run is a process of its own with one thread, and leaves one record in the work folder; see `compare_plan` for
which runs there are. A run that fails is a record too.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from soka_serve.base.checkpoint import Checkpoint
from soka_serve.base.foreign_code import check_no_adapter, check_no_code
from soka_serve.base.plain_weights import check_plain_weights
from soka_serve.base.resolve import resolve_base
from soka_serve.comparison.plan import Cell, RunSpec, Surroundings, is_key, list_cells, next_runs
from soka_serve.comparison.suite import LoadedSuite, read_suite
from soka_serve.data.examples import data_sha256
from soka_serve.errors import BuildError, DataError
from soka_serve.io.files import write_text_atomic
from soka_serve.io.outputs import check_results
from soka_serve.io.places import given_path
from soka_serve.io.progress import track
from soka_serve.io.versions import versions
from soka_serve.io.warn_once import one_command
from soka_serve.io.workspace import HashCache, Workspace

logger = logging.getLogger(__name__)

_STOP_S = 10.0


@dataclass(frozen=True)
class CompareResult:
    """What a comparison has so far. Paths are None where nothing was written.

    `left` counts the runs that can be told to be missing: the grids may yet be extended.
    """

    suite: str
    done: int
    left: int
    failed: int
    table: str
    written: tuple[Path, ...]

    def to_text(self) -> str:
        """For people."""
        state = f"{self.done} runs done, {self.left} left, {self.failed} failed"
        if self.left:
            state += "; the same command goes on"
        return "\n".join([self.table, "", state, *(f"wrote {path}" for path in self.written)])


@dataclass(frozen=True)
class Limits:
    """How much to do in this call; None is no limit."""

    jobs: int = 1
    minutes: float | None = None
    runs: int | None = None


@one_command()
def compare(
    suite: Path | str | LoadedSuite,
    *,
    work: Path | str = "build/compare",
    out: Path | str | None = None,
    jobs: int = 1,
    minutes: float | None = None,
    limit_runs: int | None = None,
    retry_failed: bool = False,
    command: str | None = None,
    progress: bool = True,
) -> CompareResult:
    """Compare methods as a suite says, going on where an earlier call stopped.

    Args:
        suite: path of the TOML file, or what `read_suite` returned.
        work: folder of the records; suites may share it, and equal runs are not run twice.
        out: JSON file of the results; a Markdown table, an HTML report and the records (OUT.records.jsonl, by which
            another machine goes on) are written beside it.
        jobs: runs at a time, each with one thread.
        minutes: start no run after so many minutes.
        limit_runs: start no more than so many runs.
        retry_failed: run again what failed in an earlier call.
        command: the command line, for the results.
        progress: show progress.

    Raises:
        SokaError: anything that the user can mend. A run that fails is a record and stops nothing.
    """
    loaded = suite if isinstance(suite, LoadedSuite) else read_suite(suite)
    folder = given_path(work, "work")
    if out is not None:
        _check_out(given_path(out, "out"))
    limits = Limits(jobs, minutes, limit_runs)
    workspace = Workspace(folder, loaded.suite.name)
    with workspace.locked():
        around = look_around(loaded, workspace)
        cells = list_cells(loaded.suite, around)
        store = Records(folder / "records")
        if out is not None:
            store.take_over(_records_file(Path(out)), cells)
        if retry_failed:
            store.forget_failed(cells)
        started = time.monotonic()
        _run_all(loaded, cells, store, limits, workspace, progress)
        seconds = time.monotonic() - started
    return _report(loaded, cells, store, around, out, command, limits, seconds)


def _check_out(out: Path) -> None:
    """Refuse names under which the results would overwrite each other, or what no comparison wrote."""
    beside = (out.with_suffix(".md"), out.with_suffix(".html"))
    if out in beside:
        raise BuildError(f"--out {out}: is the name of the JSON file", hint=f"Give {out.with_suffix('.json')}")
    check_results(out, beside, ("suite", "protocol", "progress"))


def look_around(loaded: LoadedSuite, workspace: Workspace) -> Surroundings:
    """What all runs depend on beside the suite.

    Raises:
        CheckpointError, DataError: base or data that cannot be read.
    """
    base = resolve_base(loaded.suite.base, manifest_dir=loaded.directory)
    check_no_code(base)
    check_no_adapter(base)
    checkpoint = Checkpoint.open(base)
    check_plain_weights(base, checkpoint.tensors)
    hashes = HashCache(workspace.hashes)
    digest = checkpoint.sha256(hashes.file)
    hashes.save()
    data = {d.name: data_sha256(d.data, manifest_dir=loaded.directory) for d in loaded.suite.dataset}
    return Surroundings(digest, data, versions(), _device())


def _device() -> str:
    """The kind of device, without importing torch into this process."""
    return "cuda" if Path("/proc/driver/nvidia").exists() else "cpu"


class Records:
    """The record files of a work folder, one JSON file per run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._known: dict[str, dict[str, Any]] = {}

    def path(self, key: str) -> Path:
        """Where a run's record is."""
        return self.folder / f"{key}.json"

    def read(self) -> dict[str, dict[str, Any]]:
        """All records by key; a damaged one is removed with a warning. Files of other names are somebody else's."""
        for file in self.folder.glob("*.json"):
            if file.stem not in self._known and is_key(file.stem):
                try:
                    self._known[file.stem] = _record(file.read_text())
                except ValueError:
                    logger.warning("%s is damaged and was removed; its run is run again", file)
                    file.unlink()
        return self._known

    def take_over(self, file: Path, cells: list[Cell]) -> None:
        """Take the records of a suite's runs from a file that `to_lines` made, where there are none yet.

        Raises:
            DataError: the file is damaged.
        """
        if not file.exists():
            return
        found: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(file.read_text().splitlines(), start=1):
            try:
                record = json.loads(line)
                key = record.pop("key")
                if not (isinstance(key, str) and is_key(key) and "status" in record):
                    raise ValueError("a file of somebody else's, which the results would overwrite")
                found[key] = record
            except (ValueError, KeyError, TypeError, AttributeError):
                raise DataError(
                    f"{file}:{number}: expected a record of a run as a JSON object with its key",
                    hint="Fetch the file again, or move it away: its runs are then run again.",
                ) from None
        taken = 0
        # Which runs there are depends on the sweeps' records, so look again after each round.
        while missing := [k for cell in cells for k in _keys(cell, self) if k in found and k not in self.read()]:
            for key in dict.fromkeys(missing):
                self.write(key, found[key])
                taken += 1
        if taken:
            logger.info("%d runs taken from %s", taken, file)

    def to_lines(self, cells: list[Cell]) -> str:
        """The records of a suite's runs, as lines of JSON."""
        records = self.read()
        keys = dict.fromkeys(k for cell in cells for k in _keys(cell, self) if k in records)
        return "".join(json.dumps({"key": key, **records[key]}) + "\n" for key in keys)

    def forget_failed(self, cells: list[Cell]) -> None:
        """Remove the records of a suite's failed runs."""
        for key in [key for cell in cells for key in _keys(cell, self)]:
            if self.read().get(key, {}).get("status") == "failed":
                self.path(key).unlink()
                del self._known[key]

    def write(self, key: str, record: Mapping[str, Any]) -> None:
        """Write one record, whole or not at all."""
        write_text_atomic(self.path(key), json.dumps(record) + "\n")


def _record(text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("not an object")  # noqa: TRY004 - as damaged as what is no JSON
    return found


def _work(loaded: LoadedSuite, spec: RunSpec, work: Path, file: Path) -> None:
    from soka_serve.comparison.worker import run_and_record  # only workers import torch

    run_and_record(loaded, spec, work, file)


def _run_all(
    loaded: LoadedSuite, cells: list[Cell], store: Records, limits: Limits, workspace: Workspace, progress: bool
) -> None:
    runs = next_runs(cells, store.read())
    if not runs:
        return
    scratch = workspace.cache / "runs"
    scratch.mkdir(exist_ok=True)
    for leftover in scratch.glob("run-*"):  # of killed runs; nobody else writes here while the lock is held
        shutil.rmtree(leftover, ignore_errors=True)
    deadline = None if limits.minutes is None else time.monotonic() + 60 * limits.minutes
    begun: set[str] = set()
    total = max(_count(cells, store)["left"], 1)
    with _workers(limits.jobs) as pool, track(total, loaded.suite.name, unit="run", enabled=progress) as advance:
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


def _keys(cell: Cell, store: Records) -> Iterator[str]:
    """Keys of the runs of a cell that can be told."""
    choice, _ = cell.choose(store.read())
    for rate in choice.rates:
        yield from (cell.spec("sweep", rate, seed).key for seed in cell.suite.protocol.sweep_seeds)
    if choice.rate is not None:
        yield from (run.key for run in cell.finals(choice.rate))


def outcome(record: Mapping[str, Any]) -> str:
    """A record in a few words."""
    if record["status"] != "done":
        return f"{record['status']}: {str(record['error']).splitlines()[0]}"
    return f"{record['correct']}/{record['problems']} right, {record['run_s']:.0f} s"


class _Pool:
    """Processes, one per run, so that each has its own memory and may die alone."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["soka_serve.comparison.worker", "soka_serve.comparison.compare"])
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
def _workers(jobs: int) -> Iterator[_Pool]:
    """A pool whose processes have one thread each, and end with this one."""
    pool = _Pool(jobs)
    kept = os.environ.copy()
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")  # before the workers' libraries are loaded
    try:
        yield pool
    finally:
        pool.stop()
        os.environ.clear()
        os.environ.update(kept)


def _report(
    loaded: LoadedSuite,
    cells: list[Cell],
    store: Records,
    around: Surroundings,
    out: Path | str | None,
    command: str | None,
    limits: Limits,
    seconds: float,
) -> CompareResult:
    from soka_serve.comparison.page import render_html
    from soka_serve.comparison.results import summarise
    from soka_serve.comparison.tables import markdown_table, method_rows, render_markdown

    suite, records = loaded.suite, store.read()
    left = next_runs(cells, records)
    counted = _count(cells, store)
    results = {
        "command": command or f"soka-serve compare {loaded.path}",
        "suite": {
            "name": suite.name,
            "description": suite.description,
            "file": loaded.path.name,
            "sha256": loaded.sha256,
        },
        "versions": versions(),
        "hardware": {
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "device": around.device,
            "jobs": limits.jobs,
        },
        "base_sha256": around.base,
        "seconds_of_last_call": round(seconds, 1),
        "progress": counted,
        "protocol": suite.protocol.model_dump(mode="json"),
        "recipe": suite.train.model_dump(mode="json"),
        "loss_reference": suite.loss_reference,
        **summarise(suite, cells, records),
    }
    written: list[Path] = []
    if out is not None:
        path = Path(out)
        write_text_atomic(path, json.dumps(results, indent=1) + "\n")
        write_text_atomic(path.with_suffix(".md"), render_markdown(results))
        write_text_atomic(path.with_suffix(".html"), render_html(results))
        write_text_atomic(_records_file(path), store.to_lines(cells))
        written += [path, path.with_suffix(".md"), path.with_suffix(".html"), _records_file(path)]
    return CompareResult(
        suite=suite.name,
        done=counted["done"],
        left=counted["left"] if left else 0,
        failed=counted["failed"],
        table="\n".join(markdown_table(*method_rows(results))),
        written=tuple(written),
    )


def _records_file(out: Path) -> Path:
    return out.with_suffix(".records.jsonl")


def _count(cells: list[Cell], store: Records) -> dict[str, int]:
    """Runs that are done, that can be told to be missing, and that failed."""
    records = store.read()
    done: set[str] = set()
    left = 0
    for cell in cells:
        keys = list(_keys(cell, store))
        choice, _ = cell.choose(records)
        done |= {key for key in keys if key in records}
        left += sum(key not in records for key in keys)
        if choice.rate is None and not choice.failed:
            left += len(cell.suite.protocol.seeds)
    failed = sum(records[key]["status"] == "failed" for key in done)
    return {"done": len(done), "left": left, "failed": failed}
