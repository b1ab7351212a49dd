"""A machine that fails is an error of the run, never a wrong answer: right programs pass, or the run ends with one."""

from __future__ import annotations

import ast
import os
import sys
import tempfile

import pytest

from tests.support.sandboxed import identity, others_python, outside

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")]

RUN = """
import os, sys, traceback
from soka_serve.errors import SandboxError
from soka_serve.evaluation.sandbox import Program, run_programs
programs = [Program("def f(x):\\n    return x + 1", ("assert f(1) == 2",))] * 3
writes = "open('x', 'w').write('kept')\\ndef f():\\n    return open('x').read()"
programs.append(Program(writes, ("assert f() == 'kept'",)))
{before}
try:
    print([v.passed or v.reason for v in run_programs(programs, allow_code_execution=True, timeout_s=5, workers=1)])
except SandboxError as error:
    print(["SandboxError", str(error)])
"""

LIMIT = "import resource\nresource.setrlimit(resource.{0}, ({1}, {1}))"

DROP = """
import ctypes, struct
libc = ctypes.CDLL(None, use_errno=True)
header, have = struct.pack("=Ii", 0x20080522, 0), ctypes.create_string_buffer(24)
assert libc.capget(header, have) == 0
words = list(struct.unpack("=6I", have.raw))
for n in ({}):
    words[0] &= ~(1 << n)
    words[1] &= ~(1 << n)
    libc.prctl(24, ctypes.c_ulong(n), 0, 0, 0)
assert libc.capset(header, struct.pack("=6I", *words)) == 0
"""

FAILURES = {
    "children are reaped by the kernel": "import signal\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)",
    "every signal is ignored": "import signal\nfor n in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:\n"
    "    signal.signal(n, signal.SIG_IGN)",
    "nothing open at 0, 1, 2": "out = os.dup(1)\nos.closerange(0, 3)\n"
    "print = lambda text: os.write(out, repr(text).encode())",
    "a file creation mask of everything": "os.umask(0o777)",
    "no room for files": LIMIT.format("RLIMIT_FSIZE", 0),
    "little memory": LIMIT.format("RLIMIT_AS", 60 << 20),
    "few files": LIMIT.format("RLIMIT_NOFILE", 12),
    "fewer files": LIMIT.format("RLIMIT_NOFILE", 8),
    "no folder for temporary files": "import tempfile\ntempfile.tempdir = '/nowhere'",
    "a folder for temporary files that nobody enters": "import tempfile\ntempfile.tempdir = sys.argv[1]\n"
    "os.chmod(sys.argv[1], 0o700)",
    "a folder for temporary files that is a file": "import tempfile\ntempfile.tempdir = __import__('os').__file__",
}

ROOTS = {
    "no CAP_CHOWN": DROP.format("0,"),
    "no CAP_SETUID": DROP.format("7,"),
    "no CAP_SETUID and no CAP_SETGID": DROP.format("6, 7"),
    "no capability": DROP.format("*range(24), *range(25, 41)"),
    "no CAP_KILL": DROP.format("5,"),
    "a user namespace of one user": "if not os.environ.get('IN'):\n"
    "    os.execve('/usr/bin/unshare', ['unshare', '--user', '--map-root-user', sys.executable, *sys.orig_argv[1:]],"
    " {**os.environ, 'IN': '1'})",
}


def outcome(before: str, scratch: str, python: str = sys.executable, **user: object) -> list[object]:
    """What right programs get where `before` was done to the process that runs them."""
    done = outside([python, "-c", RUN.format(before=before), scratch], env={"TMPDIR": scratch}, **user)
    assert done.returncode == 0, done.stderr
    found = ast.literal_eval(done.stdout)
    assert isinstance(found, list)
    return found


def right_or_refused(found: list[object]) -> bool:
    """Whether all passed, or the run ended with an error that says what is wrong."""
    return found == [True] * 4 or (found[0] == "SandboxError" and len(str(found[1])) > 20)


@pytest.mark.parametrize("name", FAILURES)
def test_a_failing_machine_is_no_wrong_answer(name: str, scratches: str) -> None:
    found = outcome(FAILURES[name], scratches)
    assert right_or_refused(found), found


@pytest.mark.parametrize("name", ROOTS)
def test_a_root_with_less_than_all_is_no_wrong_answer(name: str, scratches: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, who gives up a part of it")
    found = outcome(ROOTS[name], scratches)
    assert right_or_refused(found), found


@pytest.mark.parametrize("most", range(4))
def test_a_fork_that_is_refused_is_no_wrong_answer(most: int) -> None:
    """A user who may have no, one, two or three processes more."""
    if os.geteuid() != 0 or (python := others_python()) is None:
        pytest.skip("needs root, and a Python that another user can run")
    user = 60_000 + most  # of whom there are no processes
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, user, user)
        limit = LIMIT.format("RLIMIT_NPROC", 1 + 1 + most)  # itself, its thread
        found = outcome(limit, folder, python, **identity(user))
    assert right_or_refused(found), found
