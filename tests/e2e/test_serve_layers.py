"""vLLM's own layers with the plugin: what a slot holds, what is computed, and what is not allocated."""

from __future__ import annotations

import importlib.util

import pytest

from tests.conftest import ROOT
from tests.support import preloaded

CASES = ["1", "2", "2 fully-sharded", "4", "4 fully-sharded"]


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    """What each case wrote: in one process of its own, which vLLM's import changes (logging, torch's settings)."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed (make venv installs it)")
    done = preloaded.run("vllm", ["tests.support.serve_layers", *CASES], cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    parts = [part.partition(":") for part in done.stdout.split("case ")[1:]]
    return {case: text if "right" in text else text + done.stderr[-3000:] for case, _, text in parts}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_layers(said: dict[str, str], case: str) -> None:
    """With 1, 2 and 4 ranks (4 are more than the key/value heads)."""
    assert said[case].split()[-1:] == ["right"], said[case]
    assert said[case].count("6 layers checked") == int(case.split()[0])
