"""What several modules need alike, made once in a test run: by the first process that asks, for all of them."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.builds import run_cli

# A skill that nobody takes for the base's, after few steps.
SKILL = """\
schema = 1
[base]
builtin = "tiny"
[[adapt]]
init = "weights"
scale = 1.0
rank = {{ policy = "fixed", rank = 4 }}
[train]
learning_rate = 0.33
steps = {steps}
batch_size = 16
max_length = 128
data = {{ builtin = "{family}" }}
[output]
write = ["adapter", "merged"]
"""
STEPS = {"math": 150, "code": 60}
PROBLEMS = 100


def skill_manifest(family: str, more: str = "") -> str:
    """The manifest of `copy_skill`'s build, with further tables, of which its adapter does not depend."""
    return SKILL.format(family=family, steps=STEPS[family]) + more


def copy_skill(factory: pytest.TempPathFactory, family: str, folder: Path) -> None:
    """Copy FAMILY.toml and build/, where it is built and was checked on PROBLEMS problems, into a folder."""

    def build(made: Path) -> None:
        (made / f"{family}.toml").write_text(skill_manifest(family, f"[eval]\nlimit = {PROBLEMS}\n"))
        done = run_cli("build", f"{family}.toml", cwd=made, timeout_s=900)
        assert done.returncode == 0, done.stderr

    shutil.copytree(made_once(factory, family, build), folder, dirs_exist_ok=True)


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder of the run that is filled once; it is read by others, so copy what is to be changed."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each process has a folder of its own in the run's
        root = root.parent
    folder, done = root / f"shared-{name}", root / f"shared-{name}.done"
    with (root / f"shared-{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # what one that failed has left
            folder.mkdir()
            make(folder)
            done.touch()
    return folder
