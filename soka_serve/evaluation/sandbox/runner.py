"""The caller's side of one sandbox: it starts the supervisor, hands over jobs, and reads the tests' report.

The program goes straight to the program's process, the tests and the nonce to the tests' process, each over a pipe of
its own: the supervisor, which both are forked from, never holds them.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soka_serve.errors import SandboxError, printable
from soka_serve.evaluation.sandbox import wire

_PREFIX = "soka-sandbox-"
_ABANDONED_S = 60.0
_LOCK_S = 10.0
_BACKSTOP_S = 30.0
_MAX_REPORT_BYTES = 1 << 16
_SCRATCH_BYTES = 32 << 20  # twice what a program may write: it is looked at now and then


@dataclass(frozen=True)
class Program:
    """A program and what it must pass.

    Attributes:
        code: what the model wrote.
        tests: statements, usually asserts, run in order.
        setup: statements before the tests: imports, objects.
        names: the names that setup and tests take from the program. Empty: every name it defines, except those of
            Python's builtins and of the standard library's modules, so that no program replaces `sorted` or `math` in a
            test.
    """

    code: str
    tests: tuple[str, ...]
    setup: str = ""
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """Whether all tests ran and held, and why not. The reason may quote the program."""

    passed: bool
    reason: str = ""


class EndedError(Exception):
    """The supervisor ended before it had answered."""


def cannot_run(reason: str) -> SandboxError:
    """The error for a machine that cannot run programs: it says nothing about any program."""
    return SandboxError(
        f"the sandbox cannot run programs here: {reason}",
        hint="No program was judged by this. Free what is missing (processes, memory, disk, rights), then run again.",
    )


class Runner:
    """One supervisor, started when it is needed and again should it ever end.

    Args:
        weak: resource limits alone, where a person has said so.
    """

    def __init__(self, *, weak: bool) -> None:
        self.weak = weak
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._folder: Path | None = None
        self._lock: int | None = None

    def missing_protection(self) -> str | None:
        """Try the locking step; the protection that this machine lacks, or None.

        Raises:
            SandboxError: this machine cannot run programs.
        """
        try:
            answer = self._ask({"timeout_s": _LOCK_S, "cpu_s": 2}, {})
        except EndedError:
            raise cannot_run("its process ends at once") from None
        if "failed" in answer:
            self.close()
            raise cannot_run(answer["failed"])
        return answer.get("refused")

    def run(self, program: Program, timeout_s: float) -> Verdict:
        """Run a program against its tests.

        Raises:
            EndedError: the supervisor ended.
            SandboxError: this machine cannot run programs.
        """
        nonce = secrets.token_hex(16)
        parts: dict[str, dict[str, Any]] = {
            "code": {"code": program.code},
            "tests": {"setup": program.setup, "tests": program.tests, "names": program.names, "nonce": nonce},
        }
        try:
            frames = {name: wire.encode_frame(part, wire.MAX_FRAME_BYTES // 2) for name, part in parts.items()}
        except wire.WireError:
            return Verdict(False, "the program is too long")
        # Less CPU time than wall-clock time: a busy machine does not end a program, an endless loop is ended early.
        settings = {"timeout_s": timeout_s, "cpu_s": max(2, math.ceil(timeout_s / 2))}
        answer = self._ask(settings, frames)
        for problem in ("failed", "refused"):
            # The locking step went well before the first program: that it does not now is the machine's fault.
            if problem in answer:
                raise cannot_run(answer[problem])
        if answer["stopped"]:
            return Verdict(False, answer["stopped"])
        report = answer["report"] or {"reason": "the tests ended before they had all run"}
        if report.get("closed") is True:
            return Verdict(False, f"the program ended by itself ({answer['ended']})")
        # The nonce is known to this process and to the one that ran the tests, after the last of them.
        passed = report.get("passed") is True and report.get("nonce") == nonce
        return Verdict(passed, "" if passed else printable(report.get("reason") or "no proof that the tests ran", 500))

    def close(self) -> None:
        """End the supervisor and everything it started, and remove its folder."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _ask(self, settings: Mapping[str, float], frames: Mapping[str, bytes]) -> dict[str, Any]:
        """Hand over one job; the supervisor's answer, and with frames the tests' `report`, None if there is none."""
        try:
            if self._process is None:
                self._start()
            pipes = _Pipes() if frames else None
        except OSError as error:
            self.close()
            raise cannot_run(str(error)) from error
        process, caller = self._process, self._socket
        assert process is not None
        assert caller is not None
        # The supervisor ends programs in time itself; this ends the supervisor, should it hang.
        backstop = threading.Timer(settings["timeout_s"] + _BACKSTOP_S, process.kill)
        backstop.daemon = True
        answer = None
        try:
            backstop.start()
            with contextlib.suppress(wire.WireError, BrokenPipeError, ConnectionResetError):
                wire.send_with_descriptors(caller, settings, pipes.theirs if pipes else ())
                if pipes:
                    pipes.hand_over(frames)
                answer = wire.read_frame(caller.fileno())
            if answer is not None and pipes:
                answer["report"] = pipes.report()
        finally:
            backstop.cancel()
            if pipes:
                pipes.close()
            if answer is None:
                self.close()
        if answer is None:
            raise EndedError
        return answer

    def _start(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        self._folder.chmod(0o700)  # whatever this process's umask is
        # Held as long as this process or the supervisor lives: `remove_abandoned` tells by it.
        self._lock = os.open(self._folder, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._socket, theirs = socket.socketpair()
        # No site-packages, no user folder, no current directory on the path; the same hashes in every run.
        child = Path(__file__).with_name("child.py")
        command = [sys.executable, "-s", "-S", "-P", "-B", "-X", "utf8", str(child), str(self._folder)]
        with theirs:
            self._process = subprocess.Popen(
                [*command, "--weak"] if self.weak else command,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env={"PYTHONHASHSEED": "0"},
                start_new_session=True,
                pass_fds=[self._lock],
            )


class _Pipes:
    """The pipes of one job: the program and the tests go out, the tests' report comes in."""

    def __init__(self) -> None:
        self._all: list[int] = []
        try:
            (code, self._code), (tests, self._tests), (self._report, report) = (self._pipe() for _ in range(3))
        except OSError:
            self.close()
            raise
        self.theirs = (code, tests, report)

    def _pipe(self) -> tuple[int, int]:
        ends = os.pipe()
        self._all += ends
        return ends

    def hand_over(self, frames: Mapping[str, bytes]) -> None:
        """Send program and tests, once the supervisor has its descriptors."""
        self._close(*self.theirs)
        for fd, name in ((self._code, "code"), (self._tests, "tests")):
            with contextlib.suppress(BrokenPipeError):  # its process has ended; the answer says how
                wire.write_all(fd, frames[name])
            self._close(fd)

    def report(self) -> dict[str, Any] | None:
        """The tests' report. Its writers are dead when the supervisor has answered, so this does not wait."""
        with contextlib.suppress(wire.WireError):
            return wire.read_frame(self._report, _MAX_REPORT_BYTES)
        return None

    def close(self) -> None:
        """Close what is still open."""
        self._close(*list(self._all))

    def _close(self, *descriptors: int) -> None:
        for fd in descriptors:
            os.close(fd)
            self._all.remove(fd)


def check_room(folder: Path, workers: int) -> None:
    """Check that programs which fill their scratch directories leave room for those of others.

    Raises:
        SandboxError: there is less; the numbers are in the message.
    """
    free, needed = shutil.disk_usage(folder).free, (workers + 1) * _SCRATCH_BYTES
    if free < needed:
        raise cannot_run(f"{folder} has {free} bytes free, expected at least {needed}")


def remove_abandoned(folder: Path) -> None:
    """Remove sandbox folders whose runner and supervisor were both killed.

    A folder counts as abandoned if this user owns it, nobody holds its lock, it has not changed for a minute, and it
    holds nothing but scratch directories: folders of such a name may be the user's own.
    """
    for path in _owned(folder):
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _holds_scratch_only(path):
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)


def _holds_scratch_only(folder: Path) -> bool:
    """Whether all in it are directories with a job's number for a name, which hold plain files alone."""
    with os.scandir(folder) as jobs:
        for job in jobs:
            if not (job.name.isdecimal() and job.is_dir(follow_symlinks=False)):
                return False
            with os.scandir(job) as files:
                if not all(file.is_file(follow_symlinks=False) for file in files):
                    return False
    return True


def _owned(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.glob(f"{_PREFIX}*")):
        with contextlib.suppress(OSError):
            status = path.lstat()
            if status.st_uid == os.geteuid() and time.time() - status.st_mtime > _ABANDONED_S:
                yield path
