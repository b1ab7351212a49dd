"""Detect files that change while they are read, so that a recorded hash is that of what was read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from soka_serve.errors import CheckpointError

WAIT = "wait until whatever writes it has finished, and run the same command again"

Stamp = list[int]


def stamp_of(file: Path) -> Stamp:
    """A file's size in bytes, time of change in ns and inode, which stand for its content."""
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def check_stamps(stamps: Mapping[Path, Stamp | None]) -> None:
    """Raise CheckpointError, which names the files, unless all have their stamps still."""
    if changed := _changed(stamps):
        raise CheckpointError(
            "\n".join(f"{file}: was changed while it was being read" for file in changed[:10]), hint=WAIT
        )


class FileStamps:
    """The stamps of some files, taken before they are read.

    Args:
        files: may be missing; one that appears later counts as a change.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._stamps = {file: _stamp_or_none(file) for file in files}

    def changed(self) -> list[Path]:
        """The files that are not what they were."""
        return _changed(self._stamps)

    def check(self) -> None:
        """Raise CheckpointError, which names the files, unless all are what they were."""
        check_stamps(self._stamps)


def _changed(stamps: Mapping[Path, Stamp | None]) -> list[Path]:
    return [file for file, stamp in stamps.items() if _stamp_or_none(file) != stamp]


def _stamp_or_none(file: Path) -> Stamp | None:
    try:
        return stamp_of(file)
    except OSError:
        return None
