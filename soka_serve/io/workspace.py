"""Folders of a build: the finished artefact and the caches of its stages.

    build/NAME/                    the artefact: adapter/, merged/, soka.lock, report.html, README.md, ...
    build/.cache/NAME/init-KEY/    factors at step 0
    build/.cache/NAME/tune-KEY/    resume points and the trained factors
    build/.cache/hashes.json       sha256 of large files by size and time of change

`build/NAME` is only ever replaced as a whole.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from soka_serve.errors import BuildError
from soka_serve.io.budget import open_regular
from soka_serve.io.files import disk_errors, sha256_file, write_text_atomic
from soka_serve.io.leftovers import clean_stale, final_name, is_temporary
from soka_serve.io.places import check_place
from soka_serve.io.stamps import Stamp, check_stamps, stamp_of
from soka_serve.io.warn_once import warn

logger = logging.getLogger(__name__)

_LARGEST_CACHE = 16 << 20  # bytes; an entry takes some 200

# Names of cached stages.
_STAGE = re.compile(r"(?:init|tune)-[0-9a-f]{1,16}")


class Workspace:
    """Paths of one build, and the lock that keeps two builds of one name apart.

    Args:
        root: the folder of builds (`[output] dir`).
        name: the build's name.
    """

    def __init__(self, root: Path, name: str) -> None:
        self.root = root
        self.name = name
        self.directory = root / name
        self.cache = root / ".cache" / name
        self.hashes = root / ".cache" / "hashes.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the build's lock; remove what killed runs left.

        Raises:
            BuildError: another build of this name is running, or the folder cannot be written.
        """
        with disk_errors(self.root):
            check_place(self.root)
            self.cache.mkdir(parents=True, exist_ok=True)
            lock = self.cache / "lock"
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BuildError(
                    f"another build of {self.name!r} is writing to {self.directory}",
                    hint="Wait for it to end, or give this one another name or another output folder.",
                ) from None
            clean_stale(self.directory)
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
        """Remove cached stages of other keys: a build keeps one cache per stage.

        Nothing else is touched: in a folder of builds such as the user's home, .cache/NAME may be another program's.
        """
        kept = {self.stage(stage, key).name for stage, key in keep.items()}
        for entry in self.cache.iterdir():
            if _STAGE.fullmatch(entry.name) and entry.name not in kept and entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            elif (found := _STAGE.fullmatch(final_name(entry))) and is_temporary(entry):
                clean_stale(self.cache / found[0])


class HashCache:
    """sha256 of files, remembered by path, size and time of change: a 13 GB base is hashed once, not at every build.

    Args:
        path: where they are remembered. It is only a cache: what is not well formed there is left out with a warning,
            and hashing again mends it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known, self._is_cache = _read_hashes(path)
        self._answered: dict[Path, tuple[Stamp, str]] = {}
        self._dirty = False

    def file(self, path: Path) -> str:
        """Hex sha256 of one file."""
        real = path.resolve()
        stamp = stamp_of(real)
        entry = self._known.get(str(real))
        if entry is None or entry[:3] != stamp:
            entry = self._known[str(real)] = [*stamp, sha256_file(real)]
            self._dirty = True
        digest = str(entry[3])
        self._answered.setdefault(path, (stamp, digest))
        return digest

    def knows(self, path: Path) -> bool:
        """Whether `file` would answer without reading the file."""
        real = path.resolve()
        entry = self._known.get(str(real))
        return entry is not None and entry[:3] == stamp_of(real)

    def check_unchanged(self) -> None:
        """Raise CheckpointError unless every file is what it was when `file` first gave its hash."""
        check_stamps(
            {
                path: stamp
                for path, (stamp, digest) in self._answered.items()
                if not (path.is_file() and (stamp_of(path) == stamp or sha256_file(path) == digest))
            }
        )

    def adopt(self, other: HashCache, files: Iterable[Path]) -> None:
        """Take over what another cache knows of some files and this one does not."""
        for file in files:
            if other.knows(file) and not self.knows(file):
                real = str(file.resolve())
                self._known[real] = other._known[real]
                self._dirty = True

    def save(self) -> None:
        """Write new hashes to the file."""
        if self._path.exists() and not self._path.is_file():
            warn(logger, "%s is no file: hashes are not remembered", self._path)
        elif self._dirty and not self._is_cache and self._path.is_symlink():
            warn(logger, "%s leads to what is no cache of hashes, and is not written to", self._path)
        elif self._dirty:
            write_text_atomic(self._path, json.dumps(self._known))


def _read_hashes(path: Path) -> tuple[dict[str, list[int | str]], bool]:
    """The entries of a cache file, and whether it is what `HashCache.save` writes, or there is none."""
    try:
        with open_regular(path) as stream:
            if os.fstat(stream.fileno()).st_size > _LARGEST_CACHE:
                raise ValueError(f"expected a file of at most {_LARGEST_CACHE} bytes")
            found = json.loads(stream.read(_LARGEST_CACHE))
        if not isinstance(found, dict):
            raise ValueError(f"expected an object, got {type(found).__name__}")  # noqa: TRY004 - as damaged
    except FileNotFoundError:
        return {}, True
    except (OSError, ValueError, RecursionError) as error:
        warn(logger, "%s is no cache of hashes (%s); files are hashed again", path, error)
        return {}, False
    good = {name: entry for name, entry in found.items() if _is_entry(entry)}
    if len(good) < len(found):
        warn(logger, "%s: %d entries are malformed; their files are hashed again", path, len(found) - len(good))
    return good, len(good) == len(found)


def _is_entry(entry: object) -> bool:
    if not (isinstance(entry, list) and len(entry) == 4 and all(type(number) is int for number in entry[:3])):
        return False
    return isinstance(entry[3], str) and re.fullmatch(r"[0-9a-f]{64}", entry[3]) is not None


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
