"""vLLM as a child process: started, watched until it is healthy, ended with all of its children."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from soka_serve.errors import ServeError, SokaError, printable
from soka_serve.io.child_signals import default_signals
from soka_serve.serving.client import Client
from soka_serve.serving.command import Launch
from soka_serve.serving.log import failure_lines, last_stage, root_causes

logger = logging.getLogger(__name__)

_STOP_S = 30.0  # vLLM ends its engine within a few seconds
_POLL_S = 0.5
_SECONDS_BETWEEN_LINES = 10.0
_PR_SET_PDEATHSIG = 1


class StopSignal(BaseException):
    """A signal asked this program to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def signals_stop() -> Iterator[Callable[[], None]]:
    """Within it, SIGTERM, SIGINT and SIGHUP raise StopSignal, the first time; later ones are ignored.

    SIGINT and SIGHUP do so unless they were ignored when this program began, as a shell without job control starts
    `command &`, and nohup a command: Ctrl-C in the terminal, or its end, is then not meant for this one. SIGTERM is.

    Yields:
        A function after which all of them are ignored, for what must not be left half done.
    """

    def ignore() -> None:
        for each in caught:
            signal.signal(each, signal.SIG_IGN)

    def stop(number: int, frame: object) -> None:
        ignore()
        raise StopSignal(number)

    asked = [number for number in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    caught = [signal.SIGTERM, *asked]
    before = {each: signal.signal(each, stop) for each in caught}
    try:
        yield ignore
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def check_port(host: str, port: int) -> None:
    """Raise SokaError if nothing can listen there, before minutes are spent on starting vLLM."""
    place = f"port {port} of {host}"
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise SokaError(f"{host}: not an address to listen on: {error}", hint="Give --host 127.0.0.1") from error
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                hint = "Give another: --port, or [serve] port; or end the server that runs there."
                raise SokaError(f"{place} is in use", hint=hint) from error
            hint = "Give another --port (above 1023) or --host."
            raise SokaError(f"{place}: cannot listen there: {error.strerror}", hint=hint) from error


def _begin() -> None:
    """In the child, before vLLM begins: every signal as the system has it, and SIGTERM when this program is killed
    (Linux). The signals of the terminal do not reach it, so that what a shell chose for them has no meaning for it."""
    default_signals()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _is_anyone_alive(group: int) -> bool:
    """Whether a process group has members that run. Zombies do not count: the first process of a container may never
    reap them, and signals still reach them. Without /proc they count as running."""
    if not Path("/proc/self/stat").exists():
        return True
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                # "pid (any name) state parent group ..."
                state, _, pgrp = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            except (OSError, ValueError):
                continue  # it has just ended
            if int(pgrp) == group and state not in "ZX":
                return True
    return False


class Server:
    """vLLM's process group.

    Args:
        launch: command and environment.
        log: file for its output; None lets it write to the terminal.
    """

    def __init__(self, launch: Launch, log: Path | None) -> None:
        self.log = log
        self.ready_s = 0.0
        self._client = Client(launch)
        self._drain_s = launch.drain_s
        with nullcontext() if log is None else log.open("wb") as out:
            # A group of its own: Ctrl-C in the terminal reaches this program alone, which ends the group in order.
            self._process = subprocess.Popen(
                launch.command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=None if out is None else subprocess.STDOUT,
                env={**os.environ, **launch.environment},
                start_new_session=True,
                preexec_fn=_begin,  # no threads run yet, which could hold locks
            )

    def wait_healthy(self, timeout_s: float) -> None:
        """Wait until it answers, showing progress; `ready_s` is then how long it took.

        Raises:
            ServeError: it ended, or did not answer in time.
        """
        started = last = time.monotonic()
        while (seconds := time.monotonic() - started) < timeout_s:
            if self._process.poll() is not None:
                self._line("")
                raise self._failure(f"vLLM ended with exit code {self._process.returncode} before it was ready")
            if self._client.is_healthy():
                self._line("")
                self.ready_s = seconds
                return
            if self.log is not None and sys.stderr.isatty():
                self._line(f"starting vLLM, {seconds:.0f} s: {self._last_line()}")
            elif self.log is not None and time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                logger.info("starting vLLM, %.0f s: %s", seconds, self._last_line())
            time.sleep(_POLL_S)
        raise self._failure(f"vLLM was not ready after {timeout_s:.0f} s")

    @property
    def is_running(self) -> bool:
        """Whether its first process has not ended."""
        return self._process.poll() is None

    def lives(self, timeout_s: float = 60.0) -> bool:
        """Whether it runs, and its engine lives, which a busy one may take this long to say."""
        deadline = time.monotonic() + timeout_s
        while self.is_running and (healthy := self._client.health()) is not False:
            if healthy or time.monotonic() >= deadline:
                return bool(healthy)
        return False

    def wait(self) -> None:
        """Wait until it ends by itself, which it should not.

        Raises:
            ServeError: always.
        """
        code = self._process.wait()
        raise self._failure(f"vLLM ended with exit code {code}")

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Within it, a request that failed because the engine died says what the engine died from.

        Raises:
            ServeError: that of the request, with what vLLM's log says of the cause.
        """
        try:
            yield
        except ServeError as error:
            if self.log is None or self._client.is_healthy():
                raise
            causes = root_causes(self._log_text())
            if not causes:
                raise
            lines = [error.message, "vLLM's engine has ended:", *(f"  {cause}" for cause in causes)]
            raise ServeError("\n".join(lines), hint=f"All it said: {self.log}") from error

    def stop(self) -> None:
        """End it and all of its children; kill what does not end.

        With vLLM's --shutdown-timeout its first process is asked alone, which lets requests end before its workers.
        """
        if self._drain_s:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(self._drain_s + _STOP_S)
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + _STOP_S
        while time.monotonic() < deadline:
            self._process.poll()  # reaps it, so that the group can be seen to be gone
            if not self._signal(0) or not _is_anyone_alive(self._process.pid):
                self._process.wait()  # ended since it was polled
                return
            time.sleep(0.1)
        logger.warning("vLLM did not end within %.0f s and is killed", _STOP_S)
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: int) -> bool:
        """Send a signal to the group; False when there is nothing left in it."""
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return False
        return True

    def _log_text(self) -> str:
        return "" if self.log is None else self.log.read_text(encoding="utf-8", errors="replace")[-200_000:]

    def _last_line(self) -> str:
        return last_stage(self._log_text())[:100]

    def _line(self, text: str) -> None:
        """Rewrite the progress line of a terminal."""
        if sys.stderr.isatty():
            width = shutil.get_terminal_size().columns - 1
            sys.stderr.write(f"\r\x1b[K{printable(text, len(text))[:width]}")
            sys.stderr.flush()

    def _failure(self, what: str) -> ServeError:
        """The error with what the log says of it, which may be a page of traces: the lines that name a failure."""
        if self.log is None:
            return ServeError(f"{what}; see its output above")
        lines = [f"{what}:", *(f"  {line}" for line in failure_lines(self._log_text()))]
        return ServeError("\n".join(lines), hint=f"All it said: {self.log}")


@contextmanager
def started(launch: Launch, log: Path | None, timeout_s: float) -> Iterator[Server]:
    """Start vLLM and wait until it answers; when the block ends, so do vLLM and all of its children.

    Args:
        launch: command and environment.
        log: file for its output; None lets it write to the terminal.
        timeout_s: how long it may take to start.

    Raises:
        StopSignal: a signal asked this program to end; see `signals_stop`.
        ServeError: vLLM did not start.
    """
    logger.info("starting vLLM on %s%s", launch.url, f"; its log is {log}" if log else "")
    with signals_stop() as ignore_signals:
        server = None
        try:
            server = Server(launch, log)
            server.wait_healthy(timeout_s)
            yield server
        except StopSignal as stopped:
            logger.info("%s: ending vLLM", signal.Signals(stopped.number).name)
            raise
        finally:
            ignore_signals()
            if server is not None:
                server.stop()
