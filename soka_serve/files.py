"""Files and directories that are either the old ones or the new ones, never something in between. No torch.

Everything is written to a temporary sibling, flushed to the disk and renamed. The sibling's name holds the process id
and a token of the machine, so that what a killed run left behind can be told from what a living one is writing.
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
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from soka_serve.errors import BuildError

log = logging.getLogger(__name__)

_STALE_ELSEWHERE_S = 24 * 3600.0
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
    errno.EIO: "the disk reports an input/output error: check it, or write somewhere else",
}

# Temporary siblings that this process is writing now: a leftover with our own process id that is not among them was
# left by an earlier process with the same id (usual in containers, where the main process is often 1).
_active: set[Path] = set()


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


def check_replaceable(target: Path, *, keep: Iterable[Path], suffixes: Iterable[str], what: str) -> None:
    """Refuse to replace a directory that is an input, holds one, or does not look like an earlier output.

    Args:
        target: the directory to be replaced; missing and empty ones are fine.
        keep: inputs that must survive.
        suffixes: what files of an earlier output end in.
        what: what the output is, for the message.

    Raises:
        BuildError: names the input or the file that would be lost.
    """
    real = Path(os.path.realpath(target))
    for path in keep:
        other = Path(os.path.realpath(path))
        if other == real or real in other.parents:
            raise BuildError(f"{target}: writing {what} there would destroy {path}", hint="write somewhere else")
    if not real.is_dir():
        return
    endings = tuple(suffixes)
    for file in sorted(real.rglob("*")):
        if not file.is_dir() and not file.name.endswith(endings):
            raise BuildError(
                f"{target}: not empty, and {file.relative_to(real)} is not part of {what}; it will not be replaced",
                hint="write somewhere else, or remove the directory first",
            )


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
def _machine() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]


def _sibling(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}-{os.getpid()}-{_machine()}-{secrets.token_hex(3)}")


def final_name(path: Path) -> str:
    """The name of a file or directory, of a temporary sibling the one that it will have.

    >>> final_name(Path("build/.math.tmp-12-0123ab-4567cd")), final_name(Path("build/math"))
    ('math', 'math')
    """
    found = re.fullmatch(r"\.(.+)\.tmp-\d+-[0-9a-f]{6}-[0-9a-f]{6}", path.name)
    return found.group(1) if found else path.name


def _leftovers(target: Path, kind: str) -> Iterator[tuple[Path, int, str]]:
    pattern = re.compile(rf"\.{re.escape(target.name)}\.{kind}-(\d+)-([0-9a-f]{{6}})-[0-9a-f]{{6}}")
    if target.parent.is_dir():
        for path in sorted(target.parent.iterdir()):
            if found := pattern.fullmatch(path.name):
                yield path, int(found.group(1)), found.group(2)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it lives, and belongs to somebody else
        return True
    return True


def _is_stale(path: Path, pid: int, machine: str) -> bool:
    if machine != _machine():  # its process can not be asked from here (a shared disk, or a container that is gone)
        return time.time() - path.lstat().st_mtime > _STALE_ELSEWHERE_S
    if pid == os.getpid():
        return path not in _active
    return not _is_alive(pid)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def clean_stale(target: Path) -> list[Path]:
    """Remove what killed runs left beside `target`; return the paths that were removed.

    Only leftovers of processes that no longer live are touched (of another machine: those untouched for a day). A
    run killed between the two renames of a system without an atomic exchange has left `target` missing and its old
    content under a temporary name: it is put back.
    """
    target = Path(os.path.realpath(target))
    removed = []
    for path, pid, machine in list(_leftovers(target, "old")):
        if _is_stale(path, pid, machine) and not target.exists():
            log.warning("%s: putting back the version that an interrupted run had moved to %s", target, path.name)
            path.rename(target)
    for kind in ("tmp", "old"):
        for path, pid, machine in list(_leftovers(target, kind)):
            if _is_stale(path, pid, machine):
                log.info("removing %s, left by an interrupted run", path)
                _remove(path)
                removed.append(path)
    return removed


def stale_bytes(target: Path) -> int:
    """Bytes on the disk of what killed runs left beside `target` and `clean_stale` would remove."""
    real = Path(os.path.realpath(target))
    left = [path for path, pid, machine in _leftovers(real, "tmp") if _is_stale(path, pid, machine)]
    return sum(file.lstat().st_blocks * 512 for path in left for file in path.rglob("*"))


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
        if function(_AT_FDCWD, first, _AT_FDCWD, second, _RENAME_EXCHANGE) == 0:
            return 0
        return ctypes.get_errno()

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
    old = _sibling(target, "old")
    _active.add(old)
    target.rename(old)
    try:
        temporary.rename(target)
    except OSError:
        old.rename(target)
        raise
    return old


@contextmanager
def replace_directory(target: Path, *, adopt: Callable[[Path, Path], None] | None = None) -> Iterator[Path]:
    """Write a whole directory, or nothing: yields an empty temporary sibling that replaces `target` at the end.

    On success every file is flushed to the disk and the directory takes `target`'s place: by one atomic exchange on
    Linux, by two renames elsewhere. On any exception, Ctrl-C included, the sibling is removed and `target` stays as it
    was. A `target` that is a symbolic link to a directory stays a link; the directory behind it is replaced.

    Args:
        target: the directory.
        adopt: called with what a killed run has left (its temporary sibling) and the new sibling, before the former is
            removed.

    Raises:
        BuildError: disk full, no permission, read-only, or a file in the way; names the path and says what to do.
    """
    with disk_errors(target):
        real = Path(os.path.realpath(target))
        if real.exists() and not real.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(real))
        real.parent.mkdir(parents=True, exist_ok=True)
        temporary = _sibling(real, "tmp")
        old: Path | None = None
        _active.add(temporary)
        try:
            temporary.mkdir()
            if adopt is not None:
                for left, pid, machine in list(_leftovers(real, "tmp")):
                    if _is_stale(left, pid, machine):
                        adopt(left, temporary)
            clean_stale(real)
            yield temporary
            _flush_tree(temporary)
            old = _swap(temporary, real)
            flush(real.parent)
        finally:
            for path in (temporary, old):
                if path is not None and path.exists():
                    # The work is done or lost already: failing to tidy up must not hide which.
                    shutil.rmtree(path, onerror=lambda _f, p, e: log.warning("could not remove %s: %s", p, e[1]))
            _active.difference_update({temporary, old} - {None})


@contextmanager
def scratch_directory(target: Path) -> Iterator[Path]:
    """An empty sibling of `target` for what need not fit into memory; removed in the end, after a kill by the next run.

    Raises:
        BuildError: as `replace_directory`.
    """
    real = Path(os.path.realpath(target))
    scratch = _sibling(real, "tmp")
    with disk_errors(scratch):
        real.parent.mkdir(parents=True, exist_ok=True)
        clean_stale(real)
        scratch.mkdir()
    _active.add(scratch)
    try:
        yield scratch
    finally:
        if scratch.exists():
            shutil.rmtree(scratch, onerror=lambda _f, p, e: log.warning("could not remove %s: %s", p, e[1]))
        _active.discard(scratch)


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: temporary sibling, flush to the disk, rename.

    Raises:
        BuildError: disk full, no permission, read-only, or a directory in the way.
    """
    with disk_errors(path):
        real = Path(os.path.realpath(path))
        real.parent.mkdir(parents=True, exist_ok=True)
        clean_stale(real)
        temporary = _sibling(real, "tmp")
        _active.add(temporary)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(real)
            flush(real.parent)
        finally:
            temporary.unlink(missing_ok=True)
            _active.discard(temporary)


