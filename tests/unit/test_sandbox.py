"""Hostile programs: each is contained, and none passes. Tests look for what a program would have done."""

from __future__ import annotations

import os
import re
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from soka_serve.errors import SandboxError
from soka_serve.sandbox import Program, Verdict, check_sandbox, lock, require_consent, run_programs, wire
from tests.hostile import TRICKS

TESTS = ("assert f(1) == 2", "assert f(2) == 3")
RIGHT = "def f(x):\n    return x + 1\n"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")


def run(code: str, tests: tuple[str, ...] = TESTS, *, timeout_s: float = 5, setup: str = "") -> Verdict:
    program = Program(textwrap.dedent(code), tests, setup)
    return run_programs([program], allow_code_execution=True, timeout_s=timeout_s, workers=1)[0]


def children() -> set[int]:
    """All living processes under this one, the grandchildren too."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents[int(folder.name)] = int(fields[1])
    known, grown = {os.getpid()}, True
    while grown:
        more = {pid for pid, parent in parents.items() if parent in known} - known
        grown = bool(more)
        known |= more
    return known - {os.getpid()}


def working_in(folder: str) -> set[int]:
    """Living processes whose current directory is, or was, below a folder."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str((process / "cwd").readlink()).startswith(folder) and alive(int(process.name)):
                found.add(int(process.name))
        except OSError:
            continue
    return found


