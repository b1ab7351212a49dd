"""Programs that try to get out. Tests look for what such a program would have done, not at its verdict alone."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from soka_serve.evaluation.sandbox import Verdict
from soka_serve.evaluation.sandbox import confine as lock
from tests.support.sandboxed import RIGHT, alive, children, run

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")]


# ------------------------------------------------------------------------------------------------ breaking out


def test_time_ends() -> None:
    started = time.monotonic()
    for code in ("while True:\n    pass", "import time\ntime.sleep(1000)", "def f(x):\n    while True:\n        pass"):
        assert run(code, timeout_s=1) == Verdict(False, "timeout")
    ignoring = "import signal\nfor n in range(1, 32):\n    try:\n        signal.signal(n, signal.SIG_IGN)\n"
    ignoring += "    except (OSError, ValueError):\n        pass\n"
    ignoring += "while True:\n    try:\n        pass\n    except BaseException:\n        pass"
    assert run(ignoring, timeout_s=1) == Verdict(False, "timeout")
    assert time.monotonic() - started < 12


def test_limits_are_hard() -> None:
    code = """
        import resource
        def f(name):
            return resource.getrlimit(getattr(resource, name))
        def g(name):
            try:
                resource.setrlimit(getattr(resource, name), (2**40, 2**40))
            except (ValueError, OSError):
                return "refused"
    """
    limits = {"RLIMIT_CPU": 5, "RLIMIT_AS": lock.MAX_MEMORY_BYTES, "RLIMIT_NOFILE": 64, "RLIMIT_NPROC": 0}
    limits |= {"RLIMIT_FSIZE": lock.MAX_FILE_BYTES, "RLIMIT_CORE": 0}
    tests = [f"assert f({name!r}) == {(most, most)} and g({name!r}) == 'refused'" for name, most in limits.items()]
    assert run(code, tuple(tests), timeout_s=10) == Verdict(True)


def test_memory_ends() -> None:
    assert "MemoryError" in run("x = bytearray(10 * 2**30)").reason
    assert not run("x = []\nwhile True:\n    x.append(bytearray(2**24))").passed
    assert not run("import mmap\nx = mmap.mmap(-1, 10 * 2**30)").passed


def test_output_is_thrown_away(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("print('x' * 10**7)\n" + RIGHT).passed
    assert not run("while True:\n    print('x' * 10**6)", timeout_s=1).passed
    assert not run("def f(x):\n    return 'x' * 10**8").passed
    out, err = capfd.readouterr()
    assert out == err == ""


@pytest.mark.parametrize(
    "call",
    [
        "os.fork()",
        "0 / (os.system('true') == 0)",  # it returns what the fork gave, and raises nothing
        "subprocess.run(['true'])",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "multiprocessing.Process(target=print).start()",
        "threading.Thread(target=print).start()",
        "os.execv('/bin/true', ['true'])",
    ],
)
def test_no_process_is_made(call: str) -> None:
    verdict = run(f"import os, subprocess, multiprocessing, threading\n{call}\n" + RIGHT)
    assert not verdict.passed
    refused = ("PermissionError", "BlockingIOError", "RuntimeError: can't start new thread", "ZeroDivisionError")
    assert verdict.reason.startswith(refused), verdict.reason


def test_no_file_outside_is_read_or_changed(outside: Path) -> None:
    secret = outside / "secret"
    secret.write_text("the secret")
    secret.chmod(0o666)
    attempts = [
        "open(P).read()", "open(P, 'w')", "open(P, 'a').write('x')", "os.truncate(P, 0)", "os.remove(P)",
        "os.rename(P, P + '2')", "os.rename(P, 'mine')", "os.link(P, 'mine')", "os.chmod(P, 0)", "os.utime(P)",
        "os.open(P, os.O_RDONLY | os.O_TRUNC)", "os.symlink(P, 'mine') or open('mine').read()", "os.mkdir(P + 'd')",
        "open(P + 'new', 'w')", "os.mkdir('d')", "os.mkfifo('p')", "os.mknod(P + 'n')", "os.listdir('/')",
        "os.listdir(os.path.dirname(P))", "open('/etc/passwd').read()", "open('/proc/self/environ').read()",
        "open('/proc/self/mem', 'rb')", "open('/dev/shm/x', 'w')", "os.chroot('.')", "os.setxattr(P, 'user.a', b'x')",
        "os.open('..', os.O_RDONLY) and os.listdir('..')", "os.memfd_create('x')",
        "os.open(os.__file__, os.O_RDONLY | os.O_TRUNC)",
    ]  # fmt: skip
    code = f"import os\nP = {str(secret)!r}\ndef f(i):\n    A = {attempts!r}\n    try:\n        eval(A[i])\n"
    code += "    except OSError:\n        return 'refused'\n    return A[i]"
    tests = tuple(f"assert f({i}) == 'refused', f({i})" for i in range(len(attempts)))
    assert run(code, tests) == Verdict(True)
    assert secret.read_text() == "the secret"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o666
    assert [p.name for p in outside.iterdir()] == ["secret"]
    assert Path(os.__file__).stat().st_size > 0


def test_the_environment_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "the secret")
    code = "import os\ndef f():\n    return dict(os.environ), os.getcwd(), os.getuid()"
    verdict = run(code, ("assert f()[0] == {} and f()[2] != 0",))
    assert verdict.passed, verdict.reason


def test_there_is_no_network() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0.2)
        port = server.getsockname()[1]
        for code in (
            f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)",
            "import socket\nsocket.socket(socket.AF_UNIX)",
            "import socket\nsocket.socketpair()",
            f"import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}', timeout=1)",
        ):
            verdict = run(code + "\n" + RIGHT)
            assert not verdict.passed
            assert "Operation not permitted" in verdict.reason
        with pytest.raises(TimeoutError):
            server.accept()


def test_no_other_process_is_reached() -> None:
    """Signals, tracing, limits and priorities of the processes above, of which there are still as many afterwards."""
    code = f"""
        import os, signal, resource, ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        def attempt(call, *args):
            try:
                return call(*args) in (-1, None) and ctypes.get_errno() == 1
            except OSError:
                return True
        def f(x):
            targets = [os.getppid(), {os.getpid()}, -1, 0]
            done = [attempt(os.kill, pid, signal.SIGKILL) for pid in targets]
            done += [attempt(libc.ptrace, 16, pid, 0, 0) for pid in targets]
            done += [attempt(os.killpg, 0, signal.SIGKILL), attempt(os.setpriority, 0, os.getppid(), 19)]
            done += [attempt(resource.prlimit, os.getppid(), resource.RLIMIT_CPU, (1, 1))]
            done += [attempt(libc.unshare, 0x10000000), attempt(libc.prctl, 1, 0, 0, 0, 0)]
            return all(done)
    """
    assert run(code, ("assert f(1) is True",)) == Verdict(True)


def test_crashes_and_deep_recursion_end_only_the_program() -> None:
    assert "signal 11" in run("import ctypes\nctypes.string_at(0)").reason
    assert not run("import sys\nsys.setrecursionlimit(10**9)\ndef f(x):\n    return f(x)").passed
    assert "RecursionError" in run("def f(x):\n    return f(x)").reason
    assert not run("def f(x):\n    y = []\n    for _ in range(10**5):\n        y = [y]\n    return y").passed
    assert not run("def f(x):\n    y = []\n    y.append(y)\n    return y").passed


@pytest.mark.parametrize("many", [False, True])
def test_the_disk_is_not_filled(many: bool) -> None:
    code = "import itertools\nfor n in itertools.count():\n    open(str(n), 'wb').write(b'x' * "
    verdict = run(code + ("1)" if many else "2**20)"), timeout_s=20)
    assert not verdict.passed
    assert verdict.reason.startswith("more than") or "signal 25" in verdict.reason


def test_one_file_has_a_largest_size() -> None:
    code = "import signal, os\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    code += "fd = os.open('x', os.O_CREAT | os.O_WRONLY)\n"
    code += "try:\n    while True:\n        os.write(fd, b'x' * 65536)\nexcept OSError:\n    pass\n"
    code += "def f(x):\n    return os.stat('x').st_size"
    assert run(code, (f"assert f(1) == {lock.MAX_FILE_BYTES}",)) == Verdict(True)


def test_it_ends_with_its_caller(root: Path, scratches: str) -> None:
    """The caller is killed while a program runs that would have had ten minutes."""
    code = (
        "from soka_serve.evaluation.sandbox import Program, run_programs\n"
        "print('here', flush=True)\n"
        "run_programs([Program('while True: pass', ('assert f',))], allow_code_execution=True, timeout_s=600)"
    )
    before = children()
    environment = {**os.environ, "TMPDIR": scratches}
    caller = subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, env=environment)
    assert caller.stdout is not None
    assert caller.stdout.readline() == b"here\n"
    deadline = time.monotonic() + 10
    while len(family := children() - before) < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(family) == 4  # the caller, the sandbox, the program, the tests
    caller.kill()
    caller.wait()
    caller.stdout.close()
    while any(alive(process) for process in family) and time.monotonic() < deadline + 5:
        time.sleep(0.05)
    assert not any(alive(process) for process in family)
    assert list(Path(scratches).glob("soka-sandbox-*")) == []  # the supervisor has outlived the caller for that
