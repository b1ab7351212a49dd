"""The records of a suite's runs in its work folder, one JSON file per run."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from soka_serve.comparison.plan import Cell, is_key, runs_per_cell
from soka_serve.comparison.sweep import choose, sweep_keys
from soka_serve.errors import DataError
from soka_serve.io.files import write_text_atomic

logger = logging.getLogger(__name__)


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
        """All records by key; a damaged one is removed with a warning. Files with other names are left alone."""
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
        while missing := [
            k for cell in cells for k in run_keys(cell, self.read()) if k in found and k not in self.read()
        ]:
            for key in dict.fromkeys(missing):
                self.write(key, found[key])
                taken += 1
        if taken:
            logger.info("%d runs taken from %s", taken, file)

    def to_lines(self, cells: list[Cell]) -> str:
        """The records of a suite's runs, as lines of JSON."""
        records = self.read()
        return "".join(json.dumps({"key": k, **records[k]}) + "\n" for k in keys_of(cells, self.read()) if k in records)

    def forget_failed(self, cells: list[Cell]) -> None:
        """Remove the records of a suite's failed runs."""
        for key in keys_of(cells, self.read()):
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


def keys_of(cells: Sequence[Cell], records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Keys of a suite's runs that can be told from these records, each once: sweeps, then results, cell by cell."""
    return list(dict.fromkeys(key for cell in cells for key in run_keys(cell, records)))


def run_keys(cell: Cell, records: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Keys of the runs of a cell that can be told from these records."""
    choice, _ = choose(cell, records)
    yield from sweep_keys(cell, choice)
    if choice.setting is not None:
        yield from (run.key for run in cell.finals(choice.setting))


def progress_of(cells: list[Cell], records: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Numbers of runs that are done, that are left, and that failed."""
    done: set[str] = set()
    left = 0
    for cell in cells:
        keys = list(run_keys(cell, records))
        done |= {key for key in keys if key in records}
        if not choose(cell, records)[0].failed:
            left += sum(runs_per_cell(cell.suite)) - sum(key in records for key in keys)
    failed = sum(records[key]["status"] == "failed" for key in done)
    return {"done": len(done), "left": left, "failed": failed}
