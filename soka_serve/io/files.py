"""Atomic writing of files and directories: readers see the old one or the new one, never a part.

Everything is written to a temporary sibling, flushed to the disk and renamed. `leftovers` tells what a killed run left
behind from what a living one is writing.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import logging
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from soka_serve.errors import BuildError, CheckpointError, name_some
from soka_serve.io.leftovers import clean_stale, is_same, lock, locked_sibling, protected, sibling, stale
from soka_serve.io.places import check_place

log = logging.getLogger(__name__)

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_OS_ERROR = re.compile(r"\(os error (\d+)\)")

# What an operating system says when it will not let us write, and what the user can do about it.
_HINTS = {
    errno.ENOSPC: "free some space on that disk, or write somewhere else",
    errno.EDQUOT: "the disk quota is used up: free some space, or write somewhere else",
    errno.EFBIG: "the file is larger than the limit on file sizes (ulimit -f) or than the file system takes; "
    "raise the limit, or write somewhere else",
    errno.EACCES: "make the directory writable for this user, or write somewhere else",
    errno.EPERM: "make the directory writable for this user, or write somewhere else",
    errno.EROFS: "the file system is mounted read-only: write somewhere else",
    errno.ENOTDIR: "a part of the path is a file, where a directory is needed: move it away, or write somewhere else",
    errno.EEXIST: "a file stands where a directory is needed: move it away, or write somewhere else",
    errno.EISDIR: "a directory stands where a file is needed: move it away, or write somewhere else",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EBUSY: "something is mounted there: write into a folder below it, or somewhere else",
    errno.ELOOP: "the path is a symbolic link that leads to itself: remove it, or write somewhere else",
    errno.EIO: "the disk reports an input/output error: check it, or write somewhere else",
}


def _errno_of(error: BaseException) -> int | None:
    """The errno of an OSError, or the one that a library written in Rust put into its message."""
    if isinstance(error, OSError):
        return error.errno
    found = _OS_ERROR.search(str(error)) if type(error).__name__ == "SafetensorError" else None
    return int(found.group(1)) if found else None


def explain_disk_error(error: BaseException, target: Path | None = None) -> BuildError | None:
    """ "Disk full", "permission denied" and their like as a BuildError that names the path; None for other errors."""
    number = _errno_of(error)
    if number not in _HINTS:
        return None
    culprit = getattr(error, "filename", None)
    if target is None:  # read or write, nobody knows
        return BuildError(f"{culprit or 'a file'}: {os.strerror(number)}", hint=_HINTS[number])
    where = f" (at {culprit})" if culprit and Path(str(culprit)) != target else ""
    return BuildError(f"cannot write {target}: {os.strerror(number)}{where}", hint=_HINTS[number])


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn what `explain_disk_error` knows into a BuildError that names `target`; others pass unchanged."""
    try:
        yield
    except Exception as error:
        known = explain_disk_error(error, target)
        if known is None:
            raise
        raise known from error


@contextmanager
def read_errors(file: Path) -> Iterator[None]:
    """Turn an operating system's error while `file` is read into a CheckpointError that names it.

    For what is read while an output is written: `disk_errors` would say that the output cannot be written.
    """
    try:
        yield
    except OSError as error:
        hint = "the disk reports an input/output error: check it" if error.errno == errno.EIO else "check its rights"
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}", hint=hint) from error


def flush(path: Path) -> None:
    """Have the disk write a file or directory, and wait for it (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_tree(directory: Path) -> None:
    for folder, _, names in os.walk(directory):
        for name in names:
            file = Path(folder, name)
            if file.is_file() and not file.is_symlink():
                flush(file)
        flush(Path(folder))


@functools.cache
def _renameat2() -> Callable[[bytes, bytes], int] | None:
    """The C library's exchanging rename, or None where there is none."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    function.restype = ctypes.c_int

    def exchange(first: bytes, second: bytes) -> int:
        failed = function(_AT_FDCWD, first, _AT_FDCWD, second, _RENAME_EXCHANGE)
        return ctypes.get_errno() if failed else 0

    return exchange


