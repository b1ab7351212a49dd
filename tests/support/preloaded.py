"""Programs that start without their imports: forked from a process that has made them, and otherwise as any other.

Importing vLLM takes ten seconds of processor time in each of a server's processes, and training's libraries take five.
A host process imports them once. For each program it forks a child, which gets its own arguments, environment, working
directory, files and session, and runs as `python -m MODULE` does. The host has one thread and runs nothing of a model.
The program's own worker processes are forked, too: as vLLM's server forks its engine and workers on GPUs, where its CPU
builds spawn them otherwise. So are the programs in PRELOAD that it starts by subprocess, as `soka-serve serve` does.

`python -m tests.support.preloaded vllm|soka SOCKET` is the host; it ends when its standard input does, with the process
that started it. The processes of pytest-xdist share theirs, which end with the one that distributes the tests.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import gc
import importlib
import json
import multiprocessing
import os
import random
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any, NoReturn

from prometheus_client import values

from tests.conftest import ROOT

# What the programs import, by host. Modules of transformers load their parts at the first use of a name.
PRELOAD = {
    "vllm": ("vllm.entrypoints.openai.api_server", "vllm.v1.engine.core", "vllm.v1.worker.cpu_worker"),
    "soka": (
        *("transformers.trainer", "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama"),
        *("peft", "soka_serve.compiler.stages", "soka_serve.peft"),
    ),
}
SHARED = "SOKA_TEST_HOSTS"  # the folder of hosts that several processes share
CODE = "-c"  # in place of a module: what follows is the program
_NUMBER_BYTES = 16


class Program:
    """A running program; its methods are those of subprocess.Popen."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.pid = int(connection.recv(_NUMBER_BYTES))
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code; minus the number of the signal that ended it."""
        if self.returncode is None:
            self._connection.settimeout(timeout)
            try:
                self.returncode = int(self._connection.recv(_NUMBER_BYTES))
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0) from None
            self._connection.close()
        return self.returncode

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def send_signal(self, number: int) -> None:
        """To the program alone, not to its group."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


_hosts: dict[str, Path] = {}


def start(
    host: str,
    arguments: Sequence[str | Path],
    *,
    cwd: Path,
    files: Sequence[IO[Any]] = (),
    env: Mapping[str, str] | None = None,
) -> Program:
    """Start `python -m ARGUMENTS`, or `python -c ARGUMENTS` with CODE as the first.

    Args:
        host: "vllm" or "soka": the modules that are there already.
        files: standard input, output and error; none for /dev/null.
        env: added to the environment; what a library reads at its import is as it was when the host started.
    """
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(_socket_of(host)))
    environment = {**os.environ, **(env or {})}
    text = json.dumps({"arguments": list(map(str, arguments)), "cwd": str(cwd), "env": environment}).encode()
    with Path(os.devnull).open("r+b") as nothing:
        numbers = [file.fileno() for file in files or (nothing,) * 3]
        socket.send_fds(connection, [len(text).to_bytes(8, "big")], numbers)
    connection.sendall(text)
    return Program(connection)


def run(
    host: str,
    arguments: Sequence[str | Path],
    *,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    answers: str = "",
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, as subprocess.run does with `capture_output=True, text=True`.

    Args:
        answers: standard input.
        timeout: in seconds.
    """
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(3)]
        files[0].write(answers)
        files[0].seek(0)
        program = start(host, arguments, cwd=cwd, files=files, env=env)
        try:
            code = program.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(program.pid, signal.SIGKILL)
            raise
        for file in files[1:]:
            file.seek(0)
        return subprocess.CompletedProcess(list(arguments), code, files[1].read(), files[2].read())


def _socket_of(host: str) -> Path:
    """Where a host listens; it is started the first time, in a run of several processes by the first that asks."""
    if host not in _hosts:
        shared = os.environ.get(SHARED)
        _hosts[host] = _shared_host(host, Path(shared)) if shared else _own_host(host)
    return _hosts[host]


def _own_host(host: str) -> Path:
    """The socket of a host that ends with this process."""
    folder = tempfile.TemporaryDirectory(prefix="soka-host-")
    process = _start_host(host, Path(folder.name) / "socket", subprocess.PIPE)

    def end() -> None:
        process.terminate()
        process.wait()
        folder.cleanup()

    atexit.register(end)
    return Path(folder.name) / "socket"


def _shared_host(host: str, folder: Path) -> Path:
    """The socket of a host that ends with the process that called `share_hosts`."""
    place = folder / host
    with (folder / f"{host}.lock").open("w") as lock, (folder / "alive").open("rb") as alive:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            _start_host(host, place, alive).returncode = 0  # it outlives this process, which is not to wait for it
    return place


def _start_host(host: str, place: Path, standard_input: IO[bytes] | int) -> subprocess.Popen[bytes]:
    # One thread: libraries read this once. TRL, where a test imports it, sets vLLM's level to ERROR.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "INFO", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.support.preloaded", host, str(place)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=standard_input)
    while not place.exists():
        assert process.poll() is None, f"the host of {host} did not start"
        time.sleep(0.05)
    return process


@contextlib.contextmanager
def share_hosts() -> Iterator[None]:
    """Meanwhile the processes that this one starts share their hosts, which end with the block or this process."""
    with tempfile.TemporaryDirectory(prefix="soka-hosts-") as folder:
        alive = Path(folder) / "alive"  # a pipe that ends for its readers when nobody holds it open for writing
        os.mkfifo(alive)
        held = os.open(alive, os.O_RDWR)
        os.environ[SHARED] = folder
        try:
            yield
        finally:
            del os.environ[SHARED]
            os.close(held)


class Host:
    """Forks a child for each request on a socket, until its own standard input ends or SIGTERM comes."""

    def __init__(self, place: str) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(f"{place}.new")
        self._listener.listen()
        Path(f"{place}.new").rename(place)
        self._wake, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        for readable in (self._listener, self._wake, sys.stdin):
            self._selector.register(readable, selectors.EVENT_READ)
        self._running: dict[int, socket.socket] = {}
        self._wake.setblocking(False)
        self._woken.setblocking(False)
        signal.set_wakeup_fd(self._woken.fileno())
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, which end this process
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())

    def serve(self) -> dict[str, Any] | None:
        """None at the end, or in a child what it is to run."""
        while True:
            ready = [key.fileobj for key, _ in self._selector.select()]
            if self._wake in ready:
                self._wake.recv(4096)
                self._answer_ended()
            if self._listener in ready:
                connection, _ = self._listener.accept()
                request, files = _receive(connection)
                pid = os.fork()
                if pid == 0:
                    connection.close()
                    self._leave(files)
                    return request
                for file in files:
                    os.close(file)
                self._running[pid] = connection
                _send_number(connection, pid)
            if sys.stdin in ready:
                return None

    def end(self) -> None:
        """Kill what still runs."""
        for pid in self._running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)

    def _answer_ended(self) -> None:
        while self._running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            with self._running.pop(pid) as connection, contextlib.suppress(OSError):
                _send_number(connection, os.waitstatus_to_exitcode(status))

    def _leave(self, files: list[int]) -> None:
        """In a child: close what is the host's, and have signals and files as a new process has them."""
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self._selector.close()
        for end in (self._listener, self._wake, self._woken, *self._running.values()):
            end.close()
        self._running = {}
        os.setsid()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)


