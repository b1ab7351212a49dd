"""`soka-serve compare`: run the runs of a suite, several at a time, and write the results.

Every run is a process of its own with one thread, and leaves one record in the work folder; see
`soka_serve.comparison.plan` for which runs there are. A run that fails is a record too.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soka_serve.comparison.cluster import Cluster, connected
from soka_serve.comparison.inputs import check_able, read_inputs
from soka_serve.comparison.plan import Cell, Record, RunInputs, list_cells
from soka_serve.comparison.pool import CallLimits, next_runs, run_all
from soka_serve.comparison.read import LoadedSuite, read_suite
from soka_serve.comparison.records import Records, progress_of
from soka_serve.errors import BuildError, SokaError
from soka_serve.io.files import write_text_atomic
from soka_serve.io.outputs import check_results
from soka_serve.io.places import given_path
from soka_serve.io.versions import versions
from soka_serve.io.warn_once import one_command
from soka_serve.io.workspace import HashCache, Workspace


@dataclass(frozen=True)
class CompareResult:
    """Results of a comparison so far. `hours_left` is for one core, at the mean time of the runs that are done."""

    suite: str
    done: int
    left: int
    failed: int
    hours_left: float | None
    table: str
    written: tuple[Path, ...]

    def to_text(self) -> str:
        """For people."""
        state = f"{self.done} runs done, {self.left} left, {self.failed} failed"
        if self.left:
            time_left = "" if self.hours_left is None else f" (about {self.hours_left:.2g} h of a core)"
            state += f"; the same command goes on{time_left}"
        return "\n".join([self.table, "", state, *(f"wrote {path}" for path in self.written)])


@one_command()
def compare(
    suite: Path | str | LoadedSuite,
    *,
    root: Path | str | None = None,
    work: Path | str = "build/compare",
    out: Path | str | None = None,
    jobs: int | None = None,
    ray: str | None = None,
    minutes: float | None = None,
    limit_runs: int | None = None,
    retry_failed: bool = False,
    command: str | None = None,
    progress: bool = True,
) -> CompareResult:
    """Compare methods as a suite says, going on where an earlier call stopped.

    Args:
        suite: path of the TOML file, or what `read_suite` returned.
        root: folder that relative paths of the suite start from; default: the suite's own.
        work: folder of the records; suites may share it, and equal runs are not run twice.
        out: JSON file of the results; a Markdown table, an HTML report and the records (OUT.records.jsonl, by which
            another machine goes on) are written beside it.
        jobs: runs at a time, each with one thread; default: one, with `ray` as many as the cluster has CPUs or GPUs.
        ray: address of a Ray cluster that does the runs, HOST:PORT or "auto"; default: this machine does them.
        minutes: start no run after so many minutes.
        limit_runs: start no more than so many runs.
        retry_failed: run again what failed in an earlier call.
        command: the command line, for the results.
        progress: show progress.

    Raises:
        SokaError: anything that the user can mend. A run that fails is a record and stops nothing.

    A public call: its length and its number of arguments are those of the command's options.
    """
    from soka_serve.comparison.tables import markdown_table, method_rows

    if minutes is not None and not minutes >= 0:
        raise SokaError(f"minutes: expected 0 or more; got {minutes!r}")
    loaded = suite if isinstance(suite, LoadedSuite) else read_suite(suite, root)
    folder = given_path(work, "work")
    if out is not None:
        _check_out(given_path(out, "out"))
    workspace = Workspace(folder, loaded.suite.name)
    with connected(ray) as cluster, workspace.locked():
        inputs = read_inputs(loaded, HashCache(workspace.hashes))
        cells = list_cells(loaded.suite, inputs)
        store = Records(folder / "records")
        if out is not None:
            store.take_over(_records_file(Path(out)), cells)
        if retry_failed:
            store.forget_failed(cells)
        if limit_runs != 0:
            check_able(loaded, inputs, {run.method for run in next_runs(cells, store.read())})
        started = time.monotonic()
        run_all(loaded, cells, store, CallLimits(jobs, minutes, limit_runs, cluster), workspace, progress)
        seconds = time.monotonic() - started
        hardware = _hardware(inputs, jobs, cluster)
    records = store.read()
    call = _CallRecord(command or f"soka-serve compare {loaded.path}", hardware, seconds)
    results = _results(loaded, cells, records, inputs, call)
    counted = results["progress"]
    left = counted["left"] if next_runs(cells, records) else 0
    took = [run["run_s"] for run in results["runs"] if "run_s" in run]
    return CompareResult(
        suite=loaded.suite.name,
        done=counted["done"],
        left=left,
        failed=counted["failed"],
        hours_left=left * sum(took) / len(took) / 3600 if took else None,
        table="\n".join(markdown_table(*method_rows(results))),
        written=() if out is None else _write(results, Path(out), store.to_lines(cells)),
    )


def _check_out(out: Path) -> None:
    """Refuse names under which the results would overwrite each other, or a file that no comparison wrote."""
    beside = (out.with_suffix(".md"), out.with_suffix(".html"))
    if out in beside:
        raise BuildError(f"--out {out}: is the name of the JSON file", hint=f"Give {out.with_suffix('.json')}")
    check_results(out, beside, ("suite", "protocol", "progress"))


@dataclass(frozen=True)
class _CallRecord:
    """What the results say of the call that wrote them."""

    command: str
    hardware: Mapping[str, Any]
    seconds: float


def _hardware(inputs: RunInputs, jobs: int | None, cluster: Cluster | None) -> dict[str, Any]:
    """What the results say of the machine, or of the cluster as it is now."""
    found = {"machine": platform.machine(), "device": inputs.device}
    if cluster is None:
        return found | {"cpus": os.cpu_count(), "jobs": jobs or 1}
    return found | {"cpus": cluster.count("CPU"), "jobs": jobs, "ray_machines": len(cluster.machines("CPU"))}


def _results(
    loaded: LoadedSuite, cells: list[Cell], records: Mapping[str, Record], inputs: RunInputs, call: _CallRecord
) -> dict[str, Any]:
    """The content of the results' JSON file."""
    from soka_serve.comparison.results import summarise

    suite = loaded.suite
    return {
        "command": call.command,
        "suite": {
            "name": suite.name,
            "description": suite.description,
            "file": loaded.path.name,
            "sha256": loaded.sha256,
        },
        "versions": versions(),
        "hardware": dict(call.hardware),
        "base_sha256": inputs.base,
        "data_sha256": dict(inputs.data),
        "other_sha256": dict(inputs.other),
        "seconds_of_last_call": round(call.seconds, 1),
        "progress": progress_of(cells, records),
        "protocol": suite.protocol.model_dump(mode="json"),
        "recipe": suite.train.model_dump(mode="json"),
        **summarise(suite, cells, records),
    }


def _write(results: Mapping[str, Any], out: Path, records: str) -> tuple[Path, ...]:
    """Write the results as JSON, Markdown and HTML, and the records beside them."""
    from soka_serve.comparison.page import render_html
    from soka_serve.comparison.tables import render_markdown

    files = {
        out: json.dumps(results, indent=1) + "\n",
        out.with_suffix(".md"): render_markdown(results),
        out.with_suffix(".html"): render_html(results),
        _records_file(out): records,
    }
    for path, text in files.items():
        write_text_atomic(path, text)
    return tuple(files)


def _records_file(out: Path) -> Path:
    return out.with_suffix(".records.jsonl")
