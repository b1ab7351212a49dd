"""vLLM's own layers with the plugin: what a slot holds, what is computed, and what is not allocated."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("options", ["1", "2", "2 fully-sharded", "4", "4 fully-sharded"])
def test_layers(options: str) -> None:
    """With 1, 2 and 4 ranks (4 are more than the key/value heads), in processes of their own: vLLM changes logging and
    torch's settings when it is imported."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed (make venv installs it)")
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.serve_layers", *options.split()],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("6 layers checked") == int(options.split()[0])