def _send_number(connection: socket.socket, number: int) -> None:
    connection.sendall(f"{number:{_NUMBER_BYTES}}".encode())


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """A request, and its files."""
    head, files, _, _ = socket.recv_fds(connection, 8, 3)
    text = b""
    while len(text) < int.from_bytes(head, "big"):
        text += connection.recv(1 << 20)
    return json.loads(text), files


def _run(request: dict[str, Any]) -> None:
    """What python does with `-m` or `-c`."""
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.path[0] = request["cwd"]
    random.seed()
    program, *arguments = request["arguments"]
    if program == CODE:
        sys.argv = [CODE, *arguments[1:]]
        exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})
        return
    sys.argv = [program, *arguments]
    if not hasattr(sys.modules.get(program), "__path__"):  # runpy warns of a module that is there already
        sys.modules.pop(program, None)
    runpy.run_module(program, run_name="__main__", alter_sys=True)


def _exit_code(request: dict[str, Any]) -> int:
    """Run a program to its end; its exit code."""
    try:
        _run(request)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:  # noqa: BLE001  as the interpreter itself does
        traceback.print_exc()
        return 1
    return 0


def _exit(code: int) -> NoReturn:
    """End as python does, but for its freeing of every object, which takes seconds after many imports."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class ForkingPopen(subprocess.Popen[bytes]):
    """Forks for `python -m MODULE` where MODULE is one of `modules`, whose imports are there; else as ever."""

    modules: tuple[str, ...] = ()

    def _execute_child(self, command: Any, executable: Any, prepare: Any, *given: Any) -> None:
        if list(command[:2]) != [sys.executable, "-m"] or command[2] not in self.modules:
            super()._execute_child(command, executable, prepare, *given)  # type: ignore[misc]
            return
        _, _, cwd, env, _, _, _, *ends = given
        self.pid = os.fork()
        if self.pid == 0:
            atexit._clear()
            os.setsid()
            for number, file in enumerate((ends[0], ends[3], ends[5])):
                if file != -1:
                    os.dup2(file, number)
            if prepare is not None:
                prepare()
            _exit(_exit_code({"arguments": command[2:], "cwd": cwd or str(Path.cwd()), "env": dict(env or os.environ)}))
        self._child_created = True
        self._close_pipe_fds(*ends[:6])  # type: ignore[attr-defined]


class MetricValues:
    """prometheus_client's class of values, which it chooses by a variable at its import, here at a value's making."""

    @property
    def _chosen(self) -> Any:
        return _shared_value() if "PROMETHEUS_MULTIPROC_DIR" in os.environ else values.MutexValue

    def __call__(self, *arguments: Any, **more: Any) -> Any:
        return self._chosen(*arguments, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._chosen, name)


@cache
def _shared_value() -> Any:
    """Of one count of several processes."""
    return values.MultiProcessValue()


def _import_nothing_again(name: str) -> None:
    """Fork where a program asks for processes that import everything anew."""
    ForkingPopen.modules = (*PRELOAD[name], "soka_serve.serving.vllm_command")
    subprocess.Popen = ForkingPopen  # type: ignore[misc]
    get_context = multiprocessing.get_context

    def forking(method: str | None = None) -> Any:
        return get_context("fork" if method in ("spawn", "forkserver") else method)

    multiprocessing.get_context = forking
    if name == "vllm":
        from vllm.model_executor.models import registry

        # It finds out about a model's class in such a process.
        registry._run_in_subprocess = lambda function: function()
        values.ValueClass = MetricValues()  # type: ignore[assignment]


def main(name: str, place: str) -> None:
    """Import, and fork programs until the end."""
    for module in PRELOAD[name]:
        importlib.import_module(module)
    _import_nothing_again(name)
    gc.freeze()  # else a child's collector writes to, and so copies, all pages
    host = Host(place)
    request = None
    try:
        request = host.serve()
    finally:
        host.end()
    if request is not None:
        _exit(_exit_code(request))


if __name__ == "__main__":
    main(*sys.argv[1:])
