"""Programs that attack the machine, and what must not have happened: `tests/support/hostile_effects.py` has them."""

from __future__ import annotations

import json
import os
import platform
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from soka_serve.evaluation.sandbox import Program, Verdict, run_programs
from tests.support.hostile import SPIES
from tests.support.hostile_answers import ANSWERS, FRAMES, SLOW, sending
from tests.support.hostile_effects import ATTACKS
from tests.support.hostile_world import harms
from tests.support.sandboxed import RIGHT, TESTS, identity, mounted_disk, others_python, outside, run

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")]

if platform.machine() != "x86_64":
    ATTACKS = {}  # they name system calls by x86-64's numbers


PARTS = 8
"""Into how many tests the attacks are divided where one process makes several."""


@pytest.fixture
def own_disk(scratches: str, tmp_path: Path) -> Iterator[str | None]:
    """The folder for scratch directories as a file system of its own; None where none can be mounted."""
    with mounted_disk(tmp_path / "disk", scratches) as mounted:
        if mounted:
            Path(scratches).chmod(0o755)
        yield scratches if mounted else None


@pytest.mark.parametrize("name", [name for name, attack in ATTACKS.items() if not attack.scratch])
def test_nothing_happens(name: str) -> None:
    assert harms(ATTACKS[name]) == []


@pytest.mark.parametrize("name", [name for name, attack in ATTACKS.items() if attack.scratch])
def test_the_disk_is_not_taken(name: str, own_disk: str | None) -> None:
    assert harms(ATTACKS[name], scratch=own_disk) == []


@pytest.mark.parametrize("part", range(PARTS))
def test_nothing_happens_to_a_user_without_privileges(part: int) -> None:
    """The same, run by a user whose programs run as that user."""
    if os.geteuid() != 0:
        pytest.skip("the other tests are run by such a user already")
    if (python := others_python()) is None:
        pytest.skip("no Python that another user can run")
    done = outside([python, "-m", "tests.support.hostile_world", "--part", str(part), str(PARTS)], **identity())
    found = dict(json.loads(line) for line in done.stdout.splitlines())
    wanted = [name for name, attack in list(ATTACKS.items())[part::PARTS] if not attack.scratch]
    assert list(found) == wanted, done.stderr
    assert {name: harm for name, harm in found.items() if harm} == {}


# ----------------------------------------------------------------------------------------------------- the pipe


@pytest.mark.parametrize("name", FRAMES)
def test_no_frame_of_a_program_changes_how_anything_is_run(name: str) -> None:
    """Neither its own verdict nor those of programs before and after it."""
    programs = [Program(RIGHT, TESTS), Program(sending(FRAMES[name]), TESTS), Program(RIGHT, TESTS)]
    verdicts = run_programs(programs, allow_code_execution=True, timeout_s=5, workers=1)
    assert [v.passed for v in verdicts] == [True, False, True]


def test_a_forged_refusal_does_not_switch_the_sandbox_off(monkeypatch: pytest.MonkeyPatch, outside: Path) -> None:
    monkeypatch.setenv("SOKA_ALLOW_WEAK_SANDBOX", "1")
    mark = f"try:\n    open({str(outside / 'mark')!r}, 'w')\nexcept OSError:\n    pass\n"
    programs = [Program(code, TESTS) for code in (sending(FRAMES["refused"]) + mark, mark + RIGHT)]
    verdicts = run_programs(programs, allow_code_execution=True, timeout_s=5, workers=1)
    assert list(outside.iterdir()) == []
    assert [v.passed for v in verdicts] == [False, True]


@pytest.mark.parametrize("name", [*ANSWERS, *SLOW])
def test_no_answer_passes_or_lasts(name: str) -> None:
    code, test = (ANSWERS | SLOW)[name]
    started = time.monotonic()
    programs = [Program(code, (test,)), Program(RIGHT, TESTS)]
    verdicts = run_programs(programs, allow_code_execution=True, timeout_s=1 if name in SLOW else 1.5, workers=1)
    assert [v.passed for v in verdicts] == [False, True]
    assert time.monotonic() - started < 4


def test_a_reason_is_one_printable_line() -> None:
    r"""It reaches terminals, logs and files in UTF-8."""
    for text in ("\x1b[2J\x1b]0;title\x07", "a\nERROR a forged line", "\r\x08\x00", "\u202e\u2028", "\ud800"):
        reason = run(f"raise ValueError({text!r})").reason
        assert "ValueError" in reason
        assert reason.isprintable(), ascii(reason)
        reason.encode()


# ------------------------------------------------------------------------------------------------- the tests' text


@pytest.mark.parametrize("name", SPIES)
def test_earlier_programs_and_tests_are_not_found(name: str) -> None:
    """Several samples of one problem, which is what pass@k runs: the last one looks for the others' tests and text."""
    draw = random.SystemRandom()
    secret = draw.randrange(10**8, 10**9)
    inputs = [draw.randrange(10**8, 10**9) for _ in range(3)]
    # As long as tests of data sets are: short texts are soon overwritten.
    tests = tuple(f"assert f({x}) == {x * 3 + secret}, {'what f makes of a number ' * 8!r}" for x in inputs)
    right = f"def f(x):\n    return x * 3 + {secret}\n# {'as long as answers of models are ' * 20}"
    programs = [*[Program(right, tests)] * 4, Program(SPIES[name], tests)]
    verdicts = run_programs(programs, allow_code_execution=True, timeout_s=4, workers=1)
    assert verdicts[:4] == [Verdict(True)] * 4
    assert not verdicts[4].passed