def _swap(temporary: Path, target: Path) -> Path | None:
    """Put `temporary` in `target`'s place; return where the old content is now, None where there was none."""
    if not target.exists():
        temporary.rename(target)
        return None
    if (exchange := _renameat2()) is not None:
        number = exchange(os.fsencode(temporary), os.fsencode(target))
        if number == 0:
            return temporary
        if number not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # those: this file system can not exchange
            raise OSError(number, os.strerror(number), str(target))
        log.info("%s: the file system has no atomic exchange; using two renames", target)
    old = sibling(target, "old")
    target.rename(old)
    try:
        temporary.rename(target)
    except OSError:
        old.rename(target)
        raise
    return old


@contextmanager
def replace_directory(
    target: Path,
    *,
    foreign: Callable[[Path], list[str]] | None = None,
    adopt: Callable[[Path, Path], None] | None = None,
) -> Iterator[Path]:
    """Write a whole directory, or nothing: yields an empty temporary sibling that replaces `target` at the end.

    On success every file is flushed to the disk and the directory takes `target`'s place: by one atomic exchange on
    Linux, by two renames elsewhere. On any exception, Ctrl-C included, the sibling is removed and `target` stays as it
    was. A `target` that is a symbolic link to a directory stays a link; the directory behind it is replaced.

    Args:
        target: the directory.
        foreign: names what in a directory is not this output's own (`Output.foreign`). The old directory is looked at
            once more when it has been moved aside; it is kept under another name if it holds such things or was
            changed meanwhile. None: `target` is nobody's but ours.
        adopt: called with what a killed run has left (its temporary sibling) and the new sibling, before the former is
            removed.

    Raises:
        BuildError: disk full, no permission, read-only, a file in the way, or a place that is never replaced (see
            `check_place`); names the path and says what to do.
    """
    with disk_errors(target):
        real = check_place(target, replaced=True)
        if real.exists() and not real.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(real))
        real.parent.mkdir(parents=True, exist_ok=True)
        before = _Stamps(real) if foreign is not None else None
        with locked_sibling(real) as (temporary, descriptor):
            old: Path | None = None
            try:
                if adopt is not None:
                    for left in stale(real):
                        adopt(left, temporary)
                clean_stale(real)
                yield temporary
                _flush_tree(temporary)
                with protected(real):  # and so the old content, under the name that it gets
                    if added := _added(real, before, foreign):
                        _keep(real, real, added)  # at once: a kill must not leave it under a temporary name
                    try:
                        old = _swap(temporary, real)
                    finally:
                        # Whatever interrupts: what lies under the temporary name may be the old content.
                        if old is None and temporary.exists() and not is_same(temporary, descriptor):
                            old = temporary
                        if old is not None:
                            _discard(old, real, _added(old, before, foreign))
                flush(real.parent)
            finally:
                if is_same(temporary, descriptor):
                    _tidy(temporary)


