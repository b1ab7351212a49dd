"""Temporary siblings of outputs: their names, whether their writer is alive, and removing those of killed runs.

A writer holds a lock (flock) on its sibling, which the kernel drops when the process ends, however it ends. The lock
tells a living writer from a dead one across containers of one kernel, where process ids and host names tell nothing.
The name says which kernel and which space of process ids the writer belongs to: under another kernel (a shared disk)
locks may not be seen, and a leftover counts as one only when it has not been touched for a day.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import logging
import os
import re
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

_STALE_ELSEWHERE_S = 24 * 3600.0
_KERNEL = 6  # hex digits of a machine token that name the kernel; the rest names the space of process ids
# .NAME.KIND-PID-MACHINE-RANDOM; machine tokens of 6 digits are those of versions without locks.
_NAME = re.compile(
    r"\.(?P<name>.+)\.(?P<kind>tmp|old)-(?P<pid>\d+)-(?P<machine>[0-9a-f]{6}(?:[0-9a-f]{6})?)-[0-9a-f]{6}"
)

# Siblings that this process is writing now, for file systems that have no locks.
_active: set[Path] = set()


@functools.cache
def machine_token() -> str:
    """12 hex digits: 6 for the running kernel, 6 for the process ids that mean the same processes as here."""

    def digits(text: str | None) -> str:
        return hashlib.sha256((text or secrets.token_hex()).encode()).hexdigest()[:_KERNEL]

    if not sys.platform.startswith("linux"):  # the host name is all there is
        return digits(socket.gethostname()) * 2
    kernel = processes = None  # where Linux hides them, nobody's
    with suppress(OSError, ValueError):
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    with suppress(OSError):
        processes = str(Path("/proc/self/ns/pid").readlink())
    return digits(kernel) + digits(processes)


def sibling(target: Path, kind: str) -> Path:
    """An unused name beside `target` for its successor ("tmp") or its old content ("old")."""
    return target.with_name(f".{target.name}.{kind}-{os.getpid()}-{machine_token()}-{secrets.token_hex(3)}")


def final_name(path: Path) -> str:
    """The name of a file or directory, of a temporary sibling the one that it will have.

    >>> final_name(Path("build/.math.tmp-12-0123ab456789-4567cd")), final_name(Path("build/math"))
    ('math', 'math')
    """
    found = _NAME.fullmatch(path.name)
    return found["name"] if found and found["kind"] == "tmp" else path.name


def is_temporary(path: Path) -> bool:
    """Whether a name is that of a temporary sibling."""
    return _NAME.fullmatch(path.name) is not None


def lock(descriptor: int) -> bool | None:
    """Lock an open file or directory; False if somebody else holds the lock, None where there are no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # directories on NFS, Lustre without -o flock
        log.debug("no lock: %s", error)
        return None
    return True


@contextmanager
def locked_sibling(target: Path) -> Iterator[tuple[Path, int]]:
    """Make an empty temporary directory beside `target`, locked as long as the context lasts.

    Yields:
        Its path and an open descriptor of it. What becomes of it is the caller's business.
    """
    while True:
        path = sibling(target, "tmp")
        path.mkdir()
        # A cleaner that came between these calls holds the lock, or has removed the directory.
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        if lock(descriptor) is not False and is_same(path, descriptor):
            break
        os.close(descriptor)
    _active.add(path)
    try:
        yield path, descriptor
    finally:
        _active.discard(path)
        os.close(descriptor)


@contextmanager
def protected(path: Path) -> Iterator[None]:
    """Keep cleaners away from a file or directory under whatever name it gets meanwhile; a missing one is fine."""
    descriptor = None
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        lock(descriptor)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def is_same(path: Path, descriptor: int) -> bool:
    """Whether a path names what was opened."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@dataclass(frozen=True)
class _Leftover:
    """A temporary sibling of some process, living or not."""

    path: Path
    pid: int
    machine: str

    @contextmanager
    def claimed(self) -> Iterator[bool]:
        """Whether its writer is gone; if so, nobody else takes it while the context lasts."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        except FileNotFoundError:
            yield False
            return
        except OSError:
            yield self._looks_stale()
            return
        try:
            free = lock(descriptor)
            same_kernel = self.machine[:_KERNEL] == machine_token()[:_KERNEL] and len(self.machine) > _KERNEL
            yield (free and same_kernel) or (free is not False and self._looks_stale())
        finally:
            os.close(descriptor)

    def _looks_stale(self) -> bool:
        """Whether the writer is probably gone, for file systems without locks."""
        if self.machine != machine_token():  # its process cannot be asked from here
            with suppress(FileNotFoundError):  # somebody works in it this moment
                return time.time() - self._touched() > _STALE_ELSEWHERE_S
            return False
        if self.pid == os.getpid():
            return self.path not in _active
        import psutil

        return not psutil.pid_exists(self.pid)

    def _touched(self) -> float:
        """The last change of it or of what lies in it, seconds since the epoch."""
        times = [self.path.lstat().st_mtime]
        if self.path.is_dir() and not self.path.is_symlink():
            times += [entry.lstat().st_mtime for entry in self.path.iterdir()]
        return max(times)


def _leftovers(target: Path, kind: str) -> list[_Leftover]:
    if not target.parent.is_dir():
        return []
    found = ((path, _NAME.fullmatch(path.name)) for path in sorted(target.parent.iterdir()))
    return [
        _Leftover(path, int(match["pid"]), match["machine"])
        for path, match in found
        if match and match["name"] == target.name and match["kind"] == kind
    ]


def stale(target: Path, kind: str = "tmp") -> Iterator[Path]:
    """Temporary siblings of `target` whose writer is gone; each is locked until the next is asked for."""
    for left in _leftovers(Path(os.path.realpath(target)), kind):
        with left.claimed() as is_ours:
            if is_ours:
                yield left.path


def remove(path: Path) -> None:
    """Remove a file, a link, or a directory with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def clean_stale(target: Path) -> list[Path]:
    """Remove what killed runs left beside `target`; return the paths that were removed.

    Only leftovers that no living process writes are touched (of other machines: those untouched for a day). A run
    killed between the two renames of a system without an atomic exchange has left `target` missing and its old
    content under a temporary name: it is put back.
    """
    target = Path(os.path.realpath(target))
    removed = []
    for path in stale(target, "old"):
        if not target.exists():
            log.warning("%s: putting back the version that an interrupted run had moved to %s", target, path.name)
            path.rename(target)
    for kind in ("tmp", "old"):
        for path in stale(target, kind):
            log.info("removing %s, left by an interrupted run", path)
            remove(path)
            removed.append(path)
    return removed


def stale_bytes(target: Path) -> int:
    """Bytes on the disk of what killed runs left beside `target` and `clean_stale` would remove."""
    return sum(file.lstat().st_blocks * 512 for path in stale(target) for file in path.rglob("*"))
