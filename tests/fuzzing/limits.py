"""The limits that every case is held to, and what they measure.

A case is one call of a reader, or of a command in this process. Its time is the processor's, which other programs on
the machine do not lengthen; a case that waits instead, for a pipe's other end, say, is ended by the clock.
"""

from __future__ import annotations

import os
import resource
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from click.testing import CliRunner, Result

from soka_serve.cli import main

HANG_S = 10  # of processor time, all threads of this process
WAIT_S = 60  # by the clock
MEMORY = 1 << 30  # bytes of address space beyond what the process has when the case begins


class OverLimitError(AssertionError):
    """A case took more than it may."""


class Peak:
    """The most memory, bytes, that a case had resident beyond what the process held before; 0 where it is not known."""

    resident = 0


@contextmanager
def bounded(most: int = MEMORY) -> Iterator[None]:
    """Raise where a case takes more than HANG_S, WAIT_S or `most` bytes; more are not given, which is a MemoryError."""
    memory = psutil.Process().memory_info()
    limit = resource.getrlimit(resource.RLIMIT_AS)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    resource.setrlimit(resource.RLIMIT_AS, (memory.vms + most, limit[1]))
    try:
        with limited(HANG_S):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)
        grown = _peak() - memory.rss
        Peak.resident = max(Peak.resident, grown)
        if grown > most:
            raise OverLimitError(f"{grown:,} bytes more were resident")


def _peak() -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")), 0)


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise where it takes more processor time, or WAIT_S by the clock."""
    with (
        _timed(signal.ITIMER_PROF, signal.SIGPROF, seconds, "processor time"),
        _timed(signal.ITIMER_REAL, signal.SIGALRM, WAIT_S, "waiting"),
    ):
        yield


@contextmanager
def _timed(clock: int, number: int, seconds: float, what: str) -> Iterator[None]:
    ended = False

    def stop(signal_number: int, frame: object) -> None:
        nonlocal ended
        ended = True
        raise OverLimitError(f"not done after {seconds} s of {what}")

    before = signal.signal(number, stop)
    signal.setitimer(clock, seconds, 1)  # and each second, where somebody catches what is raised
    try:
        yield
    finally:
        signal.setitimer(clock, 0)
        signal.signal(number, before)
        if ended:
            raise OverLimitError(f"not done after {seconds} s of {what}")


def run(*arguments: str) -> Result:
    """A command, in this process: done, or refused with a message, exit code 2 and no traceback."""
    with bounded():
        done = CliRunner().invoke(main, list(arguments))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code in (0, 2), (done.exit_code, done.output)
    assert "Traceback" not in done.output, done.output
    assert done.exit_code == 0 or "rror" in done.output, done.output
    return done


def is_plain(file: Path, most_bytes: int = 16 << 20) -> bool:
    """Whether it is a file, no link, that a change may read whole: none may follow a link out of the folder."""
    with suppress(OSError):
        status = os.lstat(file)
        return stat.S_ISREG(status.st_mode) and status.st_size <= most_bytes
    return False


def snapshot(folder: Path, most_bytes: int = 16 << 20) -> dict[str, object]:
    """Of everything below a folder, by its path, what tells whether it is still there: kind, and bytes or target."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        mode = os.lstat(path).st_mode
        kind = stat.S_IFMT(mode)
        if stat.S_ISLNK(mode):
            found[str(path.relative_to(folder))] = kind, str(path.readlink())
        elif is_plain(path, most_bytes):
            found[str(path.relative_to(folder))] = kind, path.read_bytes()
        elif stat.S_ISDIR(mode):
            found[str(path.relative_to(folder))] = kind
        else:
            found[str(path.relative_to(folder))] = kind, os.lstat(path).st_ino
    return found