def write_text_atomic(path: Path, text: str) -> None:
    """`write_bytes_atomic` of UTF-8 text with the newlines as given."""
    write_bytes_atomic(path, text.encode())


def require_regular(path: Path) -> Path:
    """The path itself, if a file is there: a device has no end, and a pipe may wait for its writer without one.

    Raises:
        OSError: it is missing, cannot be looked at, or is neither a file nor a directory.
    """
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # opening a directory says itself what is wrong
        raise irregular(path, mode)
    return path


def irregular(path: Path, mode: int) -> OSError:
    """The error for what is no file, by its `st_mode`."""
    if stat.S_ISDIR(mode):
        return IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    return OSError(errno.EINVAL, "not a file but a device, a pipe or a socket", str(path))


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's content. OSError where it is no file or cannot be read."""
    with require_regular(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_text(text: str) -> str:
    """Hex sha256 of UTF-8 text."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_tree(paths: Iterable[Path]) -> str:
    """Hex sha256 over files and, recursively, directories: relative names and contents, not where they lie.

    The order of `paths` does not matter. A file counts under its own name, a directory's files under their path
    relative to it.
    """
    entries = []
    for path in paths:
        files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
        for file in files:
            name = file.relative_to(path).as_posix() if path.is_dir() else file.name
            entries.append(f"{sha256_file(file)}  {name}\n")
    return hashlib.sha256("".join(sorted(entries)).encode()).hexdigest()
