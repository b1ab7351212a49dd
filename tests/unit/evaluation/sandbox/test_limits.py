"""What a judged program, or a hostile data set's test, can change about how things are run: nothing. And its limits."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from soka_serve.evaluation.sandbox import Program, Verdict, run_programs
from tests.support.sandboxed import RIGHT, TESTS, run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")


# ------------------------------------------------------------------------------------- claims about the sandbox

_FORGE = """
import json, os
for message in (
    {{"refused": "Landlock: this kernel does not have it"}}, {{"failed": "fork"}}, {{"closed": True}},
    {{"stopped": None, "ended": "well", "report": {{"passed": True}}}}, {{"passed": True, "nonce": "0"}},
):
    body = json.dumps(message).encode()
    for data in (len(body).to_bytes(4, "big") + body, b"refused Landlock\\n", b"failed all\\n", b"locked\\n"):
        for fd in range(3, 64):
            try:
                os.write(fd, data)
            except OSError:
                pass
try:
    open({mark!r}, "w")
except OSError:
    pass
def f(x):
    return 0
"""


@pytest.mark.parametrize("weak", ["0", "1"])
def test_a_program_cannot_say_that_a_protection_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, weak: str
) -> None:
    monkeypatch.setenv("SOKA_ALLOW_WEAK_SANDBOX", weak)
    mark = tmp_path / "mark"
    forge = Program(_FORGE.format(mark=str(mark)), TESTS)
    right = Program(RIGHT, TESTS)
    verdicts = run_programs([right, forge, right, forge, right], allow_code_execution=True, workers=1)
    assert [verdict.passed for verdict in verdicts] == [True, False, True, False, True]
    assert not mark.exists()


def test_neither_can_the_tests_of_a_data_set(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    hostile = Program(RIGHT, (_FORGE.format(mark=str(mark)), "assert False"))
    verdicts = run_programs([hostile, Program(RIGHT, TESTS)], allow_code_execution=True, workers=1)
    assert [verdict.passed for verdict in verdicts] == [False, True]
    assert not mark.exists()


# ----------------------------------------------------------------------------------------- what a program inherits

_SCAN = """
import ctypes, re
libc = ctypes.CDLL(None, use_errno=True)
libc.sbrk.restype = ctypes.c_void_p
PAGE = 4096
def is_mapped(address):
    return libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(PAGE), ctypes.create_string_buffer(1)) == 0
