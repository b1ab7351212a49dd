"""The sandbox's supervisor: `python child.py FOLDER`, started by `sandbox.runner`. Standard library only.

It forks two processes for each job, one for the program and one for its tests. Each locks itself in, says so over a
pipe that it then closes, and only then reads its own part of the job. This process reads neither part: a program
starts as a copy of a process that has never held a test, a nonce or another program. It measures time and disk, ends
both processes, and reports how that went. Only the locking step can say that a protection is missing.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from soka_serve.evaluation.sandbox import checker, confine, program, wire
    from soka_serve.io import child_signals
else:

    def _beside(name, where=".", **given):
        # By path: the interpreter is bare, and a program shall not be able to import these.
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / where / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        vars(module).update(given)
        spec.loader.exec_module(module)
        return module

    child_signals = _beside("child_signals", "../../io")
    confine = _beside("confine")
    wire = _beside("wire")
    program = _beside("program", wire=wire)
    checker = _beside("checker", wire=wire)

TICK_S = 0.02
FORK_RETRY_S = (0.1, 0.3, 1.0)
MAX_SCRATCH_BYTES = 16 << 20
MAX_SCRATCH_FILES = 256
MAX_RESIDENT_BYTES = (1 << 30) + (64 << 20)
_MAX_STATUS_BYTES = 1 << 14

# Imported once here and inherited, rather than by every program anew.
_USUAL = (
    *("array", "bisect", "cmath", "collections", "copy", "datetime", "decimal", "fractions", "functools", "heapq"),
    *("itertools", "json", "math", "operator", "random", "re", "statistics", "string", "textwrap", "typing"),
)


class _RunError(Exception):
    """This machine cannot run the job; it says nothing about the program."""


class _MissingError(Exception):
    """A process that locked itself in found a protection missing."""


def main() -> None:
    """Serve jobs until the other side closes, then remove the folder: the caller may have been killed."""
    folder, weak = Path(sys.argv[1]), "--weak" in sys.argv
    _stand_alone()
    for name in _USUAL:
        importlib.import_module(name)
    confine.prepare()
    caller = socket.socket(fileno=0)
    number = 0
    try:
        while True:
            settings, descriptors = wire.receive_with_descriptors(caller, 3)
            if settings is None:
                return
            number += 1
            wire.write_frame(0, _Job(settings, descriptors, folder / f"{number}", weak).answer())
    except (BrokenPipeError, ConnectionResetError):
        return
    finally:
        _remove(folder)


def _stand_alone() -> None:
    """Drop what the caller's process may have handed down: environment, umask, signal handlers, closed standard
    streams."""
    os.environ.clear()
    os.umask(0o077)
    child_signals.default_signals()  # with SIGCHLD ignored, no process could be waited for
    while os.open(os.devnull, os.O_RDWR) < 3:  # a closed standard descriptor would be given to a pipe
        pass


class _Job:
    """One program with its tests; or neither, then only the locking step is tried.

    Args:
        settings: timeout_s and cpu_s.
        descriptors: where the program comes from, where the tests come from, where their report goes; or none.
        scratch: the directory that the program may write to, not yet there.
        weak: resource limits alone.
    """

    def __init__(self, settings: Mapping[str, Any], descriptors: Sequence[int], scratch: Path, weak: bool) -> None:
        self._deadline = time.monotonic() + settings["timeout_s"]
        self._cpu_s = int(settings["cpu_s"])
        self._given = list(descriptors)
        self._open = set(descriptors)
        self._scratch = scratch
        self._weak = weak
        self._processes: list[int] = []

    def answer(self) -> dict[str, Any]:
        """Run it, and say how that went.

        Returns:
            `refused`: the protection that is missing. `failed`: why this machine could not run it. Otherwise
            `stopped`, why the processes were ended before the tests were through, or null; and `ended`, how the
            program's process ended.
        """
        try:
            self._scratch.mkdir(mode=0o700)
            if os.geteuid() == 0 and not self._weak:
                os.chown(self._scratch, confine.NOBODY, confine.NOBODY)
            return self._run() if self._given else self._try_lock()
        except _MissingError as error:
            return {"refused": str(error)}
        except (_RunError, OSError) as error:
            return {"failed": str(error)}
        finally:
            self._close(*self._open)
            self._end()
            _remove(self._scratch)

    def _run(self) -> dict[str, Any]:
        code, tests, result = self._given
        requests_out, requests_in = self._pipe()
        replies_out, replies_in = self._pipe()
        status_out, status_in = self._pipe()
        alive_out, alive_in = self._pipe()  # nothing is written: it closes when the tests' process ends
        self._start(
            lambda: program.run_program(code, requests_out, replies_in), status_in, (code, requests_out, replies_in)
        )
        self._start(
            lambda: checker.run_tests(tests, requests_in, replies_out, result),
            status_in,
            (tests, requests_in, replies_out, result, alive_in),
        )
        self._close(*self._open - {status_out, alive_out})
        self._await_locks(status_out)
        stopped = self._wait(alive_out)
        return {"stopped": stopped, "ended": _how(self._end()[0])}

    def _try_lock(self) -> dict[str, Any]:
        status_out, status_in = self._pipe()
        self._start(lambda: None, status_in, ())
        self._close(status_in)
        self._await_locks(status_out)
        return {}

    def _pipe(self) -> tuple[int, int]:
        ends = os.pipe()
        self._open.update(ends)
        return ends

    def _close(self, *descriptors: int) -> None:
        for fd in descriptors:
            os.close(fd)
            self._open.remove(fd)

    def _start(self, run: Callable[[], None], status: int, keep: Sequence[int]) -> None:
        """Fork a process that keeps these descriptors and no other, locks itself in, says so, and runs."""
        process = _fork()
        if process:
            self._processes.append(process)
            return
        try:
            self._lock(status, keep)
            run()
        finally:
            os._exit(0)

    def _lock(self, status: int, keep: Sequence[int]) -> None:
        try:
            null = os.open(os.devnull, os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(null, fd)
            low = 3
            for fd in sorted({*keep, status}):
                os.closerange(low, fd)
                low = fd + 1
            os.closerange(low, 1 << 16)
            confine.lock(str(self._scratch), self._cpu_s, weak=self._weak)
            line = "locked"
        except confine.MissingProtectionError as error:
            line = f"refused {error}"
        except Exception as error:  # noqa: BLE001 - whatever it is, no program has run yet
            line = f"failed {wire.described(error)}"
        os.write(status, " ".join(line.split()).encode()[: _MAX_STATUS_BYTES - 1] + b"\n")
        os.close(status)
        if line != "locked":
            os._exit(0)

    def _await_locks(self, status: int) -> None:
        """Wait until every process has locked itself in; nothing of the job is run before."""
        text = b""
        while True:
            left = self._deadline - time.monotonic()
            if left <= 0 or not select.select([status], [], [], left)[0]:
                raise _RunError("locking in a process took longer than the program may run")
            part = os.read(status, _MAX_STATUS_BYTES)
            if not part:
                break
            text += part
        lines = [line.partition(" ") for line in text.decode().splitlines()]
        for kind, raised in (("refused", _MissingError), ("failed", _RunError)):
            for word, _, reason in lines:
                if word == kind:
                    raise raised(reason)
        if len(lines) != len(self._processes):
            how = ", ".join(_how(status) for status in self._end())
            raise _RunError(f"a process ended before it had locked itself in ({how})")

    def _wait(self, alive: int) -> str | None:
        """Wait for the end of the tests' process; the reason why it has to be ended."""
        while True:
            left = self._deadline - time.monotonic()
            if left <= 0:
                return "timeout"
            ready = select.select([alive, 0], [], [], min(TICK_S, left))[0]
            if alive in ready:
                return None
            if ready:
                return "the caller is gone"  # it sends no other job before it has the answer
            if _too_full(self._scratch):
                return f"more than {MAX_SCRATCH_FILES} files or {MAX_SCRATCH_BYTES} bytes written"
            if any(_resident_bytes(process) > MAX_RESIDENT_BYTES for process in self._processes):
                return f"more than {MAX_RESIDENT_BYTES} bytes of memory used"

    def _end(self) -> list[int]:
        """End all processes; their wait statuses in the order of their start."""
        processes, self._processes = self._processes, []
        for process in processes:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
            except PermissionError:  # seen before any program runs, when the locking step is tried
                raise _RunError("this user may not end the processes that it starts") from None
        return [os.waitpid(process, 0)[1] for process in processes]


