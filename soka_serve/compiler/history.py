"""The training log, history.jsonl: a JSON object per line, with the optimiser step and what was logged at it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from soka_serve.errors import BuildError
from soka_serve.io.files import write_text_atomic
from soka_serve.io.warn_once import warn

logger = logging.getLogger(__name__)


def append_history(path: Path, line: Mapping[str, Any]) -> None:
    """Add one line to a training log."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_history(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a training log that have a step; none where there is no file, as after a run of 0 steps.

    A broken last line, as a killed run leaves it, is passed over with a warning.

    Raises:
        BuildError: any other line is not JSON; names the line.
    """
    if not path.exists():
        return []
    found = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                warn(logger, "%s: the last line (%d) is cut off and was passed over", path, number)
                continue
            raise BuildError(
                f"{path}:{number}: expected a JSON object, got {line[:60]!r}",
                hint="the training log is damaged; delete the build's directory and build again",
            ) from error
        if isinstance(entry, dict) and isinstance(entry.get("step"), int | float):
            found.append(entry)
    return found


def truncate_history(path: Path, step: int) -> None:
    """Take out the lines after `step`, and one that was cut short."""
    kept = [json.dumps(line) + "\n" for line in read_history(path) if line["step"] <= step]
    # Atomic: a kill here must not cost the lines of the steps that are not run again.
    write_text_atomic(path, "".join(kept))
