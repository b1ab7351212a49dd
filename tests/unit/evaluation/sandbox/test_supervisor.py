"""The supervisor ends, or can make no process: an error of the run. And the folders that kills leave."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from soka_serve.errors import SandboxError
from soka_serve.evaluation.sandbox import Program, Verdict, run_programs
from soka_serve.evaluation.sandbox.runner import Runner
from tests.support.sandboxed import RIGHT, TESTS, identity, others_python, outside

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")


def test_no_process_can_be_made() -> None:
    """The supervisor's own limit on processes, lowered while it waits; root is not held to one."""
    script = """
import resource, sys
from soka_serve.errors import SandboxError
from soka_serve.evaluation.sandbox.runner import Program, Runner
runner = Runner(weak=False)
assert runner.missing_protection() is None
resource.prlimit(runner._process.pid, resource.RLIMIT_NPROC, (1, 1))
try:
    print(runner.run(Program("def f(x):\\n    return x + 1", ("assert f(1) == 2",)), 5))
except SandboxError as error:
    print(error.message)
runner.close()
"""
    if (python := others_python()) is None:
        pytest.skip("this test is run by root, and no Python and package lie where others may enter")
    done = outside([python, "-c", script], **(identity(65531) if os.geteuid() == 0 else {}))
    assert done.stdout == (
        "the sandbox cannot run programs here: no process can be made: Resource temporarily unavailable\n"
    ), done.stderr


def test_a_supervisor_that_always_ends_is_the_machines_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    start = Runner._start

    def start_and_kill(self: Runner) -> None:
        start(self)
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    monkeypatch.setattr(Runner, "_start", start_and_kill)
    with pytest.raises(SandboxError, match="its process ends at once"):
        run_programs([Program(RIGHT, TESTS)], allow_code_execution=True)


@pytest.mark.parametrize(("times", "passed"), [(1, True), (2, False)])
def test_a_supervisor_that_ends_is_started_again(monkeypatch: pytest.MonkeyPatch, times: int, passed: bool) -> None:
    """Once may be an accident. Twice is the program's doing, where a program that is known to be right runs well."""
    stock, runs = Runner.run, []

    def run(self: Runner, program: Program, timeout_s: float) -> Verdict:
        runs.append(program)
        if len(runs) <= times:
            if self._process is None:
                self._start()
            assert self._process is not None
            self._process.kill()
            self._process.wait()
        return stock(self, program, timeout_s)

    monkeypatch.setattr(Runner, "run", run)
    (verdict,) = run_programs([Program(RIGHT, TESTS)], allow_code_execution=True)
    assert verdict == Verdict(passed, "" if passed else "the sandbox's process ended over this program, twice")


def test_a_disk_that_is_almost_full(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tempfile.gettempdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=40 << 20))
    with pytest.raises(SandboxError, match="has 41943040 bytes free, expected at least 67108864"):
        run_programs([Program(RIGHT, TESTS)], allow_code_execution=True)


def test_folders_whose_processes_were_killed_are_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed, alive, young, foreign = (tmp_path / f"soka-sandbox-{name}" for name in ("dead", "alive", "young", "link"))
    for folder in (killed, alive, young):
        (folder / "1").mkdir(parents=True)
        (folder / "1" / "x").write_text("x")
    foreign.symlink_to(tmp_path.parent)
    hour_ago = time.time() - 3600
    for folder in (killed, alive):
        os.utime(folder, (hour_ago, hour_ago))
    holder = subprocess.Popen(["flock", str(alive), "sleep", "60"], start_new_session=True)
    try:
        while subprocess.run(["flock", "--nonblock", str(alive), "true"], check=False).returncode == 0:
            time.sleep(0.02)
        assert run_programs([Program(RIGHT, TESTS)], allow_code_execution=True)[0].passed
    finally:
        os.killpg(holder.pid, 9)
        holder.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in (alive, young, foreign))


@pytest.mark.parametrize("name", ["notes.txt", "data/notes.txt", "1/data/notes.txt"])
def test_a_folder_of_the_users_with_such_a_name_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    file = tmp_path / "soka-sandbox-results" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    hour_ago = time.time() - 3600
    os.utime(tmp_path / "soka-sandbox-results", (hour_ago, hour_ago))
    assert run_programs([Program(RIGHT, TESTS)], allow_code_execution=True)[0].passed
    assert file.read_text() == "mine"
