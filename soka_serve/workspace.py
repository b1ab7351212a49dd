"""Where a build keeps its things: the finished artefact, and the caches of its stages. No torch.

    build/NAME/                    the artefact: adapter/, merged/, soka.lock, report.html, README.md, ...
    build/.cache/NAME/init-KEY/    factors at step 0
    build/.cache/NAME/tune-KEY/    resume points and the trained factors
    build/.cache/hashes.json       sha256 of large files by size and time of change

`build/NAME` is only ever replaced as a whole.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from soka_serve.errors import BuildError
from soka_serve.files import clean_stale, disk_errors, sha256_file, write_text_atomic


class Workspace:
    """Paths of one build, and the lock that keeps two builds of one name apart.

    Args:
        root: the folder of builds (`[output] dir`).
        name: the build's name.
    """

    def __init__(self, root: Path, name: str) -> None:
        self.root = root
        self.name = name
        self.target = root / name
        self.cache = root / ".cache" / name
        self.hashes = root / ".cache" / "hashes.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the build's lock; tidy up what killed runs left.

        Raises:
            BuildError: another build of this name is running, or the folder cannot be written.
        """
        with disk_errors(self.root):
            self.cache.mkdir(parents=True, exist_ok=True)
            lock = self.cache / "lock"
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BuildError(
                    f"another build of {self.name!r} is writing to {self.target}",
                    hint="Wait for it to end, or give this one another name or another output folder.",
                ) from None
            clean_stale(self.target)
            yield
        finally:
            os.close(descriptor)

    def stage(self, stage: str, key: str) -> Path:
        """Directory of a cached stage."""
        return self.cache / f"{stage}-{key}"

    def is_cached(self, stage: str, key: str) -> bool:
        """Whether a stage has run to its end with this key."""
        return (self.stage(stage, key) / "done.json").exists()

    def forget_others(self, keep: Mapping[str, str]) -> None:
        """Remove cached stages of other keys: a build keeps one cache per stage."""
        kept = {self.stage(stage, key).name for stage, key in keep.items()} | {"lock"}
        for entry in self.cache.iterdir():
            if entry.name not in kept:
                shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)


class HashCache:
    """sha256 of files, remembered by path, size and time of change: a 13 GB base is hashed once, not at every build."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, list[object]] = {}
        if path.exists():
            try:
                self._known = json.loads(path.read_text())
            except ValueError:
                self._known = {}  # it is only a cache: hashing again mends it
        self._dirty = False

    def file(self, path: Path) -> str:
        """Hex sha256 of one file."""
        real = path.resolve()
        status = real.stat()
        stamp = [status.st_size, status.st_mtime_ns, status.st_ino]
        entry = self._known.get(str(real))
        if entry and entry[:3] == stamp:
            return str(entry[3])
        digest = sha256_file(real)
        self._known[str(real)] = [*stamp, digest]
        self._dirty = True
        return digest

    def knows(self, path: Path) -> bool:
        """Whether `file` would answer without reading the file."""
        real = path.resolve()
        status = real.stat()
        entry = self._known.get(str(real))
        return entry is not None and entry[:3] == [status.st_size, status.st_mtime_ns, status.st_ino]

    def adopt(self, other: HashCache, files: Iterable[Path]) -> None:
        """Take over what another cache knows of some files and this one does not."""
        for file in files:
            if other.knows(file) and not self.knows(file):
                real = str(file.resolve())
                self._known[real] = other._known[real]
                self._dirty = True

    def save(self) -> None:
        """Write what was learned."""
        if self._dirty:
            write_text_atomic(self._path, json.dumps(self._known))


def link_tree(source: Path, target: Path) -> None:
    """Give the files of `source` a second name under `target`; copies where the file system cannot link."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.rglob("*")):
        other = target / file.relative_to(source)
        if file.is_dir():
            other.mkdir(exist_ok=True)
            continue
        other.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, other)
        except OSError:
            shutil.copy2(file, other)
