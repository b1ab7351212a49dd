"""Resume points: which checkpoint directories are whole, and which are left over from a killed run.

The Trainer writes a checkpoint file by file, and deletes old ones file by file. A directory counts as whole when
`complete.json`, written last, lists its files and each of them is there with its size.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from soka_serve.io.files import write_text_atomic

logger = logging.getLogger(__name__)

MARKER = "complete.json"
_PREFIX = "checkpoint-"


@dataclass(frozen=True)
class ResumePoint:
    """A whole checkpoint. `final` means that training ended there; `facts` is what the callbacks noted."""

    directory: Path
    step: int
    final: bool
    facts: Mapping[str, Any] = field(default_factory=dict)


def checkpoint_directory(work_dir: Path, step: int) -> Path:
    """Where the Trainer writes the checkpoint of a step."""
    return work_dir / f"{_PREFIX}{step}"


def mark_complete(directory: Path, *, step: int, final: bool, facts: Mapping[str, Any]) -> None:
    """Declare a checkpoint whole: flush its files to the disk, then write the marker that lists them."""
    files = {}
    for file in sorted(f for f in directory.rglob("*") if f.is_file() and f.name != MARKER):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
        files[file.relative_to(directory).as_posix()] = file.stat().st_size
    marker = {"step": step, "final": final, "files": files, "facts": dict(facts)}
    write_text_atomic(directory / MARKER, json.dumps(marker, indent=1) + "\n")


def read_point(directory: Path) -> ResumePoint | None:
    """The checkpoint in `directory`, or None where it is not whole."""
    try:
        marker = json.loads((directory / MARKER).read_text())
        whole = all((directory / name).stat().st_size == size for name, size in marker["files"].items())
    except (OSError, ValueError, KeyError) as error:
        logger.debug("%s is not a whole checkpoint: %s", directory, error)
        return None
    if not whole:
        return None
    return ResumePoint(directory, int(marker["step"]), bool(marker["final"]), marker["facts"])


def newest_point(work_dir: Path) -> ResumePoint | None:
    """The whole checkpoint with the highest step, or None."""
    points = [point for d in checkpoints(work_dir) if (point := read_point(d)) is not None]
    return max(points, key=lambda point: point.step, default=None)


def remove_incomplete(work_dir: Path) -> list[Path]:
    """Remove checkpoints that are not whole; return what was removed."""
    removed = [d for d in checkpoints(work_dir) if read_point(d) is None]
    for directory in removed:
        logger.info("removing %s: left half-written by an interrupted run", directory)
        shutil.rmtree(directory)
    return removed


def remove_all(work_dir: Path) -> None:
    """Remove every checkpoint."""
    for directory in checkpoints(work_dir):
        shutil.rmtree(directory)


def checkpoints(work_dir: Path) -> list[Path]:
    """Directories named as checkpoints, whole or not."""
    if not work_dir.is_dir():
        return []
    return sorted(d for d in work_dir.iterdir() if d.is_dir() and d.name.startswith(_PREFIX))
