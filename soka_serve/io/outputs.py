"""Which directories a command may replace: those that an earlier run of it wrote, and that hold nothing else.

A soka.lock says what wrote a directory; the kind of output says which files such a directory holds. Whatever else is in
it is the user's, and is neither deleted nor moved.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from soka_serve.errors import BuildError, CheckpointError, name_some
from soka_serve.io.file_names import LOCK_FILE
from soka_serve.io.files import disk_errors, require_regular
from soka_serve.io.lockfile import read_lock
from soka_serve.io.places import check_place

_DESKTOP_FILES = (".DS_Store", "Thumbs.db", "desktop.ini")  # what file managers leave behind

Lock = Mapping[str, Any]


@dataclass(frozen=True)
class OutputKind:
    """A kind of directory that a command writes.

    Args:
        what: it is, with its article, for messages.
        is_marked: whether a soka.lock, None for one that cannot be read, is that of such a directory.
        files: the files that a directory with that lock may hold, as paths relative to it; patterns where the names
            are not known.
    """

    what: str
    is_marked: Callable[[Lock | None], bool]
    files: Callable[[Path, Lock | None], Iterable[str]]

    def check(self, target: Path, keep: Iterable[Path] = ()) -> None:
        """Refuse a target that is no place for an output, or where a file of the user's would be lost.

        Args:
            target: the directory to be written; missing and empty ones are fine.
            keep: inputs that must survive.

        Raises:
            BuildError: names the input or the files that are in the way.
        """
        with disk_errors(target):
            real = check_place(target, replaced=True)
            for path in keep:
                other = Path(os.path.realpath(path))
                if path.exists() and other.is_relative_to(real):
                    raise BuildError(
                        f"{target}: writing {self.what} there would destroy {path}, which is read for it",
                        hint=f"write somewhere else, or move {path.name} out of it",
                    )
            if not real.is_dir():
                return  # a file in the way is refused where the directory is written
            marked, found = self._look(real)
        if not marked and found:
            raise BuildError(
                f"{target} is not empty, and no {LOCK_FILE} in it says that it is {self.what}, which could be "
                f"replaced; it holds {name_some(found)}",
                hint="write somewhere else, or move that folder away",
            )
        if found:
            raise BuildError(
                f"{target} would be replaced as a whole, and holds what is not part of {self.what}: {name_some(found)}",
                hint="move it out of there, or write somewhere else",
            )

    def foreign(self, directory: Path) -> list[str]:
        """Entries of a directory that do not belong to such an output; all of them if it has no mark of one."""
        return self._look(directory)[1]

    def _look(self, directory: Path) -> tuple[bool, list[str]]:
        lock: Lock | None = None
        marked = False
        if (directory / LOCK_FILE).is_file():
            try:
                lock = read_lock(directory / LOCK_FILE)
            except CheckpointError:
                lock = None
            marked = self.is_marked(lock)
        own = [tuple(name.split("/")) for name in (LOCK_FILE, *self.files(directory, lock))] if marked else []
        return marked, sorted(_others(directory, (), own))


def check_results(file: Path, beside: Iterable[Path], keys: Iterable[str]) -> None:
    """Refuse to write a JSON file of results, and the files that go with it, over what no earlier call wrote.

    Args:
        file: the JSON file.
        beside: what is written with it, after it.
        keys: that the JSON file of an earlier call has.

    Raises:
        BuildError: names the files that would be overwritten.
    """
    with disk_errors(file):
        check_place(file)
        there = [path for path in (file, *beside) if os.path.lexists(path)]
        try:
            found = json.loads(require_regular(file).read_text(encoding="utf-8")) if file in there else None
        except (ValueError, RecursionError):
            found = None
    if there and not (isinstance(found, dict) and set(keys) <= set(found)):
        raise BuildError(
            f"{file}: would overwrite {name_some([str(path) for path in there])}, which no earlier call wrote",
            hint="give another name, or move them away",
        )


def _others(directory: Path, inside: tuple[str, ...], own: list[tuple[str, ...]]) -> Iterable[str]:
    """Names of entries that are not among `own`: other files, links, and folders (with a slash) with none of it."""
    known = [parts for parts in own if parts[: len(inside)] == inside]
    with os.scandir(directory) as entries:
        for entry in entries:
            path = (*inside, entry.name)
            name = "/".join(path)
            if entry.is_dir(follow_symlinks=False):
                if any(len(parts) > len(path) and parts[: len(path)] == path for parts in known):
                    yield from _others(directory / entry.name, path, known)
                else:
                    yield f"{name}/"
            elif not entry.is_file(follow_symlinks=False) or not (
                entry.name in _DESKTOP_FILES or any(_matches(path, parts) for parts in known)
            ):
                yield name


def _matches(path: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    return len(path) == len(pattern) and all(map(fnmatchcase, path, pattern))
