"""PEFT knows SOKA in a program that imports torch and then PEFT, and nothing of ours; each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

INSTALL = "import torch\nfrom soka_serve.autoload import install\ninstall()\ninstall()\n"  # torch calls it once


def run(code: str, root: Path) -> subprocess.CompletedProcess[str]:
    # Of other libraries' imports; our own warning would still be an error.
    quiet = ["-W", "error::UserWarning:soka_serve", "-W", "ignore::DeprecationWarning"]
    return subprocess.run([sys.executable, *quiet, "-c", code], cwd=root, capture_output=True, text=True, check=False)


@pytest.mark.slow  # imports torch and PEFT
@pytest.mark.parametrize(
    "before",
    ["", "import importlib.util\nassert importlib.util.find_spec('peft')\n", "import soka_serve.peft\n"],
    ids=["plain", "looked for first", "ours first"],
)
def test_peft_knows_the_type(root: Path, before: str) -> None:
    code = f"{INSTALL}{before}import peft, importlib.resources\nprint(peft.PeftType.SOKA.value)\n"
    code += "print(type(peft.__loader__).__name__, importlib.resources.files('peft').joinpath('__init__.py').is_file())"
    done = run(code, root)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["SOKA", "SourceFileLoader", "True"]


@pytest.mark.slow
def test_a_failure_does_not_stop_peft(root: Path) -> None:
    """A program that uses PEFT for something else goes on, and is told."""
    code = f"{INSTALL}import sys\nsys.modules['soka_serve.peft'] = None\nimport peft\n"
    code += "print('SOKA' in peft.PeftType.__members__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["False"]
    assert "soka-serve could not register its adapter type with PEFT" in done.stderr


def test_it_is_the_entry_point_that_torch_calls(root: Path) -> None:
    assert 'soka_serve = "soka_serve.autoload:install"' in (root / "pyproject.toml").read_text()
    code = (
        "import sys\nimport soka_serve.autoload\nprint([m for m in ('torch', 'peft', 'pydantic') if m in sys.modules])"
    )
    assert run(code, root).stdout == "[]\n"