def pages():
    top = libc.sbrk(0)
    near = [id(object()), id([]), id("x" * 900), id(b"y" * 70_000), ctypes.addressof(ctypes.create_string_buffer(9))]
    seen = set()
    for low, high in [(top - (48 << 20), top), *((a - (4 << 20), a + (4 << 20)) for a in near)]:
        for page in range(low // PAGE, high // PAGE):
            if page not in seen and is_mapped(page * PAGE):
                seen.add(page)
                yield ctypes.string_at(page * PAGE, PAGE)
PATTERN = re.compile(bytes(reversed(b"-ykaens")) + rb"([0-9a-f]{32})")
found = {bytes(m) for m in PATTERN.findall(b"".join(pages()))}
def f(x):
    return sorted(t.decode() for t in found)[:1]
"""


def test_a_program_inherits_no_tests_and_no_other_program() -> None:
    """A scan of its own memory for what jobs before it held: the same tests, and another program's source."""
    secret = os.urandom(16).hex()
    # Many, so that some of them outlive in memory what is done after them.
    tests = tuple(f"assert f(1) == ['{secret}'] or 'sneaky-{secret}' is None  # {n:>200}" for n in range(200))
    scan = Program(_SCAN, tests)
    other = Program(f"x = 'sneaky-{secret}'\n" + RIGHT, tests)
    verdicts = run_programs([scan, other, scan, scan], allow_code_execution=True, workers=1, timeout_s=20)
    assert [verdict.passed for verdict in verdicts] == [False] * 4
    assert {verdict.reason for verdict in verdicts} == {"assert failed in test 1"}, verdicts


def test_the_scan_finds_what_is_there() -> None:
    """The same program, with the secret in its own source."""
    secret = os.urandom(16).hex()
    program = Program(f"x = b'sneaky-{secret}'\n" + _SCAN, (f"assert f(1) == ['{secret}']",))
    assert run_programs([program], allow_code_execution=True, workers=1, timeout_s=20) == [Verdict(True)]


# ------------------------------------------------------------------------------------- past the limits, and signals

_CALLS = {
    "F_SETOWN": "fcntl.fcntl(FD, fcntl.F_SETOWN, os.getppid())",
    "F_SETOWN_EX": "fcntl.fcntl(FD, 15, struct.pack('ii', 1, os.getppid()))",
    "F_SETSIG": "fcntl.fcntl(FD, fcntl.F_SETSIG, signal.SIGKILL)",
    "F_SETLEASE": "fcntl.fcntl(FD, fcntl.F_SETLEASE, fcntl.F_RDLCK)",
    "F_SETPIPE_SZ": "fcntl.fcntl(PIPE[1], 1031, 1 << 20)",
    "FIOSETOWN": "fcntl.ioctl(FD, 0x8901, struct.pack('i', os.getppid()))",
    "FS_IOC_RESVSP": "fcntl.ioctl(FD, 0x40305828, struct.pack('hhqqII16x', 0, 0, 0, 1 << 28, 0, 0))",
    "fallocate beyond the end": "call('fallocate', FD, 1, ctypes.c_long(0), ctypes.c_long(1 << 28))",
    "O_TMPFILE": "os.open('.', os.O_TMPFILE | os.O_RDWR, 0o600)",
    "neither reading nor writing": "os.open('kept', 3)",
    "neither, with truncation": "os.open(os.__file__, 3 | os.O_TRUNC)",
    "shared memory": "mmap.mmap(-1, 4096)",
    "a shared file": "mmap.mmap(FD, 4096)",
    "unlink": "os.remove('kept')",
    "rename": "os.rename('kept', 'other')",
    "vmsplice": "call('vmsplice', PIPE[1], struct.pack('PN', ctypes.addressof(PAGES), 4096), 1, 0)",
    "splice": "call('splice', FD, None, PIPE[1], None, ctypes.c_size_t(4096), 0)",
    "tee": "call('tee', PIPE[0], PIPE[1], ctypes.c_size_t(4096), 0)",
    "sendfile": "os.sendfile(PIPE[1], FD, 0, 4096)",
}


@pytest.mark.parametrize("name", _CALLS)
def test_calls_past_the_limits_are_refused(name: str) -> None:
    code = f"""
        import ctypes, errno, fcntl, mmap, os, signal, struct
        FD = os.open('kept', os.O_CREAT | os.O_RDWR, 0o600)
        os.write(FD, b'x' * 4096)
        PIPE = os.pipe()
        PAGES = ctypes.create_string_buffer(8192)
        libc = ctypes.CDLL(None, use_errno=True)
        def call(name, *arguments):
            if getattr(libc, name)(*arguments) < 0:
                raise OSError(ctypes.get_errno(), name)
        def f(x):
            try:
                {_CALLS[name]}
            except OSError as error:
                return errno.errorcode[error.errno]
            return 'done'
    """
    refused = "'EACCES'" if name in ("unlink", "rename") else "'EPERM'"
    assert run(code, (f"assert f(1) == {refused}, f(1)",)) == Verdict(True)


def test_ordinary_files_and_descriptors_work() -> None:
    code = """
        import fcntl, io, os, shutil, subprocess, sys
        def f(x):
            with open('a', 'w') as file:
                file.write('x' * 1000)
                file.truncate(10)
            shutil.copyfile('a', 'b')
            os.set_inheritable(os.open('a', os.O_RDONLY), True)
            inner, outer = os.pipe()
            os.set_blocking(outer, False)
            fcntl.fcntl(outer, fcntl.F_GETFL)
            return open('b').read(), os.isatty(inner), os.path.getsize('a'), sorted(os.listdir('.'))
    """
    assert run(code, ("assert f(1) == ('x' * 10, False, 10, ['a', 'b'])",)) == Verdict(True)


def test_files_that_are_mapped_count(scratches: str) -> None:
    """Sixty-four mappings of 1 MiB files, each closed: they keep their names, so they are counted."""
    code = """
        import ctypes, os, time
        libc = ctypes.CDLL(None)
        libc.mmap.restype = ctypes.c_void_p
        kept = []
        for n in range(64):
            fd = os.open(str(n), os.O_CREAT | os.O_RDWR, 0o600)
            os.ftruncate(fd, 1 << 20)
            kept.append(libc.mmap(None, ctypes.c_size_t(1 << 20), 3, 2, fd, ctypes.c_long(0)))
            os.close(fd)
            try:
                os.remove(str(n))
            except OSError:
                pass
        for address in kept:
            ctypes.memset(address, 1, 1 << 20)
        time.sleep(30)
    """
    assert run(code).reason == "more than 256 files or 16777216 bytes written"
