"""What the sandbox lets pass, what it does not, consent, and missing protections."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from fractions import Fraction
from pathlib import Path

import pytest

from soka_serve.errors import SandboxError
from soka_serve.evaluation.sandbox import Program, Verdict, check_sandbox, require_consent, run_programs, runner, wire
from soka_serve.evaluation.sandbox import confine as lock
from soka_serve.io import child_signals
from tests.support.hostile import TRICKS
from tests.support.sandboxed import RIGHT, TESTS, USER, identity, others_python, outside, run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")


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
    monkeypatch.setattr(runner._Pipes, "report", lambda self: {"passed": True, "nonce": "0" * 32})
    assert run(RIGHT) == Verdict(False, "no proof that the tests ran")


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
    folder = tmp_path / "evaluation" / "sandbox"
    folder.mkdir(parents=True)
    for file in Path(runner.__file__).parent.glob("*.py"):
        text = file.read_text()
        if file.name == "confine.py":
            assert "version = landlock_version()" in text
            text = text.replace("version = landlock_version()", "version = 0")
        (folder / file.name).write_text(text)
    (tmp_path / "io").mkdir()
    shutil.copy(child_signals.__file__, tmp_path / "io")
    monkeypatch.setattr(runner, "__file__", str(folder / "runner.py"))
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
from soka_serve.evaluation.sandbox import Program, check_sandbox, run_programs
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


def test_it_needs_no_privilege() -> None:
    """The whole sandbox, run by a user who is not root and owns the file outside."""
    if (python := others_python()) is None:
        pytest.skip("this test is run by root, and every Python here lies where only root may enter")
    with tempfile.TemporaryDirectory() as folder:
        mine = Path(folder, "mine")
        mine.write_text("kept")
        user = identity() if os.geteuid() == 0 else {}
        for place in (Path(folder), mine) if user else ():
            os.chown(place, USER, USER)
        done = outside([python, "-c", UNPRIVILEGED, str(mine)], **user)
        assert done.stdout == f"{USER if user else os.geteuid()} True \n", done.stdout + done.stderr
        assert mine.read_text() == "kept"


def test_frames_from_a_program_are_not_believed() -> None:
    for data in ({"x": 1}, {"l": 3}, {"h": "x"}, {"k": "print"}, {"s": [{"l": []}]}, [1], {"l": [], "t": []}):
        with pytest.raises(wire.WireError):
            wire.decode(data, lambda number: number)


def test_values_that_take_years_to_build_are_none() -> None:
    """Numbers of one hash are compared each with each other; a fraction may be a power of ten with a billion digits."""
    for tag in "szd":
        numbers = [{"i": hex(k * (2**61 - 1))} for k in range(2000)]
        with pytest.raises(wire.WireError):
            wire.decode({tag: [[number, None] for number in numbers] if tag == "d" else numbers}, lambda number: number)
        assert len(wire.decode({tag: [[k, k] for k in range(2000)] if tag == "d" else [*range(2000)]}, int)) == 2000
    for text in ("1e3", "1e1000000000", "1.5", " 1/2", "1_0/2"):
        with pytest.raises(wire.WireError):
            wire.decode({"F": text}, lambda number: number)
    for value in (Fraction(-1, 3), Fraction(4), {-1, -2}, frozenset({0, 2**61 - 1}), {-1: 0, -2: 0}):
        assert wire.decode(wire.encode(value, id), lambda number: number) == value
