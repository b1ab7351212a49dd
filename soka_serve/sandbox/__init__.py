"""Runs programs that a model wrote against tests, contained, and proves that the tests ran. No torch.

A program runs in a process of its own: resource limits, no_new_privs, Landlock (it reads Python's own files and writes
plain files in a scratch directory), seccomp (no processes, sockets, signals), an empty environment, and another user
where the caller is root. The tests run in a second such process, which alone holds the nonce that proves a pass, and in
which the program's answers are plain data. `docs/evaluating.md` says what this does not protect from.

Nothing runs without consent, and nothing runs where a protection is missing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import queue
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soka_serve.errors import SandboxError
from soka_serve.sandbox.lock import NOBODY
from soka_serve.sandbox.wire import MAX_FRAME_BYTES, WireError, read_frame, write_frame

logger = logging.getLogger(__name__)

CONSENT_VARIABLE = "SOKA_ALLOW_CODE_EXECUTION"
WEAK_VARIABLE = "SOKA_ALLOW_WEAK_SANDBOX"

TIMEOUT_S = 10.0
"""Wall-clock seconds that a program and its tests have together; each of the two has half as many of CPU time."""


@dataclass(frozen=True)
class Program:
    """A program and what it must pass.

    Attributes:
        code: what the model wrote.
        tests: statements, usually asserts, run in order.
        setup: statements before the tests: imports, objects.
        names: the names that setup and tests take from the program. Empty: every name it defines, except those of
            Python's builtins, so that no program replaces `sorted` or `isinstance` in a test.
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


def check_sandbox() -> None:
    """Run one program that is right and one that is wrong, so that a missing protection is known before any work.

    Raises:
        SandboxError: a protection is missing; it is named.
    """
    right, wrong = run_programs(
        [Program("def f(x):\n    return x + 1", ("assert f(1) == 2",)), Program("f = 1", ("assert f(1) == 2",))],
        allow_code_execution=True,
        workers=1,
    )
    if not right.passed or wrong.passed:
        raise SandboxError(f"the sandbox does not work here: {right.reason or 'a wrong program passed'}")


def run_programs(
    programs: Sequence[Program],
    *,
    allow_code_execution: bool,
    timeout_s: float = TIMEOUT_S,
    workers: int | None = None,
) -> list[Verdict]:
    """Run each program against its tests.

    Args:
        programs: run in parallel, the verdicts are in their order.
        allow_code_execution: the caller's word that the person agreed to it.
        timeout_s: for each program with its tests.
        workers: programs at a time; default: as many as there are CPUs for this process.

    Raises:
        SandboxError: no consent, or a protection is missing; nothing is then run.
    """
    if not allow_code_execution:
        raise SandboxError(
            "programs that a model wrote are not run without consent",
            hint="Pass allow_code_execution=True once the person has agreed.",
        )
    if not programs:
        return []
    workers = min(len(programs), workers or _cpus())
    idle: queue.SimpleQueue[_Runner] = queue.SimpleQueue()
    runners = [_Runner() for _ in range(workers)]
    for runner in runners:
        idle.put(runner)

    def run(program: Program) -> Verdict:
        runner = idle.get()
        try:
            return runner.run(program, timeout_s)
        finally:
            idle.put(runner)

    try:
        with ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(run, program) for program in programs]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        for runner in runners:
            runner.close()


def _cpus() -> int:
    # macOS cannot say which CPUs are this process's.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Runner:
    """One sandbox process, started again should it ever end."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._weak = False

    def run(self, program: Program, timeout_s: float) -> Verdict:
        # Less CPU time than wall-clock time: a busy machine does not end a program, an endless loop is ended early.
        job = {"code": program.code, "timeout_s": timeout_s, "cpu_s": max(2, math.ceil(timeout_s / 2))}
        nonce = secrets.token_hex(16)
        tests = {"setup": program.setup, "tests": program.tests, "names": program.names, "nonce": nonce}
        if max(len(json.dumps(part)) for part in (job, tests)) > MAX_FRAME_BYTES // 2:
            return Verdict(False, "the program is too long")
        scratch = Path(tempfile.mkdtemp(prefix="soka-sandbox-"))
        try:
            if os.geteuid() == 0:
                os.chown(scratch, NOBODY, NOBODY)
            answer = self._ask({**job, "scratch": str(scratch)}, tests, timeout_s)
            if "refused" in answer and not self._weak and os.environ.get(WEAK_VARIABLE, "") == "1":
                logger.warning("%s = 1: programs run with resource limits alone (%s)", WEAK_VARIABLE, answer["refused"])
                self.close()
                self._weak = True
                answer = self._ask({**job, "scratch": str(scratch)}, tests, timeout_s)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        if "refused" in answer:
            raise SandboxError(
                f"the sandbox lacks a protection here: {answer['refused']}",
                hint=f"Measure on a Linux machine that has it. {WEAK_VARIABLE}=1 runs programs with resource limits "
                "alone: they then reach your files and your network.",
            )
        # The nonce is known to this process and to the one that ran the tests, after the last of them.
        passed = answer.get("passed") is True and answer.get("nonce") == nonce
        return Verdict(passed, "" if passed else str(answer.get("reason") or "no proof that the tests ran"))

    def _ask(self, job: dict[str, Any], tests: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        process = self._process or self._start()
        # The sandbox ends programs in time itself; this ends the sandbox, should it hang.
        backstop = threading.Timer(timeout_s + 30, process.kill)
        backstop.daemon = True
        backstop.start()
        answer = None
        try:
            for message in (job, tests):
                write_frame(_descriptor(process.stdin), message)
            answer = read_frame(_descriptor(process.stdout))
        except (WireError, BrokenPipeError):
            pass
        finally:
            backstop.cancel()
            if answer is None:
                self.close()
        return answer or {"reason": "the sandbox's process ended"}

    def _start(self) -> subprocess.Popen[bytes]:
        child = Path(__file__).with_name("child.py")
        weak = ["--weak"] if self._weak else []
        # No site-packages, no user folder, no current directory on the path; the same hashes in every run.
        command = [sys.executable, "-s", "-S", "-P", "-B", "-X", "utf8", str(child), *weak]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"PYTHONHASHSEED": "0"},
            start_new_session=True,
            bufsize=0,
        )
        return self._process

    def close(self) -> None:
        """End the process and everything it started."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
        process.wait()


def _descriptor(stream: Any) -> int:
    return int(stream.fileno())
