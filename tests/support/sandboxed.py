"""Running one program in the sandbox, and what is left of it, for its tests; other users, and disks of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from soka_serve.evaluation.sandbox import Program, Verdict, run_programs

ROOT = Path(__file__).resolve().parents[2]
TESTS = ("assert f(1) == 2", "assert f(2) == 3")
RIGHT = "def f(x):\n    return x + 1\n"
USER = 65533
"""An ordinary user, of whom there are no processes."""


def identity(user: int = USER) -> dict[str, Any]:
    """The arguments of `subprocess` for a user."""
    return {"user": user, "group": user, "extra_groups": []}


def outside(command: Sequence[str], **more: Any) -> subprocess.CompletedProcess[str]:
    """Run a command with this package, and nothing else of this environment, in the root folder."""
    environment = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"} | more.pop("env", {})
    options = {"cwd": "/", "env": environment, "timeout": 100, **more}
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


@cache
def others_python() -> str | None:
    """A Python that another user than root can run with this package; this one where root does not run the tests."""
    if os.geteuid() != 0:
        return sys.executable
    code = "import sys, soka_serve.evaluation.sandbox; sys.exit(sys.version_info < (3, 11))"
    for python in (sys.executable, "/usr/bin/python3"):
        with suppress(OSError):
            if outside([python, "-c", code], **identity()).returncode == 0:
                return python
    return None


@contextmanager
def mounted_disk(image: Path, place: str | Path) -> Iterator[bool]:
    """An ext4 file system of 512 MiB at `place`; yields whether it could be made and mounted."""
    with image.open("wb") as file:
        file.truncate(512 << 20)
    try:
        for command in (["mkfs.ext4", "-q", "-m", "0", "-E", "lazy_itable_init=1"], ["mount", "-o", "loop"]):
            subprocess.run([*command, image, *[place] * (command[0] == "mount")], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        yield False
        return
    try:
        yield True
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


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
