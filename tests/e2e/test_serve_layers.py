"""vLLM's own layers with the plugin: what a slot holds, what is computed, and what is not allocated."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_layers() -> None:
    """In a process of its own: vLLM changes logging and torch's settings when it is imported."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed (make venv installs it)")
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.serve_layers"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "3 layers checked" in done.stdout
