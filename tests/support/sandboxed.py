"""Running one program in the sandbox, and what is left of it, for its tests."""

from __future__ import annotations

import os
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from soka_serve.evaluation.sandbox import Program, Verdict, run_programs

TESTS = ("assert f(1) == 2", "assert f(2) == 3")
RIGHT = "def f(x):\n    return x + 1\n"


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


@contextmanager
def nothing_left() -> Iterator[str]:
    """A folder for scratch directories; afterwards no process and no scratch directory is left."""
    processes = children()
    with tempfile.TemporaryDirectory(prefix="soka-tests-") as folder:
        Path(folder).chmod(0o755)
        yield folder
        deadline = time.monotonic() + 5
        while (children() - processes or working_in(folder)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert children() <= processes
        assert working_in(folder) == set()
        assert list(Path(folder).glob("soka-sandbox-*")) == []
