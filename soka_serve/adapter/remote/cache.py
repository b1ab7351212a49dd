"""The cache of fetched adapters: one folder each, in whole or not at all, the least recently used ones removed.

    FOLDER/KEY/NAME/adapter_config.json, adapter_model.safetensors, ...

Several processes share it. What changes it holds FOLDER/.lock for a moment; a download holds a lock of its own, so that
two processes do not fetch the same adapter. A process that goes on reading an entry holds a shared lock on its folder,
and entries that were used in the last minute stay as well. A lock ends with its process.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from soka_serve.adapter.remote.problems import FetchError
from soka_serve.errors import CheckpointError, SokaError
from soka_serve.io.file_names import CONFIG_FILE, WEIGHTS_FILE
from soka_serve.io.files import disk_errors, is_own
from soka_serve.io.leftovers import clean_stale, is_same, is_temporary, lock, locked_sibling, remove
from soka_serve.io.own_cache import own_folder
from soka_serve.io.safetensors import read_header
from soka_serve.io.text import size as size_text

log = logging.getLogger(__name__)

FOLDER_VARIABLE = "SOKA_ADAPTER_CACHE"
LIMIT_VARIABLE = "SOKA_ADAPTER_CACHE_GIB"
DEFAULT_GIB = 10.0
# A server's worker reads an entry within seconds of the moment when the entry is named to it.
GRACE_S = 60.0
_GRACE_WITHOUT_LOCKS_S = 24 * 3600.0  # some network file systems have none
_FETCHES = "fetch"  # temporary folders are named after it
_LOCKS = ".locks"

_held: dict[Path, int] = {}


@dataclass(frozen=True)
class _Entry:
    path: Path
    used: float  # seconds since the epoch
    nbytes: int


class AdapterCache:
    """See above.

    Args:
        folder: made if need be, with mode 0700.
        limit: bytes of all entries and running downloads.

    Raises:
        SokaError: the folder cannot be made, or others may write to it.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        with disk_errors(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            (folder / _LOCKS).mkdir(mode=0o700, exist_ok=True)
        if not is_own(folder.stat()):
            raise SokaError(
                f"{folder}: other users may write there, so that what is in it cannot be trusted",
                hint=f"chmod go-w it, or set {FOLDER_VARIABLE} to a folder of your own.",
            )

    @classmethod
    def from_environment(cls) -> AdapterCache:
        """The cache that the environment variables set: by default 10 GiB in this user's cache folder.

        Raises:
            SokaError: see above; or a limit that is not a number above 0.
        """
        text = os.environ.get(LIMIT_VARIABLE, str(DEFAULT_GIB))
        try:
            gib = float(text)
        except ValueError:
            gib = 0.0
        if not 0 < gib < float("inf"):
            raise SokaError(f"{LIMIT_VARIABLE} is {text!r}, expected a number of GiB above 0")
        given = os.environ.get(FOLDER_VARIABLE)
        folder = Path(given).expanduser().absolute() if given else own_folder() / "adapters"
        return cls(folder, int(gib * 2**30))

    def find(self, key: str) -> Path | None:
        """The adapter of a key, marked as used; None where it is not there in whole."""
        entry = self.folder / key
        try:
            if not _is_own_directory(entry):
                return None
            (found,) = entry.iterdir()
            if not _is_own_directory(found):
                return None
            names = {file.name for file in found.iterdir() if stat.S_ISREG(file.lstat().st_mode)}
            if not {CONFIG_FILE, WEIGHTS_FILE} <= names:
                return None
            read_header(found / WEIGHTS_FILE)
            touch(found)
        except (OSError, ValueError, CheckpointError):
            return None
        return found

    @contextmanager
    def fetching(self, key: str) -> Iterator[None]:
        """Held while an adapter is fetched; whoever wants the same one waits."""
        with disk_errors(self.folder), _Locked(self.folder / _LOCKS / key[:3]):
            yield

    @contextmanager
    def room(self, sizes: Mapping[str, int]) -> Iterator[Path]:
        """An empty temporary folder for files of these sizes, in bytes, for which room is made.

        The folder is removed at the end unless `publish` has moved it away.

        Raises:
            FetchError: more than the cache may hold, or than is left beside what is in use.
        """
        with disk_errors(self.folder), locked_sibling(self.folder / _FETCHES) as (temporary, _):
            try:
                with self._locked():
                    clean_stale(self.folder / _FETCHES)
                    self._evict(sum(sizes.values()))
                    for name, nbytes in sizes.items():  # as long as they will be: others count them
                        with (temporary / name).open("xb") as file:
                            file.truncate(nbytes)
                            os.fchmod(file.fileno(), 0o600)
                yield temporary
            finally:
                if temporary.exists():
                    remove(temporary)

    def publish(self, temporary: Path, key: str, name: str) -> Path:
        """Move a filled temporary folder to its place; another entry of the key is replaced."""
        folder_name = re.sub(r"[^A-Za-z0-9._-]|^\W+", "-", name)[:100]
        if folder_name in ("", "adapter", "merged"):  # which stand for the build that they lie in
            folder_name += "-"
        with disk_errors(self.folder), self._locked():
            if (found := self.find(key)) is not None:
                return found
            entry = self.folder / key
            if os.path.lexists(entry):
                remove(entry)  # damaged
            with locked_sibling(self.folder / _FETCHES) as (outer, _):
                temporary.rename(outer / folder_name)
                for folder in (outer, outer / folder_name):
                    folder.chmod(0o700)
                outer.rename(entry)
            touch(entry / folder_name)
        return entry / folder_name

    def total(self) -> int:
        """Bytes of all entries and running downloads."""
        return sum(entry.nbytes for entry in self._entries())

    def _locked(self) -> _Locked:
        return _Locked(self.folder / ".lock")

    def _entries(self) -> list[_Entry]:
        found = []
        for path in self.folder.iterdir():
            if path.name in (_LOCKS, ".lock"):
                continue
            with suppress(FileNotFoundError):  # of a download that ends meanwhile
                files = [file.lstat() for file in path.rglob("*")] if not path.is_symlink() else []
                nbytes = sum(status.st_size for status in files if stat.S_ISREG(status.st_mode))
                found.append(_Entry(path, path.lstat().st_mtime, nbytes))
        return sorted(found, key=lambda entry: entry.used)

    def _evict(self, needed: int) -> None:
        """Remove least recently used entries until there is room for `needed` bytes."""
        hint = f"The cache is {self.folder}; {LIMIT_VARIABLE} sets how many GiB it may hold."
        if needed > self.limit:
            raise FetchError(
                f"it takes {size_text(needed)}, and the cache of adapters holds {size_text(self.limit)}", hint=hint
            )
        entries = self._entries()
        total = sum(entry.nbytes for entry in entries)
        for entry in entries:
            if total + needed <= self.limit:
                return
            if not is_temporary(entry.path) and _remove_unused(entry):
                log.info("removed %s from the cache of adapters, to make room", entry.path.name)
                total -= entry.nbytes
        if total + needed > self.limit:
            raise FetchError(
                f"it takes {size_text(needed)}, and {size_text(total)} of the {size_text(self.limit)} that the cache "
                "of adapters may hold are in use",
                hint=hint,
            )


def touch(adapter: Path) -> None:
    """Mark an adapter of the cache as used now. FileNotFoundError where it was removed."""
    os.utime(adapter.parent, follow_symlinks=False)


def hold(adapter: Path) -> bool:
    """Keep an adapter of the cache as long as this process lives; False where it has just been removed."""
    entry = adapter.parent
    if entry in _held:
        return True
    try:
        descriptor = os.open(entry, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    with suppress(OSError):  # no locks here: the long grace has to do
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    if not is_same(entry, descriptor):
        os.close(descriptor)
        return False
    _held[entry] = descriptor
    return True


def _remove_unused(entry: _Entry) -> bool:
    """Remove an entry unless it is in use."""
    age = time.time() - entry.used
    if 0 <= age < GRACE_S:
        return False
    try:
        descriptor = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # a link, which nobody made who is to be trusted
        remove(entry.path)
        return True
    try:
        free = lock(descriptor)
        if free is False or (free is None and age < _GRACE_WITHOUT_LOCKS_S):
            return False
        # Under another name it is found by nobody, and a half-removed one is no entry.
        with locked_sibling(entry.path.parent / _FETCHES) as (grave, _):
            entry.path.rename(grave / "removed")
            remove(grave)
        return True
    finally:
        os.close(descriptor)


def _is_own_directory(path: Path) -> bool:
    status = path.lstat()
    return stat.S_ISDIR(status.st_mode) and is_own(status)


class _Locked:
    """An exclusive lock on a file, waited for."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.descriptor = -1

    def __enter__(self) -> None:
        self.descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process that uses the cache of adapters (%s)", self.file)
            fcntl.flock(self.descriptor, fcntl.LOCK_EX)
        except OSError as error:
            log.debug("no lock: %s", error)

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)