def alive(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


@pytest.fixture(autouse=True)
def scratches(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where scratch directories are made; no process and no scratch directory survives a test."""
    processes = children()
    with tempfile.TemporaryDirectory(prefix="soka-tests-") as folder:
        Path(folder).chmod(0o755)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield folder
        deadline = time.monotonic() + 5
        while (children() - processes or working_in(folder)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert children() <= processes
        assert working_in(folder) == set()
        assert list(Path(folder).glob("soka-sandbox-*")) == []


@pytest.fixture
def outside() -> Iterator[Path]:
    """A folder in which any user may do anything: what keeps a program out of it is the sandbox."""
    with tempfile.TemporaryDirectory(prefix="soka-outside-", dir="/tmp") as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


# ------------------------------------------------------------------------------------------------ what shall work


def test_right_and_wrong_programs_are_told_apart_in_order() -> None:
    programs = [Program(RIGHT if index % 3 else "def f(x):\n    return x", TESTS) for index in range(9)]
    verdicts = run_programs(programs, allow_code_execution=True, workers=2)
    assert [v.passed for v in verdicts] == [bool(index % 3) for index in range(9)]
    assert verdicts[0].reason == "assert failed in test 1"


@pytest.mark.parametrize(
    ("code", "test"),
    [
        ("import math\ndef f(x):\n    return math.sqrt(x)", "assert f(4.0) == 2.0"),
        ("def f():\n    return {1: [(2, {3}), '\\ud800', b'x', 2j, None, 10**400]}", "assert f()[1][-1] == 10**400"),
        ("import collections\ndef f(x):\n    return collections.Counter(x)", "assert f('aab') == {'a': 2, 'b': 1}"),
        ("def f(n):\n    for i in range(n):\n        yield i", "assert list(f(3)) == [0, 1, 2]"),
        ("class P:\n    def __init__(self, x):\n        self.x = x\ndef f(p):\n    return p.x", "assert f(P(3)) == 3"),
        ("def f(kind):\n    return [x for x in (1, 'a') if isinstance(x, kind)]", "assert f(int) == [1]"),
        ("import re\ndef f(x):\n    return re.match('a', x)", "assert f('ab') and not f('b')"),
        ("def f(a, *, b=1):\n    return a - b", "assert f(3, b=2) == 1"),
        ("open('x', 'w').write('kept')\ndef f():\n    return open('x').read()", "assert f() == 'kept'"),
        ("import datetime, decimal\ndef f():\n    return datetime.date(2024, 1, 2), decimal.Decimal('0.1')",
         "assert str(f()[0]) == '2024-01-02' and str(f()[1]) == '0.1'"),
    ],
)  # fmt: skip
def test_ordinary_programs_pass(code: str, test: str) -> None:
    assert run(code, (test,)) == Verdict(True)


def test_objects_of_the_program_can_be_built_by_the_tests() -> None:
    code = """
        class Node:
            def __init__(self, value):
                self.value, self.left, self.right = value, None, None
        def total(node):
            return 0 if node is None else node.value + total(node.left) + total(node.right)
    """
    setup = "root = Node(1)\nroot.left = Node(2)\nroot.left.right = Node(3)"
    assert run(code, ("assert total(root) == 6", "assert root.left.value == 2"), setup=setup).passed
    assert not run(code, ("assert total(root) == 7",), setup=setup).passed


def test_a_name_of_pythons_own_is_the_programs_only_where_it_is_asked_for() -> None:
    code = "def sum(a, b):\n    return a + b"
    test = ("assert sum(10, 15) == 25",)
    asked = Program(code, test, names=("sum",))
    assert run_programs([asked], allow_code_execution=True)[0].passed
    assert not run_programs([Program(code, test)], allow_code_execution=True)[0].passed


# -------------------------------------------------------------------------------------------------- cheating


@pytest.mark.parametrize("trick", TRICKS)
def test_no_trick_passes(trick: str) -> None:
    assert not run(TRICKS[trick]).passed


def test_names_used_by_asserts_cannot_be_replaced() -> None:
    code = """
        def f(x):
            return [3, 1]
        def sorted(x):
            return [1, 2]
        def set(x):
            return frozenset()
        len = sum = all = lambda *a: 0
        class math:
            isclose = staticmethod(lambda *a: True)
    """
    assert not run(code, ("assert sorted(f(1)) == [1, 2]",)).passed
    assert not run(code, ("assert set(f(1)) == set()",)).passed
    assert not run(code, ("assert math.isclose(f(1)[0], 7)",), setup="import math").passed
    assert run(code, ("assert sorted(f(1)) == [1, 3] and len(f(1)) == 2",)).passed


def test_a_module_that_the_program_changed_is_not_the_tests_module() -> None:
    code = "import math\nmath.isclose = lambda *a: True\ndef f(x):\n    return 1.0"
    assert not run(code, ("assert math.isclose(f(1), 5.0)",)).passed


def test_the_nonce_is_what_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report without the run's own nonce is no pass: proof that `passed` alone is not believed."""
    from soka_serve.sandbox import _Runner

    monkeypatch.setattr(_Runner, "_ask", lambda *a: {"passed": True, "nonce": "0" * 32})
    assert run(RIGHT) == Verdict(False, "no proof that the tests ran")


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


def test_a_fork_bomb_stays_one_process() -> None:
    code = "import os\nmade = 0\nfor _ in range(10000):\n    try:\n        os.fork()\n        made += 1\n"
    code += "    except OSError:\n        pass\n"
    assert run(code + "def f(x):\n    return made", ("assert f(1) == 0",)).passed


def test_no_daemon_outlives(outside: Path) -> None:
    code = f"""
        import os, time
        try:
            pid = os.fork()
            if pid == 0:
                os.setsid()
                time.sleep(3)
                open({str(outside / "daemon")!r}, "w").write("here")
        except OSError:
            pass
        try:
            os.setsid()
        except OSError:
            pass
        time.sleep(60)
    """
    assert not run(code, timeout_s=1).passed
    assert not (outside / "daemon").exists()


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
        "from soka_serve.sandbox import Program, run_programs\n"
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
    (left,) = Path(scratches).glob("soka-sandbox-*")  # who makes it removes it, unless killed
    left.rmdir()


# -------------------------------------------------------------------------------------- consent and protections


def test_nothing_runs_without_consent(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SandboxError, match="without consent"):
        run_programs([Program(RIGHT, TESTS)], allow_code_execution=False)
    monkeypatch.delenv("SOKA_ALLOW_CODE_EXECUTION", raising=False)
    with pytest.raises(SandboxError, match="expected SOKA_ALLOW_CODE_EXECUTION = 1, got nothing"):
        require_consent()
    monkeypatch.setenv("SOKA_ALLOW_CODE_EXECUTION", "yes")
    with pytest.raises(SandboxError, match="got yes"):
        require_consent()
    monkeypatch.setenv("SOKA_ALLOW_CODE_EXECUTION", "1")
    require_consent()


def test_a_missing_protection_is_named_and_nothing_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, outside: Path
) -> None:
    """A real child whose lock finds no Landlock: the program's mark is not made, the error names what is missing."""
    import soka_serve.sandbox as sandbox

    folder = tmp_path / "sandbox"
    folder.mkdir()
    for name in ("child", "lock", "wire"):
        text = Path(sandbox.__file__).with_name(f"{name}.py").read_text()
        if name == "lock":
            assert "version = landlock_version()" in text
            text = text.replace("version = landlock_version()", "version = 0")
        (folder / f"{name}.py").write_text(text)
    monkeypatch.setattr(sandbox, "__file__", str(folder / "__init__.py"))
    with pytest.raises(SandboxError, match="Landlock: this kernel does not have it") as caught:
        run(f"open({str(outside / 'mark')!r}, 'w')")
    assert "SOKA_ALLOW_WEAK_SANDBOX" in str(caught.value.hint)
    assert not (outside / "mark").exists()
    with pytest.raises(SandboxError, match="Landlock"):
        check_sandbox()
    monkeypatch.setenv("SOKA_ALLOW_WEAK_SANDBOX", "1")
    assert run(RIGHT).passed


def test_the_system_call_numbers_are_the_kernels() -> None:
    """Against the kernel's headers, where they are installed."""
    headers = {0: Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), 1: Path("/usr/include/asm-generic/unistd.h")}
    there = {column: file for column, file in headers.items() if file.is_file()}
    if not there:
        pytest.skip("no kernel headers")
    for column, file in there.items():
        known = {name: int(n) for name, n in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", file.read_text())}
        for name, numbers in lock._REFUSED.items():
            if name in known:
                assert numbers[column] == known[name], name
            else:
                assert numbers[column] is None or numbers[column] > max(known.values()), name


def test_the_filter_jumps_inside_itself() -> None:
    for machine in ("x86_64", "aarch64"):
        program = lock._program(machine)
        assert len(program) < 4096
        for index, (code, yes, no, _) in enumerate(program):
            if code != lock._RET:
                assert index + 1 + max(yes, no) < len(program)
        assert program[-1][0] == lock._RET


UNPRIVILEGED = """
import os, sys
from soka_serve.sandbox import Program, check_sandbox, run_programs
check_sandbox()
attempts = ["os.fork()", "open('/etc/passwd')", "open(P, 'w')", "os.remove(P)", "os.chmod(P, 0)", "os.truncate(P, 0)",
            "os.kill(os.getppid(), 9)", "__import__('socket').socket()", "open('/proc/self/environ')"]
code = f"import os\\nP = {sys.argv[1]!r}\\nA = {attempts!r}\\ndef f(i):\\n    try:\\n        eval(A[i])\\n"
code += "    except OSError:\\n"
code += "        return 'refused'"
tests = tuple(f"assert f({i}) == 'refused'" for i in range(len(attempts)))
(verdict,) = run_programs([Program(code, tests)], allow_code_execution=True)
print(os.getuid(), verdict.passed, verdict.reason)
"""


def test_it_needs_no_privilege(root: Path) -> None:
    """The whole sandbox, run by a user who is not root and owns the file outside."""
    python = next((p for p in (sys.executable, "/usr/bin/python3") if os.geteuid() or enters(p)), None)
    if python is None:
        pytest.skip("this test is run by root, and every Python here lies where only root may enter")
    with tempfile.TemporaryDirectory() as folder:
        mine = Path(folder, "mine")
        mine.write_text("kept")
        user: dict[str, Any] = {}
        if os.geteuid() == 0:
            user = {"user": 65533, "group": 65533, "extra_groups": []}
            for place in (Path(folder), mine):
                os.chown(place, 65533, 65533)
        done = subprocess.run(
            [python, "-c", UNPRIVILEGED, str(mine)],
            **user,
            env={"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"},
            cwd="/",
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.stdout == f"{65533 if user else os.geteuid()} True \n", done.stdout + done.stderr
        assert mine.read_text() == "kept"


def enters(python: str) -> bool:
    """Whether another user than root can run this interpreter."""
    try:
        command = [python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
        return subprocess.run(command, user=65533, group=65533, extra_groups=[], env={}, check=False).returncode == 0
    except OSError:
        return False


def test_frames_from_a_program_are_not_believed() -> None:
    for data in ({"x": 1}, {"l": 3}, {"h": "x"}, {"k": "print"}, {"s": [{"l": []}]}, [1], {"l": [], "t": []}):
        with pytest.raises(wire.WireError):
            wire.decode(data, lambda number: number)