def _fork() -> int:
    for delay_s in FORK_RETRY_S:
        try:
            return os.fork()
        except BlockingIOError:  # as many processes as the user or the container may have, at this moment
            time.sleep(delay_s)
    try:
        return os.fork()
    except OSError as error:
        raise _RunError(f"no process can be made: {error.strerror}") from None


def _how(status: int) -> str:
    if not os.WIFSIGNALED(status):
        return f"exit status {os.WEXITSTATUS(status)}"
    number = os.WTERMSIG(status)
    return f"signal {number}" + (", as when CPU time runs out" if number == signal.SIGKILL else "")


def _too_full(scratch: Path) -> bool:
    total = count = 0
    try:
        with os.scandir(scratch) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    # A file may take more of the disk than its size says, and a sparse one may yet be filled.
                    total += max(status.st_size, status.st_blocks * 512)
                count += 1
                if count > MAX_SCRATCH_FILES or total > MAX_SCRATCH_BYTES:
                    return True
    except OSError:
        return True
    return False


def _resident_bytes(process: int) -> int:
    """Memory of a process with its page tables, which no limit counts; 0 where the system does not tell."""
    total = 0
    with contextlib.suppress(OSError), Path(f"/proc/{process}/status").open("rb") as file:
        for line in file:
            if line.startswith((b"VmRSS:", b"VmPTE:")):
                total += int(line.split()[1]) << 10
    return total


def _remove(folder: Path) -> None:
    """Remove a folder as far as possible. Its processes are dead: nothing changes it meanwhile."""
    with contextlib.suppress(OSError):
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    _remove(Path(entry.path))
                else:
                    with contextlib.suppress(OSError):
                        Path(entry.path).unlink()
        folder.rmdir()


if __name__ == "__main__":
    main()
