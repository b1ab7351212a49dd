"""What the plugin changes in vLLM is what its table says, in every process of vLLM."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from soka_vllm.hooks import HOOKS, SIGNATURES
from tests.conftest import ROOT
from tests.support import preloaded

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (make venv installs it)"
    ),
]


def test_the_table_names_all_that_is_rebound() -> None:
    done = preloaded.run("vllm", ["tests.support.hooked", "all"], cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def test_modules_that_are_imported_later_are_rebound() -> None:
    modules = ("vllm.v1.engine.core", "vllm.entrypoints.openai.models.serving")
    command = [sys.executable, "-m", "tests.support.hooked", *modules]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_name_has_one_row() -> None:
    names = [(hook.module, hook.name) for hook in HOOKS]
    assert len(set(names)) == len(names)
    signed = [(signature.module, signature.name) for signature in SIGNATURES]
    assert len(set(signed)) == len(signed)
