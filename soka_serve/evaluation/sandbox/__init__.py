"""Runs programs that a model wrote against tests, contained, and proves that the tests ran.

A program runs in a process of its own: resource limits, no_new_privs, Landlock (it reads Python's own files and writes
plain files in a scratch directory), seccomp (no processes, sockets, signals), an empty environment, and another user
where the caller is root. The tests run in a second such process, which alone holds the nonce that proves a pass, and in
which the program's answers are plain data. `docs/evaluating.md` says what this does not protect from.

Nothing runs without consent, and nothing runs where a protection is missing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from soka_serve.errors import SandboxError
from soka_serve.evaluation.sandbox.runner import (
    EndedError,
    Program,
    Runner,
    Verdict,
    cannot_run,
    check_room,
    remove_abandoned,
)

logger = logging.getLogger(__name__)

CONSENT_VARIABLE = "SOKA_ALLOW_CODE_EXECUTION"
WEAK_VARIABLE = "SOKA_ALLOW_WEAK_SANDBOX"

TIMEOUT_S = 20.0
"""Wall-clock seconds that a program and its tests have together; each of the two has half as many of CPU time."""


def require_consent() -> None:
    """Check that the person has agreed to run programs that a model writes.

    Raises:
        SandboxError: `SOKA_ALLOW_CODE_EXECUTION` is not 1.
    """
    value = os.environ.get(CONSENT_VARIABLE, "")
    if value != "1":
        raise SandboxError(
            f"this task runs programs that the model writes; expected {CONSENT_VARIABLE} = 1, got {value or 'nothing'}",
            hint=f"Read docs/evaluating.md, then set {CONSENT_VARIABLE}=1.",
        )


_RIGHT = Program("def f(x):\n    return x + 1", ("assert f(1) == 2",))
_WRONG = Program("f = 1", ("assert f(1) == 2",))


def check_sandbox() -> None:
    """Run one program that is right and one that is wrong, so that a missing protection is known before any work.

    Raises:
        SandboxError: a protection is missing; it is named.
    """
    right, wrong = run_programs([_RIGHT, _WRONG], allow_code_execution=True, workers=1)
    if not right.passed or wrong.passed:
        raise SandboxError(f"the sandbox does not work here: {right.reason or 'a wrong program passed'}")


def run_programs(
    programs: Sequence[Program], *, allow_code_execution: bool, timeout_s: float = TIMEOUT_S, workers: int | None = None
) -> list[Verdict]:
    """Run each program against its tests.

    Args:
        programs: run in parallel, the verdicts are in their order.
        allow_code_execution: the caller's word that the person agreed to it.
        timeout_s: for each program with its tests.
        workers: programs at a time; default: as many as there are CPUs for this process.

    Raises:
        SandboxError: no consent, or a protection is missing: nothing is then run. Or this machine cannot run programs
            (no process can be made, no room on the disk): then there are no verdicts.
    """
    if not allow_code_execution:
        raise SandboxError(
            "programs that a model wrote are not run without consent",
            hint="Pass allow_code_execution=True once the person has agreed.",
        )
    if not programs:
        return []
    try:
        remove_abandoned(Path(tempfile.gettempdir()))
        return _run_all(programs, timeout_s, workers)
    except OSError as error:
        raise cannot_run(str(error)) from error
    except RuntimeError as error:
        if "start new thread" not in str(error):
            raise
        raise cannot_run(str(error)) from error


def _run_all(programs: Sequence[Program], timeout_s: float, workers: int | None) -> list[Verdict]:
    workers = min(len(programs), workers or _cpus())
    check_room(Path(tempfile.gettempdir()), workers)
    first = _runner()
    idle: queue.SimpleQueue[Runner] = queue.SimpleQueue()
    runners = [first, *(Runner(weak=first.weak) for _ in range(workers - 1))]
    for runner in runners:
        idle.put(runner)

    def run(program: Program) -> Verdict:
        runner = idle.get()
        try:
            return _judge(runner, program, timeout_s)
        finally:
            idle.put(runner)

    try:
        with ThreadPoolExecutor(workers) as pool:
            try:
                futures = [pool.submit(run, program) for program in programs]
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        for runner in runners:
            runner.close()


def _runner() -> Runner:
    """A runner whose locking step has been tried: with all protections, or weak where a person has said so.

    No program has run by then, and nothing that happens later can change the answer.

    Raises:
        SandboxError: a protection is missing, and the person has not said that programs may run without.
    """
    runner = Runner(weak=False)
    missing = runner.missing_protection()
    if missing is None:
        return runner
    runner.close()
    if os.environ.get(WEAK_VARIABLE, "") == "1":
        logger.warning("%s = 1: programs run with resource limits alone (%s)", WEAK_VARIABLE, missing)
        return Runner(weak=True)
    raise SandboxError(
        f"the sandbox lacks a protection here: {missing}",
        hint=f"Measure on a Linux machine that has it. {WEAK_VARIABLE}=1 runs programs with resource limits "
        "alone: they then reach your files and your network.",
    )


def _judge(runner: Runner, program: Program, timeout_s: float) -> Verdict:
    for _ in range(2):
        with contextlib.suppress(EndedError):
            return runner.run(program, timeout_s)
    # The supervisor ended twice. A program that is known to be right tells whether it was the program or the machine.
    try:
        sound = runner.run(_RIGHT, TIMEOUT_S).passed
    except EndedError:
        sound = False
    if not sound:
        raise cannot_run("its process ends, whatever the program")
    return Verdict(False, "the sandbox's process ended over this program, twice")


def _cpus() -> int:
    # macOS cannot say which CPUs are this process's.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