class _Stamps:
    """A directory's inode, and size, time of change and inode of every file in it, to find changes later."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.stat().st_ino if directory.is_dir() else None
        self.files = self._read(directory) if self.directory is not None else {}

    def changed(self, directory: Path) -> list[str]:
        """Files that are new or other than they were; none where it is another directory altogether."""
        if directory.stat().st_ino != self.directory:
            return []
        return sorted(name for name, stamp in self._read(directory).items() if self.files.get(name) != stamp)

    @staticmethod
    def _read(directory: Path) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        for folder, _, names in os.walk(directory):
            for name in names:
                with suppress(FileNotFoundError):  # removed this moment
                    path = Path(folder, name)
                    status = path.lstat()
                    found[path.relative_to(directory).as_posix()] = (status.st_size, status.st_mtime_ns, status.st_ino)
        return found


def _added(directory: Path, before: _Stamps | None, foreign: Callable[[Path], list[str]] | None) -> list[str]:
    """Files that were added to an old directory, or changed in it, while its successor was written."""
    if foreign is None or before is None or not directory.is_dir():
        return []
    try:
        return sorted({*foreign(directory), *before.changed(directory)})
    except OSError as error:  # what cannot be looked at is not deleted
        return [str(error)]


def _discard(old: Path, target: Path, added: list[str]) -> None:
    """Remove an old directory that was moved aside, or give it a name to keep if there is something new in it."""
    if added:
        _keep(old, target, added)
    else:
        _tidy(old)


def _keep(directory: Path, target: Path, added: list[str]) -> None:
    kept = target.with_name(f"{target.name}.earlier-{secrets.token_hex(3)}")
    directory.rename(kept)
    text = "%s: while its successor was made, there came or changed: %s; the earlier folder is kept whole as %s"
    log.warning(text, target, name_some(added), kept)


def _tidy(directory: Path) -> None:
    # The work is done or lost already: failing to tidy up must not hide which.
    shutil.rmtree(directory, onerror=lambda _f, p, e: log.warning("could not remove %s: %s", p, e[1]))


@contextmanager
def scratch_directory(target: Path) -> Iterator[Path]:
    """An empty sibling of `target` for what need not fit into memory; removed in the end, after a kill by the next run.

    Raises:
        BuildError: as `replace_directory`.
    """
    real = check_place(target)
    with ExitStack() as stack:
        with disk_errors(target):
            real.parent.mkdir(parents=True, exist_ok=True)
            clean_stale(real)
            scratch, descriptor = stack.enter_context(locked_sibling(real))
        try:
            yield scratch
        finally:
            if is_same(scratch, descriptor):
                _tidy(scratch)


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: temporary sibling, flush to the disk, rename.

    Raises:
        BuildError: disk full, no permission, read-only, or a directory or a device in the way.
    """
    with disk_errors(path):
        real = check_place(path)
        if real.exists() and not (real.is_file() or real.is_dir()):
            raise BuildError(
                f"cannot write {path}: a device, a pipe or a socket is there", hint="give the name of a file"
            )
        real.parent.mkdir(parents=True, exist_ok=True)
        clean_stale(real)
        temporary = sibling(real, "tmp")
        try:
            with temporary.open("wb") as file:
                lock(file.fileno())
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                temporary.replace(real)
            flush(real.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_text_atomic(path: Path, text: str) -> None:
    """`write_bytes_atomic` of UTF-8 text with the newlines as given."""
    write_bytes_atomic(path, text.encode())


def require_regular(path: Path) -> Path:
    """The path itself, if a file is there: a device has no end, and a pipe may wait for its writer without one.

    Raises:
        OSError: it is missing, cannot be looked at, or is neither a file nor a directory.
    """
    found = path.stat()
    # Opening a directory says itself what is wrong.
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        raise irregular(path, found.st_mode)
    # Some of the kernel's files look like empty ones, and reading them waits without end.
    if found.st_size == 0 and Path(os.path.realpath(path)).is_relative_to("/proc"):
        raise OSError(errno.EINVAL, "not a file but a window into the kernel", str(path))
    return path


def irregular(path: Path, mode: int) -> OSError:
    """The error for what is no file, by its `st_mode`."""
    if stat.S_ISDIR(mode):
        return IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    return OSError(errno.EINVAL, "not a file but a device, a pipe or a socket", str(path))


def is_own(status: os.stat_result) -> bool:
    """Whether a file or directory belongs to this process's user, or to root, and no group and no other may write."""
    return status.st_uid in (os.geteuid(), 0) and not status.st_mode & 0o022


def is_own_file(path: Path) -> bool:
    """Whether it is a file, no link to one, and `is_own`. OSError where there is none."""
    status = path.lstat()  # a link may lead anywhere
    return stat.S_ISREG(status.st_mode) and is_own(status)


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's content. OSError where it is no file or cannot be read."""
    with require_regular(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_text(text: str) -> str:
    """Hex sha256 of UTF-8 text."""
    return hashlib.sha256(text.encode()).hexdigest()
